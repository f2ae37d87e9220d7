//! Matching dynamic metadata: what filters (JWT authentication foremost) have noted about a request.
//!
//! Whoever keeps the metadata hands in a lookup from (filter, path of keys) to a [`MetadataValue`]; nothing here stores any.

use super::StringMatcher;

/// Looks up metadata by filter and path of keys.
pub type MetadataLookup<'a> = &'a dyn Fn(&str, &[Box<str>]) -> Option<MetadataValue>;

/// A value found in metadata.
#[derive(Clone, Debug, PartialEq)]
pub enum MetadataValue {
    /// Nothing.
    Null,
    /// True or false.
    Bool(bool),
    /// A number, as JSON has them.
    Number(f64),
    /// A string.
    String(Box<str>),
    /// A list.
    List(Vec<MetadataValue>),
    /// An object; only its presence can be matched.
    Object,
}

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
    pub fn matches(&self, value: Option<&MetadataValue>) -> bool {
        let Some(value) = value else { return false };
        match (self, value) {
            (Self::Or(any), value) => any.iter().any(|matcher| matcher.matches(Some(value))),
            (Self::Present(wanted), value) => *wanted && *value != MetadataValue::Null,
            (Self::Null, MetadataValue::Null) => true,
            (Self::Bool(wanted), MetadataValue::Bool(found)) => wanted == found,
            (Self::Exact(wanted), MetadataValue::Number(found)) => wanted == found,
            (Self::Range { start, end }, MetadataValue::Number(found)) => (*start..*end).contains(found),
            (Self::String(string), MetadataValue::String(found)) => string.matches(found.as_bytes()),
            (Self::ListOneOf(item), MetadataValue::List(items)) => items.iter().any(|found| item.matches(Some(found))),
            _ => false,
        }
    }
}

// === impl MetadataMatcher ===

impl MetadataMatcher {
    /// Whether the metadata behind `lookup` matches.
    pub fn matches(&self, lookup: MetadataLookup<'_>) -> bool {
        self.value.matches(lookup(&self.filter, &self.path).as_ref()) != self.invert
    }
}

#[cfg(test)]
mod tests {
    use super::{MetadataMatcher, MetadataValue, StringMatcher, ValueMatcher};

    #[test]
    fn a_claim_matches_as_a_string_or_as_one_of_a_list() {
        let string = |value: &str| MetadataValue::String(value.into());
        let claim = |wanted| {
            let matcher = || ValueMatcher::String(StringMatcher::exact(wanted));
            ValueMatcher::Or(vec![ValueMatcher::ListOneOf(Box::new(matcher())), matcher()])
        };
        for (value, wanted, invert, matches) in [
            (Some(string("dev")), "dev", false, true),
            (Some(string("ops")), "dev", false, false),
            (Some(string("ops")), "dev", true, true),
            (
                Some(MetadataValue::List(vec![string("ops"), string("dev")])),
                "dev",
                false,
                true,
            ),
            (Some(MetadataValue::List(vec![])), "dev", false, false),
            (Some(MetadataValue::Number(1.0)), "1", false, false),
            (None, "dev", false, false),
            (None, "dev", true, true),
        ] {
            let matcher = MetadataMatcher {
                filter: "envoy.filters.http.jwt_authn".into(),
                path: ["payload".into(), "group".into()].into(),
                value: claim(wanted),
                invert,
            };
            let lookup = |filter: &str, path: &[Box<str>]| {
                assert_eq!((filter, path.len()), ("envoy.filters.http.jwt_authn", 2));
                value.clone()
            };
            assert_eq!(matcher.matches(&lookup), matches, "{value:?} {wanted} {invert}");
        }
    }

    #[test]
    fn other_kinds_of_values_match_their_own_kind_only() {
        use MetadataValue as Value;
        for (matcher, value, matches) in [
            (ValueMatcher::Null, Value::Null, true),
            (ValueMatcher::Null, Value::Bool(false), false),
            (ValueMatcher::Bool(true), Value::Bool(true), true),
            (ValueMatcher::Bool(true), Value::Bool(false), false),
            (ValueMatcher::Exact(2.0), Value::Number(2.0), true),
            (ValueMatcher::Range { start: 1.0, end: 2.0 }, Value::Number(2.0), false),
            (ValueMatcher::Range { start: 1.0, end: 2.0 }, Value::Number(1.0), true),
            (ValueMatcher::Present(true), Value::Object, true),
            (ValueMatcher::Present(true), Value::Null, false),
            (ValueMatcher::Present(false), Value::Object, false),
        ] {
            assert_eq!(matcher.matches(Some(&value)), matches, "{matcher:?} {value:?}");
        }
    }
}
