//! The listeners that carry connections out through tunnels (contract xds §2.8, §2.9): nothing listens for them here, and what they ask
//! for is checked against what we do.

use bytes::Bytes;
use cairn_proto::envoy::{
    config::{
        core::v3::HeaderValueOption,
        listener::v3::{Filter, FilterChain, filter},
    },
    extensions::filters::network::tcp_proxy::v3::{
        TcpProxy,
        tcp_proxy::{ClusterSpecifier, TunnelingConfig},
    },
};

use http::{HeaderName, HeaderValue};

use super::{
    any::{Typed, Unknown, typed, unpack},
    chain,
    listener::{self, Parts},
    report::{Malformed, Notes, Unsupported, ignore_set, refuse_set, unneeded},
};

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
        access_log,
    } = listener::take(bytes, notes)?;
    listener::check_logs(&access_log, notes);
    refuse_set!(notes, matcher, addresses);
    if !internal {
        notes.refuse("internal_listener", "is missing");
    }
    let [chain] = <[FilterChain; 1]>::try_from(chains)
        .map_err(|chains| notes.malformed("filter_chains", format!("there are {}, where one is expected", chains.len())))?;
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
    notes.within("filter_chains[0]", |notes| {
        refuse_set!(notes, filter_chain_match, transport_socket);
        if use_proxy_proto == Some(true) {
            notes.refuse("use_proxy_proto", "is not supported");
        }
    });
    let mut ends = false;
    let mut headers = Vec::new();
    for (index, filter) in filters.into_iter().enumerate() {
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
                    ends = true;
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
    if !ends {
        return Err(notes.malformed("filter_chains[0].filters", "open no tunnels"));
    }
    let listener = TunnelListener {
        refusal: notes.refusal(),
        headers,
    };
    Ok((listener, std::mem::replace(notes, Notes::of(name)).into_list()))
}

/// The headers that tunnels of this listener are opened with.
fn check_tunnel(name: &str, proxy: TcpProxy, notes: &mut Notes) -> Result<Vec<(HeaderName, HeaderValue)>, Malformed> {
    let TcpProxy {
        stat_prefix,
        on_demand,
        metadata_match,
        idle_timeout,
        downstream_idle_timeout,
        upstream_idle_timeout,
        access_log,
        max_connect_attempts,
        backoff_options,
        hash_policy,
        tunneling_config,
        max_downstream_connection_duration,
        max_downstream_connection_duration_jitter_percentage,
        access_log_flush_interval,
        flush_access_log_on_connected,
        access_log_options,
        proxy_protocol_tlvs,
        proxy_protocol_tlv_merge_policy,
        upstream_connect_mode,
        max_early_data_bytes,
        check_drain_close,
        cluster_specifier,
    } = proxy;
    // A tunnel lives as long as the connection in it, whose chain has limits of its own; its endpoint is chosen before it is opened.
    unneeded!(
        stat_prefix,
        idle_timeout,
        downstream_idle_timeout,
        upstream_idle_timeout,
        hash_policy,
        proxy_protocol_tlv_merge_policy,
        max_early_data_bytes,
        check_drain_close
    );
    unneeded!(access_log_flush_interval, flush_access_log_on_connected, access_log_options);
    ignore_set!(
        notes,
        max_connect_attempts,
        backoff_options,
        max_downstream_connection_duration,
        max_downstream_connection_duration_jitter_percentage
    );
    refuse_set!(notes, on_demand, metadata_match, proxy_protocol_tlvs, upstream_connect_mode);
    if !access_log.is_empty() {
        notes.ignore(
            "access_log",
            "tunnels have no lines of their own; the request's line says that its tunnel failed",
        );
    }
    if cluster_specifier != Some(ClusterSpecifier::Cluster(name.to_owned())) {
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
    }) = tunneling_config
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
