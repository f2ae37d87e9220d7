//! The identity of this process: newest credentials, configurations made of them, and what to tell about them.
//!
//! Credentials and revocation lists form a *generation*; a change of either makes a new one and swaps it in with one pointer.
//! Configurations are built on first use and kept with their generation, one for each set of terms, so that looking one up at
//! each handshake is a pointer load and a short comparison: no lock is taken once it exists.
//!
//! The certificate's end is compared with the time of day at every look-up: past it, there is no configuration.

use std::{
    fmt,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use arc_swap::{ArcSwap, ArcSwapOption};
use cairn_exchange::SpiffeId;
use parking_lot::Mutex;
use rustls::{
    ClientConfig, ServerConfig,
    pki_types::{CertificateDer, CertificateRevocationListDer},
};
use tokio::{sync::watch, task::JoinSet};

use crate::{
    ca::{self, CaSettings},
    compliance::Compliance,
    config::{self, ConfigError},
    credentials::{self, Credentials, CredentialsError},
    files, peer, revocation,
    rotation::{self, Renewal},
    sds,
    terms::{ClientTerms, ServerTerms},
    trust::{self, ClientTrust},
    verify,
    wall::WallClock,
};

/// Configurations kept for one generation; a mesh has a handful of different terms.
const MAX_CONFIGS: usize = 64;

/// Where credentials come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// A certificate authority that signs our requests (istiod).
    CertificateAuthority(CaSettings),
    /// Files that something else keeps fresh, such as `./var/run/secrets/workload-spiffe-credentials/` or `./etc/certs/`.
    Files {
        /// Certificates, leaf first.
        chain: PathBuf,
        /// The private key.
        key: PathBuf,
        /// The trust bundle.
        root: PathBuf,
    },
    /// A Unix socket that serves secrets `default` and `ROOTCA` (SPIRE).
    SdsSocket {
        /// The socket.
        path: PathBuf,
    },
    /// Credentials that never change.
    Fixed(Credentials),
}

/// What is not about the source.
#[derive(Clone, Debug)]
pub struct Options {
    /// Certificate revocation lists in PEM form, watched; nothing is revoked while the file does not exist
    /// (`/var/run/secrets/istio/crl/ca-crl.pem`).
    pub revocation_file: Option<PathBuf>,
    /// How often files are looked at. Polling by content sees every way that files are exchanged, Kubernetes' swap of a
    /// symbolic link to the whole directory included.
    pub file_poll: Duration,
    /// What is allowed of TLS, whatever terms say.
    pub compliance: Compliance,
    /// The time of day.
    pub wall: WallClock,
}

/// This process's identity; clones are the same one. The tasks that keep it fresh end with the last clone.
#[derive(Clone)]
pub struct Identity {
    shared: Arc<Shared>,
    _tasks: Arc<JoinSet<()>>,
}

/// What to tell about an identity: for metrics, readiness and people.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// Who we are, once it is known.
    pub id: Option<SpiffeId>,
    /// Serial number of the certificate in use, hexadecimal.
    pub serial: Option<String>,
    /// When the life of the certificate in use began.
    pub not_before: Option<SystemTime>,
    /// When the certificate in use ends (`istio_agent_cert_expiry_seconds` is this minus now).
    pub expiry: Option<SystemTime>,
    /// When the certificate in use came in.
    pub last_renewal: Option<SystemTime>,
    /// When the next certificate will be asked for.
    pub next_renewal: Option<SystemTime>,
    /// How many certificates the trust bundle has.
    pub roots: usize,
    /// How many roots are believed beside it.
    pub anchors: usize,
    /// How often credentials, trust anchors or revocation lists have changed; 0 before the first.
    pub generation: u64,
    /// Why the last attempt failed; `None` after a success.
    pub last_error: Option<String>,
    /// Why the revocation file's content is not in use; `None` when it is, or when there is none.
    pub revocation_error: Option<String>,
    /// Failed attempts since the start.
    pub failures: u64,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum Unavailable {
    /// No credentials have come in yet.
    #[error("there is no workload certificate yet{}", because(.0))]
    NoCredentials(Option<String>),
    /// The certificate's life has ended and no new one came.
    #[error("the workload certificate for {id} expired at {}{}", peer::date(*.not_after), because(.error))]
    Expired {
        /// Whose.
        id: SpiffeId,
        /// When.
        not_after: SystemTime,
        /// Why there is no new one.
        error: Option<String>,
    },
    /// The terms cannot be met.
    #[error(transparent)]
    Terms(#[from] ConfigError),
}

/// The state that the tasks write and everybody reads.
pub(crate) struct Shared {
    current: ArcSwapOption<Generation>,
    generation: watch::Sender<u64>,
    parts: Mutex<Parts>,
    status: Mutex<Status>,
    compliance: Compliance,
    wall: WallClock,
}

/// What the next generation is made of.
#[derive(Default)]
struct Parts {
    credentials: Option<Arc<Credentials>>,
    revocation_lists: RevocationState,
    /// Roots that are believed beside those of the credentials.
    anchors: Arc<[CertificateDer<'static>]>,
}

/// What is known of revocation lists.
#[derive(Clone, Default)]
pub(crate) enum RevocationState {
    /// There are none to be looked at, or these.
    Known(Arc<[CertificateRevocationListDer<'static>]>),
    /// There is a file that nobody has been able to read yet: nobody can be believed before it is.
    Unread,
    /// Nothing configured.
    #[default]
    Off,
}

struct Generation {
    credentials: Arc<Credentials>,
    revocation_lists: Arc<[CertificateRevocationListDer<'static>]>,
    anchors: Arc<[CertificateDer<'static>]>,
    /// Equal for equal trust.
    trust: u64,
    servers: Configs<ServerTerms, ServerConfig>,
    clients: Configs<ClientTerms, ClientConfig>,
}

/// Configurations by their terms: read without a lock, built under one.
struct Configs<T, C> {
    built: ArcSwap<Vec<(T, Arc<C>)>>,
    building: Mutex<()>,
}

// === impl Identity ===

impl Identity {
    /// Starts to keep credentials fresh, on the current tokio runtime; returns at once.
    pub fn start(source: Source) -> Self {
        Self::start_with(source, Options::default())
    }

    /// As [`Identity::start`], with options.
    pub fn start_with(source: Source, options: Options) -> Self {
        let shared = Arc::new(Shared::new(options.compliance, options.wall));
        let mut tasks = JoinSet::new();
        let poll = options.file_poll;
        if let Some(path) = options.revocation_file {
            shared.set_revocation_lists(RevocationState::Unread);
            tasks.spawn(revocation::watch(shared.clone(), path, poll));
        }
        match source {
            Source::Fixed(credentials) => shared.install(credentials, None),
            Source::Files { chain, key, root } => {
                tasks.spawn(files::watch(shared.clone(), files::Paths { chain, key, root }, poll));
            }
            Source::SdsSocket { path } => {
                tasks.spawn(sds::watch(shared.clone(), path));
            }
            Source::CertificateAuthority(settings) => {
                let shared = shared.clone();
                tasks.spawn(async move {
                    let renewal = Renewal {
                        ratio: settings.renew_ratio,
                        jitter: settings.renew_jitter,
                    };
                    rotation::keep_fresh(&shared, renewal, || ca::issue(&settings, shared.wall())).await;
                });
            }
        }
        Self {
            shared,
            _tasks: Arc::new(tasks),
        }
    }

    /// Credentials that never change; needs no runtime.
    pub fn fixed(credentials: Credentials) -> Self {
        let shared = Arc::new(Shared::new(Compliance::default(), WallClock::default()));
        shared.install(credentials, None);
        Self {
            shared,
            _tasks: Arc::new(JoinSet::new()),
        }
    }

    /// Waits until there are credentials. It has no deadline of its own: the caller knows how long a start may take.
    pub async fn ready(&self) {
        let mut generation = self.watch();
        // The sender lives in `self.shared`, so this ends only by success.
        let _ = generation.wait_for(|generation| *generation > 0).await;
    }

    /// The newest credentials, expired or not.
    pub fn current(&self) -> Option<Arc<Credentials>> {
        self.shared
            .current
            .load()
            .as_ref()
            .map(|generation| generation.credentials.clone())
    }

    /// The revocation lists in use.
    pub(crate) fn revocation_lists(&self) -> Arc<[CertificateRevocationListDer<'static>]> {
        let current = self.shared.current.load();
        current
            .as_ref()
            .map(|generation| generation.revocation_lists.clone())
            .unwrap_or_default()
    }

    /// The number of the generation: changes with each change of credentials, trust bundle or revocation lists.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.shared.generation.subscribe()
    }

    /// The configuration to accept connections with under `terms`; ask for it anew at each handshake. None while there are no
    /// credentials, when they have expired, or when the terms cannot be met: [`Identity::try_server_config`] says why.
    pub fn server_config(&self, terms: &ServerTerms) -> Option<Arc<ServerConfig>> {
        self.try_server_config(terms).ok()
    }

    /// The configuration to open connections with under `terms`; as [`Identity::server_config`].
    pub fn client_config(&self, terms: &ClientTerms) -> Option<Arc<ClientConfig>> {
        self.try_client_config(terms).ok()
    }

    /// [`Identity::server_config`], or the reason that there is none.
    pub fn try_server_config(&self, terms: &ServerTerms) -> Result<Arc<ServerConfig>, Unavailable> {
        let generation = self.shared.usable()?;
        let build = || {
            let mut terms = self.shared.compliance.server(terms);
            terms.extra_roots.extend(generation.anchors.iter().cloned());
            config::server(&generation.credentials, &generation.revocation_lists, &terms)
        };
        Ok(generation.servers.get(terms, build)?)
    }

    /// [`Identity::client_config`], or the reason that there is none.
    pub fn try_client_config(&self, terms: &ClientTerms) -> Result<Arc<ClientConfig>, Unavailable> {
        let generation = self.shared.usable()?;
        let build = || {
            let mut terms = self.shared.compliance.client(terms);
            terms.extra_roots.extend(generation.anchors.iter().cloned());
            config::client(&generation.credentials, &generation.revocation_lists, &terms)
        };
        Ok(generation.clients.get(terms, build)?)
    }

    /// Whom [`Identity::server_config`] accepts connections from under `terms` now, for connections that were accepted before. None
    /// while nobody can be asked.
    pub fn client_trust(&self, terms: &ServerTerms) -> Option<ClientTrust> {
        let generation = self.shared.current.load_full()?;
        let mut terms = self.shared.compliance.server(terms);
        terms.extra_roots.extend(generation.anchors.iter().cloned());
        ClientTrust::new(&generation.credentials, &generation.revocation_lists, &terms).ok()
    }

    /// Changes with the trust bundle and the revocation lists, and with nothing else; 0 before there are any.
    pub fn trust_mark(&self) -> u64 {
        self.shared.current.load().as_ref().map_or(0, |generation| generation.trust)
    }

    /// Takes over roots that are believed beside those of the credentials, in PEM form; they take the place of the ones before. For
    /// meshes whose authorities are several (contract xds §1.9, PCDS).
    pub fn set_trust_anchors(&self, pem: &[String]) -> Result<(), CredentialsError> {
        let mut anchors = Vec::new();
        for text in pem {
            anchors.extend(credentials::certificates(credentials::ROOTS, text.as_bytes())?);
        }
        if !anchors.is_empty() {
            credentials::trust_anchors(&anchors)?;
        }
        self.shared.set_anchors(anchors);
        Ok(())
    }

    /// Why no connection can be accepted or opened now; `None` when all is well.
    pub fn unavailable(&self) -> Option<Unavailable> {
        self.shared.usable().err()
    }

    /// What to tell about this identity.
    pub fn status(&self) -> Status {
        self.shared.status.lock().clone()
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("status", &self.status())
            .finish_non_exhaustive()
    }
}

// === impl Shared ===

impl Shared {
    fn new(compliance: Compliance, wall: WallClock) -> Self {
        Self {
            current: ArcSwapOption::empty(),
            generation: watch::Sender::new(0),
            parts: Mutex::default(),
            status: Mutex::default(),
            compliance,
            wall,
        }
    }

    pub(crate) fn wall(&self) -> &WallClock {
        &self.wall
    }

    /// New credentials are in.
    pub(crate) fn install(&self, credentials: Credentials, next_renewal: Option<SystemTime>) {
        let now = self.wall.now();
        tracing::info!(
            id = %credentials.id(),
            serial = credentials.serial(),
            expiry = %peer::date(credentials.not_after()),
            roots = credentials.roots().len(),
            "workload certificate in use"
        );
        if let Err(error) = verify::own_chain(&credentials, now) {
            // It may be meant so, when trust comes from elsewhere; more often an authority was exchanged by halves.
            tracing::warn!(
                "our own certificate does not lead to our own trust bundle, so peers with the same bundle refuse us: {error}"
            );
        }
        {
            let mut status = self.status.lock();
            status.id = Some(credentials.id().clone());
            status.serial = Some(credentials.serial().to_owned());
            status.not_before = Some(credentials.not_before());
            status.expiry = Some(credentials.not_after());
            status.roots = credentials.roots().len();
            status.last_renewal = Some(now);
            status.next_renewal = next_renewal;
            status.last_error = None;
        }
        let mut parts = self.parts.lock();
        parts.credentials = Some(Arc::new(credentials));
        self.begin_generation(&parts);
    }

    /// The revocation lists have changed.
    pub(crate) fn set_revocation_lists(&self, lists: RevocationState) {
        self.status.lock().revocation_error = None;
        let mut parts = self.parts.lock();
        parts.revocation_lists = lists;
        self.begin_generation(&parts);
    }

    /// The roots beside those of the credentials may have changed.
    fn set_anchors(&self, anchors: Vec<CertificateDer<'static>>) {
        let mut parts = self.parts.lock();
        if *parts.anchors == *anchors {
            return;
        }
        tracing::info!(roots = anchors.len(), "further trust anchors in use");
        self.status.lock().anchors = anchors.len();
        parts.anchors = anchors.into();
        self.begin_generation(&parts);
    }

    /// An attempt to get new credentials failed; what was there stays. `what` begins the sentence in the log.
    pub(crate) fn failed(&self, what: &str, error: &dyn std::error::Error) {
        tracing::warn!("{what} failed: {error}");
        let mut status = self.status.lock();
        status.last_error = Some(error.to_string());
        status.failures += 1;
    }

    /// The revocation file cannot be used; what was read from it before stays.
    pub(crate) fn revocation_failed(&self, error: &dyn std::error::Error) {
        tracing::warn!("reading revocation lists failed: {error}");
        let mut status = self.status.lock();
        status.revocation_error = Some(error.to_string());
        status.failures += 1;
    }

    /// Swaps in what `parts` say; they stay locked meanwhile, so that generations come one after another.
    fn begin_generation(&self, parts: &Parts) {
        let revocation_lists = match &parts.revocation_lists {
            RevocationState::Known(lists) => lists.clone(),
            RevocationState::Off => Arc::default(),
            RevocationState::Unread => return,
        };
        let Some(credentials) = parts.credentials.clone() else {
            return;
        };
        let trust = trust::mark(&credentials, &revocation_lists, &parts.anchors);
        self.current.store(Some(Arc::new(Generation {
            trust,
            credentials,
            revocation_lists,
            anchors: parts.anchors.clone(),
            servers: Configs::new(),
            clients: Configs::new(),
        })));
        let mut number = 0;
        self.generation.send_modify(|generation| {
            *generation += 1;
            number = *generation;
        });
        self.status.lock().generation = number;
    }

    /// The newest generation, if its certificate is still alive.
    fn usable(&self) -> Result<Arc<Generation>, Unavailable> {
        let Some(generation) = self.current.load_full() else {
            let status = self.status.lock();
            return Err(Unavailable::NoCredentials(
                status.last_error.clone().or_else(|| status.revocation_error.clone()),
            ));
        };
        let not_after = generation.credentials.not_after();
        if self.wall.now() >= not_after {
            let error = self.status.lock().last_error.clone();
            return Err(Unavailable::Expired {
                id: generation.credentials.id().clone(),
                not_after,
                error,
            });
        }
        Ok(generation)
    }
}

// === impl Configs ===

impl<T: Clone + Eq, C> Configs<T, C> {
    fn new() -> Self {
        Self {
            built: ArcSwap::default(),
            building: Mutex::new(()),
        }
    }

    fn get(&self, terms: &T, build: impl FnOnce() -> Result<C, ConfigError>) -> Result<Arc<C>, ConfigError> {
        if let Some(config) = self.find(terms) {
            return Ok(config);
        }
        // One configuration for each terms, or sessions of one would be unknown to the other.
        let _building = self.building.lock();
        if let Some(config) = self.find(terms) {
            return Ok(config);
        }
        let config = Arc::new(build()?);
        let built = self.built.load_full();
        let kept = built.iter().skip((built.len() + 1).saturating_sub(MAX_CONFIGS)).cloned();
        self.built
            .store(Arc::new(kept.chain([(terms.clone(), config.clone())]).collect()));
        Ok(config)
    }

    fn find(&self, terms: &T) -> Option<Arc<C>> {
        self.built
            .load()
            .iter()
            .find(|(of, _)| of == terms)
            .map(|(_, config)| config.clone())
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            revocation_file: None,
            file_poll: files::POLL,
            compliance: Compliance::default(),
            wall: WallClock::default(),
        }
    }
}

/// The end of a sentence that may have a known cause.
fn because(error: &Option<String>) -> String {
    error.as_ref().map(|error| format!(": {error}")).unwrap_or_default()
}

#[cfg(test)]
mod tests;
