//! TLS to applications: connections whose other end is no member of the mesh.
//!
//! A cluster's [`OriginationTerms`] say which certificate to show, whose to believe and under which names (contract xds §5.9).
//! Certificates and roots are *named* there, and [`Secrets`] holds what is known under each name now: the content of mounted files,
//! which are watched, the system's roots, secrets that istiod delivered, and the workload's own. A secret that changes is used by the
//! next handshake; connections that stand are not touched.
//!
//! A peer is verified as Envoy does it: chain, dates and revocation first, then the names, of which one has to fit.

mod connect;
mod names;
mod secrets;
#[cfg(test)]
mod tests;
mod verify;

use std::sync::Arc;

pub use connect::{OriginatedStream, OriginationError, Originator, PeerName};
pub use names::{NameKind, NameMatcher, NamePattern, PatternError};
pub use secrets::{SYSTEM_ROOTS_SECRET, SecretError, Secrets};

use crate::terms::TlsVersion;

/// What a cluster demands of TLS to an application. Plain values, comparable and hashable: connections that were made under other terms
/// are not used.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct OriginationTerms {
    /// Name of the secret with our certificate; `None` shows none.
    pub certificate: Option<Arc<str>>,
    /// Name of the secret with the roots; `None` believes everybody (`insecureSkipVerify`).
    pub roots: Option<Arc<str>>,
    /// Name of the secret with revocation lists.
    pub revocation: Option<Arc<str>>,
    /// Whether revocation is asked of the leaf alone.
    pub revocation_of_leaf_only: bool,
    /// Names of which the peer has to bear one; empty: none.
    pub names: Vec<NameMatcher>,
    /// Server name to send; `None` sends none, unless the request has one.
    pub server_name: Option<Arc<str>>,
    /// Lowest version.
    pub min_version: TlsVersion,
    /// Highest version.
    pub max_version: TlsVersion,
    /// Allowed cipher suites by Envoy's names; empty allows all.
    pub cipher_suites: Vec<String>,
    /// Allowed key exchange groups by Envoy's names; empty allows the provider's defaults.
    pub curves: Vec<String>,
    /// Application protocols to offer; empty offers what is going to be spoken.
    pub alpn: Vec<Vec<u8>>,
}

// === impl OriginationTerms ===

impl OriginationTerms {
    /// Names of all secrets that connections under these terms need.
    pub fn secrets(&self) -> impl Iterator<Item = &Arc<str>> {
        [&self.certificate, &self.roots, &self.revocation].into_iter().flatten()
    }
}
