//! What a listener or a cluster demands of TLS: the part of a configuration that is not ours to decide.
//!
//! Terms are plain values, comparable and hashable, so that [`crate::Identity`] can keep one rustls configuration for each. The
//! names of cipher suites and curves are those of Envoy's `tls_params`; what this build's provider cannot do is left out, and
//! named by [`unsupported_ciphers`] and [`unsupported_curves`], so that the owner of the configuration can list it.

use std::fmt;

use rustls::{
    CipherSuite, SupportedCipherSuite, SupportedProtocolVersion,
    crypto::{CryptoProvider, SupportedKxGroup, aws_lc_rs},
    pki_types::CertificateDer,
    version::{TLS12, TLS13},
};

/// A version of TLS that we speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TlsVersion {
    /// TLS 1.2.
    V1_2,
    /// TLS 1.3.
    V1_3,
}

/// Terms of connections that we accept.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct ServerTerms {
    /// The client's URI SAN must start with one of these, e.g. `spiffe://cluster.local/`. Empty: any chain that the trust bundle
    /// signs is accepted, even without a URI SAN (istiod's `PILOT_SKIP_VALIDATE_TRUST_DOMAIN`).
    pub uri_san_prefixes: Vec<String>,
    /// Lowest version.
    pub min_version: TlsVersion,
    /// Highest version.
    pub max_version: TlsVersion,
    /// Allowed cipher suites by Envoy's names; empty allows all. Names of TLS 1.2 suites do not narrow TLS 1.3, nor the reverse.
    pub cipher_suites: Vec<String>,
    /// Allowed key exchange groups by Envoy's names, in order of preference; empty allows the provider's defaults.
    pub curves: Vec<String>,
    /// Application protocols, best first; a client that offers others only is refused, one that offers none is not.
    pub alpn: Vec<Vec<u8>>,
    /// Whether a client without a certificate is refused. One that presents a certificate is always checked.
    pub require_client_certificate: bool,
    /// Roots that are believed beside the identity's own trust bundle.
    pub extra_roots: Vec<CertificateDer<'static>>,
}

/// Terms of connections that we open.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct ClientTerms {
    /// The server's URI SAN must start with one of these; empty: any chain that the trust bundle signs is accepted.
    pub uri_san_prefixes: Vec<String>,
    /// Lowest version.
    pub min_version: TlsVersion,
    /// Highest version.
    pub max_version: TlsVersion,
    /// As in [`ServerTerms::cipher_suites`].
    pub cipher_suites: Vec<String>,
    /// As in [`ServerTerms::curves`].
    pub curves: Vec<String>,
    /// Application protocols to offer, best first.
    pub alpn: Vec<Vec<u8>>,
    /// Roots that are believed beside the identity's own trust bundle.
    pub extra_roots: Vec<CertificateDer<'static>>,
}

// === impl ServerTerms ===

impl ServerTerms {
    /// The terms of an HBONE listener (contract xds §2.2): TLS 1.3, ALPN `h2`, a client certificate of one of the
    /// identities that start with `uri_san_prefixes`.
    pub fn hbone(uri_san_prefixes: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self {
            uri_san_prefixes: uri_san_prefixes.into_iter().map(Into::into).collect(),
            min_version: TlsVersion::V1_3,
            max_version: TlsVersion::V1_3,
            cipher_suites: Vec::new(),
            curves: Vec::new(),
            alpn: vec![b"h2".to_vec()],
            require_client_certificate: true,
            extra_roots: Vec::new(),
        }
    }
}

// === impl ClientTerms ===

impl ClientTerms {
    /// The terms of a tunnel cluster (contract xds §5.8): TLS 1.3, ALPN `h2`, a server of one of the identities that
    /// start with `uri_san_prefixes`.
    pub fn hbone(uri_san_prefixes: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self {
            uri_san_prefixes: uri_san_prefixes.into_iter().map(Into::into).collect(),
            min_version: TlsVersion::V1_3,
            max_version: TlsVersion::V1_3,
            cipher_suites: Vec::new(),
            curves: Vec::new(),
            alpn: vec![b"h2".to_vec()],
            extra_roots: Vec::new(),
        }
    }
}

/// Short, for logs.
impl fmt::Debug for ServerTerms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerTerms")
            .field("uri_san_prefixes", &self.uri_san_prefixes)
            .field("versions", &(self.min_version..=self.max_version))
            .field("require_client_certificate", &self.require_client_certificate)
            .finish_non_exhaustive()
    }
}

/// Short, for logs.
impl fmt::Debug for ClientTerms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientTerms")
            .field("uri_san_prefixes", &self.uri_san_prefixes)
            .field("versions", &(self.min_version..=self.max_version))
            .finish_non_exhaustive()
    }
}

/// The versions from `min` to `max`; none when `min` is above `max`.
pub(crate) fn versions(min: TlsVersion, max: TlsVersion) -> Vec<&'static SupportedProtocolVersion> {
    let allowed = min..=max;
    [(TlsVersion::V1_3, &TLS13), (TlsVersion::V1_2, &TLS12)]
        .into_iter()
        .filter(|(version, _)| allowed.contains(version))
        .map(|(_, version)| version)
        .collect()
}

/// The provider, narrowed to what the terms allow. Suites or groups are empty when the terms allow nothing that we can do.
pub(crate) fn provider(cipher_suites: &[String], curves: &[String]) -> CryptoProvider {
    let mut provider = aws_lc_rs::default_provider();
    for version in [&TLS12, &TLS13] {
        // A name that we do not know still narrows: what was not allowed stays out.
        let names: Vec<_> = cipher_suites
            .iter()
            .filter(|name| names_tls13(name) == (version == &TLS13))
            .collect();
        if !names.is_empty() {
            let allowed: Vec<_> = names.iter().filter_map(|name| suite(name)).collect();
            provider
                .cipher_suites
                .retain(|suite| version_of(suite) != version || allowed.contains(&suite.suite()));
        }
    }
    if !curves.is_empty() {
        provider.kx_groups = curves.iter().filter_map(|name| group(name)).collect();
    }
    provider
}

/// Those of `names` that this build's provider cannot do.
pub fn unsupported_ciphers(names: &[String]) -> Vec<&str> {
    names
        .iter()
        .filter(|name| suite(name).is_none())
        .map(String::as_str)
        .collect()
}

/// Those of `names` that this build's provider cannot do.
pub fn unsupported_curves(names: &[String]) -> Vec<&str> {
    names
        .iter()
        .filter(|name| group(name).is_none())
        .map(String::as_str)
        .collect()
}

/// Whether a name is one of TLS 1.3, whose suites say nothing of key exchange and signature.
fn names_tls13(name: &str) -> bool {
    name.starts_with("TLS_") && !name.contains("_WITH_")
}

/// The suite of an Envoy (BoringSSL) or IANA name.
fn suite(name: &str) -> Option<CipherSuite> {
    Some(match name {
        "ECDHE-ECDSA-AES128-GCM-SHA256" | "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256" => {
            CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
        }
        "ECDHE-ECDSA-AES256-GCM-SHA384" | "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384" => {
            CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384
        }
        "ECDHE-RSA-AES128-GCM-SHA256" | "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256" => {
            CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256
        }
        "ECDHE-RSA-AES256-GCM-SHA384" | "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384" => {
            CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384
        }
        "ECDHE-ECDSA-CHACHA20-POLY1305" => CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
        "ECDHE-RSA-CHACHA20-POLY1305" => CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
        "TLS_AES_128_GCM_SHA256" => CipherSuite::TLS13_AES_128_GCM_SHA256,
        "TLS_AES_256_GCM_SHA384" => CipherSuite::TLS13_AES_256_GCM_SHA384,
        "TLS_CHACHA20_POLY1305_SHA256" => CipherSuite::TLS13_CHACHA20_POLY1305_SHA256,
        _ => return None,
    })
}

fn version_of(suite: &SupportedCipherSuite) -> &'static SupportedProtocolVersion {
    match suite {
        SupportedCipherSuite::Tls12(_) => &TLS12,
        SupportedCipherSuite::Tls13(_) => &TLS13,
    }
}

/// The group of an Envoy (BoringSSL) name.
fn group(name: &str) -> Option<&'static dyn SupportedKxGroup> {
    use aws_lc_rs::kx_group;
    Some(match name {
        "X25519" => kx_group::X25519,
        "P-256" => kx_group::SECP256R1,
        "P-384" => kx_group::SECP384R1,
        "X25519MLKEM768" => kx_group::X25519MLKEM768,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn suites(names: &[&str]) -> Vec<CipherSuite> {
        let names: Vec<_> = names.iter().map(|name| name.to_string()).collect();
        provider(&names, &[])
            .cipher_suites
            .iter()
            .map(SupportedCipherSuite::suite)
            .collect()
    }

    #[test]
    fn names_of_one_version_do_not_narrow_the_other() {
        let all = suites(&[]);
        assert_eq!(all.len(), 9);
        let narrowed = suites(&["ECDHE-ECDSA-AES256-GCM-SHA384"]);
        assert_eq!(narrowed.len(), 4);
        assert!(narrowed.contains(&CipherSuite::TLS13_AES_128_GCM_SHA256));
        assert_eq!(suites(&["TLS_AES_128_GCM_SHA256"]).len(), 7);
    }

    #[test]
    fn an_unknown_name_allows_nothing_and_is_named() {
        let names = ["AES128-SHA".to_owned(), "ECDHE-RSA-AES128-GCM-SHA256".to_owned()];
        assert_eq!(unsupported_ciphers(&names), ["AES128-SHA"]);
        assert_eq!(suites(&["AES128-SHA"]).len(), 3, "only TLS 1.3 is left");
        assert_eq!(unsupported_curves(&["P-256".to_owned(), "P-521".to_owned()]), ["P-521"]);
    }

    #[test]
    fn curves_keep_the_order_they_are_named_in() {
        let provider = provider(&[], &["P-256".to_owned(), "X25519MLKEM768".to_owned()]);
        let names: Vec<_> = provider.kx_groups.iter().map(|group| group.name()).collect();
        assert_eq!(names, [rustls::NamedGroup::secp256r1, rustls::NamedGroup::X25519MLKEM768]);
    }

    #[test]
    fn versions_run_from_the_lowest_to_the_highest() {
        use TlsVersion::{V1_2, V1_3};
        for (min, max, count) in [(V1_2, V1_3, 2), (V1_3, V1_3, 1), (V1_2, V1_2, 1), (V1_3, V1_2, 0)] {
            assert_eq!(versions(min, max).len(), count, "{min:?}..{max:?}");
        }
    }
}
