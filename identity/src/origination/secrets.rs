//! Certificates and roots by the name that a cluster calls them.
//!
//! Names are istiod's (contract xds §1.11, §5.9): `file-cert:CHAIN~KEY` and `file-root:PATH` are files, read every few seconds and
//! compared by content, as those of the workload are; `file-root:system` the system's roots; `file-crl:PATH`, which is ours, a file of
//! revocation lists; every other name is a secret that istiod delivers. What cannot be used is told once, and what was known under the
//! name before stays in use.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use cairn_exchange::clock::{Instant, now};
use cairn_proto::envoy::{
    config::core::v3::{DataSource, data_source::Specifier},
    extensions::transport_sockets::tls::v3::{CertificateValidationContext, Secret, TlsCertificate, secret::Type},
};
use parking_lot::{Mutex, RwLock};
use rustls::{
    RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, CertificateRevocationListDer},
    sign::CertifiedKey,
};
use tokio::{runtime::Handle, sync::Notify, time::timeout_at};
use x509_parser::{certificate::X509Certificate, prelude::FromDer as _};

use crate::{
    ca::system_bundle,
    credentials::{self, CredentialsError},
    files::POLL,
    read::{self, ReadError},
    revocation::{self, RevocationError},
};

/// The secret that holds the system's roots.
pub const SYSTEM_ROOTS_SECRET: &str = "file-root:system";
const CERTIFICATE_FILES: &str = "file-cert:";
const ROOT_FILE: &str = "file-root:";
/// Before the path of a file with revocation lists.
pub(crate) const REVOCATION_FILE: &str = "file-crl:";
/// How long connections wait for a secret that was not wanted before: as long as Envoy keeps its cluster warming.
const PATIENCE: Duration = Duration::from_secs(15);
const REMEDY: &str = "a DestinationRule names this file: mount it into the waypoint";

/// Why a secret cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// A file.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// What is in it.
    #[error(transparent)]
    Content(#[from] CredentialsError),
    /// Revocation lists.
    #[error(transparent)]
    Revocation(#[from] RevocationError),
    /// The name of a pair of files without the second.
    #[error("the name has no `~` between the paths of certificate and key")]
    Name,
    /// The certificate cannot be read.
    #[error("the certificate is not readable: {0}")]
    Certificate(String),
    /// Key and certificate are of different pairs.
    #[error("the private key is not the key of the certificate")]
    KeyMismatch,
    /// The message has nothing of the kind.
    #[error("the secret holds no {0}")]
    Lacks(&'static str),
}

/// Secrets by name; clones are the same ones.
#[derive(Clone, Debug, Default)]
pub struct Secrets {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    known: RwLock<HashMap<Arc<str>, Material>>,
    /// Names of files that are wanted.
    files: RwLock<BTreeSet<Arc<str>>>,
    /// There are others.
    changed: Notify,
    /// Names that are wanted and of which nothing was heard yet, with the end of the patience with them.
    awaited: Mutex<HashMap<Arc<str>, Instant>>,
    /// Something was heard.
    heard: Notify,
}

/// What a secret holds.
#[derive(Clone)]
pub(super) enum Material {
    /// A certificate with its key.
    Certificate(Arc<CertifiedKey>),
    /// Whom to believe.
    Roots(Arc<Roots>),
    /// Who is not believed any more.
    Revoked(Arc<[CertificateRevocationListDer<'static>]>),
}

/// Roots, with the revocation lists that came along.
pub(super) struct Roots {
    pub(super) store: Arc<RootCertStore>,
    pub(super) certificates: Vec<CertificateDer<'static>>,
    pub(super) revoked: Arc<[CertificateRevocationListDer<'static>]>,
}

// === impl Secrets ===

impl Secrets {
    /// Secrets whose files are watched on this runtime.
    pub fn watched_on(runtime: &Handle) -> Self {
        let secrets = Self::default();
        let inner = Arc::downgrade(&secrets.inner);
        runtime.spawn(async move {
            let mut seen = BTreeMap::new();
            while let Some(inner) = inner.upgrade() {
                inner.read_files(&mut seen).await;
                let changed = inner.changed.notified();
                // A timeout is the ordinary end of this wait.
                let _ = tokio::time::timeout(POLL, changed).await;
            }
        });
        secrets
    }

    /// Whether a secret of this name is a file, and not istiod's to deliver.
    pub fn is_local(name: &str) -> bool {
        [CERTIFICATE_FILES, ROOT_FILE, REVOCATION_FILE]
            .iter()
            .any(|prefix| name.starts_with(prefix))
    }

    /// The name of the secret that holds a file of revocation lists.
    pub fn revocation_file(path: &str) -> String {
        format!("{REVOCATION_FILE}{path}")
    }

    /// Says which secrets are wanted from now on; what is known of others is forgotten.
    pub fn want(&self, names: &BTreeSet<String>) {
        let files: BTreeSet<Arc<str>> = names
            .iter()
            .filter(|name| Self::is_local(name))
            .map(|name| name.as_str().into())
            .collect();
        {
            let mut known = self.inner.known.write();
            known.retain(|name, _| names.contains(&**name));
            let mut awaited = self.inner.awaited.lock();
            awaited.retain(|name, _| names.contains(&**name));
            let new = |name: &&String| !known.contains_key(name.as_str()) && !awaited.contains_key(name.as_str());
            let new: Vec<Arc<str>> = names.iter().filter(new).map(|name| name.as_str().into()).collect();
            awaited.extend(new.into_iter().map(|name| (name, now() + PATIENCE)));
        }
        let mut wanted = self.inner.files.write();
        if *wanted != files {
            *wanted = files;
            drop(wanted);
            self.inner.changed.notify_one();
        }
    }

    /// Takes a secret over that istiod delivered. On an error the one that was known before stays.
    pub fn deliver(&self, name: &str, secret: Secret) -> Result<(), SecretError> {
        let delivered = self.take(name, secret);
        self.inner.hear(name);
        delivered
    }

    fn take(&self, name: &str, secret: Secret) -> Result<(), SecretError> {
        let Secret { name: _, r#type } = secret;
        let material = match r#type.ok_or(SecretError::Lacks("content"))? {
            Type::TlsCertificate(TlsCertificate {
                certificate_chain,
                private_key,
                ..
            }) => certificate(
                &content(certificate_chain, "certificate chain")?,
                &content(private_key, "private key")?,
            )?,
            Type::ValidationContext(CertificateValidationContext { trusted_ca, crl, .. }) => {
                let revoked = match crl {
                    None => Arc::default(),
                    Some(source) => revocation::parse(Path::new(name), &content(Some(source), "revocation list")?)?,
                };
                roots(&content(trusted_ca, "trusted roots")?, revoked)?
            }
            Type::SessionTicketKeys(_) | Type::GenericSecret(_) => return Err(SecretError::Lacks("certificate")),
        };
        self.inner.known.write().insert(name.into(), material);
        Ok(())
    }

    /// Forgets a secret that istiod took back.
    pub fn forget(&self, name: &str) {
        self.inner.known.write().remove(name);
    }

    /// Whether something is known under the name.
    pub fn knows(&self, name: &str) -> bool {
        self.inner.known.read().contains_key(name)
    }

    /// Waits for a secret that is wanted since a short time: one that is just being fetched fails no request. `false` when nothing is
    /// to be expected.
    pub(super) async fn expect(&self, name: &str) -> bool {
        let heard = self.inner.heard.notified();
        tokio::pin!(heard);
        heard.as_mut().enable();
        if self.knows(name) {
            return true;
        }
        let until = self.inner.awaited.lock().get(name).copied();
        match until {
            None => false,
            Some(until) => timeout_at(until, heard).await.is_ok(),
        }
    }

    pub(super) fn get(&self, name: &str) -> Option<Material> {
        self.inner.known.read().get(name).cloned()
    }

    #[cfg(test)]
    pub(super) async fn read_now(&self) {
        self.inner.read_files(&mut BTreeMap::new()).await;
    }
}

impl Inner {
    /// Something has come under this name, of use or not: nobody waits for it any longer.
    fn hear(&self, name: &str) {
        self.awaited.lock().remove(name);
        self.heard.notify_waiters();
    }

    /// Reads every wanted file and takes over what has changed since `seen`.
    async fn read_files(&self, seen: &mut BTreeMap<Arc<str>, Result<Vec<u8>, String>>) {
        let wanted = self.files.read().clone();
        seen.retain(|name, _| wanted.contains(name));
        for name in wanted {
            let content = file_content(&name).await;
            let now_seen = content.as_ref().map(Clone::clone).map_err(ToString::to_string);
            if seen.get(&name) == Some(&now_seen) {
                continue;
            }
            match content.and_then(|content| of_files(&name, &content)) {
                Ok(material) => {
                    tracing::info!(secret = %name, "secret in use");
                    // Unless nobody wants it any more.
                    if self.files.read().contains(&name) {
                        self.known.write().insert(name.clone(), material);
                    }
                }
                Err(error) => {
                    tracing::warn!("the secret {name} cannot be used: {error}");
                    // Lists that are gone revoke nobody any more; certificates and roots stay as they were.
                    if name.starts_with(REVOCATION_FILE) && matches!(error, SecretError::Read(ReadError::Missing { .. })) {
                        self.known.write().remove(&name);
                    }
                }
            }
            self.hear(&name);
            seen.insert(name, now_seen);
        }
    }
}

/// The bytes of a secret's files, one after another.
async fn file_content(name: &str) -> Result<Vec<u8>, SecretError> {
    if name == SYSTEM_ROOTS_SECRET {
        return Ok(system_bundle(REMEDY).await?.1);
    }
    if let Some(paths) = name.strip_prefix(CERTIFICATE_FILES) {
        let (chain, key) = paths.split_once('~').ok_or(SecretError::Name)?;
        let mut content = read::file(Path::new(chain), REMEDY).await?;
        content.push(b'\n');
        content.extend(read::file(Path::new(key), REMEDY).await?);
        return Ok(content);
    }
    let path = name
        .strip_prefix(ROOT_FILE)
        .or(name.strip_prefix(REVOCATION_FILE))
        .ok_or(SecretError::Name)?;
    Ok(read::file(Path::new(path), REMEDY).await?)
}

fn of_files(name: &str, content: &[u8]) -> Result<Material, SecretError> {
    if name == SYSTEM_ROOTS_SECRET {
        return system_roots(content);
    }
    if name.starts_with(CERTIFICATE_FILES) {
        return certificate(content, content);
    }
    match name.strip_prefix(REVOCATION_FILE) {
        Some(path) => Ok(Material::Revoked(revocation::parse(&PathBuf::from(path), content)?)),
        None => roots(content, Arc::default()),
    }
}

/// A certificate with its key, from PEM. Unlike our own it may be of any kind and version: whether it is believed is the peer's business.
fn certificate(chain: &[u8], key: &[u8]) -> Result<Material, SecretError> {
    let chain = credentials::certificates(credentials::CHAIN, chain)?;
    let signer = aws_lc_rs::default_provider()
        .key_provider
        .load_private_key(credentials::private_key(key)?)
        .map_err(CredentialsError::Key)?;
    let leaf = chain.first().ok_or(SecretError::Lacks("certificate"))?;
    let (_, parsed) = X509Certificate::from_der(leaf).map_err(|error| SecretError::Certificate(error.to_string()))?;
    if signer
        .public_key()
        .is_some_and(|of_key| of_key.as_ref() != parsed.public_key().raw)
    {
        return Err(SecretError::KeyMismatch);
    }
    Ok(Material::Certificate(Arc::new(CertifiedKey::new(chain, signer))))
}

fn roots(pem: &[u8], revoked: Arc<[CertificateRevocationListDer<'static>]>) -> Result<Material, SecretError> {
    let certificates = credentials::certificates(credentials::ROOTS, pem)?;
    let store = credentials::trust_anchors(&certificates)?;
    Ok(Material::Roots(Arc::new(Roots {
        store: Arc::new(store),
        certificates,
        revoked,
    })))
}

/// The system's roots. Distributions carry some that no verifier takes; without them the others serve.
fn system_roots(pem: &[u8]) -> Result<Material, SecretError> {
    let mut store = RootCertStore::empty();
    store.add_parsable_certificates(credentials::certificates(credentials::ROOTS, pem)?);
    if store.is_empty() {
        return Err(SecretError::Lacks("usable root"));
    }
    Ok(Material::Roots(Arc::new(Roots {
        store: Arc::new(store),
        certificates: Vec::new(),
        revoked: Arc::default(),
    })))
}

/// The bytes of a source. Files of istiod's machine are not ours.
fn content(source: Option<DataSource>, wanted: &'static str) -> Result<Vec<u8>, SecretError> {
    match source.and_then(|source| source.specifier) {
        Some(Specifier::InlineBytes(bytes)) => Ok(bytes),
        Some(Specifier::InlineString(text)) => Ok(text.into_bytes()),
        Some(Specifier::Filename(_) | Specifier::EnvironmentVariable(_)) | None => Err(SecretError::Lacks(wanted)),
    }
}

impl std::fmt::Debug for Material {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Material::Certificate(_) => "a certificate",
            Material::Roots(_) => "roots",
            Material::Revoked(_) => "revocation lists",
        })
    }
}
