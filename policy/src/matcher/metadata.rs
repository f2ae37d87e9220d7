//! Matching dynamic metadata: what filters (JWT authentication foremost) have noted about a request.
//!
//! Values are JSON, as the record keeps them.

use cairn_exchange::DynamicMetadata;
use serde_json::Value;

use super::StringMatcher;

/// What is asked of a value.
#[derive(Clone, Debug)]
pub enum ValueMatcher {
    /// It is null.
    Null,
    /// It is that boolean.
    Bool(bool),
    /// It is that number.
    Exact(f64),
    /// It is a number, at least `start` and below `end`.
    Range {
        /// First number inside.
        start: f64,
        /// First number outside.
        end: f64,
    },
    /// It is a string of a shape.
    String(StringMatcher),
    /// It is there (`true`); `false` never matches, as in Envoy.
    Present(bool),
    /// It is a list with an item that matches.
    ListOneOf(Box<ValueMatcher>),
    /// Any of these matches.
    Or(Vec<ValueMatcher>),
}

/// A compiled metadata matcher.
#[derive(Clone, Debug)]
pub struct MetadataMatcher {
    /// The filter that noted it.
    pub filter: Box<str>,
    /// Keys from the filter's root to the value.
    pub path: Box<[Box<str>]>,
    /// What is asked of the value.
    pub value: ValueMatcher,
    /// The answer is turned round; a missing value then matches.
    pub invert: bool,
}

// === impl ValueMatcher ===

impl ValueMatcher {
    /// Whether a value matches; a missing value never does.
    pub fn matches(&self, value: Option<&Value>) -> bool {
        let Some(value) = value else { return false };
        match (self, value) {
            (Self::Or(any), value) => any.iter().any(|matcher| matcher.matches(Some(value))),
            (Self::Present(wanted), value) => *wanted && !value.is_null(),
            (Self::Null, Value::Null) => true,
            (Self::Bool(wanted), Value::Bool(found)) => wanted == found,
            (Self::Exact(wanted), Value::Number(found)) => found.as_f64() == Some(*wanted),
            (Self::Range { start, end }, Value::Number(found)) => {
                found.as_f64().is_some_and(|found| (*start..*end).contains(&found))
            }
            (Self::String(string), Value::String(found)) => string.matches(found.as_bytes()),
            (Self::ListOneOf(item), Value::Array(items)) => items.iter().any(|found| item.matches(Some(found))),
            _ => false,
        }
    }
}

// === impl MetadataMatcher ===

impl MetadataMatcher {
    /// Whether what was noted matches.
    pub fn matches(&self, metadata: &DynamicMetadata) -> bool {
        self.value.matches(metadata.get(&self.filter, &self.path)) != self.invert
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use cairn_exchange::DynamicMetadata;
    use serde_json::json;

    use super::{MetadataMatcher, StringMatcher, ValueMatcher};

    #[test]
    fn a_claim_matches_as_a_string_or_as_one_of_a_list() {
        let claim = |wanted| {
            let matcher = || ValueMatcher::String(StringMatcher::exact(wanted));
            ValueMatcher::Or(vec![ValueMatcher::ListOneOf(Box::new(matcher())), matcher()])
        };
        for (payload, wanted, invert, matches) in [
            (json!({"group": "dev"}), "dev", false, true),
            (json!({"group": "ops"}), "dev", false, false),
            (json!({"group": "ops"}), "dev", true, true),
            (json!({"group": ["ops", "dev"]}), "dev", false, true),
            (json!({"group": []}), "dev", false, false),
            (json!({"group": 1}), "1", false, false),
            (json!({}), "dev", false, false),
            (json!({}), "dev", true, true),
        ] {
            let matcher = MetadataMatcher {
                filter: "envoy.filters.http.jwt_authn".into(),
                path: ["payload".into(), "group".into()].into(),
                value: claim(wanted),
                invert,
            };
            let mut metadata = DynamicMetadata::default();
            metadata.set(
                "envoy.filters.http.jwt_authn".into(),
                "payload".into(),
                Arc::new(payload.clone()),
            );
            assert_eq!(matcher.matches(&metadata), matches, "{payload} {wanted} {invert}");
        }
    }

    #[test]
    fn other_kinds_of_values_match_their_own_kind_only() {
        for (matcher, value, matches) in [
            (ValueMatcher::Null, json!(null), true),
            (ValueMatcher::Null, json!(false), false),
            (ValueMatcher::Bool(true), json!(true), true),
            (ValueMatcher::Bool(true), json!(false), false),
            (ValueMatcher::Exact(2.0), json!(2), true),
            (ValueMatcher::Range { start: 1.0, end: 2.0 }, json!(2), false),
            (ValueMatcher::Range { start: 1.0, end: 2.0 }, json!(1.0), true),
            (ValueMatcher::Present(true), json!({}), true),
            (ValueMatcher::Present(true), json!(null), false),
            (ValueMatcher::Present(false), json!({}), false),
        ] {
            assert_eq!(matcher.matches(Some(&value)), matches, "{matcher:?} {value:?}");
            assert!(!matcher.matches(None), "{matcher:?}");
        }
    }
}
