//! Transport sockets of clusters (contract xds §5.6, §5.8, §5.9): what is put between us and the application, and the terms of
//! tunnels.
//!
//! `internal_upstream` is Envoy's way into its own tunnel listeners and means nothing by itself: what it wraps is put onto the stream
//! inside of the tunnel, or onto the plain connection.

use std::{collections::BTreeMap, sync::Arc};

use cairn_identity::ClientTerms;
use cairn_proto::envoy::{
    config::{
        cluster::v3::cluster::TransportSocketMatch,
        core::v3::{
            ProxyProtocolConfig, TlvEntry, TransportSocket, proxy_protocol_config::Version, transport_socket::ConfigType,
        },
    },
    extensions::transport_sockets::{
        internal_upstream::v3::InternalUpstreamTransport, proxy_protocol::v3::ProxyProtocolUpstreamTransport,
        raw_buffer::v3::RawBuffer, tls::v3::UpstreamTlsContext,
    },
};

use super::{
    any::{Unknown, type_name, unpack},
    origination::{self, SecretNames},
    report::{Malformed, Notes, refuse_set, unneeded},
    tls,
};
use crate::upstream::{MAX_PROXY_VALUES, ProxyHeader, TransportTerms};

/// Transport terms by the metadata of an endpoint; the first whose conditions all hold is taken.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct MatchedTransports {
    entries: Vec<(BTreeMap<String, String>, Arc<TransportTerms>)>,
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
    secrets: &mut SecretNames,
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
            TransportTerms::Tls(Arc::new(origination::terms(context, secrets, notes)?))
        }
        "envoy.extensions.transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport" => {
            let ProxyProtocolUpstreamTransport {
                config,
                transport_socket,
                allow_unspecified_address,
                tlv_as_pool_key,
            } = unpack(&any, Unknown::Refuses, notes)?;
            // We always know both addresses, and the values are the same for all connections of a cluster.
            unneeded!(allow_unspecified_address, tlv_as_pool_key);
            let header = notes.within("config", |notes| proxy_header(config.unwrap_or_default(), notes))?;
            let inner = notes.within("transport_socket", |notes| terms(transport_socket, secrets, notes))?;
            TransportTerms::Proxied(header, Box::new(inner))
        }
        other => unsupported(&format!("{other} is not known"), notes),
    })
}

fn proxy_header(config: ProxyProtocolConfig, notes: &mut Notes) -> Result<ProxyHeader, Malformed> {
    let ProxyProtocolConfig {
        version,
        pass_through_tlvs,
        added_tlvs,
    } = config;
    // Values of a PROXY header that came in: nobody sends us any, clients come by HBONE.
    unneeded!(pass_through_tlvs);
    let mut values = Vec::with_capacity(added_tlvs.len());
    for (
        index,
        TlvEntry {
            r#type,
            value,
            format_string,
        },
    ) in added_tlvs.into_iter().enumerate()
    {
        notes.at("added_tlvs", index, |notes| {
            refuse_set!(notes, format_string);
            let kind = u8::try_from(r#type).map_err(|_| notes.malformed("type", format!("{} is more than 255", r#type)))?;
            values.push((kind, value));
            Ok(())
        })?;
    }
    if values.iter().map(|(_, value)| value.len() + 3).sum::<usize>() > MAX_PROXY_VALUES {
        return Err(notes.malformed("added_tlvs", format!("they are longer than {MAX_PROXY_VALUES} bytes")));
    }
    match Version::try_from(version) {
        Ok(Version::V1) => Ok(ProxyHeader::V1),
        Ok(Version::V2) => Ok(ProxyHeader::V2 { values }),
        Err(_) => Err(notes.malformed("version", format!("{version} is not known"))),
    }
}

/// `transport_socket_matches`: which terms an endpoint's metadata asks for.
pub(crate) fn matches(
    list: Vec<TransportSocketMatch>,
    secrets: &mut SecretNames,
    notes: &mut Notes,
) -> Result<MatchedTransports, Malformed> {
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
        let terms = aside.at("transport_socket_matches", index, |aside| terms(socket, secrets, aside))?;
        let terms = match aside.refusal() {
            Some(reason) => TransportTerms::Unsupported(reason.into()),
            None => terms,
        };
        entries.push((conditions, Arc::new(terms)));
    }
    Ok(MatchedTransports { entries })
}

impl MatchedTransports {
    /// The terms for an endpoint; `None`: those of the cluster.
    pub(crate) fn of(&self, metadata: &BTreeMap<String, String>) -> Option<&Arc<TransportTerms>> {
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
