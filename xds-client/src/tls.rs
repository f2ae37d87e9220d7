//! The TLS settings of one connection, from files that may have been replaced since the last one.

use std::{path::Path, sync::Arc};

use cairn_exchange::clock;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};
use tokio_rustls::TlsConnector;
use tracing::warn;

use crate::{
    StreamError, file,
    settings::{ClientCertificate, TlsFiles},
};

const ROOTS: &str = "the root certificates for istiod";
const CHAIN: &str = "the client certificate for istiod";
const KEY: &str = "the client key for istiod";

/// A connector and the name that the server must prove.
pub(crate) async fn connector(files: &TlsFiles) -> Result<(TlsConnector, ServerName<'static>), StreamError> {
    let roots = roots(&files.roots).await?;
    let name = ServerName::try_from(files.server_name.clone()).map_err(|_| {
        file::unusable(
            ROOTS,
            &files.roots,
            format!("{:?} is no name that a certificate can carry", files.server_name),
        )
    })?;
    // The provider is named, since a process-wide default may be missing or another one.
    let builder = ClientConfig::builder_with_provider(files.allowed.provider.clone())
        .with_protocol_versions(&files.allowed.versions)
        .map_err(|error| file::unusable(ROOTS, &files.roots, error))?
        .with_root_certificates(roots);
    let own = match &files.client_certificate {
        Some(certificate) => own(certificate).await?,
        None => None,
    };
    let mut config = match (own, &files.client_certificate) {
        (Some((chain, key)), Some(paths)) => builder
            .with_client_auth_cert(chain, key)
            .map_err(|error| file::unusable(CHAIN, &paths.chain, error))?,
        _ => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok((TlsConnector::from(Arc::new(config)), name))
}

async fn roots(path: &Path) -> Result<RootCertStore, StreamError> {
    let certificates = certificates(ROOTS, path).await?;
    let mut store = RootCertStore::empty();
    let (_, unusable) = store.add_parsable_certificates(certificates);
    if store.is_empty() {
        return Err(file::unusable(ROOTS, path, "no certificate in it can be read"));
    }
    if unusable > 0 {
        warn!(path = %path.display(), unusable, "some root certificates for istiod cannot be read and are left out");
    }
    Ok(store)
}

/// Our own certificate, unless it has expired: then the token must do (contract xds §1.2).
async fn own(paths: &ClientCertificate) -> Result<Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>, StreamError> {
    let chain = certificates(CHAIN, &paths.chain).await?;
    let leaf = chain.first().map(|leaf| x509_parser::parse_x509_certificate(leaf));
    let Some(Ok((_, leaf))) = leaf else {
        return Err(file::unusable(CHAIN, &paths.chain, "its first certificate cannot be read"));
    };
    if leaf.validity().not_after.timestamp() <= i64::try_from(clock::unix_seconds()).unwrap_or(i64::MAX) {
        warn!(path = %paths.chain.display(), "the client certificate for istiod has expired; connecting with the token alone");
        return Ok(None);
    }
    let key = file::read(KEY, &paths.key).await?;
    let key = PrivateKeyDer::from_pem_slice(&key).map_err(|error| file::unusable(KEY, &paths.key, error))?;
    Ok(Some((chain, key)))
}

async fn certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, StreamError> {
    let pem = file::read(what, path).await?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let certificates = certificates.map_err(|error| file::unusable(what, path, error))?;
    if certificates.is_empty() {
        return Err(file::unusable(what, path, "there is no PEM certificate in it"));
    }
    Ok(certificates)
}
