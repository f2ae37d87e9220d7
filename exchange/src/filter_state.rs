//! Objects that filters have put beside a request, as texts by key.

use std::sync::Arc;

/// The objects; empty for nearly every request.
#[derive(Clone, Debug, Default)]
pub struct FilterState {
    objects: Vec<Object>,
}

#[derive(Clone, Debug)]
struct Object {
    key: Arc<str>,
    text: String,
    read_only: bool,
}

// === impl FilterState ===

impl FilterState {
    /// Puts an object, in the place of one of the same key unless that is read-only.
    pub fn set(&mut self, key: Arc<str>, text: String, read_only: bool) {
        match self.objects.iter_mut().find(|object| object.key == key) {
            Some(Object { read_only: true, .. }) => {}
            Some(object) => {
                object.text = text;
                object.read_only = read_only;
            }
            None => self.objects.push(Object { key, text, read_only }),
        }
    }

    /// The object of a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        let object = self.objects.iter().find(|object| *object.key == *key)?;
        Some(&object.text)
    }
}

#[cfg(test)]
mod tests {
    use super::FilterState;

    #[test]
    fn a_later_object_replaces_one_that_is_not_read_only() {
        let mut state = FilterState::default();
        assert_eq!(state.get("a"), None);
        state.set("a".into(), "1".into(), false);
        state.set("a".into(), "2".into(), true);
        state.set("a".into(), "3".into(), false);
        assert_eq!(state.get("a"), Some("2"));
    }
}
