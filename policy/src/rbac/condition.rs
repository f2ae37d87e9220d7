//! What a policy asks: trees of conditions, as configuration has them.

use std::{ops::RangeInclusive, sync::Arc};

use cairn_exchange::cel::Program;
use ipnet::IpNet;

use super::UriTemplate;
use crate::matcher::{HeaderMatcher, MetadataMatcher, StringMatcher};

/// One policy: somebody of the principals does something of the permissions, and the condition holds.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// What is done: one of these holds.
    pub permissions: Vec<Condition>,
    /// Who does it: one of these holds.
    pub principals: Vec<Condition>,
    /// What has to hold besides, as an expression.
    pub condition: Option<Arc<Program>>,
}

/// A permission or a principal. Both have nearly the same kinds, and mean the same by them.
#[derive(Clone, Debug)]
pub enum Condition {
    /// Everything.
    Always,
    /// All of these.
    All(Vec<Condition>),
    /// One of these.
    AnyOf(Vec<Condition>),
    /// Not this.
    Not(Box<Condition>),
    /// A header, pseudo-headers included. A connection without requests has none.
    Header(HeaderMatcher),
    /// The path without its query. A connection without requests has none.
    Path(StringMatcher),
    /// The path without its query, by a template.
    Template(UriTemplate),
    /// An address in a range.
    Address(Address, IpNet),
    /// The port of the service.
    Port(RangeInclusive<u16>),
    /// Some text that is known of the connection; what is missing has no shape.
    Text(Text, StringMatcher),
    /// An object of filter state, as text; only in the record of an exchange there are any.
    State(Arc<str>, StringMatcher),
    /// The client has shown a certificate on this very connection.
    Authenticated,
    /// What filters have noted about the request.
    Metadata(MetadataMatcher),
}

/// Which address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Address {
    /// Where the client wanted to go: the address of the service.
    Destination,
    /// Where the connection comes from: `source_ip`, `direct_remote_ip`.
    DirectRemote,
    /// The client, as `x-forwarded-for` names it where it is believed: `remote_ip`.
    Remote,
}

/// Which text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Text {
    /// The server name of the client's own TLS; empty where there is none.
    ServerName,
    /// The name in the certificate that the client has shown on this very connection. Inside a tunnel there is none.
    Certificate,
    /// `io.istio.peer_principal`: who opened the tunnel.
    PeerPrincipal,
    /// `io.istio.local_principal`: who we were to the client.
    LocalPrincipal,
    /// `io.istio.connect_authority`: the authority of the CONNECT.
    ConnectAuthority,
}
