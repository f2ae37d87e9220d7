//! SOCKS5 on the loopback address: CONNECT without authentication, for tests and for clients that nobody captures.
//!
//! Names are looked up in the mesh first, then by the system.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, lookup_host},
    time::timeout,
};

use crate::{inbound::accept_all, outbound, pod::Pod, route, sockets};

/// How long a client may take to say where it wants to go.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
const VERSION: u8 = 5;
const CONNECT: u8 = 1;
/// Answers: done, failed, a command or kind of address that is not done here.
const DONE: u8 = 0;
const FAILED: u8 = 5;
const NO_COMMAND: u8 = 7;

/// Accepts until the drain.
pub async fn accept(pod: Arc<Pod>, listener: TcpListener) {
    accept_all(pod, listener, |pod, mut stream, source| async move {
        let target = timeout(HEAD_TIMEOUT, head(&pod, &mut stream)).await;
        let Ok(Ok(target)) = target else {
            return sockets::reset(stream);
        };
        // The client is this pod, whatever loopback address it comes from.
        let from = pod
            .node
            .mesh
            .workload(&pod.uid)
            .and_then(|workload| workload.addresses.first().copied())
            .unwrap_or(source.ip());
        match outbound::begin(&pod, SocketAddr::new(from, source.port()), target).await {
            Ok(begun) => {
                if stream.write_all(&reply(DONE)).await.is_ok() {
                    begun.relay(&pod, stream).await;
                }
            }
            Err(()) => {
                // The client may be gone.
                let _ = stream.write_all(&reply(FAILED)).await;
            }
        }
    })
    .await;
}

fn reply(code: u8) -> [u8; 10] {
    [VERSION, code, 0, 1, 0, 0, 0, 0, 0, 0]
}

/// Where the client wants to go (RFC 1928 §3, §4).
async fn head(pod: &Pod, stream: &mut TcpStream) -> io::Result<SocketAddr> {
    let malformed = |words: &str| io::Error::new(io::ErrorKind::InvalidData, words.to_owned());
    let [version, methods] = read::<2>(stream).await?;
    if version != VERSION {
        return Err(malformed("it is not version 5"));
    }
    stream.read_exact(&mut vec![0; usize::from(methods)]).await?;
    stream.write_all(&[VERSION, 0]).await?;
    let [_, command, _, kind] = read::<4>(stream).await?;
    if command != CONNECT {
        stream.write_all(&reply(NO_COMMAND)).await?;
        return Err(malformed("it is not CONNECT"));
    }
    let host = match kind {
        1 => Host::Address(Ipv4Addr::from(read::<4>(stream).await?).into()),
        4 => Host::Address(IpAddr::from(Ipv6Addr::from(read::<16>(stream).await?)).to_canonical()),
        3 => {
            let mut name = vec![0; usize::from(stream.read_u8().await?)];
            stream.read_exact(&mut name).await?;
            Host::Name(String::from_utf8(name).map_err(|_| malformed("the name is no text"))?)
        }
        _ => return Err(malformed("its kind of address is not known")),
    };
    let port = stream.read_u16().await?;
    let address = match host {
        Host::Address(address) => address,
        Host::Name(name) => {
            let service = pod.node.mesh.service_named(&name, &pod.info.namespace);
            match service.and_then(|service| service.vips.first().map(|vip| vip.range.addr())) {
                Some(address) => address,
                None => {
                    route::first_address(lookup_host((name, port)).await?).ok_or_else(|| malformed("the name has no address"))?
                }
            }
        }
    };
    Ok(SocketAddr::new(address, port))
}

enum Host {
    Address(IpAddr),
    Name(String),
}

async fn read<const N: usize>(stream: &mut TcpStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).await?;
    Ok(bytes)
}
