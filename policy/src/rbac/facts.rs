//! What is known of a request or connection when it is decided.

use std::{
    borrow::Cow,
    net::{IpAddr, SocketAddr},
};

use cairn_exchange::{Connection, DynamicMetadata, Exchange, RequestHead, format::View};

use super::{Address, Text};
use crate::matcher::{HeaderMatcher, HeaderName, any_value, request_header};

/// The facts that conditions ask for.
#[derive(Clone, Copy)]
pub struct Facts<'a> {
    /// The request, after its path was normalized; `None` for a connection whose content is nobody's business.
    pub request: Option<&'a RequestHead>,
    /// Whether the request has a path, as all have but CONNECT.
    pub has_path: bool,
    /// The address that the client wanted: the service's, when it is known.
    pub destination_ip: Option<IpAddr>,
    /// The port that the client wanted: the service's.
    pub destination_port: u16,
    /// Where the connection comes from.
    pub direct_remote_ip: IpAddr,
    /// The client, as `x-forwarded-for` names it where it is believed.
    pub remote_ip: IpAddr,
    /// The server name of the client's own TLS.
    pub requested_server_name: Option<&'a str>,
    /// The name in the certificate that the client has shown on this very connection.
    pub certificate: Option<&'a str>,
    /// Who opened the tunnel.
    pub peer_principal: Option<&'a str>,
    /// Who we were to the client.
    pub local_principal: Option<&'a str>,
    /// The authority of the CONNECT.
    pub connect_authority: Option<&'a str>,
    /// What filters have noted.
    pub metadata: &'a DynamicMetadata,
    /// The whole record, for expressions; there is none before a tunnel is accepted.
    pub exchange: Option<&'a Exchange>,
}

// === impl Facts ===

impl<'a> Facts<'a> {
    /// Of a request or connection inside a tunnel.
    ///
    /// The port is the service's also where the client asked for the service by its name.
    pub fn inside(exchange: &'a Exchange) -> Self {
        let connection: &Connection = &exchange.connection;
        Self {
            request: exchange.request.as_ref(),
            has_path: exchange.request.is_some(),
            destination_ip: connection.local_address.map(|address| address.ip()),
            destination_port: connection.service_port,
            direct_remote_ip: connection.remote_address.ip(),
            remote_ip: exchange.client_address.unwrap_or(connection.remote_address).ip(),
            requested_server_name: connection.requested_server_name.as_deref(),
            // The certificate was shown to the tunnel; inside of it there is no TLS of ours (contract xds §6.4, §6.9).
            certificate: None,
            peer_principal: connection.peer.as_ref().map(|peer| peer.as_str()),
            local_principal: connection.local.as_ref().map(|local| local.as_str()),
            connect_authority: Some(&connection.authority),
            metadata: &exchange.metadata,
            exchange: Some(exchange),
        }
    }

    /// Of a connection of which only its ends are known: who opened it, where it comes from and where it goes.
    pub fn of_connection(peer_principal: Option<&'a str>, source: IpAddr, destination: SocketAddr) -> Self {
        Self {
            request: None,
            has_path: false,
            destination_ip: Some(destination.ip()),
            destination_port: destination.port(),
            direct_remote_ip: source,
            remote_ip: source,
            requested_server_name: None,
            certificate: None,
            peer_principal,
            local_principal: None,
            connect_authority: None,
            metadata: DynamicMetadata::NONE,
            exchange: None,
        }
    }

    /// Of a CONNECT itself, on the tunnel that was accepted at `accepted_at` (contract xds §6.9): there the certificate speaks,
    /// and nothing has been put into filter state yet.
    pub fn tunnel(connection: &'a Connection, connect: &'a RequestHead, accepted_at: SocketAddr) -> Self {
        Self {
            request: Some(connect),
            has_path: false,
            destination_ip: Some(accepted_at.ip()),
            destination_port: accepted_at.port(),
            direct_remote_ip: connection.remote_address.ip(),
            remote_ip: connection.remote_address.ip(),
            requested_server_name: None,
            certificate: connection.peer.as_ref().map(|peer| peer.as_str()),
            peer_principal: None,
            local_principal: None,
            connect_authority: None,
            metadata: DynamicMetadata::NONE,
            exchange: None,
        }
    }

    /// What expressions look at.
    pub(super) fn view(&self) -> Option<View<'a>> {
        self.exchange.map(View::new)
    }

    pub(super) fn address(&self, which: Address) -> Option<IpAddr> {
        let address = match which {
            Address::Destination => self.destination_ip?,
            Address::DirectRemote => self.direct_remote_ip,
            Address::Remote => self.remote_ip,
        };
        Some(address.to_canonical())
    }

    pub(super) fn text(&self, which: Text) -> Option<&'a str> {
        match which {
            Text::ServerName => Some(self.requested_server_name.unwrap_or_default()),
            Text::Certificate => self.certificate,
            Text::PeerPrincipal => self.peer_principal,
            Text::LocalPrincipal => self.local_principal,
            Text::ConnectAuthority => self.connect_authority,
        }
    }

    /// An object of filter state.
    pub(super) fn state(&self, key: &str) -> Option<Vec<u8>> {
        self.view()?.filter_state(key)
    }

    /// The path without its query.
    pub(super) fn path(&self) -> Option<&'a str> {
        self.request.filter(|_| self.has_path).map(|head| head.path.path())
    }

    pub(super) fn header(&self, name: &HeaderName) -> Option<Cow<'a, [u8]>> {
        match name {
            HeaderName::Path if !self.has_path => None,
            name => request_header(self.request?, name),
        }
    }

    /// Whether one of the values of a header has what is asked; `None` when it has none.
    pub(super) fn any_header(&self, name: &HeaderName, asked: impl FnMut(&[u8]) -> bool) -> Option<bool> {
        match name {
            HeaderName::Path if !self.has_path => None,
            name => any_value(self.request?, name, asked),
        }
    }

    /// Whether a header matches.
    pub(super) fn header_matches(&self, matcher: &HeaderMatcher) -> bool {
        match (&matcher.name, self.request) {
            (HeaderName::Path, _) if !self.has_path => matcher.matches_value(None),
            (_, Some(head)) => matcher.matches(head),
            (_, None) => matcher.matches_value(None),
        }
    }
}
