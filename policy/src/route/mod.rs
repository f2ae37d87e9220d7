//! Routes: virtual hosts, their routes in order, and the one function that finds the route of a request.
//!
//! [`RouteTable::find`] picks the virtual host by the request's authority and then the first route whose match accepts the request
//! (contract xds §4.1, §4.4). Everything is compiled and immutable; hosts and routes are shared by `Arc`, so that an
//! exchange can keep what was chosen for it while a newer table is already in use.
//!
//! A route ends in a [`RouteAction`]: forward ([`Forward`]), redirect ([`Redirect`]) or answer ([`DirectResponse`]). What an action
//! makes of a request is computed in `rewrite` and `redirect`.

mod action;
mod domains;
mod explain;
mod hash;
mod index;
mod redirect;
mod rewrite;
mod table;

pub use action::{
    Decorator, DirectResponse, Forward, Fraction, HostRewrite, Mirror, MirrorTarget, PathRewrite, RouteAction, Target, Upgrade,
    WeightedCluster, WeightedClusters,
};
pub use domains::{Domain, InvalidDomain};
pub use explain::{MOST_PASSED_OVER, PassedOver, RouteStory};
pub use hash::{CookieTtl, HashFacts, HashPolicy, HashSource, RequestHash, hash_address};
pub use redirect::{Redirect, RedirectPath, request_location};
pub use rewrite::{InvalidRewrite, rewrite_host, rewrite_path};
pub use table::{EditLevels, Facts, Found, InvalidRouteTable, Overrides, Route, RouteMatch, RouteTable, VirtualHost};
