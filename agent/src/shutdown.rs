//! How the proxy ends: drained first, with nothing in flight cut while time remains (contract runtime §8.7).
//!
//! A drain makes the proxy not ready, sends GOAWAY on every tunnel and `connection: close` on HTTP/1.1 answers, and goes on
//! accepting: endpoints propagate slowly, and a client that still comes is better served than refused. The end of the wait is
//! what differs: the whole of `terminationDrainDuration`, or, with `EXIT_ON_ZERO_ACTIVE_CONNECTIONS`, when nothing is under way
//! after `MINIMUM_DRAIN_DURATION`, without a limit of our own: the pod's grace period is one.

use std::time::Duration;

use tokio::{sync::mpsc, time::sleep};

/// Requests that wait; more of them say nothing new.
const REQUESTS: usize = 8;
/// How often it is looked whether anything is under way, as pilot-agent does.
const POLL: Duration = Duration::from_secs(1);

/// How long a drain takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrainSettings {
    /// `ProxyConfig.terminationDrainDuration`.
    pub termination: Duration,
    /// `MINIMUM_DRAIN_DURATION`; of meaning with `until_idle` only.
    pub minimum: Duration,
    /// `EXIT_ON_ZERO_ACTIVE_CONNECTIONS`.
    pub until_idle: bool,
}

/// What the proxy is told about its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// SIGTERM or SIGINT: drain, then exit; after a [`Request::Drain`] exit at once.
    Terminate,
    /// `POST /drain`: drain, and stay.
    Drain,
    /// `POST /quitquitquit`: exit at once.
    Quit,
}

/// Tells a proxy to end.
#[derive(Clone, Debug)]
pub struct Control(mpsc::Sender<Request>);

/// Where a proxy hears of it.
#[derive(Debug)]
pub struct Requests(mpsc::Receiver<Request>);

/// Makes the two sides.
pub fn channel() -> (Control, Requests) {
    let (sender, receiver) = mpsc::channel(REQUESTS);
    (Control(sender), Requests(receiver))
}

// === impl Control ===

impl Control {
    /// Tells it. When more requests wait than make sense, or the proxy is ending already, nothing is lost by leaving it out.
    pub fn send(&self, request: Request) {
        let _ = self.0.try_send(request);
    }
}

// === impl Requests ===

impl Requests {
    /// Returns when the proxy has to exit. `start` begins the drain, once; `idle` says whether nothing is under way.
    pub async fn until_exit(mut self, settings: &DrainSettings, start: impl Fn(), idle: impl Fn() -> bool) {
        let mut drained = false;
        // All senders gone is the end too: nobody could ever end the proxy otherwise.
        while let Some(request) = self.0.recv().await {
            match request {
                Request::Quit => {
                    tracing::info!("exiting at once, as asked");
                    return;
                }
                Request::Drain if drained => {}
                Request::Drain => {
                    tracing::info!("draining, as asked; the next signal ends the proxy at once");
                    start();
                    drained = true;
                }
                Request::Terminate if drained => {
                    tracing::info!("exiting at once, since the drain was asked for before");
                    return;
                }
                Request::Terminate => {
                    start();
                    tokio::select! {
                        () = settings.wait(idle) => {}
                        () = self.quit() => tracing::info!("exiting at once, as asked"),
                    }
                    return;
                }
            }
        }
    }

    /// Waits for [`Request::Quit`]; a second signal changes nothing (contract runtime §8.7).
    async fn quit(&mut self) {
        while let Some(request) = self.0.recv().await {
            if request == Request::Quit {
                return;
            }
        }
        std::future::pending::<()>().await;
    }
}

// === impl DrainSettings ===

impl DrainSettings {
    /// The wait between the start of the drain and the exit.
    async fn wait(&self, idle: impl Fn() -> bool) {
        if !self.until_idle {
            // All of it, though nothing may be under way: clients learn late that this endpoint is gone, and would be refused.
            tracing::info!(exit_in = ?self.termination, "draining");
            sleep(self.termination).await;
            return;
        }
        tracing::info!(at_least = ?self.minimum, "draining until nothing is under way");
        sleep(self.minimum).await;
        while !idle() {
            sleep(POLL).await;
        }
    }
}

impl Default for DrainSettings {
    fn default() -> Self {
        Self {
            termination: Duration::from_secs(5),
            minimum: Duration::from_secs(5),
            until_idle: false,
        }
    }
}

/// Passes SIGTERM and SIGINT on, from now on.
pub fn on_signals(control: Control) -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            control.send(Request::Terminate);
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        cell::Cell,
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering::Relaxed},
        },
    };

    use cairn_exchange::clock;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Plays requests at their seconds, with work that ends at `busy_until`; when it exits, and how often a drain was started.
    async fn exits(settings: DrainSettings, requests: &[(u64, Request)], busy_until: u64) -> (u64, usize) {
        let begin = clock::now();
        let (control, heard) = channel();
        let plan = requests.to_vec();
        tokio::spawn(async move {
            let mut passed = 0;
            for (at, request) in plan {
                sleep(SECOND * u32::try_from(at - passed).unwrap()).await;
                passed = at;
                control.send(request);
            }
            // Somebody could still ask.
            std::future::pending::<()>().await;
        });
        let started = Cell::new(0);
        let idle = || clock::now().duration_since(begin) >= SECOND * u32::try_from(busy_until).unwrap();
        heard.until_exit(&settings, || started.set(started.get() + 1), idle).await;
        (clock::now().duration_since(begin).as_secs(), started.get())
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_comes_when_the_settings_say() {
        use Request::{Drain, Quit, Terminate};
        let default = DrainSettings::default();
        let long = DrainSettings {
            termination: 30 * SECOND,
            ..default
        };
        let idle = DrainSettings {
            until_idle: true,
            ..default
        };
        /// Name, settings, requests by second, until when something is under way; when it exits, and how many drains it began.
        type Case<'a> = (&'a str, DrainSettings, &'a [(u64, Request)], u64, (u64, usize));
        let cases: [Case<'_>; 10] = [
            ("the whole drain time, though idle", default, &[(1, Terminate)], 0, (6, 1)),
            ("no longer than the drain time", default, &[(1, Terminate)], 100, (6, 1)),
            ("as long as it was set", long, &[(1, Terminate)], 0, (31, 1)),
            (
                "a second signal changes nothing",
                default,
                &[(1, Terminate), (2, Terminate)],
                0,
                (6, 1),
            ),
            ("quit skips the drain", default, &[(1, Quit)], 100, (1, 0)),
            ("quit ends a drain", default, &[(1, Terminate), (3, Quit)], 100, (3, 1)),
            (
                "drain, then a signal: at once",
                default,
                &[(1, Drain), (2, Drain), (9, Terminate)],
                100,
                (9, 1),
            ),
            ("the minimum, though idle", idle, &[(1, Terminate)], 0, (6, 1)),
            ("until nothing is under way", idle, &[(1, Terminate)], 300, (300, 1)),
            (
                "quit ends the wait for that",
                idle,
                &[(1, Terminate), (60, Quit)],
                300,
                (60, 1),
            ),
        ];
        for (name, settings, requests, busy_until, want) in cases {
            assert_eq!(exits(settings, requests, busy_until).await, want, "{name}");
        }
    }

    #[tokio::test]
    async fn a_proxy_that_nobody_can_end_ends() {
        let (control, heard) = channel();
        drop(control);
        let started = Arc::new(AtomicUsize::new(0));
        heard
            .until_exit(&DrainSettings::default(), || started.store(1, Relaxed), || false)
            .await;
        assert_eq!(started.load(Relaxed), 0);
    }
}
