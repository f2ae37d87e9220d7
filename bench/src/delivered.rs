//! The mesh as istiod delivers it: the resources of a `config_dump` in the wire
//! format.
//!
//! The waypoint gets its configuration in protobuf. Given a dump, it would first
//! have to take apart JSON, which needs the description of every message: some
//! 6 MiB that no waypoint in a cluster ever holds, and that would be measured.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cairn_proto::envoy::service::discovery::v3::{DeltaDiscoveryResponse, Resource};
use prost::Message as _;
use prost_reflect::DynamicMessage;
use serde_json::Value;

use crate::mesh::items;

/// A file, the section and the list of a dump that it is made of, where in an
/// item the resource stands, and the field that has its name.
const FILES: [(&str, &str, &str, &str, &str); 3] = [
    ("cds.pb", "ClustersConfigDump", "dynamic_active_clusters", "/cluster", "name"),
    (
        "eds.pb",
        "EndpointsConfigDump",
        "dynamic_endpoint_configs",
        "/endpoint_config",
        "cluster_name",
    ),
    (
        "lds.pb",
        "ListenersConfigDump",
        "dynamic_listeners",
        "/active_state/listener",
        "name",
    ),
];

/// Writes the resources of a dump into a folder, which it names.
pub(crate) fn write(dump: &Value, folder: &Path) -> Result<PathBuf> {
    let folder = folder.join("delivered");
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    for (file, section, list, way, name) in FILES {
        let mut answer = DeltaDiscoveryResponse::default();
        for item in items(dump, section, list)? {
            let resource = item
                .pointer(way)
                .with_context(|| format!("an item of {list} has nothing at {way}"))?;
            answer
                .resources
                .push(encoded(resource, name).with_context(|| format!("an item of {list}"))?);
        }
        answer.type_url = answer
            .resources
            .first()
            .and_then(|first| first.resource.as_ref())
            .map(|any| any.type_url.clone())
            .unwrap_or_default();
        let path = folder.join(file);
        std::fs::write(&path, answer.encode_length_delimited_to_vec())
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(folder)
}

fn encoded(resource: &Value, name: &str) -> Result<Resource> {
    let mut fields = resource.as_object().cloned().context("is no object")?;
    let text = |value: Option<Value>| value.and_then(|value| value.as_str().map(str::to_owned));
    let type_url = text(fields.remove("@type")).context("has no @type")?;
    let name = text(fields.get(name).cloned()).context("has no name")?;
    let message = type_url.rsplit('/').next().unwrap_or_default();
    let descriptor = cairn_proto::pool()
        .get_message_by_name(message)
        .with_context(|| format!("{message} is not known"))?;
    let value = DynamicMessage::deserialize(descriptor, Value::Object(fields))?.encode_to_vec();
    Ok(Resource {
        name,
        resource: Some(prost_types::Any { type_url, value }),
        ..Resource::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::config_dump;

    #[test]
    fn every_resource_of_the_dump_is_delivered() {
        let folder = std::env::temp_dir().join(format!("cairn-bench-delivered-{}", std::process::id()));
        let dump = config_dump(true).unwrap();
        let written = write(&dump, &folder).unwrap();
        for (file, section, list, ..) in FILES {
            let bytes = std::fs::read(written.join(file)).unwrap();
            let answer = DeltaDiscoveryResponse::decode_length_delimited(&*bytes).unwrap();
            assert_eq!(answer.resources.len(), items(&dump, section, list).unwrap().len(), "{file}");
            assert!(answer.resources.iter().all(|resource| !resource.name.is_empty()));
        }
        std::fs::remove_dir_all(folder).unwrap();
    }
}
