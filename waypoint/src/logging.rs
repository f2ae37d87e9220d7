//! Our own log: what is told, how, and changing it while the proxy runs.
//!
//! Operators speak of Envoy's loggers (`--proxyLogLevel`, `--proxyComponentLogLevel`, `istioctl proxy-config log`) and of
//! pilot-agent's scopes (`--log_output_level`). Both are names for parts of this program: [`SCOPES`] says which. A part that several
//! names reach is as talkative as the most talkative of them. Lines go to standard error, so that access logs have standard output
//! for themselves.

use std::{collections::BTreeMap, io::IsTerminal as _, sync::Arc};

use parking_lot::Mutex;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::{Registry, filter::Targets, fmt, layer::SubscriberExt as _, reload, util::SubscriberInitExt as _};

/// Names of parts, and the modules that they are. `agent` scopes follow `--log_output_level`, the others `--proxyLogLevel`.
pub const SCOPES: [(&str, &[&str]); 22] = [
    ("admin", &["cairn_agent::server", "cairn_waypoint::admin"]),
    (
        "agent",
        &["cairn_waypoint::cli", "cairn_agent::shutdown", "cairn_waypoint::settings"],
    ),
    ("ca", &["cairn_identity"]),
    ("config", &["cairn_waypoint::config"]),
    ("conn_handler", &["cairn_waypoint::serve::listener"]),
    ("connection", &["cairn_hbone", "cairn_waypoint::serve"]),
    ("ext_authz", &["cairn_filters"]),
    ("file", &["cairn_telemetry::access_log"]),
    ("filter", &["cairn_filters"]),
    ("hc", &["cairn_waypoint::upstream"]),
    ("http", &["cairn_waypoint::serve", "hyper"]),
    ("http2", &["cairn_hbone", "h2"]),
    ("jwt", &["cairn_filters"]),
    ("main", &["cairn_waypoint::engine", "cairn_waypoint::cli"]),
    ("misc", &[]),
    ("pool", &["cairn_waypoint::upstream", "cairn_hbone"]),
    ("rbac", &["cairn_filters"]),
    ("router", &["cairn_waypoint::serve", "cairn_waypoint::upstream"]),
    ("secret", &["cairn_identity"]),
    ("tracing", &["cairn_telemetry"]),
    ("upstream", &["cairn_waypoint::upstream"]),
    ("xdsproxy", &["cairn_xds"]),
];

/// Other names of the same parts.
const ALIASES: [(&str, &str); 10] = [
    ("ads", "xdsproxy"),
    ("xds", "xdsproxy"),
    ("citadelclient", "ca"),
    ("security", "ca"),
    ("cache", "secret"),
    ("sds", "secret"),
    ("health_checker", "hc"),
    ("http1", "http"),
    ("client", "router"),
    ("tls_inspector", "connection"),
];

/// Parts that are pilot-agent's in the image that we replace.
const AGENT: [&str; 6] = ["admin", "agent", "ca", "config", "secret", "xdsproxy"];

/// What to log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogSettings {
    /// By part.
    pub levels: Levels,
    /// One JSON object a line.
    pub json: bool,
}

/// How talkative each part is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Levels {
    /// Libraries and everything without a name.
    base: LevelFilter,
    scopes: BTreeMap<&'static str, LevelFilter>,
}

/// A level or list of levels that means nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no log level: trace, debug, info, warning, error, critical or off is expected, or a list such as info,http:debug"
)]
pub struct LevelError(String);

/// Changes levels while the proxy runs.
#[derive(Clone)]
pub struct Handle {
    levels: Arc<Mutex<Levels>>,
    apply: Arc<dyn Fn(Targets) + Send + Sync>,
}

// === impl Levels ===

impl Levels {
    /// What the three arguments say. Names that are nobody's are given back.
    pub fn parse(proxy: &str, components: &str, agent: &str) -> Result<(Self, Vec<String>), LevelError> {
        let mut levels = Self::default();
        let mut unknown = Vec::new();
        levels.list(agent, &mut unknown, |levels, level| levels.set_all(level, true))?;
        levels.list(proxy, &mut unknown, |levels, level| levels.set_all(level, false))?;
        levels.list(components, &mut unknown, |levels, level| levels.set_all(level, false))?;
        unknown.retain(|name| name != "misc");
        Ok((levels, unknown))
    }

    /// `level`, `name:level` and lists of them; `default:level` and a bare level are for all.
    fn list(&mut self, text: &str, unknown: &mut Vec<String>, all: impl Fn(&mut Self, LevelFilter)) -> Result<(), LevelError> {
        let items = || text.split(',').map(str::trim).filter(|item| !item.is_empty());
        let parsed = items().map(|item| {
            let (name, word) = item
                .rsplit_once(':')
                .map_or(("all", item), |(name, word)| (name.trim(), word.trim()));
            let name = if name == "default" { "all" } else { name };
            level(word)
                .map(|level| (name, level))
                .ok_or_else(|| LevelError(item.to_owned()))
        });
        let parsed = parsed.collect::<Result<Vec<_>, _>>()?;
        for (_, level) in parsed.iter().filter(|(name, _)| *name == "all") {
            all(self, *level);
        }
        for (name, level) in parsed.iter().filter(|(name, _)| *name != "all") {
            if !self.set(name, *level) {
                unknown.push((*name).to_owned());
            }
        }
        Ok(())
    }

    /// One part; `false` when nobody has this name.
    pub fn set(&mut self, name: &str, level: LevelFilter) -> bool {
        let name = ALIASES
            .iter()
            .find(|(alias, _)| *alias == name)
            .map_or(name, |(_, name)| *name);
        match self.scopes.get_mut(name) {
            Some(slot) => {
                *slot = level;
                if name == "misc" {
                    self.base = level;
                }
                true
            }
            None => false,
        }
    }

    /// All parts of one of the two groups.
    fn set_all(&mut self, level: LevelFilter, agent: bool) {
        for (name, slot) in &mut self.scopes {
            if AGENT.contains(name) == agent {
                *slot = level;
            }
        }
        if !agent {
            self.base = level;
        }
    }

    /// Everything.
    pub fn set_everything(&mut self, level: LevelFilter) {
        self.set_all(level, true);
        self.set_all(level, false);
    }

    /// As Envoy lists them.
    pub fn list_active(&self) -> String {
        let lines = self
            .scopes
            .iter()
            .map(|(name, level)| format!("  {name}: {}\n", word(*level)));
        format!("active loggers:\n{}", lines.collect::<String>())
    }

    fn targets(&self) -> Targets {
        let mut modules: BTreeMap<&str, LevelFilter> =
            BTreeMap::from([("cairn_waypoint", self.base), ("cairn_telemetry", self.base)]);
        for (name, targets) in SCOPES {
            let level = self.scopes.get(name).copied().unwrap_or(self.base);
            for target in targets {
                let slot = modules.entry(target).or_insert(level);
                *slot = (*slot).max(level);
            }
        }
        Targets::new().with_default(self.base).with_targets(modules)
    }
}

impl Default for Levels {
    /// As the image that we replace: `warning` for the proxy, `info` for the agent.
    fn default() -> Self {
        let mut levels = Self {
            base: LevelFilter::WARN,
            scopes: SCOPES.iter().map(|(name, _)| (*name, LevelFilter::WARN)).collect(),
        };
        levels.set_all(LevelFilter::INFO, true);
        levels
    }
}

/// A level in Envoy's or Istio's words.
pub fn level(word: &str) -> Option<LevelFilter> {
    Some(match word {
        "trace" => LevelFilter::TRACE,
        "debug" => LevelFilter::DEBUG,
        "info" => LevelFilter::INFO,
        "warn" | "warning" => LevelFilter::WARN,
        "error" | "err" | "critical" | "fatal" => LevelFilter::ERROR,
        "off" | "none" => LevelFilter::OFF,
        _ => return None,
    })
}

fn word(level: LevelFilter) -> &'static str {
    match level {
        LevelFilter::TRACE => "trace",
        LevelFilter::DEBUG => "debug",
        LevelFilter::INFO => "info",
        LevelFilter::WARN => "warning",
        LevelFilter::ERROR => "error",
        _ => "off",
    }
}

// === impl Handle ===

impl Handle {
    /// Begins to log for the whole process. A second call changes nothing of the first and gives a handle without effect.
    pub fn start(settings: &LogSettings) -> Self {
        let (filter, reload) = reload::Layer::new(settings.levels.targets());
        let lines = fmt::layer()
            .with_writer(std::io::stderr)
            .with_ansi(std::io::stderr().is_terminal());
        let registry = Registry::default().with(filter);
        let started = if settings.json {
            registry.with(lines.json()).try_init()
        } else {
            registry.with(lines).try_init()
        };
        let apply = move |targets: Targets| {
            // The filter is gone only when the process's logger is another one.
            let _ = reload.reload(targets);
        };
        if let Err(error) = started {
            tracing::debug!(%error, "logging had been started before");
        }
        Self {
            levels: Arc::new(Mutex::new(settings.levels.clone())),
            apply: Arc::new(apply),
        }
    }

    /// A handle that changes nothing but its own list.
    #[cfg(test)]
    pub fn detached() -> Self {
        Self {
            levels: Arc::default(),
            apply: Arc::new(|_| {}),
        }
    }

    /// The list of parts and levels, as Envoy prints it.
    pub fn list(&self) -> String {
        self.levels.lock().list_active()
    }

    /// Sets the levels of some parts, or of all with the name `all`. Nothing is changed when one of them means nothing.
    pub fn change<'a>(&self, changes: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<(), String> {
        let mut levels = self.levels.lock();
        let mut changed = levels.clone();
        for (name, text) in changes {
            let level = level(text).ok_or_else(|| LevelError(text.to_owned()).to_string())?;
            if name == "all" {
                changed.set_everything(level);
            } else if !changed.set(name, level) {
                return Err(format!("there is no logger {name:?}; GET /logging lists them"));
            }
        }
        (self.apply)(changed.targets());
        *levels = changed;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(proxy: &str, components: &str, agent: &str) -> (Levels, Vec<String>) {
        Levels::parse(proxy, components, agent).unwrap()
    }

    fn would(levels: &Levels, module: &'static str, level: tracing::Level) -> bool {
        levels.targets().would_enable(module, &level)
    }

    #[test]
    fn the_templates_levels_are_those_of_agent_and_proxy() {
        let (levels, unknown) = of("warning", "misc:error", "default:info");
        assert!(unknown.is_empty());
        for (module, level, told) in [
            ("cairn_xds::client", tracing::Level::INFO, true),
            ("cairn_xds::client", tracing::Level::DEBUG, false),
            ("cairn_identity", tracing::Level::INFO, true),
            ("cairn_waypoint::cli::proxy", tracing::Level::INFO, true),
            ("cairn_waypoint::serve::tunnel", tracing::Level::INFO, false),
            ("cairn_waypoint::serve::tunnel", tracing::Level::WARN, true),
            ("h2::codec", tracing::Level::INFO, false),
            ("rustls", tracing::Level::WARN, false),
            ("rustls", tracing::Level::ERROR, true),
        ] {
            assert_eq!(would(&levels, module, level), told, "{module} {level}");
        }
    }

    #[test]
    fn parts_are_named_as_envoy_and_istio_name_them() {
        let (levels, unknown) = of(
            "info,rbac:debug",
            "http2:trace,nobody:info",
            "default:warn,ads:debug,security:error",
        );
        assert_eq!(unknown, ["nobody"]);
        assert!(would(&levels, "cairn_filters::rbac", tracing::Level::DEBUG));
        assert!(would(&levels, "cairn_hbone::server", tracing::Level::TRACE));
        assert!(would(&levels, "cairn_xds", tracing::Level::DEBUG));
        assert!(!would(&levels, "cairn_waypoint::admin", tracing::Level::INFO));
        assert!(would(&levels, "cairn_waypoint::serve", tracing::Level::INFO));
    }

    #[test]
    fn a_level_that_means_nothing_is_an_error_that_lists_the_levels() {
        for (proxy, components, agent) in [
            ("loud", "", ""),
            ("", "http:very", ""),
            ("", "", "default:x"),
            ("", "", "ads:"),
        ] {
            let error = Levels::parse(proxy, components, agent).unwrap_err().to_string();
            assert!(error.contains("is no log level: trace, debug"), "{error}");
        }
    }

    #[test]
    fn levels_are_changed_all_or_none() {
        let handle = Handle::detached();
        handle.change([("http", "debug"), ("rbac", "trace")]).unwrap();
        assert!(handle.list().starts_with("active loggers:\n  admin: info\n"));
        assert!(handle.list().contains("  http: debug\n") && handle.list().contains("  rbac: trace\n"));
        assert!(
            handle
                .change([("http", "off"), ("nobody", "debug")])
                .unwrap_err()
                .contains("nobody")
        );
        assert!(handle.change([("http", "off"), ("rbac", "loud")]).is_err());
        assert!(handle.list().contains("  http: debug\n"));
        handle.change([("all", "error")]).unwrap();
        assert!(
            handle.list().lines().skip(1).all(|line| line.ends_with(": error")),
            "{}",
            handle.list()
        );
    }
}
