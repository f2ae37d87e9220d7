//! Header fields of requests, answers and trailers.

use http::{HeaderMap, HeaderName};

use super::{Value, View};
use crate::{RequestHead, Scheme};

/// A header field and the one to take when it is missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fields {
    pub(super) main: Field,
    pub(super) alternative: Option<Field>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Field {
    Method,
    Path,
    Authority,
    Scheme,
    Status,
    Name(HeaderName),
    /// A pseudo-header that no message of ours has, `:protocol`.
    Never,
}

// === impl Fields ===

impl Fields {
    pub(super) fn find<'a>(&self, find: impl Fn(&Field) -> Option<&'a [u8]>) -> Value<'a> {
        find(&self.main)
            .or_else(|| find(self.alternative.as_ref()?))
            .map_or(Value::Absent, |text| Value::Text(text.into()))
    }
}

pub(super) fn request_field<'a>(head: &'a RequestHead, field: &Field) -> Option<&'a [u8]> {
    match field {
        Field::Method => Some(head.method.as_str().as_bytes()),
        Field::Path => Some(head.path.as_str().as_bytes()),
        Field::Authority => Some(head.authority.as_bytes()).filter(|authority| !authority.is_empty()),
        Field::Scheme => Some(match head.scheme {
            Scheme::Http => b"http",
            Scheme::Https => b"https",
        }),
        Field::Status | Field::Never => None,
        Field::Name(name) => head.headers.get(name).map(|value| value.as_bytes()),
    }
}

pub(super) fn map_field<'a>(headers: &'a HeaderMap, field: &Field) -> Option<&'a [u8]> {
    match field {
        Field::Name(name) => headers.get(name).map(|value| value.as_bytes()),
        _ => None,
    }
}

pub(super) fn response_value<'a>(fields: &Fields, view: &View<'a>) -> Value<'a> {
    let exchange = view.exchange;
    if fields.main == Field::Status {
        return exchange.status.map_or(Value::Absent, |status| {
            Value::Text(status.as_str().as_bytes().to_vec().into())
        });
    }
    fields.find(|field| match (view.response, field) {
        (Some(headers), field) => map_field(headers, field),
        (None, Field::Name(name)) => exchange
            .response_headers
            .iter()
            .find(|(kept, _)| kept == name)
            .map(|(_, value)| value.as_bytes()),
        (None, _) => None,
    })
}

pub(crate) fn map_bytes(headers: &HeaderMap) -> u64 {
    let bytes = |(name, value): (&HeaderName, &http::HeaderValue)| name.as_str().len() + value.len();
    headers.iter().map(bytes).sum::<usize>() as u64
}

/// Names and values of the head as Envoy counts them, pseudo-headers among them.
pub(crate) fn request_bytes(head: &RequestHead) -> u64 {
    let pseudo = [Field::Method, Field::Path, Field::Authority, Field::Scheme]
        .iter()
        .zip([":method", ":path", ":authority", ":scheme"])
        .filter_map(|(field, name)| Some(request_field(head, field)?.len() + name.len()))
        .sum::<usize>();
    pseudo as u64 + map_bytes(&head.headers)
}
