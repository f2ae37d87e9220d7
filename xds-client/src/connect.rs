//! A connected byte stream to istiod, by TCP and TLS, within one deadline.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use cairn_exchange::clock::{self, Instant};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::client::TlsStream;

use crate::{
    StreamError,
    settings::{Settings, Tls, TlsFiles},
    tls,
};

/// Where connections come from.
#[derive(Debug)]
pub(crate) enum Transport {
    /// The network.
    Network,
    /// The other end is in this process: tests under a paused clock, which real sockets do not follow.
    #[cfg(test)]
    Memory(tokio::sync::mpsc::Sender<tokio::io::DuplexStream>),
}

/// A connection that knows when the peer was last heard of.
#[derive(Debug)]
pub(crate) struct Connection {
    io: Io,
    heard: LastHeard,
}

#[derive(Debug)]
enum Io {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
    #[cfg(test)]
    Memory(tokio::io::DuplexStream),
}

/// When a connection last gave bytes, an end or an error. The HTTP/2 client does not say that it gave up for want of an answer
/// to its ping: the streams just break. This tells the two apart.
#[derive(Clone, Debug)]
pub(crate) struct LastHeard(Arc<Mutex<Instant>>);

// === impl Transport ===

impl Transport {
    pub(crate) async fn connect(&self, settings: &Settings) -> Result<Connection, StreamError> {
        let late = |_| StreamError::ConnectTimeout {
            address: settings.address.clone(),
            after: settings.connect_timeout,
        };
        timeout(settings.connect_timeout, self.dial(settings)).await.map_err(late)?
    }

    async fn dial(&self, settings: &Settings) -> Result<Connection, StreamError> {
        let failed = |source| StreamError::Connect {
            address: settings.address.clone(),
            source,
        };
        match self {
            Self::Network => {}
            #[cfg(test)]
            Self::Memory(accept) => {
                let (ours, theirs) = tokio::io::duplex(1 << 20);
                accept
                    .send(theirs)
                    .await
                    .map_err(|_| failed(io::ErrorKind::ConnectionRefused.into()))?;
                return Ok(Connection::new(Io::Memory(ours)));
            }
        }
        match &settings.tls {
            Tls::Plaintext => Ok(Connection::new(Io::Plain(tcp(settings).await.map_err(failed)?))),
            Tls::Verified(files) => handshake(settings, files).await,
        }
    }
}

async fn tcp(settings: &Settings) -> io::Result<TcpStream> {
    let stream = TcpStream::connect((settings.address.host(), settings.address.port())).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn handshake(settings: &Settings, files: &TlsFiles) -> Result<Connection, StreamError> {
    let address = || settings.address.clone();
    // The files come first: they may be the reason why nothing works, and cost no connection of istiod's.
    let (connector, name) = tls::connector(files).await?;
    let stream = tcp(settings).await.map_err(|source| StreamError::Connect {
        address: address(),
        source,
    })?;
    let stream = connector
        .connect(name, stream)
        .await
        .map_err(|source| StreamError::Handshake {
            address: address(),
            server_name: files.server_name.clone(),
            roots: files.roots.clone(),
            source,
        })?;
    Ok(Connection::new(Io::Tls(Box::new(stream))))
}

// === impl LastHeard ===

impl LastHeard {
    /// For how long nothing was heard.
    pub(crate) fn silence(&self) -> Duration {
        self.0.lock().elapsed()
    }

    fn now(&self) {
        *self.0.lock() = clock::now();
    }
}

// === impl Connection ===

impl Connection {
    fn new(io: Io) -> Self {
        Self {
            io,
            heard: LastHeard(Arc::new(Mutex::new(clock::now()))),
        }
    }

    pub(crate) fn last_heard(&self) -> LastHeard {
        self.heard.clone()
    }
}

macro_rules! each {
    ($self:expr, $io:ident => $call:expr) => {
        match &mut $self.io {
            Io::Plain($io) => $call,
            Io::Tls($io) => $call,
            #[cfg(test)]
            Io::Memory($io) => $call,
        }
    };
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let read = each!(self, io => Pin::new(io).poll_read(cx, buf));
        if read.is_ready() {
            self.heard.now();
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = each!(self, io => Pin::new(io).poll_write(cx, buf));
        if matches!(written, Poll::Ready(Err(_))) {
            self.heard.now();
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, io => Pin::new(io).poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, io => Pin::new(io).poll_shutdown(cx))
    }
}
