//! DNS of pods: names of the mesh are answered here, everything else is asked of the node's name servers.
//!
//! Questions are answered from the table of the mesh ([`names`]), so that a client finds what istiod knows of, with or without an entry
//! in the cluster's DNS. What is not of the mesh is passed on as it is, byte for byte, from the pod's own network.

pub mod names;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use cairn_telemetry::{Registry, registry::Counter};
use hickory_proto::op::{Message, ResponseCode};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::Semaphore,
    time::timeout,
};

use crate::{inbound::accept_all, pod::Pod, sockets::canonical};

/// Questions of one pod that are under way; further ones get no answer, and clients ask again.
const AT_A_TIME: usize = 1024;
/// How long a name server may take.
const SERVER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection may be silent.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// The largest datagram.
const MAX_DATAGRAM: usize = 65_535;
/// What fits into a datagram for a client that says nothing else.
const PLAIN_DATAGRAM: usize = 512;
/// Name servers that are tried.
const MOST_SERVERS: usize = 3;
const DNS_PORT: u16 = 53;

/// Answers names.
#[derive(Clone, Debug)]
pub struct Resolver {
    /// The name servers of the node.
    pub servers: Arc<[SocketAddr]>,
    /// The domain of the cluster's services: `cluster.local`.
    pub domain: Arc<str>,
    requests: Counter,
    forwarded: Counter,
    failures: Counter,
}

// === impl Resolver ===

impl Resolver {
    /// Asks these name servers for what is not of the mesh.
    pub fn new(servers: Vec<SocketAddr>, domain: impl Into<Arc<str>>, registry: &Registry) -> Self {
        Self {
            servers: servers.into_iter().take(MOST_SERVERS).collect(),
            domain: domain.into(),
            requests: registry.counter("istio_dns_requests_total", "Total number of DNS requests.", &[]),
            forwarded: registry.counter(
                "istio_dns_upstream_requests_total",
                "Total number of DNS requests forwarded to upstream.",
                &[],
            ),
            failures: registry.counter(
                "istio_dns_upstream_failures_total",
                "Total number of DNS requests forwarded to upstream that failed.",
                &[],
            ),
        }
    }

    /// The name servers of a `resolv.conf`.
    pub fn servers_of(resolv_conf: &str) -> Vec<SocketAddr> {
        let lines = resolv_conf.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
        let addresses = lines.filter_map(|rest| rest.trim().split('%').next()?.parse::<IpAddr>().ok());
        addresses.map(|address| SocketAddr::new(address, DNS_PORT)).collect()
    }
}

/// Answers until the pod ends.
pub async fn serve(pod: Arc<Pod>, datagrams: UdpSocket, streams: TcpListener) {
    let tcp = accept_all(pod.clone(), streams, |pod, stream, source| async move {
        if let Err(error) = connection(&pod, stream, source).await {
            tracing::debug!(%source, "a connection for DNS ended: {error}");
        }
    });
    tokio::join!(tcp, udp(pod, Arc::new(datagrams)));
}

async fn udp(pod: Arc<Pod>, socket: Arc<UdpSocket>) {
    let places = Arc::new(Semaphore::new(AT_A_TIME));
    let mut buffer = vec![0; MAX_DATAGRAM];
    let mut stop = pod.listening();
    loop {
        let received = tokio::select! {
            received = socket.recv_from(&mut buffer) => received,
            () = stop.drained() => return,
        };
        // An error is about one client that is gone.
        let Ok((length, source)) = received else { continue };
        let Ok(place) = places.clone().try_acquire_owned() else {
            continue;
        };
        let Some(question) = buffer.get(..length).map(<[u8]>::to_vec) else {
            continue;
        };
        let (socket, answering) = (socket.clone(), pod.clone());
        pod.spawn(async move {
            let _place = place;
            if let Some(answer) = answer(&answering, &question, canonical(source), Carrier::Datagram).await {
                // A client that is gone needs no answer.
                let _ = socket.send_to(&answer, source).await;
            }
        });
    }
}

async fn connection(pod: &Arc<Pod>, mut stream: TcpStream, source: SocketAddr) -> io::Result<()> {
    loop {
        let Some(question) = timeout(IDLE_TIMEOUT, framed(&mut stream)).await.unwrap_or(Ok(None))? else {
            return Ok(());
        };
        let Some(answer) = answer(pod, &question, source, Carrier::Stream).await else {
            return Ok(());
        };
        send_framed(&mut stream, &answer).await?;
    }
}

/// A message behind its length; none at the end.
async fn framed(stream: &mut TcpStream) -> io::Result<Option<Vec<u8>>> {
    let length = match stream.read_u16().await {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        length => length?,
    };
    let mut message = vec![0; usize::from(length)];
    stream.read_exact(&mut message).await?;
    Ok(Some(message))
}

async fn send_framed(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    let mut framed = length.to_be_bytes().to_vec();
    framed.extend_from_slice(message);
    stream.write_all(&framed).await
}

/// How a question came, and how its answer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Carrier {
    Datagram,
    Stream,
}

/// The answer; none for what is no question, which deserves none.
async fn answer(pod: &Pod, question: &[u8], source: SocketAddr, carrier: Carrier) -> Option<Vec<u8>> {
    let resolver = &pod.node.resolver;
    resolver.requests.inc();
    let asked = Message::from_vec(question).ok().filter(names::is_question)?;
    let namespace = match pod.workload_at(source.ip()) {
        Some(workload) => workload.facts.namespace.to_string(),
        None => pod.info.namespace.clone(),
    };
    if let Some(answer) = names::answer(&pod.node.mesh, &namespace, &resolver.domain, &asked) {
        let bytes = answer.to_vec().ok()?;
        let room = usize::from(asked.edns.as_ref().map_or(0, |edns| edns.max_payload())).max(PLAIN_DATAGRAM);
        return match carrier {
            Carrier::Datagram if bytes.len() > room => answer.truncate().to_vec().ok(),
            _ => Some(bytes),
        };
    }
    resolver.forwarded.inc();
    for server in resolver.servers.iter() {
        let asking = forward(pod, *server, question, carrier);
        match timeout(SERVER_TIMEOUT, asking).await {
            Ok(Ok(answer)) => return Some(answer),
            Ok(Err(error)) => tracing::debug!(%server, "a name server did not answer: {error}"),
            Err(_) => tracing::debug!(%server, "a name server did not answer within {SERVER_TIMEOUT:?}"),
        }
    }
    resolver.failures.inc();
    let mut failed = names::response_to(&asked);
    failed.metadata.response_code = ResponseCode::ServFail;
    failed.to_vec().ok()
}

/// Asks one name server, in the way that we were asked.
async fn forward(pod: &Pod, server: SocketAddr, question: &[u8], carrier: Carrier) -> io::Result<Vec<u8>> {
    match carrier {
        Carrier::Datagram => {
            let socket = pod.sockets.asking(server).await?;
            socket.send(question).await?;
            let mut answer = vec![0; MAX_DATAGRAM];
            loop {
                let length = socket.recv(&mut answer).await?;
                // Something else than the answer to this question is somebody else's.
                if answer.get(..2) == question.get(..2) {
                    answer.truncate(length);
                    return Ok(answer);
                }
            }
        }
        Carrier::Stream => {
            let mut stream = pod.sockets.connect(server, None).await?;
            send_framed(&mut stream, question).await?;
            let none = || io::Error::new(io::ErrorKind::UnexpectedEof, "the connection ended before the answer");
            framed(&mut stream).await?.ok_or_else(none)
        }
    }
}
