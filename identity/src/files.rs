//! Credentials from files that something else keeps fresh.
//!
//! The three files are read every few seconds and compared by content. That costs a few microseconds and sees every way that
//! files are exchanged: rewritten, renamed over, or, as Kubernetes does, by swapping a symbolic link to the directory. Content
//! that does not fit together (a new chain beside the old key, half of a file) keeps the old credentials and is looked at again
//! when it has changed.

use std::{path::PathBuf, sync::Arc, time::Duration};

use crate::{
    credentials::{Credentials, CredentialsError, Pem},
    identity::Shared,
    read::{self, ReadError},
};

/// How often files are read, unless set otherwise.
pub(crate) const POLL: Duration = Duration::from_secs(2);
const REMEDY: &str = "mount the workload's certificate files there, or leave the setting out to ask istiod for a certificate";

/// Where the files are.
#[derive(Clone, Debug)]
pub(crate) struct Paths {
    pub(crate) chain: PathBuf,
    pub(crate) key: PathBuf,
    pub(crate) root: PathBuf,
}

/// Why files make no credentials.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// One could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// They do not fit together.
    #[error("{}, {} and {}: {source}", chain.display(), key.display(), root.display())]
    Credentials {
        /// The chain's file.
        chain: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// The trust bundle's file.
        root: PathBuf,
        /// What is wrong.
        source: CredentialsError,
    },
}

/// Reads, and reads again, for ever.
pub(crate) async fn watch(shared: Arc<Shared>, paths: Paths, poll: Duration) {
    let mut seen: Option<Pem> = None;
    let mut last_failure = String::new();
    loop {
        match read(&paths).await {
            Ok(pem) if seen.as_ref().is_some_and(|seen| same(seen, &pem)) => {}
            Ok(pem) => {
                match Credentials::from_pem(&pem, shared.wall().now()) {
                    Ok(credentials) => shared.install(credentials, None),
                    Err(source) => {
                        let Paths { chain, key, root } = paths.clone();
                        shared.failed(
                            "loading certificate files",
                            &FilesError::Credentials {
                                chain,
                                key,
                                root,
                                source,
                            },
                        );
                    }
                }
                seen = Some(pem);
                last_failure.clear();
            }
            Err(error) => {
                // Said once, not at every look.
                let text = error.to_string();
                if text != last_failure {
                    shared.failed("reading certificate files", &FilesError::Read(error));
                    last_failure = text;
                }
                seen = None;
            }
        }
        tokio::time::sleep(poll).await;
    }
}

async fn read(paths: &Paths) -> Result<Pem, ReadError> {
    Ok(Pem {
        chain: read::file(&paths.chain, REMEDY).await?,
        key: read::file(&paths.key, REMEDY).await?,
        roots: read::file(&paths.root, REMEDY).await?,
    })
}

fn same(one: &Pem, other: &Pem) -> bool {
    one.chain == other.chain && one.key == other.key && one.roots == other.roots
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink, path::Path};

    use cairn_exchange::clock;
    use tokio::time::timeout;

    use super::*;
    use crate::{
        Identity, Options, Source,
        generate::Authority,
        testing::{LIFE, id},
    };

    const PATIENCE: Duration = Duration::from_secs(20);

    fn write(folder: &Path, pem: &Pem) {
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join("cert-chain.pem"), &pem.chain).unwrap();
        fs::write(folder.join("key.pem"), &pem.key).unwrap();
        fs::write(folder.join("root-cert.pem"), &pem.roots).unwrap();
    }

    fn start(folder: &Path) -> Identity {
        let source = Source::Files {
            chain: folder.join("cert-chain.pem"),
            key: folder.join("key.pem"),
            root: folder.join("root-cert.pem"),
        };
        Identity::start_with(
            source,
            Options {
                file_poll: Duration::from_millis(5),
                ..Options::default()
            },
        )
    }

    /// Waits for what polling will see.
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

    fn pem(authority: &Authority) -> Pem {
        authority
            .issue_pem(&id("spiffe://td/ns/a/sa/b"), clock::wall(), LIFE)
            .unwrap()
    }

    #[tokio::test]
    async fn files_that_kubernetes_swaps_are_seen_and_torn_ones_are_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let mount = folder.path().join("mount");
        let authority = Authority::new("td").unwrap();
        let identity = start(&mount);
        until("a complaint about missing files", || identity.status().failures == 1).await;
        let why = identity.unavailable().unwrap().to_string();
        assert!(
            why.contains("cert-chain.pem does not exist; mount the workload's certificate files there"),
            "{why}"
        );

        // As a projected volume: mount/X → ..data/X, and ..data is swapped.
        let first = pem(&authority);
        write(&folder.path().join("one"), &first);
        fs::create_dir(&mount).unwrap();
        let data = mount.join("..data");
        symlink(folder.path().join("one"), &data).unwrap();
        for name in ["cert-chain.pem", "key.pem", "root-cert.pem"] {
            symlink(Path::new("..data").join(name), mount.join(name)).unwrap();
        }
        timeout(PATIENCE, identity.ready()).await.unwrap();
        let serial = identity.status().serial;
        assert_eq!(identity.status().last_error, None);

        // A key that does not belong: the old certificate stays.
        let second = pem(&authority);
        write(
            &folder.path().join("torn"),
            &Pem {
                key: first.key.clone(),
                ..second.clone()
            },
        );
        swap(&folder.path().join("torn"), &data);
        until("a complaint about the torn files", || identity.status().last_error.is_some()).await;
        let error = identity.status().last_error.unwrap();
        assert!(
            error.contains("cert-chain.pem") && error.contains("is not the key of the certificate"),
            "{error}"
        );
        assert_eq!(identity.status().serial, serial);

        write(&folder.path().join("two"), &second);
        swap(&folder.path().join("two"), &data);
        until("the second certificate", || identity.status().serial != serial).await;
        assert_eq!((identity.status().generation, identity.status().last_error), (2, None));
    }

    fn swap(to: &Path, link: &Path) {
        let new = link.with_file_name("..data_tmp");
        symlink(to, &new).unwrap();
        fs::rename(new, link).unwrap();
    }

    #[tokio::test]
    async fn files_rewritten_in_place_are_seen_and_a_failure_is_counted_once() {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::new("td").unwrap();
        write(folder.path(), &pem(&authority));
        let identity = start(folder.path());
        timeout(PATIENCE, identity.ready()).await.unwrap();
        fs::write(folder.path().join("root-cert.pem"), "no pem").unwrap();
        until("a complaint", || identity.status().failures > 0).await;
        let key = fs::read(folder.path().join("key.pem")).unwrap();
        fs::remove_file(folder.path().join("key.pem")).unwrap();
        until("a second complaint", || identity.status().failures == 2).await;
        fs::write(folder.path().join("key.pem"), key).unwrap();
        fs::write(folder.path().join("root-cert.pem"), authority.root_pem()).unwrap();
        until("the files to be in use again", || identity.status().generation == 2).await;
        assert!(identity.status().failures <= 3, "{}", identity.status().failures);
    }
}
