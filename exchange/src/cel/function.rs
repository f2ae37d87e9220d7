//! Functions by name: which there are, and what they make of values.

use std::borrow::Cow;

use super::{
    CelError, LONGEST_TEXT, Options, print, time,
    value::{Failure, Map, Value},
};
use crate::format::View;

macro_rules! functions {
    ($($variant:ident $name:literal $least:literal..=$most:literal $form:ident;)*) => {
        /// A function; what stands before the dot is its first argument.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum Function { $($variant,)* }

        const TABLE: &[(Function, &str, usize, usize, Form)] = &[$((Function::$variant, $name, $least, $most, Form::$form),)*];
    };
}

/// How a function is written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// `f(a)`
    Global,
    /// `a.f()`
    Member,
    /// Either.
    Both,
}

functions! {
    Size "size" 1..=1 Both;
    StartsWith "startsWith" 2..=2 Both;
    EndsWith "endsWith" 2..=2 Both;
    Contains "contains" 2..=2 Both;
    Matches "matches" 2..=2 Both;
    Type "type" 1..=1 Global;
    Dyn "dyn" 1..=1 Global;
    Bool "bool" 1..=1 Global;
    Int "int" 1..=1 Global;
    Uint "uint" 1..=1 Global;
    Double "double" 1..=1 Global;
    String "string" 1..=1 Global;
    Bytes "bytes" 1..=1 Global;
    Timestamp "timestamp" 1..=1 Global;
    Duration "duration" 1..=1 Global;
    FullYear "getFullYear" 1..=2 Member;
    Month "getMonth" 1..=2 Member;
    Date "getDate" 1..=2 Member;
    DayOfMonth "getDayOfMonth" 1..=2 Member;
    DayOfWeek "getDayOfWeek" 1..=2 Member;
    DayOfYear "getDayOfYear" 1..=2 Member;
    Hours "getHours" 1..=2 Member;
    Minutes "getMinutes" 1..=2 Member;
    Seconds "getSeconds" 1..=2 Member;
    Milliseconds "getMilliseconds" 1..=2 Member;
    LowerAscii "lowerAscii" 1..=1 Member;
    UpperAscii "upperAscii" 1..=1 Member;
    Trim "trim" 1..=1 Member;
    Replace "replace" 3..=4 Member;
    Split "split" 2..=3 Member;
    Join "join" 1..=2 Member;
}

/// Functions of Envoy that are not here.
const UNSUPPORTED: [&str; 12] = [
    "extract",
    "capture",
    "captureN",
    "charAt",
    "format",
    "indexOf",
    "lastIndexOf",
    "substring",
    "reverse",
    "quote",
    "math.greatest",
    "math.least",
];

type Evaluated<'t> = Result<Value<'t>, Failure>;

// === impl Function ===

impl Function {
    /// The function that takes so many arguments, what stands before the dot among them.
    pub(super) fn named(name: &str, member: bool, arguments: usize, options: Options) -> Result<Self, CelError> {
        if UNSUPPORTED.contains(&name) {
            return Err(CelError::Unsupported(format!("the function {name}")));
        }
        let written = |form: Form| form == Form::Both || member == (form == Form::Member);
        let fits = |(_, known, least, most, form): &&(Self, &str, usize, usize, Form)| {
            *known == name && written(*form) && (*least..=*most).contains(&arguments)
        };
        let unknown = || CelError::UnknownFunction {
            name: name.to_owned(),
            arguments: arguments - usize::from(member && arguments > 0),
        };
        let (function, ..) = *TABLE.iter().find(fits).ok_or_else(unknown)?;
        match function {
            Self::String if !options.string_conversion => Err(CelError::Off("string()")),
            Self::LowerAscii | Self::UpperAscii | Self::Trim | Self::Replace | Self::Split | Self::Join
                if !options.string_functions =>
            {
                Err(CelError::Off("working on texts (lowerAscii, replace, split …)"))
            }
            function => Ok(function),
        }
    }

    /// Its value. Of `matches` only those come here whose pattern is not written out; they are refused when they are compiled.
    pub(super) fn call<'t>(self, arguments: Vec<Value<'t>>, view: &View<'t>) -> Evaluated<'t> {
        let mut rest = arguments.into_iter();
        let first = rest.next().ok_or(Failure::NoOverload)?;
        let second = rest.next();
        let third = rest.next();
        let fourth = rest.next();
        match self {
            Self::Size => size(&first, view),
            Self::StartsWith => texts(&first, second.as_ref(), |text, part| text.starts_with(part)),
            Self::EndsWith => texts(&first, second.as_ref(), |text, part| text.ends_with(part)),
            Self::Contains => texts(&first, second.as_ref(), |text, part| {
                part.is_empty() || text.windows(part.len()).any(|window| window == part)
            }),
            Self::Matches => Err(Failure::NoOverload),
            Self::Type => Ok(Value::Type(first.type_name())),
            Self::Dyn => Ok(first),
            Self::Bool => match &first {
                Value::Bool(_) => Ok(first),
                Value::Text(text) => match &**text {
                    b"true" | b"True" | b"TRUE" | b"t" | b"1" => Ok(Value::Bool(true)),
                    b"false" | b"False" | b"FALSE" | b"f" | b"0" => Ok(Value::Bool(false)),
                    _ => Err(Failure::Conversion),
                },
                _ => Err(Failure::NoOverload),
            },
            Self::Int => int(&first),
            Self::Uint => uint(&first),
            Self::Double => double(&first),
            Self::String => string(first),
            Self::Bytes => match first {
                Value::Text(text) | Value::Bytes(text) => Ok(Value::Bytes(text)),
                _ => Err(Failure::NoOverload),
            },
            Self::Timestamp => match &first {
                Value::Time(_) => Ok(first),
                Value::Int(seconds) => time::moment(i128::from(*seconds) * time::SECOND),
                Value::Text(text) => time::timestamp(text),
                _ => Err(Failure::NoOverload),
            },
            Self::Duration => match &first {
                Value::Duration(_) => Ok(first),
                Value::Text(text) => time::duration(text),
                _ => Err(Failure::NoOverload),
            },
            Self::FullYear
            | Self::Month
            | Self::Date
            | Self::DayOfMonth
            | Self::DayOfWeek
            | Self::DayOfYear
            | Self::Hours
            | Self::Minutes
            | Self::Seconds
            | Self::Milliseconds => time::part(self, &first, second.as_ref()),
            Self::LowerAscii => Ok(Value::Text(text(first)?.to_ascii_lowercase().into())),
            Self::UpperAscii => Ok(Value::Text(text(first)?.to_ascii_uppercase().into())),
            Self::Trim => Ok(Value::Text(utf8(first)?.trim().as_bytes().to_vec().into())),
            Self::Replace => replace(first, second, third, fourth),
            Self::Split => split(first, second, third),
            Self::Join => join(&first, second),
        }
    }
}

fn size<'t>(value: &Value<'t>, view: &View<'t>) -> Evaluated<'t> {
    let size = match value {
        // Characters, where they are such; a byte that begins none is one.
        Value::Text(text) => text
            .utf8_chunks()
            .map(|chunk| chunk.valid().chars().count() + chunk.invalid().len())
            .sum(),
        Value::Bytes(bytes) => bytes.len(),
        Value::List(items) => items.len(),
        Value::JsonList(items) => items.len(),
        Value::Map(map) => map.size(view),
        _ => return Err(Failure::NoOverload),
    };
    Ok(Value::Int(i64::try_from(size).unwrap_or(i64::MAX)))
}

fn texts<'t>(first: &Value<'_>, second: Option<&Value<'_>>, holds: impl Fn(&[u8], &[u8]) -> bool) -> Evaluated<'t> {
    match (first, second) {
        (Value::Text(text), Some(Value::Text(part))) => Ok(Value::Bool(holds(text, part))),
        _ => Err(Failure::NoOverload),
    }
}

fn text(value: Value<'_>) -> Result<Cow<'_, [u8]>, Failure> {
    match value {
        Value::Text(text) => Ok(text),
        _ => Err(Failure::NoOverload),
    }
}

fn utf8(value: Value<'_>) -> Result<String, Failure> {
    String::from_utf8(text(value)?.into_owned()).map_err(|_| Failure::Conversion)
}

fn parsed<T: std::str::FromStr>(text: &[u8]) -> Result<T, Failure> {
    let text = std::str::from_utf8(text).map_err(|_| Failure::Conversion)?;
    text.parse().map_err(|_| Failure::Conversion)
}

#[allow(
    clippy::cast_possible_truncation,
    reason = "the range is checked; the fraction goes, as CEL says"
)]
fn int<'t>(value: &Value<'_>) -> Evaluated<'t> {
    const LIMIT: f64 = 9_223_372_036_854_775_808.0;
    Ok(Value::Int(match value {
        Value::Int(number) => *number,
        Value::Bool(value) => (*value).into(),
        Value::Uint(number) => i64::try_from(*number).map_err(|_| Failure::OutOfRange)?,
        Value::Double(number) if *number > -LIMIT && *number < LIMIT => *number as i64,
        Value::Double(_) => return Err(Failure::OutOfRange),
        Value::Text(text) => parsed(text)?,
        Value::Time(nanos) => i64::try_from(nanos.div_euclid(time::SECOND)).map_err(|_| Failure::OutOfRange)?,
        _ => return Err(Failure::NoOverload),
    }))
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the range is checked; the fraction goes, as CEL says"
)]
fn uint<'t>(value: &Value<'_>) -> Evaluated<'t> {
    const LIMIT: f64 = 18_446_744_073_709_551_616.0;
    Ok(Value::Uint(match value {
        Value::Uint(number) => *number,
        Value::Int(number) => u64::try_from(*number).map_err(|_| Failure::OutOfRange)?,
        Value::Double(number) if *number >= 0.0 && *number < LIMIT => *number as u64,
        Value::Double(_) => return Err(Failure::OutOfRange),
        Value::Text(text) => parsed(text)?,
        _ => return Err(Failure::NoOverload),
    }))
}

#[allow(clippy::cast_precision_loss, reason = "CEL's conversion does")]
fn double<'t>(value: &Value<'_>) -> Evaluated<'t> {
    Ok(Value::Double(match value {
        Value::Double(number) => *number,
        Value::Int(number) => *number as f64,
        Value::Uint(number) => *number as f64,
        Value::Text(text) => parsed(text)?,
        _ => return Err(Failure::NoOverload),
    }))
}

fn string(value: Value<'_>) -> Evaluated<'_> {
    Ok(match value {
        Value::Text(_) => value,
        Value::Bytes(bytes) => match std::str::from_utf8(&bytes) {
            Ok(_) => Value::Text(bytes),
            Err(_) => return Err(Failure::Conversion),
        },
        Value::Bool(_) | Value::Int(_) | Value::Uint(_) | Value::Double(_) | Value::Duration(_) | Value::Time(_) => {
            Value::Text(print::converted(&value).into_bytes().into())
        }
        _ => return Err(Failure::NoOverload),
    })
}

/// A text that was put together.
fn made<'t>(text: Vec<u8>) -> Evaluated<'t> {
    if text.len() > LONGEST_TEXT {
        return Err(Failure::TooLong);
    }
    Ok(Value::Text(text.into()))
}

/// Both texts, one behind the other.
pub(super) fn concat<'t>(mut first: Vec<u8>, second: &[u8]) -> Evaluated<'t> {
    first.extend_from_slice(second);
    made(first)
}

fn limit(value: Option<Value<'_>>) -> Result<usize, Failure> {
    match value {
        None => Ok(usize::MAX),
        Some(Value::Int(limit)) => Ok(usize::try_from(limit).unwrap_or(usize::MAX)),
        Some(_) => Err(Failure::NoOverload),
    }
}

fn replace<'t>(first: Value<'t>, from: Option<Value<'t>>, to: Option<Value<'t>>, most: Option<Value<'t>>) -> Evaluated<'t> {
    let (Some(from), Some(to)) = (from, to) else {
        return Err(Failure::NoOverload);
    };
    let (whole, from, to, most) = (utf8(first)?, utf8(from)?, utf8(to)?, limit(most)?);
    // What it can become at most, before it does.
    let places = whole.matches(from.as_str()).count().min(most);
    if places.saturating_mul(to.len()).saturating_add(whole.len()) > 2 * LONGEST_TEXT {
        return Err(Failure::TooLong);
    }
    made(whole.replacen(from.as_str(), &to, most).into_bytes())
}

fn split<'t>(first: Value<'t>, at: Option<Value<'t>>, most: Option<Value<'t>>) -> Evaluated<'t> {
    let (whole, at, most) = (utf8(first)?, utf8(at.ok_or(Failure::NoOverload)?)?, limit(most)?);
    let piece = |piece: &str| Value::Text(piece.as_bytes().to_vec().into());
    let pieces = match most {
        0 => Vec::new(),
        _ if at.is_empty() => whole.chars().map(|letter| piece(letter.encode_utf8(&mut [0; 4]))).collect(),
        most => whole.splitn(most, at.as_str()).map(piece).collect(),
    };
    Ok(Value::List(pieces))
}

fn join<'t>(first: &Value<'t>, between: Option<Value<'t>>) -> Evaluated<'t> {
    let items = first.items().ok_or(Failure::NoOverload)?;
    let between = between.map_or(Ok(Cow::Borrowed(&b""[..])), text)?;
    let mut out = Vec::new();
    for (index, item) in items.into_iter().enumerate() {
        if index > 0 {
            out.extend_from_slice(&between);
        }
        out.extend_from_slice(&text(item)?);
        if out.len() > LONGEST_TEXT {
            return Err(Failure::TooLong);
        }
    }
    made(out)
}

/// Whether a list has an item, or a map a key.
pub(super) fn contained<'t>(item: &Value<'t>, of: &Value<'t>, view: &View<'t>) -> Evaluated<'t> {
    match of {
        Value::Map(map @ (Map::Root(_) | Map::Headers(_))) => match item {
            Value::Text(_) => Ok(Value::Bool(map.get(item, view).is_ok())),
            _ => Err(Failure::NoOverload),
        },
        Value::Map(map) => Ok(Value::Bool(map.get(item, view).is_ok())),
        list => {
            let items = list.items().ok_or(Failure::NoOverload)?;
            Ok(Value::Bool(items.iter().any(|one| one.equals(item, view))))
        }
    }
}
