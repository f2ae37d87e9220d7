//! Times of day in the `strftime` formats that Envoy takes, always in UTC (a waypoint's image has no other zone).
//!
//! Beside the conversions of the C library there are `%s` (seconds since 1970), `%f` and `%1f`…`%9f` (fractions of the second), and
//! `%E3S`, `%E*S`, `%Ez` of Envoy's time library.

use std::{
    io::Write,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use ::time::OffsetDateTime;

/// A compiled time format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TimeFormat {
    items: Box<[Item]>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Item {
    Literal(Box<str>),
    Year,
    ShortYear,
    Century,
    IsoYear,
    IsoShortYear,
    Month,
    MonthName,
    ShortMonthName,
    Day,
    DayPadded,
    DayOfYear,
    WeekdayName,
    ShortWeekdayName,
    WeekdayFromMonday,
    WeekdayFromSunday,
    WeekOfYearFromSunday,
    WeekOfYearFromMonday,
    IsoWeek,
    Hour,
    Hour12,
    Minute,
    Second,
    HalfOfDay,
    UnixSeconds,
    /// The first digits of the nanoseconds.
    Fraction(usize),
    /// Seconds with so many digits of fraction; `None`: as many as needed.
    SecondFraction(Option<usize>),
    Zone,
    Offset,
    OffsetColon,
}

/// Milliseconds, as log lines have them: `2026-01-02T03:04:05.678Z`.
const DEFAULT: &str = "%Y-%m-%dT%H:%M:%E3SZ";
/// Digits of nanoseconds.
const NANO_DIGITS: usize = 9;

/// Compiles a format; an empty one is the default. The error is the specifier that is not known, or that would break a line.
pub(super) fn parse(text: &str) -> Result<TimeFormat, String> {
    let text = if text.is_empty() { DEFAULT } else { text };
    let mut items = Vec::new();
    let mut literal = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('%') {
        literal.push_str(&rest[..at]);
        let specifier = &rest[at + 1..];
        let length = specifier_length(specifier);
        let (word, tail) = specifier.split_at_checked(length).unwrap_or((specifier, ""));
        rest = tail;
        match word {
            "%" => literal.push('%'),
            "t" => literal.push('\t'),
            _ => {
                if !literal.is_empty() {
                    items.push(Item::Literal(std::mem::take(&mut literal).into()));
                }
                compile(word, &mut items).ok_or_else(|| format!("%{word}"))?;
            }
        }
    }
    literal.push_str(rest);
    if !literal.is_empty() {
        items.push(Item::Literal(literal.into()));
    }
    Ok(TimeFormat { items: items.into() })
}

/// Length of a specifier without its percent sign: modifiers and digits, then one letter.
fn specifier_length(text: &str) -> usize {
    text.char_indices()
        .find(|(_, c)| !matches!(c, 'E' | 'O' | '*' | '0'..='9'))
        .map_or(text.len(), |(at, c)| at + c.len_utf8())
}

fn compile(word: &str, items: &mut Vec<Item>) -> Option<()> {
    if let Some(date) = composite(word) {
        items.extend(parse(date).ok()?.items);
        return Some(());
    }
    let digits = |text: &str| text.parse::<usize>().ok().filter(|digits| (1..=NANO_DIGITS).contains(digits));
    items.push(match word {
        "Y" | "E4Y" => Item::Year,
        "y" => Item::ShortYear,
        "C" => Item::Century,
        "G" => Item::IsoYear,
        "g" => Item::IsoShortYear,
        "m" | "Om" => Item::Month,
        "B" => Item::MonthName,
        "b" | "h" => Item::ShortMonthName,
        "d" | "Od" => Item::Day,
        "e" | "Oe" => Item::DayPadded,
        "j" => Item::DayOfYear,
        "A" => Item::WeekdayName,
        "a" => Item::ShortWeekdayName,
        "u" | "Ou" => Item::WeekdayFromMonday,
        "w" | "Ow" => Item::WeekdayFromSunday,
        "U" | "OU" => Item::WeekOfYearFromSunday,
        "W" | "OW" => Item::WeekOfYearFromMonday,
        "V" | "OV" => Item::IsoWeek,
        "H" | "OH" => Item::Hour,
        "I" | "OI" => Item::Hour12,
        "M" | "OM" => Item::Minute,
        "S" | "OS" => Item::Second,
        "p" => Item::HalfOfDay,
        "s" => Item::UnixSeconds,
        "f" => Item::Fraction(NANO_DIGITS),
        "Z" => Item::Zone,
        "z" => Item::Offset,
        "Ez" | "E*z" => Item::OffsetColon,
        "ET" => Item::Literal("T".into()),
        "E*S" => Item::SecondFraction(None),
        _ => {
            if let Some(count) = word.strip_suffix('f') {
                Item::Fraction(digits(count.strip_prefix('E').unwrap_or(count))?)
            } else {
                let count = word.strip_prefix('E')?.strip_suffix('S')?;
                Item::SecondFraction(Some(digits(count)?))
            }
        }
    });
    Some(())
}

/// Specifiers that stand for several, in the C locale.
fn composite(word: &str) -> Option<&'static str> {
    Some(match word {
        "D" | "x" | "Ex" => "%m/%d/%y",
        "F" => "%Y-%m-%d",
        "T" | "X" | "EX" => "%H:%M:%S",
        "R" => "%H:%M",
        "r" => "%I:%M:%S %p",
        "c" | "Ec" => "%a %b %e %H:%M:%S %Y",
        _ => return None,
    })
}

// === impl TimeFormat ===

impl TimeFormat {
    /// Appends `time` to `out`.
    pub(super) fn write(&self, time: SystemTime, out: &mut Vec<u8>) {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        // Years beyond 9999 cannot be written; a clock that stands there is as good as none.
        let seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
        let date = OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(OffsetDateTime::UNIX_EPOCH);
        for item in &self.items {
            item.write(&date, since, out);
        }
    }
}

impl Item {
    fn write(&self, date: &OffsetDateTime, since: Duration, out: &mut Vec<u8>) {
        let hour12 = match date.hour() % 12 {
            0 => 12,
            hour => hour,
        };
        match self {
            Self::Literal(text) => out.extend_from_slice(text.as_bytes()),
            Self::Year => digits(out, 4, date.year().unsigned_abs()),
            Self::ShortYear => digits(out, 2, date.year().unsigned_abs() % 100),
            Self::Century => digits(out, 2, date.year().unsigned_abs() / 100),
            Self::IsoYear => digits(out, 4, date.to_iso_week_date().0.unsigned_abs()),
            Self::IsoShortYear => digits(out, 2, date.to_iso_week_date().0.unsigned_abs() % 100),
            Self::Month => digits(out, 2, u8::from(date.month()).into()),
            Self::MonthName => out.extend_from_slice(date.month().to_string().as_bytes()),
            Self::ShortMonthName => short(out, &date.month().to_string()),
            Self::Day => digits(out, 2, date.day().into()),
            Self::DayPadded => {
                if date.day() < 10 {
                    out.push(b' ');
                }
                digits(out, 1, date.day().into());
            }
            Self::DayOfYear => digits(out, 3, date.ordinal().into()),
            Self::WeekdayName => out.extend_from_slice(date.weekday().to_string().as_bytes()),
            Self::ShortWeekdayName => short(out, &date.weekday().to_string()),
            Self::WeekdayFromMonday => digits(out, 1, date.weekday().number_from_monday().into()),
            Self::WeekdayFromSunday => digits(out, 1, date.weekday().number_days_from_sunday().into()),
            Self::WeekOfYearFromSunday => digits(out, 2, date.sunday_based_week().into()),
            Self::WeekOfYearFromMonday => digits(out, 2, date.monday_based_week().into()),
            Self::IsoWeek => digits(out, 2, date.iso_week().into()),
            Self::Hour => digits(out, 2, date.hour().into()),
            Self::Hour12 => digits(out, 2, hour12.into()),
            Self::Minute => digits(out, 2, date.minute().into()),
            Self::Second => digits(out, 2, date.second().into()),
            Self::HalfOfDay => out.extend_from_slice(if date.hour() < 12 { b"AM" } else { b"PM" }),
            Self::UnixSeconds => out.extend_from_slice(itoa::Buffer::new().format(since.as_secs()).as_bytes()),
            Self::Fraction(count) => fraction(out, *count, since),
            Self::SecondFraction(Some(count)) => {
                digits(out, 2, date.second().into());
                out.push(b'.');
                fraction(out, *count, since);
            }
            Self::SecondFraction(None) => {
                digits(out, 2, date.second().into());
                if since.subsec_nanos() != 0 {
                    out.push(b'.');
                    fraction(out, NANO_DIGITS, since);
                    let kept = out.iter().rposition(|byte| *byte != b'0').map_or(0, |last| last + 1);
                    out.truncate(kept);
                }
            }
            Self::Zone => out.extend_from_slice(b"UTC"),
            Self::Offset => out.extend_from_slice(b"+0000"),
            Self::OffsetColon => out.extend_from_slice(b"+00:00"),
        }
    }
}

fn digits(out: &mut Vec<u8>, width: usize, number: u32) {
    let mut buffer = itoa::Buffer::new();
    let text = buffer.format(number);
    out.extend(std::iter::repeat_n(b'0', width.saturating_sub(text.len())));
    out.extend_from_slice(text.as_bytes());
}

fn fraction(out: &mut Vec<u8>, count: usize, since: Duration) {
    let dropped = u32::try_from(NANO_DIGITS.saturating_sub(count)).unwrap_or(0);
    digits(out, count, since.subsec_nanos() / 10_u32.pow(dropped));
}

fn short(out: &mut Vec<u8>, name: &str) {
    let _ = out.write_all(name.as_bytes().get(..3).unwrap_or(name.as_bytes()));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Friday 2 January 2026, 03:04:05.678901234 UTC.
    fn render(format: &str) -> String {
        let time = UNIX_EPOCH + Duration::new(1_767_323_045, 678_901_234);
        let mut out = Vec::new();
        parse(format).unwrap().write(time, &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn times_print_as_strftime_does() {
        for (format, printed) in [
            ("", "2026-01-02T03:04:05.678Z"),
            ("%Y/%m/%dT%H:%M:%S%z %s", "2026/01/02T03:04:05+0000 1767323045"),
            ("%s.%3f", "1767323045.678"),
            ("%s.%6f", "1767323045.678901"),
            ("%s.%9f", "1767323045.678901234"),
            ("%f %1f", "678901234 6"),
            ("%Y-%m-%dT%H:%M:%E3SZ", "2026-01-02T03:04:05.678Z"),
            ("%E*S %E6S %Ez", "05.678901234 05.678901 +00:00"),
            ("%a %A %b %B %e %j", "Fri Friday Jan January  2 002"),
            ("%c", "Fri Jan  2 03:04:05 2026"),
            ("%D %F %T %R %r", "01/02/26 2026-01-02 03:04:05 03:04 03:04:05 AM"),
            ("%C %y %G %g %V %U %W %u %w", "20 26 2026 26 01 00 00 5 5"),
            ("%I %p %Z 100%%", "03 AM UTC 100%"),
        ] {
            assert_eq!(render(format), printed, "{format:?}");
        }
    }

    #[test]
    fn a_fraction_keeps_its_leading_zeros() {
        let mut out = Vec::new();
        parse("%3f %E*S")
            .unwrap()
            .write(UNIX_EPOCH + Duration::from_millis(1_070), &mut out);
        assert_eq!(out, b"070 01.07");
    }

    #[test]
    fn unknown_specifiers_and_line_breaks_are_refused() {
        for (format, word) in [
            ("%Q", "%Q"),
            ("%Y %n", "%n"),
            ("%En", "%En"),
            ("%0f", "%0f"),
            ("x%", "%"),
            ("%12f", "%12f"),
        ] {
            assert_eq!(parse(format).unwrap_err(), word, "{format:?}");
        }
    }
}
