//! The sockets of a pod: made in its network namespace, marked as ours, with its clients' addresses.
//!
//! Redirection rules are not made here. They lead outbound connections to [`ports::OUTBOUND`] and inbound ones to
//! [`ports::INBOUND_PLAINTEXT`], leave alone what carries our mark, and keep the address that was meant in connection tracking, where
//! [`original_destination`] finds it; nftables and iptables do the same.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream, UdpSocket},
    time::timeout,
};

use crate::netns::Namespace;

/// Where pods are served (contract ztunnel §2).
pub mod ports {
    /// Captured outbound connections.
    pub const OUTBOUND: u16 = 15001;
    /// Captured inbound connections that are no tunnels.
    pub const INBOUND_PLAINTEXT: u16 = 15006;
    /// Tunnels.
    pub const INBOUND_HBONE: u16 = 15008;
    /// DNS.
    pub const DNS: u16 = 15053;
    /// SOCKS5.
    pub const SOCKS5: u16 = 15080;
    /// All of them.
    pub const ALL: [u16; 5] = [OUTBOUND, INBOUND_PLAINTEXT, INBOUND_HBONE, DNS, SOCKS5];
}

/// The mark that redirection rules leave alone.
pub const MARK: u32 = 0x539;
/// How long a connection to an application or a peer may take.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections that the kernel keeps for us.
const BACKLOG: i32 = 4096;
/// Silence before the kernel asks whether the other side is still there, and between its questions.
const KEEPALIVE: Duration = Duration::from_secs(180);
/// So many questions without an answer end a connection.
const KEEPALIVE_PROBES: u32 = 9;

/// Makes sockets.
#[derive(Clone, Debug)]
pub struct Sockets {
    /// In which namespace.
    pub namespace: Namespace,
    /// With which mark; none where nothing is redirected.
    pub mark: Option<u32>,
    /// Whether applications see their client's address instead of ours.
    pub keep_source: bool,
}

// === impl Sockets ===

impl Sockets {
    /// Listens on all addresses of both families, or on those of IPv4 where there is no IPv6. An older or newer instance may listen beside us.
    pub fn listen(&self, port: u16) -> io::Result<TcpListener> {
        let socket = self.on_both_families(port, Type::STREAM)?;
        socket.listen(BACKLOG)?;
        TcpListener::from_std(socket.into())
    }

    /// Datagrams and connections at the loopback addresses: where redirected questions go, and from where their answers have to come. IPv6
    /// is left out where there is none.
    pub fn dns(&self, port: u16) -> io::Result<Vec<(UdpSocket, TcpListener)>> {
        let at = |address: IpAddr| {
            let datagrams = self.bound((address, port).into(), Type::DGRAM)?;
            let streams = self.bound((address, port).into(), Type::STREAM)?;
            streams.listen(BACKLOG)?;
            Ok((UdpSocket::from_std(datagrams.into())?, TcpListener::from_std(streams.into())?))
        };
        let v6: io::Result<_> = at(Ipv6Addr::LOCALHOST.into());
        Ok([at(Ipv4Addr::LOCALHOST.into())?].into_iter().chain(v6.ok()).collect())
    }

    /// Listens on the loopback address only.
    pub fn listen_locally(&self, port: u16) -> io::Result<TcpListener> {
        let socket = self.bound((Ipv4Addr::LOCALHOST, port).into(), Type::STREAM)?;
        socket.listen(BACKLOG)?;
        TcpListener::from_std(socket.into())
    }

    /// A socket to ask a name server with.
    pub async fn asking(&self, server: SocketAddr) -> io::Result<UdpSocket> {
        let socket = self.new_socket(server, Type::DGRAM)?;
        let socket = UdpSocket::from_std(socket.into())?;
        socket.connect(server).await?;
        Ok(socket)
    }

    /// Connects, and says where from where that matters. Applications that cannot be connected to from their client's address, since
    /// that has another family or the kernel forbids it, are from ours.
    pub async fn connect(&self, to: SocketAddr, from: Option<IpAddr>) -> io::Result<TcpStream> {
        let socket = self.new_socket(to, Type::STREAM)?;
        if let Some(from) = from.filter(|from| self.keep_source && from.is_ipv4() == to.is_ipv4())
            && let Err(error) = bind_foreign(&socket, from)
        {
            tracing::debug!(%from, "the source address cannot be kept: {error}");
        }
        let connecting = TcpSocket::from_std_stream(socket.into()).connect(to);
        let late = || io::Error::new(io::ErrorKind::TimedOut, format!("no connection within {CONNECT_TIMEOUT:?}"));
        let stream = timeout(CONNECT_TIMEOUT, connecting).await.map_err(|_| late())??;
        prepare(&stream)?;
        Ok(stream)
    }

    fn new_socket(&self, peer: SocketAddr, kind: Type) -> io::Result<Socket> {
        let protocol = if kind == Type::STREAM { Protocol::TCP } else { Protocol::UDP };
        let socket = self
            .namespace
            .run(|| Socket::new(Domain::for_address(peer), kind, Some(protocol)))?;
        if let Some(mark) = self.mark {
            socket.set_mark(mark)?;
        }
        socket.set_nonblocking(true)?;
        Ok(socket)
    }

    fn on_both_families(&self, port: u16, kind: Type) -> io::Result<Socket> {
        let v6 = self.bound((Ipv6Addr::UNSPECIFIED, port).into(), kind);
        match v6 {
            Err(error) if error.kind() != io::ErrorKind::AddrInUse => self.bound((Ipv4Addr::UNSPECIFIED, port).into(), kind),
            other => other,
        }
    }

    fn bound(&self, address: SocketAddr, kind: Type) -> io::Result<Socket> {
        let socket = self.new_socket(address, kind)?;
        if address.is_ipv6() {
            socket.set_only_v6(false)?;
        }
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.bind(&address.into())?;
        Ok(socket)
    }
}

/// Binds to an address that need not be ours.
fn bind_foreign(socket: &Socket, from: IpAddr) -> io::Result<()> {
    if from.is_ipv4() {
        socket.set_ip_transparent_v4(true)?;
        socket.set_freebind_v4(true)?;
    } else {
        socket.set_ip_transparent_v6(true)?;
        socket.set_freebind_v6(true)?;
    }
    socket.bind(&SocketAddr::new(from, 0).into())
}

/// What every connection gets.
pub fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE)
        .with_interval(KEEPALIVE)
        .with_retries(KEEPALIVE_PROBES);
    SockRef::from(stream).set_tcp_keepalive(&keepalive)
}

/// Where a redirected connection wanted to go; where it was accepted, when nobody redirected it.
pub fn original_destination(stream: &TcpStream) -> io::Result<SocketAddr> {
    let socket = SockRef::from(stream);
    let tracked = socket.original_dst_v4().or_else(|_| socket.original_dst_v6());
    match tracked.ok().and_then(|address| address.as_socket()) {
        Some(address) => Ok(canonical(address)),
        None => stream.local_addr().map(canonical),
    }
}

/// An IPv4 address that came through an IPv6 socket, as IPv4.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Closes with a reset, so that the client does not take it for an end in order.
pub fn reset(stream: TcpStream) {
    // A socket that cannot be told is gone already.
    let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
}
