//! HTTP filters (contract xds §3.2): which of a chain's filters are done here, and which refuse it.
//!
//! Filters are known by the type of their configuration, never by name (contract xds §3.17). A filter that is not known, or not
//! there yet, refuses the chain: nobody can tell from outside whether it was the one that would have denied.

use std::sync::Arc;

use cairn_filters::{Filter, FilterChain};
use cairn_proto::envoy::extensions::filters::{
    http::{
        cors::v3::Cors,
        dynamic_forward_proxy::v3::{FilterConfig as ForwardProxy, filter_config::ImplementationSpecifier},
        fault::v3::HttpFault,
        grpc_stats::v3::FilterConfig as GrpcStats,
        router::v3::Router,
    },
    network::http_connection_manager::v3::{HttpFilter, http_filter::ConfigType},
};
use prost_types::{Struct, value::Kind};

use super::{
    any::{Typed, Unknown, typed, unpack},
    chain::{self, Context},
    header_mutation, rbac,
    report::{Malformed, Notes, Present as _, ignore_set, refuse_set, unneeded},
};

/// The filters of a chain.
#[derive(Debug, Default)]
pub(crate) struct Compiled {
    /// Those that work on requests.
    pub chain: FilterChain,
    /// Whether Istio's metrics are recorded.
    pub metrics: bool,
    /// Whether the router leaves out Envoy's own headers.
    pub suppress_envoy_headers: bool,
}

/// Compiles the filters of a chain; the last one has to be the router.
pub(crate) fn compile(filters: Vec<HttpFilter>, context: &mut Context, notes: &mut Notes) -> Result<Compiled, Malformed> {
    let mut compiled = Compiled::default();
    let mut chain = Vec::new();
    let mut routed = false;
    for (index, filter) in filters.into_iter().enumerate() {
        if routed {
            return Err(notes.malformed("http_filters", "go on after the router"));
        }
        routed = notes.at("http_filters", index, |notes| {
            compile_filter(filter, &mut chain, &mut compiled, context, notes)
        })?;
    }
    if !routed {
        return Err(notes.malformed("http_filters", "do not end in a router"));
    }
    compiled.chain = FilterChain::new(chain);
    Ok(compiled)
}

/// Compiles one filter; `true` for the router.
fn compile_filter(
    filter: HttpFilter,
    chain: &mut Vec<Filter>,
    compiled: &mut Compiled,
    context: &mut Context,
    notes: &mut Notes,
) -> Result<bool, Malformed> {
    let HttpFilter {
        name,
        is_optional,
        disabled,
        config_type,
    } = filter;
    // Optional means "where the proxy knows it": another proxy would, and would decide by it.
    unneeded!(is_optional);
    context.filter_names.insert(name.clone());
    if disabled {
        // It runs only on routes that say so, and such a route is refused there.
        return Ok(false);
    }
    let any = match config_type {
        Some(ConfigType::TypedConfig(any)) => any,
        Some(ConfigType::ConfigDiscovery(discovery)) => {
            chain::discovered(&name, discovery, context, notes);
            return Ok(false);
        }
        None => {
            notes.refuse("", format!("filter {name} has no configuration"));
            return Ok(false);
        }
    };
    match typed(&any, notes)? {
        Typed::Struct(kind, value) => match kind.as_str() {
            "io.istio.http.peer_metadata.Config" => peer_metadata(&value, notes),
            other => notes.refuse("", format!("filter {name} ({other}) is not supported")),
        },
        Typed::Message(kind, any) => match kind {
            "envoy.extensions.filters.http.router.v3.Router" => {
                compiled.suppress_envoy_headers = router(unpack(any, Unknown::Refuses, notes)?, notes);
                return Ok(true);
            }
            "envoy.extensions.filters.http.grpc_stats.v3.FilterConfig" => {
                let GrpcStats {
                    emit_filter_state,
                    enable_upstream_stats,
                    replace_dots_in_grpc_service_name,
                    per_method_stat_specifier,
                } = unpack(any, Unknown::Ignored, notes)?;
                // Envoy's own gRPC counters are not among those that anyone reads from a waypoint.
                unneeded!(
                    enable_upstream_stats,
                    replace_dots_in_grpc_service_name,
                    per_method_stat_specifier
                );
                if emit_filter_state {
                    chain.push(Filter::GrpcStats);
                }
            }
            "envoy.extensions.filters.http.fault.v3.HTTPFault" => {
                // istiod's is empty: faults stand on routes (contract xds §3.8), and refuse those.
                let fault: HttpFault = unpack(any, Unknown::Refuses, notes)?;
                if fault != HttpFault::default() {
                    notes.refuse("", "faults are not supported yet");
                }
            }
            "envoy.extensions.filters.http.cors.v3.Cors" => {
                let Cors {} = unpack(any, Unknown::Refuses, notes)?;
            }
            "envoy.extensions.filters.http.dynamic_forward_proxy.v3.FilterConfig" => {
                // It looks hosts up for clusters that go by them, which do so themselves; the cache is that of the cluster.
                let ForwardProxy {
                    save_upstream_address,
                    allow_dynamic_host_from_filter_state,
                    implementation_specifier,
                } = unpack(any, Unknown::Refuses, notes)?;
                unneeded!(save_upstream_address);
                refuse_set!(notes, allow_dynamic_host_from_filter_state);
                if let Some(ImplementationSpecifier::SubClusterConfig(_)) = implementation_specifier {
                    notes.refuse("sub_cluster_config", "is not supported");
                }
            }
            "envoy.extensions.filters.http.header_mutation.v3.HeaderMutation" => {
                let filter = header_mutation::compile(unpack(any, Unknown::Refuses, notes)?, notes)?;
                chain.push(Filter::HeaderMutation(Arc::new(filter)));
            }
            "envoy.extensions.filters.http.rbac.v3.RBAC" => {
                let filter = rbac::http(unpack(any, Unknown::Refuses, notes)?, notes)?;
                chain.push(Filter::Rbac(Arc::new(filter)));
            }
            "stats.PluginConfig" => {
                chain::stats(unpack(any, Unknown::Ignored, notes)?, notes)?;
                compiled.metrics = true;
            }
            other => notes.refuse("", format!("filter {name} ({other}) is not supported yet")),
        },
    }
    Ok(false)
}

/// Peers are found by address in workload discovery (contract runtime §7.3); anything else that this filter can do is listed.
pub(crate) fn peer_metadata(config: &Struct, notes: &mut Notes) {
    for (key, value) in &config.fields {
        match (key.as_str(), value.kind.as_ref()) {
            ("downstream_discovery" | "upstream_discovery", Some(Kind::ListValue(methods))) => {
                for method in &methods.values {
                    let Some(Kind::StructValue(method)) = &method.kind else {
                        continue;
                    };
                    for name in method.fields.keys().filter(|name| *name != "workload_discovery") {
                        notes.ignore(key, format!("discovery of peers by {name} is not supported yet"));
                    }
                }
            }
            ("shared_with_upstream", _) => {}
            _ => notes.ignore(key, "is not supported yet"),
        }
    }
}

/// Whether Envoy's own headers are left out.
pub(crate) fn router(router: Router, notes: &mut Notes) -> bool {
    let Router {
        dynamic_stats,
        start_child_span,
        upstream_log,
        upstream_log_options,
        suppress_envoy_headers,
        strict_check_headers,
        respect_expected_rq_timeout,
        suppress_grpc_request_failure_code_stats,
        upstream_http_filters,
        reject_connect_request_early_data,
    } = router;
    unneeded!(
        dynamic_stats,
        suppress_grpc_request_failure_code_stats,
        reject_connect_request_early_data
    );
    ignore_set!(notes, start_child_span, upstream_log, upstream_log_options);
    refuse_set!(notes, strict_check_headers, upstream_http_filters);
    if respect_expected_rq_timeout.present() {
        notes.refuse("respect_expected_rq_timeout", "is not supported");
    }
    suppress_envoy_headers
}
