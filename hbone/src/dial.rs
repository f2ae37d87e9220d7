//! How a tunnel connection is made: TCP, then mutual TLS that must agree on HTTP/2.
//!
//! [`Dial`] is the seam: the pool asks it for a byte stream to a destination and knows nothing of sockets or certificates. [`TcpTls`]
//! is the one that production uses. It takes the TLS configuration afresh at each dial, so a rotated certificate is in use with the
//! next connection, and it reads identities through a function that it is given.

use std::{future::Future, io, net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use cairn_exchange::SpiffeId;
use rustls::{
    ClientConfig,
    pki_types::{CertificateDer, ServerName},
};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::pool::Destination;

/// Makes connections for a [`crate::Pool`].
pub trait Dial: Send + Sync + 'static {
    /// What carries the HTTP/2 connection.
    type Io: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// Connects to the destination. The pool bounds the time.
    fn dial(&self, destination: &Destination) -> impl Future<Output = Result<Dialed<Self::Io>, DialError>> + Send;
}

/// A connection that is ready for HTTP/2.
#[derive(Debug)]
pub struct Dialed<Io> {
    /// Carries the bytes.
    pub io: Io,
    /// Who the peer proved to be.
    pub peer_id: Option<SpiffeId>,
    /// The address that the connection leaves from.
    pub local_address: SocketAddr,
}

/// Why no connection could be made.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The TCP connection failed: refused, unreachable, reset.
    #[error("cannot connect: {0}")]
    Connect(#[source] io::Error),
    /// The TLS handshake failed.
    #[error("the TLS handshake failed: {0}")]
    Tls(#[source] io::Error),
    /// TLS succeeded without agreeing on HTTP/2.
    #[error("the peer does not speak HTTP/2 (ALPN {})", match .0 { Some(name) => name, None => "was not answered" })]
    Alpn(Option<String>),
    /// The certificate is valid but names nobody whom we want to speak to.
    #[error("the peer's identity is not accepted: {0}")]
    Identity(String),
    /// There is no TLS configuration to connect with, for example before the first certificate has arrived.
    #[error("no TLS configuration to connect with: {0}")]
    NotReady(String),
}

/// Reads the peer's identity from its certificates, leaf first; an error refuses the connection.
type Identify = dyn Fn(&Destination, &[CertificateDer<'static>]) -> Result<Option<SpiffeId>, String> + Send + Sync;
/// The TLS terms for a destination, asked for at each dial.
type Terms = dyn Fn(&Destination) -> Result<Arc<ClientConfig>, String> + Send + Sync;

/// A TCP connection under way.
pub type Connecting = Pin<Box<dyn Future<Output = io::Result<TcpStream>> + Send>>;
/// Makes the TCP connection: from another network namespace, with a mark, from an address.
type Connect = dyn Fn(&Destination) -> Connecting + Send + Sync;

/// Dials over TCP and TLS.
#[derive(Clone)]
pub struct TcpTls {
    terms: Arc<Terms>,
    identify: Arc<Identify>,
    connect: Option<Arc<Connect>>,
}

/// Kernel keepalive, for peers that vanish while no PING is due.
const TCP_KEEPALIVE: Duration = Duration::from_secs(60);
const ALPN_H2: &[u8] = b"h2";

// === impl TcpTls ===

impl TcpTls {
    /// `terms` gives the TLS configuration for each dial (its ALPN must offer `h2`); `identify` reads who answered.
    pub fn new(
        terms: impl Fn(&Destination) -> Result<Arc<ClientConfig>, String> + Send + Sync + 'static,
        identify: impl Fn(&Destination, &[CertificateDer<'static>]) -> Result<Option<SpiffeId>, String> + Send + Sync + 'static,
    ) -> Self {
        Self {
            terms: Arc::new(terms),
            identify: Arc::new(identify),
            connect: None,
        }
    }

    /// With TCP connections that are made by `connect`.
    pub fn over(mut self, connect: impl Fn(&Destination) -> Connecting + Send + Sync + 'static) -> Self {
        self.connect = Some(Arc::new(connect));
        self
    }
}

impl Dial for TcpTls {
    type Io = TlsStream<TcpStream>;

    async fn dial(&self, destination: &Destination) -> Result<Dialed<Self::Io>, DialError> {
        let terms = (self.terms)(destination).map_err(DialError::NotReady)?;
        let tcp = match &self.connect {
            Some(connect) => connect(destination).await,
            None => TcpStream::connect(destination.address).await,
        };
        let tcp = tcp.map_err(DialError::Connect)?;
        tcp.set_nodelay(true).map_err(DialError::Connect)?;
        SockRef::from(&tcp)
            .set_tcp_keepalive(&TcpKeepalive::new().with_time(TCP_KEEPALIVE).with_interval(TCP_KEEPALIVE))
            .map_err(DialError::Connect)?;
        let local_address = tcp.local_addr().map_err(DialError::Connect)?;
        // An address as server name means no SNI, as between all parts of the mesh (contract runtime §9.1).
        let name = ServerName::IpAddress(destination.address.ip().into());
        let io = TlsConnector::from(terms).connect(name, tcp).await.map_err(DialError::Tls)?;
        let (_, session) = io.get_ref();
        match session.alpn_protocol() {
            Some(ALPN_H2) => {}
            other => return Err(DialError::Alpn(other.map(|name| String::from_utf8_lossy(name).into_owned()))),
        }
        let certificates = session.peer_certificates().unwrap_or_default();
        let peer_id = (self.identify)(destination, certificates).map_err(DialError::Identity)?;
        Ok(Dialed {
            io,
            peer_id,
            local_address,
        })
    }
}
