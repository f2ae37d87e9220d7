//! Accepts tunnel connections: TCP, mutual TLS by the terms that istiod sent, then HTTP/2.

use std::{
    future::poll_fn,
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::{Arc, atomic::Ordering},
    task::Poll,
    time::Duration,
};

use cairn_hbone::{Peer, ServeError, drain};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    time::{Sleep, sleep, timeout},
};
use tokio_rustls::TlsAcceptor;

use super::{
    trusted::{GRACE, Grounds, Trusted},
    tunnel,
};
use crate::proxy::{Proxy, under};

/// Time for a TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after an accept that failed for want of file descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Connections that the kernel keeps for us.
const BACKLOG: i32 = 4096;

/// Opens a listening socket. One for IPv6 takes IPv6 only, as Envoy's: in clusters of both families istiod names `0.0.0.0` and `[::]`,
/// and both have to be there.
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Accepts until the drain says that it is enough; open connections end on their own.
pub async fn accept(proxy: Arc<Proxy>, listener: TcpListener, mut stop: drain::Watch) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.drained() => return,
        };
        match accepted {
            Ok((stream, address)) => {
                tokio::spawn(connection(proxy.clone(), stream, address));
            }
            Err(error) => {
                tracing::warn!(%error, "a tunnel connection could not be accepted");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection(proxy: Arc<Proxy>, stream: TcpStream, address: SocketAddr) {
    let _counted = under(&proxy.live.tunnels);
    match handshake(&proxy, stream, address).await {
        Ok((stream, peer, trusted)) => {
            let mut settings = proxy.settings.tunnel_server.clone();
            if let Some(terminate) = &proxy.snapshot.load().terminate {
                settings.streams.floor = terminate.max_concurrent_streams;
                if let Some((interval, timeout)) = terminate.keepalive {
                    settings.keepalive.interval = interval;
                    settings.keepalive.timeout = timeout;
                }
            }
            // Its own drain, for the day on which its peer is believed no more.
            let (ending, watch) = drain::channel();
            let served = cairn_hbone::serve(stream, Arc::new(peer), &settings, watch, |connect| {
                tokio::spawn(tunnel::serve(proxy.clone(), connect));
            });
            if let Err(error) = until_distrusted(served, &trusted, ending, proxy.drain.clone()).await {
                tracing::debug!(%error, client = %address, "tunnel connection ended");
            }
        }
        Err(error) => {
            proxy.live.handshakes_failed.fetch_add(1, Ordering::Relaxed);
            tracing::info!(%error, client = %address, "tunnel connection refused");
        }
    }
}

/// Serves until the connection has ended; ends it in good order when the proxy drains, and within [`GRACE`] when its peer is believed no
/// more. The proxy's drain counts it as long as it lasts.
async fn until_distrusted(
    served: impl Future<Output = Result<(), ServeError>>,
    trusted: &Trusted,
    ending: drain::Trigger,
    drain: drain::Watch,
) -> Result<(), ServeError> {
    let mut served = pin!(served);
    let mut drained = drain.into_drained();
    let mut grace: Option<Pin<Box<Sleep>>> = None;
    poll_fn(|cx| {
        if !ending.is_started() && Pin::new(&mut drained).poll(cx).is_ready() {
            ending.start();
        }
        if grace.is_none() && trusted.poll_distrusted(cx).is_ready() {
            ending.start();
            grace = Some(Box::pin(sleep(GRACE)));
        }
        if let Poll::Ready(ended) = served.as_mut().poll(cx) {
            return Poll::Ready(ended);
        }
        match &mut grace {
            Some(grace) => grace.as_mut().poll(cx).map(Ok),
            None => Poll::Pending,
        }
    })
    .await
}

/// Why a connection did not become a tunnel.
#[derive(Debug, thiserror::Error)]
enum HandshakeError {
    #[error("the listener's configuration has not arrived yet")]
    NoConfiguration,
    #[error("there is no valid certificate of our own")]
    NoCertificate,
    #[error("the TLS handshake took longer than {HANDSHAKE_TIMEOUT:?}")]
    Timeout,
    #[error("the TLS handshake failed: {0}")]
    Tls(io::Error),
    #[error("the client's certificate names nobody: {0}")]
    Identity(String),
}

async fn handshake(
    proxy: &Proxy,
    stream: TcpStream,
    address: SocketAddr,
) -> Result<(tokio_rustls::server::TlsStream<TcpStream>, Peer, Arc<Trusted>), HandshakeError> {
    let grounds = Grounds::now(proxy);
    let terms = proxy
        .snapshot
        .load()
        .terminate
        .clone()
        .ok_or(HandshakeError::NoConfiguration)?;
    let config = proxy
        .identity
        .server_config(&terms.tls)
        .ok_or(HandshakeError::NoCertificate)?;
    let local_id = proxy.identity.current().map(|credentials| credentials.id().clone());
    stream.set_nodelay(true).map_err(HandshakeError::Tls)?;
    let local_address = stream.local_addr().map_err(HandshakeError::Tls)?;
    let stream = timeout(HANDSHAKE_TIMEOUT, TlsAcceptor::from(config).accept(stream))
        .await
        .map_err(|_| HandshakeError::Timeout)?
        .map_err(HandshakeError::Tls)?;
    let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let id = match certificates {
        [] => None,
        shown => Some(cairn_identity::peer_id(shown).map_err(|error| HandshakeError::Identity(error.to_string()))?),
    };
    let trusted = proxy
        .trusted
        .enter(proxy, &grounds, id.clone(), address, certificates.to_vec());
    Ok((
        stream,
        Peer {
            id,
            address: canonical(address),
            local_address: canonical(local_address),
            local_id,
        },
        trusted,
    ))
}

/// An IPv4 address that came through an IPv6 socket, as IPv4.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
