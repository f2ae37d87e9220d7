//! Values as texts: as Envoy prints them in formats, and as JSON.

use std::fmt::Write;

use ::time::{OffsetDateTime, format_description::well_known::Rfc3339};
use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::Value as Json;

use super::{time, value::Value};
use crate::format::{Value as Formatted, View};

/// Largest whole number that JSON's numbers hold exactly.
const EXACT: i64 = 1 << 53;

impl<'a> Value<'a> {
    /// For formats. Lists and maps have no text but their name, as in Envoy.
    pub(super) fn formatted(self) -> Formatted<'a> {
        match self {
            Self::Text(text) | Self::Bytes(text) => Formatted::Text(text),
            Self::Null => Formatted::text("NULL"),
            Self::List(_) | Self::JsonList(_) => Formatted::text("CelList value"),
            Self::Map(_) => Formatted::text("CelMap value"),
            Self::Type(_) => Formatted::text("CelType value"),
            Self::Time(nanos) => Formatted::Text(moment(nanos, "+00:00").into_bytes().into()),
            Self::Duration(nanos) => Formatted::Text(span(nanos).into_bytes().into()),
            other => Formatted::Text(converted(&other).into_bytes().into()),
        }
    }

    /// For formats that keep types.
    pub(super) fn typed(self, view: &View<'a>) -> Formatted<'a> {
        match self {
            Self::Text(text) => Formatted::Text(text),
            Self::Null | Self::Type(_) => Formatted::Absent,
            other => match other.to_json(view) {
                Json::String(text) => Formatted::Text(text.into_bytes().into()),
                json => Formatted::Json(json.to_string().into()),
            },
        }
    }

    fn to_json(&self, view: &View<'a>) -> Json {
        match self {
            Self::Null => Json::Null,
            Self::Bool(value) => Json::Bool(*value),
            Self::Int(number) if (-EXACT..=EXACT).contains(number) => Json::from(*number),
            Self::Uint(number) if *number <= EXACT.unsigned_abs() => Json::from(*number),
            Self::Double(number) => whole(*number).map_or_else(|| Json::from(*number), Json::from),
            Self::Bytes(bytes) => Json::from(BASE64_STANDARD.encode(bytes)),
            Self::Time(nanos) => {
                let seconds = moment(nanos - nanos.rem_euclid(time::SECOND), "");
                Json::from(format!("{seconds}{}Z", thirds(nanos.rem_euclid(time::SECOND))))
            }
            Self::Duration(nanos) => {
                let sign = if *nanos < 0 { "-" } else { "" };
                let rest = nanos.abs();
                Json::from(format!("{sign}{}{}s", rest / time::SECOND, thirds(rest % time::SECOND)))
            }
            Self::Int(_) | Self::Uint(_) => Json::from(converted(self)),
            Self::Text(text) => Json::from(String::from_utf8_lossy(text)),
            Self::Type(name) => Json::from(*name),
            Self::List(items) => items.iter().map(|item| item.to_json(view)).collect(),
            Self::JsonList(items) => Json::Array(items.to_vec()),
            Self::Map(map) => {
                let entries = map.entries(view).unwrap_or_default();
                let entry = |(key, value): &(Value<'a>, Value<'a>)| (converted(key), value.to_json(view));
                Json::Object(entries.iter().map(entry).collect())
            }
        }
    }

    /// For people.
    pub(super) fn words(&self, view: &View<'a>) -> String {
        match self {
            Self::Text(text) => format!("\"{}\"", String::from_utf8_lossy(text)),
            Self::Bytes(bytes) => format!("b\"{}\"", bytes.escape_ascii()),
            Self::Time(_) | Self::Duration(_) | Self::Uint(_) => converted(self),
            other => other.to_json(view).to_string(),
        }
    }
}

/// A number without fraction that JSON's numbers hold exactly.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "only where nothing is lost"
)]
fn whole(number: f64) -> Option<i64> {
    (number.fract() == 0.0 && number.abs() <= EXACT as f64).then_some(number as i64)
}

/// A fraction of a second in three, six or nine digits, as protobuf's JSON has it.
fn thirds(nanos: i128) -> String {
    match nanos {
        0 => String::new(),
        nanos if nanos % 1_000_000 == 0 => format!(".{:03}", nanos / 1_000_000),
        nanos if nanos % 1_000 == 0 => format!(".{:06}", nanos / 1_000),
        nanos => format!(".{nanos:09}"),
    }
}

/// As `string()` makes it; a text stays as it is.
pub(super) fn converted(value: &Value<'_>) -> String {
    match value {
        Value::Bool(value) => value.to_string(),
        Value::Int(number) => number.to_string(),
        Value::Uint(number) => number.to_string(),
        Value::Double(number) => double(*number),
        Value::Duration(nanos) => span(*nanos),
        Value::Time(nanos) => moment(*nanos, "Z"),
        Value::Text(text) => String::from_utf8_lossy(text).into_owned(),
        other => other.type_name().to_owned(),
    }
}

/// Six digits, as C's `%g` has them.
fn double(number: f64) -> String {
    const DIGITS: i32 = 6;
    if !number.is_finite() {
        let name = if number.is_nan() { "nan" } else { "inf" };
        return if number < 0.0 { format!("-{name}") } else { name.to_owned() };
    }
    if number == 0.0 {
        return "0".to_owned();
    }
    let scientific = format!("{number:.5e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..DIGITS).contains(&exponent) {
        let places = usize::try_from(DIGITS - 1 - exponent).unwrap_or(0);
        let fixed = format!("{number:.places$}");
        return if fixed.contains('.') {
            fixed.trim_end_matches('0').trim_end_matches('.').to_owned()
        } else {
            fixed
        };
    }
    let digits = digits.trim_end_matches('0').trim_end_matches('.');
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// `1h2m3.5s`, `250ms`
fn span(nanos: i128) -> String {
    let mut out = String::new();
    if nanos < 0 {
        out.push('-');
    }
    let mut rest = nanos.unsigned_abs();
    let second = time::SECOND.unsigned_abs();
    if rest == 0 {
        return "0".to_owned();
    }
    if rest < second {
        let (size, unit) = match rest {
            0..1_000 => (1, "ns"),
            1_000..1_000_000 => (1_000, "us"),
            _ => (1_000_000, "ms"),
        };
        fraction(&mut out, rest, size, unit);
        return out;
    }
    for (size, unit) in [(3_600 * second, 'h'), (60 * second, 'm')] {
        if rest >= size {
            // Writing to a string does not fail.
            let _ = write!(out, "{}{unit}", rest / size);
            rest %= size;
        }
    }
    if rest > 0 {
        fraction(&mut out, rest, second, "s");
    }
    out
}

fn fraction(out: &mut String, value: u128, size: u128, unit: &str) {
    let _ = write!(out, "{}", value / size);
    let below = value % size;
    if below > 0 {
        let width = size.ilog10() as usize;
        let digits = format!("{below:0width$}");
        let _ = write!(out, ".{}", digits.trim_end_matches('0'));
    }
    out.push_str(unit);
}

/// `2026-01-02T03:04:05.678` and the zone.
fn moment(nanos: i128, zone: &str) -> String {
    let time = OffsetDateTime::from_unix_timestamp_nanos(nanos).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    let text = time.format(&Rfc3339).unwrap_or_default();
    format!("{}{zone}", text.trim_end_matches('Z'))
}
