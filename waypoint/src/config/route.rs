//! Route tables (contract xds §4.1–§4.5): virtual hosts, routes, what each asks of a request.
//!
//! A route with something that can decide and that we cannot do is kept in its place and answers 403: the requests that it matches are
//! exactly those that would otherwise have been decided without it, and the other routes of the chain go on serving. What stands on
//! a virtual host or on the whole table so refuses all routes in it.

use std::sync::Arc;

use bytes::Bytes;
use cairn_policy::{
    cors::CorsPolicy,
    matcher::{MetadataMatcher, PathMatch, PathMatcher, QueryMatch, QueryMatcher, ValueMatcher},
    retry::RetryPolicy,
    route::{Decorator, DirectResponse, Domain, Fraction, Mirror, Route, RouteAction, RouteMatch, RouteTable, VirtualHost},
};
use cairn_proto::envoy::{
    config::{
        core::v3::{Metadata, RuntimeFractionalPercent},
        route::v3::{
            Decorator as EnvoyDecorator, QueryParameterMatcher, Route as EnvoyRoute, RouteConfiguration,
            RouteMatch as EnvoyMatch, VirtualHost as EnvoyHost, query_parameter_matcher::QueryParameterMatchSpecifier,
            route_match::PathSpecifier,
        },
    },
    r#type::{
        matcher::v3::{
            MetadataMatcher as EnvoyMetadata, ValueMatcher as EnvoyValue, double_matcher, list_matcher,
            metadata_matcher::path_segment::Segment, value_matcher::MatchPattern,
        },
        v3::{FractionalPercent, fractional_percent::DenominatorType},
    },
};
use http::{HeaderValue, StatusCode};

use super::{
    any::text,
    chain::Context,
    cors, headers, mirrors, per_route, rate_limits,
    report::{Malformed, Notes, ignore_set, refuse_set, unneeded},
    retry, route_action,
    value::{self, regex},
};

/// Envoy's limit of the body of a direct response where the table does not say.
const DIRECT_RESPONSE_LIMIT: u32 = 4096;

/// What routes take from the table and the virtual host around them.
pub(crate) struct Around {
    /// Bytes that the body of a direct response may have.
    pub direct_response_limit: usize,
    /// Retries of routes that say nothing.
    pub retry: Option<RetryPolicy>,
    /// Cross-origin sharing where it stands on the virtual host itself.
    pub cors: Option<Arc<CorsPolicy>>,
    /// Who gets copies of the requests of routes that say nothing.
    pub mirrors: Vec<Mirror>,
    /// Why every route here refuses.
    refusal: Option<String>,
}

/// Compiles a route configuration.
pub(crate) fn compile(config: RouteConfiguration, context: &mut Context, notes: &mut Notes) -> Result<RouteTable, Malformed> {
    let RouteConfiguration {
        name,
        virtual_hosts,
        vhds,
        internal_only_headers,
        response_headers_to_add,
        response_headers_to_remove,
        request_headers_to_add,
        request_headers_to_remove,
        most_specific_header_mutations_wins,
        validate_clusters,
        max_direct_response_body_size_bytes,
        cluster_specifier_plugins,
        request_mirror_policies,
        ignore_port_in_host_matching,
        vhost_header,
        ignore_path_parameters_in_path_matching,
        typed_per_filter_config,
        metadata,
    } = config;
    unneeded!(metadata);
    refuse_set!(
        notes,
        vhds,
        internal_only_headers,
        cluster_specifier_plugins,
        vhost_header,
        ignore_path_parameters_in_path_matching,
    );
    if validate_clusters == Some(true) {
        notes.ignore(
            "validate_clusters",
            "a route may name a cluster that is not there; its requests are answered 503",
        );
    }
    let limit = max_direct_response_body_size_bytes.unwrap_or(DIRECT_RESPONSE_LIMIT);
    let (table_overrides, refusal) = notes.in_route("*", |notes| per_route::compile(&typed_per_filter_config, context, notes));
    let table_overrides = table_overrides?;
    let around = Around {
        direct_response_limit: limit as usize,
        retry: None,
        cors: None,
        mirrors: mirrors::compile(request_mirror_policies, context, notes)?,
        refusal,
    };
    let hosts = virtual_hosts
        .into_iter()
        .enumerate()
        .map(|(index, host)| {
            notes
                .at("virtual_hosts", index, |notes| compile_host(host, &around, context, notes))
                .map(Arc::new)
        })
        .collect::<Result<Vec<_>, _>>()?;
    let mut table = RouteTable::new(name, hosts).map_err(|error| notes.malformed("virtual_hosts", error.to_string()))?;
    table.request_edits = headers::edits(request_headers_to_add, request_headers_to_remove, "request_headers", notes)?;
    table.response_edits = headers::edits(response_headers_to_add, response_headers_to_remove, "response_headers", notes)?;
    table.most_specific_edits_win = most_specific_header_mutations_wins;
    table.ignore_port_in_authority = ignore_port_in_host_matching;
    table.overrides = table_overrides;
    Ok(table)
}

fn compile_host(host: EnvoyHost, around: &Around, context: &mut Context, notes: &mut Notes) -> Result<VirtualHost, Malformed> {
    let EnvoyHost {
        name,
        domains,
        routes,
        matcher,
        require_tls,
        virtual_clusters,
        rate_limits,
        request_headers_to_add,
        request_headers_to_remove,
        response_headers_to_add,
        response_headers_to_remove,
        cors,
        typed_per_filter_config,
        include_request_attempt_count,
        include_attempt_count_in_response,
        retry_policy,
        retry_policy_typed_config,
        hedge_policy,
        include_is_timeout_retry_header,
        per_request_buffer_limit_bytes,
        request_body_buffer_limit,
        request_mirror_policies,
        metadata,
    } = host;
    unneeded!(metadata);
    ignore_set!(
        notes,
        virtual_clusters,
        hedge_policy,
        per_request_buffer_limit_bytes,
        request_body_buffer_limit
    );
    let (overrides, refusal) = notes.in_route("*", |notes| {
        refuse_set!(
            notes,
            matcher,
            require_tls,
            include_request_attempt_count,
            include_attempt_count_in_response,
            include_is_timeout_retry_header,
            retry_policy_typed_config,
        );
        // They mean something only to filters that count.
        let limits = if context.counts_requests { rate_limits } else { Vec::new() };
        let limits = rate_limits::compile(limits, notes)?;
        Ok((per_route::compile(&typed_per_filter_config, context, notes)?, limits))
    });
    let (overrides, rate_limits) = overrides?;
    let retry = retry_policy
        .map(|policy| notes.within("retry_policy", |notes| retry::compile(policy, notes)))
        .transpose()?;
    let cors = cors::of_route(cors, None, notes)?;
    let own = mirrors::compile(request_mirror_policies, context, notes)?;
    let around = Around {
        cors,
        mirrors: if own.is_empty() { around.mirrors.clone() } else { own },
        direct_response_limit: around.direct_response_limit,
        retry: retry.or_else(|| around.retry.clone()),
        refusal: around.refusal.clone().or(refusal),
    };
    let domains = domains
        .iter()
        .map(|domain| Domain::parse(domain).map_err(|error| notes.malformed("domains", error.to_string())))
        .collect::<Result<Vec<_>, _>>()?;
    let routes = routes
        .into_iter()
        .enumerate()
        .map(|(index, route)| {
            notes
                .at("routes", index, |notes| compile_route(route, index, &around, context, notes))
                .map(Arc::new)
        })
        .collect::<Result<Vec<_>, _>>()?;
    Ok(VirtualHost {
        name: name.into(),
        domains,
        routes,
        request_edits: headers::edits(request_headers_to_add, request_headers_to_remove, "request_headers", notes)?,
        response_edits: headers::edits(response_headers_to_add, response_headers_to_remove, "response_headers", notes)?,
        overrides,
        rate_limits,
    })
}

fn compile_route(
    route: EnvoyRoute,
    index: usize,
    around: &Around,
    context: &mut Context,
    notes: &mut Notes,
) -> Result<Route, Malformed> {
    let label = if route.name.is_empty() {
        format!("#{index}")
    } else {
        route.name.clone()
    };
    let (compiled, refusal) = notes.in_route(&label, |notes| compile_route_fields(route, around, context, notes));
    let mut compiled = compiled?;
    if let Some(reason) = around.refusal.clone().or(refusal) {
        let body = format!("this route has configuration that the proxy does not support: {reason}\n");
        compiled.action = RouteAction::DirectResponse(DirectResponse {
            status: StatusCode::FORBIDDEN,
            body: Bytes::from(body),
        });
    }
    Ok(compiled)
}

fn compile_route_fields(
    route: EnvoyRoute,
    around: &Around,
    context: &mut Context,
    notes: &mut Notes,
) -> Result<Route, Malformed> {
    let EnvoyRoute {
        name,
        r#match,
        metadata,
        decorator,
        typed_per_filter_config,
        request_headers_to_add,
        request_headers_to_remove,
        response_headers_to_add,
        response_headers_to_remove,
        tracing,
        per_request_buffer_limit_bytes,
        stat_prefix,
        request_body_buffer_limit,
        action,
    } = route;
    ignore_set!(notes, tracing, per_request_buffer_limit_bytes, request_body_buffer_limit);
    let overrides = per_route::compile(&typed_per_filter_config, context, notes)?;
    let matches = r#match.ok_or_else(|| notes.malformed("match", "is missing"))?;
    let matches = notes.within("match", |notes| compile_match(matches, notes))?;
    let action = route_action::compile(action, around, context, notes)?;
    Ok(Route {
        name: Some(name).filter(|name| !name.is_empty()).map(Into::into),
        request_edits: headers::edits(request_headers_to_add, request_headers_to_remove, "request_headers", notes)?,
        response_edits: headers::edits(response_headers_to_add, response_headers_to_remove, "response_headers", notes)?,
        config: metadata.as_ref().and_then(config_of).map(Into::into),
        decorator: decorator.and_then(|decorator| compile_decorator(decorator, notes)),
        stat_prefix: Some(stat_prefix).filter(|prefix| !prefix.is_empty()).map(Into::into),
        overrides,
        ..Route::new(matches, action)
    })
}

/// The Istio object that a route was made from.
fn config_of(metadata: &Metadata) -> Option<&str> {
    text(&metadata.filter_metadata.get("istio")?.fields, "config")
}

fn compile_decorator(decorator: EnvoyDecorator, notes: &mut Notes) -> Option<Decorator> {
    let EnvoyDecorator { operation, propagate } = decorator;
    match HeaderValue::try_from(operation) {
        Ok(operation) => Some(Decorator {
            operation,
            propagate: propagate != Some(false),
        }),
        Err(_) => {
            notes.ignore("decorator.operation", "cannot stand in a header");
            None
        }
    }
}

pub(crate) fn compile_match(matches: EnvoyMatch, notes: &mut Notes) -> Result<RouteMatch, Malformed> {
    let EnvoyMatch {
        case_sensitive,
        runtime_fraction,
        headers,
        query_parameters,
        cookies,
        grpc,
        tls_context,
        dynamic_metadata,
        filter_state,
        path_specifier,
    } = matches;
    // A condition that cannot be asked is left out of the match and refuses the route: what it would have excluded is refused too.
    refuse_set!(notes, cookies, tls_context, filter_state);
    let path = match path_specifier {
        None => return Err(notes.malformed("", "says nothing about the path")),
        Some(PathSpecifier::Prefix(prefix)) => PathMatch::Prefix(prefix.into()),
        Some(PathSpecifier::Path(path)) => PathMatch::Exact(path.into()),
        Some(PathSpecifier::SafeRegex(matcher)) => PathMatch::Regex(regex("safe_regex", matcher, notes)?),
        Some(PathSpecifier::PathSeparatedPrefix(prefix)) if prefix.ends_with('/') || !prefix.starts_with('/') => {
            return Err(notes.malformed(
                "path_separated_prefix",
                format!("`{prefix}` has to begin with `/` and not to end with it"),
            ));
        }
        Some(PathSpecifier::PathSeparatedPrefix(prefix)) => PathMatch::SeparatedPrefix(prefix.into()),
        Some(PathSpecifier::ConnectMatcher(_)) => PathMatch::Connect,
        Some(PathSpecifier::PathMatchPolicy(policy)) => {
            notes.refuse("path_match_policy", format!("{} is not supported yet", policy.name));
            PathMatch::Prefix("/".into())
        }
    };
    let headers = headers.into_iter().enumerate();
    let headers = headers.map(|(index, matcher)| notes.at("headers", index, |notes| headers::matcher(matcher, notes)));
    let headers = headers.collect::<Result<_, _>>()?;
    let query = query_parameters
        .into_iter()
        .map(|matcher| compile_query(matcher, notes))
        .collect::<Result<_, _>>()?;
    let metadata = dynamic_metadata
        .into_iter()
        .map(|matcher| compile_metadata(matcher, notes))
        .collect::<Result<_, _>>()?;
    Ok(RouteMatch {
        path: PathMatcher::new(path, case_sensitive == Some(false)),
        headers,
        query,
        metadata,
        grpc: grpc.is_some(),
        fraction: runtime_fraction
            .map(|fraction| compile_fraction(fraction, notes))
            .transpose()?,
    })
}

/// A fraction; its runtime key is never set, as there is no runtime here.
pub(crate) fn compile_fraction(fraction: RuntimeFractionalPercent, notes: &Notes) -> Result<Fraction, Malformed> {
    let RuntimeFractionalPercent {
        default_value,
        runtime_key: _,
    } = fraction;
    percent(default_value.unwrap_or_default(), notes)
}

/// A fraction in one of Envoy's three units.
pub(crate) fn percent(percent: FractionalPercent, notes: &Notes) -> Result<Fraction, Malformed> {
    let FractionalPercent { numerator, denominator } = percent;
    let denominator = match DenominatorType::try_from(denominator) {
        Ok(DenominatorType::Hundred) => 100,
        Ok(DenominatorType::TenThousand) => 10_000,
        Ok(DenominatorType::Million) => 1_000_000,
        Err(_) => return Err(notes.malformed("runtime_fraction", format!("{denominator} is no denominator"))),
    };
    Ok(Fraction { numerator, denominator })
}

pub(crate) fn compile_query(matcher: QueryParameterMatcher, notes: &mut Notes) -> Result<QueryMatcher, Malformed> {
    let QueryParameterMatcher {
        name,
        query_parameter_match_specifier,
    } = matcher;
    let how = match query_parameter_match_specifier {
        None | Some(QueryParameterMatchSpecifier::PresentMatch(true)) => QueryMatch::Present,
        Some(QueryParameterMatchSpecifier::PresentMatch(false)) => {
            notes.refuse("query_parameters", format!("absence of {name} cannot be asked for"));
            QueryMatch::Present
        }
        Some(QueryParameterMatchSpecifier::StringMatch(matcher)) => {
            QueryMatch::String(value::string("query_parameters", matcher, notes)?)
        }
    };
    Ok(QueryMatcher { name: name.into(), how })
}

fn compile_metadata(matcher: EnvoyMetadata, notes: &mut Notes) -> Result<MetadataMatcher, Malformed> {
    let EnvoyMetadata {
        filter,
        path,
        value,
        invert,
    } = matcher;
    let keys = path.into_iter().map(|segment| match segment.segment {
        Some(Segment::Key(key)) => Ok(key.into()),
        None => Err(notes.malformed("dynamic_metadata.path", "has an empty segment")),
    });
    let path = keys.collect::<Result<_, _>>()?;
    let value = value.ok_or_else(|| notes.malformed("dynamic_metadata.value", "is missing"))?;
    Ok(MetadataMatcher {
        filter: filter.into(),
        path,
        value: compile_value(value, notes)?,
        invert,
    })
}

fn compile_value(value: EnvoyValue, notes: &mut Notes) -> Result<ValueMatcher, Malformed> {
    const FIELD: &str = "dynamic_metadata.value";
    Ok(match value.match_pattern {
        None => return Err(notes.malformed(FIELD, "is empty")),
        Some(MatchPattern::NullMatch(_)) => ValueMatcher::Null,
        Some(MatchPattern::BoolMatch(value)) => ValueMatcher::Bool(value),
        Some(MatchPattern::PresentMatch(present)) => ValueMatcher::Present(present),
        Some(MatchPattern::StringMatch(matcher)) => ValueMatcher::String(value::string(FIELD, matcher, notes)?),
        Some(MatchPattern::DoubleMatch(double)) => match double.match_pattern {
            Some(double_matcher::MatchPattern::Exact(value)) => ValueMatcher::Exact(value),
            Some(double_matcher::MatchPattern::Range(range)) => ValueMatcher::Range {
                start: range.start,
                end: range.end,
            },
            None => return Err(notes.malformed(FIELD, "is empty")),
        },
        Some(MatchPattern::ListMatch(list)) => match list.match_pattern {
            Some(list_matcher::MatchPattern::OneOf(one)) => ValueMatcher::ListOneOf(Box::new(compile_value(*one, notes)?)),
            None => return Err(notes.malformed(FIELD, "is empty")),
        },
        Some(MatchPattern::OrMatch(or)) => ValueMatcher::Or(
            or.value_matchers
                .into_iter()
                .map(|value| compile_value(value, notes))
                .collect::<Result<_, _>>()?,
        ),
    })
}
