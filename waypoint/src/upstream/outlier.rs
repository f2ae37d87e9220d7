//! Takes endpoints out that fail, and back again, beside the data path.
//!
//! Requests count what they see into their endpoint's [`Monitor`](super::Monitor) and tell this task when a limit is reached; all else
//! happens here: the decision, the time out, the looks at rates at each interval, and the event log. An ejection makes a new set of
//! endpoints for the cluster, as an answer of istiod does.

mod log;

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
    time::Duration,
};

use cairn_exchange::clock::{self, Instant};
use cairn_policy::outlier::{EjectionKind, OutlierSettings, Rate, Report, Verdict};
use cairn_telemetry::access_log::LogFile;
use tokio::{sync::mpsc, time::sleep_until};

use super::{Cluster, Endpoint};
use crate::proxy::Proxy;

/// Limits reached that may wait to be looked at; more are looked at when the row is that long again.
const MOST_SIGNALS: usize = 1024;
/// How often new configuration is looked for.
const RECONCILE: Duration = Duration::from_secs(1);

/// Takes reports from requests.
#[derive(Debug)]
pub struct Outliers {
    signals: mpsc::Sender<Signal>,
}

/// The other end of [`Outliers`].
#[derive(Debug)]
pub struct Signals(mpsc::Receiver<Signal>);

/// A limit was reached.
#[derive(Debug)]
struct Signal {
    cluster: Arc<Cluster>,
    endpoint: Arc<Endpoint>,
    kind: EjectionKind,
}

/// A cluster with its next interval.
struct Watched {
    interval: Duration,
    due: Instant,
}

struct Detector {
    watched: HashMap<Arc<str>, Watched>,
    log: Option<LogFile>,
}

// === impl Outliers ===

impl Outliers {
    /// Both ends.
    pub fn new() -> (Self, Signals) {
        let (signals, receiver) = mpsc::channel(MOST_SIGNALS);
        (Self { signals }, Signals(receiver))
    }

    /// Tells how a request, or a connection, to an endpoint went.
    pub fn report(&self, cluster: &Arc<Cluster>, endpoint: &Arc<Endpoint>, report: Report) {
        let Some(settings) = &cluster.settings.outlier else { return };
        let monitor = &endpoint.state.monitor;
        for kind in monitor.count(settings, settings.count(report)) {
            let signal = Signal {
                cluster: cluster.clone(),
                endpoint: endpoint.clone(),
                kind,
            };
            if self.signals.try_send(signal).is_err() {
                monitor.start_over(kind);
            }
        }
    }
}

// === impl Signals ===

impl Signals {
    /// Looks after all clusters until the proxy is gone.
    pub async fn supervise(self, proxy: Weak<Proxy>, log: Option<LogFile>) {
        let Signals(mut signals) = self;
        let mut detector = Detector {
            watched: HashMap::new(),
            log,
        };
        let mut seen = None;
        loop {
            {
                let Some(proxy) = proxy.upgrade() else { return };
                let snapshot = proxy.snapshot.load_full();
                if seen.as_ref().is_none_or(|seen| !Arc::ptr_eq(seen, &snapshot)) {
                    detector.watch(snapshot.clusters.iter().map(|(_, cluster)| cluster));
                }
                detector.look(clock::now(), |name| snapshot.clusters.get(name).cloned());
                seen = Some(snapshot);
            }
            let wake = detector
                .next()
                .map_or(RECONCILE, |due| due.saturating_duration_since(clock::now()).min(RECONCILE));
            tokio::select! {
                signal = signals.recv() => match signal {
                    Some(signal) => detector.reached(&signal, clock::now()),
                    None => return,
                },
                () = sleep_until(clock::now() + wake) => {}
            }
        }
    }
}

// === impl Detector ===

impl Detector {
    /// Watches the clusters that want it, and no others. A cluster with another interval begins anew.
    fn watch<'c>(&mut self, clusters: impl Iterator<Item = &'c Arc<Cluster>>) {
        let mut before = std::mem::take(&mut self.watched);
        let now = clock::now();
        for cluster in clusters {
            let Some(settings) = &cluster.settings.outlier else { continue };
            let interval = settings.interval;
            let kept = before.remove(cluster.name()).filter(|watched| watched.interval == interval);
            let watched = kept.unwrap_or(Watched {
                interval,
                due: now + interval,
            });
            self.watched.insert(cluster.name().clone(), watched);
        }
    }

    fn next(&self) -> Option<Instant> {
        self.watched.values().map(|watched| watched.due).min()
    }

    /// Looks at the clusters whose interval has passed.
    fn look(&mut self, now: Instant, find: impl Fn(&Arc<str>) -> Option<Arc<Cluster>>) {
        for (name, watched) in &mut self.watched {
            if watched.due > now {
                continue;
            }
            watched.due = now + watched.interval;
            if let Some(cluster) = find(name)
                && let Some(settings) = &cluster.settings.outlier
            {
                interval(&cluster, settings, now, self.log.as_ref());
            }
        }
    }

    /// A row of failures is long enough.
    fn reached(&self, signal: &Signal, now: Instant) {
        let Signal { cluster, endpoint, kind } = signal;
        let monitor = &endpoint.state.monitor;
        if let Some(settings) = &cluster.settings.outlier {
            let set = cluster.state.endpoints.load_full();
            let known = set.iter().find(|known| Arc::ptr_eq(&known.state, &endpoint.state));
            if let Some(known) = known.filter(|_| !monitor.is_ejected()) {
                let case = Case {
                    cluster,
                    settings,
                    now,
                    log: self.log.as_ref(),
                };
                if case.eject(known, *kind, None) {
                    cluster.state.reassess();
                }
            }
        }
        monitor.start_over(*kind);
    }
}

/// What an ejection is decided by.
struct Case<'c> {
    cluster: &'c Arc<Cluster>,
    settings: &'c OutlierSettings,
    now: Instant,
    log: Option<&'c LogFile>,
}

impl Case<'_> {
    /// Takes an endpoint out, if the rules allow it; `true` when it is out.
    fn eject(&self, endpoint: &Arc<Endpoint>, kind: EjectionKind, rates: Option<(Rate, Option<Verdict>)>) -> bool {
        let set = self.cluster.state.endpoints.load_full();
        let (mut out, mut all, mut others) = (0, 0, 0);
        for each in set.iter() {
            all += 1;
            out += usize::from(each.state.monitor.is_ejected());
            others += usize::from(!Arc::ptr_eq(&each.state, &endpoint.state) && each.is_healthy());
        }
        if !self.settings.may_eject(out, all, others) {
            return false;
        }
        let enforced = fastrand::u32(..100) < self.settings.enforcing(kind);
        let monitor = &endpoint.state.monitor;
        if enforced {
            let most = u64::try_from(self.settings.max_jitter.as_millis()).unwrap_or(u64::MAX);
            let jitter = Duration::from_millis(fastrand::u64(..=most));
            monitor.eject(self.settings, self.now, jitter);
        }
        let Rates { rate, verdict } = rates.map_or(Rates::default(), |(rate, verdict)| Rates {
            rate: Some(rate),
            verdict,
        });
        tracing::info!(cluster = %self.cluster.name(), endpoint = %endpoint.display, kind = kind.name(), enforced, "an endpoint fails and is taken out");
        if let Some(file) = self.log {
            file.push(&log::ejection(
                self.cluster.name(),
                endpoint,
                kind,
                enforced,
                rate,
                verdict,
                self.now,
            ));
        }
        enforced
    }
}

#[derive(Default)]
struct Rates {
    rate: Option<Rate>,
    verdict: Option<Verdict>,
}

/// The end of an interval: endpoints come back, rates are compared, old ejections are forgiven.
fn interval(cluster: &Arc<Cluster>, settings: &OutlierSettings, now: Instant, log: Option<&LogFile>) {
    let set = cluster.state.endpoints.load_full();
    let mut changed = false;
    for endpoint in set.iter() {
        let monitor = &endpoint.state.monitor;
        if monitor.take_back_if_due(settings, now) {
            changed = true;
            tracing::info!(cluster = %cluster.name(), endpoint = %endpoint.display, "an endpoint is taken back");
            if let Some(file) = log {
                file.push(&log::return_(cluster.name(), endpoint, now));
            }
        }
        monitor.turn_over();
    }
    let case = Case {
        cluster,
        settings,
        now,
        log,
    };
    for local in [false, true] {
        changed |= compare(&case, set.iter(), local);
    }
    for endpoint in set.iter() {
        endpoint.state.monitor.forgive(settings, now);
    }
    if changed {
        cluster.state.reassess();
    }
}

/// Takes endpoints out whose rates are too small, or fall out of the others'.
fn compare<'s>(case: &Case<'_>, endpoints: impl Iterator<Item = &'s Arc<Endpoint>>, local: bool) -> bool {
    let mut all = 0;
    let mut rates: Vec<(&Arc<Endpoint>, Rate)> = Vec::new();
    for endpoint in endpoints {
        all += 1;
        let monitor = &endpoint.state.monitor;
        let history = monitor.history();
        let rate = if local { history.connects } else { history.answers };
        rates.extend(rate.filter(|_| !monitor.is_ejected()).map(|rate| (endpoint, rate)));
    }
    let just = rates.iter().map(|(_, rate)| *rate);
    let (outlier, too_often) = match local {
        false => (EjectionKind::SuccessRate, EjectionKind::FailurePercentage),
        true => (
            EjectionKind::SuccessRateLocalOrigin,
            EjectionKind::FailurePercentageLocalOrigin,
        ),
    };
    let mut changed = false;
    if let Some(verdict) = case.settings.success_rate_verdict(all, just.clone()) {
        for (endpoint, rate) in &rates {
            if rate.volume >= case.settings.success_rate.volume && rate.success < verdict.threshold {
                changed |= case.eject(endpoint, outlier, Some((*rate, Some(verdict))));
            }
        }
    }
    if case.settings.judges_failures(all, just) {
        for (endpoint, rate) in &rates {
            if case.settings.fails_too_often(*rate) && !endpoint.state.monitor.is_ejected() {
                changed |= case.eject(endpoint, too_often, Some((*rate, None)));
            }
        }
    }
    changed
}

#[cfg(test)]
mod tests;
