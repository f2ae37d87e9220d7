//! The metrics of an `istio.stats` filter: names, labels and their order as the stock waypoint's (contract runtime §7.2).
//!
//! A request costs one lookup by the parties' addresses and a few atomic additions. The handle that it finds belongs to a series,
//! whose labels are rendered once. Handles keep the objects alive that they are found by, so that an address never stands for
//! another object; series are equal when their labels are. Both are bounded: [`MAX_SERIES`], [`MAX_HANDLES`]. What would need a
//! series beyond the bound is not counted, but that is.
//!
//! Message counters have the labels of the parties only: the filter reports them while there is no status yet.

mod labels;
mod rules;
mod series;
#[cfg(test)]
mod tests;

use std::{
    hash::BuildHasher,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use cairn_exchange::{Exchange, format::View};
use parking_lot::Mutex;
use tokio::time::sleep;

use self::{
    labels::{Parties, What},
    series::{Numbers, Series, SeriesSet},
};
use crate::{
    Counter, Registry,
    prometheus::{self, Writer},
};

pub use self::rules::{Change, METRICS, Rules};

/// Most series (sets of labels) over all metrics; one of HTTP is shown as 67 lines.
pub const MAX_SERIES: usize = 20_000;
/// Most handles; when there are more all are forgotten, and found again by their labels.
pub const MAX_HANDLES: usize = 4 * MAX_SERIES;
/// How often streams and connections that go on are reported, unless the filter says otherwise.
pub const REPORTING_INTERVAL: Duration = Duration::from_secs(5);
/// How often it is looked whether series are to be forgotten, while none are.
const ROTATION_CHECK: Duration = Duration::from_secs(10);
/// Envoy's bounds of histogram buckets.
pub const BUCKETS: [f64; 19] = [
    0.5,
    1.0,
    5.0,
    10.0,
    25.0,
    50.0,
    100.0,
    250.0,
    500.0,
    1_000.0,
    2_500.0,
    5_000.0,
    10_000.0,
    30_000.0,
    60_000.0,
    300_000.0,
    600_000.0,
    1_800_000.0,
    3_600_000.0,
];

/// Istio's metrics of this process.
#[derive(Debug)]
pub struct IstioStats {
    handles: papaya::HashMap<u64, Arc<Handle>, foldhash::fast::RandomState>,
    hasher: foldhash::fast::RandomState,
    series: Mutex<SeriesSet>,
    version: Box<str>,
    bounds: Arc<[f64]>,
    dropped: Counter,
    forgotten: Counter,
    /// Series that are not reported for so many milliseconds are forgotten; zero for never.
    rotation: AtomicU64,
}

/// How [`IstioStats`] counts.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The version of Istio that we stand for; label `tag` of `istio_build`.
    pub version: String,
    /// Bounds of histogram buckets, growing.
    pub buckets: Vec<f64>,
    /// At most so many series.
    pub max_series: usize,
}

/// What has been told of a gRPC exchange's messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MessageReport {
    request: u64,
    response: u64,
}

/// What has been told of a TCP connection.
#[derive(Debug)]
pub struct TcpReport {
    handles: Vec<Arc<Handle>>,
    sent: u64,
    received: u64,
}

/// Series, and the objects that they were found by.
#[derive(Debug)]
struct Handle {
    parties: Parties,
    /// Kept alive, since it is found by its address.
    _rules: Option<Arc<Rules>>,
    /// The metrics that are counted in a series: a bit for each.
    series: Box<[(Arc<Series>, u8)]>,
}

// === impl Settings ===

impl Settings {
    /// Envoy's buckets and [`MAX_SERIES`].
    pub fn new(version: impl Into<String>) -> Self {
        Self {
            version: version.into(),
            buckets: BUCKETS.to_vec(),
            max_series: MAX_SERIES,
        }
    }
}

// === impl IstioStats ===

impl IstioStats {
    /// Metrics that `registry` shows.
    pub fn new(registry: &Registry, settings: Settings) -> Arc<Self> {
        let stats = Arc::new(Self {
            handles: papaya::HashMap::default(),
            hasher: foldhash::fast::RandomState::default(),
            series: Mutex::new(SeriesSet::new(settings.max_series)),
            version: settings.version.into(),
            bounds: settings.buckets.into(),
            rotation: AtomicU64::new(0),
            forgotten: registry.counter(
                "cairn_istio_stats_forgotten_total",
                "Series of istio.stats that were forgotten because nothing was reported for the rotation interval.",
                &[],
            ),
            dropped: registry.counter(
                "cairn_istio_stats_dropped_total",
                "Reports of istio.stats that would have needed a series beyond the limit.",
                &[],
            ),
        });
        let shown = Arc::clone(&stats);
        registry.source(move |writer| shown.write(writer));
        stats
    }

    /// A request has ended. `rules`: what the chain's filter changes; `reported`: what [`IstioStats::report_messages`] has told before.
    pub fn report_http(&self, view: &View<'_>, rules: Option<&Arc<Rules>>, mut reported: MessageReport) {
        let exchange = view.exchange;
        let grpc = view.is_grpc();
        if grpc {
            self.report_messages(view, rules, &mut reported);
        }
        let what = What::Http {
            grpc,
            status: exchange.status.map_or(0, |status| status.as_u16()),
            code: view.grpc_code(),
        };
        let Some(handle) = self.find(view, what, rules) else {
            return;
        };
        for (series, metrics) in handle.touched() {
            let Numbers::Http {
                requests,
                duration,
                request_bytes,
                response_bytes,
            } = &series.numbers
            else {
                continue;
            };
            let counts = &exchange.counts;
            if metrics & 1 != 0 {
                requests.inc();
            }
            if metrics & 2 != 0 {
                let millis = u64::try_from(exchange.duration().as_millis()).unwrap_or(u64::MAX);
                duration.record(&self.bounds, millis);
            }
            if metrics & 4 != 0 {
                request_bytes.record(&self.bounds, counts.received_head.saturating_add(counts.received));
            }
            if metrics & 8 != 0 {
                response_bytes.record(&self.bounds, counts.sent_head.saturating_add(counts.sent));
            }
        }
    }

    /// Tells the messages of a gRPC exchange since the last report: every [`REPORTING_INTERVAL`] of a stream that goes on.
    pub fn report_messages(&self, view: &View<'_>, rules: Option<&Arc<Rules>>, reported: &mut MessageReport) {
        let counts = &view.exchange.counts;
        let Some(handle) = self.find(view, What::Messages, rules) else {
            return;
        };
        for (series, metrics) in handle.touched() {
            let Numbers::Messages { request, response } = &series.numbers else {
                continue;
            };
            if metrics & 1 != 0 {
                request.add(counts.request_messages.saturating_sub(reported.request));
            }
            if metrics & 2 != 0 {
                response.add(counts.response_messages.saturating_sub(reported.response));
            }
        }
        *reported = MessageReport {
            request: counts.request_messages,
            response: counts.response_messages,
        };
    }

    /// The first report of a TCP connection: after [`REPORTING_INTERVAL`], or when it ends before. Its labels are those of all later
    /// reports. `filters`: what each of the chain's filters changes.
    pub fn report_open(&self, exchange: &Exchange, filters: &[Option<Arc<Rules>>]) -> TcpReport {
        let view = View::new(exchange);
        let handles: Vec<_> = filters
            .iter()
            .filter_map(|rules| self.find(&view, What::Tcp, rules.as_ref()))
            .collect();
        for (series, metrics) in handles.iter().flat_map(|handle| handle.touched()) {
            if let (Numbers::Tcp { opened, .. }, 1) = (&series.numbers, metrics & 1) {
                opened.inc();
            }
        }
        let mut report = TcpReport {
            handles,
            sent: 0,
            received: 0,
        };
        report.progress(exchange);
        report
    }

    /// Forgets series that nobody reports any more, as often as filters say, while there are metrics.
    pub async fn rotate(stats: Weak<Self>) {
        loop {
            let Some(rotation) = stats.upgrade().map(|stats| stats.rotation.load(Relaxed)) else {
                return;
            };
            if rotation == 0 {
                sleep(ROTATION_CHECK).await;
                continue;
            }
            sleep(Duration::from_millis(rotation)).await;
            if let Some(stats) = stats.upgrade() {
                let forgotten = stats.series.lock().rotate();
                stats.forgotten.add(u64::try_from(forgotten).unwrap_or(u64::MAX));
                if forgotten > 0 {
                    // Who is found by them is found anew.
                    stats.handles.pin().clear();
                }
            }
        }
    }

    /// Shows all metrics.
    fn write(&self, writer: &mut Writer) {
        let shown = self.series.lock().shown();
        series::write(&shown, &self.version, &self.bounds, writer);
    }

    /// The series that an exchange belongs to; `None` beyond the limit.
    fn find(&self, view: &View<'_>, what: What, rules: Option<&Arc<Rules>>) -> Option<Arc<Handle>> {
        let values = rules.map_or_else(Box::default, |rules| rules.values(view));
        let address = rules.map_or(0, |rules| Arc::as_ptr(rules).addr());
        let parties = labels::parties(view.exchange, what, address, values);
        let hash = self.hasher.hash_one(&parties);
        let handles = self.handles.pin();
        if let Some(handle) = handles.get(&hash)
            && handle.parties.are(&parties)
        {
            return Some(Arc::clone(handle));
        }
        let groups = labels::with(&parties, |pairs| match rules {
            None => vec![(prometheus::labels(pairs.iter().copied()), u8::MAX)],
            Some(rules) => rules.groups(what.metrics(), pairs, parties.values()),
        });
        let mut set = self.series.lock();
        let series = groups.into_iter().map(|(labels, metrics)| {
            let series = set.get_or_add(what, labels, metrics, self.bounds.len())?;
            Some((series, metrics))
        });
        let series: Option<Box<[_]>> = series.collect();
        drop(set);
        let Some(series) = series else {
            self.dropped.inc();
            return None;
        };
        if let Some(rotation) = rules.and_then(|rules| rules.rotation) {
            let millis = u64::try_from(rotation.as_millis()).unwrap_or(u64::MAX);
            self.rotation.store(millis, Relaxed);
        }
        if handles.len() >= MAX_HANDLES {
            handles.clear();
        }
        let handle = Arc::new(Handle {
            parties: parties.keep(),
            _rules: rules.cloned(),
            series,
        });
        handles.insert(hash, Arc::clone(&handle));
        Some(handle)
    }
}

// === impl Handle ===

impl Handle {
    /// The series, in each of which something is reported now, and which metrics.
    fn touched(&self) -> impl Iterator<Item = (&Series, u8)> {
        self.series.iter().map(|(series, metrics)| {
            series.touch();
            (&**series, *metrics)
        })
    }
}

// === impl TcpReport ===

impl TcpReport {
    /// Tells the bytes since the last report.
    pub fn progress(&mut self, exchange: &Exchange) {
        let counts = &exchange.counts;
        for (series, metrics) in self.handles.iter().flat_map(|handle| handle.touched()) {
            let Numbers::Tcp { sent, received, .. } = &series.numbers else {
                continue;
            };
            if metrics & 4 != 0 {
                sent.add(counts.sent.saturating_sub(self.sent));
            }
            if metrics & 8 != 0 {
                received.add(counts.received.saturating_sub(self.received));
            }
        }
        self.sent = counts.sent;
        self.received = counts.received;
    }

    /// The last report: the connection has ended.
    pub fn close(mut self, exchange: &Exchange) {
        self.progress(exchange);
        for (series, metrics) in self.handles.iter().flat_map(|handle| handle.touched()) {
            if let (Numbers::Tcp { closed, .. }, 2) = (&series.numbers, metrics & 2) {
                closed.inc();
            }
        }
    }
}
