//! HTTP filters (contract xds §3.2): which of a chain's filters are done here, and which refuse it.
//!
//! Filters are known by the type of their configuration, never by name (contract xds §3.17). A filter that is not known, or not
//! there yet, refuses the chain: nobody can tell from outside whether it was the one that would have denied.

use std::sync::{Arc, atomic::AtomicU64};

use cairn_filters::{Filter, Placed, buffer::Buffer, fault::Fault, grpc_web::GrpcWeb, local_ratelimit::LocalRateLimit};
use cairn_proto::envoy::extensions::filters::{
    http::{
        buffer::v3::Buffer as EnvoyBuffer,
        cors::v3::Cors,
        dynamic_forward_proxy::v3::{FilterConfig as ForwardProxy, filter_config::ImplementationSpecifier},
        grpc_stats::v3::FilterConfig as GrpcStats,
        grpc_web::v3::GrpcWeb as EnvoyGrpcWeb,
        router::v3::Router,
    },
    network::http_connection_manager::v3::{HttpFilter, http_filter::ConfigType},
};
use cairn_telemetry::istio::Rules;
use prost_types::{Struct, value::Kind};

use super::{
    any::{Typed, Unknown, typed, unpack},
    chain::{self, Context},
    ext_authz, fault, header_mutation, jwt_authn, local_ratelimit, ratelimit, rbac,
    report::{Malformed, Notes, Present as _, ignore_set, refuse_set, unneeded},
    set_filter_state, stats, structure,
};

/// The filters of a chain.
#[derive(Debug, Default)]
pub(crate) struct Compiled {
    /// Those that work on requests.
    pub chain: Vec<Placed>,
    /// What each filter changes of Istio's metrics; without one none are recorded.
    pub metrics: Vec<Option<Arc<Rules>>>,
    /// Whether the router leaves out Envoy's own headers.
    pub suppress_envoy_headers: bool,
}

/// Compiles the filters of a chain; the last one has to be the router.
pub(crate) fn compile(filters: Vec<HttpFilter>, context: &mut Context, notes: &mut Notes) -> Result<Compiled, Malformed> {
    let mut compiled = Compiled::default();
    let mut routed = false;
    for (index, filter) in filters.into_iter().enumerate() {
        if routed {
            return Err(notes.malformed("http_filters", "go on after the router"));
        }
        routed = notes.at("http_filters", index, |notes| {
            compile_filter(filter, &mut compiled, context, notes)
        })?;
    }
    if !routed {
        return Err(notes.malformed("http_filters", "do not end in a router"));
    }
    Ok(compiled)
}

// === impl Compiled ===

impl Compiled {
    /// Leaves out filters that do nothing by themselves and that no route says anything of; istiod puts such into every chain.
    pub fn drop_inert(&mut self, context: &Context) {
        self.chain.retain(|placed| {
            let inert = match &placed.filter {
                Filter::Fault(fault) => fault.faults.is_inert(),
                Filter::Cors => !context.routes_have_cors,
                _ => placed.off,
            };
            !inert || context.overridden.contains(&*placed.name)
        });
    }
}

/// Compiles one filter; `true` for the router.
fn compile_filter(
    filter: HttpFilter,
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
    let any = match config_type {
        Some(ConfigType::TypedConfig(any)) => any,
        Some(ConfigType::ConfigDiscovery(discovery)) => match chain::discovered(&name, discovery, context, notes) {
            Some(any) => any,
            None => return Ok(false),
        },
        None => {
            notes.refuse("", format!("filter {name} has no configuration"));
            return Ok(false);
        }
    };
    let any = structure::unwrapped(&any, notes)?;
    let filter = match typed(&any, notes)? {
        Typed::Struct(kind, value) => match kind.as_str() {
            "io.istio.http.peer_metadata.Config" => {
                peer_metadata(&value, notes);
                None
            }
            other => {
                notes.refuse("", format!("filter {name} ({other}) is not supported"));
                None
            }
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
                emit_filter_state.then_some(Filter::GrpcStats)
            }
            "envoy.extensions.filters.http.fault.v3.HTTPFault" => {
                let faults = fault::compile(unpack(any, Unknown::Refuses, notes)?, notes)?;
                Some(Filter::Fault(Arc::new(Fault {
                    faults: Arc::new(faults),
                    active: context.keep("fault", &any.value, AtomicU64::default),
                })))
            }
            "envoy.extensions.filters.http.cors.v3.Cors" => {
                let Cors {} = unpack(any, Unknown::Refuses, notes)?;
                Some(Filter::Cors)
            }
            "envoy.extensions.filters.http.set_filter_state.v3.Config" => {
                let filter = set_filter_state::compile(unpack(any, Unknown::Refuses, notes)?, notes)?;
                Some(Filter::Other(Arc::new(filter)))
            }
            "envoy.extensions.filters.http.grpc_web.v3.GrpcWeb" => {
                let EnvoyGrpcWeb {} = unpack(any, Unknown::Refuses, notes)?;
                Some(Filter::Other(Arc::new(GrpcWeb)))
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
                None
            }
            "envoy.extensions.filters.http.header_mutation.v3.HeaderMutation" => {
                let filter = header_mutation::compile(unpack(any, Unknown::Refuses, notes)?, notes)?;
                Some(Filter::HeaderMutation(Arc::new(filter)))
            }
            "envoy.extensions.filters.http.rbac.v3.RBAC" => {
                let filter = rbac::http(unpack(any, Unknown::Refuses, notes)?, notes)?;
                Some(Filter::Rbac(Arc::new(filter)))
            }
            "envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit" => {
                context.counts_requests = true;
                let limit = local_ratelimit::compile(unpack(any, Unknown::Refuses, notes)?, context, notes)?;
                let limit = Arc::new(limit);
                Some(Filter::Other(Arc::new(LocalRateLimit { limit })))
            }
            "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication" => {
                let filter = jwt_authn::compile(unpack(any, Unknown::Refuses, notes)?, context, notes)?;
                // Keys and tokens that are known stay known while the filter stays the same.
                Some(Filter::Other(context.keep("jwt_authn", &any.value, || filter)))
            }
            "envoy.extensions.filters.http.ext_authz.v3.ExtAuthz" => {
                let filter = ext_authz::http(unpack(any, Unknown::Refuses, notes)?, context, notes)?;
                filter.map(|filter| Filter::Other(Arc::new(filter)))
            }
            "envoy.extensions.filters.http.buffer.v3.Buffer" => {
                let limit = buffer_limit(unpack(any, Unknown::Refuses, notes)?, notes)?;
                Some(Filter::Other(Arc::new(Buffer { limit })))
            }
            "envoy.extensions.filters.http.ratelimit.v3.RateLimit" => {
                context.counts_requests = true;
                let filter = ratelimit::compile(unpack(any, Unknown::Refuses, notes)?, context, notes)?;
                filter.map(|filter| Filter::Other(Arc::new(filter)))
            }
            "stats.PluginConfig" => {
                let (_, rules) = stats::compile(unpack(any, Unknown::Ignored, notes)?, notes)?;
                if !disabled {
                    stats::add(&mut compiled.metrics, rules);
                }
                None
            }
            other => {
                notes.refuse("", format!("filter {name} ({other}) is not supported yet"));
                None
            }
        },
    };
    compiled.chain.extend(filter.map(|filter| Placed {
        name: name.as_str().into(),
        filter,
        off: disabled,
    }));
    Ok(false)
}

/// How much is waited for.
pub(crate) fn buffer_limit(buffer: EnvoyBuffer, notes: &Notes) -> Result<usize, Malformed> {
    let EnvoyBuffer { max_request_bytes } = buffer;
    let limit = max_request_bytes.and_then(|limit| usize::try_from(limit).ok());
    limit
        .filter(|limit| *limit > 0)
        .ok_or_else(|| notes.malformed("max_request_bytes", "is missing or zero"))
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
