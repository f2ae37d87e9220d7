//! Whether the proxy is ready (contract runtime §8.5).
//!
//! It becomes ready when it serves, and stays so without istiod. It ends with the drain, and while somebody asks for failure. Why
//! it is not ready is worked out when it is asked for, in words: those are what `kubectl describe pod` shows.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

/// Readiness; clones are the same one.
#[derive(Clone)]
pub struct Readiness(Arc<Inner>);

struct Inner {
    serving: AtomicBool,
    draining: AtomicBool,
    failing: AtomicBool,
    waiting: Box<dyn Fn() -> Vec<String> + Send + Sync>,
}

/// As `/server_info` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Serving.
    Live,
    /// Not yet.
    PreInitializing,
    /// Not any more, or not for now.
    Draining,
}

// === impl Readiness ===

impl Readiness {
    /// Not ready; `waiting` says what for.
    pub fn new(waiting: impl Fn() -> Vec<String> + Send + Sync + 'static) -> Self {
        let no = AtomicBool::default;
        Self(Arc::new(Inner {
            serving: no(),
            draining: no(),
            failing: no(),
            waiting: Box::new(waiting),
        }))
    }

    /// Tunnels are accepted from now on.
    pub fn serving(&self) {
        self.0.serving.store(true, Relaxed);
    }

    /// The drain has begun.
    pub fn draining(&self) {
        self.0.draining.store(true, Relaxed);
    }

    /// Somebody wants us to look unhealthy, or not any more.
    pub fn fail(&self, failing: bool) {
        self.0.failing.store(failing, Relaxed);
    }

    /// The state.
    pub fn state(&self) -> State {
        let Inner {
            serving,
            draining,
            failing,
            waiting: _,
        } = &*self.0;
        if draining.load(Relaxed) || failing.load(Relaxed) {
            State::Draining
        } else if serving.load(Relaxed) {
            State::Live
        } else {
            State::PreInitializing
        }
    }

    /// Why the proxy is not ready; `Ok` when it is.
    pub fn check(&self) -> Result<(), String> {
        match self.state() {
            State::Live => Ok(()),
            State::Draining if self.0.draining.load(Relaxed) => Err("not ready: the proxy is draining and will end".to_owned()),
            State::Draining => Err("not ready: POST /healthcheck/fail asked for it; POST /healthcheck/ok ends it".to_owned()),
            State::PreInitializing => {
                let waiting = (self.0.waiting)();
                let words = if waiting.is_empty() {
                    "starting".to_owned()
                } else {
                    waiting.join("; ")
                };
                Err(format!("not ready: {words}"))
            }
        }
    }
}

impl fmt::Debug for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Readiness").field(&self.state()).finish()
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Live => "LIVE",
            Self::PreInitializing => "PRE_INITIALIZING",
            Self::Draining => "DRAINING",
        })
    }
}

/// What the proxy waits for, from what istiod's stream, the compiler and the certificate say.
pub fn waiting_for(
    istiod: &str,
    stream: &cairn_xds::StatusSnapshot,
    missing: &[String],
    certificate: Option<&str>,
    listening: Option<&str>,
) -> Vec<String> {
    let mut waiting = Vec::new();
    match (&stream.connected_since, &stream.last_error) {
        (None, None) => waiting.push(format!("waiting for istiod at {istiod}")),
        (None, Some(error)) => waiting.push(format!("waiting for istiod at {istiod}: {error}")),
        (Some(_), _) if !missing.is_empty() => waiting.push(format!("waiting for istiod to send {}", missing.join(", "))),
        (Some(_), _) => {}
    }
    for (kind, status) in &stream.types {
        if let Some(words) = &status.last_nack {
            waiting.push(format!("what istiod sent cannot be used in full ({}): {words}", kind.short()));
        }
    }
    waiting.extend(certificate.map(|words| format!("certificate: {words}")));
    waiting.extend(listening.map(str::to_owned));
    waiting
}

#[cfg(test)]
mod tests {
    use cairn_exchange::clock;
    use cairn_xds::StatusSnapshot;

    use super::*;

    #[test]
    fn ready_lasts_until_the_drain() {
        let readiness = Readiness::new(|| vec!["waiting for istiod".to_owned(), "certificate: none".to_owned()]);
        assert_eq!(
            readiness.check().unwrap_err(),
            "not ready: waiting for istiod; certificate: none"
        );
        assert_eq!(readiness.state().to_string(), "PRE_INITIALIZING");
        readiness.serving();
        assert_eq!((readiness.check(), readiness.state().to_string().as_str()), (Ok(()), "LIVE"));
        readiness.fail(true);
        assert!(readiness.check().unwrap_err().contains("/healthcheck/ok"));
        readiness.fail(false);
        assert_eq!(readiness.check(), Ok(()));
        readiness.draining();
        assert!(readiness.check().unwrap_err().contains("draining"));
        readiness.serving();
        assert_eq!(readiness.state(), State::Draining);
    }

    #[test]
    fn what_is_waited_for_is_told_in_words() {
        let missing = ["clusters (CDS)".to_owned(), "listeners (LDS)".to_owned()];
        let never = StatusSnapshot::default();
        let refused = StatusSnapshot {
            last_error: Some("connection refused".to_owned()),
            ..never.clone()
        };
        let open = StatusSnapshot {
            connected_since: Some(clock::wall()),
            ..refused.clone()
        };
        let told = |stream, missing: &[String], certificate, listening| {
            waiting_for("istiod:15012", stream, missing, certificate, listening).join("; ")
        };
        for (got, want) in [
            (told(&never, &missing, None, None), "waiting for istiod at istiod:15012"),
            (
                told(&refused, &missing, Some("no token"), None),
                "waiting for istiod at istiod:15012: connection refused; certificate: no token",
            ),
            (
                told(&open, &missing, None, None),
                "waiting for istiod to send clusters (CDS), listeners (LDS)",
            ),
            (told(&open, &[], None, Some("port 15008 is in use")), "port 15008 is in use"),
        ] {
            assert_eq!(got, want);
        }
    }
}
