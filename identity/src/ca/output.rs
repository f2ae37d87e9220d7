//! Certificates as files, for programs beside us that cannot ask istiod themselves (pilot-agent's `OUTPUT_CERTS`).
//!
//! Each file is replaced as a whole, key first, so that a reader never sees half of one. A folder that cannot be written to is told in
//! the log and hinders nothing else.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

/// Names and rights as pilot-agent's.
const KEY: (&str, u32) = ("key.pem", 0o600);
const CHAIN: (&str, u32) = ("cert-chain.pem", 0o600);
const ROOT: (&str, u32) = ("root-cert.pem", 0o644);

/// Puts an answer of the authority into `folder`: the key, all certificates one after another, and the last of them as the root.
pub(super) fn write(folder: &Path, key: &str, chain: &[String]) -> io::Result<()> {
    let all: String = chain.iter().map(|entry| with_line_end(entry)).collect();
    let root = chain.last().map(|entry| with_line_end(entry)).unwrap_or_default();
    for ((name, mode), content) in [(KEY, key), (CHAIN, &all), (ROOT, &root)] {
        replace(folder, name, mode, content)?;
    }
    Ok(())
}

fn with_line_end(pem: &str) -> String {
    format!("{}\n", pem.trim_end())
}

fn replace(folder: &Path, name: &str, mode: u32, content: &str) -> io::Result<()> {
    let new = folder.join(format!(".{name}.new"));
    // What an earlier attempt left may have other rights.
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&new)?;
    file.write_all(content.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, folder.join(name))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn the_files_are_those_of_the_last_certificate_and_the_key_is_ours_alone() {
        let folder = tempfile::tempdir().unwrap();
        for round in ["1", "2"] {
            let chain = [format!("leaf {round}"), format!("root {round}\n")];
            write(folder.path(), &format!("key {round}\n"), &chain).unwrap();
        }
        let read = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap();
        let mode = |name: &str| fs::metadata(folder.path().join(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!(
            (read("key.pem"), read("cert-chain.pem"), read("root-cert.pem")),
            ("key 2\n".into(), "leaf 2\nroot 2\n".into(), "root 2\n".into())
        );
        assert_eq!(
            (mode("key.pem"), mode("cert-chain.pem"), mode("root-cert.pem") & 0o600),
            (0o600, 0o600, 0o600)
        );
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3);
    }
}
