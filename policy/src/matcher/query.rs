//! Matching one parameter of the query.
//!
//! As Envoy does, the first parameter of a name counts, nothing is decoded, and a parameter without `=` has an empty value.

use super::StringMatcher;

/// What is asked of a parameter.
#[derive(Clone, Debug)]
pub enum QueryMatch {
    /// It is there.
    Present,
    /// It is there and its value has a shape.
    String(StringMatcher),
}

/// A compiled query parameter matcher.
#[derive(Clone, Debug)]
pub struct QueryMatcher {
    /// Name of the parameter, undecoded.
    pub name: Box<str>,
    /// What is asked of it.
    pub how: QueryMatch,
}

// === impl QueryMatcher ===

impl QueryMatcher {
    /// Whether a query (what follows the `?`) matches.
    pub fn matches(&self, query: &str) -> bool {
        match (first_query_value(query, &self.name), &self.how) {
            (None, _) => false,
            (Some(_), QueryMatch::Present) => true,
            (Some(value), QueryMatch::String(string)) => string.matches(value.as_bytes()),
        }
    }
}

/// The value of the first parameter of that name.
pub fn first_query_value<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    query
        .split('&')
        .map(|parameter| parameter.split_once('=').unwrap_or((parameter, "")))
        .find_map(|(key, value)| (key == name).then_some(value))
}

#[cfg(test)]
mod tests {
    use super::{QueryMatch, QueryMatcher, StringMatcher};

    #[test]
    fn the_first_parameter_of_a_name_counts_undecoded() {
        let present = || QueryMatch::Present;
        let one = || QueryMatch::String(StringMatcher::exact("1"));
        for (how, query, matches) in [
            (present(), "q", true),
            (present(), "q=", true),
            (present(), "a=1&q=2", true),
            (present(), "", false),
            (present(), "qq=1", false),
            (present(), "%71=1", false),
            (one(), "q=1", true),
            (one(), "q=1&q=2", true),
            (one(), "q=2&q=1", false),
            (one(), "q=%31", false),
            (one(), "Q=1", false),
        ] {
            let matcher = QueryMatcher { name: "q".into(), how };
            assert_eq!(matcher.matches(query), matches, "{matcher:?} {query}");
        }
    }
}
