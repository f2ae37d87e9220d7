//! What a request counts as: a descriptor, made by actions.
//!
//! An action that finds nothing where it looks takes the whole descriptor with it, unless it says that it may be left out.

use std::{net::IpAddr, sync::Arc};

use cairn_exchange::{
    Exchange, RequestHead,
    format::{Template, View},
};
use ipnet::IpNet;

use crate::{
    matcher::{CidrSet, HeaderMatcher, HeaderName, QueryMatcher, first_query_value, request_header},
    route::Found,
};

/// One limit as configured: what makes its descriptor.
#[derive(Clone, Debug, Default)]
pub struct RateLimit {
    /// Which of several filters it is for.
    pub stage: u32,
    /// What makes it, in order.
    pub actions: Vec<Action>,
    /// A limit other than the service's own.
    pub limit: Option<LimitOverride>,
    /// How much the request counts.
    pub hits: Option<Hits>,
    /// Whether the answer's headers tell of it; `None` leaves it to the filter.
    pub headers: Option<bool>,
}

/// A limit that comes with the descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LimitOverride {
    /// So many …
    pub requests: u32,
    /// … in this time.
    pub unit: Unit,
}

/// A unit of time of limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Unit {
    Unknown,
    Second,
    Minute,
    Hour,
    Day,
    Week,
    Month,
    Year,
}

/// How much a request counts.
#[derive(Clone, Debug)]
pub struct Hits {
    /// So much, or what this yields.
    pub count: Result<u64, Template>,
    /// It gives back instead.
    pub negative: bool,
}

/// A text of an entry: what a format yields, or another where that is nothing.
#[derive(Clone, Debug)]
pub struct Value {
    /// The format.
    pub format: Template,
    /// The other.
    pub otherwise: Box<str>,
}

/// One entry of a descriptor.
#[derive(Clone, Debug)]
pub enum Action {
    /// `source_cluster`: the proxy's own cluster.
    SourceCluster,
    /// `destination_cluster`: the cluster of the route.
    DestinationCluster,
    /// The value of a header.
    Header {
        /// The header.
        name: HeaderName,
        /// The entry's key.
        key: Arc<str>,
        /// Without it the entry is left out, not the descriptor.
        skip_if_absent: bool,
    },
    /// The value of a parameter of the query.
    Query {
        /// The parameter.
        name: Box<str>,
        /// The entry's key.
        key: Arc<str>,
        /// Without it the entry is left out, not the descriptor.
        skip_if_absent: bool,
    },
    /// `remote_address`: the client's address.
    RemoteAddress,
    /// `masked_remote_address`: the range that the client's address is in.
    MaskedRemoteAddress {
        /// Length of ranges of IPv4.
        v4: u8,
        /// Length of ranges of IPv6.
        v6: u8,
    },
    /// A text.
    Generic {
        /// The entry's key.
        key: Arc<str>,
        /// The text.
        value: Value,
    },
    /// A text, where all these match.
    HeaderMatch {
        /// The entry's key.
        key: Arc<str>,
        /// The text.
        value: Value,
        /// `false`: where not all match.
        expect: bool,
        /// What has to match.
        headers: Vec<HeaderMatcher>,
    },
    /// A text, where all these match.
    QueryMatch {
        /// The entry's key.
        key: Arc<str>,
        /// The text.
        value: Value,
        /// `false`: where not all match.
        expect: bool,
        /// What has to match.
        parameters: Vec<QueryMatcher>,
    },
    /// A text, where the client's address is in these ranges.
    AddressMatch {
        /// The entry's key.
        key: Arc<str>,
        /// The text.
        value: Value,
        /// Where it is in none of them.
        invert: bool,
        /// The ranges.
        ranges: CidrSet,
    },
    /// What a filter has noted.
    Metadata {
        /// The entry's key.
        key: Arc<str>,
        /// The filter.
        filter: Box<str>,
        /// Keys from the filter's root to the value.
        path: Box<[Box<str>]>,
        /// What stands in its place where there is none.
        otherwise: Box<str>,
        /// Without either the entry is left out, not the descriptor.
        skip_if_absent: bool,
    },
}

/// What a request counts as.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Keys and values, in order.
    pub entries: Vec<(Arc<str>, String)>,
    /// A limit other than the service's own.
    pub limit: Option<LimitOverride>,
    /// How much it counts; `None` is once.
    pub hits: Option<u64>,
    /// It gives back instead.
    pub negative: bool,
    /// Whether the answer's headers tell of it; `None` leaves it to the filter.
    pub headers: Option<bool>,
}

/// What actions look at.
#[derive(Clone, Copy)]
pub struct About<'a> {
    /// The record.
    pub exchange: &'a Exchange,
    /// The proxy's own cluster.
    pub source_cluster: &'a str,
    /// The cluster of the route.
    pub cluster: Option<&'a str>,
}

/// Limits of a route, and what becomes of those of its virtual host.
#[derive(Clone, Debug, Default)]
pub struct RateLimits {
    /// Its own.
    pub own: Vec<RateLimit>,
    /// Those of the virtual host count too.
    pub include_host: bool,
}

/// What becomes of the limits of a virtual host on a route.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HostLimits {
    /// They count where the route has none.
    #[default]
    Override,
    /// They count too.
    Include,
    /// They do not count.
    Ignore,
}

/// What the limits of a route make of a request.
pub fn describe(found: Found<'_>, host: HostLimits, stage: u32, about: About<'_>) -> Vec<Descriptor> {
    let crate::route::RouteAction::Forward(forward) = &found.route.action else {
        return Vec::new();
    };
    let RateLimits { own, include_host } = &forward.rate_limits;
    let with_host = match host {
        _ if *include_host => true,
        HostLimits::Include => true,
        HostLimits::Override => own.is_empty(),
        HostLimits::Ignore => false,
    };
    let of_host = found.host.rate_limits.iter().filter(|_| with_host);
    RateLimit::each(own.iter().chain(of_host), stage, about)
}

// === impl RateLimit ===

impl RateLimit {
    /// The descriptors that limits of a stage make of a request.
    pub fn each<'l>(limits: impl IntoIterator<Item = &'l RateLimit>, stage: u32, about: About<'_>) -> Vec<Descriptor> {
        let limits = limits.into_iter().filter(|limit| limit.stage == stage);
        limits.filter_map(|limit| limit.descriptor(about)).collect()
    }

    fn descriptor(&self, about: About<'_>) -> Option<Descriptor> {
        let head = about.exchange.request.as_ref()?;
        let mut entries = Vec::with_capacity(self.actions.len());
        for action in &self.actions {
            match action.entry(head, about) {
                Entry::Is(key, value) => entries.push((key, value)),
                Entry::LeftOut => {}
                Entry::Missing => return None,
            }
        }
        let hits = match self.hits.as_ref().map(|hits| &hits.count) {
            None => None,
            Some(Ok(count)) => Some(*count),
            // A format that yields no number takes the descriptor with it, as in Envoy.
            Some(Err(format)) => Some(rendered(format, about).parse().ok()?),
        };
        Some(Descriptor {
            entries,
            limit: self.limit,
            hits,
            negative: self.hits.as_ref().is_some_and(|hits| hits.negative),
            headers: self.headers,
        })
    }
}

enum Entry {
    Is(Arc<str>, String),
    LeftOut,
    Missing,
}

// === impl Action ===

impl Action {
    fn entry(&self, head: &RequestHead, about: About<'_>) -> Entry {
        let is = |key: &str, value: String| Entry::Is(key.into(), value);
        let when = |matches: bool, expect: bool, key: &Arc<str>, value: &Value| match value.text(about) {
            Some(text) if matches == expect => Entry::Is(key.clone(), text),
            _ => Entry::Missing,
        };
        match self {
            Action::SourceCluster => is("source_cluster", about.source_cluster.to_owned()),
            Action::DestinationCluster => match about.cluster {
                Some(cluster) => is("destination_cluster", cluster.to_owned()),
                None => Entry::Missing,
            },
            Action::Header {
                name,
                key,
                skip_if_absent,
            } => found(key, first_value(head, name), *skip_if_absent),
            Action::Query {
                name,
                key,
                skip_if_absent,
            } => {
                let value = first_query_value(head.path.query().unwrap_or_default(), name).map(str::to_owned);
                found(key, value, *skip_if_absent)
            }
            Action::RemoteAddress => is("remote_address", client(about).to_string()),
            Action::MaskedRemoteAddress { v4, v6 } => {
                let address = client(about);
                let length = if address.is_ipv4() { *v4 } else { *v6 };
                match IpNet::new(address, length) {
                    Ok(range) => is("masked_remote_address", range.trunc().to_string()),
                    Err(_) => Entry::Missing,
                }
            }
            Action::Generic { key, value } => when(true, true, key, value),
            Action::HeaderMatch {
                key,
                value,
                expect,
                headers,
            } => {
                let matches = headers.iter().all(|matcher| matcher.matches(head));
                when(matches, *expect, key, value)
            }
            Action::QueryMatch {
                key,
                value,
                expect,
                parameters,
            } => {
                let query = head.path.query().unwrap_or_default();
                let matches = parameters.iter().all(|matcher| matcher.matches(query));
                when(matches, *expect, key, value)
            }
            Action::AddressMatch {
                key,
                value,
                invert,
                ranges,
            } => when(ranges.contains(client(about)) != *invert, true, key, value),
            Action::Metadata {
                key,
                filter,
                path,
                otherwise,
                skip_if_absent,
            } => {
                let noted = match about.exchange.metadata.get(filter, path) {
                    Some(serde_json::Value::String(text)) if !text.is_empty() => Some(text.clone()),
                    _ => Some(otherwise.to_string()).filter(|text| !text.is_empty()),
                };
                found(key, noted, *skip_if_absent)
            }
        }
    }
}

fn found(key: &Arc<str>, value: Option<String>, skip_if_absent: bool) -> Entry {
    match value {
        Some(value) => Entry::Is(key.clone(), value),
        None if skip_if_absent => Entry::LeftOut,
        None => Entry::Missing,
    }
}

/// The first field of a name, as Envoy takes it.
fn first_value(head: &RequestHead, name: &HeaderName) -> Option<String> {
    let value = match name {
        HeaderName::Field(name) => head.headers.get(name)?.as_bytes().to_vec(),
        pseudo => request_header(head, pseudo)?.into_owned(),
    };
    Some(String::from_utf8_lossy(&value).into_owned())
}

fn client(about: About<'_>) -> IpAddr {
    let exchange = about.exchange;
    exchange.client_address.unwrap_or(exchange.connection.remote_address).ip()
}

fn rendered(format: &Template, about: About<'_>) -> String {
    if let Some(literal) = format.is_literal() {
        return literal.to_owned();
    }
    let mut text = Vec::new();
    format.render_header(&View::new(about.exchange), &mut text);
    String::from_utf8_lossy(&text).into_owned()
}

// === impl Value ===

impl Value {
    fn text(&self, about: About<'_>) -> Option<String> {
        let text = rendered(&self.format, about);
        Some(if text.is_empty() { self.otherwise.to_string() } else { text }).filter(|text| !text.is_empty())
    }
}

#[cfg(test)]
mod tests;
