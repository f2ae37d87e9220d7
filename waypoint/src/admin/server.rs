//! The HTTP server of administrative pages, with a limit for everything.
//!
//! Three of its four ports are open to the whole cluster: a client that says nothing, never ends, or comes a thousand times must cost
//! little and hinder nobody else for long.

use std::{convert::Infallible, io, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use axum::{Router, body::Body, extract::ConnectInfo};
use http::Request;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tower::ServiceExt as _;

/// Connections of one server; more wait to be accepted.
const CONNECTIONS: usize = 64;
/// Time for a request's head, and between two requests: longer than Prometheus' usual interval.
const HEAD_TIMEOUT: Duration = Duration::from_secs(75);
/// A connection is asked to end after this.
const CONNECTION_AGE: Duration = Duration::from_secs(3600);
/// The last answer of such a connection may take this long.
const LAST_ANSWER: Duration = Duration::from_secs(30);
/// The largest head, in bytes.
const MAX_HEAD: usize = 16 * 1024;
/// Pause after an accept that failed for want of file descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

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
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    // The semaphore is never closed.
    while let Ok(place) = places.clone().acquire_owned().await {
        match listener.accept().await {
            Ok((stream, client)) => {
                let router = router.clone();
                tokio::spawn(async move {
                    let _place = place;
                    connection(stream, client, router).await;
                });
            }
            Err(error) => {
                tracing::warn!(%error, "an administrative connection could not be accepted");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, client: SocketAddr, router: Router) {
    let answer = service_fn(move |request: Request<Incoming>| {
        let router = router.clone();
        async move {
            let mut request = request.map(Body::new);
            request.extensions_mut().insert(ConnectInfo(client));
            let Ok(response) = router.oneshot(request).await;
            Ok::<_, Infallible>(response)
        }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), answer);
    let mut connection = pin!(connection);
    if timeout(CONNECTION_AGE, connection.as_mut()).await.is_err() {
        connection.as_mut().graceful_shutdown();
        let _ = timeout(LAST_ANSWER, connection).await;
    }
}
