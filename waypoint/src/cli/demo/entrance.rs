//! The entrances: where a client without a mesh steps in, and what the client's ztunnel would do for it.
//!
//! Each entrance stands for one address and port of the mesh. Each connection that it accepts becomes one CONNECT to that address, in
//! a tunnel to the waypoint that carries the visitor's identity and comes from the visitor's address; then bytes go both ways. A
//! tunnel that is refused closes the connection, and is told.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use cairn_exchange::clock;
use cairn_hbone::{Destination, Dial, DialError, Dialed, Pool, PoolSettings};
use cairn_identity::{ClientTerms, Identity};
use http::HeaderMap;
use rustls::pki_types::ServerName;
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    sync::Semaphore,
    time::sleep,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{
    StartError,
    mesh::{TRUST_DOMAIN, Tell},
    told::Told,
};
use crate::serve::listener::bind;

/// Connections at a time through all entrances; more wait to be accepted.
const MAX_CONNECTIONS: usize = 1024;
/// Pause after an accept that failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The name of the visitor, for lines about tunnels that were refused.
pub const VISITOR: &str = "visitor";

/// What an entrance leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The shop's HTTP port.
    Shop,
    /// The shop's HTTP/2 port.
    ShopHttp2,
    /// The shop's TCP port.
    ShopTcp,
    /// The vault's HTTP port.
    Vault,
    /// An address that is nobody's.
    Nobody,
}

/// Opens tunnels as the visitor's node would.
struct Visitor {
    identity: Identity,
    address: IpAddr,
}

/// Opens entrances that lead to one waypoint.
pub struct Entrances {
    tunnels: Pool,
    waypoint: SocketAddr,
    tell: Tell,
    room: Arc<Semaphore>,
}

// === impl Place ===

impl Place {
    /// All of them; the first is at the address that the user gave, the others at the ports after it.
    pub const ALL: [Place; 5] = [Place::Shop, Place::ShopHttp2, Place::ShopTcp, Place::Vault, Place::Nobody];

    /// Where it is in the mesh (`examples/demo.yaml`).
    pub fn authority(self) -> &'static str {
        match self {
            Place::Shop => "10.96.1.10:80",
            Place::ShopHttp2 => "10.96.1.10:8090",
            Place::ShopTcp => "10.96.1.10:9000",
            Place::Vault => "10.96.1.20:80",
            Place::Nobody => "10.96.9.9:80",
        }
    }
}

// === impl Visitor ===

impl Dial for Visitor {
    type Io = TlsStream<TcpStream>;

    async fn dial(&self, destination: &Destination) -> Result<Dialed<Self::Io>, DialError> {
        let terms = ClientTerms::hbone([format!("spiffe://{TRUST_DOMAIN}/")]);
        let config = self
            .identity
            .client_config(&terms)
            .ok_or_else(|| DialError::NotReady("there is no certificate".into()))?;
        // ztunnel keeps the address of the client's pod; the waypoint knows workloads by it.
        let socket = TcpSocket::new_v4().map_err(DialError::Connect)?;
        socket.bind(SocketAddr::new(self.address, 0)).map_err(DialError::Connect)?;
        let tcp = socket.connect(destination.address).await.map_err(DialError::Connect)?;
        tcp.set_nodelay(true).map_err(DialError::Connect)?;
        let local_address = tcp.local_addr().map_err(DialError::Connect)?;
        let name = ServerName::IpAddress(destination.address.ip().into());
        let io = TlsConnector::from(config).connect(name, tcp).await.map_err(DialError::Tls)?;
        let certificates = io.get_ref().1.peer_certificates().unwrap_or_default();
        let peer_id = Some(cairn_identity::peer_id(certificates).map_err(|error| DialError::Identity(error.to_string()))?);
        Ok(Dialed {
            io,
            peer_id,
            local_address,
        })
    }
}

// === impl Entrances ===

impl Entrances {
    /// Entrances for a visitor with this identity and address, to the waypoint at `waypoint`.
    pub fn new(identity: Identity, address: IpAddr, waypoint: SocketAddr, tell: Tell) -> Self {
        Self {
            tunnels: Pool::new(PoolSettings::default(), Visitor { identity, address }),
            waypoint,
            tell,
            room: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
        }
    }

    /// Opens one, and returns where it is.
    pub fn open(self: &Arc<Self>, at: SocketAddr, place: Place) -> Result<SocketAddr, StartError> {
        let listener = bind(at).map_err(|error| StartError::entrance(at, error))?;
        let address = listener.local_addr().map_err(|error| StartError::entrance(at, error))?;
        tokio::spawn(self.clone().accept(listener, place));
        Ok(address)
    }

    async fn accept(self: Arc<Self>, listener: TcpListener, place: Place) {
        // Nobody closes the semaphore.
        while let Ok(permit) = self.room.clone().acquire_owned().await {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let entrances = self.clone();
                    tokio::spawn(async move {
                        entrances.enter(stream, place).await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn enter(&self, mut client: TcpStream, place: Place) {
        // A connection that cannot be set so is only slower.
        let _ = client.set_nodelay(true);
        let begun = clock::now();
        let destination = Destination {
            address: self.waypoint,
            trust: 0,
        };
        match self.tunnels.open(&destination, place.authority(), HeaderMap::new()).await {
            Ok(mut opened) => {
                // Whichever side breaks, both are closed by going out of scope; the waypoint tells of it.
                let _ = tokio::io::copy_bidirectional(&mut client, &mut opened.stream).await;
            }
            Err(error) => {
                let took = clock::now().saturating_duration_since(begun);
                self.tell.tell(Told::refused(VISITOR, place.authority(), &error, took));
            }
        }
    }
}
