//! `cairn run`: serves captured configuration, with certificates from files or generated ones.
//!
//! For tests, for debugging, and to look at an incident again: the same engine as in the pod, without istiod.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode, sync::Arc};

use anyhow::{Context as _, Result};
use cairn_exchange::{SpiffeId, clock};
use cairn_identity::{Identity, Options, Source, generate::Authority};
use clap::Args;

use crate::{
    admin,
    config::{Compiler, load},
    engine::{Engine, Parts, Runtimes},
    logging::{self, LogSettings},
    proxy::DataSettings,
};

/// Serves captured configuration.
#[derive(Args, Debug)]
pub struct Run {
    /// A folder with a capture (cds.pb, eds.pb, lds.pb, …), or a file with Envoy's /config_dump JSON.
    #[arg(long, value_name = "PATH")]
    config: PathBuf,
    /// A folder with cert-chain.pem, key.pem and root-cert.pem, and ca-crl.pem where there is one; without it, certificates are generated.
    #[arg(long, value_name = "DIR")]
    certs: Option<PathBuf>,
    /// With generated certificates: where to put root, and certificate and key of a client.
    #[arg(long, value_name = "DIR", conflicts_with = "certs")]
    write_certs: Option<PathBuf>,
    /// With generated certificates: who the proxy is.
    #[arg(long, value_name = "SPIFFE_ID", default_value = "spiffe://cluster.local/ns/app/sa/waypoint")]
    identity: String,
    /// Listen for tunnels here instead of where the configuration says.
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
    /// Where administrative pages and metrics are served; without it nowhere.
    #[arg(long, value_name = "ADDRESS:PORT")]
    admin: Option<SocketAddr>,
    /// Threads for connections; without it one a core.
    #[arg(long, value_name = "N")]
    concurrency: Option<usize>,
    /// The network that the proxy is in.
    #[arg(long, default_value = "")]
    network: String,
}

/// Runs until a signal ends it.
pub fn main(args: &Run) -> ExitCode {
    match serve(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cairn run: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(args: &Run) -> Result<()> {
    // The error tells its cause itself.
    let answers = load::load(&args.config).map_err(|error| anyhow::anyhow!("{error}"))?;
    let runtimes = Runtimes::new(args.concurrency).context("the runtimes cannot be started")?;
    let _control = runtimes.control.enter();
    let settings = DataSettings {
        listen: args.listen,
        workers: args.concurrency,
        ..DataSettings::default()
    };
    let _logging = logging::Handle::start(&LogSettings::default());
    let engine = Engine::new(Parts {
        identity: runtimes.control.block_on(ready(identity(args)?))?,
        network: args.network.clone(),
        version: super::ISTIO_VERSION.into(),
        settings,
        observer: None,
    });
    let mut compiler = Compiler::new(engine.workloads.clone(), engine.snapshot.clone(), Some(engine.logs.clone()))
        .feeding(engine.sources.clone())
        .recorded(engine.recorder.clone());
    for answer in answers {
        let applied = compiler.apply(&answer.type_url, answer.resources, answer.removed);
        for error in applied.errors {
            eprintln!("cairn run: {error}");
        }
    }
    for item in compiler.unsupported().iter() {
        tracing::info!("not supported: {item}");
    }
    if let Some(address) = args.admin {
        let pages = admin::static_pages(&engine, compiler.store().clone());
        let bound = runtimes.control.block_on(admin::serve(address, pages))?;
        eprintln!("cairn run: administrative pages on http://{bound}/help");
    }
    let engine = Arc::new(engine);
    let bound = runtimes.data.block_on(async { engine.listen() })?;
    anyhow::ensure!(
        !bound.is_empty(),
        "{}: the configuration has no listener connect_terminate; give an address with --listen",
        args.config.display()
    );
    for address in bound {
        eprintln!("cairn run: listening for tunnels on {address}");
    }
    runtimes.control.block_on(super::signalled());
    runtimes.control.block_on(engine.logs.flush(super::FLUSH_TIMEOUT));
    Ok(())
}

/// Waits for certificates that come from files; what is wrong with them ends the command.
async fn ready(identity: Identity) -> Result<Identity> {
    if tokio::time::timeout(CERTIFICATES_TIMEOUT, identity.ready()).await.is_err() {
        let why = identity
            .status()
            .last_error
            .unwrap_or_else(|| "they were not read in time".into());
        anyhow::bail!("there are no usable certificates: {why}");
    }
    Ok(identity)
}

/// How long certificates in files may take to be read.
const CERTIFICATES_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(2);

fn identity(args: &Run) -> Result<Identity> {
    if let Some(dir) = &args.certs {
        let file = |name: &str| dir.join(name);
        let source = Source::Files {
            chain: file("cert-chain.pem"),
            key: file("key.pem"),
            root: file("root-cert.pem"),
        };
        let options = Options {
            revocation_file: Some(file("ca-crl.pem")),
            ..Options::default()
        };
        return Ok(Identity::start_with(source, options));
    }
    let authority = Authority::new("cairn run")?;
    let id: SpiffeId = args.identity.parse()?;
    if let Some(dir) = &args.write_certs {
        std::fs::create_dir_all(dir).with_context(|| format!("{} cannot be made", dir.display()))?;
        let client = SpiffeId::workload(id.trust_domain(), "default", "client")?;
        let pem = authority.issue_pem(&client, clock::wall(), CLIENT_LIFE)?;
        for (name, content) in [
            ("cert-chain.pem", &pem.chain),
            ("key.pem", &pem.key),
            ("root-cert.pem", &pem.roots),
        ] {
            let path = dir.join(name);
            std::fs::write(&path, content).with_context(|| format!("{} cannot be written", path.display()))?;
        }
        eprintln!("cairn run: certificates of a client {client} are in {}", dir.display());
    }
    Ok(Identity::fixed(authority.issue(&id)?))
}

/// Life of a generated client certificate.
const CLIENT_LIFE: std::time::Duration = std::time::Duration::from_secs(365 * 24 * 3600);
