//! Format strings with Envoy's command operators, `[%START_TIME%] "%REQ(:METHOD)%" …`, compiled once and rendered often.
//!
//! Access logs, header edits and tags all speak this language (contract runtime §7.5, §7.6; contract xds §4.5).
//! [`Template::parse`] refuses what Envoy refuses, and says where. What Envoy knows but the record of an exchange does not hold
//! (cipher names, certificate serials, …) is accepted and rendered as an absent value; [`Template::unrecorded`] names it, so that
//! whoever compiles a configuration can list it. An absent value is `-` in a log line and nothing in a header. Rendering
//! allocates nothing but what `out` needs and never fails.

mod fact;
pub(crate) mod fields;
mod noted;
mod operator;
mod parse;
mod span;
pub(crate) mod state;
#[cfg(test)]
pub(crate) mod tests;
mod time;
mod unrecorded;
mod value;

use std::borrow::Cow;

use http::{HeaderMap, HeaderName};

pub use parse::{FormatError, FormatProblem};
pub use value::{Kind, Value};

use crate::{Exchange, RequestHead};
use operator::Operator;

/// A compiled format string.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    parts: Box<[Part]>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Literal(Box<str>),
    Operator {
        operator: Operator,
        /// At most so many bytes of the value.
        max: Option<usize>,
        /// As written, without the percent signs.
        token: Box<str>,
    },
}

/// What a template is rendered from: the record, and what the record does not keep.
#[derive(Clone, Copy)]
pub struct View<'a> {
    /// The record.
    pub exchange: &'a Exchange,
    /// The request, where it is not (or no longer) `exchange.request`.
    pub request: Option<&'a RequestHead>,
    /// All fields of the answer; without it the record's `response_headers` are read.
    pub response: Option<&'a HeaderMap>,
    /// The answer's trailers.
    pub trailers: Option<&'a HeaderMap>,
    /// Objects of the filter state, by key, or by `key:field` for `%FILTER_STATE(key:FIELD:field)%`. What it does not know is looked
    /// for in the record: `io.istio.peer_principal`, `io.istio.local_principal`, `downstream_peer_obj`, `upstream_peer_obj`, ….
    pub filter_state: Option<FilterState<'a>>,
    /// Metadata, by origin, namespace and path. Without it there is what the record has: what filters have noted.
    pub metadata: Option<Metadata<'a>>,
}

/// Looks up an object of the filter state as text.
pub type FilterState<'a> = &'a dyn Fn(&str) -> Option<Cow<'a, str>>;

/// Looks up metadata by origin, namespace and path; an empty path asks for the whole namespace.
pub type Metadata<'a> = &'a dyn Fn(MetadataOf, &str, &[Box<str>]) -> Option<Value<'a>>;

/// Whose metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MetadataOf {
    /// Of the exchange: what filters wrote.
    Dynamic,
    /// Of the chosen cluster.
    Cluster,
    /// Of the chosen endpoint.
    Upstream,
    /// Of the chosen route.
    Route,
    /// Of the virtual host.
    VirtualHost,
    /// Of the listener.
    Listener,
}

/// What stands for a value that is not there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Absent {
    /// `-`, as in log lines.
    #[default]
    Dash,
    /// Nothing, as in header values and with `omit_empty_values`.
    Empty,
}

// === impl Template ===

impl Template {
    /// Compiles a format string.
    pub fn parse(text: &str) -> Result<Self, FormatError> {
        parse::template(text, parse::Unknown::Refused).map(|parts| Self { parts })
    }

    /// The template of one piece of dynamic metadata.
    pub fn of_metadata(namespace: &str, path: impl IntoIterator<Item = String>) -> Self {
        let operator = Operator::Metadata {
            of: MetadataOf::Dynamic,
            namespace: namespace.into(),
            path: path.into_iter().map(String::into_boxed_str).collect(),
        };
        let token = format!("DYNAMIC_METADATA({namespace})").into();
        Self {
            parts: [Part::Operator {
                operator,
                max: None,
                token,
            }]
            .into(),
        }
    }

    /// Compiles the format string of a log. Formatters add operators to Envoy, and versions do: one that has no name here is accepted
    /// as an absent value, and [`Template::unrecorded`] names it. What is wrong in itself is refused as ever.
    pub fn parse_log(text: &str) -> Result<Self, FormatError> {
        parse::template(text, parse::Unknown::Absent).map(|parts| Self { parts })
    }

    /// Appends the text to `out`; absent values are `-`.
    pub fn render(&self, view: &View<'_>, out: &mut Vec<u8>) {
        self.render_with(view, Absent::Dash, out);
    }

    /// Appends the text to `out`; absent values are empty, as Envoy does in header values.
    pub fn render_header(&self, view: &View<'_>, out: &mut Vec<u8>) {
        self.render_with(view, Absent::Empty, out);
    }

    /// Appends the text to `out`.
    pub fn render_with(&self, view: &View<'_>, absent: Absent, out: &mut Vec<u8>) {
        for part in &self.parts {
            match part {
                Part::Literal(text) => out.extend_from_slice(text.as_bytes()),
                Part::Operator { operator, max, .. } => match operator.value(view) {
                    Value::Absent if absent == Absent::Dash => out.push(b'-'),
                    value => value.limited(*max).write(out),
                },
            }
        }
    }

    /// The value with its type, for typed JSON: a template of one operator alone has that operator's type, every other is text.
    pub fn evaluate<'t, 'a: 't>(&'t self, view: &View<'a>, absent: Absent) -> Value<'t> {
        match &*self.parts {
            [] => Value::text(""),
            [Part::Literal(text)] => Value::text(text),
            [Part::Operator { operator, max, .. }] => operator.value(view).limited(*max),
            _ => {
                let mut text = Vec::new();
                self.render_with(view, absent, &mut text);
                Value::Text(text.into())
            }
        }
    }

    /// The fields of the answer that it reads, so that a chain can keep them in the record.
    pub fn response_headers(&self) -> impl Iterator<Item = &HeaderName> {
        self.operators().flat_map(Operator::response_headers)
    }

    /// The operators that are accepted but always absent, as they were written.
    pub fn unrecorded(&self) -> impl Iterator<Item = &str> {
        self.parts.iter().filter_map(|part| match part {
            Part::Operator { operator, token, .. } if operator.lacks() => Some(&**token),
            Part::Operator { .. } | Part::Literal(_) => None,
        })
    }

    /// The text, when there is no operator in it.
    pub fn is_literal(&self) -> Option<&str> {
        match &*self.parts {
            [] => Some(""),
            [Part::Literal(text)] => Some(text),
            _ => None,
        }
    }

    fn operators(&self) -> impl Iterator<Item = &Operator> {
        self.parts.iter().filter_map(|part| match part {
            Part::Operator { operator, .. } => Some(operator),
            Part::Literal(_) => None,
        })
    }
}

impl std::str::FromStr for Template {
    type Err = FormatError;

    fn from_str(text: &str) -> Result<Self, FormatError> {
        Self::parse(text)
    }
}

// === impl View ===

impl<'a> View<'a> {
    /// A view of the record alone.
    pub fn new(exchange: &'a Exchange) -> Self {
        Self {
            exchange,
            request: None,
            response: None,
            trailers: None,
            filter_state: None,
            metadata: None,
        }
    }

    /// The request.
    pub fn request(&self) -> Option<&'a RequestHead> {
        self.request.or(self.exchange.request.as_ref())
    }

    /// An object of the filter state as text, under the names that istiod's configuration uses or filters have put it.
    pub fn filter_state(&self, key: &str) -> Option<Vec<u8>> {
        match state::filter_state(self, key, None, key) {
            Value::Absent => None,
            value => {
                let mut text = Vec::new();
                value.write(&mut text);
                Some(text)
            }
        }
    }

    /// Whether the request is gRPC.
    pub fn is_grpc(&self) -> bool {
        self.request().is_some_and(RequestHead::is_grpc)
    }

    /// The code of a gRPC exchange: the answer's own, else what its HTTP status stands for (gRPC's http-grpc-status-mapping);
    /// `None` when the request is not gRPC or nothing was answered.
    pub fn grpc_code(&self) -> Option<u32> {
        if self.is_grpc() { self.answered_grpc_code() } else { None }
    }

    /// The same of any exchange.
    pub(crate) fn answered_grpc_code(&self) -> Option<u32> {
        self.exchange.grpc_status.or_else(|| {
            Some(match self.exchange.status?.as_u16() {
                400 => 13,
                401 => 16,
                403 => 7,
                404 => 12,
                429 | 502 | 503 | 504 => 14,
                _ => 2,
            })
        })
    }
}
