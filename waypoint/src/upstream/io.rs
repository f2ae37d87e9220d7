//! The byte stream to an endpoint: a stream in a tunnel, or a plain connection.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use cairn_hbone::TunnelStream;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

/// A byte stream to an endpoint.
#[derive(Debug)]
pub enum UpstreamIo {
    /// In a tunnel.
    Tunnel(TunnelStream),
    /// Plain TCP.
    Plain(TcpStream),
}

macro_rules! each {
    ($this:expr, $io:ident => $call:expr) => {
        match $this.get_mut() {
            UpstreamIo::Tunnel(io) => {
                let $io = Pin::new(io);
                $call
            }
            UpstreamIo::Plain(io) => {
                let $io = Pin::new(io);
                $call
            }
        }
    };
}

impl AsyncRead for UpstreamIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        each!(self, io => io.poll_read(cx, into))
    }
}

impl AsyncWrite for UpstreamIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        each!(self, io => io.poll_write(cx, from))
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, from: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        each!(self, io => io.poll_write_vectored(cx, from))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, io => io.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, io => io.poll_shutdown(cx))
    }
}
