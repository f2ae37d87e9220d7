//! `cairn.dev/rate-limits`: limits of requests that the operator writes on the Gateway, without an EnvoyFilter (docs/rate-limits.md).
//!
//! The object is a list of limits, each for one service or all, one port or all, one route or all. Each becomes the filter that an
//! EnvoyFilter would have put in (`local_ratelimit` or `ratelimit`, right before the router), and from there on nothing tells it from
//! one of istiod's: the same compilation, the same counts that outlive changes, the same pages. An object with anything wrong in it is
//! refused as a whole, and the last good one stays.

mod object;
mod translate;

use cairn_proto::envoy::{
    config::route::v3::FilterConfig,
    extensions::filters::network::http_connection_manager::v3::{
        HttpConnectionManager, HttpFilter, http_connection_manager::RouteSpecifier,
    },
};
use prost::Message as _;
use prost_types::Any;

use super::{
    chain::Context,
    compiler::Resource,
    http_filters,
    report::{Effect, Notes, Unsupported},
};

/// The annotation's name, and the name under which what is wrong with it is listed.
pub const ANNOTATION: &str = "cairn.dev/rate-limits";

/// Why an object is refused: where and what.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {what}")]
pub struct OwnLimitsError {
    /// Where in it: `[2].by[0]`; empty for all of it.
    pub place: String,
    /// What is wrong.
    pub what: String,
}

/// The limits of an object, as filters.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct OwnLimits {
    limits: Vec<OwnLimit>,
    /// Clusters of the services that count.
    pub clusters: Vec<Resource>,
}

/// One limit.
#[derive(Clone, Debug, PartialEq)]
struct OwnLimit {
    scope: object::Scope,
    filter: HttpFilter,
}

// === impl OwnLimits ===

impl OwnLimits {
    /// Reads an object; each limit has to be one that the filters take.
    pub fn parse(text: &str) -> Result<Self, OwnLimitsError> {
        let mut all = Self::default();
        for (index, limit) in object::parse(text)?.into_iter().enumerate() {
            let wrong = |place: &str, what: String| OwnLimitsError {
                place: format!("[{index}]{place}"),
                what,
            };
            let made = translate::limit(index, &limit).map_err(|(place, what)| wrong(&place, what))?;
            check(&made.filter).map_err(|what| wrong("", what))?;
            if let Some(cluster) = made.cluster
                && !all.clusters.contains(&cluster)
            {
                all.clusters.push(cluster);
            }
            all.limits.push(OwnLimit {
                scope: limit.scope(),
                filter: made.filter,
            });
        }
        Ok(all)
    }

    /// Whether any of the limits is for a chain.
    pub fn concern(&self, chain: &str) -> bool {
        self.limits.iter().any(|limit| limit.scope.is_of(chain))
    }

    /// Puts the limits of a chain into its connection manager.
    pub fn add_to(&self, chain: &str, manager: &mut HttpConnectionManager) {
        for limit in self.limits.iter().filter(|limit| limit.scope.is_of(chain)) {
            let mut filter = limit.filter.clone();
            if let Some(route) = &limit.scope.route {
                if !turn_on(manager, route, &filter.name) {
                    continue;
                }
                filter.disabled = true;
            }
            // The router is the last one.
            let at = manager.http_filters.len().saturating_sub(1);
            manager.http_filters.insert(at, filter);
        }
    }

    /// Limits that are for none of these chains.
    pub fn unused<'c>(&self, chains: impl Iterator<Item = &'c str> + Clone) -> Vec<Unsupported> {
        let limits = self.limits.iter().enumerate();
        let unused = limits.filter(|(_, limit)| !chains.clone().any(|chain| limit.scope.is_of(chain)));
        let listed = unused.map(|(index, limit)| listed(format!("[{index}]"), format!("there is no service {}", limit.scope)));
        listed.collect()
    }
}

/// An item for the list of what is not done.
pub(crate) fn listed(field: String, what: String) -> Unsupported {
    Unsupported {
        resource: ANNOTATION.to_owned(),
        chain: None,
        route: None,
        field,
        what,
        effect: Effect::Ignored,
    }
}

/// Turns a filter on for the routes of a name; whether there are any.
fn turn_on(manager: &mut HttpConnectionManager, route: &str, filter: &str) -> bool {
    let Some(RouteSpecifier::RouteConfig(table)) = &mut manager.route_specifier else {
        return false;
    };
    // An empty configuration is what turns a filter on.
    let on = FilterConfig {
        config: Some(Any::default()),
        is_optional: false,
        disabled: false,
    };
    let on = any("envoy.config.route.v3.FilterConfig", on.encode_to_vec());
    let routes = table.virtual_hosts.iter_mut().flat_map(|host| &mut host.routes);
    let mut found = false;
    for route in routes.filter(|of| of.name == route) {
        route.typed_per_filter_config.insert(filter.to_owned(), on.clone());
        found = true;
    }
    found
}

/// A message in its envelope.
fn any(kind: &str, value: Vec<u8>) -> Any {
    Any {
        type_url: format!("type.googleapis.com/{kind}"),
        value,
    }
}

/// Whether a filter is one that we do.
fn check(filter: &HttpFilter) -> Result<(), String> {
    let mut notes = Notes::of(ANNOTATION);
    let chain = vec![filter.clone(), translate::router()];
    http_filters::compile(chain, &mut Context::default(), &mut notes).map_err(|malformed| malformed.to_string())?;
    notes.refusal().map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests;
