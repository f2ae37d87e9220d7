//! What a filter's configuration changes of the metrics: labels with other values, labels more or fewer, metrics left out.
//!
//! Values are CEL over the record, evaluated when something is reported; one that fails is `unknown`. A label that the metric has keeps
//! its place, others come behind, in order of their names, as the stock filter does.

use std::time::Duration;

use cairn_exchange::{cel::Program, format::View};

use super::labels::UNKNOWN;

/// Metrics that a filter can change, by the names that configuration has for them.
pub const METRICS: [&str; 10] = [
    "requests_total",
    "request_duration_milliseconds",
    "request_bytes",
    "response_bytes",
    "request_messages_total",
    "response_messages_total",
    "tcp_connections_opened_total",
    "tcp_connections_closed_total",
    "tcp_sent_bytes_total",
    "tcp_received_bytes_total",
];

/// Labels that some metric has: one of these is never added to a metric that lacks it.
const KNOWN: [&str; 26] = [
    "reporter",
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
    "destination_workload",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_service",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_service_name",
    "destination_service_namespace",
    "destination_cluster",
    "request_protocol",
    "response_code",
    "grpc_response_status",
    "response_flags",
    "connection_security_policy",
    "unknown",
];

/// What a filter changes.
#[derive(Debug)]
pub struct Rules {
    of: [Rule; METRICS.len()],
    programs: Vec<Program>,
    /// Series that are not reported for so long are forgotten.
    pub(super) rotation: Option<Duration>,
}

/// What it changes of one metric.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Rule {
    drop: bool,
    remove: Vec<Box<str>>,
    /// The label, and which program has its value.
    set: Vec<(Box<str>, usize)>,
}

/// Changes of one metric, or of all, as configured.
#[derive(Debug, Default)]
pub struct Change {
    /// One of [`METRICS`]; `None` for all.
    pub metric: Option<usize>,
    /// It is left out.
    pub drop: bool,
    /// Labels to leave out.
    pub remove: Vec<String>,
    /// Labels and their values.
    pub set: Vec<(String, Program)>,
}

/// The metrics of one kind of report, by [`METRICS`].
pub(super) type Range = std::ops::Range<usize>;

pub(super) const HTTP: Range = 0..4;
pub(super) const MESSAGES: Range = 4..6;
pub(super) const TCP: Range = 6..10;

// === impl Rules ===

impl Rules {
    /// Puts changes together.
    pub fn new(changes: Vec<Change>, rotation: Option<Duration>) -> Self {
        let mut rules = Self {
            of: Default::default(),
            programs: Vec::new(),
            rotation: rotation.filter(|rotation| !rotation.is_zero()),
        };
        for change in changes {
            let metrics = change.metric.map_or(0..METRICS.len(), |metric| metric..metric + 1);
            let remove: Vec<Box<str>> = change.remove.iter().map(|label| sanitized(label)).collect();
            let mut set: Vec<(Box<str>, usize)> = Vec::new();
            for (label, program) in change.set {
                set.push((sanitized(&label), rules.programs.len()));
                rules.programs.push(program);
            }
            set.sort();
            for rule in rules.of.get_mut(metrics).unwrap_or_default() {
                rule.drop |= change.drop;
                rule.remove.extend(remove.iter().cloned());
                for (label, program) in &set {
                    rule.set.retain(|(known, _)| known != label);
                    rule.set.push((label.clone(), *program));
                }
            }
        }
        rules
    }

    /// The values of all programs for an exchange.
    pub(super) fn values(&self, view: &View<'_>) -> Box<[Box<str>]> {
        let value = |program: &Program| program.text(view).unwrap_or_else(|| UNKNOWN.to_owned()).into();
        self.programs.iter().map(value).collect()
    }

    /// The labels of these metrics, those with the same ones together; a bit for each metric of the range. What is left out is not there.
    pub(super) fn groups(&self, metrics: Range, base: &[(&str, &str)], values: &[Box<str>]) -> Vec<(Box<str>, u8)> {
        let mut groups: Vec<(&Rule, u8)> = Vec::new();
        for (bit, rule) in self.of.get(metrics).unwrap_or_default().iter().enumerate() {
            if rule.drop {
                continue;
            }
            match groups.iter_mut().find(|(known, _)| *known == rule) {
                Some((_, bits)) => *bits |= 1 << bit,
                None => groups.push((rule, 1 << bit)),
            }
        }
        let labels = |(rule, bits): (&Rule, u8)| (rule.labels(base, values), bits);
        groups.into_iter().map(labels).collect()
    }
}

// === impl Rule ===

impl Rule {
    fn labels(&self, base: &[(&str, &str)], values: &[Box<str>]) -> Box<str> {
        let value = |program: usize| values.get(program).map_or(UNKNOWN, |value| &**value);
        let set = |label: &str| {
            self.set
                .iter()
                .find(|(known, _)| **known == *label)
                .map(|(_, program)| value(*program))
        };
        let kept = base.iter().filter_map(|(label, default)| match set(label) {
            Some(value) => Some((*label, value)),
            None if self.remove.iter().any(|removed| **removed == **label) => None,
            None => Some((*label, *default)),
        });
        let more = self.set.iter().filter(|(label, _)| !KNOWN.contains(&&**label));
        crate::prometheus::labels(kept.chain(more.map(|(label, program)| (&**label, value(*program)))))
    }
}

/// A label's name as Prometheus takes it.
fn sanitized(label: &str) -> Box<str> {
    let fit = |c: char| if c.is_ascii_alphanumeric() || c == '_' { c } else { '_' };
    let mut name: String = label.chars().map(fit).collect();
    if name.starts_with(|c: char| c.is_ascii_digit()) {
        name.insert(0, '_');
    }
    name.into()
}
