//! Series: rendered labels with the numbers that belong to them, and how they are shown.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed},
    },
};

use super::labels::What;
use crate::{
    Counter,
    prometheus::{Kind, Writer, labels},
};

/// One set of labels.
#[derive(Debug)]
pub(super) struct Series {
    labels: Box<str>,
    pub(super) numbers: Numbers,
    /// Metrics that any filter has under these labels: a bit for each.
    shown: AtomicU8,
    /// Something was reported since it was last looked at.
    touched: AtomicBool,
}

/// What is counted under the labels.
#[derive(Debug)]
pub(super) enum Numbers {
    Http {
        requests: Counter,
        duration: Histogram,
        request_bytes: Histogram,
        response_bytes: Histogram,
    },
    Messages {
        request: Counter,
        response: Counter,
    },
    Tcp {
        opened: Counter,
        closed: Counter,
        sent: Counter,
        received: Counter,
    },
}

/// Observations in buckets; the last one is for what is beyond all bounds.
#[derive(Debug)]
pub(super) struct Histogram {
    buckets: Box<[AtomicU64]>,
    sum: AtomicU64,
}

/// All series, by kind and labels.
#[derive(Debug)]
pub(super) struct SeriesSet {
    http: BTreeMap<Box<str>, Arc<Series>>,
    messages: BTreeMap<Box<str>, Arc<Series>>,
    tcp: BTreeMap<Box<str>, Arc<Series>>,
    limit: usize,
}

/// A copy of the set's content, to be shown without its lock.
pub(super) struct Shown {
    http: Vec<Arc<Series>>,
    messages: Vec<Arc<Series>>,
    tcp: Vec<Arc<Series>>,
}

// === impl Series ===

impl Series {
    /// Something is reported.
    pub(super) fn touch(&self) {
        if !self.touched.load(Relaxed) {
            self.touched.store(true, Relaxed);
        }
    }

    fn shows(&self, metric: usize) -> bool {
        self.shown.load(Relaxed) & (1 << metric) != 0
    }
}

// === impl Histogram ===

impl Histogram {
    fn new(bounds: usize) -> Self {
        Self {
            buckets: std::iter::repeat_with(AtomicU64::default).take(bounds + 1).collect(),
            sum: AtomicU64::new(0),
        }
    }

    /// Counts `value` in the first bucket whose bound it does not exceed.
    pub(super) fn record(&self, bounds: &[f64], value: u64) {
        let at = bounds.partition_point(|bound| *bound < value as f64);
        if let Some(bucket) = self.buckets.get(at) {
            bucket.fetch_add(1, Relaxed);
        }
        self.sum.fetch_add(value, Relaxed);
    }

    fn write(&self, labels: &str, bounds: &[f64], writer: &mut Writer) {
        let buckets: Vec<u64> = self.buckets.iter().map(|bucket| bucket.load(Relaxed)).collect();
        writer.histogram(labels, bounds, &buckets, self.sum.load(Relaxed));
    }
}

// === impl SeriesSet ===

impl SeriesSet {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            http: BTreeMap::new(),
            messages: BTreeMap::new(),
            tcp: BTreeMap::new(),
            limit,
        }
    }

    /// The series with these labels; `None` when it would be one too many.
    pub(super) fn get_or_add(&mut self, what: What, labels: Box<str>, shown: u8, bounds: usize) -> Option<Arc<Series>> {
        let full = self.http.len() + self.messages.len() + self.tcp.len() >= self.limit;
        let series = match what {
            What::Http { .. } => &mut self.http,
            What::Messages => &mut self.messages,
            What::Tcp => &mut self.tcp,
        };
        if let Some(known) = series.get(&labels) {
            known.shown.fetch_or(shown, Relaxed);
            return Some(Arc::clone(known));
        }
        if full {
            return None;
        }
        let numbers = match what {
            What::Http { .. } => Numbers::Http {
                requests: Counter::default(),
                duration: Histogram::new(bounds),
                request_bytes: Histogram::new(bounds),
                response_bytes: Histogram::new(bounds),
            },
            What::Messages => Numbers::Messages {
                request: Counter::default(),
                response: Counter::default(),
            },
            What::Tcp => Numbers::Tcp {
                opened: Counter::default(),
                closed: Counter::default(),
                sent: Counter::default(),
                received: Counter::default(),
            },
        };
        let added = Arc::new(Series {
            labels: labels.clone(),
            numbers,
            shown: AtomicU8::new(shown),
            touched: AtomicBool::new(true),
        });
        series.insert(labels, Arc::clone(&added));
        Some(added)
    }

    /// Forgets what was not reported since the last time; how much that is.
    pub(super) fn rotate(&mut self) -> usize {
        let mut gone = 0;
        for series in [&mut self.http, &mut self.messages, &mut self.tcp] {
            let before = series.len();
            series.retain(|_, series| series.touched.swap(false, Relaxed));
            gone += before - series.len();
        }
        gone
    }

    pub(super) fn shown(&self) -> Shown {
        let copy = |series: &BTreeMap<_, Arc<Series>>| series.values().cloned().collect();
        Shown {
            http: copy(&self.http),
            messages: copy(&self.messages),
            tcp: copy(&self.tcp),
        }
    }
}

/// Picks a counter out of a series.
type Pick<T> = fn(&Numbers) -> Option<&T>;

/// A metric's name, what it is, and where its numbers are. Before it stands its place among those that are reported together.
type Shape<T> = (&'static str, &'static str, Pick<T>);

const HTTP_COUNTERS: [(usize, Shape<Counter>); 1] = [(
    0,
    ("istio_requests_total", "Requests that have ended.", |numbers| match numbers {
        Numbers::Http { requests, .. } => Some(requests),
        _ => None,
    }),
)];

const MESSAGE_COUNTERS: [(usize, Shape<Counter>); 2] = [
    (
        0,
        (
            "istio_request_messages_total",
            "gRPC messages of requests.",
            |numbers| match numbers {
                Numbers::Messages { request, .. } => Some(request),
                _ => None,
            },
        ),
    ),
    (
        1,
        (
            "istio_response_messages_total",
            "gRPC messages of answers.",
            |numbers| match numbers {
                Numbers::Messages { response, .. } => Some(response),
                _ => None,
            },
        ),
    ),
];

const TCP_COUNTERS: [(usize, Shape<Counter>); 4] = [
    (
        1,
        (
            "istio_tcp_connections_closed_total",
            "TCP connections that have ended.",
            |numbers| match numbers {
                Numbers::Tcp { closed, .. } => Some(closed),
                _ => None,
            },
        ),
    ),
    (
        0,
        (
            "istio_tcp_connections_opened_total",
            "TCP connections that have begun.",
            |numbers| match numbers {
                Numbers::Tcp { opened, .. } => Some(opened),
                _ => None,
            },
        ),
    ),
    (
        3,
        (
            "istio_tcp_received_bytes_total",
            "Bytes received from TCP clients.",
            |numbers| match numbers {
                Numbers::Tcp { received, .. } => Some(received),
                _ => None,
            },
        ),
    ),
    (
        2,
        (
            "istio_tcp_sent_bytes_total",
            "Bytes sent to TCP clients.",
            |numbers| match numbers {
                Numbers::Tcp { sent, .. } => Some(sent),
                _ => None,
            },
        ),
    ),
];

const HTTP_HISTOGRAMS: [(usize, Shape<Histogram>); 3] = [
    (
        2,
        (
            "istio_request_bytes",
            "Bytes of requests on the wire.",
            |numbers| match numbers {
                Numbers::Http { request_bytes, .. } => Some(request_bytes),
                _ => None,
            },
        ),
    ),
    (
        1,
        (
            "istio_request_duration_milliseconds",
            "Time from the start of a request to the last byte of its answer.",
            |numbers| match numbers {
                Numbers::Http { duration, .. } => Some(duration),
                _ => None,
            },
        ),
    ),
    (
        3,
        (
            "istio_response_bytes",
            "Bytes of answers on the wire.",
            |numbers| match numbers {
                Numbers::Http { response_bytes, .. } => Some(response_bytes),
                _ => None,
            },
        ),
    ),
];

/// Writes all families that have a series, and `istio_build`.
pub(super) fn write(shown: &Shown, version: &str, bounds: &[f64], writer: &mut Writer) {
    writer.family("istio_build", Kind::Gauge, "The version of Istio that this proxy stands for.");
    writer.count(&labels([("component", "proxy"), ("tag", version)]), 1);
    write_counters(&HTTP_COUNTERS, &shown.http, writer);
    write_counters(&MESSAGE_COUNTERS, &shown.messages, writer);
    write_counters(&TCP_COUNTERS, &shown.tcp, writer);
    for (metric, (name, help, pick)) in HTTP_HISTOGRAMS {
        let mut with = shown.http.iter().filter(|series| series.shows(metric)).peekable();
        if with.peek().is_none() {
            continue;
        }
        writer.family(name, Kind::Histogram, help);
        for series in with {
            if let Some(histogram) = pick(&series.numbers) {
                histogram.write(&series.labels, bounds, writer);
            }
        }
    }
}

fn write_counters(counters: &[(usize, Shape<Counter>)], shown: &[Arc<Series>], writer: &mut Writer) {
    for (metric, (name, help, pick)) in counters {
        let mut with = shown.iter().filter(|series| series.shows(*metric)).peekable();
        if with.peek().is_none() {
            continue;
        }
        writer.family(name, Kind::Counter, help);
        for series in with {
            if let Some(counter) = pick(&series.numbers) {
                writer.count(&series.labels, counter.get());
            }
        }
    }
}
