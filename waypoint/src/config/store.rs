//! The resources as they came: for `/config_dump`, and to see whether something has changed at all.
//!
//! The compiler writes, administrative pages read. Bytes are shared with the message that brought them, never copied.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::SystemTime,
};

use bytes::Bytes;
use cairn_exchange::clock;
use parking_lot::RwLock;
use serde::Serialize;

use super::report::{Effect, Unsupported};

/// One resource.
#[derive(Clone, Debug)]
pub struct Stored {
    /// The encoded message.
    pub bytes: Bytes,
    /// istiod's version of it; empty for Envoy's types.
    pub version: String,
    /// When these bytes came.
    pub updated: SystemTime,
    /// What was wrong with the last bytes, and when they came.
    pub error: Option<(String, SystemTime)>,
}

/// Something that istiod has sent and that waits for something else before it is used.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Pending {
    /// The resource: a cluster, a listener.
    pub resource: String,
    /// The filter chain in it, where it is in one; the one before it serves meanwhile.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chain: Option<String>,
    /// What has not come.
    pub waits_for: Vec<String>,
    /// It has waited long enough, and is used without.
    pub overdue: bool,
}

/// All resources, by type and name, and what of them is not done.
#[derive(Debug, Default)]
pub struct Store {
    inner: RwLock<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    types: BTreeMap<String, BTreeMap<String, Stored>>,
    /// `system_version_info` of the last answer of a type.
    versions: BTreeMap<String, String>,
    unsupported: Arc<[Unsupported]>,
    pending: Arc<[Pending]>,
}

// === impl Store ===

impl Store {
    /// Resources of a type, by name. The copy is cheap: bytes are shared.
    pub fn resources(&self, type_url: &str) -> Vec<(String, Stored)> {
        let inner = self.inner.read();
        let resources = inner.types.get(type_url).into_iter().flatten();
        resources.map(|(name, stored)| (name.clone(), stored.clone())).collect()
    }

    /// One resource.
    pub fn resource(&self, type_url: &str, name: &str) -> Option<Stored> {
        self.inner.read().types.get(type_url)?.get(name).cloned()
    }

    /// Names of the resources of a type.
    pub fn names(&self, type_url: &str) -> BTreeSet<String> {
        self.inner
            .read()
            .types
            .get(type_url)
            .into_iter()
            .flatten()
            .map(|(name, _)| name.clone())
            .collect()
    }

    /// What istiod called the state that the last answer of a type brought.
    pub fn version(&self, type_url: &str) -> String {
        self.inner.read().versions.get(type_url).cloned().unwrap_or_default()
    }

    /// Everything that is not done, in order.
    pub fn unsupported(&self) -> Arc<[Unsupported]> {
        self.inner.read().unsupported.clone()
    }

    /// Everything that waits, in order.
    pub fn pending(&self) -> Arc<[Pending]> {
        self.inner.read().pending.clone()
    }

    pub(crate) fn set_pending(&self, mut list: Vec<Pending>) {
        list.sort();
        self.inner.write().pending = list.into();
    }

    pub(crate) fn set_version(&self, type_url: &str, version: &str) {
        self.inner.write().versions.insert(type_url.to_owned(), version.to_owned());
    }

    /// Puts resources in; bytes that are the same keep their time.
    pub(crate) fn put(&self, type_url: &str, resources: impl IntoIterator<Item = (String, String, Bytes)>) {
        let now = clock::wall();
        let mut inner = self.inner.write();
        let of_type = inner.types.entry(type_url.to_owned()).or_default();
        for (name, version, bytes) in resources {
            match of_type.get_mut(&name) {
                // The new slice takes over, so that the message that brought the old one can go.
                Some(stored) if stored.bytes == bytes => {
                    stored.bytes = bytes;
                    stored.version = version;
                }
                _ => {
                    of_type.insert(
                        name,
                        Stored {
                            bytes,
                            version,
                            updated: now,
                            error: None,
                        },
                    );
                }
            }
        }
    }

    pub(crate) fn remove(&self, type_url: &str, name: &str) {
        if let Some(of_type) = self.inner.write().types.get_mut(type_url) {
            of_type.remove(name);
        }
    }

    /// Notes what is wrong with a resource, or that nothing is.
    pub(crate) fn set_error(&self, type_url: &str, name: &str, error: Option<String>) {
        let now = clock::wall();
        if let Some(stored) = self
            .inner
            .write()
            .types
            .get_mut(type_url)
            .and_then(|of_type| of_type.get_mut(name))
        {
            match (error, &mut stored.error) {
                (None, slot) => *slot = None,
                (Some(error), Some((known, _))) if *known == error => {}
                (Some(error), slot) => *slot = Some((error, now)),
            }
        }
    }

    /// Takes over a new list, and logs what was not in the old one.
    pub(crate) fn set_unsupported(&self, mut list: Vec<Unsupported>) {
        list.sort();
        list.dedup();
        let mut inner = self.inner.write();
        if *list == *inner.unsupported {
            return;
        }
        let known: BTreeSet<&Unsupported> = inner.unsupported.iter().collect();
        for item in list.iter().filter(|item| !known.contains(item)) {
            match item.effect {
                Effect::Refused | Effect::RouteRefused => tracing::warn!("not supported: {item}"),
                Effect::Ignored => tracing::info!("not supported: {item}"),
            }
        }
        inner.unsupported = list.into();
    }
}
