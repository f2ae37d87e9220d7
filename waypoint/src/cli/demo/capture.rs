//! The configuration of the demonstration: what istiod answered a waypoint in the mesh of `examples/demo.yaml`.
//!
//! The answers are built into the program, so that it runs from anywhere; `--config` reads others from a directory. The addresses of
//! pods in them begin with `127.0.1.`, and may be moved to `127.N.1.` to let several demonstrations run side by side: both texts are
//! equally long, so that not even the length of a message changes.

use std::path::{Path, PathBuf};

use bytes::{Buf as _, Bytes};
use cairn_proto::envoy::service::discovery::v3::DeltaDiscoveryResponse;
use prost::Message as _;

use crate::config::{
    Resource,
    load::{self, LoadError},
};

/// The pods' network as text, and in the bytes of `istio.workload.Workload.addresses`.
const PODS_TEXT: &[u8] = b"127.0.1.";
const PODS_BYTES: &[u8] = &[127, 0, 1];

/// The files, in the order in which a waypoint asks for them.
const BUILT_IN: [(&str, &[u8]); 4] = [
    ("cds.pb", include_bytes!("../../../../examples/demo-config/cds.pb")),
    ("wds.pb", include_bytes!("../../../../examples/demo-config/wds.pb")),
    ("eds.pb", include_bytes!("../../../../examples/demo-config/eds.pb")),
    ("lds.pb", include_bytes!("../../../../examples/demo-config/lds.pb")),
];

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// It cannot be read, or is something else.
    #[error(
        "{error}. Give a folder that `istiod-lab capture -f examples/demo.yaml --out {}` wrote, or leave --config out to use the \
         built-in configuration",
        .folder.display()
    )]
    Load {
        /// Where it should be.
        folder: PathBuf,
        /// What went wrong.
        error: LoadError,
    },
    /// What is built in cannot be read.
    #[error("examples/demo-config/{file} is broken ({error}). Make it again as examples/README.md says, and build again")]
    BuiltIn {
        /// The file.
        file: &'static str,
        /// What is wrong with it.
        error: prost::DecodeError,
    },
}

/// Resources of one type.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// The type.
    pub type_url: String,
    /// The resources.
    pub resources: Vec<Resource>,
}

/// istiod's answers: those in a folder, or those that are built in, with the pods in `127.octet.1.0/24`.
pub fn answers(folder: Option<&Path>, octet: u8) -> Result<Vec<Answer>, CaptureError> {
    let mut answers = match folder {
        Some(folder) => read(folder)?,
        None => built_in()?,
    };
    for resource in answers.iter_mut().flat_map(|answer| &mut answer.resources) {
        resource.bytes = moved(&resource.bytes, octet);
    }
    Ok(answers)
}

fn read(folder: &Path) -> Result<Vec<Answer>, CaptureError> {
    let answers = load::load(folder).map_err(|error| CaptureError::Load {
        folder: folder.to_owned(),
        error,
    })?;
    Ok(answers
        .into_iter()
        .map(|load::Answer { type_url, resources, .. }| Answer { type_url, resources })
        .collect())
}

fn built_in() -> Result<Vec<Answer>, CaptureError> {
    let mut answers = Vec::new();
    for (file, bytes) in BUILT_IN {
        let mut bytes = Bytes::from_static(bytes);
        while bytes.has_remaining() {
            let answer = DeltaDiscoveryResponse::decode_length_delimited(&mut bytes)
                .map_err(|error| CaptureError::BuiltIn { file, error })?;
            let resources = answer.resources.into_iter().filter_map(|resource| {
                let any = resource.resource?;
                Some(Resource {
                    name: resource.name,
                    version: resource.version,
                    type_url: any.type_url,
                    bytes: any.value.into(),
                })
            });
            answers.push(Answer {
                resources: resources.collect(),
                type_url: answer.type_url,
            });
        }
    }
    Ok(answers)
}

/// The same bytes with the pods elsewhere.
fn moved(bytes: &[u8], octet: u8) -> Bytes {
    debug_assert!(octet < 10, "a second digit would change lengths");
    let mut bytes = bytes.to_vec();
    replace(
        &mut bytes,
        PODS_TEXT,
        &[b'1', b'2', b'7', b'.', b'0' + octet, b'.', b'1', b'.'],
    );
    replace(&mut bytes, PODS_BYTES, &[127, octet, 1]);
    bytes.into()
}

fn replace(bytes: &mut [u8], from: &[u8], to: &[u8]) {
    let mut rest = bytes;
    while let Some(at) = rest.windows(from.len()).position(|window| window == from) {
        let (_, found) = rest.split_at_mut(at);
        let (place, after) = found.split_at_mut(from.len());
        place.copy_from_slice(to);
        rest = after;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(answers: &[Answer], what: &[u8]) -> usize {
        let resources = answers.iter().flat_map(|answer| &answer.resources);
        resources
            .map(|resource| resource.bytes.windows(what.len()).filter(|window| *window == what).count())
            .sum()
    }

    #[test]
    fn the_built_in_answers_can_be_read() {
        let answers = answers(None, 0).unwrap();
        assert_eq!(answers.len(), BUILT_IN.len());
        assert!(answers.iter().all(|answer| !answer.resources.is_empty()));
    }

    #[test]
    fn moving_the_pods_moves_all_of_them_and_nothing_else() {
        let (here, there) = (answers(None, 0).unwrap(), answers(None, 9).unwrap());
        for (from, to) in [(PODS_TEXT, &b"127.9.1."[..]), (PODS_BYTES, &[127, 9, 1])] {
            assert_eq!((count(&there, from), count(&there, to)), (0, count(&here, from)));
            assert!(count(&here, from) > 4);
        }
        let moved_back = |answer: &Answer| {
            answer
                .resources
                .iter()
                .map(|resource| {
                    let mut bytes = resource.bytes.to_vec();
                    replace(&mut bytes, b"127.9.1.", PODS_TEXT);
                    replace(&mut bytes, &[127, 9, 1], PODS_BYTES);
                    Bytes::from(bytes)
                })
                .collect::<Vec<_>>()
        };
        for (before, after) in here.iter().zip(&there) {
            let before: Vec<_> = before.resources.iter().map(|resource| resource.bytes.clone()).collect();
            assert_eq!(before, moved_back(after));
        }
    }

    #[test]
    fn a_missing_folder_is_named_with_what_to_do() {
        let error = answers(Some(Path::new("/nowhere")), 0).unwrap_err().to_string();
        assert!(
            error.starts_with("cannot read /nowhere: ") && error.contains("leave --config out"),
            "{error}"
        );
    }

    #[test]
    fn a_broken_file_is_named_with_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("cds.pb"), "apiVersion: v1\n").unwrap();
        let error = answers(Some(folder.path()), 0).unwrap_err().to_string();
        assert!(
            error.contains("cds.pb") && error.contains("istiod-lab capture -f examples/demo.yaml"),
            "{error}"
        );
    }
}
