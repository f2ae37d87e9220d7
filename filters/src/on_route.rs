//! What the chosen route says to filters: its configuration of each, by the filter's name.
//!
//! Routes, virtual hosts, the table and weighted clusters may each say something of a filter: turn it off or on, or configure it. The
//! most specific word counts (weighted cluster, route, virtual host, table), for being on or off and for the configuration apart, as
//! in Envoy. Without any such word nothing is looked up. The route is chosen before the filters run; a filter that changes what routes
//! look at may have it chosen again ([`Exchange::reroute`](cairn_exchange::Exchange::reroute)).

use std::{any::Any, fmt, sync::Arc};

use cairn_policy::{
    cors::CorsPolicy,
    fault::Faults,
    jwt,
    rbac::Rbac,
    route::{Forward, Found, RouteAction, WeightedCluster},
};

use crate::{ext_authz, header_mutation::Mutations, local_ratelimit::LocalLimit, ratelimit::OnItsRoute, services::Services};

/// What one level says of one filter.
#[derive(Clone, Debug, Default)]
pub struct PerRoute {
    /// The filter does not run.
    pub disabled: bool,
    /// The filter's configuration here; `None` turns the filter on and leaves its configuration to other levels.
    pub config: Option<RouteConfig>,
}

/// The configuration of a filter on a route.
#[derive(Clone, Debug)]
pub enum RouteConfig {
    /// Of `rbac`; `None` lets everything pass.
    Rbac(Option<Arc<Rbac>>),
    /// Of `fault`.
    Fault(Arc<Faults>),
    /// Of `cors`.
    Cors(Arc<CorsPolicy>),
    /// Of `local_ratelimit`.
    LocalRateLimit(Arc<LocalLimit>),
    /// Of `buffer`: most bytes, or not at all.
    Buffer(Option<usize>),
    /// Of `jwt_authn`.
    Jwt(jwt::PerRoute),
    /// Of `header_mutation`.
    HeaderMutation(Arc<Mutations>),
    /// Of `ratelimit`.
    RateLimit(Arc<OnItsRoute>),
    /// Of `ext_authz`.
    ExtAuthz(Arc<ext_authz::OnItsRoute>),
}

/// One filter of a chain, called for one request.
pub struct Scope<'a> {
    /// The filter's name in the configuration.
    pub filter: &'a str,
    /// The route.
    pub route: &'a OnRoute<'a>,
    /// What filters may ask of others.
    pub services: &'a dyn Services,
}

/// The route of a request, as filters see it.
#[derive(Clone, Copy)]
pub struct OnRoute<'a> {
    /// The route; `None` when there is none.
    pub found: Option<Found<'a>>,
    /// The weighted cluster that was chosen on it.
    pub weighted: Option<&'a WeightedCluster>,
    /// Whether any level says anything of filters.
    configured: bool,
}

// === impl Scope ===

impl<'a> Scope<'a> {
    /// What the route says of this filter.
    pub fn config(&self) -> Option<&'a RouteConfig> {
        self.route.config(self.filter)
    }
}

// === impl OnRoute ===

impl<'a> OnRoute<'a> {
    /// No route.
    pub const NONE: Self = Self {
        found: None,
        weighted: None,
        configured: false,
    };

    /// This route, and one of its weighted clusters.
    pub fn new(found: Option<Found<'a>>, weighted: Option<&'a WeightedCluster>) -> Self {
        let configured = found.is_some_and(|found| found.has_overrides(weighted));
        Self {
            found,
            weighted,
            configured,
        }
    }

    /// What the levels say of a filter, the most specific first.
    fn words(&self, filter: &str) -> impl Iterator<Item = &'a PerRoute> {
        let found = self.found.filter(|_| self.configured);
        let weighted = self.weighted;
        let levels = found.into_iter().flat_map(move |found| found.override_levels(weighted));
        levels.filter_map(move |level| {
            let word: &'a Arc<dyn Any + Send + Sync> = level.get(filter)?;
            word.downcast_ref::<PerRoute>()
        })
    }

    /// Whether a filter is turned off here, or on, or neither.
    pub fn disabled(&self, filter: &str) -> Option<bool> {
        if !self.configured {
            return None;
        }
        self.words(filter).next().map(|word| word.disabled)
    }

    /// The configuration of a filter here.
    pub fn config(&self, filter: &str) -> Option<&'a RouteConfig> {
        if !self.configured {
            return None;
        }
        self.words(filter).find_map(|word| word.config.as_ref())
    }

    /// All configurations of a filter that stand on the levels, the most specific first.
    pub fn configs(&self, filter: &str) -> impl Iterator<Item = &'a RouteConfig> {
        self.words(filter).filter_map(|word| word.config.as_ref())
    }

    /// How the route forwards; `None` when it answers by itself.
    pub fn forward(&self) -> Option<&'a Forward> {
        match &self.found?.route.action {
            RouteAction::Forward(forward) => Some(forward),
            RouteAction::Redirect(_) | RouteAction::DirectResponse(_) => None,
        }
    }

    /// The cluster that the request goes to.
    pub fn cluster(&self) -> Option<&'a Arc<str>> {
        match (self.weighted, &self.forward()?.target) {
            (Some(weighted), _) => Some(&weighted.name),
            (None, cairn_policy::route::Target::Cluster(name)) => Some(name),
            (None, cairn_policy::route::Target::Weighted(_)) => None,
        }
    }
}

impl fmt::Debug for OnRoute<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OnRoute")
            .field("route", &self.found.map(|found| found.route.name.as_deref()))
            .field("cluster", &self.cluster())
            .finish_non_exhaustive()
    }
}
