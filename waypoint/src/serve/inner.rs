//! One inner connection: a client's TCP connection, in a CONNECT stream.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use cairn_exchange::{Connection, clock};
use parking_lot::Mutex;
use tokio::time::sleep_until;

use super::{line::Line, open::Changes};
use crate::{
    proxy::Proxy,
    snapshot::{
        Chain, ChainKind, HttpSettings, Serves, Snapshot,
        matcher::{Facts, Spoken},
    },
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
    /// What the connection and the exchange on it tell each other; HTTP/1 only.
    pub line: Option<Arc<Line>>,
    /// What it is told of changes of its service.
    pub changes: Changes,
    /// Requests under way.
    active: AtomicU32,
    /// When there was last one, in milliseconds since the connection was opened.
    idle_since: AtomicU64,
    /// The chain of the last request, by version of the configuration.
    last: Mutex<Option<(u64, Arc<Chain>)>>,
}

// === impl Inner ===

impl Inner {
    /// An inner connection of which the protocol is not known yet.
    pub fn new(proxy: Arc<Proxy>, connection: Arc<Connection>, address: Option<SocketAddr>, source: Option<Box<str>>) -> Self {
        Self {
            proxy,
            connection,
            address,
            source,
            spoken: None,
            line: None,
            changes: Changes::default(),
            active: AtomicU32::new(0),
            idle_since: AtomicU64::new(0),
            last: Mutex::new(None),
        }
    }

    /// The same connection, supposing that this is spoken.
    #[must_use]
    pub fn also_speaking(&self, spoken: Spoken) -> Self {
        Self::new(self.proxy.clone(), self.connection.clone(), self.address, self.source.clone()).speaking(spoken)
    }

    /// The same with other facts of the connection.
    #[must_use]
    pub fn with_connection(&self, connection: Arc<Connection>) -> Self {
        Self {
            spoken: self.spoken,
            ..Self::new(self.proxy.clone(), connection, self.address, self.source.clone())
        }
    }

    /// The same once it is known what is spoken.
    #[must_use]
    pub fn speaking(self, spoken: Spoken) -> Self {
        let one_at_a_time = matches!(spoken, Spoken::Http11 | Spoken::Http10);
        Self {
            spoken: Some(spoken),
            line: one_at_a_time.then(Arc::default),
            ..self
        }
    }

    /// A request begins.
    pub fn busy(&self) {
        self.active.fetch_add(1, Ordering::AcqRel);
    }

    /// Whether something is under way on it: a request, or bytes.
    pub fn is_busy(&self) -> bool {
        self.active.load(Ordering::Acquire) > 0
    }

    /// Whether its requests are tasks of their own.
    pub fn has_tasks(&self) -> bool {
        self.spoken == Some(Spoken::Http2)
    }

    /// A request has ended.
    pub fn done(&self) {
        let passed = clock::now().saturating_duration_since(self.connection.opened);
        self.idle_since
            .store(u64::try_from(passed.as_millis()).unwrap_or(u64::MAX), Ordering::Release);
        self.active.fetch_sub(1, Ordering::AcqRel);
    }

    /// Completes when the connection is to take no more requests: there was none for so long, or it is so old, as the chain says
    /// that serves it; never without a limit.
    pub async fn spent(&self) {
        loop {
            let (idle, most) = self.patience();
            let now = clock::now();
            let since = self.connection.opened + Duration::from_millis(self.idle_since.load(Ordering::Acquire));
            let busy = self.is_busy();
            let idle_end = idle.map(|idle| if busy { now } else { since } + idle);
            let end = idle_end
                .into_iter()
                .chain(most.map(|most| self.connection.opened + most))
                .min();
            match end {
                None => return std::future::pending().await,
                Some(end) if end <= now => return,
                Some(end) => sleep_until(end).await,
            }
        }
    }

    /// How long the connection may be without a request, and how long it may last.
    fn patience(&self) -> (Option<Duration>, Option<Duration>) {
        let (_, chain) = self.http_chain();
        let of = |settings: &HttpSettings| (settings.idle_timeout, settings.max_connection_duration);
        let (idle, most) = match chain.as_ref().map(|chain| &chain.kind) {
            Some(ChainKind::Http(http)) => of(&http.settings),
            _ => of(&HttpSettings::default()),
        };
        (idle.filter(|idle| !idle.is_zero()), most)
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

    /// The newest configuration and the chain that it has for the connection, whatever it passes.
    pub fn chain_now(&self) -> (Arc<Snapshot>, Option<Arc<Chain>>) {
        let (snapshot, serves) = self.serves();
        let chain = serves.chain().cloned();
        (snapshot, chain)
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
