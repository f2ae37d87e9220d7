//! Our own log, on standard error: levels by module as `RUST_LOG` writes them, changed while the proxy runs.

use std::{io::IsTerminal as _, sync::Arc};

use parking_lot::Mutex;
use tracing_subscriber::{Registry, filter::Targets, fmt, layer::SubscriberExt as _, reload, util::SubscriberInitExt as _};

/// Changes levels.
#[derive(Clone)]
pub struct Handle {
    current: Arc<Mutex<String>>,
    first: Arc<str>,
    apply: Arc<dyn Fn(Targets) + Send + Sync>,
}

/// A list of levels that means nothing.
#[derive(Debug, thiserror::Error)]
#[error("{text:?} is no list of log levels such as info,cairn_ztunnel=debug: {reason}")]
pub struct LevelError {
    text: String,
    reason: String,
}

// === impl Handle ===

impl Handle {
    /// Begins to log for the whole process.
    pub fn start(filter: &str, json: bool) -> Result<Self, LevelError> {
        let (layer, reload) = reload::Layer::new(targets(filter)?);
        let lines = fmt::layer()
            .with_writer(std::io::stderr)
            .with_ansi(std::io::stderr().is_terminal());
        let registry = Registry::default().with(layer);
        // Somebody else logs for this process, as in tests.
        let _ = if json {
            registry.with(lines.json()).try_init()
        } else {
            registry.with(lines).try_init()
        };
        Ok(Self {
            current: Arc::new(Mutex::new(filter.to_owned())),
            first: filter.into(),
            apply: Arc::new(move |targets| {
                // The filter is gone only when the process's logger is another one.
                let _ = reload.reload(targets);
            }),
        })
    }

    /// What is logged.
    pub fn current(&self) -> String {
        self.current.lock().clone()
    }

    /// Logs this from now on.
    pub fn change(&self, filter: &str) -> Result<(), LevelError> {
        (self.apply)(targets(filter)?);
        filter.clone_into(&mut self.current.lock());
        Ok(())
    }

    /// Logs what was logged at first.
    pub fn reset(&self) {
        // It was good when the process started.
        let _ = self.change(&self.first.clone());
    }
}

fn targets(filter: &str) -> Result<Targets, LevelError> {
    filter
        .parse()
        .map_err(|error: tracing_subscriber::filter::ParseError| LevelError {
            text: filter.to_owned(),
            reason: error.to_string(),
        })
}
