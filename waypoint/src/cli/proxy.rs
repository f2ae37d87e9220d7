//! `cairn proxy waypoint …`: the proxy in the pod that istiod makes for a Gateway, in the place of Envoy and pilot-agent.
//!
//! What never works ends the start in one sentence: a role that is not ours, a setting that means nothing, a port in use. What may
//! work later does not: istiod, its root, the token. Those are retried, `/healthz/ready` says what is missing, and the log does
//! once. Tunnels are accepted when the configuration is complete (architecture rule 11).

use std::{future::pending, process::ExitCode, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use cairn_agent::shutdown;
use cairn_identity::{Compliance, Identity, Options};
use clap::Args;
use parking_lot::Mutex;
use serde_json::json;
use tokio::{runtime, sync::watch, time::sleep};

use super::{FLUSH_TIMEOUT, arguments::Arguments};
use crate::{
    admin::{self, About, Pages, Readiness, readiness::waiting_for},
    config::Compiler,
    consumer::{self, Progress, Watched},
    engine::{Engine, Parts, Runtimes},
    logging,
    proxy::DataSettings,
    settings::{ANNOTATIONS, Environment, Pod, Ports, Settings},
};
use cairn_telemetry::trace::NodeFacts;

/// Certificates that are taken back, when istiod publishes such a list.
const REVOCATION_FILE: &str = "/var/run/secrets/istio/crl/ca-crl.pem";
/// Pause after a port for tunnels could not be opened.
const LISTEN_PAUSE: Duration = Duration::from_secs(1);

/// Runs in the pod that istiod makes for a waypoint, with the arguments of its pod template.
#[derive(Args, Debug)]
#[command(disable_help_flag = true)]
pub struct Proxy {
    /// `waypoint` and pilot-agent's flags; those that mean nothing here are accepted.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "waypoint FLAGS")]
    arguments: Vec<String>,
}

/// Runs until a signal ends it.
pub fn main(args: &Proxy) -> ExitCode {
    match start(&args.arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cairn proxy: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(arguments: &[String]) -> Result<()> {
    let arguments = Arguments::parse(arguments)?;
    let environment = Environment::of_process();
    let settings = Settings::new(&arguments, &environment, &Pod::read())?;
    let logging = logging::Handle::start(&settings.log);
    say_what_was_ignored(&arguments, &settings.ignored);
    let runtimes = Runtimes::new(settings.workers).context("the threads of the proxy cannot be started")?;
    let data = runtimes.data.handle().clone();
    let result = runtimes.control.block_on(run(settings, &arguments, logging, data));
    // Requests that are still under way had their time, and the last log lines are written.
    runtimes.data.shutdown_background();
    runtimes.control.shutdown_background();
    result
}

fn say_what_was_ignored(arguments: &Arguments, settings: &[String]) {
    let (flags, scopes) = (arguments.unknown(), arguments.unknown_scopes());
    if !flags.is_empty() {
        tracing::warn!("accepted, but without meaning here: {}", flags.join(" "));
    }
    if !settings.is_empty() {
        tracing::warn!("set, but not supported here: {}", settings.join(", "));
    }
    if !scopes.is_empty() {
        tracing::warn!("log levels were given for parts that are not here: {}", scopes.join(", "));
    }
}

/// Everything on the control runtime; connections are served on `data`.
async fn run(settings: Settings, arguments: &Arguments, logging: logging::Handle, data: runtime::Handle) -> Result<()> {
    let options = Options {
        revocation_file: Some(REVOCATION_FILE.into()),
        compliance: settings.compliance,
        ..Options::default()
    };
    if matches!(settings.compliance, Compliance::Fips140V2 | Compliance::Fips140V3) {
        tracing::warn!(
            "COMPLIANCE_POLICY narrows versions, cipher suites and curves of TLS; the cryptographic module of this build is not a validated one"
        );
    }
    let identity = Identity::start_with(settings.identity, options);
    let node = &settings.istiod.node;
    let data_settings = DataSettings {
        node: NodeFacts {
            id: node.id.as_str().into(),
            zone: node.locality.as_ref().map_or("", |locality| &locality.zone).into(),
            cluster: arguments.value("serviceCluster").unwrap_or(&node.cluster).into(),
            // TYPE~ADDRESS~POD~DOMAIN
            address: node.id.split('~').nth(1).and_then(|address| address.parse().ok()),
        },
        workers: settings.workers,
        ..settings.data
    };
    let engine = Arc::new(Engine::new(Parts {
        identity: identity.clone(),
        network: settings.network,
        version: settings.istio_version.clone(),
        settings: data_settings,
        observer: None,
    }));
    let compiler = Compiler::new(engine.workloads.clone(), engine.snapshot.clone(), Some(engine.logs.clone()))
        .feeding(engine.sources.clone())
        .recorded(engine.recorder.clone());
    let store = compiler.store().clone();
    let (watched, progress) = Watched::new(compiler, &engine.registry);
    let watched = watched.believing(identity.clone());
    tokio::spawn(watched.deadlines());
    tokio::spawn(watched.own_limits(ANNOTATIONS.into()));
    let about = about(&settings.istiod.node, arguments, settings.workers, &settings.istio_version);
    let istiod = settings.istiod.address.to_string();
    let client = cairn_xds::Client::new(
        settings.istiod,
        consumer::subscriptions(settings.peers, settings.trust_anchors),
        watched,
    )?;
    let status = client.status();
    let listening: Arc<Mutex<Option<String>>> = Arc::default();
    let readiness = readiness(istiod, &status, &progress, &identity, &listening);

    let (control, requests) = shutdown::channel();
    shutdown::on_signals(control.clone()).context("signals cannot be handled")?;
    super::reopen_logs_on_signal(engine.logs.clone()).context("signals cannot be handled")?;
    admin::metrics::register(&engine.registry, &engine.proxy, &store);
    admin::metrics::register_istiod(&engine.registry, &status);
    let pages = Pages::new(&engine, store, readiness.clone())
        .about(about)
        .istiod(status.clone())
        .logging(logging)
        .shutdown(control);
    admin::stats::register(&pages);
    serve_pages(&settings.ports, &pages).await?;

    tokio::spawn(client.run(pending()));
    let start = Start {
        engine: engine.clone(),
        identity,
        status,
        progress,
        readiness: readiness.clone(),
        listening,
        data,
    };
    tokio::spawn(start.serve(settings.warm_timeout));

    let begin_drain = || {
        readiness.draining();
        engine.connections.start();
    };
    requests.until_exit(&settings.drain, begin_drain, || engine.is_idle()).await;
    engine.logs.flush(FLUSH_TIMEOUT).await;
    engine.sources.exports.flush(FLUSH_TIMEOUT).await;
    Ok(())
}

fn about(
    node: &cairn_proto::envoy::config::core::v3::Node,
    arguments: &Arguments,
    workers: Option<usize>,
    istio_version: &str,
) -> About {
    let options = json!({
        "concurrency": workers.unwrap_or_default(),
        "service_node": node.id,
        "service_cluster": node.cluster,
        "log_level": arguments.value("proxyLogLevel").unwrap_or("warning"),
        "component_log_level": arguments.value("proxyComponentLogLevel").unwrap_or_default(),
        "istio_version": istio_version,
    });
    About {
        node: About::node_json(node),
        options,
    }
}

fn readiness(
    istiod: String,
    status: &cairn_xds::Status,
    progress: &watch::Receiver<Progress>,
    identity: &Identity,
    listening: &Arc<Mutex<Option<String>>>,
) -> Readiness {
    let (status, progress, identity, listening) = (status.clone(), progress.clone(), identity.clone(), listening.clone());
    Readiness::new(move || {
        let certificate = identity.unavailable().map(|why| why.to_string());
        let missing = progress.borrow().missing.clone();
        waiting_for(
            &istiod,
            &status.snapshot(),
            &missing,
            certificate.as_deref(),
            listening.lock().as_deref(),
        )
    })
}

async fn serve_pages(ports: &Ports, pages: &Pages) -> Result<(), admin::BindError> {
    use admin::{agent, envoy, server};
    server::start(
        "administration (ProxyConfig.proxyAdminPort)",
        ports.admin,
        envoy::router(pages.clone()),
    )
    .await?;
    server::start(
        "health and metrics (ProxyConfig.statusPort)",
        ports.agent,
        agent::router(pages.clone()),
    )
    .await?;
    server::start(
        "readiness (ENVOY_STATUS_PORT)",
        ports.ready,
        agent::ready_router(pages.clone()),
    )
    .await?;
    server::start(
        "metrics (ENVOY_PROMETHEUS_PORT)",
        ports.metrics,
        agent::metrics_router(pages.clone()),
    )
    .await?;
    Ok(())
}

/// The way from started to serving.
struct Start {
    engine: Arc<Engine>,
    identity: Identity,
    status: cairn_xds::Status,
    progress: watch::Receiver<Progress>,
    readiness: Readiness,
    /// Why there is no port for tunnels.
    listening: Arc<Mutex<Option<String>>>,
    data: runtime::Handle,
}

// === impl Start ===

impl Start {
    /// Waits until everything is in, listens, and goes on listening where istiod says.
    async fn serve(mut self, warm_timeout: Duration) {
        self.identity.ready().await;
        self.configured(warm_timeout).await;
        let mut bound = Vec::new();
        loop {
            let error = self.listen(&mut bound);
            if let Some(error) = &error
                && *self.listening.lock() != Some(error.clone())
            {
                tracing::error!("{error}");
            }
            let failed = error.is_some();
            *self.listening.lock() = error;
            if !bound.is_empty() {
                self.readiness.serving();
            }
            if failed || bound.is_empty() {
                sleep(LISTEN_PAUSE).await;
            } else if self.progress.changed().await.is_err() {
                // The client has ended, and with it the changes.
                return;
            }
        }
    }

    /// Waits for clusters and listeners, and a while for what they need (architecture rule 11).
    async fn configured(&mut self, warm_timeout: Duration) {
        self.status.until(consumer::has_base).await;
        let all = self.progress.wait_for(|progress| progress.missing.is_empty());
        if tokio::time::timeout(warm_timeout, all).await.map(drop).is_err() {
            let missing = self.progress.borrow().missing.join(", ");
            tracing::warn!(waited = ?warm_timeout, "serving without {missing}: requests that need it are refused until it is there");
        }
    }

    /// Opens what is not open yet; the words of the first failure. Addresses that are gone stay open, as closing one would refuse
    /// clients that have not heard of it.
    fn listen(&self, bound: &mut Vec<std::net::SocketAddr>) -> Option<String> {
        let _data = self.data.enter();
        let mut failed = None;
        for address in self.engine.addresses() {
            if bound.contains(&address) {
                continue;
            }
            match self.engine.listen_on(address) {
                Ok(local) => {
                    tracing::info!(address = %local, "listening for tunnels");
                    bound.push(address);
                }
                Err(error) => {
                    failed.get_or_insert(error.to_string());
                }
            }
        }
        failed
    }
}
