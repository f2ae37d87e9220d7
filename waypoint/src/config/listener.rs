//! What all listeners have (contract xds §2.1, §2.3): addresses, the listener filters that look at connections first, chains, and
//! the matcher that chooses among them.

use std::net::SocketAddr;

use bytes::Bytes;
use cairn_proto::{
    envoy::config::{
        accesslog::v3::{AccessLog, ResponseFlagFilter, access_log_filter::FilterSpecifier},
        listener::v3::{AdditionalAddress, FilterChain, Listener, ListenerFilter, listener::ListenerSpecifier, listener_filter},
    },
    xds::r#type::matcher::v3::Matcher,
};

use super::{
    any::{Unknown, decode, type_name},
    report::{Malformed, Notes, ignore_set, refuse_set, unneeded},
    value::{Place, place},
};

/// What a listener says, its chains apart.
#[derive(Debug, Default)]
pub(crate) struct Parts {
    /// Where it listens.
    pub addresses: Vec<SocketAddr>,
    /// Whether it is one of Envoy's own, without an address.
    pub internal: bool,
    /// Its chains, where they are wanted.
    pub chains: Vec<FilterChain>,
    /// Which chain serves which connection.
    pub matcher: Option<Matcher>,
    /// Its logs: of connections, not of requests.
    pub access_log: Vec<AccessLog>,
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
    ignore_set!(notes, socket_options, tcp_fast_open_queue_length, tcp_keepalive, freebind);
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
        // What is listed refuses the listener.
        Place::Elsewhere => Ok(()),
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
        access_log,
    })
}

/// Lists logs of a listener of which every connection has a chain. Istio's are of those without (contract runtime §7.5).
pub(crate) fn check_logs(logs: &[AccessLog], notes: &mut Notes) {
    if !logs.iter().all(only_without_chain) {
        notes.ignore("access_log", "is not supported");
    }
}

/// Whether a log has lines for connections without a chain alone.
fn only_without_chain(log: &AccessLog) -> bool {
    let filter = log.filter.as_ref().and_then(|filter| filter.filter_specifier.as_ref());
    matches!(filter, Some(FilterSpecifier::ResponseFlagFilter(ResponseFlagFilter { flags })) if *flags == ["NR"])
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
