//! `istio.stats` (contract runtime §7.2): which of Istio's metrics are counted, and with which labels.
//!
//! Metrics decide nothing, so nothing here refuses traffic: an expression that cannot be evaluated is listed, and its label is
//! `unknown`, as for Envoy one that fails.

use std::{sync::Arc, time::Duration};

use cairn_exchange::cel::{Options, Program};
use cairn_proto::stats::{MetricConfig, PluginConfig};
use cairn_telemetry::istio::{Change, METRICS, REPORTING_INTERVAL, Rules};

use super::{
    report::{Malformed, Notes, ignore_set, unneeded},
    value::duration,
};

/// An expression that has no value.
const NOTHING: &str = "request.headers['']";

/// Compiles a filter: how often open connections are reported, and what it changes.
pub(crate) fn compile(config: PluginConfig, notes: &mut Notes) -> Result<(Duration, Option<Arc<Rules>>), Malformed> {
    let PluginConfig {
        debug,
        max_peer_cache_size,
        stat_prefix,
        field_separator,
        value_separator,
        disable_host_header_fallback,
        tcp_reporting_duration,
        metrics,
        definitions,
        reporter,
        rotation_interval,
        graceful_deletion_interval,
    } = config;
    unneeded!(
        debug,
        max_peer_cache_size,
        field_separator,
        value_separator,
        disable_host_header_fallback,
        reporter,
        graceful_deletion_interval
    );
    ignore_set!(notes, stat_prefix, definitions);
    let mut changes = Vec::new();
    for (index, metric) in metrics.into_iter().enumerate() {
        changes.extend(notes.at("metrics", index, |notes| change(metric, notes)));
    }
    let rotation = rotation_interval
        .map(|rotation| duration("rotation_interval", rotation, notes))
        .transpose()?;
    let interval = match tcp_reporting_duration {
        None => REPORTING_INTERVAL,
        Some(value) => duration("tcp_reporting_duration", value, notes)?,
    };
    let plain = changes.is_empty() && rotation.is_none();
    Ok((interval, (!plain).then(|| Arc::new(Rules::new(changes, rotation)))))
}

fn change(config: MetricConfig, notes: &mut Notes) -> Option<Change> {
    let MetricConfig {
        dimensions,
        name,
        tags_to_remove,
        r#match,
        drop,
    } = config;
    ignore_set!(notes, r#match);
    let metric = match name.as_str() {
        "" => None,
        name => match METRICS.iter().position(|known| *known == name) {
            None => {
                notes.ignore("name", format!("there is no metric {name}"));
                return None;
            }
            known => known,
        },
    };
    let set = dimensions.into_iter().map(|(label, expression)| {
        let program = Program::parse(&expression, Options::ALL).or_else(|error| {
            notes.ignore("dimensions", format!("the expression of {label} has no value: {error}"));
            Program::parse(NOTHING, Options::ALL)
        });
        if let Ok(program) = &program {
            for attribute in program.unrecorded() {
                notes.ignore("dimensions", format!("{attribute} has no value here"));
            }
        }
        program.ok().map(|program| (label, program))
    });
    Some(Change {
        metric,
        drop,
        set: set.collect::<Vec<_>>().into_iter().flatten().collect(),
        remove: tags_to_remove,
    })
}

/// One filter more. Filters that change nothing count once: each would count the same in the same series.
pub(crate) fn add(filters: &mut Vec<Option<Arc<Rules>>>, rules: Option<Arc<Rules>>) {
    if rules.is_some() || !filters.iter().any(Option::is_none) {
        filters.push(rules);
    }
}
