//! A limit into the filter that an EnvoyFilter would have put in, and the cluster that it asks.

use std::net::IpAddr;

use cairn_proto::envoy::{
    config::{
        cluster::v3::{
            Cluster,
            cluster::{ClusterDiscoveryType, DiscoveryType},
        },
        core::v3::{
            Address, GrpcService, Http2ProtocolOptions, RuntimeFractionalPercent, SocketAddress,
            address::Address as AddressKind,
            grpc_service::{EnvoyGrpc, TargetSpecifier},
            socket_address::PortSpecifier,
        },
        endpoint::v3::{ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints, lb_endpoint::HostIdentifier},
        ratelimit::v3::RateLimitServiceConfig,
        route::v3::{
            RateLimit,
            rate_limit::{
                Action,
                action::{ActionSpecifier, GenericKey, QueryParameters, RemoteAddress, RequestHeaders},
            },
        },
    },
    extensions::{
        common::ratelimit::v3::{LocalRateLimitDescriptor, rate_limit_descriptor::Entry},
        filters::{
            http::{local_ratelimit::v3::LocalRateLimit, ratelimit::v3::RateLimit as GlobalFilter, router::v3::Router},
            network::http_connection_manager::v3::{HttpFilter, http_filter::ConfigType},
        },
        upstreams::http::v3::{
            HttpProtocolOptions,
            http_protocol_options::{ExplicitHttpConfig, UpstreamProtocolOptions, explicit_http_config::ProtocolConfig},
        },
    },
    r#type::v3::{FractionalPercent, HttpStatus, TokenBucket},
};
use prost::Message as _;

use super::{
    ANNOTATION, any,
    object::{Global, Limit, Local, Part},
};
use crate::config::compiler::{CLUSTERS, Resource};

/// Requests that are told apart at once, where the limit does not say.
const DISTINCT: u32 = 1000;
/// The most of them: they are looked through.
const MOST_DISTINCT: u32 = 5_000;
/// How long a connection to a service that counts may take, in seconds.
const CONNECT_SECONDS: i64 = 1;

/// Where in a limit something is wrong, and what.
type Wrong = (String, String);

/// What a limit becomes.
pub(super) struct Made {
    pub filter: HttpFilter,
    pub cluster: Option<Resource>,
}

/// The filter of a limit; `index` tells it from others.
pub(super) fn limit(index: usize, limit: &Limit) -> Result<Made, Wrong> {
    let mut actions = Vec::with_capacity(limit.by.len());
    let mut entries = Vec::with_capacity(limit.by.len());
    for (number, part) in limit.by.iter().enumerate() {
        let (action, key) = action(part).map_err(|what| (format!(".by[{number}]"), what))?;
        actions.push(Action {
            action_specifier: Some(action),
        });
        entries.push(Entry {
            key,
            // Nothing stands for everything.
            value: part.is.clone().unwrap_or_default(),
        });
    }
    let rate_limits = vec![RateLimit {
        actions,
        ..RateLimit::default()
    }];
    let status = limit.status.map(|code| HttpStatus { code: code.into() });
    if limit.status.is_some_and(|code| !(400..600).contains(&code)) {
        return Err((".status".to_owned(), "is no error".to_owned()));
    }
    let name = format!("{ANNOTATION}[{index}]");
    let headers = i32::from(limit.headers);
    let (config, cluster) = match (&limit.local, &limit.global) {
        (Some(local), _) => {
            let filter = local_filter(local, entries, rate_limits)?;
            let filter = LocalRateLimit {
                stat_prefix: name.clone(),
                status,
                enable_x_ratelimit_headers: headers,
                ..filter
            };
            let kind = "envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit";
            (any(kind, filter.encode_to_vec()), None)
        }
        (None, Some(global)) => {
            if let Some(at) = limit.by.iter().position(|part| part.is.is_some()) {
                return Err((
                    format!(".by[{at}].is"),
                    "is for `local`; a service has rules of its own".to_owned(),
                ));
            }
            let (filter, cluster) = global_filter(global, rate_limits)?;
            let filter = GlobalFilter {
                rate_limited_status: status,
                enable_x_ratelimit_headers: headers,
                ..filter
            };
            let kind = "envoy.extensions.filters.http.ratelimit.v3.RateLimit";
            (any(kind, filter.encode_to_vec()), cluster)
        }
        (None, None) => return Err((String::new(), "has to have either `local` or `global`".to_owned())),
    };
    let filter = HttpFilter {
        name,
        config_type: Some(ConfigType::TypedConfig(config)),
        ..HttpFilter::default()
    };
    Ok(Made { filter, cluster })
}

/// The filter that ends a chain.
pub(super) fn router() -> HttpFilter {
    let config = any(
        "envoy.extensions.filters.http.router.v3.Router",
        Router::default().encode_to_vec(),
    );
    HttpFilter {
        name: "envoy.filters.http.router".to_owned(),
        config_type: Some(ConfigType::TypedConfig(config)),
        ..HttpFilter::default()
    }
}

fn local_filter(local: &Local, entries: Vec<Entry>, rate_limits: Vec<RateLimit>) -> Result<LocalRateLimit, Wrong> {
    let distinct = local.distinct.unwrap_or(DISTINCT);
    if !(1..=MOST_DISTINCT).contains(&distinct) {
        return Err((".local.distinct".to_owned(), format!("has to be from 1 to {MOST_DISTINCT}")));
    }
    let bucket = TokenBucket {
        max_tokens: local.burst.unwrap_or(local.requests),
        tokens_per_fill: Some(local.requests),
        fill_interval: Some(time(".local.per", &local.per)?),
    };
    let all = Some(RuntimeFractionalPercent {
        default_value: Some(FractionalPercent {
            numerator: 100,
            denominator: 0,
        }),
        runtime_key: String::new(),
    });
    let filter = LocalRateLimit {
        filter_enabled: all.clone(),
        filter_enforced: all,
        max_dynamic_descriptors: Some(distinct),
        ..LocalRateLimit::default()
    };
    Ok(if entries.is_empty() {
        LocalRateLimit {
            token_bucket: Some(bucket),
            ..filter
        }
    } else {
        LocalRateLimit {
            rate_limits,
            descriptors: vec![LocalRateLimitDescriptor {
                entries,
                token_bucket: Some(bucket),
                shadow_mode: false,
            }],
            ..filter
        }
    })
}

fn global_filter(global: &Global, rate_limits: Vec<RateLimit>) -> Result<(GlobalFilter, Option<Resource>), Wrong> {
    let (name, authority, cluster) = match (&global.service, &global.cluster) {
        (Some(service), None) => {
            let cluster = cluster_of(service).map_err(|what| (".global.service".to_owned(), what))?;
            (cluster.name.clone(), service.clone(), Some(cluster))
        }
        (None, Some(cluster)) => (cluster.clone(), String::new(), None),
        _ => return Err((".global".to_owned(), "has to have either `service` or `cluster`".to_owned())),
    };
    let timeout = global
        .timeout
        .as_deref()
        .map(|text| time(".global.timeout", text))
        .transpose()?;
    let grpc = GrpcService {
        target_specifier: Some(TargetSpecifier::EnvoyGrpc(EnvoyGrpc {
            cluster_name: name,
            authority,
            ..EnvoyGrpc::default()
        })),
        ..GrpcService::default()
    };
    let filter = GlobalFilter {
        domain: global.domain.clone(),
        timeout,
        failure_mode_deny: global.fail_closed,
        rate_limit_service: Some(RateLimitServiceConfig {
            grpc_service: Some(grpc),
            ..RateLimitServiceConfig::default()
        }),
        rate_limits,
        ..GlobalFilter::default()
    };
    Ok((filter, cluster))
}

/// The action of a part, and its key.
fn action(part: &Part) -> Result<(ActionSpecifier, String), String> {
    let Part {
        key,
        header,
        query,
        address,
        principal,
        path,
        method,
        value,
        cel,
        is: _,
    } = part;
    let named = |otherwise: &str| key.clone().unwrap_or_else(|| otherwise.to_owned());
    let formatted = |name: &str, format: String| {
        let descriptor_key = named(name);
        let action = GenericKey {
            descriptor_value: format,
            descriptor_key: descriptor_key.clone(),
            ..GenericKey::default()
        };
        (ActionSpecifier::GenericKey(action), descriptor_key)
    };
    let mut all = Vec::new();
    if let Some(name) = header {
        let descriptor_key = named(name);
        let action = RequestHeaders {
            header_name: name.clone(),
            descriptor_key: descriptor_key.clone(),
            skip_if_absent: false,
        };
        all.push((ActionSpecifier::RequestHeaders(action), descriptor_key));
    }
    if let Some(name) = query {
        let descriptor_key = named(name);
        let action = QueryParameters {
            query_parameter_name: name.clone(),
            descriptor_key: descriptor_key.clone(),
            skip_if_absent: false,
        };
        all.push((ActionSpecifier::QueryParameters(action), descriptor_key));
    }
    if *address {
        if key.is_some() {
            return Err("`address` has the key `remote_address`, and no other".to_owned());
        }
        all.push((ActionSpecifier::RemoteAddress(RemoteAddress {}), "remote_address".to_owned()));
    }
    if *principal {
        all.push(formatted(
            "principal",
            "%FILTER_STATE(io.istio.peer_principal:PLAIN)%".to_owned(),
        ));
    }
    if *path {
        all.push(formatted("path", "%PATH(NQ)%".to_owned()));
    }
    if *method {
        all.push(formatted("method", "%REQ(:METHOD)%".to_owned()));
    }
    if let Some(value) = value {
        all.push(formatted("value", value.replace('%', "%%")));
    }
    if let Some(expression) = cel {
        all.push(formatted("cel", format!("%CEL({expression})%")));
    }
    match <[_; 1]>::try_from(all) {
        Ok([one]) => Ok(one),
        Err(_) => Err("has to have one of header, query, address, principal, path, method, value, cel".to_owned()),
    }
}

/// A time as `1m30s`.
fn time(place: &str, text: &str) -> Result<prost_types::Duration, Wrong> {
    let wrong = |what: String| (place.to_owned(), format!("`{text}` is no time: {what}"));
    let time = humantime::parse_duration(text).map_err(|error| wrong(error.to_string()))?;
    time.try_into().map_err(|_| wrong("it is too long".to_owned()))
}

/// The cluster of a service at `host:port`, in plain HTTP/2.
fn cluster_of(service: &str) -> Result<Resource, String> {
    let no = || format!("`{service}` is no host:port");
    let (host, port) = service.rsplit_once(':').ok_or_else(no)?;
    let port: u16 = port.parse().ok().filter(|port| *port > 0).ok_or_else(no)?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    if host.is_empty() {
        return Err(no());
    }
    let discovery = if host.parse::<IpAddr>().is_ok() {
        DiscoveryType::Static
    } else {
        DiscoveryType::StrictDns
    };
    let name = format!("{ANNOTATION}|{service}");
    let address = Address {
        address: Some(AddressKind::SocketAddress(SocketAddress {
            address: host.to_owned(),
            port_specifier: Some(PortSpecifier::PortValue(port.into())),
            ..SocketAddress::default()
        })),
    };
    let endpoint = LbEndpoint {
        host_identifier: Some(HostIdentifier::Endpoint(Endpoint {
            address: Some(address),
            ..Endpoint::default()
        })),
        ..LbEndpoint::default()
    };
    let options = HttpProtocolOptions {
        upstream_protocol_options: Some(UpstreamProtocolOptions::ExplicitHttpConfig(ExplicitHttpConfig {
            protocol_config: Some(ProtocolConfig::Http2ProtocolOptions(Http2ProtocolOptions::default())),
        })),
        ..HttpProtocolOptions::default()
    };
    const OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
    let cluster = Cluster {
        name: name.clone(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(discovery as i32)),
        connect_timeout: Some(prost_types::Duration {
            seconds: CONNECT_SECONDS,
            nanos: 0,
        }),
        load_assignment: Some(ClusterLoadAssignment {
            cluster_name: name.clone(),
            endpoints: vec![LocalityLbEndpoints {
                lb_endpoints: vec![endpoint],
                ..LocalityLbEndpoints::default()
            }],
            ..ClusterLoadAssignment::default()
        }),
        typed_extension_protocol_options: [(OPTIONS.to_owned(), any(OPTIONS, options.encode_to_vec()))].into(),
        ..Cluster::default()
    };
    Ok(Resource {
        name,
        version: String::new(),
        type_url: CLUSTERS.to_owned(),
        bytes: cluster.encode_to_vec().into(),
    })
}
