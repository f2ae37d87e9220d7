//! What a compilation has to say: what is wrong, and what we cannot do.
//!
//! The unit of both is one filter chain, one cluster, one endpoint assignment (architecture rule 3). A [`Malformed`] unit is not
//! applied: the last good one stays. An [`Unsupported`] item is listed, and either has no effect on decisions, or refuses the unit or
//! the route that it stands in. [`Notes`] collects the items while a message is taken apart, and knows where in it we are.

use std::{borrow::Cow, collections::BTreeMap, fmt};

use serde::Serialize;

/// What an unsupported item does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// The chain, cluster, listener or endpoint that has it is refused.
    Refused,
    /// The route that has it is refused; the other routes of the chain serve.
    RouteRefused,
    /// It is left out; who gets through and what is answered does not depend on it.
    Ignored,
}

/// One thing that istiod asked for and that we do not do.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Unsupported {
    /// The resource: a listener, a cluster, …
    pub resource: String,
    /// The filter chain in it, where it is in one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chain: Option<String>,
    /// The route in it, where it is in one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub route: Option<String>,
    /// Where in the message.
    pub field: String,
    /// What it is.
    pub what: String,
    /// What follows.
    pub effect: Effect,
}

/// Something that has no meaning: Envoy would reject it too.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {what}")]
pub struct Malformed {
    /// Where in the message.
    pub field: String,
    /// What is wrong with it.
    pub what: String,
}

/// Why a resource, or a part of it, was not applied as it is: a sentence of a NACK.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct ResourceError {
    /// The resource.
    pub resource: String,
    /// The filter chain in it.
    pub chain: Option<String>,
    /// Where in the message; empty for all of it.
    pub field: String,
    /// What is wrong.
    pub what: String,
    /// What follows from it.
    pub consequence: Consequence,
}

/// What follows from an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Consequence {
    /// What was there before stays.
    LastGoodStays,
    /// It refuses traffic.
    Refuses,
}

/// What is found while one unit is taken apart.
#[derive(Debug)]
pub struct Notes {
    resource: String,
    chain: Option<String>,
    route: Option<String>,
    path: Vec<Cow<'static, str>>,
    list: Vec<Unsupported>,
}

/// Whether a field of a message is set.
pub(crate) trait Present {
    /// Whether it is.
    fn present(&self) -> bool;
}

/// Lists each of these fields that is set as one that can decide.
macro_rules! refuse_set {
    ($notes:expr, $($field:ident),* $(,)?) => {
        { $( if $crate::config::report::Present::present(&$field) { $notes.refuse(stringify!($field), "is not supported"); } )* }
    };
}

/// Lists each of these fields that is set as one that decides nothing.
macro_rules! ignore_set {
    ($notes:expr, $($field:ident),* $(,)?) => {
        { $( if $crate::config::report::Present::present(&$field) { $notes.ignore(stringify!($field), "is not supported"); } )* }
    };
}

/// Names fields that have no bearing on what we do, so that taking a message apart stays exhaustive.
macro_rules! unneeded {
    ($($field:expr),* $(,)?) => { { $( let _ = &$field; )* } };
}

pub(crate) use {ignore_set, refuse_set, unneeded};

// === impl Notes ===

impl Notes {
    /// Notes about a resource.
    pub fn of(resource: impl Into<String>) -> Self {
        Self {
            resource: resource.into(),
            chain: None,
            route: None,
            path: Vec::new(),
            list: Vec::new(),
        }
    }

    /// Notes about one filter chain of a listener.
    pub fn of_chain(resource: impl Into<String>, chain: impl Into<String>) -> Self {
        Self {
            chain: Some(chain.into()),
            ..Self::of(resource)
        }
    }

    /// Runs `f` one level deeper in the message.
    pub(crate) fn within<T>(&mut self, field: impl Into<Cow<'static, str>>, f: impl FnOnce(&mut Self) -> T) -> T {
        self.path.push(field.into());
        let result = f(self);
        self.path.pop();
        result
    }

    /// Runs `f` for the element of a repeated field.
    pub(crate) fn at<T>(&mut self, field: &str, index: usize, f: impl FnOnce(&mut Self) -> T) -> T {
        self.within(format!("{field}[{index}]"), f)
    }

    /// Runs `f` with what it refuses charged to a route, and says whether it refused anything.
    pub(crate) fn in_route<T>(&mut self, route: &str, f: impl FnOnce(&mut Self) -> T) -> (T, Option<String>) {
        let before = self.list.len();
        let outer = self.route.replace(route.to_owned());
        let result = f(self);
        self.route = outer;
        let refused = self
            .list
            .iter()
            .skip(before)
            .find(|item| item.effect == Effect::RouteRefused)
            .map(Unsupported::words);
        (result, refused)
    }

    fn place(&self, field: &str) -> String {
        let mut place = self.path.join(".");
        if !field.is_empty() {
            if !place.is_empty() {
                place.push('.');
            }
            place.push_str(field);
        }
        place
    }

    fn list(&mut self, field: &str, what: String, effect: Effect) {
        let item = Unsupported {
            resource: self.resource.clone(),
            chain: self.chain.clone(),
            route: self.route.clone(),
            field: self.place(field),
            what,
            effect,
        };
        if !self.list.contains(&item) {
            self.list.push(item);
        }
    }

    /// Lists something that can decide: the unit (or the route) refuses.
    pub(crate) fn refuse(&mut self, field: &str, what: impl Into<String>) {
        let effect = if self.route.is_some() {
            Effect::RouteRefused
        } else {
            Effect::Refused
        };
        self.list(field, what.into(), effect);
    }

    /// Lists something that decides nothing.
    pub(crate) fn ignore(&mut self, field: &str, what: impl Into<String>) {
        self.list(field, what.into(), Effect::Ignored);
    }

    /// An error here.
    pub(crate) fn malformed(&self, field: &str, what: impl Into<String>) -> Malformed {
        Malformed {
            field: self.place(field),
            what: what.into(),
        }
    }

    /// How many items refuse the unit so far.
    pub(crate) fn refusals(&self) -> usize {
        self.list.iter().filter(|item| item.effect == Effect::Refused).count()
    }

    /// Why the unit is refused, if it is.
    pub(crate) fn refusal(&self) -> Option<String> {
        let mut words = self
            .list
            .iter()
            .filter(|item| item.effect == Effect::Refused)
            .map(Unsupported::words);
        let first = words.next()?;
        Some(match words.count() {
            0 => first,
            more => format!("{first} (and {more} more)"),
        })
    }

    /// Everything listed.
    pub(crate) fn into_list(self) -> Vec<Unsupported> {
        self.list
    }
}

// === impl Unsupported ===

impl Unsupported {
    /// Where and what, without the resource.
    pub(crate) fn words(&self) -> String {
        if self.field.is_empty() {
            self.what.clone()
        } else {
            format!("{}: {}", self.field, self.what)
        }
    }

    /// The sentence for a NACK, where there has to be one.
    pub(crate) fn error(&self) -> Option<ResourceError> {
        (self.effect != Effect::Ignored).then(|| ResourceError {
            resource: self.resource.clone(),
            chain: self.chain.clone(),
            field: self.field.clone(),
            what: self.what.clone(),
            consequence: Consequence::Refuses,
        })
    }
}

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.resource)?;
        if let Some(chain) = &self.chain {
            write!(f, ", chain {chain}")?;
        }
        if let Some(route) = &self.route {
            write!(f, ", route {route}")?;
        }
        write!(f, ": {}", self.words())?;
        f.write_str(match self.effect {
            Effect::Refused => " [refused]",
            Effect::RouteRefused => " [route refused]",
            Effect::Ignored => " [ignored]",
        })
    }
}

// === impl ResourceError ===

impl ResourceError {
    /// A malformed unit whose predecessor stays.
    pub(crate) fn malformed(resource: &str, chain: Option<&str>, malformed: Malformed) -> Self {
        let Malformed { field, what } = malformed;
        let consequence = Consequence::LastGoodStays;
        Self {
            resource: resource.to_owned(),
            chain: chain.map(str::to_owned),
            field,
            what,
            consequence,
        }
    }
}

impl fmt::Display for ResourceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.resource)?;
        if let Some(chain) = &self.chain {
            write!(f, ", chain {chain}")?;
        }
        if !self.field.is_empty() {
            write!(f, ", {}", self.field)?;
        }
        write!(f, ": {}", self.what)?;
        match self.consequence {
            Consequence::LastGoodStays => Ok(()),
            Consequence::Refuses => f.write_str("; it refuses its traffic until this is gone"),
        }
    }
}

// === impl Present ===

impl<T: Present> Present for &T {
    fn present(&self) -> bool {
        T::present(self)
    }
}

impl<T> Present for Option<T> {
    fn present(&self) -> bool {
        self.is_some()
    }
}

impl<T> Present for Vec<T> {
    fn present(&self) -> bool {
        !self.is_empty()
    }
}

impl<K, V> Present for BTreeMap<K, V> {
    fn present(&self) -> bool {
        !self.is_empty()
    }
}

impl Present for String {
    fn present(&self) -> bool {
        !self.is_empty()
    }
}

macro_rules! present_unless_default {
    ($($type:ty),*) => { $( impl Present for $type {
        fn present(&self) -> bool {
            *self != <$type>::default()
        }
    } )* };
}

present_unless_default!(bool, i32, i64, u32, u64);
