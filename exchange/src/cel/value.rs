//! Values of expressions: equality, order, and what is found in maps.
//!
//! Texts are bytes inside, since header values need not be UTF-8. Maps of the record are looked into where they are; nothing is copied to
//! ask whether a header is there.

use std::{borrow::Cow, cmp::Ordering};

use serde_json::Value as Json;

use super::attribute::{Headers, Root};
use crate::format::View;

/// A value.
#[derive(Clone, Debug)]
pub enum Value<'a> {
    /// Nothing.
    Null,
    /// A truth value.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A whole number that is not negative.
    Uint(u64),
    /// A number.
    Double(f64),
    /// A text.
    Text(Cow<'a, [u8]>),
    /// Bytes.
    Bytes(Cow<'a, [u8]>),
    /// A span of time, in nanoseconds.
    Duration(i128),
    /// A moment, in nanoseconds since 1970.
    Time(i128),
    /// A list.
    List(Vec<Value<'a>>),
    /// A list of metadata.
    JsonList(&'a [Json]),
    /// A map.
    Map(Map<'a>),
    /// What `type()` says.
    Type(&'static str),
}

/// A map.
#[derive(Clone, Debug)]
pub enum Map<'a> {
    /// Written in the expression.
    Entries(Vec<(Value<'a>, Value<'a>)>),
    /// A structure of metadata.
    Json(&'a serde_json::Map<String, Json>),
    /// One of the record's own.
    #[doc(hidden)]
    Root(Root),
    /// Headers or trailers.
    #[doc(hidden)]
    Headers(Headers),
    /// All namespaces of dynamic metadata.
    Namespaces,
    /// One namespace of dynamic metadata.
    Namespace(Cow<'a, [u8]>),
    /// An object of filter state that has fields.
    Object(Cow<'a, str>),
    /// None that can be there.
    Empty,
}

/// Why an expression has no value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// An attribute, a field or a key.
    #[error("something it asks for is not there")]
    NotThere,
    /// A name that means nothing.
    #[error("it names a variable that there is not")]
    UnknownName,
    /// Operator or function.
    #[error("an operator or a function does not take these kinds of values")]
    NoOverload,
    /// Division by zero.
    #[error("it divides by zero")]
    DivisionByZero,
    /// A number or a time.
    #[error("a number or a time is out of range")]
    OutOfRange,
    /// A text that is not what it is taken for.
    #[error("a text cannot be converted")]
    Conversion,
    /// A text that would grow too long.
    #[error("a text grows too long")]
    TooLong,
    /// Two entries of a map.
    #[error("a map has a key twice")]
    RepeatedKey,
}

// === impl Value ===

impl<'a> Value<'a> {
    pub(super) fn text(text: &'a str) -> Self {
        Self::Text(Cow::Borrowed(text.as_bytes()))
    }

    /// A value of metadata. Numbers are floating-point there.
    pub(super) fn json(value: &'a Json) -> Self {
        match value {
            Json::Null => Self::Null,
            Json::Bool(value) => Self::Bool(*value),
            Json::Number(number) => Self::Double(number.as_f64().unwrap_or(f64::NAN)),
            Json::String(text) => Self::text(text),
            Json::Array(items) => Self::JsonList(items),
            Json::Object(entries) => Self::Map(Map::Json(entries)),
        }
    }

    /// Its items, where it is a list.
    pub(super) fn items(&self) -> Option<Vec<Value<'a>>> {
        match self {
            Self::List(items) => Some(items.clone()),
            Self::JsonList(items) => Some(items.iter().map(Self::json).collect()),
            _ => None,
        }
    }

    /// The name of its type.
    pub(super) fn type_name(&self) -> &'static str {
        match self {
            Self::Null => "null_type",
            Self::Bool(_) => "bool",
            Self::Int(_) => "int",
            Self::Uint(_) => "uint",
            Self::Double(_) => "double",
            Self::Text(_) => "string",
            Self::Bytes(_) => "bytes",
            Self::Duration(_) => "google.protobuf.Duration",
            Self::Time(_) => "google.protobuf.Timestamp",
            Self::List(_) | Self::JsonList(_) => "list",
            Self::Map(_) => "map",
            Self::Type(_) => "type",
        }
    }

    /// Equality: numbers by their value, whatever their kind; other kinds are never equal to each other.
    pub(super) fn equals(&self, other: &Self, view: &View<'a>) -> bool {
        match (self, other) {
            (Self::Null, Self::Null) => true,
            (Self::Text(a), Self::Text(b)) | (Self::Bytes(a), Self::Bytes(b)) => a == b,
            (Self::Type(a), Self::Type(b)) => a == b,
            (Self::JsonList(a), Self::JsonList(b)) => a == b,
            (Self::Map(a), Self::Map(b)) => match (a.entries(view), b.entries(view)) {
                (Some(a), Some(b)) => {
                    let found = |(key, value): &(Value<'a>, Value<'a>)| {
                        b.iter()
                            .any(|(other, its)| key.equals(other, view) && value.equals(its, view))
                    };
                    a.len() == b.len() && a.iter().all(found)
                }
                _ => false,
            },
            _ => match (self.items(), other.items()) {
                (Some(a), Some(b)) => a.len() == b.len() && a.iter().zip(&b).all(|(a, b)| a.equals(b, view)),
                _ => self.compare(other) == Some(Ordering::Equal),
            },
        }
    }

    /// Order, where there is one. NaN has none.
    pub(super) fn compare(&self, other: &Self) -> Option<Ordering> {
        match (self, other) {
            (Self::Bool(a), Self::Bool(b)) => Some(a.cmp(b)),
            (Self::Text(a), Self::Text(b)) | (Self::Bytes(a), Self::Bytes(b)) => Some(a.cmp(b)),
            (Self::Duration(a), Self::Duration(b)) | (Self::Time(a), Self::Time(b)) => Some(a.cmp(b)),
            _ => match (self.whole(), other.whole()) {
                (Some(a), Some(b)) => Some(a.cmp(&b)),
                _ => self.number()?.partial_cmp(&other.number()?),
            },
        }
    }

    /// Whether values of these kinds have an order at all.
    pub(super) fn is_comparable(&self, other: &Self) -> bool {
        let numbers = self.number().is_some() && other.number().is_some();
        numbers
            || matches!(
                (self, other),
                (Self::Bool(_), Self::Bool(_))
                    | (Self::Text(_), Self::Text(_))
                    | (Self::Bytes(_), Self::Bytes(_))
                    | (Self::Duration(_), Self::Duration(_))
                    | (Self::Time(_), Self::Time(_))
            )
    }

    fn whole(&self) -> Option<i128> {
        match self {
            Self::Int(number) => Some((*number).into()),
            Self::Uint(number) => Some((*number).into()),
            _ => None,
        }
    }

    #[allow(
        clippy::cast_precision_loss,
        reason = "whole numbers are compared with floating-point ones as such"
    )]
    fn number(&self) -> Option<f64> {
        match self {
            Self::Double(number) => Some(*number),
            _ => self.whole().map(|number| number as f64),
        }
    }

    /// What stands under a key or at a place; fields are keys.
    pub(super) fn at(&self, key: &Value<'a>, view: &View<'a>) -> Result<Value<'a>, Failure> {
        let place = match key {
            Value::Double(number) if number.fract() == 0.0 => Some(*number as i128),
            key => key.whole(),
        };
        let place = place.and_then(|place| usize::try_from(place).ok());
        match self {
            Self::List(items) => {
                let place = place.ok_or(Failure::NoOverload)?;
                items.get(place).cloned().ok_or(Failure::NotThere)
            }
            Self::JsonList(items) => {
                let place = place.ok_or(Failure::NoOverload)?;
                items.get(place).map(Self::json).ok_or(Failure::NotThere)
            }
            Self::Map(map) => map.get(key, view),
            _ => Err(Failure::NoOverload),
        }
    }
}

// === impl Map ===

impl<'a> Map<'a> {
    /// The value of a key.
    pub(super) fn get(&self, key: &Value<'a>, view: &View<'a>) -> Result<Value<'a>, Failure> {
        if let Self::Entries(entries) = self {
            let found = entries.iter().find(|(known, _)| known.equals(key, view));
            return found.map(|(_, value)| value.clone()).ok_or(Failure::NotThere);
        }
        let Value::Text(text) = key else {
            return Err(Failure::NotThere);
        };
        let name = std::str::from_utf8(text).map_err(|_| Failure::NotThere)?;
        match self {
            Self::Entries(_) | Self::Empty => None,
            Self::Json(entries) => entries.get(name).map(Value::json),
            Self::Root(root) => root.get(text, view),
            Self::Headers(headers) => headers.get(name, view),
            Self::Namespaces => {
                let there = view.exchange.metadata.namespace(name).next().is_some();
                there.then(|| Value::Map(Map::Namespace(text.clone())))
            }
            Self::Namespace(namespace) => {
                let namespace = std::str::from_utf8(namespace).map_err(|_| Failure::NotThere)?;
                view.exchange.metadata.entry(namespace, name).map(Value::json)
            }
            Self::Object(object) => super::attribute::field_of(object, name, view),
        }
        .ok_or(Failure::NotThere)
    }

    /// Everything in it, where it can be listed.
    pub(super) fn entries(&self, view: &View<'a>) -> Option<Vec<(Value<'a>, Value<'a>)>> {
        Some(match self {
            Self::Entries(entries) => entries.clone(),
            Self::Json(entries) => entries
                .iter()
                .map(|(key, value)| (Value::text(key), Value::json(value)))
                .collect(),
            Self::Headers(headers) => headers.entries(view),
            Self::Namespace(namespace) => {
                let namespace = std::str::from_utf8(namespace).ok()?;
                let noted = view.exchange.metadata.namespace(namespace);
                noted
                    .map(|(key, value)| (Value::Text(key.as_bytes().to_vec().into()), Value::json(value)))
                    .collect()
            }
            Self::Empty => Vec::new(),
            Self::Root(_) | Self::Namespaces | Self::Object(_) => return None,
        })
    }

    /// How many entries it has; what cannot be listed says none, as in Envoy.
    pub(super) fn size(&self, view: &View<'a>) -> usize {
        self.entries(view).map_or(0, |entries| entries.len())
    }
}
