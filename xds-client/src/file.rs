//! Reading small files that someone else may replace at any time, with a bound.

use std::{io, path::Path};

use tokio::io::AsyncReadExt as _;

use crate::StreamError;

/// Roots, certificates and tokens are far smaller.
const LIMIT: u64 = 4 * 1024 * 1024;

/// The whole content; `what` names the file's purpose in the error.
pub(crate) async fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, StreamError> {
    let content = async {
        let mut content = Vec::new();
        tokio::fs::File::open(path)
            .await?
            .take(LIMIT + 1)
            .read_to_end(&mut content)
            .await?;
        if content.len() as u64 > LIMIT {
            return Err(io::Error::other(format!("it is larger than {LIMIT} bytes")));
        }
        Ok(content)
    };
    content.await.map_err(|error: io::Error| unusable(what, path, error))
}

/// The error for a file that was read but is of no use.
pub(crate) fn unusable(what: &'static str, path: &Path, reason: impl ToString) -> StreamError {
    StreamError::File {
        what,
        path: path.to_owned(),
        reason: reason.to_string(),
    }
}
