//! What routes, virtual hosts, route tables and weighted clusters say of filters: `typed_per_filter_config`.
//!
//! It is keyed by the filter's name in the chain and read by its own type, wrapped in `FilterConfig` or `TypedStruct` or not. What
//! cannot be done refuses the routes in its reach.

use std::{collections::BTreeMap, sync::Arc};

use cairn_filters::{PerRoute, RouteConfig};
use cairn_policy::route::Overrides;
use cairn_proto::envoy::{
    config::route::v3::FilterConfig,
    extensions::filters::http::{
        buffer::v3::{BufferPerRoute, buffer_per_route::Override as BufferOverride},
        header_mutation::v3::HeaderMutationPerRoute,
        rbac::v3::RbacPerRoute,
    },
};
use prost_types::Any;

use super::{
    any::{Unknown, type_name, unpack},
    chain::Context,
    cors, ext_authz, fault, header_mutation,
    http_filters::buffer_limit,
    jwt_authn, local_ratelimit, ratelimit, rbac,
    report::{Malformed, Notes, unneeded},
    structure::unwrapped,
};

/// Compiles what one level says of filters.
pub(crate) fn compile(config: &BTreeMap<String, Any>, context: &mut Context, notes: &mut Notes) -> Result<Overrides, Malformed> {
    let mut overrides = Overrides::new();
    for (filter, any) in config {
        notes.within(format!("typed_per_filter_config[{filter}]"), |notes| {
            if !context.filter_names.contains(filter) {
                // istiod leaves such behind, for stateful sessions for instance (contract xds §4.10).
                notes.ignore("", "the chain has no such filter");
                return Ok(());
            }
            if let Some(word) = word(any, context, notes)? {
                context.overridden.insert(filter.clone());
                overrides.insert(filter.as_str().into(), Arc::new(word));
            }
            Ok(())
        })?;
    }
    Ok(overrides)
}

/// What is said of one filter.
fn word(any: &Any, context: &mut Context, notes: &mut Notes) -> Result<Option<PerRoute>, Malformed> {
    if type_name(&any.type_url) != "envoy.config.route.v3.FilterConfig" {
        let config = config(any, context, notes)?;
        return Ok(config.map(|config| PerRoute {
            disabled: false,
            config: Some(config),
        }));
    }
    let FilterConfig {
        config: inner,
        is_optional,
        disabled,
    } = unpack(any, Unknown::Refuses, notes)?;
    // Optional means "where the proxy knows it": another proxy would, and would decide by it.
    unneeded!(is_optional);
    if disabled {
        return Ok(Some(PerRoute {
            disabled: true,
            config: None,
        }));
    }
    match inner {
        None => Err(notes.malformed("", "neither turns the filter off nor configures it")),
        // An empty configuration turns on a filter that is off elsewhere.
        Some(inner) if inner.type_url.is_empty() => Ok(Some(PerRoute::default())),
        Some(inner) => {
            let config = notes.within("config", |notes| config(&inner, context, notes))?;
            Ok(config.map(|config| PerRoute {
                disabled: false,
                config: Some(config),
            }))
        }
    }
}

/// The configuration of a filter, by its type.
fn config(any: &Any, context: &mut Context, notes: &mut Notes) -> Result<Option<RouteConfig>, Malformed> {
    let any = &*unwrapped(any, notes)?;
    Ok(Some(match type_name(&any.type_url) {
        "envoy.extensions.filters.http.rbac.v3.RBACPerRoute" => {
            let RbacPerRoute { rbac } = unpack(any, Unknown::Refuses, notes)?;
            let rbac = rbac.map(|filter| notes.within("rbac", |notes| rbac::http(filter, notes)));
            RouteConfig::Rbac(rbac.transpose()?.map(Arc::new))
        }
        "envoy.extensions.filters.http.fault.v3.HTTPFault" => {
            RouteConfig::Fault(Arc::new(fault::compile(unpack(any, Unknown::Refuses, notes)?, notes)?))
        }
        "envoy.extensions.filters.http.cors.v3.CorsPolicy" => {
            RouteConfig::Cors(Arc::new(cors::compile(unpack(any, Unknown::Refuses, notes)?, notes)?))
        }
        "envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit" => {
            let limit = local_ratelimit::compile(unpack(any, Unknown::Refuses, notes)?, context, notes)?;
            RouteConfig::LocalRateLimit(Arc::new(limit))
        }
        "envoy.extensions.filters.http.header_mutation.v3.HeaderMutationPerRoute" => {
            let HeaderMutationPerRoute { mutations } = unpack(any, Unknown::Refuses, notes)?;
            RouteConfig::HeaderMutation(Arc::new(header_mutation::mutations(mutations, notes)?))
        }
        "envoy.extensions.filters.http.buffer.v3.BufferPerRoute" => {
            let BufferPerRoute { r#override } = unpack(any, Unknown::Refuses, notes)?;
            match r#override {
                Some(BufferOverride::Disabled(true)) => RouteConfig::Buffer(None),
                Some(BufferOverride::Buffer(buffer)) => RouteConfig::Buffer(Some(buffer_limit(buffer, notes)?)),
                Some(BufferOverride::Disabled(false)) | None => return Err(notes.malformed("", "says nothing")),
            }
        }
        "envoy.extensions.filters.http.jwt_authn.v3.PerRouteConfig" => {
            RouteConfig::Jwt(jwt_authn::on_route(unpack(any, Unknown::Refuses, notes)?, notes)?)
        }
        "envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute" => {
            let here = ext_authz::on_route(unpack(any, Unknown::Refuses, notes)?, context, notes)?;
            let Some(here) = here else { return Ok(None) };
            RouteConfig::ExtAuthz(Arc::new(here))
        }
        "envoy.extensions.filters.http.ratelimit.v3.RateLimitPerRoute" => {
            RouteConfig::RateLimit(Arc::new(ratelimit::on_route(unpack(any, Unknown::Refuses, notes)?, notes)?))
        }
        other => {
            notes.refuse("", format!("{other} is not supported yet"));
            return Ok(None);
        }
    }))
}
