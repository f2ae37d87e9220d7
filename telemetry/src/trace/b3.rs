//! Zipkin's context: `x-b3-*`, or all of it in `b3`.

use std::fmt::Write;

use http::{HeaderMap, HeaderName, HeaderValue};

use super::{
    Context, Parent, Unreadable,
    context::{first, hex, set},
};

const B3: HeaderName = HeaderName::from_static("b3");
const TRACE: HeaderName = HeaderName::from_static("x-b3-traceid");
const SPAN: HeaderName = HeaderName::from_static("x-b3-spanid");
const PARENT: HeaderName = HeaderName::from_static("x-b3-parentspanid");
const SAMPLED: HeaderName = HeaderName::from_static("x-b3-sampled");

/// How a context is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Form {
    /// A field for each part.
    #[default]
    Multi,
    /// One field.
    Single,
}

/// The form that a request has its context in.
pub fn form(headers: &HeaderMap) -> Form {
    if headers.contains_key(B3) { Form::Single } else { Form::Multi }
}

/// Reads what a request brings; the single field goes before the others.
pub fn read(headers: &HeaderMap) -> Result<Parent, Unreadable> {
    match first(headers, &B3)? {
        Some(text) => single(text),
        None => multi(headers),
    }
}

/// A trace of 16 or 32 digits.
fn trace(text: &str) -> Result<u128, Unreadable> {
    hex(text, 32).or_else(|| hex(text, 16)).ok_or(Unreadable)
}

fn span(text: &str) -> Result<u64, Unreadable> {
    hex(text, 16).and_then(|span| u64::try_from(span).ok()).ok_or(Unreadable)
}

fn flag(text: &str) -> Result<bool, Unreadable> {
    match text {
        "0" => Ok(false),
        "1" | "d" => Ok(true),
        _ => Err(Unreadable),
    }
}

/// `trace-span`, `trace-span-flag`, `trace-span-flag-parent` or `flag`.
fn single(text: &str) -> Result<Parent, Unreadable> {
    let mut parts = text.split('-');
    let first = parts.next().unwrap_or_default();
    let Some(second) = parts.next() else {
        return flag(first).map(Parent::Decision);
    };
    let (trace, span_id) = (trace(first)?, span(second)?);
    let sampled = parts.next().map(flag).transpose()?;
    let parent = parts.next().map(span).transpose()?;
    if parts.next().is_some() {
        return Err(Unreadable);
    }
    Ok(Parent::Span {
        trace,
        span: span_id,
        parent,
        sampled,
    })
}

fn multi(headers: &HeaderMap) -> Result<Parent, Unreadable> {
    let sampled = headers.get(SAMPLED).map(|value| matches!(value.as_bytes(), b"1" | b"true"));
    let (Some(trace_id), Some(span_id)) = (first(headers, &TRACE)?, first(headers, &SPAN)?) else {
        return Ok(sampled.map_or(Parent::None, Parent::Decision));
    };
    let parent = first(headers, &PARENT)?.filter(|parent| !parent.is_empty());
    Ok(Parent::Span {
        trace: trace(trace_id)?,
        span: span(span_id)?,
        parent: parent.map(span).transpose()?,
        sampled,
    })
}

/// A trace in as many digits as it needs: 16, or 32.
pub fn trace_digits(trace: u128) -> String {
    if u64::try_from(trace).is_ok() {
        format!("{trace:016x}")
    } else {
        format!("{trace:032x}")
    }
}

/// Writes the context.
pub fn write(context: &Context, form: Form, headers: &mut HeaderMap) {
    let flag = if context.sampled { "1" } else { "0" };
    let (trace, span) = (trace_digits(context.trace), format!("{:016x}", context.span));
    match form {
        Form::Multi => {
            set(headers, TRACE, &trace);
            set(headers, SPAN, &span);
            if let Some(parent) = context.parent {
                set(headers, PARENT, &format!("{parent:016x}"));
            }
            headers.remove(SAMPLED);
            headers.insert(SAMPLED, HeaderValue::from_static(flag));
        }
        Form::Single => {
            let mut text = format!("{trace}-{span}-{flag}");
            if let Some(parent) = context.parent {
                // Writing to a string does not fail.
                let _ = write!(text, "-{parent:016x}");
            }
            set(headers, B3, &text);
        }
    }
}
