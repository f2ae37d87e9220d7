//! JSON Web Tokens: which a request must have, whether they are good, and what they say (contract xds §3.6).
//!
//! * [`Authentication`] is one configured filter: [`Provider`]s, and [`Rule`]s that say which [`Requirement`] a request must meet;
//! * [`Token`] is a token taken apart, [`Keys`] are an issuer's keys;
//! * [`Problem`] is why a token is not accepted, in Envoy's words.
//!
//! All of it is arithmetic on a request's head and a clock that is handed in. Keys that are elsewhere are fetched by the filter
//! (`cairn-filters`), which asks again when it has them.

mod explain;
mod json;
mod keys;
mod location;
mod problem;
mod provider;
mod requirement;
#[cfg(test)]
mod tests;
mod token;

use cairn_exchange::{DynamicMetadata, RequestHead};
use http::{Method, header};

use self::requirement::{Step, Unmet, Walk};
pub use self::{
    explain::{JwtStory, ProviderStory, TokenStory},
    keys::Keys,
    location::Place,
    problem::Problem,
    provider::{KeySource, MAX_VERIFIED, NAMESPACE, Provider, ProviderSettings},
    requirement::{FetchedKeys, Requirement},
    token::{Algorithm, MAX_TOKEN, Token},
};
use crate::route::{Facts, RouteMatch};

/// The filter.
#[derive(Debug)]
pub struct Authentication {
    providers: Vec<Provider>,
    rules: Vec<Rule>,
    named: Vec<(Box<str>, Step)>,
    bypass_cors_preflight: bool,
}

/// A rule: requests that match must meet the requirement; none: they need nothing.
#[derive(Debug)]
pub struct Rule {
    matches: RouteMatch,
    requires: Step,
}

/// What is said of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checked {
    /// It may go on.
    Passed,
    /// It is refused.
    Refused(Problem),
    /// The keys of the provider at this place have to be fetched, then it is asked again, with the head as it was.
    NeedsKeys(usize),
}

/// A rule names a provider that is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("names a provider that is not configured")]
pub struct UnknownProvider;

/// What a route says of the filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PerRoute {
    /// No tokens are looked at.
    Disabled,
    /// The requirement of this name instead of the rules'.
    Requirement(Box<str>),
}

impl Authentication {
    /// A filter with these providers; rules and named requirements speak of them by their place.
    pub fn new(
        providers: Vec<Provider>,
        rules: Vec<(RouteMatch, Requirement)>,
        named: Vec<(Box<str>, Requirement)>,
        bypass_cors_preflight: bool,
    ) -> Result<Self, UnknownProvider> {
        let rules = rules.into_iter().map(|(matches, requires)| {
            let requires = Step::compile(requires, &providers).ok_or(UnknownProvider)?;
            Ok(Rule { matches, requires })
        });
        let rules = rules.collect::<Result<_, _>>()?;
        let named = named.into_iter().map(|(name, requires)| {
            let requires = Step::compile(requires, &providers).ok_or(UnknownProvider)?;
            Ok((name, requires))
        });
        let named = named.collect::<Result<_, _>>()?;
        Ok(Self {
            providers,
            rules,
            named,
            bypass_cors_preflight,
        })
    }

    /// The providers.
    pub fn providers(&self) -> &[Provider] {
        &self.providers
    }

    /// How many rules there are.
    pub fn rules(&self) -> usize {
        self.rules.len()
    }

    /// Whether a requirement of this name is there.
    pub fn has_requirement(&self, name: &str) -> bool {
        self.named.iter().any(|(known, _)| **known == *name)
    }

    /// Decides about a request, tells behind what its good tokens say, and takes out what is not to be forwarded. `now` is in seconds
    /// since 1970, `random` is the request's number.
    pub fn check(
        &self,
        per_route: Option<&PerRoute>,
        head: &mut RequestHead,
        metadata: &mut DynamicMetadata,
        random: u64,
        now: u64,
        fetched: &dyn FetchedKeys,
    ) -> Checked {
        if self.bypass_cors_preflight && is_cors_preflight(head) {
            return Checked::Passed;
        }
        let step = match per_route {
            Some(PerRoute::Disabled) => None,
            Some(PerRoute::Requirement(wanted)) => match self.named.iter().find(|(name, _)| name == wanted) {
                Some((_, step)) => Some(step),
                None => return Checked::Refused(Problem::UnknownIssuer),
            },
            None => self
                .rules
                .iter()
                .find(|rule| rule.matches.matches(head, Facts { random, metadata }))
                .map(|rule| &rule.requires),
        };
        let Some(step) = step else { return Checked::Passed };
        for provider in &self.providers {
            provider.sanitize(head);
        }
        let mut walk = Walk {
            providers: &self.providers,
            fetched,
            now,
            head,
            metadata,
        };
        match walk.check(step) {
            Ok(()) => Checked::Passed,
            Err(Unmet::Refused(problem)) => Checked::Refused(problem),
            Err(Unmet::NeedsKeys(provider)) => Checked::NeedsKeys(provider),
        }
    }
}

/// Browsers ask without credentials whether they may ask.
fn is_cors_preflight(head: &RequestHead) -> bool {
    let has = |name| head.headers.get(name).is_some_and(|value| !value.is_empty());
    head.method == Method::OPTIONS && has(header::ORIGIN) && has(header::ACCESS_CONTROL_REQUEST_METHOD)
}
