//! Makes rustls configurations of credentials and terms.
//!
//! Every configuration is built on the aws-lc-rs provider by name, never on a process-wide default. A server configuration owns
//! its session cache: sessions live no longer than the generation of credentials that they were made under, because rustls does
//! not verify a client again when it resumes a session.

use std::{net::Ipv4Addr, sync::Arc};

use rustls::{
    ClientConfig, ServerConfig,
    client::Resumption,
    crypto::CryptoProvider,
    pki_types::{CertificateRevocationListDer, ServerName},
    server::{ServerSessionMemoryCache, VerifierBuilderError},
    sign::SingleCertAndKey,
};

use crate::{
    credentials::{Credentials, CredentialsError},
    terms::{self, ClientTerms, ServerTerms, TlsVersion},
    verify,
};

/// Sessions that a server configuration remembers; the oldest go first.
const SERVER_SESSIONS: usize = 1024;

/// Why terms cannot be met.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The lowest version is above the highest.
    #[error("the TLS parameters allow no version: the minimum {min:?} is above the maximum {max:?}")]
    NoVersion {
        /// The lowest.
        min: TlsVersion,
        /// The highest.
        max: TlsVersion,
    },
    /// No cipher suite or group is left.
    #[error("the TLS parameters leave no usable combination of cipher suites {ciphers:?} and curves {curves:?}: {source}")]
    NothingInCommon {
        /// Wanted cipher suites.
        ciphers: Vec<String>,
        /// Wanted groups.
        curves: Vec<String>,
        /// What rustls says.
        source: rustls::Error,
    },
    /// An additional root is no root.
    #[error("additional roots: {0}")]
    ExtraRoots(CredentialsError),
    /// A verifier could not be made.
    #[error("the trust bundle or revocation list cannot be used: {0}")]
    Verifier(#[from] VerifierBuilderError),
    /// A revocation list could not be used.
    #[error("the revocation list cannot be used: {0}")]
    Revocation(webpki::Error),
}

/// A configuration to accept connections with.
pub(crate) fn server(
    credentials: &Credentials,
    revocation_lists: &[CertificateRevocationListDer<'static>],
    terms: &ServerTerms,
) -> Result<ServerConfig, ConfigError> {
    let provider = Arc::new(provider(&terms.cipher_suites, &terms.curves)?);
    let roots = credentials.anchors(&terms.extra_roots).map_err(ConfigError::ExtraRoots)?;
    let verifier = verify::of_clients(
        roots,
        revocation_lists,
        provider.clone(),
        &terms.uri_san_prefixes,
        terms.require_client_certificate,
    )?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&versions(terms.min_version, terms.max_version)?)
        .map_err(|source| nothing(&terms.cipher_suites, &terms.curves, source))?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(credentials.certified())));
    config.alpn_protocols = terms.alpn.clone();
    config.session_storage = ServerSessionMemoryCache::new(SERVER_SESSIONS);
    Ok(config)
}

/// A configuration to open connections with.
pub(crate) fn client(
    credentials: &Credentials,
    revocation_lists: &[CertificateRevocationListDer<'static>],
    terms: &ClientTerms,
) -> Result<ClientConfig, ConfigError> {
    let provider = Arc::new(provider(&terms.cipher_suites, &terms.curves)?);
    let roots = credentials.anchors(&terms.extra_roots).map_err(ConfigError::ExtraRoots)?;
    let verifier =
        verify::of_servers(roots, revocation_lists, &provider, &terms.uri_san_prefixes).map_err(ConfigError::Revocation)?;
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&versions(terms.min_version, terms.max_version)?)
        .map_err(|source| nothing(&terms.cipher_suites, &terms.curves, source))?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(credentials.certified())));
    config.alpn_protocols = terms.alpn.clone();
    // Sessions are remembered by server name. Ours are made up, so two peers could share one; tunnels live long enough without.
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(config)
}

/// The name to give rustls for a connection under [`ClientTerms`]: it is neither sent nor checked, as SPIFFE peers have no host
/// name.
pub fn server_name() -> ServerName<'static> {
    ServerName::IpAddress(Ipv4Addr::UNSPECIFIED.into())
}

pub(crate) fn versions(min: TlsVersion, max: TlsVersion) -> Result<Vec<&'static rustls::SupportedProtocolVersion>, ConfigError> {
    let versions = terms::versions(min, max);
    if versions.is_empty() {
        return Err(ConfigError::NoVersion { min, max });
    }
    Ok(versions)
}

/// The narrowed provider; one without suites or groups would make rustls panic or refuse every handshake.
pub(crate) fn provider(ciphers: &[String], curves: &[String]) -> Result<CryptoProvider, ConfigError> {
    let provider = terms::provider(ciphers, curves);
    if provider.cipher_suites.is_empty() || provider.kx_groups.is_empty() {
        let source = rustls::Error::General("none of them is supported".into());
        return Err(nothing(ciphers, curves, source));
    }
    Ok(provider)
}

pub(crate) fn nothing(ciphers: &[String], curves: &[String], source: rustls::Error) -> ConfigError {
    ConfigError::NothingInCommon {
        ciphers: ciphers.to_vec(),
        curves: curves.to_vec(),
        source,
    }
}
