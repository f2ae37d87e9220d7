//! The table of virtual hosts and routes, and the search in it.

use std::{any::Any, collections::BTreeMap, sync::Arc};

use cairn_exchange::{DynamicMetadata, RequestHead};
use http::Method;
use smallvec::SmallVec;

use super::{Decorator, Domain, Fraction, RouteAction, WeightedCluster, domains::DomainIndex, index::RouteIndex};
use crate::{
    headers::HeaderEdits,
    matcher::{HeaderMatcher, MetadataMatcher, PathMatch, PathMatcher, QueryMatcher},
    rate_limit::RateLimit,
};

/// Configuration of filters on a route, a virtual host or a weighted cluster, by the filter's name; only the filter knows its type.
pub type Overrides = BTreeMap<Box<str>, Arc<dyn Any + Send + Sync>>;

/// What is asked of a request, all of it.
#[derive(Debug)]
pub struct RouteMatch {
    /// Its path.
    pub path: PathMatcher,
    /// Its headers.
    pub headers: Vec<HeaderMatcher>,
    /// Its query.
    pub query: Vec<QueryMatcher>,
    /// What filters have noted.
    pub metadata: Vec<MetadataMatcher>,
    /// It is gRPC.
    pub grpc: bool,
    /// Only this share of the requests that match otherwise.
    pub fraction: Option<Fraction>,
}

/// A route.
#[derive(Debug)]
pub struct Route {
    /// Its name, if it has one.
    pub name: Option<Arc<str>>,
    /// Which requests take it.
    pub matches: RouteMatch,
    /// What becomes of them.
    pub action: RouteAction,
    /// Header edits of requests.
    pub request_edits: HeaderEdits,
    /// Header edits of answers.
    pub response_edits: HeaderEdits,
    /// The Istio object that it was made from: `/apis/networking.istio.io/v1/namespaces/app/virtual-service/x`.
    pub config: Option<Arc<str>>,
    /// The name of its operation.
    pub decorator: Option<Decorator>,
    /// Prefix of the route's own statistics.
    pub stat_prefix: Option<Arc<str>>,
    /// Configuration of filters.
    pub overrides: Overrides,
}

/// Routes for some authorities.
#[derive(Debug)]
pub struct VirtualHost {
    /// Its name.
    pub name: Arc<str>,
    /// The authorities.
    pub domains: Vec<Domain>,
    /// Routes; the first that matches is taken.
    pub routes: Vec<Arc<Route>>,
    /// Header edits of requests.
    pub request_edits: HeaderEdits,
    /// Header edits of answers.
    pub response_edits: HeaderEdits,
    /// Configuration of filters.
    pub overrides: Overrides,
    /// What requests count as.
    pub rate_limits: Vec<RateLimit>,
}

/// All routes of a chain.
#[derive(Debug)]
pub struct RouteTable {
    name: Arc<str>,
    hosts: Vec<Arc<VirtualHost>>,
    domains: DomainIndex,
    /// One a virtual host; `None` where there are so few routes that asking each is quicker.
    indexes: Vec<Option<RouteIndex>>,
    /// Header edits of requests.
    pub request_edits: HeaderEdits,
    /// Header edits of answers.
    pub response_edits: HeaderEdits,
    /// Edits of the table come first and those of the route last, so that the route's stay.
    pub most_specific_edits_win: bool,
    /// The port of the authority does not count when the virtual host is looked for.
    pub ignore_port_in_authority: bool,
    /// Configuration of filters.
    pub overrides: Overrides,
}

/// Why a table is refused.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum InvalidRouteTable {
    /// Two virtual hosts have one domain.
    #[error(
        "the virtual host `{host}` has the domain {domain:?}, which another virtual host has already; keep it in one of them"
    )]
    DuplicateDomain {
        /// The second host.
        host: Arc<str>,
        /// The domain.
        domain: Domain,
    },
}

/// What a search needs beside the request itself.
#[derive(Clone, Copy)]
pub struct Facts<'a> {
    /// One random number a request: the same on every search for it. What comes later (weights, mirrors) takes others, or the shares
    /// would depend on each other.
    pub random: u64,
    /// Dynamic metadata.
    pub metadata: &'a DynamicMetadata,
}

/// A found route.
#[derive(Clone, Copy, Debug)]
pub struct Found<'a> {
    /// The table that it is from.
    pub table: &'a RouteTable,
    /// Its virtual host.
    pub host: &'a Arc<VirtualHost>,
    /// The route.
    pub route: &'a Arc<Route>,
}

/// Header edits in the order in which they are applied.
pub type EditLevels<'a> = SmallVec<[&'a HeaderEdits; 4]>;

// === impl RouteMatch ===

impl RouteMatch {
    /// Asks for a path and nothing else.
    pub fn path(path: PathMatcher) -> Self {
        Self {
            path,
            headers: Vec::new(),
            query: Vec::new(),
            metadata: Vec::new(),
            grpc: false,
            fraction: None,
        }
    }

    /// Whether a request matches.
    ///
    /// A CONNECT has no path: only [`PathMatch::Connect`] accepts it, and nothing else.
    pub fn matches(&self, head: &RequestHead, facts: Facts<'_>) -> bool {
        let path = match (self.path.how(), &head.method) {
            (PathMatch::Connect, method) => *method == Method::CONNECT,
            (_, &Method::CONNECT) => false,
            _ => self.path.matched(head.path.path()).is_some(),
        };
        path && self.fraction.is_none_or(|fraction| fraction.contains(facts.random))
            && (!self.grpc || head.is_grpc())
            && self.headers.iter().all(|matcher| matcher.matches(head))
            && self
                .query
                .iter()
                .all(|matcher| matcher.matches(head.path.query().unwrap_or_default()))
            && self.metadata.iter().all(|matcher| matcher.matches(facts.metadata))
    }
}

// === impl Route ===

impl Route {
    /// A route with a match and an action and nothing else.
    pub fn new(matches: RouteMatch, action: RouteAction) -> Self {
        Self {
            name: None,
            matches,
            action,
            request_edits: HeaderEdits::default(),
            response_edits: HeaderEdits::default(),
            config: None,
            decorator: None,
            stat_prefix: None,
            overrides: Overrides::new(),
        }
    }
}

// === impl VirtualHost ===

impl VirtualHost {
    /// A virtual host for every authority.
    pub fn any(name: impl Into<Arc<str>>, routes: Vec<Arc<Route>>) -> Self {
        Self {
            name: name.into(),
            domains: vec![Domain::Any],
            routes,
            request_edits: HeaderEdits::default(),
            response_edits: HeaderEdits::default(),
            overrides: Overrides::new(),
            rate_limits: Vec::new(),
        }
    }
}

// === impl RouteTable ===

impl RouteTable {
    /// A table of virtual hosts; each domain may occur once.
    pub fn new(name: impl Into<Arc<str>>, hosts: Vec<Arc<VirtualHost>>) -> Result<Self, InvalidRouteTable> {
        let mut domains = DomainIndex::default();
        for (index, host) in hosts.iter().enumerate() {
            for domain in &host.domains {
                if !domains.insert(domain, index) {
                    return Err(InvalidRouteTable::DuplicateDomain {
                        host: host.name.clone(),
                        domain: domain.clone(),
                    });
                }
            }
        }
        let indexes = hosts.iter().map(|host| RouteIndex::worthwhile(&host.routes)).collect();
        Ok(Self {
            name: name.into(),
            indexes,
            hosts,
            domains,
            request_edits: HeaderEdits::default(),
            response_edits: HeaderEdits::default(),
            most_specific_edits_win: false,
            ignore_port_in_authority: false,
            overrides: Overrides::new(),
        })
    }

    /// Its name.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Its virtual hosts, in configuration's order.
    pub fn hosts(&self) -> &[Arc<VirtualHost>] {
        &self.hosts
    }

    /// The route of a request, or `None`: 404, `route_not_found`, `NR`.
    pub fn find(&self, head: &RequestHead, facts: Facts<'_>) -> Option<Found<'_>> {
        let at = self.host_of(head)?;
        let host = self.hosts.get(at)?;
        let route = match self.indexes.get(at) {
            Some(Some(index)) => index.find(&host.routes, head, facts),
            _ => host.routes.iter().find(|route| route.matches.matches(head, facts)),
        };
        Some(Found {
            table: self,
            host,
            route: route?,
        })
    }

    pub(super) fn host_of(&self, head: &RequestHead) -> Option<usize> {
        let authority = head.authority.as_bytes();
        let authority = if self.ignore_port_in_authority {
            without_port(authority)
        } else {
            authority
        };
        self.domains.find(authority)
    }

    /// Levels of edits in the order in which they are applied: the cluster's first, then the most specific first, unless
    /// `most_specific_edits_win` turns the last three round. A later edit finds, and may overwrite, what an earlier one left.
    fn levels<'a>(&self, cluster: Option<&'a HeaderEdits>, mut others: [&'a HeaderEdits; 3]) -> EditLevels<'a> {
        if self.most_specific_edits_win {
            others.reverse();
        }
        cluster.into_iter().chain(others).filter(|edits| !edits.is_empty()).collect()
    }
}

// === impl Found ===

impl<'a> Found<'a> {
    /// Edits of the request's headers, in order. Those of a weighted cluster come before its host rewrite, the others after it.
    pub fn request_edits(&self, cluster: Option<&'a WeightedCluster>) -> EditLevels<'a> {
        let others = [&self.route.request_edits, &self.host.request_edits, &self.table.request_edits];
        self.table.levels(cluster.map(|cluster| &cluster.request_edits), others)
    }

    /// Edits of the answer's headers, in order.
    pub fn response_edits(&self, cluster: Option<&'a WeightedCluster>) -> EditLevels<'a> {
        let others = [
            &self.route.response_edits,
            &self.host.response_edits,
            &self.table.response_edits,
        ];
        self.table.levels(cluster.map(|cluster| &cluster.response_edits), others)
    }

    /// What is configured for filters, the most specific level first: weighted cluster, route, virtual host, table.
    pub fn override_levels(&self, cluster: Option<&'a WeightedCluster>) -> impl Iterator<Item = &'a Overrides> + use<'a> {
        let levels = [&self.route.overrides, &self.host.overrides, &self.table.overrides];
        cluster.map(|cluster| &cluster.overrides).into_iter().chain(levels)
    }

    /// Whether anything is configured for any filter.
    pub fn has_overrides(&self, cluster: Option<&'a WeightedCluster>) -> bool {
        self.override_levels(cluster).any(|level| !level.is_empty())
    }
}

/// An authority without its port.
pub(super) fn without_port(authority: &[u8]) -> &[u8] {
    match authority.iter().rposition(|byte| *byte == b':') {
        Some(colon)
            if authority
                .get(colon + 1..)
                .is_some_and(|port| port.iter().all(u8::is_ascii_digit)) =>
        {
            let host = authority.get(..colon).unwrap_or(authority);
            // A colon inside of an IPv6 address without brackets is no port's.
            let bare_ipv6 = host.contains(&b':') && host.last() != Some(&b']');
            if bare_ipv6 { authority } else { host }
        }
        _ => authority,
    }
}

#[cfg(test)]
mod tests;
