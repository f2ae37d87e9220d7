//! The report: a table for people, one line a set for programs, and the targets.
//!
//! Every ratio is taken within one run, of our figure to Envoy's and to the bare
//! relay's; a figure without a partner prints `-`. [`Target`]s are the promises of
//! the architecture page, and they are judged only where both figures are there.

use std::fmt::Write as _;
use std::time::Duration;

use crate::load::{Inner, Pace, Work};
use crate::memory::{Idle, Slope};
use crate::rig::Kind;
use crate::sets::Sample;

/// Above this share of waiting a run says more about the machine than about the proxy.
const NOISY: f64 = 0.05;
const MIB: f64 = 1024.0 * 1024.0;

/// Tells a person what runs now, apart from the report itself.
#[expect(clippy::print_stderr, reason = "progress of a command-line tool")]
pub(crate) fn progress(what: &str) {
    eprintln!("bench: {what}");
}

/// All that was found.
#[derive(Default)]
pub(crate) struct Report {
    rows: Vec<Row>,
    weights: Vec<Weight>,
}

struct Row {
    set: &'static str,
    work: Work,
    figures: Vec<(Kind, Sample)>,
}

struct Weight {
    idle: Idle,
    slopes: Vec<(Kind, Slope)>,
}

/// A promise and what became of it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Target {
    pub(crate) name: String,
    pub(crate) found: f64,
    pub(crate) must: f64,
}

/// One figure of one set, and its ratios.
#[derive(Clone, Debug, PartialEq)]
struct Ratio {
    set: String,
    to_envoy: Option<f64>,
    to_relay: Option<f64>,
}

// === impl Target ===

impl Target {
    pub(crate) fn is_met(&self) -> bool {
        self.found <= self.must
    }
}

// === impl Report ===

impl Report {
    pub(crate) fn add_load(&mut self, set: &'static str, work: Work, samples: Vec<(Kind, Vec<Sample>)>) {
        let figures = samples
            .into_iter()
            .map(|(kind, samples)| (kind, median_sample(&samples)))
            .collect();
        self.rows.push(Row { set, work, figures });
    }

    pub(crate) fn add_memory(&mut self, idle: Idle, slopes: Vec<(Kind, Slope)>) {
        self.weights.push(Weight { idle, slopes });
    }

    /// The whole report.
    pub(crate) fn render(&self, markdown: bool) -> String {
        let mut text = String::new();
        for table in [self.load_table(), self.memory_table()] {
            if table.len() > 1 {
                text.push_str(&render_table(&table, markdown));
                text.push('\n');
            }
        }
        for note in self.notes() {
            let _ = writeln!(text, "NOTE {note}");
        }
        for ratio in self.ratios() {
            let _ = writeln!(
                text,
                "SET {} ratio-to-envoy {} ratio-to-relay {}",
                ratio.set,
                optional(ratio.to_envoy),
                optional(ratio.to_relay)
            );
        }
        for target in self.targets() {
            let verdict = if target.is_met() { "ok" } else { "MISSED" };
            let _ = writeln!(
                text,
                "TARGET {} {:.2} must {:.2} {verdict}",
                target.name, target.found, target.must
            );
        }
        text
    }

    /// Promises for which there are figures.
    pub(crate) fn targets(&self) -> Vec<Target> {
        let mut targets = Vec::new();
        let mut promise = |name: &str, found: Option<f64>, must: f64| {
            if let Some(found) = found {
                targets.push(Target {
                    name: name.to_owned(),
                    found,
                    must,
                });
            }
        };
        let requests: Vec<f64> = self
            .rows
            .iter()
            .filter(|row| matches!(row.work, Work::Requests { .. }))
            .filter_map(|row| row.ratio(Kind::Envoy, |sample| sample.cost))
            .collect();
        promise("cpu-geometric-mean", geometric_mean(&requests), 0.5);
        promise("cpu-worst", requests.iter().copied().reduce(f64::max), 0.6);
        for row in &self.rows {
            let cost = row.ratio(Kind::Envoy, |sample| sample.cost);
            match row.work {
                Work::Requests { pace: Pace::Rate(_), .. } => {
                    promise(&format!("{}-p99", row.set), row.p99_ratio(Kind::Envoy), 1.0)
                }
                Work::Requests { .. } => {}
                Work::Bytes { .. } | Work::Cold { .. } => promise(row.set, cost, 0.9),
            }
        }
        promise("memory-after-load", self.memory_after_load(), 0.4);
        for weight in &self.weights {
            let found = weight.of(Kind::Cairn).map(Slope::bytes);
            promise(&format!("{}-bytes", weight.idle.name()), found, weight.idle.bound());
        }
        targets
    }

    fn ratios(&self) -> Vec<Ratio> {
        let mut ratios = Vec::new();
        for row in &self.rows {
            ratios.push(Ratio {
                set: row.set.to_owned(),
                to_envoy: row.ratio(Kind::Envoy, |sample| sample.cost),
                to_relay: row.ratio(Kind::Relay, |sample| sample.cost),
            });
            if let Work::Requests { pace: Pace::Rate(_), .. } = row.work {
                ratios.push(Ratio {
                    set: format!("{}-p99", row.set),
                    to_envoy: row.p99_ratio(Kind::Envoy),
                    to_relay: row.p99_ratio(Kind::Relay),
                });
            }
        }
        if let Some(to_envoy) = self.memory_after_load() {
            ratios.push(Ratio {
                set: "memory-after-load".to_owned(),
                to_envoy: Some(to_envoy),
                to_relay: None,
            });
        }
        for weight in &self.weights {
            let (ours, theirs) = (weight.of(Kind::Cairn), weight.of(Kind::Envoy));
            ratios.push(Ratio {
                set: weight.idle.name().to_owned(),
                to_envoy: ours
                    .zip(theirs)
                    .and_then(|(ours, theirs)| divide(ours.resident, theirs.resident)),
                to_relay: None,
            });
        }
        ratios
    }

    /// Resident memory after the last set of requests: buffers of bulk bytes are another matter.
    fn memory_after_load(&self) -> Option<f64> {
        #[expect(clippy::cast_precision_loss, reason = "memory sizes are far below 2^52")]
        let resident = |sample: &Sample| sample.resident as f64;
        self.rows
            .iter()
            .rfind(|row| matches!(row.work, Work::Requests { .. }))?
            .ratio(Kind::Envoy, resident)
    }

    /// What a reader must know before believing the figures.
    fn notes(&self) -> Vec<String> {
        let worst = self
            .rows
            .iter()
            .flat_map(|row| row.figures.iter().map(move |(kind, sample)| (row, *kind, sample.waited)))
            .filter(|(_, _, waited)| *waited > NOISY)
            .max_by(|one, other| one.2.total_cmp(&other.2));
        worst
            .map(|(row, kind, waited)| {
                format!(
                    "noisy machine: {} waited {:.0} % of the time for its core in {}, which something else used; trust CPU more than rates and latencies",
                    kind.name(),
                    waited * 100.0,
                    row.set
                )
            })
            .into_iter()
            .collect()
    }

    fn load_table(&self) -> Vec<Vec<String>> {
        let mut table = vec![
            [
                "set", "proxy", "CPU each", "rate", "p50 µs", "p99 µs", "core", "waited", "RSS MiB", "to envoy", "to relay",
            ]
            .map(str::to_owned)
            .to_vec(),
        ];
        for row in &self.rows {
            for (kind, sample) in &row.figures {
                let to = |other| divide(sample.cost, row.of(other)?.cost);
                table.push(vec![
                    row.set.to_owned(),
                    kind.name().to_owned(),
                    cost(row.work, sample.cost),
                    rate(row.work, sample.rate),
                    latency(row.work, sample.p50),
                    latency(row.work, sample.p99),
                    format!("{:.0} %", sample.busy * 100.0),
                    format!("{:.1} %", sample.waited * 100.0),
                    mebibytes(sample.resident),
                    optional(to(Kind::Envoy)),
                    optional(to(Kind::Relay)),
                ]);
            }
        }
        table
    }

    fn memory_table(&self) -> Vec<Vec<String>> {
        let mut table = vec![
            ["idle", "proxy", "RSS bytes each", "allocated each", "bound"]
                .map(str::to_owned)
                .to_vec(),
        ];
        for weight in &self.weights {
            for (kind, slope) in &weight.slopes {
                table.push(vec![
                    weight.idle.name().to_owned(),
                    kind.name().to_owned(),
                    format!("{:.0}", slope.resident),
                    slope.allocated.map_or_else(|| "-".to_owned(), |bytes| format!("{bytes:.0}")),
                    if *kind == Kind::Cairn {
                        format!("{:.0}", weight.idle.bound())
                    } else {
                        "-".to_owned()
                    },
                ]);
            }
        }
        table
    }
}

// === impl Row ===

impl Row {
    fn of(&self, kind: Kind) -> Option<&Sample> {
        find(&self.figures, kind)
    }

    /// Our figure to another's.
    fn ratio(&self, other: Kind, figure: impl Fn(&Sample) -> f64) -> Option<f64> {
        divide(figure(self.of(Kind::Cairn)?), figure(self.of(other)?))
    }

    fn p99_ratio(&self, other: Kind) -> Option<f64> {
        self.ratio(other, |sample| sample.p99.as_secs_f64())
    }
}

// === impl Weight ===

impl Weight {
    fn of(&self, kind: Kind) -> Option<&Slope> {
        find(&self.slopes, kind)
    }
}

// === impl Slope ===

impl Slope {
    /// What a promise is held against: the allocator's figure, else the resident one.
    fn bytes(&self) -> f64 {
        self.allocated.unwrap_or(self.resident)
    }
}

fn find<T>(of: &[(Kind, T)], kind: Kind) -> Option<&T> {
    of.iter().find(|(of_kind, _)| *of_kind == kind).map(|(_, value)| value)
}

fn divide(ours: f64, theirs: f64) -> Option<f64> {
    (theirs > 0.0).then(|| ours / theirs)
}

fn geometric_mean(values: &[f64]) -> Option<f64> {
    #[expect(clippy::cast_precision_loss, reason = "a handful of sets")]
    let count = values.len() as f64;
    (!values.is_empty()).then(|| (values.iter().map(|value| value.ln()).sum::<f64>() / count).exp())
}

/// Each figure's own median.
fn median_sample(samples: &[Sample]) -> Sample {
    Sample {
        cost: median(samples, |sample| sample.cost),
        rate: median(samples, |sample| sample.rate),
        p50: Duration::from_secs_f64(median(samples, |sample| sample.p50.as_secs_f64())),
        p99: Duration::from_secs_f64(median(samples, |sample| sample.p99.as_secs_f64())),
        busy: median(samples, |sample| sample.busy),
        waited: median(samples, |sample| sample.waited),
        resident: samples.iter().map(|sample| sample.resident).max().unwrap_or(0),
    }
}

fn median(samples: &[Sample], figure: impl Fn(&Sample) -> f64) -> f64 {
    let mut values: Vec<f64> = samples.iter().map(figure).collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.as_slice() {
        [] => 0.0,
        values if values.len() % 2 == 1 => values[middle],
        values => f64::midpoint(values[middle - 1], values[middle]),
    }
}

fn cost(work: Work, seconds: f64) -> String {
    match work {
        Work::Bytes { .. } => format!("{seconds:.3} s/GB"),
        Work::Cold { .. } | Work::Requests { .. } => format!("{:.1} µs", seconds * 1e6),
    }
}

fn rate(work: Work, units: f64) -> String {
    match work {
        Work::Bytes { .. } => format!("{units:.2} GB/s"),
        Work::Cold { .. } => format!("{units:.0} conn/s"),
        Work::Requests {
            inner: Inner::Http1 | Inner::Http2 { .. },
            ..
        } => format!("{units:.0} rps"),
    }
}

fn latency(work: Work, time: Duration) -> String {
    match work {
        Work::Bytes { .. } => "-".to_owned(),
        Work::Cold { .. } | Work::Requests { .. } => format!("{:.0}", time.as_secs_f64() * 1e6),
    }
}

fn mebibytes(bytes: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "memory sizes are far below 2^52")]
    let bytes = bytes as f64;
    format!("{:.1}", bytes / MIB)
}

fn optional(ratio: Option<f64>) -> String {
    ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"))
}

/// Columns of equal width; the first row is the head.
fn render_table(table: &[Vec<String>], markdown: bool) -> String {
    let columns = table.first().map_or(0, Vec::len);
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            table
                .iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for (number, row) in table.iter().enumerate() {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        if markdown {
            let _ = writeln!(text, "| {} |", cells.join(" | "));
            if number == 0 {
                let rule: Vec<String> = widths.iter().map(|width| "-".repeat(*width)).collect();
                let _ = writeln!(text, "|-{}-|", rule.join("-|-"));
            }
        } else {
            let _ = writeln!(text, "{}", cells.join("  ").trim_end());
        }
    }
    text
}

#[cfg(test)]
mod tests;
