//! Services that filters ask (contract xds §3.12, §6.7): gRPC behind one of our clusters.

use std::time::Duration;

use cairn_filters::GrpcService;
use cairn_proto::envoy::config::core::v3::{
    GrpcService as EnvoyService, HeaderValue as EnvoyHeader,
    grpc_service::{EnvoyGrpc, TargetSpecifier},
};
use http::{HeaderName, HeaderValue};

use super::{
    chain::Context,
    report::{Malformed, Notes, ignore_set},
};

/// Most bytes of an answer where the configuration does not say.
const MAX_ANSWER: usize = 1024 * 1024;

/// Compiles a service; calls take `timeout` at most. The chain waits for its cluster as for those of its routes.
pub(crate) fn compile(
    service: EnvoyService,
    timeout: Option<Duration>,
    context: &mut Context,
    notes: &mut Notes,
) -> Result<Option<GrpcService>, Malformed> {
    let EnvoyService {
        // The filters' own timeouts take its place, as in Envoy.
        timeout: _,
        initial_metadata,
        retry_policy,
        target_specifier,
    } = service;
    ignore_set!(notes, retry_policy);
    let target = match target_specifier {
        None => return Err(notes.malformed("", "names nobody")),
        Some(TargetSpecifier::GoogleGrpc(_)) => {
            notes.refuse("google_grpc", "is not supported; name a cluster with envoy_grpc");
            return Ok(None);
        }
        Some(TargetSpecifier::EnvoyGrpc(target)) => target,
    };
    let EnvoyGrpc {
        cluster_name,
        authority,
        retry_policy,
        max_receive_message_length,
        skip_envoy_headers,
    } = target;
    notes.within("envoy_grpc", |notes| ignore_set!(notes, retry_policy));
    if cluster_name.is_empty() {
        return Err(notes.malformed("envoy_grpc.cluster_name", "is empty"));
    }
    let authority = if authority.is_empty() { &cluster_name } else { &authority };
    let authority = HeaderValue::try_from(authority.replace('|', "_"))
        .map_err(|_| notes.malformed("envoy_grpc.authority", format!("`{authority}` cannot stand in a header")))?;
    let metadata = initial_metadata.into_iter().map(|header| header_of(header, notes));
    let metadata = metadata.collect::<Result<Vec<_>, _>>()?;
    let cluster: std::sync::Arc<str> = cluster_name.into();
    context.clusters.insert(cluster.clone());
    let most = max_receive_message_length.and_then(|most| usize::try_from(most).ok());
    Ok(Some(GrpcService {
        cluster,
        authority,
        timeout,
        metadata,
        max_answer: most.filter(|most| *most > 0).unwrap_or(MAX_ANSWER),
        skip_envoy_headers,
    }))
}

/// Compiles a collector of traces or logs. Nobody waits for its cluster, and what of it is not done is listed and refuses nothing.
pub(crate) fn collector(
    service: EnvoyService,
    timeout: Option<Duration>,
    notes: &mut Notes,
) -> Result<Option<GrpcService>, Malformed> {
    let mut aside = Notes::of("");
    let compiled = compile(service, timeout, &mut Context::default(), &mut aside);
    for item in aside.into_list() {
        notes.ignore(&item.field, item.what);
    }
    compiled.map_err(|error| notes.malformed(&error.field, error.what))
}

fn header_of(header: EnvoyHeader, notes: &mut Notes) -> Result<(HeaderName, HeaderValue), Malformed> {
    const FIELD: &str = "initial_metadata";
    let EnvoyHeader { key, value, raw_value } = header;
    if value.contains('%') {
        notes.refuse(FIELD, format!("the value of {key} is a format, which is not supported"));
    }
    let name = HeaderName::try_from(&key).map_err(|_| notes.malformed(FIELD, format!("`{key}` is no header name")))?;
    let value = if raw_value.is_empty() { value.into_bytes() } else { raw_value };
    let value = HeaderValue::from_bytes(&value)
        .map_err(|_| notes.malformed(FIELD, format!("the value of {key} cannot stand in a header")))?;
    Ok((name, value))
}

/// A list of fields of a message; fields that are none are left out.
pub(crate) fn fields(headers: Vec<EnvoyHeader>) -> Vec<(HeaderName, HeaderValue)> {
    let field = |EnvoyHeader { key, value, raw_value }| {
        let value = if raw_value.is_empty() { value.into_bytes() } else { raw_value };
        Some((HeaderName::try_from(key).ok()?, HeaderValue::from_bytes(&value).ok()?))
    };
    headers.into_iter().filter_map(field).collect()
}
