//! One filter chain of `main_internal` (contract xds §2.4, §2.6): its network filters in order, down to HTTP or to bytes.
//!
//! A network filter that we do not know may be the one that decides, so it refuses the chain; what was understood of the chain is
//! compiled all the same, so that it can be shown.

use std::{
    any::Any as AnyThing,
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use cairn_proto::envoy::{
    config::{
        core::v3::ExtensionConfigSource,
        listener::v3::{Filter, FilterChain, filter::ConfigType},
    },
    extensions::filters::{
        common::set_filter_state::v3::{FilterStateValue, filter_state_value::Key},
        network::{
            mongo_proxy::v3::MongoProxy,
            set_filter_state::v3::Config as SetFilterState,
            sni_dynamic_forward_proxy::v3::{FilterConfig as SniForwardProxy, filter_config::PortSpecifier},
        },
    },
};

use cairn_filters::ext_authz::network::OfConnections;
use cairn_policy::{rate_limit::TokenBucket, rbac::Rbac};
use cairn_telemetry::{access_log::LogFiles, istio::Rules, trace::NodeFacts};

use prost_types::Any;

use super::{
    any::{Typed, Unknown, decode, type_name, typed, unpack},
    ext_authz, hcm,
    live::{self, Live},
    local_ratelimit,
    own_limits::OwnLimits,
    rbac,
    report::{Malformed, Notes, Unsupported, ignore_set, refuse_set, unneeded},
    stats, structure, tcp,
};
use crate::{
    export::Exports,
    snapshot::{Chain, ChainKind, Refusal, ServerNameUse},
};

/// Where Envoy forwards TLS by its server name unless told otherwise.
const SERVER_NAME_PORT: u16 = 443;

/// Extension configurations by name.
pub(crate) type Extensions = BTreeMap<String, Any>;

/// A compiled chain and what it needs.
#[derive(Clone, Debug)]
pub(crate) struct Compiled {
    /// The chain.
    pub chain: Arc<Chain>,
    /// Clusters that it names.
    pub clusters: BTreeSet<Arc<str>>,
    /// Extension configurations that it names.
    pub extensions: BTreeSet<String>,
    /// Whether any of those has not arrived yet.
    pub extensions_missing: bool,
    /// What is not done.
    pub unsupported: Vec<Unsupported>,
}

/// Where logs and traces go, and from whom.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outputs {
    /// Where access logs are written; `None` when nothing is served.
    pub files: Option<LogFiles>,
    /// The ways to collectors.
    pub exports: Exports,
    /// Who we are to collectors.
    pub node: NodeFacts,
}

/// What the filters before the last one say.
#[derive(Debug, Default)]
pub(crate) struct Context {
    /// Istio's metrics, and how often for open connections.
    pub metrics: Option<Duration>,
    /// What each of their filters changes.
    pub metric_rules: Vec<Option<Arc<Rules>>>,
    /// RBAC filters of TCP, in order.
    pub rbac: Vec<Rbac>,
    /// Authorizers of connections, in order.
    pub authorizers: Vec<Arc<OfConnections>>,
    /// What the client's server name is used for.
    pub server_name: ServerNameUse,
    /// Clusters named so far.
    pub clusters: BTreeSet<Arc<str>>,
    /// Extension configurations named so far.
    pub extensions: BTreeSet<String>,
    /// Whether any of those has not arrived yet.
    pub extensions_missing: bool,
    /// Extension configurations that have arrived, by name.
    pub extension_configs: Arc<Extensions>,
    /// Limits that the operator has written himself.
    pub own_limits: Arc<OwnLimits>,
    /// Names of the HTTP filters of the chain.
    pub filter_names: BTreeSet<String>,
    /// Names of those of them that any route says anything of.
    pub overridden: BTreeSet<String>,
    /// Whether any route has cross-origin sharing in the old way.
    pub routes_have_cors: bool,
    /// Whether any filter counts requests, so that what they count as matters.
    pub counts_requests: bool,
    /// Buckets of connections.
    pub limits: Vec<Arc<TokenBucket>>,
    /// Live things that outlive this compilation.
    pub live: Arc<Live>,
    /// The chain's name.
    pub chain: Arc<str>,
    /// How often each content was asked for.
    kept: HashMap<(&'static str, Vec<u8>), usize>,
    /// Where logs and traces go.
    pub outputs: Outputs,
}

// === impl Context ===

impl Context {
    /// A live thing of a filter with this content, as it was before, or new.
    pub(crate) fn keep<T: AnyThing + Send + Sync>(
        &mut self,
        filter: &'static str,
        content: &[u8],
        make: impl FnOnce() -> T,
    ) -> Arc<T> {
        let nth = self.kept.entry((filter, content.to_vec())).or_default();
        let name = live::Name {
            chain: self.chain.clone(),
            filter,
            content: content.to_vec(),
            nth: *nth,
        };
        *nth += 1;
        self.live.keep(name, make)
    }
}

/// Compiles a chain.
pub(crate) fn compile(
    listener: &str,
    name: &str,
    bytes: &Bytes,
    outputs: &Outputs,
    live: &Arc<Live>,
    extensions: &Arc<Extensions>,
    own_limits: &Arc<OwnLimits>,
) -> Result<Compiled, Malformed> {
    let mut notes = Notes::of_chain(listener, name);
    let chain: FilterChain = decode(bytes, Unknown::Refuses, &mut notes)?;
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
    refuse_set!(notes, filter_chain_match, transport_socket);
    if use_proxy_proto == Some(true) {
        notes.refuse("use_proxy_proto", "is not supported");
    }
    let mut context = Context {
        outputs: outputs.clone(),
        live: live.clone(),
        extension_configs: extensions.clone(),
        own_limits: own_limits.clone(),
        chain: name.into(),
        ..Context::default()
    };
    let mut kind = None;
    for (index, filter) in filters.into_iter().enumerate() {
        if kind.is_some() {
            return Err(notes.malformed("filters", "go on after one that ends the chain"));
        }
        kind = notes.at("filters", index, |notes| compile_filter(filter, &mut context, notes))?;
    }
    if matches!(kind, Some(ChainKind::Http(_))) && !context.rbac.is_empty() {
        notes.refuse(
            "filters",
            "authorization of connections (network RBAC) before HTTP is not supported",
        );
    }
    if matches!(kind, Some(ChainKind::Http(_))) && !context.authorizers.is_empty() {
        notes.refuse(
            "filters",
            "external authorization of connections before HTTP is not supported",
        );
    }
    if matches!(kind, Some(ChainKind::Http(_))) && !context.limits.is_empty() {
        notes.refuse("filters", "a limit of connections before HTTP is not supported");
    }
    let missing = || "the configuration of a filter has not arrived yet".to_owned();
    let refuse = notes.refusal().or_else(|| context.extensions_missing.then(missing));
    let kind = match (kind, &refuse) {
        (Some(kind), _) => kind,
        (None, Some(_)) => ChainKind::Refused {
            http: name == "direct-http" || name.split('|').nth(2).is_some_and(is_http),
        },
        (None, None) => return Err(notes.malformed("filters", "end in no filter that passes anything on")),
    };
    let chain = Chain {
        name: name.into(),
        service_port: name.split('|').nth(1).and_then(|port| port.parse().ok()).unwrap_or(0),
        kind,
        refuse: refuse.map(Refusal::because),
    };
    let Context {
        metrics: _,
        metric_rules: _,
        rbac: _,
        authorizers: _,
        server_name: _,
        clusters,
        extensions,
        extensions_missing,
        extension_configs: _,
        filter_names: _,
        overridden: _,
        routes_have_cors: _,
        counts_requests: _,
        limits: _,
        live: _,
        chain: _,
        kept: _,
        outputs: _,
        own_limits: _,
    } = context;
    Ok(Compiled {
        chain: Arc::new(chain),
        clusters,
        extensions,
        extensions_missing,
        unsupported: notes.into_list(),
    })
}

/// Whether the subset part of a chain's name says HTTP: `http`, `http/v1`.
fn is_http(subset: &str) -> bool {
    subset == "http" || subset.starts_with("http/")
}

/// Compiles one network filter; the last one gives the kind of the chain.
fn compile_filter(filter: Filter, context: &mut Context, notes: &mut Notes) -> Result<Option<ChainKind>, Malformed> {
    let Filter { name, config_type } = filter;
    let any = match config_type {
        Some(ConfigType::TypedConfig(any)) => any,
        Some(ConfigType::ConfigDiscovery(discovery)) => match discovered(&name, discovery, context, notes) {
            Some(any) => any,
            None => return Ok(None),
        },
        None => {
            notes.refuse("", format!("filter {name} has no configuration"));
            return Ok(None);
        }
    };
    let any = structure::unwrapped(&any, notes)?;
    match typed(&any, notes)? {
        Typed::Struct(kind, _) => match kind.as_str() {
            // Peers tell each other who they are on TCP connections of sidecars; over HBONE they are found by address
            // (contract runtime §7.3).
            "envoy.tcp.metadataexchange.config.MetadataExchange" => {}
            "envoy.extensions.network_filters.peer_metadata.Config" => notes.ignore("", "baggage is not sent yet"),
            other => notes.refuse("", format!("filter {name} ({other}) is not supported")),
        },
        Typed::Message(kind, any) => match kind {
            "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager" => {
                let mut manager = unpack(any, Unknown::Refuses, notes)?;
                context.own_limits.add_to(&context.chain, &mut manager);
                return hcm::compile(manager, context, notes).map(|chain| Some(ChainKind::Http(chain)));
            }
            "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy" => {
                let proxy = unpack(any, Unknown::Refuses, notes)?;
                return tcp::compile(proxy, context, notes).map(|chain| Some(ChainKind::Tcp(chain)));
            }
            "envoy.extensions.filters.network.set_filter_state.v3.Config" => {
                set_filter_state(unpack(any, Unknown::Refuses, notes)?, notes)
            }
            "envoy.extensions.filters.network.mongo_proxy.v3.MongoProxy" => {
                // It counts and logs what passes (contract seen §1, row 2.6); only its delays would change anything.
                let MongoProxy {
                    stat_prefix,
                    access_log,
                    delay,
                    emit_dynamic_metadata,
                    commands,
                    max_bson_depth,
                } = unpack(any, Unknown::Refuses, notes)?;
                unneeded!(stat_prefix, commands, max_bson_depth);
                ignore_set!(notes, access_log, emit_dynamic_metadata);
                refuse_set!(notes, delay);
            }
            "envoy.extensions.filters.network.rbac.v3.RBAC" => {
                let filter = unpack(any, Unknown::Refuses, notes)?;
                context.server_name.judged |= rbac::asks_server_name(&filter);
                let filter = rbac::network(filter, notes)?;
                context.rbac.push(filter);
            }
            "envoy.extensions.filters.network.ext_authz.v3.ExtAuthz" => {
                let filter = ext_authz::network(unpack(any, Unknown::Refuses, notes)?, context, notes)?;
                context.authorizers.extend(filter.map(Arc::new));
            }
            "envoy.extensions.filters.network.sni_dynamic_forward_proxy.v3.FilterConfig" => {
                let SniForwardProxy {
                    dns_cache_config,
                    save_upstream_address,
                    port_specifier,
                } = unpack(any, Unknown::Refuses, notes)?;
                // The cache is that of the cluster, under the same name.
                unneeded!(dns_cache_config, save_upstream_address);
                let port = match port_specifier {
                    None => SERVER_NAME_PORT,
                    Some(PortSpecifier::PortValue(port)) => u16::try_from(port)
                        .ok()
                        .filter(|port| *port > 0)
                        .ok_or_else(|| notes.malformed("port_value", format!("{port} is no port")))?,
                };
                context.server_name.forward_to = Some(port);
            }
            "envoy.extensions.filters.network.local_ratelimit.v3.LocalRateLimit" => {
                let limit = local_ratelimit::network(unpack(any, Unknown::Refuses, notes)?, context, notes)?;
                context.limits.extend(limit);
            }
            "stats.PluginConfig" => {
                let (interval, rules) = stats::compile(unpack(any, Unknown::Ignored, notes)?, notes)?;
                context.metrics.get_or_insert(interval);
                stats::add(&mut context.metric_rules, rules);
            }
            other => notes.refuse("", format!("filter {name} ({other}) is not supported")),
        },
    }
    Ok(None)
}

/// The configuration of a filter that comes over ECDS, or what stands in for it; without either the chain refuses until it is there.
pub(crate) fn discovered(name: &str, discovery: ExtensionConfigSource, context: &mut Context, notes: &mut Notes) -> Option<Any> {
    let ExtensionConfigSource {
        config_source,
        default_config,
        apply_default_config_without_warming,
        type_urls,
    } = discovery;
    // Where it comes from is one stream for everything, and the default is used whenever nothing else is there.
    unneeded!(config_source, apply_default_config_without_warming);
    context.extensions.insert(name.to_owned());
    let arrived = context.extension_configs.get(name).cloned();
    let Some(config) = arrived.or(default_config) else {
        // Nothing is wrong with that: the chain is compiled anew when it is there.
        context.extensions_missing = true;
        return None;
    };
    let kind = type_name(&config.type_url);
    if !type_urls.iter().any(|allowed| type_name(allowed) == kind) {
        notes.refuse("config_discovery", format!("filter {name} may not be a {kind}"));
        return None;
    }
    Some(config)
}

/// Objects that istiod has put into filter state; we hold what they stand for as facts of the connection (contract xds §2.2,
/// §2.4).
pub(crate) fn set_filter_state(config: SetFilterState, notes: &mut Notes) {
    let SetFilterState {
        on_new_connection,
        on_downstream_tls_handshake,
        on_downstream_data,
    } = config;
    refuse_set!(notes, on_downstream_tls_handshake, on_downstream_data);
    filter_state_values("on_new_connection", &on_new_connection, notes);
}

/// Whether each value is one that we hold anyway.
pub(crate) fn filter_state_values(field: &str, values: &[FilterStateValue], notes: &mut Notes) {
    for (index, value) in values.iter().enumerate() {
        let FilterStateValue {
            factory_key,
            read_only,
            shared_with_upstream,
            skip_if_empty,
            key,
            value: content,
        } = value;
        unneeded!(factory_key, read_only, shared_with_upstream, skip_if_empty);
        let Some(Key::ObjectKey(key)) = key else {
            notes.refuse(field, "an object has no key");
            continue;
        };
        let format = format_of(content.as_ref());
        if !is_known_object(key, format.unwrap_or_default()) {
            notes.refuse(
                &format!("{field}[{index}]"),
                format!("object {key} of filter state is not known"),
            );
        }
    }
}

fn format_of(
    value: Option<&cairn_proto::envoy::extensions::filters::common::set_filter_state::v3::filter_state_value::Value>,
) -> Option<&str> {
    use cairn_proto::envoy::{
        config::core::v3::{data_source::Specifier, substitution_format_string::Format},
        extensions::filters::common::set_filter_state::v3::filter_state_value::Value,
    };
    let Value::FormatString(string) = value?;
    match string.format.as_ref()? {
        Format::TextFormat(text) => Some(text),
        Format::TextFormatSource(source) => match source.specifier.as_ref()? {
            Specifier::InlineString(text) => Some(text),
            _ => None,
        },
        Format::JsonFormat(_) => None,
    }
}

/// The objects of istiod's own filters with the formats that they have.
fn is_known_object(key: &str, format: &str) -> bool {
    match key {
        "envoy.filters.listener.original_dst.local_ip" => matches!(
            format,
            "%REQ(:AUTHORITY)%"
                | "%FILTER_STATE(envoy.filters.listener.original_dst.local_ip:PLAIN)%"
                | "%DYNAMIC_METADATA(envoy.filters.listener.original_dst:local)%"
        ),
        "io.istio.connect_authority" => format == "%REQ(:AUTHORITY)%",
        "envoy.filters.listener.original_dst.remote_ip" => format == "%DOWNSTREAM_REMOTE_ADDRESS%",
        "io.istio.peer_principal" => format == "%DOWNSTREAM_PEER_URI_SAN%",
        "io.istio.local_principal" => format == "%DOWNSTREAM_LOCAL_URI_SAN%",
        "io.istio.source" => format == "%REQ(x-istio-source)%",
        "istio.double_hbone.hbone_target_address" => format == "%DYNAMIC_METADATA(istio:double_hbone:hbone_target_address)%",
        // The address of the service for policies: the authority, or the VIP where the authority is a name (contract xds §2.4).
        "envoy.network.transport_socket.original_dst_address" => {
            format.starts_with("%CEL('envoy.filters.listener.original_dst.local_ip' in filter_state ? ")
        }
        _ => false,
    }
}
