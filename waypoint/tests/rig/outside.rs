//! The other side of the proxy, clients and pods, in a process of its own: so that what is measured here is the proxy's alone.
//!
//! The process is this test's own binary, told by an environment variable to play the other side. It takes one command a line and says
//! `done` after each.
#![allow(dead_code, unreachable_pub, reason = "each test uses a part of it")]

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{IpAddr, SocketAddr},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use cairn_hbone::{Destination, Opened, PoolSettings};
use cairn_identity::{Credentials, Identity, Pem};
use http::{HeaderMap, Request};
use http_body_util::Full;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::rig::{self, App, Rig, echo_app, id, pod_at};

/// Where the certificates lie, the proxy's address, the pods' addresses.
const ROLE: &str = "CAIRN_TEST_OTHER_SIDE";
/// The test that plays it.
const PLAYER: &str = "the_other_side";

/// A running other side.
pub struct Outside {
    child: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// A pod that sends bytes back.
    pub mirror: SocketAddr,
    /// A pod that speaks HTTP.
    pub web: SocketAddr,
    _certificates: tempfile::TempDir,
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Outside {
    /// Starts it for this rig.
    pub fn start(rig: &Rig) -> Self {
        let certificates = tempfile::tempdir().unwrap();
        for account in ["client", "pod"] {
            let pem = rig
                .authority
                .issue_pem(&id(account), SystemTime::now(), Duration::from_secs(3600))
                .unwrap();
            for (kind, text) in [("chain", &pem.chain), ("key", &pem.key), ("roots", &pem.roots)] {
                std::fs::write(certificates.path().join(format!("{account}.{kind}")), text).unwrap();
            }
        }
        let (mirror, web) = (rig.ip(10), rig.ip(11));
        let role = format!("{}|{}|{mirror}|{web}", certificates.path().display(), rig.address);
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([PLAYER, "--exact", "--nocapture", "--test-threads=1"])
            .env(ROLE, role)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (commands, answers) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let at = |ip| SocketAddr::new(ip, 8080);
        let mut outside = Self {
            child,
            commands,
            answers,
            mirror: at(mirror),
            web: at(web),
            _certificates: certificates,
        };
        outside.ask("begin");
        outside
    }

    /// Has something done and waits for it. Blocks: for the thread of the test, not for a worker.
    pub fn ask(&mut self, command: &str) {
        writeln!(self.commands, "{command}").unwrap();
        let mut line = String::new();
        while line.trim() != "done" {
            line.clear();
            assert_ne!(
                self.answers.read_line(&mut line).unwrap(),
                0,
                "the other side ended at {command:?}"
            );
        }
    }
}

/// Plays the other side, if that is what this process is for.
pub fn play() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let parts: Vec<&str> = role.split('|').collect();
    let [certificates, proxy, mirror, web] = parts[..] else {
        panic!("{role}")
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let pod = identity(certificates, "pod");
        let accept = |app: App| {
            move |connect: cairn_hbone::Connect| {
                let app = app.clone();
                tokio::spawn(async move {
                    let authority = connect.authority.to_string();
                    if let Ok(stream) = connect.accept(HeaderMap::new()) {
                        app(stream, authority).await;
                    }
                });
            }
        };
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let _mirror = pod_at(ip(mirror), pod.clone(), accept(rig::mirror())).await;
        let _web = pod_at(ip(web), pod, accept(echo_app("web"))).await;
        let mut side = Side {
            identity: identity(certificates, "client"),
            proxy: proxy.parse().unwrap(),
            held: Vec::new(),
        };
        for line in std::io::stdin().lines() {
            side.obey(&line.unwrap()).await;
            println!("\ndone");
        }
    });
}

fn identity(directory: &str, account: &str) -> Identity {
    let read = |kind: &str| std::fs::read(Path::new(directory).join(format!("{account}.{kind}"))).unwrap();
    let pem = Pem {
        chain: read("chain"),
        key: read("key"),
        roots: read("roots"),
    };
    Identity::fixed(Credentials::from_pem(&pem, SystemTime::now()).unwrap())
}

/// Clients.
struct Side {
    identity: Identity,
    proxy: SocketAddr,
    held: Vec<Box<dyn std::any::Any + Send>>,
}

impl Side {
    fn pool(&self) -> cairn_hbone::Pool {
        let settings = PoolSettings {
            max_streams: 50_000,
            spread_tunnels: 1,
            ..PoolSettings::default()
        };
        rig::client_as(self.identity.clone(), settings)
    }

    async fn open(&self, pool: &cairn_hbone::Pool, authority: &str) -> Opened {
        pool.open(
            &Destination {
                address: self.proxy,
                trust: 0,
            },
            authority,
            HeaderMap::new(),
        )
        .await
        .unwrap()
    }

    async fn obey(&mut self, command: &str) {
        let words: Vec<&str> = command.split_whitespace().collect();
        match words[..] {
            ["begin"] => {}
            ["drop"] => self.held.clear(),
            ["load", authority, streams, milliseconds] => {
                self.load(authority, streams.parse().unwrap(), milliseconds.parse().unwrap())
                    .await
            }
            [what, authority, count] => {
                let pool = self.pool();
                for _ in 0..count.parse::<usize>().unwrap() {
                    self.begin(what, authority, &pool).await;
                }
                self.held.push(Box::new(pool));
            }
            _ => panic!("{command:?}"),
        }
    }

    /// Begins one connection, uses it as it is to be used, and holds it.
    async fn begin(&mut self, what: &str, authority: &str, pool: &cairn_hbone::Pool) {
        if what == "tunnels" {
            let pool = self.pool();
            drop(self.open(&pool, authority).await);
            self.held.push(Box::new(pool));
            return;
        }
        let mut stream = self.open(pool, authority).await.stream;
        match what {
            "streams" => self.held.push(Box::new(stream)),
            "tcp" => {
                stream.write_all(b"ping").await.unwrap();
                stream.read_exact(&mut [0; 4]).await.unwrap();
                self.held.push(Box::new(stream));
            }
            "h1" => {
                stream
                    .write_all(b"GET / HTTP/1.1\r\nhost: web\r\nuser-agent: test\r\n\r\n")
                    .await
                    .unwrap();
                let mut heard = Vec::new();
                while !heard.ends_with(b"web / 0") {
                    let mut piece = [0; 1024];
                    let read = stream.read(&mut piece).await.unwrap();
                    assert!(read > 0, "{:?}", String::from_utf8_lossy(&heard));
                    heard.extend_from_slice(&piece[..read]);
                }
                self.held.push(Box::new(stream));
            }
            "h2" => {
                let (mut sender, connection) = h2::client::handshake(stream).await.unwrap();
                tokio::spawn(connection);
                let (answer, _) = sender
                    .send_request(Request::get("http://web/").body(()).unwrap(), true)
                    .unwrap();
                let mut body = answer.await.unwrap().into_body();
                while let Some(data) = body.data().await {
                    data.unwrap();
                }
                self.held.push(Box::new(sender));
            }
            other => panic!("{other:?}"),
        }
    }

    /// Requests, one after the other, in so many streams of one tunnel.
    async fn load(&self, authority: &str, streams: usize, milliseconds: u64) {
        let pool = self.pool();
        let until = tokio::time::Instant::now() + Duration::from_millis(milliseconds);
        let mut tasks = Vec::new();
        for _ in 0..streams {
            let stream = self.open(&pool, authority).await.stream;
            tasks.push(tokio::spawn(async move {
                let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
                tokio::spawn(connection);
                while tokio::time::Instant::now() < until {
                    let request = Request::get("/")
                        .header("host", "web")
                        .body(Full::<Bytes>::default())
                        .unwrap();
                    rig::send(&mut sender, request).await;
                }
            }));
        }
        assert_eq!(pool.stats().tunnels, 1);
        for task in tasks {
            task.await.unwrap();
        }
    }
}

/// Waits until the proxy has noticed.
pub async fn until(what: &str, reached: impl Fn() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while !reached() {
        assert!(tokio::time::Instant::now() < deadline, "still waiting: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // What is freed with a delay is freed now.
    tokio::time::sleep(Duration::from_millis(300)).await;
}
