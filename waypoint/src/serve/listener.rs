//! Accepts tunnel connections: TCP, mutual TLS by the terms that istiod sent, then HTTP/2.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use cairn_hbone::{Peer, drain};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;

use super::tunnel;
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
        Ok((stream, peer)) => {
            let drain = proxy.drain.clone();
            let mut settings = proxy.settings.tunnel_server.clone();
            if let Some(terminate) = &proxy.snapshot.load().terminate {
                settings.streams.floor = terminate.max_concurrent_streams;
                if let Some((interval, timeout)) = terminate.keepalive {
                    settings.keepalive.interval = interval;
                    settings.keepalive.timeout = timeout;
                }
            }
            let served = cairn_hbone::serve(stream, Arc::new(peer), &settings, drain, |connect| {
                tokio::spawn(tunnel::serve(proxy.clone(), connect));
            });
            if let Err(error) = served.await {
                tracing::debug!(%error, client = %address, "tunnel connection ended");
            }
        }
        Err(error) => {
            proxy.live.handshakes_failed.fetch_add(1, Ordering::Relaxed);
            tracing::info!(%error, client = %address, "tunnel connection refused");
        }
    }
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
) -> Result<(tokio_rustls::server::TlsStream<TcpStream>, Peer), HandshakeError> {
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
    let id = match stream.get_ref().1.peer_certificates() {
        Some(certificates) if !certificates.is_empty() => {
            Some(cairn_identity::peer_id(certificates).map_err(|error| HandshakeError::Identity(error.to_string()))?)
        }
        _ => None,
    };
    Ok((
        stream,
        Peer {
            id,
            address: canonical(address),
            local_address: canonical(local_address),
            local_id,
        },
    ))
}

/// An IPv4 address that came through an IPv6 socket, as IPv4.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
