//! Tunnels end when their peers are believed no more, and only those.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::large_futures,
    clippy::disallowed_methods,
    reason = "a test fails by panicking, and may look at the clock"
)]

mod rig;

use std::{fs, time::Duration};

use cairn_exchange::SpiffeId;
use cairn_hbone::{Destination, OpenError, Opened, Pool, PoolSettings, TunnelStream};
use cairn_identity::{ClientTerms, Credentials, Identity, Options, Source, generate::Authority};
use http::HeaderMap;
use rig::{Config, Pod, Rig, mirror};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::{Instant, timeout},
};

const DB: &str = "10.96.1.20:5432";
const PATIENCE: Duration = Duration::from_secs(20);
/// What a distrusted peer may still have under way.
const GRACE: Duration = Duration::from_secs(5);

/// A client of its own.
struct Client {
    pool: Pool,
    destination: Destination,
}

impl Client {
    /// One that shows these credentials, and believes the rig.
    fn of(rig: &Rig, credentials: Credentials) -> Self {
        let identity = Identity::fixed(credentials);
        identity.set_trust_anchors(&[rig.authority.root_pem()]).unwrap();
        let terms = ClientTerms::hbone(["spiffe://cluster.local/"]);
        let dial = cairn_hbone::TcpTls::new(
            move |_| identity.client_config(&terms).ok_or_else(|| "no certificate".to_owned()),
            |_, _| Ok(None),
        );
        Self {
            pool: Pool::new(PoolSettings::default(), dial),
            destination: Destination {
                address: rig.address,
                trust: 0,
            },
        }
    }

    async fn open(&self) -> Result<Opened, OpenError> {
        self.pool.open(&self.destination, DB, HeaderMap::new()).await
    }

    /// A stream on which something has passed.
    async fn stream(&self) -> TunnelStream {
        let mut stream = self.open().await.unwrap().stream;
        works(&mut stream).await;
        stream
    }
}

async fn works(stream: &mut TunnelStream) {
    stream.write_all(b"ping").await.unwrap();
    let mut heard = [0; 4];
    timeout(PATIENCE, stream.read_exact(&mut heard)).await.unwrap().unwrap();
    assert_eq!(&heard, b"ping");
}

async fn serving(rig: &Rig, config: impl Fn(Config) -> Config) -> Pod {
    let pod = rig.pod(10, mirror()).await;
    rig.serve(config(Config::default().tcp(DB, &[pod.address]))).await;
    pod
}

/// What befalls two tunnels, of which `change` makes one distrusted.
async fn only_the_first_ends(rig: &Rig, distrusted: &Client, believed: &Client, change: impl AsyncFnOnce()) {
    let (mut ends, mut stays) = (distrusted.stream().await, believed.stream().await);
    let begun = Instant::now();
    change().await;
    // It is told by GOAWAY, and a new tunnel is refused.
    loop {
        match distrusted.open().await {
            Ok(opened) => drop(opened),
            Err(error) => {
                assert!(error.to_string().contains("fatal alert"), "{error}");
                break;
            }
        }
        assert!(begun.elapsed() < GRACE, "its tunnel still takes streams");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    works(&mut ends).await;
    let end = timeout(PATIENCE, ends.read(&mut [0; 4])).await.unwrap();
    assert!(end.is_err(), "a reset, so that nobody takes it for the end: {end:?}");
    assert!(begun.elapsed() >= GRACE, "{:?}", begun.elapsed());
    works(&mut stays).await;
    let before = believed.pool.stats().tunnels;
    drop(believed.stream().await);
    assert_eq!((before, believed.pool.stats().tunnels), (1, 1), "no new tunnel was needed");
    drop((stays, ends));
    rig.settled().await;
}

#[tokio::test]
async fn a_root_that_goes_takes_the_tunnels_of_its_clients() {
    let rig = Rig::start().await;
    let other = Authority::new("other").unwrap();
    let identity = rig.engine.proxy.identity.clone();
    identity.set_trust_anchors(&[other.root_pem()]).unwrap();
    let _pod = serving(&rig, |config| config).await;
    let distrusted = Client::of(&rig, other.issue(&rig::id("client")).unwrap());
    let believed = Client::of(&rig, rig.authority.issue(&rig::id("client")).unwrap());
    only_the_first_ends(&rig, &distrusted, &believed, async || {
        identity.set_trust_anchors(&[]).unwrap()
    })
    .await;
}

#[tokio::test]
async fn a_trust_domain_that_goes_takes_the_tunnels_of_its_clients() {
    let rig = Rig::start().await;
    let pod = serving(&rig, |config| config.trusting(&["cluster.local", "old.example"])).await;
    let old = SpiffeId::workload("old.example", "app", "client").unwrap();
    let distrusted = Client::of(&rig, rig.authority.issue(&old).unwrap());
    let believed = Client::of(&rig, rig.authority.issue(&rig::id("client")).unwrap());
    only_the_first_ends(&rig, &distrusted, &believed, async || {
        rig.publish(Config::default().tcp(DB, &[pod.address]));
    })
    .await;
}

#[tokio::test]
async fn a_certificate_that_is_revoked_takes_the_tunnels_that_it_opened() {
    let authority = Authority::new("rig").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ca-crl.pem");
    fs::write(&path, authority.revocation_list(&[]).unwrap()).unwrap();
    let options = Options {
        revocation_file: Some(path.clone()),
        file_poll: Duration::from_millis(20),
        ..Options::default()
    };
    let identity = Identity::start_with(Source::Fixed(authority.issue(&rig::id("waypoint")).unwrap()), options);
    timeout(PATIENCE, identity.ready()).await.unwrap();
    let rig = Rig::start_as(authority, identity, |_| {}).await;
    let _pod = serving(&rig, |config| config).await;
    let revoked = rig.authority.issue(&rig::id("client")).unwrap();
    let list = rig.authority.revocation_list(&[&revoked]).unwrap();
    let distrusted = Client::of(&rig, revoked);
    let believed = Client::of(&rig, rig.authority.issue(&rig::id("client")).unwrap());
    only_the_first_ends(&rig, &distrusted, &believed, async || {
        // As files are exchanged: whole.
        let new = folder.path().join("new");
        fs::write(&new, list).unwrap();
        fs::rename(new, path).unwrap();
    })
    .await;
}
