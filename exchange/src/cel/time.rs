//! Moments and spans of time: reading them, their parts, what they may be. Both are nanoseconds.

use ::time::{OffsetDateTime, UtcOffset, format_description::well_known::Rfc3339};

use super::{
    function::Function,
    value::{Failure, Value},
};

pub(super) const SECOND: i128 = 1_000_000_000;
/// The first moment, 0001-01-01, and the last, 9999-12-31.
const FIRST: i128 = -62_135_596_800 * SECOND;
const LAST: i128 = 253_402_300_800 * SECOND - 1;
/// The longest span: ten thousand years.
const LONGEST_SPAN: i128 = 315_576_000_000 * SECOND;

/// A moment, where there is such a one.
pub(super) fn moment<'t>(nanos: i128) -> Result<Value<'t>, Failure> {
    if (FIRST..=LAST).contains(&nanos) {
        Ok(Value::Time(nanos))
    } else {
        Err(Failure::OutOfRange)
    }
}

/// A span, where there is such a one.
pub(super) fn span<'t>(nanos: i128) -> Result<Value<'t>, Failure> {
    if nanos.abs() <= LONGEST_SPAN {
        Ok(Value::Duration(nanos))
    } else {
        Err(Failure::OutOfRange)
    }
}

/// `2026-01-02T03:04:05.678Z`
pub(super) fn timestamp<'t>(text: &[u8]) -> Result<Value<'t>, Failure> {
    let text = std::str::from_utf8(text).map_err(|_| Failure::Conversion)?;
    let time = OffsetDateTime::parse(text, &Rfc3339).map_err(|_| Failure::Conversion)?;
    moment(time.unix_timestamp_nanos())
}

/// `-1h30m`, `1.5s`, `0`
pub(super) fn duration<'t>(text: &[u8]) -> Result<Value<'t>, Failure> {
    const UNITS: [(&str, i128); 6] = [
        ("ns", 1),
        ("us", 1_000),
        ("ms", 1_000_000),
        ("h", 3_600 * SECOND),
        ("m", 60 * SECOND),
        ("s", SECOND),
    ];
    let text = std::str::from_utf8(text).map_err(|_| Failure::Conversion)?;
    let (sign, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Ok(Value::Duration(0));
    }
    let mut nanos = 0i128;
    loop {
        let end = rest
            .find(|c: char| !(c.is_ascii_digit() || c == '.'))
            .ok_or(Failure::Conversion)?;
        let (number, tail) = rest.split_at(end);
        let unit = UNITS.iter().find_map(|(unit, size)| Some((*size, tail.strip_prefix(unit)?)));
        let (size, tail) = unit.ok_or(Failure::Conversion)?;
        nanos = nanos.checked_add(scaled(number, size)?).ok_or(Failure::OutOfRange)?;
        if nanos > LONGEST_SPAN {
            return Err(Failure::OutOfRange);
        }
        if tail.is_empty() {
            return span(sign * nanos);
        }
        rest = tail;
    }
}

/// A decimal number of units.
fn scaled(number: &str, size: i128) -> Result<i128, Failure> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() {
        return Err(Failure::Conversion);
    }
    let mut nanos = match whole {
        "" => 0,
        whole => whole.parse::<i64>().map_err(|_| Failure::OutOfRange)?.into(),
    };
    nanos = size.checked_mul(nanos).ok_or(Failure::OutOfRange)?;
    let mut unit = size;
    for digit in fraction.chars() {
        unit /= 10;
        nanos += unit * i128::from(digit.to_digit(10).ok_or(Failure::Conversion)?);
    }
    Ok(nanos)
}

/// A part of a moment in UTC or at an offset, or of a span.
pub(super) fn part<'t>(function: Function, value: &Value<'_>, zone: Option<&Value<'_>>) -> Result<Value<'t>, Failure> {
    let number = match (value, zone) {
        (Value::Duration(nanos), None) => match function {
            Function::Hours => nanos / (3_600 * SECOND),
            Function::Minutes => nanos / (60 * SECOND),
            Function::Seconds => nanos / SECOND,
            Function::Milliseconds => nanos / 1_000_000 % 1_000,
            _ => return Err(Failure::NoOverload),
        },
        (Value::Time(nanos), zone) => {
            let time = OffsetDateTime::from_unix_timestamp_nanos(*nanos).map_err(|_| Failure::OutOfRange)?;
            let offset = match zone {
                None => UtcOffset::UTC,
                Some(Value::Text(zone)) => std::str::from_utf8(zone).ok().and_then(offset).ok_or(Failure::Conversion)?,
                Some(_) => return Err(Failure::NoOverload),
            };
            let time = time.checked_to_offset(offset).ok_or(Failure::OutOfRange)?;
            match function {
                Function::FullYear => time.year().into(),
                Function::Month => i128::from(u8::from(time.month())) - 1,
                Function::Date => time.day().into(),
                Function::DayOfMonth => i128::from(time.day()) - 1,
                Function::DayOfWeek => time.weekday().number_days_from_sunday().into(),
                Function::DayOfYear => i128::from(time.ordinal()) - 1,
                Function::Hours => time.hour().into(),
                Function::Minutes => time.minute().into(),
                Function::Seconds => time.second().into(),
                Function::Milliseconds => time.millisecond().into(),
                _ => return Err(Failure::NoOverload),
            }
        }
        _ => return Err(Failure::NoOverload),
    };
    i64::try_from(number).map(Value::Int).map_err(|_| Failure::OutOfRange)
}

/// `UTC`, `+02:00`, `-08:30`. There are no names of zones here.
pub(super) fn offset(zone: &str) -> Option<UtcOffset> {
    if matches!(zone, "UTC" | "utc" | "Z") {
        return Some(UtcOffset::UTC);
    }
    let (sign, rest) = match zone.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, zone.strip_prefix('+').unwrap_or(zone)),
    };
    let (hours, minutes) = rest.split_once(':')?;
    let number = |digits: &str| (digits.len() == 2).then(|| digits.parse::<i8>().ok()).flatten();
    UtcOffset::from_hms(sign * number(hours)?, sign * number(minutes)?, 0).ok()
}
