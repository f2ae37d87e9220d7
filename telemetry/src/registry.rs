//! Counters and gauges of our own, and the list of everything that a scrape renders.
//!
//! Names, helps and label names are constants of the program; label values are few (types, verdicts, paths). Asking twice for the
//! same name and labels gives the same cell, so that parts need not know each other. Names begin with `cairn_`, or with
//! `istio_agent_` where Istio's dashboards read them (contract runtime §8.4). Rendering takes the lock of a part only to copy
//! what it has; it belongs on the control runtime.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering::Relaxed},
    },
};

use parking_lot::RwLock;

use crate::{
    process,
    prometheus::{Format, Kind, Writer, labels},
};

/// Most series that one family of ours may have; beyond it cells work but are not shown.
pub const MAX_SERIES_PER_FAMILY: usize = 1_000;

/// Everything that a scrape shows; clones share it.
#[derive(Clone, Default)]
pub struct Registry {
    inner: Arc<RwLock<Inner>>,
}

#[derive(Default)]
struct Inner {
    families: BTreeMap<&'static str, Family>,
    sources: Vec<Source>,
}

struct Family {
    kind: Kind,
    help: &'static str,
    cells: BTreeMap<Box<str>, Cell>,
}

#[derive(Clone)]
enum Cell {
    Counter(Counter),
    Gauge(Gauge),
    Read(Arc<dyn Fn() -> f64 + Send + Sync>),
}

type Source = Arc<dyn Fn(&mut Writer) + Send + Sync>;

/// A number that only grows.
#[derive(Clone, Debug, Default)]
pub struct Counter(Arc<AtomicU64>);

/// A number that goes up and down.
#[derive(Clone, Debug, Default)]
pub struct Gauge(Arc<AtomicI64>);

// === impl Registry ===

impl Registry {
    /// An empty registry; scrapes of it show the process alone.
    pub fn new() -> Self {
        Self::default()
    }

    /// A counter; its name ends in `_total`.
    pub fn counter(&self, name: &'static str, help: &'static str, pairs: &[(&'static str, &str)]) -> Counter {
        match self.cell(name, Kind::Counter, help, pairs, || Cell::Counter(Counter::default())) {
            Some(Cell::Counter(counter)) => counter,
            _ => Counter::default(),
        }
    }

    /// A gauge.
    pub fn gauge(&self, name: &'static str, help: &'static str, pairs: &[(&'static str, &str)]) -> Gauge {
        match self.cell(name, Kind::Gauge, help, pairs, || Cell::Gauge(Gauge::default())) {
            Some(Cell::Gauge(gauge)) => gauge,
            _ => Gauge::default(),
        }
    }

    /// A gauge that is read when it is shown; a value that is not finite is not shown. `read` must be quick and must not block.
    pub fn gauge_fn(
        &self,
        name: &'static str,
        help: &'static str,
        pairs: &[(&'static str, &str)],
        read: impl Fn() -> f64 + Send + Sync + 'static,
    ) {
        self.cell(name, Kind::Gauge, help, pairs, || Cell::Read(Arc::new(read)));
    }

    /// A counter that somebody else keeps.
    pub fn counter_fn(
        &self,
        name: &'static str,
        help: &'static str,
        pairs: &[(&'static str, &str)],
        read: impl Fn() -> f64 + Send + Sync + 'static,
    ) {
        self.cell(name, Kind::Counter, help, pairs, || Cell::Read(Arc::new(read)));
    }

    /// Something that writes families of its own, after ours and in the order of registration.
    pub fn source(&self, write: impl Fn(&mut Writer) + Send + Sync + 'static) {
        self.inner.write().sources.push(Arc::new(write));
    }

    /// The text of a scrape.
    pub fn render(&self, format: Format) -> Vec<u8> {
        let mut writer = Writer::new(format);
        let sources = {
            let inner = self.inner.read();
            for (name, family) in &inner.families {
                family.write(name, &mut writer);
            }
            inner.sources.clone()
        };
        for source in sources {
            source(&mut writer);
        }
        process::write(&mut writer);
        writer.finish()
    }

    fn cell(
        &self,
        name: &'static str,
        kind: Kind,
        help: &'static str,
        pairs: &[(&'static str, &str)],
        make: impl FnOnce() -> Cell,
    ) -> Option<Cell> {
        let rendered = labels(pairs.iter().map(|(name, value)| (*name, *value)));
        let mut inner = self.inner.write();
        let family = inner.families.entry(name).or_insert_with(|| Family {
            kind,
            help,
            cells: BTreeMap::new(),
        });
        if family.kind != kind {
            tracing::error!(
                metric = name,
                "two kinds of metric have the same name; the second is not shown"
            );
            return None;
        }
        if let Some(cell) = family.cells.get(&rendered) {
            return Some(cell.clone());
        }
        if family.cells.len() >= MAX_SERIES_PER_FAMILY {
            tracing::warn!(
                metric = name,
                limit = MAX_SERIES_PER_FAMILY,
                "too many series of one metric; new ones are not shown"
            );
            return None;
        }
        let cell = make();
        family.cells.insert(rendered, cell.clone());
        Some(cell)
    }
}

impl Family {
    fn write(&self, name: &str, writer: &mut Writer) {
        writer.family(name, self.kind, self.help);
        for (labels, cell) in &self.cells {
            match cell {
                Cell::Counter(counter) => writer.count(labels, counter.get()),
                Cell::Gauge(gauge) => writer.value(labels, gauge.get() as f64),
                Cell::Read(read) => {
                    let value = read();
                    if value.is_finite() {
                        writer.value(labels, value);
                    }
                }
            }
        }
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = self.inner.read();
        f.debug_struct("Registry")
            .field("families", &inner.families.keys())
            .field("sources", &inner.sources.len())
            .finish()
    }
}

// === impl Counter ===

impl Counter {
    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Adds some.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Relaxed);
    }

    /// How many there are.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

// === impl Gauge ===

impl Gauge {
    /// Makes it `value`.
    pub fn set(&self, value: i64) {
        self.0.store(value, Relaxed);
    }

    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Takes one away.
    pub fn dec(&self) {
        self.add(-1);
    }

    /// Adds some, which may be less than zero.
    pub fn add(&self, change: i64) {
        self.0.fetch_add(change, Relaxed);
    }

    /// What it is.
    pub fn get(&self) -> i64 {
        self.0.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own_part(registry: &Registry) -> String {
        let text = String::from_utf8(registry.render(Format::Text)).unwrap();
        text.split("# HELP process_").next().unwrap().to_owned()
    }

    #[test]
    fn a_small_registry_prints_by_name_then_labels() {
        let registry = Registry::new();
        registry.gauge("cairn_tunnels", "Open tunnels.", &[]).set(4);
        registry
            .counter("cairn_xds_nacks_total", "Refused answers.", &[("type", "lds")])
            .add(2);
        registry
            .counter("cairn_xds_nacks_total", "Refused answers.", &[("type", "cds")])
            .inc();
        registry.gauge_fn("cairn_age_seconds", "Age.", &[], || 1.5);
        registry.gauge_fn("cairn_unknown", "Unknown.", &[], || f64::NAN);
        registry.counter_fn("cairn_read_total", "Read.", &[], || 9.0);
        registry.source(|writer| {
            writer.family("istio_build", Kind::Gauge, "");
            writer.count("component=\"proxy\"", 1);
        });
        assert_eq!(
            own_part(&registry),
            r#"# HELP cairn_age_seconds Age.
# TYPE cairn_age_seconds gauge
cairn_age_seconds 1.5
# HELP cairn_read_total Read.
# TYPE cairn_read_total counter
cairn_read_total 9
# HELP cairn_tunnels Open tunnels.
# TYPE cairn_tunnels gauge
cairn_tunnels 4
# HELP cairn_unknown Unknown.
# TYPE cairn_unknown gauge
# HELP cairn_xds_nacks_total Refused answers.
# TYPE cairn_xds_nacks_total counter
cairn_xds_nacks_total{type="cds"} 1
cairn_xds_nacks_total{type="lds"} 2
# TYPE istio_build gauge
istio_build{component="proxy"} 1
"#
        );
    }

    #[test]
    fn the_same_name_and_labels_are_the_same_cell() {
        let registry = Registry::new();
        registry.counter("cairn_a_total", "", &[("k", "v")]).inc();
        registry.counter("cairn_a_total", "", &[("k", "v")]).inc();
        assert_eq!(registry.counter("cairn_a_total", "", &[("k", "v")]).get(), 2);
        assert_eq!(registry.counter("cairn_a_total", "", &[("k", "w")]).get(), 0);
    }

    #[test]
    fn another_kind_under_the_same_name_is_not_shown() {
        let registry = Registry::new();
        registry.counter("cairn_a_total", "", &[]).inc();
        registry.gauge("cairn_a_total", "", &[]).set(7);
        assert_eq!(own_part(&registry), "# TYPE cairn_a_total counter\ncairn_a_total 1\n");
    }

    #[test]
    fn a_family_is_bounded() {
        let registry = Registry::new();
        for at in 0..=MAX_SERIES_PER_FAMILY {
            registry.counter("cairn_a_total", "", &[("k", &at.to_string())]).inc();
        }
        assert_eq!(own_part(&registry).lines().count(), 1 + MAX_SERIES_PER_FAMILY);
    }

    #[test]
    fn counts_of_many_threads_add_up() {
        let registry = Registry::new();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let counter = registry.counter("cairn_a_total", "", &[]);
                    let gauge = registry.gauge("cairn_b", "", &[]);
                    for _ in 0..10_000 {
                        counter.inc();
                        gauge.inc();
                        gauge.dec();
                    }
                });
            }
        });
        assert_eq!(registry.counter("cairn_a_total", "", &[]).get(), 40_000);
        assert_eq!(registry.gauge("cairn_b", "", &[]).get(), 0);
    }
}
