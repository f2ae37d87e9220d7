//! Listeners (contract xds §2.1–§2.9): the fields that all of them have, `connect_terminate`, and the listeners that open
//! tunnels.

use std::net::SocketAddr;

use bytes::Bytes;
use cairn_identity::ServerTerms;
use cairn_policy::{
    headers::outgoing::ServerHeader,
    rbac::{Filters, Rbac},
};
use cairn_proto::{
    envoy::{
        config::{
            core::v3::{HeaderValueOption, KeepaliveSettings},
            listener::v3::{
                AdditionalAddress, Filter, FilterChain, Listener, ListenerFilter, filter, listener::ListenerSpecifier,
                listener_filter,
            },
        },
        extensions::{
            filters::{
                http::set_filter_state::v3::Config as SetFilterState,
                network::{
                    http_connection_manager::v3::{HttpConnectionManager, HttpFilter, http_filter},
                    tcp_proxy::v3::{
                        TcpProxy,
                        tcp_proxy::{ClusterSpecifier, TunnelingConfig},
                    },
                },
            },
            transport_sockets::tls::v3::DownstreamTlsContext,
        },
    },
    xds::r#type::matcher::v3::Matcher,
};
use http::{HeaderName, HeaderValue};

use super::{
    any::{Typed, Unknown, decode, type_name, typed, unpack},
    chain, hcm, http_filters, rbac,
    report::{Malformed, Notes, Unsupported, ignore_set, refuse_set, unneeded},
    value::{Place, place},
};
use crate::snapshot::{Refusal, Terminate};

/// Listeners that carry connections out, with the authority that each asks its tunnels for.
const ORIGINATE: [(&str, &str); 3] = [
    ("connect_originate", "%DOWNSTREAM_LOCAL_ADDRESS%"),
    (
        "inner_connect_originate",
        "%FILTER_STATE(istio.double_hbone.hbone_target_address:PLAIN)%",
    ),
    (
        "outer_connect_originate",
        "%FILTER_STATE(istio.double_hbone.hbone_target_address:PLAIN)%",
    ),
];

/// What a listener says of the tunnels that it opens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct TunnelListener {
    /// Why they are refused, if they are.
    pub refusal: Option<String>,
    /// Headers of their CONNECT.
    pub headers: Vec<(HeaderName, HeaderValue)>,
}

/// What a listener says, its chains apart.
#[derive(Debug, Default)]
pub(crate) struct Parts {
    addresses: Vec<SocketAddr>,
    internal: bool,
    chains: Vec<FilterChain>,
    /// Which chain serves which connection.
    pub matcher: Option<Matcher>,
}

/// Takes a listener apart.
pub(crate) fn take(bytes: &Bytes, notes: &mut Notes) -> Result<Parts, Malformed> {
    let listener: Listener = decode(bytes, Unknown::Refuses, notes)?;
    let Listener {
        name: _,
        address,
        additional_addresses,
        stat_prefix,
        filter_chains,
        fcds_config,
        filter_chain_matcher,
        use_original_dst,
        default_filter_chain,
        per_connection_buffer_limit_bytes,
        per_connection_buffer_high_watermark_timeout,
        metadata,
        deprecated_v1,
        drain_type,
        listener_filters,
        listener_filters_timeout,
        continue_on_listener_filters_timeout,
        transparent,
        freebind,
        socket_options,
        tcp_fast_open_queue_length,
        traffic_direction,
        udp_listener_config,
        api_listener,
        connection_balance_config,
        reuse_port,
        enable_reuse_port,
        access_log,
        tcp_backlog_size,
        max_connections_to_accept_per_socket_event,
        bind_to_port,
        enable_mptcp,
        ignore_global_conn_limit,
        bypass_overload_manager,
        tcp_keepalive,
        listener_specifier,
    } = listener;
    // How sockets are opened and buffers are sized is ours, and drain is never by configuration.
    unneeded!(
        stat_prefix,
        per_connection_buffer_limit_bytes,
        per_connection_buffer_high_watermark_timeout,
        metadata,
        deprecated_v1
    );
    unneeded!(
        drain_type,
        traffic_direction,
        connection_balance_config,
        reuse_port,
        enable_reuse_port,
        tcp_backlog_size
    );
    unneeded!(
        max_connections_to_accept_per_socket_event,
        enable_mptcp,
        ignore_global_conn_limit,
        bypass_overload_manager
    );
    // Detection does not wait on a timer of listener filters: it is open until the client or the destination speaks.
    unneeded!(listener_filters_timeout, continue_on_listener_filters_timeout);
    refuse_set!(notes, fcds_config, default_filter_chain, udp_listener_config, api_listener);
    ignore_set!(
        notes,
        access_log,
        socket_options,
        tcp_fast_open_queue_length,
        tcp_keepalive,
        freebind
    );
    for (field, set) in [
        ("use_original_dst", use_original_dst),
        ("transparent", transparent),
        ("bind_to_port", bind_to_port.map(|bind| !bind)),
    ] {
        if set == Some(true) {
            notes.refuse(field, "is not supported");
        }
    }
    for (index, filter) in listener_filters.into_iter().enumerate() {
        notes.at("listener_filters", index, |notes| check_listener_filter(filter, notes));
    }
    let mut addresses = Vec::new();
    let mut listen_at = |address, notes: &mut Notes| match place(address, notes)? {
        Place::Socket(address) => {
            addresses.push(address);
            Ok(())
        }
        Place::Host(..) | Place::Internal(..) => Err(notes.malformed("address", "is no IP address and port")),
    };
    if let Some(address) = address {
        listen_at(address, notes)?;
    }
    for AdditionalAddress {
        address,
        socket_options,
        tcp_keepalive,
    } in additional_addresses
    {
        ignore_set!(notes, socket_options, tcp_keepalive);
        if let Some(address) = address {
            notes.within("additional_addresses", |notes| listen_at(address, notes))?;
        }
    }
    let internal = match listener_specifier {
        None => false,
        Some(ListenerSpecifier::InternalListener(_)) => true,
    };
    Ok(Parts {
        addresses,
        internal,
        chains: filter_chains,
        matcher: filter_chain_matcher,
    })
}

/// istiod's listener filters find out what is spoken; which ports they leave alone follows from the matcher, which asks for what is
/// spoken only where it matters (contract xds §2.3).
fn check_listener_filter(filter: ListenerFilter, notes: &mut Notes) {
    let ListenerFilter {
        name,
        filter_disabled,
        config_type,
    } = filter;
    unneeded!(filter_disabled);
    let Some(listener_filter::ConfigType::TypedConfig(any)) = config_type else {
        notes.refuse("", format!("listener filter {name} has no configuration of its own"));
        return;
    };
    match type_name(&any.type_url) {
        "envoy.extensions.filters.listener.original_dst.v3.OriginalDst"
        | "envoy.extensions.filters.listener.http_inspector.v3.HttpInspector"
        | "envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector" => {}
        other => notes.refuse("", format!("listener filter {name} ({other}) is not supported")),
    }
}

/// Compiles `connect_terminate`.
pub(crate) fn terminate(name: &str, bytes: &Bytes) -> Result<(Terminate, Vec<Unsupported>), Malformed> {
    let mut notes = Notes::of(name);
    let notes = &mut notes;
    let Parts {
        addresses,
        internal,
        chains,
        matcher,
    } = take(bytes, notes)?;
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
                    terms = Some(manager(unpack(&any, Unknown::Refuses, notes)?, notes)?);
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
    } = terms.ok_or_else(|| notes.malformed("filter_chains[0].filters", "accept no tunnels"))?;
    let refuse = notes.refusal().map(Refusal::because);
    let terminate = Terminate {
        addresses,
        tls,
        max_concurrent_streams,
        keepalive,
        rbac,
        server,
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
}

fn manager(manager: HttpConnectionManager, notes: &mut Notes) -> Result<Terms, Malformed> {
    let taken = hcm::take(manager, hcm::Where::Tunnel, notes)?;
    if !taken.access_log.is_empty() {
        notes.ignore("access_log", "refused tunnels are not written to access logs yet");
    }
    let mut routed = false;
    let mut rbac = Vec::new();
    for (index, filter) in taken.http_filters.into_iter().enumerate() {
        routed |= notes.at("http_filters", index, |notes| tunnel_filter(filter, &mut rbac, notes))?;
    }
    if !routed {
        return Err(notes.malformed("http_filters", "do not end in a router"));
    }
    hcm::check_tunnel_route(taken.route_specifier, notes)?;
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
    })
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

/// Whether a listener is one of those that open tunnels.
pub(crate) fn is_originate(name: &str) -> bool {
    ORIGINATE.iter().any(|(known, _)| *known == name)
}

/// Checks a listener that opens tunnels against what we do: CONNECT to the endpoint's address, or, through another network's gateway,
/// to the service. What is different is listed; then the tunnels of the cluster of this name are refused.
pub(crate) fn originate(name: &str, bytes: &Bytes) -> Result<(TunnelListener, Vec<Unsupported>), Malformed> {
    let mut notes = Notes::of(name);
    let notes = &mut notes;
    let Parts {
        addresses,
        internal,
        chains,
        matcher,
    } = take(bytes, notes)?;
    refuse_set!(notes, matcher, addresses);
    if !internal {
        notes.refuse("internal_listener", "is missing");
    }
    let [chain] = <[FilterChain; 1]>::try_from(chains)
        .map_err(|chains| notes.malformed("filter_chains", format!("there are {}, where one is expected", chains.len())))?;
    let mut headers = Vec::new();
    for (index, filter) in chain.filters.into_iter().enumerate() {
        notes.at("filter_chains[0].filters", index, |notes| {
            let Filter {
                name: filter_name,
                config_type,
            } = filter;
            let Some(filter::ConfigType::TypedConfig(any)) = config_type else {
                notes.refuse("", format!("filter {filter_name} has no configuration of its own"));
                return Ok(());
            };
            match typed(&any, notes)? {
                Typed::Message("envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy", any) => {
                    headers.extend(check_tunnel(name, unpack(any, Unknown::Refuses, notes)?, notes)?);
                }
                Typed::Message("envoy.extensions.filters.network.set_filter_state.v3.Config", any) => {
                    chain::set_filter_state(unpack(any, Unknown::Refuses, notes)?, notes);
                }
                Typed::Struct(kind, _) if kind == "envoy.extensions.network_filters.peer_metadata.Config" => {
                    notes.ignore("", "baggage is not sent yet");
                }
                other => notes.refuse("", format!("filter {filter_name} ({}) is not supported", other.name())),
            }
            Ok(())
        })?;
    }
    let listener = TunnelListener {
        refusal: notes.refusal(),
        headers,
    };
    Ok((listener, std::mem::replace(notes, Notes::of(name)).into_list()))
}

/// The headers that tunnels of this listener are opened with.
fn check_tunnel(name: &str, proxy: TcpProxy, notes: &mut Notes) -> Result<Vec<(HeaderName, HeaderValue)>, Malformed> {
    if proxy.cluster_specifier != Some(ClusterSpecifier::Cluster(name.to_owned())) {
        notes.refuse("cluster", format!("is not {name}"));
    }
    let Some(TunnelingConfig {
        hostname,
        use_post,
        headers_to_add,
        propagate_response_headers,
        post_path,
        propagate_response_trailers,
        request_id_extension,
        request_id_header,
        request_id_metadata_key,
        formatters,
    }) = proxy.tunneling_config
    else {
        notes.refuse("tunneling_config", "is missing");
        return Ok(Vec::new());
    };
    unneeded!(
        propagate_response_headers,
        propagate_response_trailers,
        formatters,
        request_id_metadata_key
    );
    refuse_set!(notes, use_post, post_path, request_id_extension, request_id_header);
    if !ORIGINATE.contains(&(name, hostname.as_str())) {
        notes.refuse(
            "tunneling_config.hostname",
            format!("`{hostname}` is not what tunnels of {name} ask for"),
        );
    }
    let mut headers = Vec::new();
    for HeaderValueOption {
        header,
        append,
        append_action,
        keep_empty_value,
    } in headers_to_add
    {
        unneeded!(append, append_action, keep_empty_value);
        let header = header.unwrap_or_default();
        match header.key.as_str() {
            "x-forwarded-network" | "x-istio-source" if !header.value.contains('%') => {
                let bad = |what: String| notes.malformed("tunneling_config.headers_to_add", what);
                let name = HeaderName::try_from(header.key).map_err(|error| bad(error.to_string()))?;
                let value = HeaderValue::try_from(header.value).map_err(|error| bad(format!("{name}: {error}")))?;
                headers.push((name, value));
            }
            "baggage" => notes.ignore("tunneling_config.headers_to_add", "baggage is not sent yet"),
            other => notes.refuse("tunneling_config.headers_to_add", format!("header {other} is not sent")),
        }
    }
    Ok(headers)
}
