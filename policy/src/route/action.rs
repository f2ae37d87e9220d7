//! What a route does with a request: forward it, redirect it, or answer it.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use super::{HashPolicy, Overrides, Redirect};
use crate::{
    balance::{Criteria, WeightSumError, Weights},
    cors::CorsPolicy,
    headers::{HeaderEdits, Mutation},
    matcher::RegexRewrite,
    rate_limit::RateLimits,
    retry::RetryPolicy,
    timeout::RouteTimeouts,
};

/// What a route does.
#[derive(Debug)]
pub enum RouteAction {
    /// Send the request to a cluster.
    Forward(Box<Forward>),
    /// Tell the client to go elsewhere.
    Redirect(Redirect),
    /// Answer.
    DirectResponse(DirectResponse),
}

/// Send the request to a cluster.
#[derive(Debug)]
pub struct Forward {
    /// Where to.
    pub target: Target,
    /// Status of the answer when the cluster does not exist (503, or 500 for Gateway API).
    pub cluster_not_found: StatusCode,
    /// How long it may take.
    pub timeouts: RouteTimeouts,
    /// When it is tried again; `None` leaves it to the request's own headers.
    pub retry: Option<RetryPolicy>,
    /// The path that is sent instead.
    pub path_rewrite: Option<PathRewrite>,
    /// The authority that is sent instead.
    pub host_rewrite: Option<HostRewrite>,
    /// The replaced authority is appended to `x-forwarded-host`.
    pub append_x_forwarded_host: bool,
    /// What consistent hashing looks at, in order.
    pub hash_policies: Vec<HashPolicy>,
    /// What is asked of endpoints of clusters with subsets.
    pub asks: Option<Arc<Criteria>>,
    /// Clusters that get a copy.
    pub mirrors: Vec<Mirror>,
    /// Upgrades that differ from those of the chain.
    pub upgrades: Vec<Upgrade>,
    /// Cross-origin sharing, where it stands on the route itself.
    pub cors: Option<Arc<CorsPolicy>>,
    /// What requests count as.
    pub rate_limits: RateLimits,
    /// The cluster's limits for requests of high priority count.
    pub high_priority: bool,
}

/// Where requests are sent.
#[derive(Debug)]
pub enum Target {
    /// Always the same cluster.
    Cluster(Arc<str>),
    /// One of several, by weight.
    Weighted(WeightedClusters),
}

/// Clusters with weights; at least one weight is positive.
#[derive(Debug)]
pub struct WeightedClusters {
    clusters: Vec<WeightedCluster>,
    weights: Weights,
}

/// One of several clusters.
#[derive(Debug)]
pub struct WeightedCluster {
    /// Name of the cluster.
    pub name: Arc<str>,
    /// Its share, relative to the others.
    pub weight: u32,
    /// Header edits of the request, before those of the route.
    pub request_edits: HeaderEdits,
    /// Header edits of the answer, before those of the route.
    pub response_edits: HeaderEdits,
    /// The authority that is sent to this cluster; the route's own rewrite comes later and wins.
    pub host_rewrite: Option<HeaderValue>,
    /// What is asked of its endpoints, the route's own criteria among it.
    pub asks: Option<Arc<Criteria>>,
    /// Configuration of filters, by the filter's name.
    pub overrides: Overrides,
}

/// What replaces the path, or a part of it.
#[derive(Clone, Debug)]
pub enum PathRewrite {
    /// The part that the route's match stands for.
    Prefix(Box<str>),
    /// All matches of an expression; the query stays.
    Regex(RegexRewrite),
    /// The whole path; the query stays.
    Full(Box<str>),
}

/// What replaces the authority.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostRewrite {
    /// This.
    Literal(HeaderValue),
    /// The value of a request header, when it is there.
    Header(http::HeaderName),
    /// The host name of the chosen endpoint, when it has one.
    Endpoint,
}

/// A share of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fraction {
    /// How many …
    pub numerator: u32,
    /// … of how many: 100, 10 000 or 1 000 000.
    pub denominator: u32,
}

/// Somebody who gets copies of requests; the answers are thrown away.
#[derive(Clone, Debug)]
pub struct Mirror {
    /// Who.
    pub to: MirrorTarget,
    /// The share of requests that is copied.
    pub fraction: Fraction,
    /// Copies carry an authority with `-shadow` appended to the host, unless there is a rewrite.
    pub shadow_host_suffix: bool,
    /// The authority that copies carry instead.
    pub host_rewrite: Option<HeaderValue>,
    /// Edits of copies, in order.
    pub edits: Vec<Mutation>,
    /// Copies are traced: always, never, or as the request (`None`).
    pub trace_sampled: Option<bool>,
}

/// Who gets copies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MirrorTarget {
    /// This cluster.
    Cluster(Arc<str>),
    /// The cluster that a request header names.
    Header(HeaderName),
}

/// Whether a route takes a kind of upgrade.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upgrade {
    /// `websocket`, `CONNECT`, …; compared without regard to case.
    pub kind: Box<str>,
    /// Whether it is taken.
    pub enabled: bool,
    /// A CONNECT is ended here, its bytes go to the cluster as TCP.
    pub terminates_connect: bool,
}

/// An answer that configuration gives.
#[derive(Clone, Debug)]
pub struct DirectResponse {
    /// Its status.
    pub status: StatusCode,
    /// Its body.
    pub body: Bytes,
}

/// The name of a route's operation, for traces and `x-envoy-decorator-operation`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decorator {
    /// `web.app.svc.cluster.local:80/*`
    pub operation: HeaderValue,
    /// Whether others are told in a header.
    pub propagate: bool,
}

// === impl RouteAction ===

impl RouteAction {
    /// The forwarding, if it is one.
    pub fn forward(&self) -> Option<&Forward> {
        match self {
            Self::Forward(forward) => Some(forward),
            Self::Redirect(_) | Self::DirectResponse(_) => None,
        }
    }
}

// === impl Forward ===

impl Forward {
    /// Forwarding to a cluster with nothing else asked for: no timeout, no retries, no rewrites.
    pub fn to(target: Target) -> Self {
        Self {
            target,
            cluster_not_found: StatusCode::SERVICE_UNAVAILABLE,
            timeouts: RouteTimeouts::default(),
            retry: None,
            path_rewrite: None,
            host_rewrite: None,
            append_x_forwarded_host: false,
            hash_policies: Vec::new(),
            asks: None,
            mirrors: Vec::new(),
            upgrades: Vec::new(),
            cors: None,
            rate_limits: RateLimits::default(),
            high_priority: false,
        }
    }

    /// The clusters that it may send to, mirrors included.
    pub fn clusters(&self) -> impl Iterator<Item = &Arc<str>> {
        let (one, several) = match &self.target {
            Target::Cluster(name) => (Some(name), None),
            Target::Weighted(weighted) => (None, Some(weighted.clusters.iter().map(|cluster| &cluster.name))),
        };
        one.into_iter()
            .chain(several.into_iter().flatten())
            .chain(self.mirrors.iter().filter_map(Mirror::cluster))
    }

    /// What the route says about a kind of upgrade; `None` leaves it to the chain.
    pub fn upgrade(&self, kind: &str) -> Option<&Upgrade> {
        self.upgrades.iter().find(|upgrade| upgrade.kind.eq_ignore_ascii_case(kind))
    }
}

// === impl Target ===

impl Target {
    /// The cluster of a request; the same random number chooses the same one, so retries stay with it.
    pub fn choose(&self, random: u64) -> (&Arc<str>, Option<&WeightedCluster>) {
        match self {
            Self::Cluster(name) => (name, None),
            Self::Weighted(weighted) => {
                let chosen = weighted.choose(random);
                (&chosen.name, Some(chosen))
            }
        }
    }
}

// === impl WeightedClusters ===

impl WeightedClusters {
    /// Clusters with weights; refused when all weights are zero or their sum passes `u32`.
    pub fn new(clusters: Vec<WeightedCluster>) -> Result<Self, WeightSumError> {
        let weights = Weights::new(clusters.iter().map(|cluster| cluster.weight))?;
        Ok(Self { clusters, weights })
    }

    /// In configuration's order.
    pub fn clusters(&self) -> &[WeightedCluster] {
        &self.clusters
    }

    /// The one that a random number stands for.
    pub fn choose(&self, random: u64) -> &WeightedCluster {
        // There is one weight a cluster, and `choose` gives the index of a weight.
        &self.clusters[self.weights.choose(random)]
    }
}

// === impl Mirror ===

impl Mirror {
    /// A cluster that gets a copy of each request.
    pub fn to(cluster: impl Into<Arc<str>>) -> Self {
        Self {
            to: MirrorTarget::Cluster(cluster.into()),
            fraction: Fraction::ALL,
            shadow_host_suffix: false,
            host_rewrite: None,
            edits: Vec::new(),
            trace_sampled: None,
        }
    }

    /// The cluster, where it is always the same.
    pub fn cluster(&self) -> Option<&Arc<str>> {
        match &self.to {
            MirrorTarget::Cluster(name) => Some(name),
            MirrorTarget::Header(_) => None,
        }
    }

    /// The cluster's name for a request with these headers.
    pub fn choose<'a>(&'a self, headers: &'a HeaderMap) -> Option<&'a str> {
        match &self.to {
            MirrorTarget::Cluster(name) => Some(name),
            MirrorTarget::Header(name) => headers.get(name)?.to_str().ok().filter(|name| !name.is_empty()),
        }
    }

    /// The authority that a copy carries.
    pub fn authority(&self, authority: &HeaderValue) -> HeaderValue {
        if let Some(rewrite) = &self.host_rewrite {
            return rewrite.clone();
        }
        let bytes = authority.as_bytes();
        if !self.shadow_host_suffix || bytes.is_empty() {
            return authority.clone();
        }
        let host = super::table::without_port(bytes);
        let port = bytes.get(host.len()..).unwrap_or_default();
        HeaderValue::from_bytes(&[host, b"-shadow", port].concat()).unwrap_or_else(|_| authority.clone())
    }
}

// === impl WeightedCluster ===

impl WeightedCluster {
    /// A cluster with a share and nothing else asked for.
    pub fn new(name: impl Into<Arc<str>>, weight: u32) -> Self {
        Self {
            name: name.into(),
            weight,
            request_edits: HeaderEdits::default(),
            response_edits: HeaderEdits::default(),
            host_rewrite: None,
            asks: None,
            overrides: BTreeMap::new(),
        }
    }
}

// === impl Fraction ===

impl Fraction {
    /// All requests.
    pub const ALL: Self = Self {
        numerator: 100,
        denominator: 100,
    };

    /// Whether the request of a random number is in the share.
    pub fn contains(self, random: u64) -> bool {
        random % u64::from(self.denominator.max(1)) < u64::from(self.numerator)
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::{Forward, Fraction, Mirror, MirrorTarget, Target, Upgrade, WeightedCluster, WeightedClusters};

    #[test]
    fn the_same_random_number_chooses_the_same_cluster() {
        let clusters = vec![
            WeightedCluster::new("a", 90),
            WeightedCluster::new("none", 0),
            WeightedCluster::new("b", 10),
        ];
        let target = Target::Weighted(WeightedClusters::new(clusters).unwrap());
        let mut chosen = [0; 2];
        for random in 0..1000 {
            let (name, cluster) = target.choose(random);
            assert_eq!(name, target.choose(random).0);
            assert_eq!(cluster.map(|cluster| &cluster.name), Some(name));
            chosen[usize::from(&**name == "b")] += 1;
            assert_ne!(&**name, "none");
        }
        assert_eq!(chosen, [900, 100]);
    }

    #[test]
    fn weights_that_add_up_to_nothing_are_refused() {
        assert!(WeightedClusters::new(vec![]).is_err());
        assert!(WeightedClusters::new(vec![WeightedCluster::new("a", 0)]).is_err());
        assert!(WeightedClusters::new(vec![WeightedCluster::new("a", u32::MAX), WeightedCluster::new("b", 1)]).is_err());
    }

    #[test]
    fn a_fraction_takes_its_share() {
        for (fraction, share) in [
            (Fraction::ALL, 1_000_000),
            (
                Fraction {
                    numerator: 0,
                    denominator: 100,
                },
                0,
            ),
            (
                Fraction {
                    numerator: 333_000,
                    denominator: 1_000_000,
                },
                333_000,
            ),
            (
                Fraction {
                    numerator: 200,
                    denominator: 100,
                },
                1_000_000,
            ),
        ] {
            assert_eq!(
                (0..1_000_000).filter(|random| fraction.contains(*random)).count(),
                share,
                "{fraction:?}"
            );
        }
    }

    #[test]
    fn a_forward_names_all_clusters_it_may_send_to() {
        let clusters = vec![WeightedCluster::new("a", 1), WeightedCluster::new("b", 1)];
        let mut forward = Forward::to(Target::Weighted(WeightedClusters::new(clusters).unwrap()));
        forward.mirrors.push(Mirror::to("m"));
        assert_eq!(forward.clusters().map(|name| &**name).collect::<Vec<_>>(), ["a", "b", "m"]);
        let single = Forward::to(Target::Cluster("a".into()));
        assert_eq!(single.clusters().count(), 1);
    }

    #[test]
    fn the_authority_of_a_copy_may_tell_that_it_is_one() {
        for (suffix, authority, copy) in [
            (false, "web:80", "web:80"),
            (true, "web:80", "web-shadow:80"),
            (true, "web", "web-shadow"),
            (true, "", ""),
        ] {
            let mut mirror = Mirror {
                shadow_host_suffix: suffix,
                ..Mirror::to("m")
            };
            assert_eq!(mirror.authority(&HeaderValue::from_static(authority)), copy);
            mirror.host_rewrite = Some(HeaderValue::from_static("copy"));
            assert_eq!(mirror.authority(&HeaderValue::from_static(authority)), "copy");
        }
    }

    #[test]
    fn a_header_may_name_who_gets_the_copy() {
        let name = http::HeaderName::from_static("x-copy-to");
        let mirror = Mirror {
            to: MirrorTarget::Header(name.clone()),
            ..Mirror::to("m")
        };
        for (value, chosen) in [
            (None, None),
            (Some(""), None),
            (Some("outbound|80||a"), Some("outbound|80||a")),
        ] {
            let headers = value
                .map(|value| (name.clone(), HeaderValue::from_static(value)))
                .into_iter()
                .collect();
            assert_eq!(mirror.choose(&headers), chosen);
        }
    }

    #[test]
    fn kinds_of_upgrades_ignore_case() {
        let mut forward = Forward::to(Target::Cluster("a".into()));
        forward.upgrades.push(Upgrade {
            kind: "websocket".into(),
            enabled: false,
            terminates_connect: false,
        });
        assert!(forward.upgrade("WebSocket").is_some_and(|upgrade| !upgrade.enabled));
        assert_eq!(forward.upgrade("CONNECT"), None);
    }
}
