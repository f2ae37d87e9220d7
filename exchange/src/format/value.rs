//! What an operator yields: a typed value that writes itself.

use std::{
    borrow::Cow,
    io::Write,
    net::{IpAddr, SocketAddr},
    time::SystemTime,
};

use super::time::TimeFormat;
use crate::ResponseFlags;

/// The value of an operator.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Value<'a> {
    /// Not there.
    Absent,
    /// Text; bytes, because header values need not be UTF-8.
    Text(Cow<'a, [u8]>),
    /// A number.
    Number(u64),
    /// An object, list, fraction or truth value, as JSON.
    Json(Cow<'a, str>),
    /// Address and port.
    Address(SocketAddr),
    /// Address alone.
    Ip(IpAddr),
    /// Response flags by their short words.
    Flags(ResponseFlags),
    /// A time of day in a format.
    #[doc(hidden)]
    Time(&'a TimeFormat, SystemTime),
}

/// What a value is in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `null`
    Absent,
    /// A string: what [`Value::write`] writes, quoted and escaped.
    Text,
    /// A number, or other JSON: what [`Value::write`] writes.
    Raw,
}

// === impl Value ===

impl<'a> Value<'a> {
    /// A text.
    pub fn text(text: &'a str) -> Self {
        Self::Text(Cow::Borrowed(text.as_bytes()))
    }

    /// A text that may be missing; an empty one counts as missing.
    pub(super) fn optional(text: Option<&'a str>) -> Self {
        match text {
            Some(text) if !text.is_empty() => Self::text(text),
            _ => Self::Absent,
        }
    }

    pub(super) fn from_text(text: Cow<'a, str>) -> Self {
        Self::Text(match text {
            Cow::Borrowed(text) => Cow::Borrowed(text.as_bytes()),
            Cow::Owned(text) => Cow::Owned(text.into_bytes()),
        })
    }

    /// What it is in JSON.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Absent => Kind::Absent,
            Self::Number(_) | Self::Json(_) => Kind::Raw,
            Self::Text(_) | Self::Address(_) | Self::Ip(_) | Self::Flags(_) | Self::Time(..) => Kind::Text,
        }
    }

    /// Appends it to `out`; an absent one appends nothing.
    pub fn write(&self, out: &mut Vec<u8>) {
        const INFALLIBLE: &str = "writing to a vector does not fail";
        match self {
            Self::Absent => {}
            Self::Text(text) => out.extend_from_slice(text),
            Self::Number(number) => out.extend_from_slice(itoa::Buffer::new().format(*number).as_bytes()),
            Self::Json(text) => out.extend_from_slice(text.as_bytes()),
            Self::Address(address) => write!(out, "{address}").expect(INFALLIBLE),
            Self::Ip(ip) => write!(out, "{ip}").expect(INFALLIBLE),
            Self::Flags(flags) => write!(out, "{flags}").expect(INFALLIBLE),
            Self::Time(format, time) => format.write(*time, out),
        }
    }

    /// At most `max` bytes of it.
    pub(super) fn limited(self, max: Option<usize>) -> Self {
        let Some(max) = max else { return self };
        match self {
            Self::Text(Cow::Borrowed(text)) => Self::Text(Cow::Borrowed(text.get(..max).unwrap_or(text))),
            Self::Text(Cow::Owned(mut text)) => {
                text.truncate(max);
                Self::Text(Cow::Owned(text))
            }
            Self::Absent => Self::Absent,
            other => {
                let mut text = Vec::new();
                other.write(&mut text);
                if text.len() <= max {
                    return other;
                }
                text.truncate(max);
                Self::Text(text.into())
            }
        }
    }
}
