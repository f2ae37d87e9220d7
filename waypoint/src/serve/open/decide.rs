//! Deciding again about something that is open, by a chain that was not there when it began.

use std::{net::SocketAddr, sync::Arc};

use cairn_exchange::{DynamicMetadata, Exchange, Protocol, RequestHead};
use cairn_filters::OnRoute;
use cairn_policy::route::Facts;

use super::{Inner, OnChange};
use crate::{
    serve::ask::FromRequest,
    snapshot::{Chain, ChainKind, Snapshot},
};

/// What was asked, as filters saw it.
#[derive(Clone)]
pub struct Asked {
    /// What is spoken.
    pub protocol: Protocol,
    /// The request; none for TCP.
    pub request: Option<Box<RequestHead>>,
    /// The client that `x-forwarded-for` names, where it is believed.
    pub client_address: Option<SocketAddr>,
    /// What filters had noted.
    pub metadata: DynamicMetadata,
}

impl Asked {
    /// A connection of bytes.
    pub fn bytes() -> Self {
        Self {
            protocol: Protocol::Tcp,
            request: None,
            client_address: None,
            metadata: DynamicMetadata::default(),
        }
    }

    /// A request: `head` as filters saw it, where the route has edited it since.
    pub fn request(exchange: &Exchange, head: Option<&RequestHead>) -> Self {
        Self {
            protocol: exchange.protocol,
            request: head.or(exchange.request.as_ref()).cloned().map(Box::new),
            client_address: exchange.client_address,
            metadata: exchange.metadata.clone(),
        }
    }
}

/// Why what another chain has let in may not stay, if it may not.
pub(super) fn denied(inner: &Arc<Inner>, chain: &Arc<Chain>, snapshot: &Arc<Snapshot>, asked: Asked) -> Option<String> {
    match inner.proxy.settings.open_connections {
        OnChange::Continue => None,
        OnChange::Close => Some("its service's configuration has changed".to_owned()),
        OnChange::Recheck => denied_by(inner, chain, snapshot, asked),
    }
}

/// Why the chain would not let it in now.
fn denied_by(inner: &Arc<Inner>, chain: &Arc<Chain>, snapshot: &Arc<Snapshot>, asked: Asked) -> Option<String> {
    if let Some(refusal) = &chain.refuse {
        return Some(refusal.reason.to_string());
    }
    let mut exchange = Exchange::begin(asked.protocol, inner.connection.clone(), chain.name.clone(), snapshot.version);
    exchange.client_address = asked.client_address;
    exchange.metadata = asked.metadata;
    match (&chain.kind, asked.request) {
        (ChainKind::Tcp(tcp), None) => tcp.rbac.check(&mut exchange).err().map(|denied| denied.details()),
        (ChainKind::Http(http), Some(head)) => {
            let facts = Facts {
                random: 0,
                metadata: &exchange.metadata,
            };
            let route = OnRoute::new(http.routes.find(&head, facts), None);
            exchange.request = Some(*head);
            let services = FromRequest::new(inner, snapshot);
            http.filters.denies(&mut exchange, &route, &services)
        }
        // Another protocol: nobody has denied anything.
        _ => None,
    }
}
