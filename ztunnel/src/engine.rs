//! The proxy put together.
//!
//! Two runtimes: one for connections, one for everything else (discovery, certificates, istio-cni, pages), so that work of the control
//! plane never stands in a connection's way.

use std::{collections::HashMap, io, net::SocketAddr, sync::Arc};

use anyhow::{Context as _, Result};
use cairn_agent::{server, shutdown};
use cairn_exchange::clock;
use cairn_telemetry::Registry;
use tokio::runtime::{Builder, Runtime};

use crate::{
    admin::{self, Pages},
    authorization,
    bypass::Bypasses,
    certificates::{Authority, Certificates},
    consumer::{self, Tables},
    dns::Resolver,
    logging,
    mesh::Mesh,
    netns::Namespace,
    node::Node,
    pod::Pod,
    policies::Policies,
    readiness::{Readiness, Task},
    settings::{Mode, Settings},
    sockets::Sockets,
    telemetry::{AccessLog, Metrics},
    wds, zds,
};

/// Threads for everything that is not a connection.
const CONTROL_THREADS: usize = 2;
/// The name of a dedicated proxy's one workload among pods.
const DEDICATED: &str = "dedicated";

/// The two runtimes.
pub struct Runtimes {
    /// For connections.
    pub data: Runtime,
    /// For everything else.
    pub control: Runtime,
}

// === impl Runtimes ===

impl Runtimes {
    /// Runtimes with so many threads for connections.
    pub fn new(workers: usize) -> io::Result<Self> {
        let data = Builder::new_multi_thread()
            .worker_threads(workers)
            .thread_name("connections")
            .enable_all()
            .build()?;
        let control = Builder::new_multi_thread()
            .worker_threads(CONTROL_THREADS)
            .thread_name("control")
            .enable_all()
            .build()?;
        Ok(Self { data, control })
    }
}

/// Runs until a signal or a page ends it. Call it within the control runtime.
pub async fn run(settings: Settings, logging: logging::Handle, data: tokio::runtime::Handle) -> Result<()> {
    let registry = Registry::new();
    let control = tokio::runtime::Handle::current();
    let readiness = Readiness::default();
    let (mesh, policies) = (Arc::new(Mesh::new(settings.network.clone())), Arc::new(Policies::default()));
    let authority = Authority::Istiod {
        settings: settings.authority.clone(),
    };
    let certificates = Arc::new(Certificates::new(authority, control));
    let log =
        AccessLog::to_stdout(settings.log_format, settings.log_opened, &registry).context("the access log cannot be written")?;
    let servers = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let node = Arc::new(Node {
        mesh: mesh.clone(),
        policies: policies.clone(),
        certificates: certificates.clone(),
        metrics: Metrics::new(&registry),
        log,
        bypasses: Bypasses::default(),
        resolver: Resolver::new(Resolver::servers_of(&servers), settings.dns_domain.as_str(), &registry),
        settings: settings.node.clone(),
        pods: HashMap::new().into(),
    });

    let (ending, requests) = shutdown::channel();
    shutdown::on_signals(ending.clone()).context("signals cannot be handled")?;
    let pages = Pages {
        node: node.clone(),
        registry: registry.clone(),
        readiness: readiness.clone(),
        logging,
        control: ending,
    };
    let discovered = settings
        .istiod
        .is_some()
        .then(|| readiness.task("istiod has sent policies and workloads"));
    let pods = readiness.task("pods are served");
    serve_pages(&settings, &pages).await?;

    if let Some(istiod) = settings.istiod {
        let shared = matches!(settings.mode, Mode::Shared { .. });
        let prepare = shared.then(|| (certificates.clone(), settings.node.node.clone()));
        let tables = Tables::new(mesh, policies, prepare, &registry);
        let client = cairn_xds::Client::new(istiod, consumer::subscriptions(), tables)?;
        tokio::spawn(when_discovered(client.status(), discovered));
        tokio::spawn(client.run(std::future::pending()));
    }

    let keep_source = settings.keep_source.unwrap_or_else(|| rustix::process::getuid().is_root());
    match settings.mode {
        Mode::Dedicated { workload } => {
            let sockets = Sockets {
                namespace: Namespace::own(),
                mark: settings.mark,
                keep_source,
            };
            let _data = data.enter();
            let pod = Pod::start(node.clone(), workload, sockets)?;
            node.pods.write().insert(DEDICATED.to_owned(), pod);
            drop(pods);
        }
        Mode::Shared { zds } => {
            let template = Sockets {
                namespace: Namespace::own(),
                mark: settings.mark,
                keep_source,
            };
            let served = zds::Pods::new(node.clone(), template, settings.trust_domain, data.clone(), readiness.clone());
            tokio::spawn(zds::run(zds, served, pods));
        }
    }

    let draining = node.clone();
    let not_ready = parking_lot::Mutex::new(None);
    let deadline = parking_lot::Mutex::new(None);
    let begin_drain = || {
        *not_ready.lock() = Some(readiness.task("the proxy is draining"));
        *deadline.lock() = Some(clock::now() + settings.drain.termination);
        for pod in draining.pods() {
            pod.drain();
        }
    };
    // What is open goes on until it ends by itself, or time is up: a newer instance serves what is new.
    let done = || node.open() == 0 || deadline.lock().is_some_and(|deadline| clock::now() >= deadline);
    requests.until_exit(&settings.drain, begin_drain, done).await;
    Ok(())
}

/// Until policies and workloads are in.
async fn when_discovered(status: cairn_xds::Status, task: Option<Task>) {
    let taken = |status: &cairn_xds::StatusSnapshot, kind: &str| {
        status
            .types
            .iter()
            .any(|(url, status)| url.as_str() == kind && status.acked + status.nacked > 0)
    };
    status
        .until(|status| taken(status, wds::TYPE) && taken(status, authorization::TYPE))
        .await;
    drop(task);
}

async fn serve_pages(settings: &Settings, pages: &Pages) -> Result<()> {
    let ports = &settings.ports;
    start("administration", ports.admin, admin::router(pages.clone())).await?;
    start("metrics", ports.metrics, admin::metrics_router(pages.clone())).await?;
    start("readiness", ports.ready, admin::ready_router(pages.clone())).await
}

/// On both families, or on IPv4 where there is no IPv6.
async fn start(purpose: &'static str, address: SocketAddr, router: axum::Router) -> Result<()> {
    let error = match server::start(purpose, address, router.clone()).await {
        Ok(_) => return Ok(()),
        Err(error) => error,
    };
    if address.is_ipv4() || error.is_in_use() {
        return Err(error.into());
    }
    let v4 = SocketAddr::new(std::net::Ipv4Addr::UNSPECIFIED.into(), address.port());
    server::start(purpose, v4, router).await?;
    Ok(())
}
