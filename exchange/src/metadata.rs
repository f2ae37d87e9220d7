//! Dynamic metadata: what filters note about a request, for filters behind them, routes and logs.
//!
//! A value has a namespace, which is the noting filter's name, and a key. Values are shared, not copied: the claims of a token that was
//! verified before are the cache's own.

use std::sync::Arc;

use serde_json::Value;

/// What was noted; a request has few, so they are a list.
#[derive(Clone, Debug, Default)]
pub struct DynamicMetadata {
    entries: Vec<Entry>,
}

#[derive(Clone, Debug)]
struct Entry {
    namespace: Arc<str>,
    key: Arc<str>,
    value: Arc<Value>,
}

impl DynamicMetadata {
    /// Nothing was noted.
    pub const NONE: &'static Self = &Self { entries: Vec::new() };

    /// Notes a value; one with the same namespace and key is replaced.
    pub fn set(&mut self, namespace: Arc<str>, key: Arc<str>, value: Arc<Value>) {
        let known = |entry: &&mut Entry| entry.namespace == namespace && entry.key == key;
        match self.entries.iter_mut().find(known) {
            Some(entry) => entry.value = value,
            None => self.entries.push(Entry { namespace, key, value }),
        }
    }

    /// Forgets a value, if it was noted.
    pub fn remove(&mut self, namespace: &str, key: &str) {
        self.entries
            .retain(|entry| *entry.namespace != *namespace || *entry.key != *key);
    }

    /// The value at a path of keys, the first of which was noted.
    pub fn get(&self, namespace: &str, path: &[Box<str>]) -> Option<&Value> {
        let (key, rest) = path.split_first()?;
        rest.iter()
            .try_fold(self.entry(namespace, key)?, |value, key| value.as_object()?.get(&**key))
    }

    /// The value that was noted under a key.
    pub fn entry(&self, namespace: &str, key: &str) -> Option<&Value> {
        let mut entries = self.entries.iter();
        let entry = entries.find(|entry| *entry.namespace == *namespace && *entry.key == *key)?;
        Some(&entry.value)
    }

    /// All that was noted in a namespace, by key.
    pub fn namespace<'a, 'n>(&'a self, namespace: &'n str) -> impl Iterator<Item = (&'a str, &'a Value)> + use<'a, 'n> {
        let of = self.entries.iter().filter(move |entry| *entry.namespace == *namespace);
        of.map(|entry| (&*entry.key, &*entry.value))
    }

    /// Whether nothing was noted.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn path(text: &str) -> Vec<Box<str>> {
        text.split('.').map(Into::into).collect()
    }

    #[test]
    fn values_are_found_by_namespace_and_path() {
        let mut metadata = DynamicMetadata::default();
        metadata.set("jwt".into(), "payload".into(), Arc::new(json!({"a": {"b": [1]}, "c": null})));
        for (namespace, at, found) in [
            ("jwt", "payload.a.b", Some(json!([1]))),
            ("jwt", "payload.c", Some(json!(null))),
            ("jwt", "payload.a.x", None),
            ("jwt", "payload.a.b.0", None),
            ("jwt", "header", None),
            ("other", "payload", None),
        ] {
            assert_eq!(metadata.get(namespace, &path(at)), found.as_ref(), "{namespace} {at}");
        }
        assert_eq!(metadata.get("jwt", &[]), None);
    }

    #[test]
    fn a_key_that_is_noted_again_is_replaced() {
        let mut metadata = DynamicMetadata::default();
        metadata.set("ns".into(), "key".into(), Arc::new(json!(1)));
        metadata.set("ns".into(), "key".into(), Arc::new(json!(2)));
        assert_eq!(metadata.namespace("ns").collect::<Vec<_>>(), [("key", &json!(2))]);
        metadata.remove("other", "key");
        metadata.remove("ns", "other");
        assert_eq!(metadata.namespace("ns").count(), 1);
        metadata.remove("ns", "key");
        assert!(metadata.is_empty());
    }
}
