//! The destination: an application behind HBONE, as cheap as it can be.
//!
//! It accepts tunnels on the loopback addresses that the mesh names as
//! endpoints, and plain connections for the bare relay. The first bytes of a
//! channel say what it carries: HTTP/1.1, HTTP/2 with prior knowledge, or one of
//! three commands for TCP. Every request gets the same 128-byte answer; HTTP/1.1
//! requests carry no body here, so a head is a request.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context as Poller, Poll};

use anyhow::{Context, Result};
use bytes::{Buf, Bytes, BytesMut};
use http::{Response, StatusCode};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::tunnel::{TunnelStream, server_builder};

/// The size of every answer.
pub(crate) const ANSWER_SIZE: usize = 128;
static BODY: [u8; ANSWER_SIZE] = [b'x'; ANSWER_SIZE];

/// Take all bytes and count them.
pub(crate) const SINK: &[u8; COMMAND_SIZE] = b"SINK\n";
/// Send bytes without end.
pub(crate) const SOURCE: &[u8; COMMAND_SIZE] = b"SRCE\n";
/// Send back what comes.
pub(crate) const ECHO: &[u8; COMMAND_SIZE] = b"ECHO\n";
const COMMAND_SIZE: usize = 5;

/// Bytes a TCP role reads or writes at once.
pub(crate) const BLOCK_SIZE: usize = 64 << 10;
const READ_SIZE: usize = 16 << 10;
/// A head longer than this is none that the rig's client sent.
const MAX_HEAD: usize = 64 << 10;

/// A running destination.
pub(crate) struct Destination {
    /// Where plain connections are accepted.
    pub(crate) plain: SocketAddr,
    /// Bytes that sinks have taken.
    pub(crate) sunk: Arc<AtomicU64>,
}

impl Destination {
    /// Listens for tunnels on each of `tunnels`, and for plain connections.
    pub(crate) async fn start(tunnels: &[SocketAddr], tls: &Arc<ServerConfig>) -> Result<Self> {
        let sunk = Arc::new(AtomicU64::new(0));
        for address in tunnels {
            let listener = TcpListener::bind(address)
                .await
                .with_context(|| format!("the destination cannot listen on {address}: end what holds that port"))?;
            tokio::spawn(accept_tunnels(
                listener,
                TlsAcceptor::from(Arc::clone(tls)),
                Arc::clone(&sunk),
            ));
        }
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let plain = listener.local_addr()?;
        tokio::spawn(accept_plain(listener, Arc::clone(&sunk)));
        Ok(Self { plain, sunk })
    }
}

async fn accept_plain(listener: TcpListener, sunk: Arc<AtomicU64>) {
    while let Ok((tcp, _)) = listener.accept().await {
        // Failures of a channel are counted by the client, at its other end.
        let _ = tcp.set_nodelay(true);
        let sunk = Arc::clone(&sunk);
        tokio::spawn(async move { serve(tcp, &sunk).await });
    }
}

async fn accept_tunnels(listener: TcpListener, tls: TlsAcceptor, sunk: Arc<AtomicU64>) {
    while let Ok((tcp, _)) = listener.accept().await {
        let tls = tls.clone();
        let sunk = Arc::clone(&sunk);
        tokio::spawn(async move { serve_tunnel(tcp, tls, sunk).await });
    }
}

async fn serve_tunnel(tcp: TcpStream, tls: TlsAcceptor, sunk: Arc<AtomicU64>) -> Result<()> {
    tcp.set_nodelay(true)?;
    let secured = tls.accept(tcp).await?;
    let mut connection = server_builder().handshake::<_, Bytes>(secured).await?;
    while let Some(stream) = connection.accept().await {
        let (request, mut respond) = stream?;
        let send = respond.send_response(Response::new(()), false)?;
        let stream = TunnelStream::new(send, request.into_body());
        let sunk = Arc::clone(&sunk);
        tokio::spawn(async move { serve(stream, &sunk).await });
    }
    Ok(())
}

/// Serves one channel, whatever it carries.
async fn serve<C>(mut channel: C, sunk: &AtomicU64) -> Result<()>
where
    C: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut start = BytesMut::with_capacity(READ_SIZE);
    while start.len() < COMMAND_SIZE {
        if channel.read_buf(&mut start).await? == 0 {
            return Ok(());
        }
    }
    if start.starts_with(b"PRI *") {
        return serve_http2(Replay::new(start.freeze(), channel)).await;
    }
    if start.starts_with(SINK) {
        return sink(channel, sunk).await;
    }
    if start.starts_with(SOURCE) {
        let block = vec![0; BLOCK_SIZE];
        loop {
            channel.write_all(&block).await?;
        }
    }
    if start.starts_with(ECHO) {
        start.advance(COMMAND_SIZE);
        return echo(Replay::new(start.freeze(), channel)).await;
    }
    serve_http1(channel, start).await
}

async fn sink<C: AsyncRead + Unpin>(mut channel: C, sunk: &AtomicU64) -> Result<()> {
    let mut block = vec![0; BLOCK_SIZE];
    loop {
        match channel.read(&mut block).await? {
            0 => return Ok(()),
            size => sunk.fetch_add(size as u64, Ordering::Relaxed),
        };
    }
}

async fn echo<C: AsyncRead + AsyncWrite>(channel: C) -> Result<()> {
    let (mut read, mut write) = tokio::io::split(channel);
    tokio::io::copy(&mut read, &mut write).await?;
    write.shutdown().await?;
    Ok(())
}

async fn serve_http1<C>(mut channel: C, mut received: BytesMut) -> Result<()>
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    let answer = answer_bytes();
    let mut answers = BytesMut::new();
    loop {
        let mut consumed = 0;
        for end in memchr::memmem::find_iter(&received, b"\r\n\r\n") {
            consumed = end + 4;
            answers.extend_from_slice(&answer);
        }
        received.advance(consumed);
        if !answers.is_empty() {
            channel.write_all(&answers).await?;
            answers.clear();
        }
        if received.len() > MAX_HEAD || channel.read_buf(&mut received).await? == 0 {
            return channel.shutdown().await.map_err(Into::into);
        }
    }
}

/// One HTTP/1.1 answer.
fn answer_bytes() -> Vec<u8> {
    let mut answer = format!("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {ANSWER_SIZE}\r\n\r\n").into_bytes();
    answer.extend_from_slice(&BODY);
    answer
}

async fn serve_http2<C>(channel: C) -> Result<()>
where
    C: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut connection = server_builder().handshake::<_, Bytes>(channel).await?;
    while let Some(stream) = connection.accept().await {
        let (_, mut respond) = stream?;
        let answer = Response::builder()
            .status(StatusCode::OK)
            .header(http::header::CONTENT_TYPE, "text/plain")
            .header(http::header::CONTENT_LENGTH, ANSWER_SIZE)
            .body(())?;
        respond
            .send_response(answer, false)?
            .send_data(Bytes::from_static(&BODY), true)?;
    }
    Ok(())
}

/// A channel whose first bytes were read already.
struct Replay<C> {
    start: Bytes,
    channel: C,
}

impl<C> Replay<C> {
    fn new(start: Bytes, channel: C) -> Self {
        Self { start, channel }
    }
}

impl<C: AsyncRead + Unpin> AsyncRead for Replay<C> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Poller<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.start.is_empty() {
            return Pin::new(&mut self.channel).poll_read(cx, buffer);
        }
        let size = self.start.len().min(buffer.remaining());
        buffer.put_slice(&self.start.split_to(size));
        Poll::Ready(Ok(()))
    }
}

impl<C: AsyncWrite + Unpin> AsyncWrite for Replay<C> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Poller<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.channel).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Poller<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.channel).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Poller<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.channel).poll_shutdown(cx)
    }
}
