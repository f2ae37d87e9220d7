//! `connect_terminate` (contract xds §2.2): who may open tunnels, and how they are accepted.
//!
//! What is different from what istiod sends refuses all tunnels: nobody can tell who would have got through.

use bytes::Bytes;
use cairn_identity::ServerTerms;
use cairn_policy::{
    headers::{HeaderEdits, outgoing::ServerHeader},
    matcher::PathMatch,
    rbac::{Filters, Rbac},
    route::{Domain, Forward, RouteMatch, Target},
};
use cairn_proto::envoy::{
    config::{
        core::v3::KeepaliveSettings,
        listener::v3::{Filter, FilterChain, filter},
    },
    extensions::{
        filters::{
            http::set_filter_state::v3::Config as SetFilterState,
            network::http_connection_manager::v3::{
                HttpConnectionManager, HttpFilter, http_connection_manager::RouteSpecifier, http_filter,
            },
        },
        transport_sockets::tls::v3::DownstreamTlsContext,
    },
};
use cairn_telemetry::access_log::AccessLog;

use super::{
    access_log,
    any::{Typed, Unknown, type_name, typed, unpack},
    chain::{self, Context, Outputs},
    hcm, http_filters,
    listener::{self, Parts},
    rbac,
    report::{Malformed, Notes, Unsupported, ignore_set, refuse_set, unneeded},
    route,
};
use crate::snapshot::{Refusal, Terminate};

/// Compiles `connect_terminate`.
pub(crate) fn terminate(name: &str, bytes: &Bytes, outputs: &Outputs) -> Result<(Terminate, Vec<Unsupported>), Malformed> {
    let mut notes = Notes::of(name);
    let notes = &mut notes;
    let Parts {
        addresses,
        internal,
        chains,
        matcher,
        access_log: connection_logs,
    } = listener::take(bytes, notes)?;
    listener::check_logs(&connection_logs, notes);
    refuse_set!(notes, matcher);
    if internal || addresses.is_empty() {
        return Err(notes.malformed("address", "is missing"));
    }
    let [chain] = <[FilterChain; 1]>::try_from(chains).map_err(|chains| {
        notes.malformed(
            "filter_chains",
            format!("there are {}, where tunnels need exactly one", chains.len()),
        )
    })?;
    let FilterChain {
        filter_chain_match,
        filters,
        use_proxy_proto,
        metadata,
        transport_socket,
        transport_socket_connect_timeout,
        name: _,
    } = chain;
    unneeded!(metadata, transport_socket_connect_timeout);
    refuse_set!(notes, filter_chain_match);
    if use_proxy_proto == Some(true) {
        notes.refuse("filter_chains[0].use_proxy_proto", "is not supported");
    }
    let tls = server_tls(transport_socket, notes)?;
    let mut terms = None;
    for (index, filter) in filters.into_iter().enumerate() {
        notes.at("filter_chains[0].filters", index, |notes| {
            let Filter { name, config_type } = filter;
            match config_type {
                Some(filter::ConfigType::TypedConfig(any)) if type_name(&any.type_url) == MANAGER && terms.is_none() => {
                    terms = Some(manager(unpack(&any, Unknown::Refuses, notes)?, outputs, notes)?);
                }
                _ => notes.refuse(
                    "",
                    format!("filter {name} is not supported before or after the one that accepts tunnels"),
                ),
            }
            Ok(())
        })?;
    }
    let Terms {
        max_concurrent_streams,
        keepalive,
        rbac,
        server,
        access_logs,
    } = terms.ok_or_else(|| notes.malformed("filter_chains[0].filters", "accept no tunnels"))?;
    let refuse = notes.refusal().map(Refusal::because);
    let terminate = Terminate {
        addresses,
        tls,
        max_concurrent_streams,
        keepalive,
        rbac,
        server,
        access_logs,
        refuse,
    };
    Ok((terminate, std::mem::replace(notes, Notes::of(name)).into_list()))
}

const MANAGER: &str = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";

/// Streams that a tunnel may have open where istiod does not say; Envoy's default is beyond any use.
const DEFAULT_STREAMS: u32 = 1024;

fn server_tls(
    socket: Option<cairn_proto::envoy::config::core::v3::TransportSocket>,
    notes: &mut Notes,
) -> Result<ServerTerms, Malformed> {
    use cairn_proto::envoy::config::core::v3::transport_socket::ConfigType;
    notes.within("filter_chains[0].transport_socket", |notes| {
        let Some(ConfigType::TypedConfig(any)) = socket.and_then(|socket| socket.config_type) else {
            return Err(notes.malformed("", "is missing: tunnels need TLS"));
        };
        let context: DownstreamTlsContext = unpack(&any, Unknown::Refuses, notes)?;
        super::tls::server_terms(context, notes)
    })
}

type Keepalive = Option<(std::time::Duration, std::time::Duration)>;

/// What the connection manager of tunnels says.
struct Terms {
    max_concurrent_streams: u32,
    keepalive: Keepalive,
    rbac: Filters,
    server: ServerHeader,
    access_logs: AccessLog,
}

fn manager(manager: HttpConnectionManager, outputs: &Outputs, notes: &mut Notes) -> Result<Terms, Malformed> {
    let taken = hcm::take(manager, hcm::Where::Tunnel, notes)?;
    let mut routed = false;
    let mut rbac = Vec::new();
    let mut context = Context::default();
    for (index, filter) in taken.http_filters.into_iter().enumerate() {
        // A route may change any of them, also one that is turned off.
        context.filter_names.insert(filter.name.clone());
        routed |= notes.at("http_filters", index, |notes| tunnel_filter(filter, &mut rbac, notes))?;
    }
    if !routed {
        return Err(notes.malformed("http_filters", "do not end in a router"));
    }
    check_route(taken.route_specifier, &mut context, notes)?;
    let keepalive = match taken.keepalive {
        None => None,
        Some(settings) => notes.within("http2_protocol_options.connection_keepalive", |notes| {
            keepalive(settings, notes)
        })?,
    };
    Ok(Terms {
        max_concurrent_streams: taken.settings.http2_max_concurrent_streams.unwrap_or(DEFAULT_STREAMS),
        keepalive,
        rbac: rbac.into_iter().collect(),
        server: taken.settings.server,
        access_logs: access_log::refusals(taken.access_log, outputs, notes)?,
    })
}

/// Checks the routes: every CONNECT goes to `main_internal`, nothing else goes anywhere (contract xds §2.2). A route that changes what
/// a filter does, or anything about the request, is refused, and with it all tunnels.
fn check_route(specifier: Option<RouteSpecifier>, context: &mut Context, notes: &mut Notes) -> Result<(), Malformed> {
    let config = match specifier {
        Some(RouteSpecifier::RouteConfig(config)) => config,
        Some(RouteSpecifier::Rds(_) | RouteSpecifier::ScopedRoutes(_)) => {
            notes.refuse("route_config", "is missing: other routes are not supported");
            return Ok(());
        }
        None => return Err(notes.malformed("route_config", "is missing")),
    };
    notes.within("route_config", |notes| {
        let table = route::compile(config, context, notes)?;
        let routes: Vec<_> = table
            .hosts()
            .iter()
            .flat_map(|host| host.routes.iter().map(move |route| (host, route)))
            .collect();
        let edited = |request: &HeaderEdits, response: &HeaderEdits| !request.is_empty() || !response.is_empty();
        let as_expected = match routes.as_slice() {
            [(host, route)] => {
                host.domains == [Domain::Any]
                    && is_every_connect(&route.matches)
                    && route.action.forward().is_some_and(leads_inside)
                    && !edited(&table.request_edits, &table.response_edits)
                    && !edited(&host.request_edits, &host.response_edits)
                    && !edited(&route.request_edits, &route.response_edits)
                    // What is said of a filter here would have to be obeyed before there is a route.
                    && [&table.overrides, &host.overrides, &route.overrides].iter().all(|overrides| overrides.is_empty())
            }
            _ => false,
        };
        if !as_expected {
            notes.refuse(
                "",
                "tunnels are expected to have one route, for every CONNECT, to main_internal, that changes nothing",
            );
        }
        Ok(())
    })
}

fn is_every_connect(matches: &RouteMatch) -> bool {
    let RouteMatch {
        path,
        headers,
        query,
        metadata,
        grpc,
        fraction,
    } = matches;
    matches!(path.how(), PathMatch::Connect)
        && headers.is_empty()
        && query.is_empty()
        && metadata.is_empty()
        && !grpc
        && fraction.is_none()
}

fn leads_inside(forward: &Forward) -> bool {
    let Forward {
        target,
        // There is always such a cluster for us, tunnels have no end of their own here, and a refused one is not tried again.
        cluster_not_found: _,
        timeouts: _,
        retry: _,
        path_rewrite,
        host_rewrite,
        append_x_forwarded_host: _,
        hash_policies: _,
        mirrors,
        asks: _,
        // Only their filters read them, and those refuse here.
        cors: _,
        rate_limits: _,
        // CONNECT itself.
        upgrades: _,
        high_priority: _,
    } = forward;
    matches!(target, Target::Cluster(name) if &**name == "main_internal")
        && path_rewrite.is_none()
        && host_rewrite.is_none()
        && mirrors.is_empty()
}

fn keepalive(settings: KeepaliveSettings, notes: &mut Notes) -> Result<Keepalive, Malformed> {
    let KeepaliveSettings {
        interval,
        timeout,
        interval_jitter,
        connection_idle_interval,
    } = settings;
    unneeded!(interval_jitter);
    ignore_set!(notes, connection_idle_interval);
    let interval = super::value::limit("interval", interval, None, notes)?;
    let timeout = super::value::limit("timeout", timeout, None, notes)?;
    Ok(interval.zip(timeout))
}

/// A filter of `connect_terminate`; `true` for the router. What they leave for the inner connection we keep as its facts.
fn tunnel_filter(filter: HttpFilter, authorization: &mut Vec<Rbac>, notes: &mut Notes) -> Result<bool, Malformed> {
    let HttpFilter {
        name,
        is_optional,
        disabled,
        config_type,
    } = filter;
    unneeded!(is_optional);
    if disabled {
        return Ok(false);
    }
    let Some(http_filter::ConfigType::TypedConfig(any)) = config_type else {
        notes.refuse("", format!("filter {name} has no configuration of its own"));
        return Ok(false);
    };
    match typed(&any, notes)? {
        Typed::Struct(kind, value) if kind == "io.istio.http.peer_metadata.Config" => http_filters::peer_metadata(&value, notes),
        Typed::Message("envoy.extensions.filters.http.set_filter_state.v3.Config", any) => {
            let SetFilterState {
                on_request_headers,
                clear_route_cache,
            } = unpack(any, Unknown::Refuses, notes)?;
            refuse_set!(notes, clear_route_cache);
            chain::filter_state_values("on_request_headers", &on_request_headers, notes);
        }
        Typed::Message("envoy.extensions.filters.http.rbac.v3.RBAC", any) => {
            authorization.push(rbac::tunnel(unpack(any, Unknown::Refuses, notes)?, notes)?);
        }
        Typed::Message("envoy.extensions.filters.http.router.v3.Router", any) => {
            http_filters::router(unpack(any, Unknown::Refuses, notes)?, notes);
            return Ok(true);
        }
        other => notes.refuse(
            "",
            format!("filter {name} ({}) is not supported on tunnels yet", other.name()),
        ),
    }
    Ok(false)
}
