//! Environment variables with meaning: what is set, in the forms that pilot-agent reads.
//!
//! Pure: a map in, values out. An empty variable counts as not set. A value that cannot be read is one sentence that names the
//! variable and what is accepted, and ends the start: a drain time that was mistyped must not become another one silently.

use std::{collections::BTreeMap, fmt::Display, str::FromStr, time::Duration};

/// Why the settings cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingError {
    /// A value that means nothing.
    #[error("{name}={value:?} cannot be used: {accepted} is expected")]
    Value {
        /// The variable, argument or field.
        name: String,
        /// What it is.
        value: String,
        /// What it should be.
        accepted: &'static str,
    },
    /// Something that has to be there.
    #[error("{name} is not set: {remedy}")]
    Missing {
        /// The variable.
        name: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// A text that is no structure.
    #[error("{name} cannot be read as {form}: {reason}")]
    Unreadable {
        /// The variable or file.
        name: String,
        /// JSON or YAML.
        form: &'static str,
        /// What the parser says.
        reason: String,
    },
    /// Something that is refused for what it says.
    #[error("{0}")]
    Refused(String),
}

/// The variables of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment(BTreeMap<String, String>);

// === impl Environment ===

impl Environment {
    /// The process's own. Variables that are no text are left out.
    pub fn of_process() -> Self {
        let text =
            |(name, value): (std::ffi::OsString, std::ffi::OsString)| Some((name.into_string().ok()?, value.into_string().ok()?));
        Self(std::env::vars_os().filter_map(text).collect())
    }

    /// All of them.
    pub fn all(&self) -> &BTreeMap<String, String> {
        &self.0
    }

    /// With `more` where nothing is set.
    #[must_use]
    pub fn with_fallback<'a>(mut self, more: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        for (name, value) in more {
            self.0.entry(name.to_owned()).or_insert_with(|| value.to_owned());
        }
        self
    }

    /// A variable that is set and not empty.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// A variable, or what counts without it.
    pub fn text_or<'a>(&'a self, name: &str, default: &'a str) -> &'a str {
        self.text(name).unwrap_or(default)
    }

    /// A truth value in the forms of Go's `strconv.ParseBool`.
    pub fn flag(&self, name: &str, default: bool) -> Result<bool, SettingError> {
        self.text(name).map_or(Ok(default), |value| flag(name, value))
    }

    /// A time in Go's form.
    pub fn duration(&self, name: &str, default: Duration) -> Result<Duration, SettingError> {
        self.text(name).map_or(Ok(default), |value| duration(name, value))
    }

    /// A port.
    pub fn port(&self, name: &str, default: u16) -> Result<u16, SettingError> {
        self.text(name).map_or(Ok(default), |value| port(name, value))
    }

    /// A part of a whole.
    pub fn ratio(&self, name: &str, default: f64) -> Result<f64, SettingError> {
        let Some(value) = self.text(name) else { return Ok(default) };
        let within = value.parse().ok().filter(|ratio| (0.0..=1.0).contains(ratio));
        within.ok_or_else(|| wrong(name, value, "a number from 0 to 1"))
    }

    /// Anything that is read from text.
    pub fn parsed<T: FromStr>(&self, name: &str, accepted: &'static str) -> Result<Option<T>, SettingError> {
        self.text(name)
            .map(|value| value.parse().map_err(|_| wrong(name, value, accepted)))
            .transpose()
    }

    /// Variables that start with `prefix`, without it.
    pub fn prefixed<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.0
            .iter()
            .filter_map(move |(name, value)| Some((name.strip_prefix(prefix)?, value.as_str())))
    }
}

impl<N: Into<String>, V: Into<String>> FromIterator<(N, V)> for Environment {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(variables: I) -> Self {
        Self(
            variables
                .into_iter()
                .map(|(name, value)| (name.into(), value.into()))
                .collect(),
        )
    }
}

/// The sentence about a value.
pub fn wrong(name: &str, value: impl Display, accepted: &'static str) -> SettingError {
    SettingError::Value {
        name: name.to_owned(),
        value: value.to_string(),
        accepted,
    }
}

/// A truth value.
pub fn flag(name: &str, value: &str) -> Result<bool, SettingError> {
    match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(wrong(name, value, "true or false")),
    }
}

/// A port.
pub fn port(name: &str, value: &str) -> Result<u16, SettingError> {
    value
        .parse()
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| wrong(name, value, "a port from 1 to 65535"))
}

/// A time as Go writes it, `1h30m`, `1.5s`, `100ms`; protobuf's JSON form (`5s`) is one of these.
pub fn duration(name: &str, value: &str) -> Result<Duration, SettingError> {
    go_duration(value).ok_or_else(|| wrong(name, value, "a time such as 5s, 1m30s or 500ms"))
}

fn go_duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text;
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at_checked(digits)?;
        let end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at_checked(end)?;
        let scale = match unit {
            "ns" => 1e-9,
            "us" | "µs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        seconds += number.parse::<f64>().ok()? * scale;
        rest = tail;
    }
    (!text.is_empty())
        .then(|| Duration::try_from_secs_f64(seconds).ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_go_writes_them() {
        let cases = [
            ("5s", Some(5_000)),
            ("1m30s", Some(90_000)),
            ("24h0m0s", Some(86_400_000)),
            ("1.5s", Some(1_500)),
            ("100ms", Some(100)),
            ("0", Some(0)),
            ("0s", Some(0)),
            ("", None),
            ("5", None),
            ("s", None),
            ("-5s", None),
            ("5 s", None),
            ("5x", None),
            ("1.2.3s", None),
            ("99999999999999999999h", None),
        ];
        for (text, millis) in cases {
            assert_eq!(go_duration(text), millis.map(Duration::from_millis), "{text:?}");
        }
    }

    #[test]
    fn a_value_that_means_nothing_is_named_with_what_is_accepted() {
        let environment: Environment = [
            ("A", "maybe"),
            ("B", "5"),
            ("C", "70000"),
            ("D", "1.5"),
            ("E", "x"),
            ("EMPTY", ""),
        ]
        .into_iter()
        .collect();
        let sentences = [
            environment.flag("A", true).unwrap_err().to_string(),
            environment.duration("B", Duration::ZERO).unwrap_err().to_string(),
            environment.port("C", 1).unwrap_err().to_string(),
            environment.ratio("D", 0.5).unwrap_err().to_string(),
            environment.parsed::<u32>("E", "a number of cores").unwrap_err().to_string(),
        ];
        assert_eq!(
            sentences,
            [
                "A=\"maybe\" cannot be used: true or false is expected",
                "B=\"5\" cannot be used: a time such as 5s, 1m30s or 500ms is expected",
                "C=\"70000\" cannot be used: a port from 1 to 65535 is expected",
                "D=\"1.5\" cannot be used: a number from 0 to 1 is expected",
                "E=\"x\" cannot be used: a number of cores is expected",
            ]
        );
        assert_eq!(environment.flag("EMPTY", true), Ok(true));
        assert_eq!(environment.port("ABSENT", 15021), Ok(15021));
    }
}
