//! The tunnels of one pod: whom they lead to, and who may answer there.
//!
//! Tunnels are shared by connections that go to one address and expect the same identities. What decides about a peer is the whole
//! identity, which is compared when it has proved one; a tunnel to somebody else carries no request. A tunnel into another network goes
//! inside one to that network's gateway.

use std::{
    hash::{Hash, Hasher},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use cairn_exchange::SpiffeId;
use cairn_hbone::{Destination, Dial, DialError, Dialed, OpenError, Opened, Pool, PoolSettings, TcpTls, TunnelStream};
use cairn_identity::{ClientTerms, Identity, peer_id, server_name};
use foldhash::fast::RandomState;
use http::HeaderMap;
use papaya::HashMap;
use rustls::{ClientConfig, pki_types::CertificateDer};
use tokio::time::timeout;
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{
    route::{Identities, TunnelTo},
    sockets::Sockets,
};

/// Sets of identities that are remembered.
const MOST_EXPECTED: usize = 16_384;
/// How long a connection waits for the first certificate.
const CERTIFICATE_TIMEOUT: Duration = Duration::from_secs(10);

/// The tunnels of one pod.
#[derive(Debug)]
pub struct Tunnels {
    pool: Pool,
    inner: Pool,
    expected: Arc<Expected>,
    identity: Identity,
}

/// Who may answer at the end of a tunnel, by number.
#[derive(Debug, Default)]
struct Expected {
    numbers: HashMap<Arc<End>, u64, RandomState>,
    ends: HashMap<u64, Arc<End>, RandomState>,
    next: AtomicU64,
}

/// The end of a tunnel.
#[derive(Debug, PartialEq, Eq)]
struct End {
    expect: Identities,
    /// What it goes through.
    outer: Option<Outer>,
}

/// A stream that carries another tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Outer {
    destination: Destination,
    authority: String,
}

/// Dials a tunnel inside of a stream of another.
struct Through {
    pool: Pool,
    expected: Arc<Expected>,
    identity: Identity,
}

// === impl Tunnels ===

impl Tunnels {
    /// None yet.
    pub fn new(settings: &PoolSettings, identity: &Identity, sockets: &Sockets) -> Self {
        let expected = Arc::new(Expected::default());
        let (for_terms, for_peers, identity, sockets) = (expected.clone(), expected.clone(), identity.clone(), sockets.clone());
        let own = identity.clone();
        let dial = TcpTls::new(
            move |destination| for_terms.terms(&own, destination.trust),
            move |destination, certificates| for_peers.check(destination.trust, certificates).map(Some),
        )
        .over(move |destination| {
            let (sockets, address) = (sockets.clone(), destination.address);
            Box::pin(async move { sockets.connect(address, None).await })
        });
        let pool = Pool::new(settings.clone(), dial);
        let through = Through {
            pool: pool.clone(),
            expected: expected.clone(),
            identity: identity.clone(),
        };
        let inner = Pool::new(settings.clone(), through);
        Self {
            pool,
            inner,
            expected,
            identity,
        }
    }

    /// Opens a stream at `address`.
    pub async fn open(&self, address: SocketAddr, tunnel: &TunnelTo, headers: HeaderMap) -> Result<Opened, OpenError> {
        // The first connection may come before the certificate; what fails without one says so.
        if self.identity.current().is_none() {
            let _ready = timeout(CERTIFICATE_TIMEOUT, self.identity.ready()).await;
        }
        let destination = Destination {
            address,
            trust: self.expected.number(&tunnel.expect, None),
        };
        let Some(inner) = &tunnel.inner else {
            return self.pool.open(&destination, &tunnel.authority, headers).await;
        };
        let outer = Outer {
            destination,
            authority: tunnel.authority.clone(),
        };
        let destination = Destination {
            address,
            trust: self.expected.number(&inner.expect, Some(outer)),
        };
        self.inner.open(&destination, &inner.authority, headers).await
    }
}

// === impl Expected ===

impl Expected {
    fn number(&self, expect: &Identities, outer: Option<Outer>) -> u64 {
        let end = Arc::new(End {
            expect: expect.clone(),
            outer,
        });
        let numbers = self.numbers.pin();
        if let Some(number) = numbers.get(&end) {
            return *number;
        }
        let ends = self.ends.pin();
        if numbers.len() >= MOST_EXPECTED {
            // Open tunnels have been checked; new ones get new numbers.
            numbers.clear();
            ends.clear();
        }
        let number = self.next.fetch_add(1, Relaxed);
        ends.insert(number, end.clone());
        *numbers.get_or_insert(end, number)
    }

    fn end(&self, number: u64) -> Result<Arc<End>, String> {
        let known = self.ends.pin().get(&number).cloned();
        known.ok_or_else(|| "nobody is expected there any more".to_owned())
    }

    fn terms(&self, identity: &Identity, number: u64) -> Result<Arc<ClientConfig>, String> {
        let end = self.end(number)?;
        let mut prefixes: Vec<_> = end
            .expect
            .iter()
            .map(|id| format!("spiffe://{}/", id.trust_domain()))
            .collect();
        prefixes.sort();
        prefixes.dedup();
        let terms = ClientTerms::hbone(prefixes);
        identity.try_client_config(&terms).map_err(|error| error.to_string())
    }

    /// Who answered, if it is one of those.
    fn check(&self, number: u64, certificates: &[CertificateDer<'static>]) -> Result<SpiffeId, String> {
        let peer = peer_id(certificates).map_err(|error| error.to_string())?;
        let end = self.end(number)?;
        if end.expect.contains(&peer) {
            return Ok(peer);
        }
        let names: Vec<_> = end.expect.iter().map(SpiffeId::as_str).collect();
        Err(format!("{peer} answered where {} is expected", names.join(" or ")))
    }
}

impl Hash for End {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.expect.hash(state);
        if let Some(Outer { destination, authority }) = &self.outer {
            destination.hash(state);
            authority.hash(state);
        }
    }
}

// === impl Through ===

impl Dial for Through {
    type Io = TlsStream<TunnelStream>;

    async fn dial(&self, destination: &Destination) -> Result<Dialed<Self::Io>, DialError> {
        let number = destination.trust;
        let end = self.expected.end(number).map_err(DialError::NotReady)?;
        let Some(Outer { destination, authority }) = &end.outer else {
            return Err(DialError::NotReady("it goes through nothing".to_owned()));
        };
        let terms = self.expected.terms(&self.identity, number).map_err(DialError::NotReady)?;
        let failed = |error: OpenError| DialError::Connect(std::io::Error::other(error));
        let outer = self
            .pool
            .open(destination, authority, HeaderMap::new())
            .await
            .map_err(failed)?;
        let tls = TlsConnector::from(terms).connect(server_name(), outer.stream).await;
        let io = tls.map_err(DialError::Tls)?;
        let session = io.get_ref().1;
        if session.alpn_protocol() != Some(b"h2") {
            return Err(DialError::Alpn(None));
        }
        let certificates = session.peer_certificates().unwrap_or_default();
        let peer = self.expected.check(number, certificates).map_err(DialError::Identity)?;
        Ok(Dialed {
            io,
            peer_id: Some(peer),
            local_address: outer.local_address,
        })
    }
}
