//! The request sets: their names, what they send, and how a run of one is measured.
//!
//! Proxies take turns (A B C A B C …) so that a slow minute of the machine
//! meets them all, and each figure is the median of its runs. A failed request
//! fails the whole measurement: what does not work has no speed.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::time::{Instant, sleep, timeout};

use crate::load::{Inner, Pace, Work};
use crate::proxy::Usage;
use crate::report;
use crate::rig::{Kind, Proxy};
use crate::tally::Tally;

/// Tasks that were told to stop end within this, or are ended.
const STOP_DEADLINE: Duration = Duration::from_secs(3);
const BYTES_IN_GB: f64 = 1e9;

/// One set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Set {
    pub(crate) name: &'static str,
    pub(crate) kind: SetKind,
}

/// What a set measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SetKind {
    /// CPU of a unit of work, and how fast it is done.
    Load(Work),
    /// Bytes of a thing that is idle.
    Memory,
}

const fn requests(tunnels: usize, streams: usize, inner: Inner, pace: Pace) -> SetKind {
    SetKind::Load(Work::Requests {
        tunnels,
        streams,
        inner,
        pace,
    })
}

/// Every set, in the order of the report.
pub(crate) const SETS: [Set; 7] = [
    Set {
        name: "h1-2x8",
        kind: requests(2, 8, Inner::Http1, Pace::Closed),
    },
    Set {
        name: "h1-4x32",
        kind: requests(4, 32, Inner::Http1, Pace::Closed),
    },
    Set {
        name: "inner-h2-2x8x4",
        kind: requests(2, 8, Inner::Http2 { concurrent: 4 }, Pace::Closed),
    },
    Set {
        name: "open-2000",
        kind: requests(2, 8, Inner::Http1, Pace::Rate(2000)),
    },
    Set {
        name: "tcp-stream",
        kind: SetKind::Load(Work::Bytes { tunnels: 2, streams: 2 }),
    },
    Set {
        name: "cold",
        kind: SetKind::Load(Work::Cold { workers: 8 }),
    },
    Set {
        name: "memory",
        kind: SetKind::Memory,
    },
];

/// The sets with the given names, in the report's order; all of them without names.
pub(crate) fn choose(names: &[String]) -> Result<Vec<Set>> {
    let known = || SETS.map(|set| set.name).join(", ");
    if let Some(unknown) = names.iter().find(|name| !SETS.iter().any(|set| set.name == **name)) {
        bail!("there is no set {unknown:?}; the sets are {}", known());
    }
    Ok(SETS
        .into_iter()
        .filter(|set| names.is_empty() || names.iter().any(|name| name == set.name))
        .collect())
}

/// How long and how often.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) warm_up: Duration,
    pub(crate) window: Duration,
    pub(crate) rounds: usize,
}

/// What one run found.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sample {
    /// CPU seconds of the proxy for each unit of work: a request, a connection, a gigabyte.
    pub(crate) cost: f64,
    /// Units of work a second.
    pub(crate) rate: f64,
    pub(crate) p50: Duration,
    pub(crate) p99: Duration,
    /// CPU of the proxy, as a share of its core.
    pub(crate) busy: f64,
    /// Time for which the proxy waited for its core, as a share of the window.
    pub(crate) waited: f64,
    pub(crate) resident: u64,
}

/// Runs one set against all proxies in turn; the samples of each.
pub(crate) async fn measure(
    name: &str,
    work: Work,
    proxies: &[Proxy],
    sunk: &Arc<AtomicU64>,
    plan: Plan,
) -> Result<Vec<(Kind, Vec<Sample>)>> {
    let mut samples: Vec<_> = proxies.iter().map(|proxy| (proxy.kind, Vec::new())).collect();
    for round in 1..=plan.rounds {
        for (proxy, (_, samples)) in proxies.iter().zip(&mut samples) {
            let run = format!("{name} {} {round}/{}", proxy.kind.name(), plan.rounds);
            report::progress(&run);
            let sample = one_run(work, proxy, sunk, plan)
                .await
                .with_context(|| format!("{run} failed; {}", proxy.process.log_tail()))?;
            samples.push(sample);
        }
    }
    Ok(samples)
}

async fn one_run(work: Work, proxy: &Proxy, sunk: &Arc<AtomicU64>, plan: Plan) -> Result<Sample> {
    let tally = Arc::new(Tally::new()?);
    let mut tasks = work.start(&proxy.entry, &tally, sunk).await?;
    sleep(plan.warm_up).await;

    tally.record(true);
    let before = Reading::take(work, proxy, &tally)?;
    sleep(plan.window).await;
    let after = Reading::take(work, proxy, &tally)?;
    tally.record(false);

    tally.stop();
    let all = async { while tasks.join_next().await.is_some() {} };
    // What still waits for an answer then is not counted, and ended with `tasks`.
    let _ = timeout(STOP_DEADLINE, all).await;
    if let (failed @ 1.., reason) = tally.failures() {
        bail!(
            "{failed} of {} requests or streams failed: {}",
            tally.done() + failed,
            reason.unwrap_or_default()
        );
    }
    let sample = after.since(&before, &tally)?;
    Ok(Sample {
        resident: proxy.process.resident()?,
        ..sample
    })
}

/// Counters at an edge of the window.
struct Reading {
    at: Instant,
    units: f64,
    usage: Usage,
}

impl Reading {
    fn take(work: Work, proxy: &Proxy, tally: &Tally) -> Result<Self> {
        #[expect(clippy::cast_precision_loss, reason = "counts of a run of seconds are far below 2^52")]
        let units = match work {
            Work::Bytes { .. } => tally.bytes() as f64 / BYTES_IN_GB,
            Work::Requests { .. } | Work::Cold { .. } => tally.done() as f64,
        };
        Ok(Self {
            at: Instant::now(),
            units,
            usage: proxy.process.usage()?,
        })
    }

    fn since(&self, before: &Self, tally: &Tally) -> Result<Sample> {
        let units = self.units - before.units;
        if units <= 0.0 {
            bail!("nothing was done in the window: the proxy or the destination hangs");
        }
        let elapsed = (self.at - before.at).as_secs_f64();
        let run = self.usage.run.saturating_sub(before.usage.run);
        let wait = self.usage.wait.saturating_sub(before.usage.wait);
        Ok(Sample {
            cost: run.as_secs_f64() / units,
            rate: units / elapsed,
            p50: tally.latency(0.50),
            p99: tally.latency(0.99),
            busy: run.as_secs_f64() / elapsed,
            waited: wait.as_secs_f64() / elapsed,
            resident: 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_chosen_by_name_and_kept_in_order() {
        let names = ["cold".to_owned(), "h1-2x8".to_owned()];
        let chosen: Vec<_> = choose(&names).unwrap().iter().map(|set| set.name).collect();
        assert_eq!(chosen, ["h1-2x8", "cold"]);
        assert_eq!(choose(&[]).unwrap().len(), SETS.len());
    }

    #[test]
    fn an_unknown_set_is_refused_with_the_known_ones() {
        let error = choose(&["h3".to_owned()]).unwrap_err().to_string();
        assert!(error.contains("h3") && error.contains("inner-h2-2x8x4"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_sample_is_the_difference_of_two_readings() {
        let tally = Tally::new().unwrap();
        let usage = |run, wait| Usage {
            run: Duration::from_millis(run),
            wait: Duration::from_millis(wait),
        };
        let before = Reading {
            at: Instant::now(),
            units: 1000.0,
            usage: usage(500, 10),
        };
        let after = Reading {
            at: before.at + Duration::from_secs(2),
            units: 41_000.0,
            usage: usage(1500, 110),
        };
        let sample = after.since(&before, &tally).unwrap();
        assert!((sample.cost - 25e-6).abs() < 1e-12);
        assert!((sample.rate - 20_000.0).abs() < 1e-6);
        assert!((sample.busy - 0.5).abs() < 1e-12);
        assert!((sample.waited - 0.05).abs() < 1e-12);
        assert!(before.since(&before, &tally).is_err());
    }
}
