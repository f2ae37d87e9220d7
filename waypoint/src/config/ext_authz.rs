//! `ext_authz` (contract xds §3.5, §6.7): external authorization of requests and of connections.
//!
//! The messages of a gRPC authorizer are in [`wire`]. What can change a decision and is not done refuses the chain, as everywhere.

#[cfg(test)]
mod tests;
mod wire;

use std::{sync::Arc, time::Duration};

use cairn_filters::{
    GrpcService,
    ext_authz::{
        Authorizer, BodyHere, BodyTold, ExtAuthz, OnItsRoute, Settings,
        http::{AskedAt, Goes, HttpAuthorizer},
        network::OfConnections,
        question::Told,
    },
};
use cairn_policy::{matcher::StringMatcher, route::Fraction};
use cairn_proto::envoy::{
    config::core::v3::{
        GrpcService as EnvoyService, HeaderValueOption, HttpUri, RuntimeFeatureFlag, header_value_option::HeaderAppendAction,
        http_uri::HttpUpstreamType,
    },
    extensions::filters::{
        http::ext_authz::v3::{
            AuthorizationRequest, AuthorizationResponse, BufferSettings, CheckSettings, ExtAuthz as EnvoyFilter,
            ExtAuthzPerRoute, HttpService, check_settings::ServiceOverride, ext_authz::Services, ext_authz_per_route::Override,
        },
        network::ext_authz::v3::ExtAuthz as NetworkFilter,
    },
    r#type::{matcher::v3::ListStringMatcher, v3::HttpStatus},
};
use http::{StatusCode, uri::PathAndQuery};

use super::{
    chain::Context,
    grpc_service, headers, ratelimit, rbac,
    report::{Malformed, Notes, ignore_set, refuse_set, unneeded},
    value::{duration, string},
};

/// How long a gRPC authorizer has where the configuration does not say.
const TIMEOUT: Duration = Duration::from_millis(200);
/// Most bytes of the answer of an HTTP authorizer.
const MAX_ANSWER: usize = 1024 * 1024;

/// Compiles the filter of requests; `None` when it refuses.
#[allow(clippy::too_many_lines, reason = "a message with so many fields")]
pub(crate) fn http(filter: EnvoyFilter, context: &mut Context, notes: &mut Notes) -> Result<Option<ExtAuthz>, Malformed> {
    let EnvoyFilter {
        transport_api_version,
        failure_mode_allow,
        failure_mode_allow_header_add,
        with_request_body,
        clear_route_cache,
        status_on_error,
        validate_mutations,
        metadata_context_namespaces,
        typed_metadata_context_namespaces,
        route_metadata_context_namespaces,
        route_typed_metadata_context_namespaces,
        filter_enabled,
        filter_enabled_metadata,
        deny_at_disable,
        include_peer_certificate,
        stat_prefix,
        bootstrap_metadata_labels_key,
        allowed_headers,
        disallowed_headers,
        include_tls_session,
        charge_cluster_response_stats,
        encode_raw_headers,
        decoder_header_mutation_rules,
        enable_dynamic_metadata_ingestion,
        filter_metadata,
        emit_filter_state_stats,
        max_denied_response_body_bytes,
        enforce_response_header_limits,
        shadow_mode,
        services,
    } = filter;
    // Mutations are always validated, and nothing here has typed metadata.
    unneeded!(
        transport_api_version,
        stat_prefix,
        charge_cluster_response_stats,
        validate_mutations,
        typed_metadata_context_namespaces,
    );
    refuse_set!(
        notes,
        route_metadata_context_namespaces,
        route_typed_metadata_context_namespaces,
        bootstrap_metadata_labels_key,
        decoder_header_mutation_rules,
        shadow_mode,
    );
    ignore_set!(
        notes,
        filter_metadata,
        emit_filter_state_stats,
        enforce_response_header_limits
    );
    no_certificate(include_peer_certificate, notes);
    let services = services.ok_or_else(|| notes.malformed("services", "is missing"))?;
    let named = allowed_headers
        .map(|list| strings("allowed_headers", list, notes))
        .transpose()?;
    let (authorizer, allowed) = match services {
        Services::GrpcService(service) => {
            let service = notes.within("grpc_service", |notes| grpc(service, context, notes))?;
            (service.map(|service| Authorizer::Grpc(service, wire::WIRE)), named)
        }
        Services::HttpService(service) => {
            let (authorizer, old) = notes.within("http_service", |notes| over_http(service, context, notes))?;
            if old.is_some() && named.is_some() {
                return Err(notes.malformed("allowed_headers", "stands in two places"));
            }
            // An HTTP authorizer is told no other headers than those that are named.
            let named = old.or(named).unwrap_or_default();
            (Some(Authorizer::Http(Arc::new(authorizer))), Some(named))
        }
    };
    let Some(authorizer) = authorizer else { return Ok(None) };
    let deny_others = deny_at_disable.is_some_and(
        |RuntimeFeatureFlag {
             default_value,
             runtime_key: _,
         }| default_value == Some(true),
    );
    let enabled_by = filter_enabled_metadata
        .map(|matcher| notes.within("filter_enabled_metadata", |notes| rbac::metadata(matcher, notes)))
        .transpose()?;
    let settings = Settings {
        authorizer,
        allow_on_failure: failure_mode_allow,
        tell_failure: failure_mode_allow_header_add,
        status_on_error: on_error(status_on_error, notes)?,
        body: with_request_body.map(|body| body_told(body, notes)).transpose()?,
        reroutes: clear_route_cache,
        enabled: ratelimit::share(filter_enabled, Fraction::ALL, notes)?,
        enabled_by,
        deny_others,
        told: Told {
            allowed,
            disallowed: disallowed_headers
                .map(|list| strings("disallowed_headers", list, notes))
                .transpose()?
                .unwrap_or_default(),
            raw_headers: encode_raw_headers,
            namespaces: metadata_context_namespaces.into_iter().map(Into::into).collect(),
            server_name: include_tls_session,
        },
        notes: enable_dynamic_metadata_ingestion.unwrap_or(true),
        max_denial: usize::try_from(max_denied_response_body_bytes).ok().filter(|most| *most > 0),
    };
    Ok(Some(ExtAuthz {
        settings: Arc::new(settings),
    }))
}

/// Compiles what a route says of it; `None` when it refuses.
pub(crate) fn on_route(
    filter: ExtAuthzPerRoute,
    context: &mut Context,
    notes: &mut Notes,
) -> Result<Option<OnItsRoute>, Malformed> {
    let ExtAuthzPerRoute { r#override } = filter;
    let settings = match r#override {
        Some(Override::Disabled(true)) => {
            return Ok(Some(OnItsRoute {
                disabled: true,
                ..OnItsRoute::default()
            }));
        }
        Some(Override::CheckSettings(settings)) => settings,
        Some(Override::Disabled(false)) | None => return Err(notes.malformed("", "says nothing")),
    };
    let CheckSettings {
        context_extensions,
        disable_request_body_buffering,
        with_request_body,
        service_override,
    } = settings;
    let body = match (disable_request_body_buffering, with_request_body) {
        (true, Some(_)) => return Err(notes.malformed("check_settings.with_request_body", "stands beside its contrary")),
        (true, None) => Some(BodyHere::Untold),
        (false, told) => told.map(|told| body_told(told, notes)).transpose()?.map(BodyHere::Told),
    };
    let authorizer = match service_override {
        None => None,
        Some(ServiceOverride::GrpcService(service)) => {
            let service = notes.within("check_settings.grpc_service", |notes| grpc(service, context, notes))?;
            let Some(service) = service else { return Ok(None) };
            Some(Authorizer::Grpc(service, wire::WIRE))
        }
        Some(ServiceOverride::HttpService(service)) => {
            let (authorizer, allowed) =
                notes.within("check_settings.http_service", |notes| over_http(service, context, notes))?;
            if allowed.is_some() {
                notes.refuse(
                    "check_settings.http_service.authorization_request.allowed_headers",
                    "is not supported",
                );
            }
            Some(Authorizer::Http(Arc::new(authorizer)))
        }
    };
    let extension = |(key, value): (String, String)| (key.into_boxed_str(), value.into_boxed_str());
    Ok(Some(OnItsRoute {
        disabled: false,
        context: context_extensions.into_iter().map(extension).collect(),
        body,
        authorizer,
    }))
}

/// Compiles the filter of connections; `None` when it refuses.
pub(crate) fn network(
    filter: NetworkFilter,
    context: &mut Context,
    notes: &mut Notes,
) -> Result<Option<OfConnections>, Malformed> {
    let NetworkFilter {
        stat_prefix,
        grpc_service,
        failure_mode_allow,
        include_peer_certificate,
        transport_api_version,
        filter_enabled_metadata,
        bootstrap_metadata_labels_key,
        include_tls_session,
        send_tls_alert_on_denial,
        metadata_context_namespaces,
        typed_metadata_context_namespaces,
    } = filter;
    // There is no TLS that an alert could be sent in.
    unneeded!(
        stat_prefix,
        transport_api_version,
        send_tls_alert_on_denial,
        typed_metadata_context_namespaces
    );
    refuse_set!(notes, bootstrap_metadata_labels_key);
    no_certificate(include_peer_certificate, notes);
    let service = grpc_service.ok_or_else(|| notes.malformed("grpc_service", "is missing"))?;
    let service = notes.within("grpc_service", |notes| grpc(service, context, notes))?;
    let Some(service) = service else { return Ok(None) };
    let enabled_by = filter_enabled_metadata
        .map(|matcher| notes.within("filter_enabled_metadata", |notes| rbac::metadata(matcher, notes)))
        .transpose()?;
    Ok(Some(OfConnections {
        service,
        wire: wire::WIRE,
        allow_on_failure: failure_mode_allow,
        enabled_by,
        told: Told {
            namespaces: metadata_context_namespaces.into_iter().map(Into::into).collect(),
            server_name: include_tls_session,
            ..Told::default()
        },
        after: context.rbac.len(),
    }))
}

/// A waypoint's Envoy has no certificate to tell either, since the listener that asks has no TLS.
fn no_certificate(wanted: bool, notes: &mut Notes) {
    if wanted {
        notes.ignore(
            "include_peer_certificate",
            "the certificate is not told, only the identity that it stands for",
        );
    }
}

fn grpc(service: EnvoyService, context: &mut Context, notes: &mut Notes) -> Result<Option<Arc<GrpcService>>, Malformed> {
    let timeout = match service.timeout {
        None => Some(TIMEOUT),
        Some(timeout) => Some(duration("timeout", timeout, notes)?).filter(|timeout| !timeout.is_zero()),
    };
    let service = grpc_service::compile(service, timeout, context, notes)?;
    Ok(service.map(Arc::new))
}

/// An HTTP authorizer, and the headers that it is told where they are named in the old place.
fn over_http(
    service: HttpService,
    context: &mut Context,
    notes: &mut Notes,
) -> Result<(HttpAuthorizer, Option<Vec<StringMatcher>>), Malformed> {
    let HttpService {
        server_uri,
        path_prefix,
        path_override,
        authorization_request,
        authorization_response,
        retry_policy,
    } = service;
    // It is asked once: whether it is no answer that fails is said by `failure_mode_allow`.
    ignore_set!(notes, retry_policy);
    let HttpUri {
        // Where it is asked is the cluster's; what it is called is the request's own host.
        uri: _,
        timeout,
        http_upstream_type,
    } = server_uri.ok_or_else(|| notes.malformed("server_uri", "is missing"))?;
    let Some(HttpUpstreamType::Cluster(cluster)) = http_upstream_type.filter(|HttpUpstreamType::Cluster(name)| !name.is_empty())
    else {
        return Err(notes.malformed("server_uri.cluster", "is empty"));
    };
    let timeout = timeout.ok_or_else(|| notes.malformed("server_uri.timeout", "is missing"))?;
    let timeout = Some(duration("server_uri.timeout", timeout, notes)?).filter(|timeout| !timeout.is_zero());
    let starts = |path: &str| path.is_empty() || path.starts_with('/');
    if !starts(&path_prefix) {
        return Err(notes.malformed("path_prefix", "does not begin with `/`"));
    }
    if !path_prefix.is_empty() && !path_override.is_empty() {
        return Err(notes.malformed("path_override", "stands beside `path_prefix`"));
    }
    let path = match Some(path_override).filter(|path| !path.is_empty()) {
        None => AskedAt::Under(path_prefix.into()),
        Some(path) if starts(&path) => {
            AskedAt::This(PathAndQuery::try_from(path).map_err(|_| notes.malformed("path_override", "is no path"))?)
        }
        Some(_) => return Err(notes.malformed("path_override", "does not begin with `/`")),
    };
    #[allow(deprecated, reason = "older configurations name headers there")]
    let AuthorizationRequest {
        allowed_headers,
        headers_to_add,
    } = authorization_request.unwrap_or_default();
    let allowed = allowed_headers
        .map(|list| strings("authorization_request.allowed_headers", list, notes))
        .transpose()?;
    let add = headers_to_add.into_iter().map(|header| HeaderValueOption {
        header: Some(header),
        append_action: HeaderAppendAction::OverwriteIfExistsOrAdd as i32,
        ..HeaderValueOption::default()
    });
    let add = headers::edits(add.collect(), vec![], "authorization_request.headers", notes)?;
    let AuthorizationResponse {
        allowed_upstream_headers,
        allowed_upstream_headers_to_append,
        allowed_client_headers,
        allowed_client_headers_on_success,
        dynamic_metadata_from_headers,
    } = authorization_response.unwrap_or_default();
    let mut named = |list: Option<ListStringMatcher>| match list {
        None => Ok(Vec::new()),
        Some(list) => strings("authorization_response", list, notes),
    };
    let client = named(allowed_client_headers)?;
    let goes = Goes {
        upstream: named(allowed_upstream_headers)?,
        upstream_beside: named(allowed_upstream_headers_to_append)?,
        client_on_success: named(allowed_client_headers_on_success)?,
        client: Some(client).filter(|named| !named.is_empty()),
        notes: named(dynamic_metadata_from_headers)?,
    };
    let cluster: Arc<str> = cluster.into();
    context.clusters.insert(cluster.clone());
    let authorizer = HttpAuthorizer {
        cluster,
        timeout,
        path,
        add,
        goes,
        max_answer: MAX_ANSWER,
    };
    Ok((authorizer, allowed))
}

fn strings(field: &'static str, list: ListStringMatcher, notes: &mut Notes) -> Result<Vec<StringMatcher>, Malformed> {
    let ListStringMatcher { patterns } = list;
    patterns.into_iter().map(|pattern| string(field, pattern, notes)).collect()
}

fn body_told(body: BufferSettings, notes: &Notes) -> Result<BodyTold, Malformed> {
    let BufferSettings {
        max_request_bytes,
        allow_partial_message,
        pack_as_bytes,
    } = body;
    let limit = usize::try_from(max_request_bytes).ok().filter(|limit| *limit > 0);
    Ok(BodyTold {
        limit: limit.ok_or_else(|| notes.malformed("with_request_body.max_request_bytes", "is zero"))?,
        partial: allow_partial_message,
        as_bytes: pack_as_bytes,
    })
}

fn on_error(status: Option<HttpStatus>, notes: &Notes) -> Result<StatusCode, Malformed> {
    let Some(HttpStatus { code }) = status else {
        return Ok(StatusCode::FORBIDDEN);
    };
    let known = u16::try_from(code).ok().and_then(|code| StatusCode::from_u16(code).ok());
    let known = known.filter(|status| !status.is_informational());
    known.ok_or_else(|| notes.malformed("status_on_error", format!("{code} is no status of an answer")))
}
