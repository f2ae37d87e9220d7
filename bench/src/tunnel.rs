//! Tunnels of the rig: HBONE as a node's ztunnel speaks it, and the bytes inside.
//!
//! [`Tunnel`] is the client's side, [`server_builder`] serves the destination's; both use the
//! HTTP/2 settings of Istio's ztunnel, because windows and frame sizes decide
//! what a proxy between them pays. [`Channel`] is what a request travels on: a
//! CONNECT stream, or a plain connection when the bare relay is measured.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as Poller, Poll, ready};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::{Buf, Bytes};
use h2::client::SendRequest;
use h2::{Reason, RecvStream, SendStream};
use http::{Method, Request, StatusCode};
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

/// ztunnel's windows, frame size and limit of streams.
pub(crate) const STREAM_WINDOW: u32 = 4 << 20;
pub(crate) const CONNECTION_WINDOW: u32 = 16 << 20;
pub(crate) const FRAME_SIZE: u32 = 1 << 20;
pub(crate) const SERVER_STREAMS: u32 = 200;

/// How long a connection, a handshake or a CONNECT may take.
const OPEN_DEADLINE: Duration = Duration::from_secs(15);

/// One mTLS connection to a waypoint, as a client's ztunnel holds it.
#[derive(Clone)]
pub(crate) struct Tunnel(SendRequest<Bytes>);

impl Tunnel {
    /// Connects to a waypoint from `source`, or from the usual address.
    pub(crate) async fn connect(waypoint: SocketAddr, tls: &Arc<ClientConfig>, source: Option<SocketAddr>) -> Result<Self> {
        timeout(OPEN_DEADLINE, Self::open_connection(waypoint, tls, source))
            .await
            .with_context(|| format!("no tunnel to {waypoint} within {OPEN_DEADLINE:?}"))?
    }

    async fn open_connection(waypoint: SocketAddr, tls: &Arc<ClientConfig>, source: Option<SocketAddr>) -> Result<Self> {
        let tcp = dial(waypoint, source).await?;
        let name = ServerName::IpAddress(waypoint.ip().into());
        let secured = TlsConnector::from(Arc::clone(tls))
            .connect(name, tcp)
            .await
            .with_context(|| format!("no TLS with {waypoint}"))?;
        ensure!(
            secured.get_ref().1.alpn_protocol() == Some(b"h2"),
            "{waypoint} did not choose h2"
        );
        let (requests, connection) = client_builder().handshake(secured).await?;
        // Ends with the connection; its failure is seen by every stream on it.
        tokio::spawn(connection);
        Ok(Self(requests))
    }

    /// Opens a CONNECT stream to `authority`.
    pub(crate) async fn open(&self, authority: &str) -> Result<Channel> {
        timeout(OPEN_DEADLINE, self.open_stream(authority))
            .await
            .with_context(|| format!("CONNECT {authority} not answered in {OPEN_DEADLINE:?}"))?
    }

    async fn open_stream(&self, authority: &str) -> Result<Channel> {
        let request = Request::builder().method(Method::CONNECT).uri(authority).body(())?;
        let mut requests = self.0.clone().ready().await?;
        let (answer, send) = requests.send_request(request, false)?;
        let answer = answer.await?;
        if answer.status() != StatusCode::OK {
            bail!("CONNECT {authority} answered {}", answer.status());
        }
        Ok(Channel::Tunnel(TunnelStream::new(send, answer.into_body())))
    }
}

fn client_builder() -> h2::client::Builder {
    let mut builder = h2::client::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME_SIZE)
        .enable_push(false);
    builder
}

/// A server's HTTP/2 settings: ztunnel's.
pub(crate) fn server_builder() -> h2::server::Builder {
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME_SIZE)
        .max_concurrent_streams(SERVER_STREAMS);
    builder
}

/// Opens a plain connection without Nagle's delay.
pub(crate) async fn dial(to: SocketAddr, source: Option<SocketAddr>) -> Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    if let Some(source) = source {
        socket.bind(source)?;
    }
    let tcp = timeout(OPEN_DEADLINE, socket.connect(to))
        .await
        .with_context(|| format!("no connection to {to} within {OPEN_DEADLINE:?}"))?
        .with_context(|| format!("cannot connect to {to}"))?;
    tcp.set_nodelay(true)?;
    Ok(tcp)
}

/// What a request travels on.
pub(crate) enum Channel {
    Plain(TcpStream),
    Tunnel(TunnelStream),
}

/// The bytes of one CONNECT stream.
pub(crate) struct TunnelStream {
    send: SendStream<Bytes>,
    receive: RecvStream,
    pending: Bytes,
}

// === impl TunnelStream ===

impl TunnelStream {
    pub(crate) fn new(send: SendStream<Bytes>, receive: RecvStream) -> Self {
        Self {
            send,
            receive,
            pending: Bytes::new(),
        }
    }
}

impl AsyncRead for TunnelStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Poller<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        while self.pending.is_empty() {
            match ready!(self.receive.poll_data(cx)) {
                None => return Poll::Ready(Ok(())),
                Some(Err(error)) => return Poll::Ready(Err(io::Error::other(error))),
                Some(Ok(data)) => {
                    let size = data.len();
                    self.pending = data;
                    self.receive.flow_control().release_capacity(size).map_err(io::Error::other)?;
                }
            }
        }
        let size = self.pending.len().min(buffer.remaining());
        buffer.put_slice(&self.pending[..size]);
        self.pending.advance(size);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TunnelStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Poller<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        self.send.reserve_capacity(data.len());
        while self.send.capacity() == 0 {
            match ready!(self.send.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(io::Error::other(error))),
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            }
        }
        let size = self.send.capacity().min(data.len());
        self.send
            .send_data(Bytes::copy_from_slice(&data[..size]), false)
            .map_err(io::Error::other)?;
        Poll::Ready(Ok(size))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Poller<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _cx: &mut Poller<'_>) -> Poll<io::Result<()>> {
        if self.send.send_data(Bytes::new(), true).is_err() {
            self.send.send_reset(Reason::CANCEL);
        }
        Poll::Ready(Ok(()))
    }
}

// === impl Channel ===

impl AsyncRead for Channel {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Poller<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_read(cx, buffer),
            Self::Tunnel(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Channel {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Poller<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_write(cx, data),
            Self::Tunnel(stream) => Pin::new(stream).poll_write(cx, data),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Poller<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_flush(cx),
            Self::Tunnel(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Poller<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_shutdown(cx),
            Self::Tunnel(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
