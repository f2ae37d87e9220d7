//! Reads the small files that identities are made of: tokens, certificates, keys.
//!
//! Every read is bounded, and every error names the file and what to do about it.

use std::{
    io,
    path::{Path, PathBuf},
};

use tokio::io::AsyncReadExt as _;

/// No file read here is larger: a bundle of 500 roots has about 1 MiB.
pub(crate) const MAX_FILE: u64 = 4 << 20;

/// Why a file could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// It is not there.
    #[error("{} does not exist; {remedy}", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// What to do.
        remedy: &'static str,
    },
    /// It is there but cannot be read.
    #[error("{} cannot be read: {source}; {remedy}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
        /// What to do.
        remedy: &'static str,
    },
    /// It is larger than anything sensible.
    #[error("{} is larger than {} MiB; {remedy}", path.display(), MAX_FILE >> 20)]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// What to do.
        remedy: &'static str,
    },
}

/// The whole of `path`; `remedy` goes into the error.
pub(crate) async fn file(path: &Path, remedy: &'static str) -> Result<Vec<u8>, ReadError> {
    let path_buf = || path.to_path_buf();
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => ReadError::Missing {
            path: path_buf(),
            remedy,
        },
        _ => ReadError::Unreadable {
            path: path_buf(),
            source,
            remedy,
        },
    };
    let file = tokio::fs::File::open(path).await.map_err(failed)?;
    let mut content = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut content).await.map_err(failed)?;
    if content.len() as u64 > MAX_FILE {
        return Err(ReadError::TooLarge {
            path: path_buf(),
            remedy,
        });
    }
    Ok(content)
}
