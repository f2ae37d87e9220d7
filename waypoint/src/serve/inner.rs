//! One inner connection: a client's TCP connection, in a CONNECT stream.

use std::{net::SocketAddr, sync::Arc};

use cairn_exchange::Connection;
use parking_lot::Mutex;

use crate::{
    proxy::Proxy,
    snapshot::{
        Chain, Serves, Snapshot,
        matcher::{Facts, Spoken},
    },
    upstream::InformationalRelay,
};

/// An inner connection and what is known of it.
pub struct Inner {
    /// What all connections share.
    pub proxy: Arc<Proxy>,
    /// The parties.
    pub connection: Arc<Connection>,
    /// The authority, when it is an address.
    pub address: Option<SocketAddr>,
    /// `x-istio-source` of the CONNECT.
    pub source: Option<Box<str>>,
    /// What is spoken.
    pub spoken: Option<Spoken>,
    /// Where informational answers go; HTTP/1 only.
    pub relay: Option<Arc<InformationalRelay>>,
    /// The chain of the last request, by version of the configuration.
    last: Mutex<Option<(u64, Arc<Chain>)>>,
}

// === impl Inner ===

impl Inner {
    /// An inner connection of which the protocol is not known yet.
    pub fn new(proxy: Arc<Proxy>, connection: Arc<Connection>, address: Option<SocketAddr>, source: Option<Box<str>>) -> Self {
        Self { proxy, connection, address, source, spoken: None, relay: None, last: Mutex::new(None) }
    }

    /// The same once it is known what is spoken.
    #[must_use]
    pub fn speaking(self, spoken: Spoken) -> Self {
        let relay = matches!(spoken, Spoken::Http11 | Spoken::Http10).then(Arc::default);
        Self { spoken: Some(spoken), relay, ..self }
    }

    /// What a matcher may look at.
    pub fn facts(&self) -> Facts<'_> {
        Facts {
            destination_ip: self.address.map(|address| address.ip()),
            destination_port: self.address.map(|address| address.port()),
            source_ip: self.connection.remote_address.ip(),
            authority: &self.connection.authority,
            source: self.source.as_deref(),
            spoken: self.spoken,
        }
    }

    /// The newest configuration, and what it says of this connection.
    pub fn serves(&self) -> (Arc<Snapshot>, Serves) {
        let snapshot = self.proxy.snapshot.load_full();
        let serves = snapshot.serves(&self.facts());
        (snapshot, serves)
    }

    /// The newest configuration and the chain that it has for a request of this connection, if that is still one for HTTP.
    pub fn http_chain(&self) -> (Arc<Snapshot>, Option<Arc<Chain>>) {
        let snapshot = self.proxy.snapshot.load_full();
        if let Some((version, chain)) = &*self.last.lock()
            && *version == snapshot.version
        {
            return (snapshot, Some(chain.clone()));
        }
        match snapshot.serves(&self.facts()) {
            Serves::Http(chain) => {
                *self.last.lock() = Some((snapshot.version, chain.clone()));
                (snapshot, Some(chain))
            }
            Serves::Tcp(_) | Serves::Detect | Serves::Nobody(_) => (snapshot, None),
        }
    }
}
