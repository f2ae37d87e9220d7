//! One workload's certificate chain, private key and trust bundle, checked to belong together.
//!
//! A value of [`Credentials`] is proof: the key is the leaf's, the leaf has exactly one URI SAN and that is a SPIFFE ID, it had
//! not expired when it was checked, and every root can be a trust anchor. What the certificate promises later (its end) is the
//! business of [`crate::Identity`].

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use cairn_exchange::SpiffeId;
use rustls::{
    RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    sign::CertifiedKey,
};

use crate::peer::{self, Leaf, PeerError};

/// A checked identity: who we are, how we prove it, and whose certificates we believe.
#[derive(Clone)]
pub struct Credentials {
    certified: Arc<CertifiedKey>,
    roots: Arc<RootCertStore>,
    root_certificates: Arc<[CertificateDer<'static>]>,
    leaf: Leaf,
}

/// PEM texts of one identity, as they lie in files or come from a secret.
#[derive(Clone)]
pub struct Pem {
    /// Certificates, leaf first.
    pub chain: Vec<u8>,
    /// The private key: PKCS#8, SEC1 or PKCS#1.
    pub key: Vec<u8>,
    /// The certificates that we believe.
    pub roots: Vec<u8>,
}

/// Why certificates, key and roots do not make an identity.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// A PEM text without what it should hold.
    #[error("the {what} holds no {kind} in PEM form")]
    Empty {
        /// Which text.
        what: &'static str,
        /// What was looked for.
        kind: &'static str,
    },
    /// Broken PEM.
    #[error("the {what} is not readable as PEM: {source}")]
    Pem {
        /// Which text.
        what: &'static str,
        /// Where it is broken.
        source: rustls::pki_types::pem::Error,
    },
    /// A key of a kind we cannot sign with.
    #[error("the private key cannot be used: {0}")]
    Key(rustls::Error),
    /// Key and leaf are of different pairs.
    #[error("the private key is not the key of the certificate for {0}: chain and key come from different issuances")]
    KeyMismatch(SpiffeId),
    /// The leaf does not name one SPIFFE identity.
    #[error("our own certificate: {0}")]
    Leaf(#[from] PeerError),
    /// The leaf is past its end.
    #[error("the certificate for {id} expired at {}", peer::date(*.not_after))]
    Expired {
        /// Whose certificate.
        id: SpiffeId,
        /// When it expired.
        not_after: SystemTime,
    },
    /// A root that cannot be a trust anchor.
    #[error("root certificate number {number} of the trust bundle is unusable: {source}")]
    Root {
        /// Position in the bundle, from 1.
        number: usize,
        /// What is wrong.
        source: rustls::Error,
    },
}

/// What the chain is called in errors.
pub(crate) const CHAIN: &str = "certificate chain";
/// What the key is called in errors.
pub(crate) const KEY: &str = "private key";
/// What the roots are called in errors.
pub(crate) const ROOTS: &str = "trust bundle";

// === impl Credentials ===

impl Credentials {
    /// Checks `chain` (leaf first), `key` and `roots` at the time `now`.
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        roots: Vec<CertificateDer<'static>>,
        now: SystemTime,
    ) -> Result<Self, CredentialsError> {
        let leaf = Leaf::read(chain.first().ok_or(CredentialsError::Empty {
            what: CHAIN,
            kind: "certificate",
        })?)?;
        if now >= leaf.not_after {
            return Err(CredentialsError::Expired {
                id: leaf.id,
                not_after: leaf.not_after,
            });
        }
        let store = trust_anchors(&roots)?;
        let signer = aws_lc_rs::default_provider()
            .key_provider
            .load_private_key(key)
            .map_err(CredentialsError::Key)?;
        // istiod puts the root into the chain; a peer that trusts it has it. Cross-signed certificates are not self-issued and stay.
        let sent = chain
            .into_iter()
            .enumerate()
            .filter(|(at, cert)| *at == 0 || !(roots.contains(cert) && peer::self_issued(cert)));
        let certified = CertifiedKey::new(sent.map(|(_, cert)| cert).collect(), signer);
        certified
            .keys_match()
            .map_err(|_| CredentialsError::KeyMismatch(leaf.id.clone()))?;
        Ok(Self {
            certified: Arc::new(certified),
            roots: Arc::new(store),
            root_certificates: roots.into(),
            leaf,
        })
    }

    /// Checks PEM texts at the time `now`.
    pub fn from_pem(pem: &Pem, now: SystemTime) -> Result<Self, CredentialsError> {
        Self::new(
            certificates(CHAIN, &pem.chain)?,
            private_key(&pem.key)?,
            certificates(ROOTS, &pem.roots)?,
            now,
        )
    }

    /// Who we are.
    pub fn id(&self) -> &SpiffeId {
        &self.leaf.id
    }

    /// The certificates that a handshake presents, leaf first, without the roots.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.certified.cert
    }

    /// The certificates of the trust bundle.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.root_certificates
    }

    /// The leaf's serial number in hexadecimal.
    pub fn serial(&self) -> &str {
        &self.leaf.serial
    }

    /// When the leaf's life begins.
    pub fn not_before(&self) -> SystemTime {
        self.leaf.not_before
    }

    /// When the leaf's life ends.
    pub fn not_after(&self) -> SystemTime {
        self.leaf.not_after
    }

    /// How long the leaf lives on after `now`.
    pub fn remaining(&self, now: SystemTime) -> Duration {
        self.leaf.not_after.duration_since(now).unwrap_or(Duration::ZERO)
    }

    pub(crate) fn certified(&self) -> Arc<CertifiedKey> {
        self.certified.clone()
    }

    /// The trust anchors with `extra` ones beside them.
    pub(crate) fn anchors(&self, extra: &[CertificateDer<'static>]) -> Result<Arc<RootCertStore>, CredentialsError> {
        if extra.is_empty() {
            return Ok(self.roots.clone());
        }
        let mut store = RootCertStore::clone(&self.roots);
        store.roots.extend(trust_anchors(extra)?.roots);
        Ok(Arc::new(store))
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("id", &self.leaf.id)
            .field("serial", &self.leaf.serial)
            .field("not_after", &peer::date(self.leaf.not_after))
            .field("roots", &self.root_certificates.len())
            .finish_non_exhaustive()
    }
}

// === impl Pem ===

/// Without the key.
impl fmt::Debug for Pem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pem")
            .field("chain", &self.chain.len())
            .field("roots", &self.roots.len())
            .finish_non_exhaustive()
    }
}

/// All certificates of one PEM text, in order; none is an error.
pub(crate) fn certificates(what: &'static str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, CredentialsError> {
    let found = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|source| CredentialsError::Pem { what, source })?;
    if found.is_empty() {
        return Err(CredentialsError::Empty {
            what,
            kind: "certificate",
        });
    }
    Ok(found)
}

/// The first private key of one PEM text.
pub(crate) fn private_key(pem: &[u8]) -> Result<PrivateKeyDer<'static>, CredentialsError> {
    PrivateKeyDer::from_pem_slice(pem).map_err(|source| match source {
        rustls::pki_types::pem::Error::NoItemsFound => CredentialsError::Empty {
            what: KEY,
            kind: "private key",
        },
        source => CredentialsError::Pem { what: KEY, source },
    })
}

/// Makes trust anchors; an unusable root is an error, since leaving it out would only show when a peer is refused.
pub(crate) fn trust_anchors(roots: &[CertificateDer<'static>]) -> Result<RootCertStore, CredentialsError> {
    if roots.is_empty() {
        return Err(CredentialsError::Empty {
            what: ROOTS,
            kind: "certificate",
        });
    }
    let mut store = RootCertStore::empty();
    for (at, root) in roots.iter().enumerate() {
        store
            .add(root.clone())
            .map_err(|source| CredentialsError::Root { number: at + 1, source })?;
    }
    Ok(store)
}
