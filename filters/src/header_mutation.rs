//! Edits of headers, of the query and of trailers (contract xds §3.3: the client's identity for applications).
//!
//! Mutations are made one after the other, in their order; what decides later sees the edited request. Those of the chain come first,
//! then those of table, virtual host, route and weighted cluster, so that the most specific stay; or, where the filter does not say
//! that these win, the other way round.

use std::sync::Arc;

use cairn_exchange::Exchange;
use cairn_policy::headers::Mutation;
use http::{HeaderMap, uri::PathAndQuery};
use smallvec::SmallVec;

use crate::{
    contract::{BodyNeed, Needs, ResponseHead, Slot},
    on_route::{RouteConfig, Scope},
};

/// The filter.
#[derive(Clone, Debug, Default)]
pub struct HeaderMutation {
    /// What it does everywhere.
    pub mutations: Arc<Mutations>,
    /// Mutations of routes come after those of the tables around them.
    pub most_specific_wins: bool,
}

/// Mutations, each list in order.
#[derive(Clone, Debug, Default)]
pub struct Mutations {
    /// Of requests.
    pub request: Vec<Mutation>,
    /// Of their queries.
    pub query: Vec<QueryMutation>,
    /// Of the trailers of requests.
    pub request_trailers: Vec<Mutation>,
    /// Of answers.
    pub response: Vec<Mutation>,
    /// Of their trailers.
    pub response_trailers: Vec<Mutation>,
}

/// One mutation of the query.
#[derive(Clone, Debug)]
pub enum QueryMutation {
    /// Removes all parameters of this name.
    Remove(Box<str>),
    /// Adds one.
    Add {
        /// Its name.
        key: Box<str>,
        /// Its value.
        value: Box<str>,
        /// What becomes of those that are there.
        action: QueryAction,
    },
}

/// What becomes of parameters of the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueryAction {
    /// One more.
    AppendOrAdd,
    /// The old one stays.
    AddIfAbsent,
    /// They are replaced.
    OverwriteOrAdd,
    /// They are replaced; without any, nothing happens.
    OverwriteIfExists,
}

/// Mutations of all levels, in the order in which they are made.
pub type Levels = SmallVec<[Arc<Mutations>; 2]>;

/// The request's head is there.
pub(crate) fn decode_head(filter: &HeaderMutation, slot: &mut Slot, exchange: &mut Exchange, scope: &Scope<'_>) {
    let mut levels: Levels = scope
        .route
        .configs(scope.filter)
        .filter_map(|config| match config {
            RouteConfig::HeaderMutation(mutations) => Some(mutations.clone()),
            _ => None,
        })
        .collect();
    if filter.most_specific_wins {
        levels.reverse();
    }
    for mutations in std::iter::once(&filter.mutations).chain(&levels) {
        for mutation in &mutations.request {
            mutation.apply_to_request(exchange);
        }
        if let Some(head) = exchange.request.as_mut().filter(|_| !mutations.query.is_empty())
            && let Some(path) = mutate_query(&head.path, &mutations.query)
        {
            head.path = path;
        }
    }
    if !levels.is_empty() {
        *slot = Slot::HeaderMutation(Box::new(levels));
    }
}

// === impl HeaderMutation ===

impl HeaderMutation {
    /// It sees bodies only to see the trailers behind them.
    pub(crate) fn needs(&self) -> Needs {
        let request = if self.mutations.request_trailers.is_empty() {
            BodyNeed::Nothing
        } else {
            BodyNeed::Observe
        };
        Needs {
            request,
            observe_response: false,
        }
    }
}

/// Whether the trailers of this request are edited.
pub(crate) fn watches(filter: &HeaderMutation, slot: &Slot) -> bool {
    levels(filter, slot).any(|mutations| !mutations.request_trailers.is_empty())
}

fn levels<'a>(filter: &'a HeaderMutation, slot: &'a Slot) -> impl Iterator<Item = &'a Mutations> {
    let others = match slot {
        Slot::HeaderMutation(levels) => levels.as_slice(),
        _ => &[],
    };
    std::iter::once(&filter.mutations).chain(others).map(|mutations| &**mutations)
}

/// The request's trailers.
pub(crate) fn decode_trailers(filter: &HeaderMutation, slot: &Slot, trailers: &mut HeaderMap) {
    for mutation in levels(filter, slot).flat_map(|mutations| &mutations.request_trailers) {
        mutation.apply_to_trailers(trailers);
    }
}

/// The answer's head is there.
pub(crate) fn encode_head(filter: &HeaderMutation, slot: &Slot, exchange: &Exchange, head: &mut ResponseHead) {
    for mutation in levels(filter, slot).flat_map(|mutations| &mutations.response) {
        mutation.apply_to_response(&mut head.headers, exchange);
    }
}

/// The answer's trailers.
pub(crate) fn encode_trailers(filter: &HeaderMutation, slot: &Slot, trailers: &mut HeaderMap) {
    for mutation in levels(filter, slot).flat_map(|mutations| &mutations.response_trailers) {
        mutation.apply_to_trailers(trailers);
    }
}

/// The path with an edited query; `None` when it would be none.
pub(crate) fn mutate_query(path: &PathAndQuery, mutations: &[QueryMutation]) -> Option<PathAndQuery> {
    let pair = |parameter: &str| match parameter.split_once('=') {
        Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
        None => (parameter.to_owned(), None),
    };
    let query = path.query().unwrap_or_default();
    let mut parameters: Vec<(String, Option<String>)> =
        query.split('&').filter(|parameter| !parameter.is_empty()).map(pair).collect();
    for mutation in mutations {
        match mutation {
            QueryMutation::Remove(key) => parameters.retain(|(other, _)| **other != **key),
            QueryMutation::Add { key, value, action } => {
                let there = parameters.iter().any(|(other, _)| **other == **key);
                match action {
                    QueryAction::AddIfAbsent if there => continue,
                    QueryAction::OverwriteIfExists if !there => continue,
                    QueryAction::OverwriteOrAdd | QueryAction::OverwriteIfExists => {
                        parameters.retain(|(other, _)| **other != **key);
                    }
                    QueryAction::AppendOrAdd | QueryAction::AddIfAbsent => {}
                }
                parameters.push((key.to_string(), Some(value.to_string())));
            }
        }
    }
    let parameters: Vec<_> = parameters
        .into_iter()
        .map(|(key, value)| value.map_or(key.clone(), |value| format!("{key}={value}")))
        .collect();
    let edited = if parameters.is_empty() {
        path.path().to_owned()
    } else {
        format!("{}?{}", path.path(), parameters.join("&"))
    };
    PathAndQuery::try_from(edited).ok()
}

#[cfg(test)]
mod tests {
    use cairn_policy::matcher::StringMatcher;
    use http::HeaderName;

    use super::*;

    #[test]
    fn a_query_is_edited_parameter_by_parameter() {
        let add = |action| QueryMutation::Add {
            key: "q".into(),
            value: "new".into(),
            action,
        };
        for (mutation, path, edited) in [
            (QueryMutation::Remove("q".into()), "/p?q=1&r&q=2", "/p?r"),
            (QueryMutation::Remove("q".into()), "/p?q=1", "/p"),
            (add(QueryAction::AppendOrAdd), "/p", "/p?q=new"),
            (add(QueryAction::AppendOrAdd), "/p?q=1", "/p?q=1&q=new"),
            (add(QueryAction::AddIfAbsent), "/p?q=1", "/p?q=1"),
            (add(QueryAction::AddIfAbsent), "/p?r=1", "/p?r=1&q=new"),
            (add(QueryAction::OverwriteOrAdd), "/p?q=1&r=2&q=3", "/p?r=2&q=new"),
            (add(QueryAction::OverwriteIfExists), "/p?r=2", "/p?r=2"),
            (add(QueryAction::OverwriteIfExists), "/p?q=1", "/p?q=new"),
        ] {
            let path = PathAndQuery::from_static(path);
            assert_eq!(mutate_query(&path, &[mutation]).unwrap().as_str(), edited, "{path}");
        }
    }

    #[test]
    fn names_that_match_are_removed() {
        let mut headers = HeaderMap::new();
        for name in ["x-a", "x-b", "y-a"] {
            headers.insert(name, http::HeaderValue::from_static("1"));
        }
        Mutation::RemoveMatching(StringMatcher::prefix("x-")).apply_to_trailers(&mut headers);
        assert_eq!(headers.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["y-a"]);
    }
}
