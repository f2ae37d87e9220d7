//! Resources from files: a directory of captured answers, or an Envoy `config_dump`.
//!
//! Both give what a stream would: lists of resources by type, in the order in which istiod sends types. A directory holds
//! `cds.pb`, `eds.pb`, `lds.pb`, `wds.pb`, `ecds.pb`, `sds.pb`, each a series of `DeltaDiscoveryResponse` messages with their lengths before
//! them, or the same compressed (`.pb.gz`).

use std::{
    fs,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use bytes::{Buf as _, Bytes};
use cairn_proto::envoy::service::discovery::v3::{DeltaDiscoveryResponse, Resource as DiscoveryResource};
use prost::Message as _;
use prost_reflect::DynamicMessage;
use serde_json::Value;

use super::{
    any::type_name,
    compiler::{CLUSTERS, ENDPOINTS, EXTENSIONS, LISTENERS, Resource, SECRETS},
};

/// Bytes that a compressed file may unpack to.
const MAX_UNPACKED: u64 = 1 << 30;

/// Files of a capture, in the order in which istiod sends their types.
const FILES: [&str; 6] = ["cds", "eds", "lds", "wds", "ecds", "sds"];

/// Clusters that Istio's agent writes into Envoy's own start configuration: nothing that istiod sends leads to them.
const BOOTSTRAP_CLUSTERS: [&str; 9] = [
    "agent",
    "prometheus_stats",
    "sds-grpc",
    "sds-files-grpc",
    "sds-external",
    "xds-grpc",
    "zipkin",
    "envoy_metrics_service",
    "envoy_accesslog_service",
];

/// Resources of one type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The type.
    pub type_url: String,
    /// What istiod called the state.
    pub system_version: String,
    /// The resources.
    pub resources: Vec<Resource>,
    /// Names that are gone.
    pub removed: Vec<String>,
}

/// Why a configuration cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file cannot be read.
    #[error("cannot read {path}: {source}; name the folder of a capture, or a file with Envoy's config_dump in JSON")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A directory has nothing that we look for.
    #[error(
        "{path} holds no captured configuration: expected at least cds.pb and lds.pb (or .pb.gz), or name a config_dump in JSON"
    )]
    Empty {
        /// The directory.
        path: PathBuf,
    },
    /// A file is no series of answers.
    #[error("{path}, message {message}: {what}")]
    Message {
        /// The file.
        path: PathBuf,
        /// Which message in it, from 1.
        message: usize,
        /// What is wrong.
        what: String,
    },
    /// A file is no JSON.
    #[error("{path}: line {line}, column {column}: {what}; a file has to be Envoy's config_dump in JSON, a capture is a folder")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where.
        line: usize,
        /// Where.
        column: usize,
        /// What is wrong.
        what: String,
    },
    /// A file is JSON, but no `config_dump`.
    #[error("{path}: {field}: {what}")]
    Dump {
        /// The file.
        path: PathBuf,
        /// Where.
        field: String,
        /// What is wrong.
        what: String,
    },
}

/// Reads a capture directory, or an Envoy `config_dump` file.
pub fn load(path: &Path) -> Result<Vec<Answer>, LoadError> {
    let read = |source| LoadError::Read {
        path: path.to_owned(),
        source,
    };
    if fs::metadata(path).map_err(read)?.is_dir() {
        directory(path)
    } else {
        config_dump(path)
    }
}

fn directory(path: &Path) -> Result<Vec<Answer>, LoadError> {
    let mut answers = Vec::new();
    for stem in FILES {
        let plain = path.join(format!("{stem}.pb"));
        let packed = path.join(format!("{stem}.pb.gz"));
        let (file, bytes) = match (read_if_there(&plain)?, read_if_there(&packed)?) {
            (Some(bytes), _) => (plain, bytes),
            (None, Some(bytes)) => {
                let unpacked = unpack(&bytes).map_err(|source| LoadError::Read {
                    path: packed.clone(),
                    source,
                })?;
                (packed, unpacked)
            }
            (None, None) => continue,
        };
        answers.append(&mut messages(&file, bytes.into())?);
    }
    if answers.is_empty() {
        Err(LoadError::Empty { path: path.to_owned() })
    } else {
        Ok(answers)
    }
}

fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>, LoadError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(LoadError::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

fn unpack(packed: &[u8]) -> io::Result<Vec<u8>> {
    let mut unpacked = Vec::new();
    let read = flate2::read::GzDecoder::new(packed)
        .take(MAX_UNPACKED + 1)
        .read_to_end(&mut unpacked)?;
    if read as u64 > MAX_UNPACKED {
        return Err(io::Error::other(format!("it unpacks to more than {MAX_UNPACKED} bytes")));
    }
    Ok(unpacked)
}

fn messages(path: &Path, mut bytes: Bytes) -> Result<Vec<Answer>, LoadError> {
    let mut answers = Vec::new();
    while bytes.has_remaining() {
        let wrong = |what: String| LoadError::Message {
            path: path.to_owned(),
            message: answers.len() + 1,
            what,
        };
        let response = DeltaDiscoveryResponse::decode_length_delimited(&mut bytes).map_err(|error| wrong(error.to_string()))?;
        let type_url = response.type_url;
        let mut resources = Vec::with_capacity(response.resources.len());
        for DiscoveryResource {
            name, version, resource, ..
        } in response.resources
        {
            let any = resource.ok_or_else(|| wrong(format!("the resource {name} is empty")))?;
            if any.type_url != type_url {
                return Err(wrong(format!("the resource {name} is a {} among {type_url}", any.type_url)));
            }
            resources.push(Resource {
                name,
                version,
                type_url: any.type_url,
                bytes: any.value.into(),
            });
        }
        answers.push(Answer {
            type_url,
            system_version: response.system_version_info,
            resources,
            removed: response.removed_resources,
        });
    }
    Ok(answers)
}

fn config_dump(path: &Path) -> Result<Vec<Answer>, LoadError> {
    let _held_for_all = cairn_proto::pool();
    let text = fs::read(path).map_err(|source| LoadError::Read {
        path: path.to_owned(),
        source,
    })?;
    let dump: Value = serde_json::from_slice(&text).map_err(|error| LoadError::Json {
        path: path.to_owned(),
        line: error.line(),
        column: error.column(),
        what: error.to_string(),
    })?;
    let wrong = |(field, what)| LoadError::Dump {
        path: path.to_owned(),
        field,
        what,
    };
    sections(&dump).map_err(wrong)
}

/// Where in a dump, and what is wrong there.
type Wrong = (String, String);

/// A section of a dump: its type, the type of its resources, and its lists with the way from an item to the resource.
type Section = (&'static str, &'static str, &'static [(&'static str, &'static [&'static str])]);

/// In each section the lists of resources, and where in an item the resource stands.
const SECTIONS: [Section; 5] = [
    (
        "envoy.admin.v3.ClustersConfigDump",
        CLUSTERS,
        &[
            ("static_clusters", &["cluster"]),
            ("dynamic_active_clusters", &["cluster"]),
            ("dynamic_warming_clusters", &["cluster"]),
        ],
    ),
    (
        "envoy.admin.v3.EndpointsConfigDump",
        ENDPOINTS,
        &[
            ("static_endpoint_configs", &["endpoint_config"]),
            ("dynamic_endpoint_configs", &["endpoint_config"]),
        ],
    ),
    (
        "envoy.admin.v3.ListenersConfigDump",
        LISTENERS,
        &[
            ("static_listeners", &["listener"]),
            ("dynamic_listeners", &["active_state", "listener"]),
        ],
    ),
    (
        "envoy.admin.v3.EcdsConfigDump",
        EXTENSIONS,
        &[("ecds_filters", &["ecds_filter"])],
    ),
    (
        "envoy.admin.v3.SecretsConfigDump",
        SECRETS,
        &[("dynamic_active_secrets", &["secret"])],
    ),
];

fn sections(dump: &Value) -> Result<Vec<Answer>, Wrong> {
    let Some(configs) = dump.get("configs").and_then(Value::as_array) else {
        return Err(("configs".to_owned(), "is missing: this is no config_dump".to_owned()));
    };
    let mut answers: Vec<Answer> = Vec::new();
    for (section, type_url, lists) in SECTIONS {
        let mut answer = Answer {
            type_url: type_url.to_owned(),
            system_version: String::new(),
            resources: Vec::new(),
            removed: Vec::new(),
        };
        for (index, config) in configs.iter().enumerate() {
            let kind = config.get("@type").and_then(Value::as_str).unwrap_or_default();
            if type_name(kind) != section {
                continue;
            }
            if let Some(version) = config.get("version_info").and_then(Value::as_str) {
                answer.system_version = version.to_owned();
            }
            for (list, way) in lists {
                for (at, item) in config.get(list).and_then(Value::as_array).into_iter().flatten().enumerate() {
                    let field = format!("configs[{index}].{list}[{at}].{}", way.join("."));
                    let Some(message) = way.iter().try_fold(item, |item, key| item.get(key)) else {
                        // A listener that is only warming or draining has no active state.
                        continue;
                    };
                    let resource = resource(type_url, message).map_err(|what| (field, what))?;
                    if *list != "static_clusters" || !BOOTSTRAP_CLUSTERS.contains(&resource.name.as_str()) {
                        answer.resources.push(resource);
                    }
                }
            }
        }
        if !answer.resources.is_empty() {
            answers.push(answer);
        }
    }
    if answers.is_empty() {
        return Err((
            "configs".to_owned(),
            "no section has a cluster, an endpoint or a listener".to_owned(),
        ));
    }
    Ok(answers)
}

/// A message in JSON, encoded.
fn resource(type_url: &str, message: &Value) -> Result<Resource, String> {
    let pool = cairn_proto::pool();
    let given = message.get("@type").and_then(Value::as_str).unwrap_or(type_url);
    if type_name(given) != type_name(type_url) {
        return Err(format!("is a {given} where a {type_url} belongs"));
    }
    let descriptor = pool
        .get_message_by_name(type_name(type_url))
        .ok_or_else(|| format!("{type_url} is not known"))?;
    let mut fields = message.clone();
    if let Some(fields) = fields.as_object_mut() {
        fields.remove("@type");
    }
    let name = ["name", "cluster_name"]
        .iter()
        .find_map(|key| fields.get(key))
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned();
    let message = DynamicMessage::deserialize(descriptor, fields).map_err(|error| error.to_string())?;
    Ok(Resource {
        name,
        version: String::new(),
        type_url: type_url.to_owned(),
        bytes: message.encode_to_vec().into(),
    })
}
