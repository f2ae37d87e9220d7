//! Certificate revocation lists from a file.
//!
//! istiod distributes its authorities' lists as a ConfigMap (`/var/run/secrets/istio/crl/ca-crl.pem`, with `PILOT_ENABLE_CA_CRL`).
//! While the file does not exist nothing is revoked; when it goes away its lists go too. A file that is there but unreadable at
//! the start believes nobody, and one that becomes unreadable later keeps the lists that were read before.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rustls::pki_types::{CertificateRevocationListDer, pem::PemObject as _};
use webpki::BorrowedCertRevocationList;

use crate::{
    identity::{RevocationState, Shared},
    read::{self, ReadError},
};

const REMEDY: &str = "it should hold the certificate authorities' revocation lists (ConfigMap istio-ca-crl)";

/// Why revocation lists are unusable.
#[derive(Debug, thiserror::Error)]
pub enum RevocationError {
    /// The file could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// It is no PEM.
    #[error("{} is not readable as PEM: {source}", path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: rustls::pki_types::pem::Error,
    },
    /// It holds none.
    #[error("{} holds no revocation list in PEM form (BEGIN X509 CRL); {REMEDY}", .0.display())]
    Empty(PathBuf),
    /// One is broken.
    #[error("revocation list number {number} in {}: {source}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Position in the file, from 1.
        number: usize,
        /// What is wrong.
        source: webpki::Error,
    },
}

/// Reads, and reads again, for ever.
pub(crate) async fn watch(shared: Arc<Shared>, path: PathBuf, poll: Duration) {
    // What was seen last: nothing yet, no file, content, or a failure to read.
    let mut seen: Option<Result<Option<Vec<u8>>, String>> = None;
    loop {
        let now = read(&path).await;
        let now_seen = now.as_ref().map(Clone::clone).map_err(ToString::to_string);
        if seen.as_ref() != Some(&now_seen) {
            let lists = now.map_err(RevocationError::Read).and_then(|content| match content {
                Some(pem) => parse(&path, &pem),
                None => Ok(Arc::default()),
            });
            match lists {
                Ok(lists) => {
                    tracing::info!(lists = lists.len(), path = %path.display(), "revocation lists in use");
                    shared.set_revocation_lists(RevocationState::Known(lists));
                }
                Err(error) => shared.revocation_failed(&error),
            }
            seen = Some(now_seen);
        }
        tokio::time::sleep(poll).await;
    }
}

async fn read(path: &Path) -> Result<Option<Vec<u8>>, ReadError> {
    match read::file(path, REMEDY).await {
        Ok(content) => Ok(Some(content)),
        Err(ReadError::Missing { .. }) => Ok(None),
        // The directory may not be mounted at all.
        Err(ReadError::Unreadable { source, .. }) if source.kind() == io::ErrorKind::NotADirectory => Ok(None),
        Err(error) => Err(error),
    }
}

/// All lists of one PEM text, each of which must be usable.
pub(crate) fn parse(path: &Path, pem: &[u8]) -> Result<Arc<[CertificateRevocationListDer<'static>]>, RevocationError> {
    let lists: Vec<_> = CertificateRevocationListDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|source| RevocationError::Pem {
            path: path.to_path_buf(),
            source,
        })?;
    if lists.is_empty() {
        return Err(RevocationError::Empty(path.to_path_buf()));
    }
    for (at, list) in lists.iter().enumerate() {
        BorrowedCertRevocationList::from_der(list).map_err(|source| RevocationError::Invalid {
            path: path.to_path_buf(),
            number: at + 1,
            source,
        })?;
    }
    Ok(lists.into())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tokio::time::timeout;

    use super::*;
    use crate::{
        Identity, Options, Source,
        generate::Authority,
        testing::{LIFE, id, root},
    };

    const PATIENCE: Duration = Duration::from_secs(20);

    fn list() -> String {
        let now = cairn_exchange::clock::wall();
        rcgen::CertificateRevocationListParams {
            this_update: now.into(),
            next_update: (now + LIFE).into(),
            crl_number: rcgen::SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: Vec::new(),
            key_identifier_method: rcgen::KeyIdMethod::Sha256,
        }
        .signed_by(&root("mesh", &rcgen::PKCS_ECDSA_P256_SHA256))
        .unwrap()
        .pem()
        .unwrap()
    }

    async fn until(what: &str, mut holds: impl FnMut() -> bool) {
        let wait = async {
            while !holds() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(PATIENCE, wait)
            .await
            .unwrap_or_else(|_| panic!("waited in vain for: {what}"));
    }

    #[tokio::test]
    async fn an_unreadable_list_believes_nobody_at_the_start_and_changes_nothing_later() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ca-crl.pem");
        fs::write(&path, "garbage").unwrap();
        let credentials = Authority::new("td").unwrap().issue(&id("spiffe://td/ns/a/sa/b")).unwrap();
        let options = Options {
            revocation_file: Some(path.clone()),
            file_poll: Duration::from_millis(5),
            ..Options::default()
        };
        let identity = Identity::start_with(Source::Fixed(credentials), options);
        until("a complaint about the list", || identity.status().revocation_error.is_some()).await;
        let why = identity.unavailable().unwrap().to_string();
        assert!(why.contains("ca-crl.pem holds no revocation list in PEM form"), "{why}");

        fs::write(&path, list()).unwrap();
        timeout(PATIENCE, identity.ready()).await.unwrap();
        assert_eq!(identity.status().revocation_error, None);

        fs::write(&path, "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n").unwrap();
        until("a complaint about the broken list", || {
            identity.status().revocation_error.is_some()
        })
        .await;
        assert_eq!(identity.status().generation, 1);
        assert!(identity.unavailable().is_none());

        fs::remove_file(&path).unwrap();
        until("the lists to go with their file", || identity.status().generation == 2).await;
    }
}
