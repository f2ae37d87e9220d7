//! A mesh in memory: a dialer whose every dial ends in a served connection, or in trouble on request.

use std::{
    collections::VecDeque,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use cairn_hbone::{
    Connect, Destination, Dial, DialError, Dialed, OpenError, Opened, Peer, Pool, PoolSettings, ServeError, ServerSettings,
    TunnelStream, drain, serve,
};
use http::{HeaderMap, StatusCode};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    task::JoinHandle,
};

/// No test waits longer for anything that should happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
const PIPE: usize = 64 * 1024;

pub(crate) fn peer() -> Arc<Peer> {
    Arc::new(Peer {
        id: Some("spiffe://cluster.local/ns/app/sa/client".parse().unwrap()),
        address: address(40000),
        local_address: address(15008),
        local_id: None,
    })
}

pub(crate) fn address(port: u16) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, 1], port))
}

pub(crate) fn destination() -> Destination {
    Destination {
        address: address(15008),
        trust: 0,
    }
}

/// What the next dial does.
pub(crate) enum Step {
    Refuse,
    Hang,
    /// Hands the far end of the pipe to the test.
    Give(tokio::sync::oneshot::Sender<DuplexStream>),
}

/// One accepted connection.
pub(crate) type Served = (drain::Trigger, JoinHandle<Result<(), ServeError>>);

#[derive(Clone)]
pub(crate) struct Mesh {
    inner: Arc<Inner>,
}

struct Inner {
    settings: ServerSettings,
    handler: Box<dyn Fn(Connect) + Send + Sync>,
    dials: AtomicUsize,
    delay: Mutex<Duration>,
    script: Mutex<VecDeque<Step>>,
    served: Mutex<Vec<Served>>,
}

impl Mesh {
    pub(crate) fn new(settings: ServerSettings, handler: impl Fn(Connect) + Send + Sync + 'static) -> Self {
        Self {
            inner: Arc::new(Inner {
                settings,
                handler: Box::new(handler),
                dials: AtomicUsize::new(0),
                delay: Mutex::new(Duration::ZERO),
                script: Mutex::default(),
                served: Mutex::default(),
            }),
        }
    }

    /// A mesh whose destinations do what the authority's host says, see [`behave`].
    pub(crate) fn behaving() -> Self {
        Self::new(ServerSettings::default(), |connect| {
            tokio::spawn(behave(connect));
        })
    }

    pub(crate) fn pool(&self, settings: PoolSettings) -> Pool {
        Pool::new(settings, self.clone())
    }

    pub(crate) fn next(&self, step: Step) {
        self.inner.script.lock().push_back(step);
    }

    pub(crate) fn set_delay(&self, delay: Duration) {
        *self.inner.delay.lock() = delay;
    }

    pub(crate) fn dials(&self) -> usize {
        self.inner.dials.load(Ordering::SeqCst)
    }

    /// Starts the drain of each connection served so far.
    pub(crate) fn drain(&self) {
        for (trigger, _) in self.inner.served.lock().iter() {
            trigger.start();
        }
    }

    /// Breaks each connection served so far.
    pub(crate) fn kill(&self) {
        for (_, task) in self.inner.served.lock().drain(..) {
            task.abort();
        }
    }

    pub(crate) fn take_served(&self) -> Vec<Served> {
        self.inner.served.lock().drain(..).collect()
    }
}

impl Dial for Mesh {
    type Io = DuplexStream;

    async fn dial(&self, _: &Destination) -> Result<Dialed<Self::Io>, DialError> {
        self.inner.dials.fetch_add(1, Ordering::SeqCst);
        let delay = *self.inner.delay.lock();
        tokio::time::sleep(delay).await;
        let step = self.inner.script.lock().pop_front();
        let (near, far) = duplex(PIPE);
        match step {
            Some(Step::Refuse) => return Err(DialError::Connect(io::ErrorKind::ConnectionRefused.into())),
            Some(Step::Hang) => std::future::pending().await,
            Some(Step::Give(give)) => give.send(far).unwrap(),
            None => {
                let (inner, (trigger, watch)) = (self.inner.clone(), drain::channel());
                let task =
                    tokio::spawn(
                        async move { serve(far, peer(), &inner.settings, watch, |connect| (inner.handler)(connect)).await },
                    );
                self.inner.served.lock().push((trigger, task));
            }
        }
        Ok(Dialed {
            io: near,
            peer_id: Some("spiffe://cluster.local/ns/app/sa/server".parse().unwrap()),
            local_address: address(50000),
        })
    }
}

/// `echo`, `refuse` (503 with a body), `stall` (accepts and never reads), `flood` (writes for ever), `late` (answers after 1 s),
/// `never` (no answer).
pub(crate) async fn behave(connect: Connect) {
    match connect.authority.host() {
        "refuse" => connect.refuse(StatusCode::SERVICE_UNAVAILABLE, HeaderMap::new(), "no such service"),
        "never" => {
            let _kept = connect;
            std::future::pending().await
        }
        "late" => {
            tokio::time::sleep(Duration::from_secs(1)).await;
            echo(connect).await;
        }
        "stall" => {
            let _kept = connect.accept(HeaderMap::new()).unwrap();
            std::future::pending().await
        }
        "flood" => {
            let mut stream = connect.accept(HeaderMap::new()).unwrap();
            let block = vec![7; 16 * 1024];
            while stream.write_all(&block).await.is_ok() {}
        }
        _ => echo(connect).await,
    }
}

async fn echo(connect: Connect) {
    let Ok(stream) = connect.accept(HeaderMap::new()) else {
        return;
    };
    let (mut read, mut write) = tokio::io::split(stream);
    if tokio::io::copy(&mut read, &mut write).await.is_ok() {
        let _ = write.shutdown().await;
    }
}

pub(crate) async fn open(pool: &Pool, authority: &str) -> Opened {
    try_open(pool, authority).await.unwrap()
}

pub(crate) async fn try_open(pool: &Pool, authority: &str) -> Result<Opened, OpenError> {
    pool.open(&destination(), authority, HeaderMap::new()).await
}

pub(crate) async fn round_trip(stream: &mut TunnelStream, text: &[u8]) {
    stream.write_all(text).await.unwrap();
    let mut back = vec![0; text.len()];
    tokio::time::timeout(PATIENCE, stream.read_exact(&mut back))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(back, text);
}

pub(crate) async fn data(stream: &mut TunnelStream) -> Option<io::Result<Bytes>> {
    std::future::poll_fn(|cx| stream.poll_data(cx)).await
}

/// Runs what is ready until nothing is, without waiting for time to pass.
pub(crate) async fn settle() {
    for _ in 0..200 {
        tokio::task::yield_now().await;
    }
}

/// An HTTP/2 client that is not ours, on a connection that we serve.
pub(crate) struct Raw {
    pub(crate) client: h2::client::SendRequest<Bytes>,
    pub(crate) driver: JoinHandle<Result<(), h2::Error>>,
    pub(crate) trigger: drain::Trigger,
    pub(crate) served: JoinHandle<Result<(), ServeError>>,
}

impl Raw {
    pub(crate) async fn connect(settings: ServerSettings) -> Self {
        let (near, far) = duplex(PIPE);
        let (trigger, watch) = drain::channel();
        let served = tokio::spawn(async move {
            serve(far, peer(), &settings, watch, |connect| {
                tokio::spawn(behave(connect));
            })
            .await
        });
        let (client, connection) = h2::client::handshake(near).await.unwrap();
        Self {
            client,
            driver: tokio::spawn(connection),
            trigger,
            served,
        }
    }

    pub(crate) async fn request(
        &mut self,
        method: http::Method,
        uri: &str,
        end: bool,
    ) -> (h2::client::ResponseFuture, h2::SendStream<Bytes>) {
        std::future::poll_fn(|cx| self.client.poll_ready(cx)).await.unwrap();
        let request = http::Request::builder().method(method).uri(uri).body(()).unwrap();
        self.client.send_request(request, end).unwrap()
    }
}
