//! What routes do (contract xds §4.6, §4.7): forward, redirect, or answer.

use std::time::Duration;

use cairn_exchange::Scheme;
use cairn_policy::{
    balance::Criteria,
    matcher::{HeaderName, RegexRewrite},
    rate_limit::RateLimits,
    route::{
        CookieTtl, DirectResponse, Forward, HashPolicy, HashSource, HostRewrite, PathRewrite, Redirect, RedirectPath,
        RouteAction, Target, Upgrade, WeightedCluster, WeightedClusters,
    },
    timeout::{MaxStreamDuration, RouteTimeouts},
};
use cairn_proto::envoy::{
    config::core::v3::RoutingPriority,
    config::route::v3::{
        DirectResponseAction, RedirectAction, RouteAction as EnvoyAction, WeightedCluster as EnvoyWeighted,
        redirect_action::{PathRewriteSpecifier, RedirectResponseCode, SchemeRewriteSpecifier},
        route::Action,
        route_action::{
            ClusterNotFoundResponseCode, ClusterSpecifier, HashPolicy as EnvoyHash, HostRewriteSpecifier,
            MaxStreamDuration as EnvoyStreamDuration, UpgradeConfig, hash_policy::PolicySpecifier, upgrade_config::ConnectConfig,
        },
        weighted_cluster::{ClusterWeight, cluster_weight},
    },
    r#type::matcher::v3::{RegexMatchAndSubstitute, RegexMatcher},
};
use http::{HeaderValue, StatusCode};

use super::{
    chain::Context,
    cors, headers, mirrors, per_route, rate_limits,
    report::{Malformed, Notes, ignore_set, refuse_set, unneeded},
    retry,
    route::Around,
    subsets,
    value::{duration, inline, limit},
};

/// Envoy's timeout of a route that says nothing; istiod always says something.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(15);

/// Compiles an action.
pub(crate) fn compile(
    action: Option<Action>,
    around: &Around,
    context: &mut Context,
    notes: &mut Notes,
) -> Result<RouteAction, Malformed> {
    match action {
        None => Err(notes.malformed("action", "is missing")),
        Some(Action::Route(action)) => notes
            .within("route", |notes| forward(action, around, context, notes))
            .map(|forward| RouteAction::Forward(Box::new(forward))),
        Some(Action::Redirect(action)) => notes
            .within("redirect", |notes| redirect(action, notes))
            .map(RouteAction::Redirect),
        Some(Action::DirectResponse(action)) => notes
            .within("direct_response", |notes| direct_response(action, around, notes))
            .map(RouteAction::DirectResponse),
        Some(Action::FilterAction(_)) => Ok(refused("filter_action", notes)),
        Some(Action::NonForwardingAction(_)) => Ok(refused("non_forwarding_action", notes)),
    }
}

/// An action that is not done; the route that has it is refused.
fn refused(field: &str, notes: &mut Notes) -> RouteAction {
    notes.refuse(field, "is not supported");
    RouteAction::DirectResponse(DirectResponse {
        status: StatusCode::FORBIDDEN,
        body: Default::default(),
    })
}

fn forward(action: EnvoyAction, around: &Around, context: &mut Context, notes: &mut Notes) -> Result<Forward, Malformed> {
    let EnvoyAction {
        cluster_not_found_response_code,
        metadata_match,
        prefix_rewrite,
        regex_rewrite,
        path_rewrite_policy,
        path_rewrite,
        append_x_forwarded_host,
        timeout,
        idle_timeout,
        flush_timeout,
        early_data_policy,
        retry_policy,
        retry_policy_typed_config,
        request_mirror_policies,
        priority,
        rate_limits,
        include_vh_rate_limits,
        hash_policy,
        cors,
        max_grpc_timeout,
        grpc_timeout_offset,
        upgrade_configs,
        internal_redirect_policy,
        internal_redirect_action,
        max_internal_redirects,
        hedge_policy,
        max_stream_duration,
        cluster_specifier,
        host_rewrite_specifier,
    } = action;
    unneeded!(early_data_policy, max_internal_redirects);
    ignore_set!(notes, flush_timeout, hedge_policy);
    refuse_set!(
        notes,
        path_rewrite_policy,
        path_rewrite,
        retry_policy_typed_config,
        internal_redirect_policy,
        internal_redirect_action,
    );
    let metadata_match = metadata_match.as_ref().and_then(subsets::criteria);
    let target = target(cluster_specifier, metadata_match.as_ref(), context, notes)?;
    let mut forward = Forward::to(target);
    forward.asks = metadata_match.map(Into::into);
    forward.cors = cors::of_route(cors, around.cors.as_ref(), notes)?;
    context.routes_have_cors |= forward.cors.is_some();
    if context.counts_requests {
        forward.rate_limits = RateLimits {
            own: rate_limits::compile(rate_limits, notes)?,
            include_host: include_vh_rate_limits == Some(true),
        };
    }
    forward.high_priority = match RoutingPriority::try_from(priority) {
        Ok(priority) => priority == RoutingPriority::High,
        Err(_) => return Err(notes.malformed("priority", format!("{priority} is no priority"))),
    };
    forward.cluster_not_found = match ClusterNotFoundResponseCode::try_from(cluster_not_found_response_code) {
        Ok(ClusterNotFoundResponseCode::ServiceUnavailable) => StatusCode::SERVICE_UNAVAILABLE,
        Ok(ClusterNotFoundResponseCode::NotFound) => StatusCode::NOT_FOUND,
        Ok(ClusterNotFoundResponseCode::InternalServerError) => StatusCode::INTERNAL_SERVER_ERROR,
        Err(_) => {
            return Err(notes.malformed(
                "cluster_not_found_response_code",
                format!("{cluster_not_found_response_code} is not known"),
            ));
        }
    };
    forward.timeouts = RouteTimeouts {
        timeout: limit("timeout", timeout, Some(DEFAULT_TIMEOUT), notes)?,
        max_grpc_timeout: max_grpc_timeout
            .map(|most| duration("max_grpc_timeout", most, notes))
            .transpose()?,
        grpc_timeout_offset: grpc_timeout_offset
            .map(|offset| duration("grpc_timeout_offset", offset, notes))
            .transpose()?,
        idle: idle_timeout.map(|idle| duration("idle_timeout", idle, notes)).transpose()?,
        max_stream: max_stream_duration.map(|most| max_stream(most, notes)).transpose()?,
    };
    forward.retry = match retry_policy {
        Some(policy) => Some(notes.within("retry_policy", |notes| retry::compile(policy, notes))?),
        None => around.retry.clone(),
    };
    forward.path_rewrite = match (prefix_rewrite.is_empty(), regex_rewrite) {
        (true, None) => None,
        (false, None) => Some(PathRewrite::Prefix(prefix_rewrite.into())),
        (true, Some(rewrite)) => Some(PathRewrite::Regex(substitution("regex_rewrite", rewrite, notes)?)),
        (false, Some(_)) => return Err(notes.malformed("prefix_rewrite", "stands beside regex_rewrite")),
    };
    forward.host_rewrite = host_rewrite(host_rewrite_specifier, notes)?;
    forward.append_x_forwarded_host = append_x_forwarded_host;
    forward.mirrors = match mirrors::compile(request_mirror_policies, context, notes)? {
        none if none.is_empty() => around.mirrors.clone(),
        own => own,
    };
    for (index, policy) in hash_policy.into_iter().enumerate() {
        forward
            .hash_policies
            .extend(notes.at("hash_policy", index, |notes| hash(policy, notes))?);
    }
    for UpgradeConfig {
        upgrade_type,
        enabled,
        connect_config,
    } in upgrade_configs
    {
        if let Some(ConnectConfig {
            proxy_protocol_config,
            allow_post,
        }) = &connect_config
        {
            refuse_set!(notes, proxy_protocol_config, allow_post);
        }
        let terminates_connect = connect_config.is_some();
        forward.upgrades.push(Upgrade {
            kind: upgrade_type.into(),
            enabled: enabled != Some(false),
            terminates_connect,
        });
    }
    Ok(forward)
}

fn target(
    specifier: Option<ClusterSpecifier>,
    asks: Option<&Criteria>,
    context: &mut Context,
    notes: &mut Notes,
) -> Result<Target, Malformed> {
    let not_done = |field: &str, notes: &mut Notes| {
        notes.refuse(field, "is not supported");
        Ok(Target::Cluster("".into()))
    };
    match specifier {
        None => Err(notes.malformed("cluster", "is missing")),
        Some(ClusterSpecifier::Cluster(name)) => {
            let name: std::sync::Arc<str> = name.into();
            context.clusters.insert(name.clone());
            Ok(Target::Cluster(name))
        }
        Some(ClusterSpecifier::WeightedClusters(clusters)) => notes
            .within("weighted_clusters", |notes| weighted(clusters, asks, context, notes))
            .map(Target::Weighted),
        Some(ClusterSpecifier::ClusterHeader(_)) => not_done("cluster_header", notes),
        Some(ClusterSpecifier::ClusterSpecifierPlugin(_)) => not_done("cluster_specifier_plugin", notes),
        Some(ClusterSpecifier::InlineClusterSpecifierPlugin(_)) => not_done("inline_cluster_specifier_plugin", notes),
    }
}

fn weighted(
    clusters: EnvoyWeighted,
    asks: Option<&Criteria>,
    context: &mut Context,
    notes: &mut Notes,
) -> Result<WeightedClusters, Malformed> {
    let EnvoyWeighted {
        clusters,
        total_weight,
        runtime_key_prefix,
        random_value_specifier,
    } = clusters;
    unneeded!(total_weight, runtime_key_prefix);
    refuse_set!(notes, random_value_specifier);
    let mut compiled = Vec::with_capacity(clusters.len());
    for (index, cluster) in clusters.into_iter().enumerate() {
        compiled.push(notes.at("clusters", index, |notes| weighted_cluster(cluster, asks, context, notes))?);
    }
    context.clusters.extend(compiled.iter().map(|cluster| cluster.name.clone()));
    WeightedClusters::new(compiled).map_err(|error| notes.malformed("clusters", error.to_string()))
}

fn weighted_cluster(
    cluster: ClusterWeight,
    asks: Option<&Criteria>,
    context: &mut Context,
    notes: &mut Notes,
) -> Result<WeightedCluster, Malformed> {
    let ClusterWeight {
        name,
        cluster_header,
        weight,
        metadata_match,
        request_headers_to_add,
        request_headers_to_remove,
        response_headers_to_add,
        response_headers_to_remove,
        typed_per_filter_config,
        host_rewrite_specifier,
    } = cluster;
    refuse_set!(notes, cluster_header);
    let mut compiled = WeightedCluster::new(name, weight.unwrap_or(0));
    // The route's, and its own over them.
    compiled.asks = match (asks, metadata_match.as_ref().and_then(subsets::criteria)) {
        (None, None) => None,
        (Some(asks), None) => Some(asks.clone().into()),
        (asks, Some(own)) => Some(asks.map_or(own.clone(), |asks| asks.merged(&own)).into()),
    };
    compiled.overrides = per_route::compile(&typed_per_filter_config, context, notes)?;
    compiled.request_edits = headers::edits(request_headers_to_add, request_headers_to_remove, "request_headers", notes)?;
    compiled.response_edits = headers::edits(response_headers_to_add, response_headers_to_remove, "response_headers", notes)?;
    compiled.host_rewrite = match host_rewrite_specifier {
        None => None,
        Some(cluster_weight::HostRewriteSpecifier::HostRewriteLiteral(host)) => {
            Some(header_value("host_rewrite_literal", host, notes)?)
        }
    };
    Ok(compiled)
}

pub(crate) fn header_value(field: &str, value: String, notes: &Notes) -> Result<HeaderValue, Malformed> {
    HeaderValue::try_from(value).map_err(|_| notes.malformed(field, "cannot stand in a header"))
}

fn host_rewrite(specifier: Option<HostRewriteSpecifier>, notes: &mut Notes) -> Result<Option<HostRewrite>, Malformed> {
    Ok(match specifier {
        None | Some(HostRewriteSpecifier::AutoHostRewrite(false)) => None,
        Some(HostRewriteSpecifier::HostRewriteLiteral(host)) => {
            Some(HostRewrite::Literal(header_value("host_rewrite_literal", host, notes)?))
        }
        Some(HostRewriteSpecifier::AutoHostRewrite(true)) => Some(HostRewrite::Endpoint),
        Some(HostRewriteSpecifier::HostRewriteHeader(name)) => {
            let name = http::HeaderName::try_from(&name)
                .map_err(|_| notes.malformed("host_rewrite_header", format!("`{name}` is no header name")))?;
            Some(HostRewrite::Header(name))
        }
        Some(HostRewriteSpecifier::HostRewritePathRegex(_)) => {
            notes.refuse("host_rewrite_path_regex", "is not supported");
            None
        }
        Some(HostRewriteSpecifier::HostRewrite(_)) => {
            notes.refuse("host_rewrite", "is not supported");
            None
        }
    })
}

fn substitution(field: &str, rewrite: RegexMatchAndSubstitute, notes: &Notes) -> Result<RegexRewrite, Malformed> {
    let RegexMatchAndSubstitute { pattern, substitution } = rewrite;
    let RegexMatcher { regex, engine_type: _ } = pattern.ok_or_else(|| notes.malformed(field, "has no pattern"))?;
    RegexRewrite::new(&regex, &substitution).map_err(|error| notes.malformed(field, error.to_string()))
}

fn max_stream(most: EnvoyStreamDuration, notes: &Notes) -> Result<MaxStreamDuration, Malformed> {
    let EnvoyStreamDuration {
        max_stream_duration,
        grpc_timeout_header_max,
        grpc_timeout_header_offset,
    } = most;
    let of = |field, value: Option<_>| value.map(|value| duration(field, value, notes)).transpose();
    Ok(MaxStreamDuration {
        duration: of("max_stream_duration.max_stream_duration", max_stream_duration)?,
        grpc_timeout_max: of("max_stream_duration.grpc_timeout_header_max", grpc_timeout_header_max)?,
        grpc_timeout_offset: of("max_stream_duration.grpc_timeout_header_offset", grpc_timeout_header_offset)?,
    })
}

/// A part of the hash key. It says which endpoint is preferred, so what cannot be done is left out.
pub(crate) fn hash(policy: EnvoyHash, notes: &mut Notes) -> Result<Option<HashPolicy>, Malformed> {
    let EnvoyHash {
        terminal,
        policy_specifier,
    } = policy;
    let source = match policy_specifier {
        None => return Err(notes.malformed("", "is empty")),
        Some(PolicySpecifier::Header(header)) => {
            let rewrite = header
                .regex_rewrite
                .map(|rewrite| substitution("header.regex_rewrite", rewrite, notes))
                .transpose()?;
            let name = HeaderName::parse(&header.header_name)
                .map_err(|_| notes.malformed("header.header_name", format!("`{}` is no header name", header.header_name)))?;
            HashSource::Header { name, rewrite }
        }
        Some(PolicySpecifier::Cookie(cookie)) => HashSource::Cookie {
            name: cookie.name.into(),
            ttl: match cookie.ttl.map(|ttl| duration("cookie.ttl", ttl, notes)).transpose()? {
                None => None,
                Some(ttl) if ttl.is_zero() => Some(CookieTtl::Session),
                Some(ttl) => Some(CookieTtl::For(ttl)),
            },
            path: cookie.path.into(),
            attributes: cookie
                .attributes
                .into_iter()
                .map(|attribute| (attribute.name.into(), attribute.value.into()))
                .collect(),
        },
        Some(PolicySpecifier::ConnectionProperties(properties)) if properties.source_ip => HashSource::SourceIp,
        Some(PolicySpecifier::ConnectionProperties(_)) => return Ok(None),
        Some(PolicySpecifier::QueryParameter(parameter)) => HashSource::Query(parameter.name.into()),
        Some(PolicySpecifier::FilterState(state)) => {
            notes.ignore("filter_state", format!("there is nothing to hash under {}", state.key));
            return Ok(None);
        }
    };
    Ok(Some(HashPolicy { source, terminal }))
}

fn redirect(action: RedirectAction, notes: &mut Notes) -> Result<Redirect, Malformed> {
    let RedirectAction {
        host_redirect,
        port_redirect,
        response_code,
        strip_query,
        scheme_rewrite_specifier,
        path_rewrite_specifier,
    } = action;
    let status = match RedirectResponseCode::try_from(response_code) {
        Ok(RedirectResponseCode::MovedPermanently) => StatusCode::MOVED_PERMANENTLY,
        Ok(RedirectResponseCode::Found) => StatusCode::FOUND,
        Ok(RedirectResponseCode::SeeOther) => StatusCode::SEE_OTHER,
        Ok(RedirectResponseCode::TemporaryRedirect) => StatusCode::TEMPORARY_REDIRECT,
        Ok(RedirectResponseCode::PermanentRedirect) => StatusCode::PERMANENT_REDIRECT,
        Err(_) => return Err(notes.malformed("response_code", format!("{response_code} is not known"))),
    };
    let scheme = match scheme_rewrite_specifier {
        None | Some(SchemeRewriteSpecifier::HttpsRedirect(false)) => None,
        Some(SchemeRewriteSpecifier::HttpsRedirect(true)) => Some(Scheme::Https),
        Some(SchemeRewriteSpecifier::SchemeRedirect(scheme)) => match scheme.to_ascii_lowercase().as_str() {
            "http" => Some(Scheme::Http),
            "https" => Some(Scheme::Https),
            _ => {
                notes.refuse("scheme_redirect", format!("{scheme} is not supported"));
                None
            }
        },
    };
    let path = match path_rewrite_specifier {
        None => None,
        // istiod always writes one of them; an empty one keeps the path.
        Some(PathRewriteSpecifier::PathRedirect(path) | PathRewriteSpecifier::PrefixRewrite(path)) if path.is_empty() => None,
        Some(PathRewriteSpecifier::PathRedirect(path)) => Some(RedirectPath::Full(path.into())),
        Some(PathRewriteSpecifier::PrefixRewrite(prefix)) => Some(RedirectPath::Rewrite(PathRewrite::Prefix(prefix.into()))),
        Some(PathRewriteSpecifier::RegexRewrite(rewrite)) => Some(RedirectPath::Rewrite(PathRewrite::Regex(substitution(
            "regex_rewrite",
            rewrite,
            notes,
        )?))),
        Some(PathRewriteSpecifier::PathRewrite(_)) => {
            notes.refuse("path_rewrite", "is not supported");
            None
        }
    };
    let port = match port_redirect {
        0 => None,
        port => Some(u16::try_from(port).map_err(|_| notes.malformed("port_redirect", format!("{port} is no port")))?),
    };
    Ok(Redirect {
        status,
        scheme,
        host: Some(host_redirect).filter(|host| !host.is_empty()).map(Into::into),
        port,
        path,
        strip_query,
    })
}

fn direct_response(action: DirectResponseAction, around: &Around, notes: &mut Notes) -> Result<DirectResponse, Malformed> {
    let DirectResponseAction {
        status,
        body,
        body_format,
    } = action;
    refuse_set!(notes, body_format);
    let code = u16::try_from(status)
        .ok()
        .filter(|code| (200..600).contains(code))
        .and_then(|code| StatusCode::from_u16(code).ok());
    let status = code.ok_or_else(|| notes.malformed("status", format!("{status} is no status of a final answer")))?;
    let body = body.and_then(|source| inline("body", source, notes)).unwrap_or_default();
    if body.len() > around.direct_response_limit {
        return Err(notes.malformed(
            "body",
            format!("{} bytes are more than {}", body.len(), around.direct_response_limit),
        ));
    }
    Ok(DirectResponse {
        status,
        body: body.into(),
    })
}
