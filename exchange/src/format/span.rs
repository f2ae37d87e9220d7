//! Moments of an exchange and the time between them.

use std::time::Duration;

use super::Value;
use crate::Exchange;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unit {
    Milliseconds,
    Microseconds,
    Nanoseconds,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moment {
    Start,
    RequestReceived,
    FirstUpstreamSent,
    LastUpstreamSent,
    FirstUpstreamReceived,
    LastUpstreamReceived,
    FirstSent,
    LastSent,
    Never,
}

pub(super) fn between<'a>(exchange: &Exchange, from: Moment, to: Moment, unit: Unit) -> Value<'a> {
    let moments = &exchange.moments;
    let at = |moment| match moment {
        Moment::Start => Some(Duration::ZERO),
        Moment::RequestReceived => moments.request_received,
        Moment::FirstUpstreamSent => moments.first_upstream_sent,
        Moment::LastUpstreamSent => moments.last_upstream_sent,
        Moment::FirstUpstreamReceived => moments.first_upstream_received,
        Moment::LastUpstreamReceived => moments.last_upstream_received,
        Moment::FirstSent => moments.first_sent,
        Moment::LastSent => moments.last_sent,
        Moment::Never => None,
    };
    let Some(span) = at(from).and_then(|from| at(to)?.checked_sub(from)) else {
        return Value::Absent;
    };
    let count = match unit {
        Unit::Milliseconds => span.as_millis(),
        Unit::Microseconds => span.as_micros(),
        Unit::Nanoseconds => span.as_nanos(),
    };
    Value::Number(u64::try_from(count).unwrap_or(u64::MAX))
}

pub(super) fn milliseconds<'a>(duration: Option<Duration>) -> Value<'a> {
    duration.map_or(Value::Absent, |duration| {
        Value::Number(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX))
    })
}
