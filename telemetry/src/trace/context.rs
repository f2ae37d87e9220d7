//! What requests say of the trace that they belong to.

use http::{HeaderMap, HeaderName, HeaderValue};

/// The span that a request takes along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    /// The trace.
    pub trace: u128,
    /// The span.
    pub span: u64,
    /// The span around it.
    pub parent: Option<u64>,
    /// Whether it is kept.
    pub sampled: bool,
}

/// What a request has brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parent {
    /// Nothing.
    None,
    /// No span, and whether it should be kept.
    Decision(bool),
    /// A span. Whether it is kept may be left to us.
    Span {
        /// The trace.
        trace: u128,
        /// The span.
        span: u64,
        /// The span around it.
        parent: Option<u64>,
        /// Whether it is kept.
        sampled: Option<bool>,
    },
}

/// What a request brings cannot be read: it passes as it is, and the request is not traced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the trace context of the request cannot be read")]
pub struct Unreadable;

/// A number of exactly so many hexadecimal digits.
pub(super) fn hex(text: &str, digits: usize) -> Option<u128> {
    let all = text.len() == digits && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    all.then(|| u128::from_str_radix(text, 16).ok()).flatten()
}

/// The first value of a field, as text.
pub(super) fn first<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a str>, Unreadable> {
    headers.get(name).map(HeaderValue::to_str).transpose().map_err(|_| Unreadable)
}

/// Sets a field to a text of ours, which is always one that can stand in a header.
pub(super) fn set(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        // Envoy's go to the end.
        headers.remove(&name);
        headers.insert(name, value);
    }
}
