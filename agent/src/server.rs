//! The HTTP server of administrative pages, with a limit for everything.
//!
//! Three of its four ports are open to the whole cluster: a client that says nothing, never ends, or comes a thousand times must cost
//! little and hinder nobody else. A first request has to come soon; where all places are taken, the client that has been without a
//! request for the longest time makes room for the next one, so that the kubelet's probe never waits for silent clients.

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use axum::{Router, body::Body, extract::ConnectInfo};
use cairn_exchange::clock::{self, Instant};
use http::Request;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
    time::{sleep, timeout},
};
use tower::ServiceExt as _;

/// Connections of one server.
const CONNECTIONS: usize = 64;
/// Time for the first request's head.
const FIRST_HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for each further head, and so between two requests: longer than Prometheus' usual interval.
const HEAD_TIMEOUT: Duration = Duration::from_secs(75);
/// A connection is asked to end after this.
const CONNECTION_AGE: Duration = Duration::from_secs(3600);
/// The last answer of such a connection may take this long.
const LAST_ANSWER: Duration = Duration::from_secs(30);
/// The largest head, in bytes.
const MAX_HEAD: usize = 16 * 1024;
/// Pause after an accept that failed for want of file descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Pause before another client is asked to make room, where every one of them had a request under way.
const ROOM_PAUSE: Duration = Duration::from_millis(50);

/// A port that cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("the port for {purpose} cannot be opened at {address}: {source}; {}", remedy(source))]
pub struct BindError {
    /// What would have been served.
    purpose: &'static str,
    /// Where.
    address: SocketAddr,
    /// What the system says.
    source: io::Error,
}

impl BindError {
    /// Whether somebody else has the port.
    pub fn is_in_use(&self) -> bool {
        self.source.kind() == io::ErrorKind::AddrInUse
    }
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => "another proxy runs here; end it, or give this one another port",
        io::ErrorKind::PermissionDenied => "ports below 1024 need a privilege that the pod does not have; give it another port",
        _ => "the address has to be one of this machine",
    }
}

/// Opens the port and serves `router` on the calling runtime.
pub async fn start(purpose: &'static str, address: SocketAddr, router: Router) -> Result<SocketAddr, BindError> {
    let failed = |source| BindError {
        purpose,
        address,
        source,
    };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    tokio::spawn(accept(listener, router));
    Ok(bound)
}

async fn accept(listener: TcpListener, router: Router) {
    let places = Places::default();
    loop {
        match listener.accept().await {
            Ok((stream, client)) => {
                let place = places.take().await;
                tokio::spawn(connection(stream, client, router.clone(), place));
            }
            Err(error) => {
                tracing::warn!(%error, "an administrative connection could not be accepted");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// The places for connections of one server.
struct Places {
    free: Arc<Semaphore>,
    taken: Arc<Mutex<Vec<Arc<Client>>>>,
}

/// A connection.
struct Client {
    /// Since when no request is under way; `None` while one is.
    idle_since: Mutex<Option<Instant>>,
    /// Whether there has been a request.
    asked: AtomicBool,
    /// Asks it to make room.
    leave: Notify,
}

/// A connection's place; free again when it is dropped.
struct Place {
    client: Arc<Client>,
    taken: Arc<Mutex<Vec<Arc<Client>>>>,
    _permit: Option<OwnedSemaphorePermit>,
}

// === impl Places ===

impl Default for Places {
    fn default() -> Self {
        Self {
            free: Arc::new(Semaphore::new(CONNECTIONS)),
            taken: Arc::default(),
        }
    }
}

impl Places {
    /// A place for one more; whoever has been idle for the longest time leaves for it.
    async fn take(&self) -> Place {
        let mut permit = self.free.clone().try_acquire_owned().ok();
        while permit.is_none() {
            self.make_room();
            // The semaphore is never closed, so what comes in time is a permit.
            let soon = timeout(ROOM_PAUSE, self.free.clone().acquire_owned());
            permit = soon.await.ok().and_then(Result::ok);
        }
        let client = Arc::new(Client {
            idle_since: Mutex::new(Some(clock::now())),
            asked: AtomicBool::new(false),
            leave: Notify::new(),
        });
        self.taken.lock().push(client.clone());
        Place {
            client,
            taken: self.taken.clone(),
            _permit: permit,
        }
    }

    fn make_room(&self) {
        let taken = self.taken.lock();
        let idle = taken.iter().filter_map(|client| Some(((*client.idle_since.lock())?, client)));
        if let Some((_, client)) = idle.min_by_key(|(since, _)| *since) {
            client.leave.notify_one();
        }
    }
}

// === impl Place ===

impl Drop for Place {
    fn drop(&mut self) {
        self.taken.lock().retain(|client| !Arc::ptr_eq(client, &self.client));
    }
}

async fn connection(stream: impl AsyncRead + AsyncWrite + Send + Unpin, address: SocketAddr, router: Router, place: Place) {
    let client = &place.client;
    let answer = service_fn(move |request: Request<Incoming>| {
        let (router, client) = (router.clone(), client.clone());
        async move {
            client.asked.store(true, Relaxed);
            *client.idle_since.lock() = None;
            let mut request = request.map(Body::new);
            request.extensions_mut().insert(ConnectInfo(address));
            let Ok(response) = router.oneshot(request).await;
            *client.idle_since.lock() = Some(clock::now());
            Ok::<_, Infallible>(response)
        }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), answer);
    let mut connection = pin!(connection);
    let silent = async {
        sleep(FIRST_HEAD_TIMEOUT).await;
        if client.asked.load(Relaxed) {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        ended = timeout(CONNECTION_AGE, connection.as_mut()) => if ended.is_ok() { return },
        () = silent => return,
        () = client.leave.notified() => return,
    }
    connection.as_mut().graceful_shutdown();
    let _ = timeout(LAST_ANSWER, connection).await;
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

    use super::*;

    const HEAD: &[u8] = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n";

    async fn client(places: &Places) -> DuplexStream {
        let (ours, theirs) = duplex(4096);
        let router = Router::new().route("/", get(|| async { "yes" }));
        let address = "127.0.0.1:1".parse().unwrap();
        tokio::spawn(connection(theirs, address, router, places.take().await));
        ours
    }

    async fn ask(client: &mut DuplexStream) -> String {
        client.write_all(HEAD).await.unwrap();
        let mut answer = vec![0; 1024];
        let read = client.read(&mut answer).await.unwrap();
        String::from_utf8(answer[..read].to_vec()).unwrap()
    }

    /// How long the connection stays open when nothing more is done.
    async fn closed_after(client: &mut DuplexStream) -> u64 {
        let begin = clock::now();
        assert_eq!(client.read(&mut [0; 1]).await.unwrap_or(0), 0);
        clock::now().duration_since(begin).as_secs()
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_without_a_request_is_closed() {
        let places = Places::default();
        assert_eq!(closed_after(&mut client(&places).await).await, 10);
        let mut slow = client(&places).await;
        slow.write_all(&HEAD[..20]).await.unwrap();
        sleep(Duration::from_secs(9)).await;
        slow.write_all(&HEAD[20..22]).await.unwrap();
        assert_eq!(closed_after(&mut slow).await, 1);
        let mut one = client(&places).await;
        assert!(ask(&mut one).await.ends_with("yes"));
        assert_eq!(closed_after(&mut one).await, 75);
        assert_eq!(places.free.available_permits(), CONNECTIONS);
        assert_eq!(places.taken.lock().len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn the_longest_idle_client_makes_room() {
        let places = Places::default();
        let mut first = client(&places).await;
        let mut others = Vec::new();
        for _ in 1..CONNECTIONS {
            sleep(Duration::from_millis(1)).await;
            others.push(client(&places).await);
        }
        // It has been idle for less time than all others now.
        sleep(Duration::from_millis(1)).await;
        assert!(ask(&mut first).await.ends_with("yes"));
        let begin = clock::now();
        assert!(ask(&mut client(&places).await).await.ends_with("yes"));
        assert!(clock::now().duration_since(begin) < Duration::from_millis(1));
        assert_eq!(closed_after(&mut others[0]).await, 0);
        assert!(ask(&mut others[1]).await.ends_with("yes"));
        assert!(ask(&mut first).await.ends_with("yes"));
    }
}
