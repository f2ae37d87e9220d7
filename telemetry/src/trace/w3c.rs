//! W3C's trace context: `traceparent` and `tracestate`.

use std::fmt::Write;

use http::{HeaderMap, HeaderName, HeaderValue};

use super::{
    Context, Parent, Unreadable,
    context::{first, hex, set},
};

/// `00-<trace>-<span>-<flags>`
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// What other systems have noted.
pub const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// Letters of a `traceparent`.
const LENGTH: usize = 55;
/// The flag of spans that are kept.
const SAMPLED: u128 = 1;

/// Reads what a request brings.
pub fn read(headers: &HeaderMap) -> Result<Parent, Unreadable> {
    let Some(text) = first(headers, &TRACEPARENT)? else {
        return Ok(Parent::None);
    };
    if text.len() != LENGTH {
        return Err(Unreadable);
    }
    let mut parts = text.split('-');
    let mut next = |digits| parts.next().and_then(|part| hex(part, digits)).ok_or(Unreadable);
    let (_version, trace, span, flags) = (next(2)?, next(32)?, next(16)?, next(2)?);
    let span = u64::try_from(span).map_err(|_| Unreadable)?;
    if trace == 0 || span == 0 {
        return Err(Unreadable);
    }
    Ok(Parent::Span {
        trace,
        span,
        parent: None,
        sampled: Some(flags & SAMPLED != 0),
    })
}

/// What other systems have noted, all fields in one.
pub fn state(headers: &HeaderMap) -> Option<HeaderValue> {
    let mut all = headers.get_all(TRACESTATE).iter();
    let first = all.next()?;
    if all.next().is_none() {
        return Some(first.clone());
    }
    let joined: Vec<_> = headers.get_all(TRACESTATE).iter().map(HeaderValue::as_bytes).collect();
    HeaderValue::from_bytes(&joined.join(&b',')).ok()
}

/// Writes the context, and what other systems have noted, if anything.
pub fn write(context: &Context, state: Option<&HeaderValue>, headers: &mut HeaderMap) {
    let mut text = String::with_capacity(LENGTH);
    // Writing to a string does not fail.
    let _ = write!(
        text,
        "00-{:032x}-{:016x}-{:02x}",
        context.trace,
        context.span,
        u8::from(context.sampled)
    );
    set(headers, TRACEPARENT, &text);
    headers.remove(TRACESTATE);
    // Envoy writes it without content too.
    headers.insert(TRACESTATE, state.cloned().unwrap_or(HeaderValue::from_static("")));
}
