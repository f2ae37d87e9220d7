//! One mutation of headers, where configuration lists them one after the other: edits, and removals by pattern.

use cairn_exchange::Exchange;
use http::{HeaderMap, HeaderName};

use super::{HeaderEdits, record_alone};
use crate::matcher::StringMatcher;

/// One mutation of headers.
#[derive(Clone, Debug)]
pub enum Mutation {
    /// Adds or removes.
    Edit(HeaderEdits),
    /// Removes all names that match.
    RemoveMatching(StringMatcher),
}

// === impl Mutation ===

impl Mutation {
    /// Edits a request.
    pub fn apply_to_request(&self, exchange: &mut Exchange) {
        match self {
            Mutation::Edit(edits) => edits.apply_to_request(exchange, &record_alone),
            Mutation::RemoveMatching(matcher) => {
                if let Some(head) = &mut exchange.request {
                    remove_matching(&mut head.headers, matcher);
                }
            }
        }
    }

    /// Edits an answer.
    pub fn apply_to_response(&self, headers: &mut HeaderMap, exchange: &Exchange) {
        match self {
            Mutation::Edit(edits) => edits.apply_to_response(headers, exchange, &record_alone),
            Mutation::RemoveMatching(matcher) => remove_matching(headers, matcher),
        }
    }

    /// Edits trailers, with literal values alone; whoever compiles this sees to it.
    pub fn apply_to_trailers(&self, trailers: &mut HeaderMap) {
        match self {
            Mutation::Edit(edits) => {
                edits.apply_literal(trailers);
            }
            Mutation::RemoveMatching(matcher) => remove_matching(trailers, matcher),
        }
    }
}

fn remove_matching(headers: &mut HeaderMap, matcher: &StringMatcher) {
    let matching: Vec<HeaderName> = headers
        .keys()
        .filter(|name| matcher.matches(name.as_str().as_bytes()))
        .cloned()
        .collect();
    for name in matching {
        headers.remove(name);
    }
}
