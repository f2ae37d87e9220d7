//! The arguments of `proxy`: pilot-agent's, of which a waypoint needs few and understands all (contract runtime §8.1).
//!
//! Flags are `--name=value`, `--name value`, or `--name` alone. A flag that is not known here is taken with its value, as
//! pilot-agent does, so that the next version of a pod template starts the same image; the log names those flags in one line.

use std::collections::BTreeMap;

use crate::{
    logging::{Levels, LogSettings},
    settings::{SettingError, flag},
};

/// Flags that mean something here.
const KNOWN: [&str; 8] = [
    "concurrency",
    "domain",
    "log_as_json",
    "log_output_level",
    "outlierLogPath",
    "proxyComponentLogLevel",
    "proxyLogLevel",
    "serviceCluster",
];
/// Flags that need no value.
const SWITCHES: [&str; 4] = ["log_as_json", "profiling", "log_caller", "vklog"];

/// What `cairn proxy …` was given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Arguments {
    values: BTreeMap<String, String>,
    unknown: Vec<String>,
}

/// Why `proxy` does not start.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArgumentError {
    /// A role that is not ours.
    #[error(
        "`proxy {0}` is not what this image does: it serves waypoints only (`proxy waypoint`); use Istio's proxyv2 image for it"
    )]
    Role(String),
    /// No role.
    #[error("`proxy` needs a role: `cairn proxy waypoint` with the arguments of istiod's pod template")]
    NoRole,
    /// A flag without the value it needs.
    #[error("--{0} needs a value")]
    NoValue(String),
}

// === impl Arguments ===

impl Arguments {
    /// Reads everything after `proxy`.
    pub fn parse<S: AsRef<str>>(arguments: &[S]) -> Result<Self, ArgumentError> {
        let mut parsed = Self::default();
        let mut role = None;
        let mut rest = arguments.iter().map(AsRef::as_ref).peekable();
        while let Some(argument) = rest.next() {
            let Some(flag) = argument
                .strip_prefix("--")
                .or_else(|| argument.strip_prefix('-'))
                .filter(|flag| !flag.is_empty())
            else {
                role.get_or_insert(argument);
                continue;
            };
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None if SWITCHES.contains(&flag) => (flag, Some("true".to_owned())),
                // A value never looks like a flag; and the role is no value of an unknown flag before it.
                None => {
                    let is_value =
                        |next: &&str| !next.starts_with('-') && (KNOWN.contains(&flag) || *next != WAYPOINT || role.is_some());
                    (flag, rest.next_if(is_value).map(str::to_owned))
                }
            };
            if !KNOWN.contains(&name) {
                parsed.unknown.push(format!("--{name}"));
            } else {
                let value = value.ok_or_else(|| ArgumentError::NoValue(name.to_owned()))?;
                parsed.values.insert(name.to_owned(), value);
            }
        }
        match role {
            Some(WAYPOINT) => Ok(parsed),
            Some(other) => Err(ArgumentError::Role(other.to_owned())),
            None => Err(ArgumentError::NoRole),
        }
    }

    /// The value of a flag that is known and set.
    pub fn value(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// Flags that mean nothing here.
    pub fn unknown(&self) -> &[String] {
        &self.unknown
    }

    /// All that mean something, for the administrative pages.
    pub fn known(&self) -> &BTreeMap<String, String> {
        &self.values
    }

    /// `--concurrency`.
    pub fn concurrency(&self) -> Result<Option<u64>, SettingError> {
        let parse = |value: &str| {
            let accepted = "a number of threads, 0 for one a core,";
            value.parse().map_err(|_| SettingError::Value {
                name: "--concurrency".to_owned(),
                value: value.to_owned(),
                accepted,
            })
        };
        self.value("concurrency").map(parse).transpose()
    }

    /// How to log; names of parts that are nobody's are among [`Arguments::unknown_scopes`].
    pub fn log_settings(&self) -> Result<LogSettings, SettingError> {
        let json = self
            .value("log_as_json")
            .map_or(Ok(false), |value| flag("--log_as_json", value))?;
        Ok(LogSettings {
            levels: self.levels()?.0,
            json,
        })
    }

    /// Parts that a level was given for and that are nobody's.
    pub fn unknown_scopes(&self) -> Vec<String> {
        self.levels().map(|(_, unknown)| unknown).unwrap_or_default()
    }

    fn levels(&self) -> Result<(Levels, Vec<String>), SettingError> {
        let text = |name| self.value(name).unwrap_or_default();
        Levels::parse(
            text("proxyLogLevel"),
            text("proxyComponentLogLevel"),
            text("log_output_level"),
        )
        .map_err(|error| SettingError::Refused(error.to_string()))
    }
}

/// The one role.
const WAYPOINT: &str = "waypoint";

#[cfg(test)]
mod tests {
    use super::*;

    /// As istiod's pod template writes them.
    const TEMPLATE: [&str; 11] = [
        "waypoint",
        "--domain",
        "app.svc.cluster.local",
        "--serviceCluster",
        "waypoint.app",
        "--proxyLogLevel",
        "warning",
        "--proxyComponentLogLevel",
        "misc:error",
        "--log_output_level",
        "default:info",
    ];

    #[test]
    fn the_templates_arguments_are_understood() {
        let arguments = Arguments::parse(&TEMPLATE).unwrap();
        assert_eq!(arguments.value("domain"), Some("app.svc.cluster.local"));
        assert_eq!(arguments.value("serviceCluster"), Some("waypoint.app"));
        assert!(arguments.unknown().is_empty() && arguments.unknown_scopes().is_empty());
        let (levels, _) = Levels::parse("warning", "misc:error", "info").unwrap();
        assert_eq!(arguments.log_settings().unwrap(), LogSettings { levels, json: false });
        let more = ["--log_as_json", "--outlierLogPath=/dev/stdout", "--concurrency", "2"];
        let arguments = Arguments::parse(&[&TEMPLATE[..], &more].concat()).unwrap();
        assert!(arguments.log_settings().unwrap().json);
        assert_eq!(arguments.concurrency(), Ok(Some(2)));
        assert_eq!(arguments.value("outlierLogPath"), Some("/dev/stdout"));
    }

    #[test]
    fn unknown_flags_are_taken_with_their_values() {
        let cases: [(&[&str], &[&str]); 6] = [
            (&["waypoint", "--stsPort", "15463", "--domain", "d"], &["--stsPort"]),
            (&["waypoint", "--new=1", "--domain=d"], &["--new"]),
            (&["waypoint", "--new", "--domain=d", "--newer"], &["--new", "--newer"]),
            (&["--new", "waypoint", "--domain", "d"], &["--new"]),
            (&["--new", "value", "waypoint", "--domain", "d"], &["--new"]),
            (
                &["waypoint", "--profiling", "--domain", "d", "-v", "3"],
                &["--profiling", "--v"],
            ),
        ];
        for (given, unknown) in cases {
            let arguments = Arguments::parse(given).unwrap_or_else(|error| panic!("{given:?}: {error}"));
            assert_eq!(arguments.unknown(), unknown, "{given:?}");
            assert_eq!(arguments.value("domain"), Some("d"), "{given:?}");
        }
    }

    #[test]
    fn other_roles_are_refused_in_a_sentence() {
        for role in ["router", "sidecar", "ztunnel"] {
            let error = Arguments::parse(&[role, "--domain", "d"]).unwrap_err();
            assert_eq!(error, ArgumentError::Role(role.to_owned()));
            assert!(error.to_string().contains("waypoints only"));
        }
        assert_eq!(Arguments::parse::<&str>(&[]), Err(ArgumentError::NoRole));
        assert_eq!(
            Arguments::parse(&["waypoint", "--domain"]),
            Err(ArgumentError::NoValue("domain".to_owned()))
        );
        assert_eq!(
            Arguments::parse(&["waypoint", "--domain", "--x"]),
            Err(ArgumentError::NoValue("domain".to_owned()))
        );
    }

    #[test]
    fn bad_values_are_refused_in_a_sentence() {
        let parse = |more: &[&str]| Arguments::parse(&[&["waypoint"], more].concat()).unwrap();
        for (error, want) in [
            (
                parse(&["--concurrency", "two"]).concurrency().unwrap_err(),
                "--concurrency=\"two\" cannot be used",
            ),
            (
                parse(&["--proxyLogLevel", "loud"]).log_settings().unwrap_err(),
                "\"loud\" is no log level",
            ),
            (
                parse(&["--log_as_json=maybe"]).log_settings().unwrap_err(),
                "--log_as_json=\"maybe\" cannot be used",
            ),
        ] {
            assert!(error.to_string().starts_with(want), "{error}");
        }
    }
}
