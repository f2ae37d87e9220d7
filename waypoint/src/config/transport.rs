//! Transport sockets of clusters (contract xds §5.6, §5.8, §5.9): what is put between us and the application, and the terms of
//! tunnels.
//!
//! `internal_upstream` is Envoy's way into its own tunnel listeners and means nothing by itself. TLS and PROXY protocol inside the
//! tunnel are not supported yet: a cluster that asks for them refuses.

use std::collections::BTreeMap;

use cairn_identity::ClientTerms;
use cairn_proto::envoy::{
    config::{
        cluster::v3::cluster::TransportSocketMatch,
        core::v3::{ConfigSource, TransportSocket, config_source::ConfigSourceSpecifier, transport_socket::ConfigType},
    },
    extensions::transport_sockets::{
        internal_upstream::v3::InternalUpstreamTransport,
        raw_buffer::v3::RawBuffer,
        tls::v3::{SdsSecretConfig, UpstreamTlsContext, common_tls_context::ValidationContextType},
    },
};

use super::{
    any::{Unknown, type_name, unpack},
    report::{Malformed, Notes, unneeded},
    tls,
};
use crate::upstream::TransportTerms;

/// Transport terms by the metadata of an endpoint; the first whose conditions all hold is taken.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct MatchedTransports {
    entries: Vec<(BTreeMap<String, String>, TransportTerms)>,
}

/// The terms of a tunnel cluster.
pub(crate) fn tunnel(socket: Option<TransportSocket>, notes: &mut Notes) -> Result<ClientTerms, Malformed> {
    let any = configuration(socket, notes)?.ok_or_else(|| notes.malformed("", "a cluster that carries tunnels needs TLS"))?;
    match type_name(&any.type_url) {
        "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext" => {
            let context: UpstreamTlsContext = unpack(&any, Unknown::Refuses, notes)?;
            tls::client_terms(context, notes)
        }
        "envoy.extensions.transport_sockets.internal_upstream.v3.InternalUpstreamTransport" => {
            let InternalUpstreamTransport {
                passthrough_metadata,
                transport_socket,
            } = unpack(&any, Unknown::Refuses, notes)?;
            unneeded!(passthrough_metadata);
            notes.within("transport_socket", |notes| tunnel(transport_socket, notes))
        }
        other => Err(notes.malformed("", format!("{other} is no TLS"))),
    }
}

/// The terms of any other cluster; names of secrets that istiod has to send are added to `secrets`.
pub(crate) fn terms(
    socket: Option<TransportSocket>,
    secrets: &mut Vec<String>,
    notes: &mut Notes,
) -> Result<TransportTerms, Malformed> {
    let Some(any) = configuration(socket, notes)? else {
        return Ok(TransportTerms::Raw);
    };
    let unsupported = |what: &str, notes: &mut Notes| {
        notes.refuse("", what);
        TransportTerms::Unsupported(what.into())
    };
    Ok(match type_name(&any.type_url) {
        "envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer" => {
            let RawBuffer {} = unpack(&any, Unknown::Refuses, notes)?;
            TransportTerms::Raw
        }
        "envoy.extensions.transport_sockets.internal_upstream.v3.InternalUpstreamTransport" => {
            let InternalUpstreamTransport {
                passthrough_metadata,
                transport_socket,
            } = unpack(&any, Unknown::Refuses, notes)?;
            unneeded!(passthrough_metadata);
            notes.within("transport_socket", |notes| terms(transport_socket, secrets, notes))?
        }
        "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext" => {
            let context: UpstreamTlsContext = unpack(&any, Unknown::Refuses, notes)?;
            secrets.extend(ads_secrets(&context));
            unsupported("TLS to the application is not supported yet", notes)
        }
        "envoy.extensions.transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport" => {
            unsupported("the PROXY protocol is not supported yet", notes)
        }
        other => unsupported(&format!("{other} is not known"), notes),
    })
}

/// `transport_socket_matches`: which terms an endpoint's metadata asks for.
pub(crate) fn matches(list: Vec<TransportSocketMatch>, notes: &mut Notes) -> Result<MatchedTransports, Malformed> {
    let mut entries = Vec::with_capacity(list.len());
    for (
        index,
        TransportSocketMatch {
            name,
            r#match,
            transport_socket,
        },
    ) in list.into_iter().enumerate()
    {
        unneeded!(name);
        let mut conditions = BTreeMap::new();
        for (key, value) in r#match.unwrap_or_default().fields {
            match value.kind {
                Some(prost_types::value::Kind::StringValue(text)) => conditions.insert(key, text),
                _ => return Err(notes.malformed("transport_socket_matches.match", format!("`{key}` is no text"))),
            };
        }
        // What an endpoint asks for is refused at the endpoint: others of the same cluster can do without.
        let mut aside = Notes::of("");
        let socket = transport_socket;
        let terms = aside.at("transport_socket_matches", index, |aside| {
            terms(socket, &mut Vec::new(), aside)
        })?;
        entries.push((conditions, terms));
    }
    Ok(MatchedTransports { entries })
}

impl MatchedTransports {
    /// Whether all endpoints have the terms of the cluster.
    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The terms for an endpoint; `None`: those of the cluster.
    pub(crate) fn of(&self, metadata: &BTreeMap<String, String>) -> Option<&TransportTerms> {
        let holds =
            |conditions: &BTreeMap<String, String>| conditions.iter().all(|(key, value)| metadata.get(key) == Some(value));
        self.entries
            .iter()
            .find(|(conditions, _)| holds(conditions))
            .map(|(_, terms)| terms)
    }
}

/// The message of a socket; none for the default socket.
fn configuration(socket: Option<TransportSocket>, notes: &Notes) -> Result<Option<prost_types::Any>, Malformed> {
    let Some(TransportSocket { name, config_type }) = socket else {
        return Ok(None);
    };
    match config_type {
        Some(ConfigType::TypedConfig(any)) => Ok(Some(any)),
        None if name == "raw_buffer" || name == "envoy.transport_sockets.raw_buffer" => Ok(None),
        None => Err(notes.malformed("typed_config", format!("transport socket {name} has no configuration"))),
    }
}

/// Secrets that istiod sends itself.
fn ads_secrets(context: &UpstreamTlsContext) -> Vec<String> {
    let Some(common) = &context.common_tls_context else {
        return Vec::new();
    };
    let mut configs: Vec<&SdsSecretConfig> = common.tls_certificate_sds_secret_configs.iter().collect();
    match &common.validation_context_type {
        Some(ValidationContextType::ValidationContextSdsSecretConfig(config)) => configs.push(config),
        Some(ValidationContextType::CombinedValidationContext(combined)) => {
            configs.extend(&combined.validation_context_sds_secret_config)
        }
        _ => {}
    }
    let over_ads = |config: &&SdsSecretConfig| {
        let specifier = config.sds_config.as_ref().and_then(
            |ConfigSource {
                 config_source_specifier, ..
             }| config_source_specifier.as_ref(),
        );
        matches!(specifier, Some(ConfigSourceSpecifier::Ads(_)))
    };
    configs
        .into_iter()
        .filter(over_ads)
        .map(|config| config.name.clone())
        .collect()
}
