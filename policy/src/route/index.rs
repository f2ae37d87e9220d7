//! An index over the routes of a virtual host: which of them could match a path at all.
//!
//! Each route lies in one bucket: under its whole path, under the beginning or the part that its matches must have, or among those that
//! nothing is known of. A bucket sorts further by one header that must have an exact value (`:method` is one). A search takes the few lists of
//! the buckets that fit the request and asks their routes in configuration's order, so that it finds what asking all would find: the
//! index only leaves out routes that cannot match.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use aho_corasick::AhoCorasick;
use cairn_exchange::RequestHead;
use foldhash::fast::RandomState;
use smallvec::SmallVec;

use super::{Facts, Route};
use crate::matcher::{HeaderMatch, HeaderMatcher, HeaderName, PathMatch, StringMatch, any_value};

/// With fewer routes than this, asking each is as quick.
const WORTHWHILE: usize = 16;

type Map<V> = HashMap<Box<[u8]>, V, RandomState>;

/// Positions of routes, ascending.
type Positions = Vec<u32>;

/// An index over routes; it knows them by position.
#[derive(Debug, Default)]
pub(super) struct RouteIndex {
    /// Letters as they are.
    strict: Paths,
    /// Letters folded.
    folded: Paths,
    /// Regular expressions by a text that they must have in them.
    parts: Parts,
    /// Routes whose path says nothing that could be looked up.
    other: Bucket,
}

#[derive(Debug, Default)]
struct Parts {
    /// While it is put together.
    by_text: Map<Bucket>,
    automaton: Option<AhoCorasick>,
    /// By the automaton's patterns.
    buckets: Vec<Bucket>,
}

#[derive(Debug, Default)]
struct Paths {
    exact: Map<Bucket>,
    prefixes: Map<Bucket>,
    /// The lengths that occur among the prefixes, ascending, and with which bytes those of a length end.
    lengths: Vec<(usize, Bytes)>,
}

/// A set of bytes.
#[derive(Clone, Copy, Debug, Default)]
struct Bytes([u64; 4]);

#[derive(Debug, Default)]
struct Bucket {
    plain: Positions,
    by_header: Vec<(HeaderName, Map<Positions>)>,
}

// === impl RouteIndex ===

impl RouteIndex {
    /// An index, when there are enough routes for one.
    pub(super) fn worthwhile(routes: &[Arc<Route>]) -> Option<Self> {
        (routes.len() >= WORTHWHILE).then(|| Self::new(routes))
    }

    fn new(routes: &[Arc<Route>]) -> Self {
        let mut index = Self::default();
        for (position, route) in (0u32..).zip(routes) {
            index.bucket_of(route).insert(position, &route.matches.headers);
        }
        index.strict.finish();
        index.folded.finish();
        index.parts.finish(&mut index.other);
        index
    }

    /// The first route that matches.
    pub(super) fn find<'a>(&self, routes: &'a [Arc<Route>], head: &RequestHead, facts: Facts<'_>) -> Option<&'a Arc<Route>> {
        let path = head.path.path().as_bytes();
        let mut lists = SmallVec::new();
        self.strict.collect(path, head, &mut lists);
        if !self.folded.is_empty() {
            self.folded.collect(&path.to_ascii_lowercase(), head, &mut lists);
        }
        self.parts.collect(path, head, &mut lists);
        self.other.collect(head, &mut lists);
        let mut in_order = InOrder(lists);
        let route = |position: u32| routes.get(usize::try_from(position).ok()?);
        in_order.find_map(|position| route(position).filter(|route| route.matches.matches(head, facts)))
    }

    fn bucket_of(&mut self, route: &Route) -> &mut Bucket {
        let path = &route.matches.path;
        // Folding does not concern expressions.
        let fold = path.ignores_case() && !matches!(path.how(), PathMatch::Regex(_));
        let paths = if fold { &mut self.folded } else { &mut self.strict };
        let key = |text: &str| -> Box<[u8]> {
            let text = if fold {
                Cow::Owned(text.to_ascii_lowercase())
            } else {
                Cow::Borrowed(text)
            };
            text.as_bytes().into()
        };
        match path.how() {
            PathMatch::Exact(whole) => paths.exact.entry(key(whole)).or_default(),
            PathMatch::Prefix(start) | PathMatch::SeparatedPrefix(start) => paths.prefixes.entry(key(start)).or_default(),
            PathMatch::Regex(regex) => {
                let (start, part) = (regex.literal_prefix(), regex.required_literal());
                if start.len() >= part.len() && !start.is_empty() {
                    paths.prefixes.entry(key(start)).or_default()
                } else if !part.is_empty() {
                    self.parts.by_text.entry(part.into_bytes().into()).or_default()
                } else {
                    &mut self.other
                }
            }
            PathMatch::Connect => &mut self.other,
        }
    }
}

// === impl Paths ===

impl Paths {
    fn finish(&mut self) {
        let mut lengths: BTreeMap<usize, Bytes> = BTreeMap::new();
        for prefix in self.prefixes.keys() {
            let ends = lengths.entry(prefix.len()).or_default();
            prefix.last().into_iter().for_each(|byte| ends.insert(*byte));
        }
        self.lengths = lengths.into_iter().collect();
    }

    fn is_empty(&self) -> bool {
        self.exact.is_empty() && self.prefixes.is_empty()
    }

    fn collect<'a>(&'a self, path: &[u8], head: &RequestHead, lists: &mut SmallVec<[&'a [u32]; 8]>) {
        if let Some(bucket) = self.exact.get(path) {
            bucket.collect(head, lists);
        }
        for (length, ends) in &self.lengths {
            let Some(start) = path.get(..*length) else { break };
            // Most beginnings end with a slash, and most slashes are elsewhere.
            let possible = start.last().is_none_or(|byte| ends.contains(*byte));
            if possible && let Some(bucket) = self.prefixes.get(start) {
                bucket.collect(head, lists);
            }
        }
    }
}

// === impl Bytes ===

impl Bytes {
    fn insert(&mut self, byte: u8) {
        if let Some(word) = self.0.get_mut(usize::from(byte / 64)) {
            *word |= 1 << (byte % 64);
        }
    }

    fn contains(self, byte: u8) -> bool {
        self.0
            .get(usize::from(byte / 64))
            .is_some_and(|word| word >> (byte % 64) & 1 == 1)
    }
}

// === impl Parts ===

impl Parts {
    /// Texts that take too much memory together are not looked for.
    fn finish(&mut self, other: &mut Bucket) {
        let (texts, buckets): (Vec<_>, Vec<_>) = std::mem::take(&mut self.by_text).into_iter().unzip();
        if texts.is_empty() {
            return;
        }
        match AhoCorasick::new(&texts) {
            Ok(automaton) => {
                self.automaton = Some(automaton);
                self.buckets = buckets;
            }
            Err(_) => buckets.into_iter().for_each(|bucket| other.absorb(bucket)),
        }
    }

    fn collect<'a>(&'a self, path: &[u8], head: &RequestHead, lists: &mut SmallVec<[&'a [u32]; 8]>) {
        let Some(automaton) = &self.automaton else { return };
        let mut found: SmallVec<[usize; 8]> = automaton
            .find_overlapping_iter(path)
            .map(|found| found.pattern().as_usize())
            .collect();
        // A text may be there twice.
        found.sort_unstable();
        found.dedup();
        for bucket in found.into_iter().filter_map(|pattern| self.buckets.get(pattern)) {
            bucket.collect(head, lists);
        }
    }
}

// === impl Bucket ===

impl Bucket {
    fn insert(&mut self, position: u32, headers: &[HeaderMatcher]) {
        let Some((name, value)) = headers.iter().find_map(exact_value) else {
            self.plain.push(position);
            return;
        };
        let known = self.by_header.iter().position(|(known, _)| known == name);
        let at = known.unwrap_or_else(|| {
            self.by_header.push((name.clone(), Map::default()));
            self.by_header.len() - 1
        });
        if let Some((_, values)) = self.by_header.get_mut(at) {
            values.entry(value.as_bytes().into()).or_default().push(position);
        }
    }

    /// Takes the routes of another; whichever header sorted them there.
    fn absorb(&mut self, other: Self) {
        let sorted = other.by_header.into_iter().flat_map(|(_, values)| values.into_values());
        self.plain.extend(sorted.flatten().chain(other.plain));
        self.plain.sort_unstable();
    }

    fn collect<'a>(&'a self, head: &RequestHead, lists: &mut SmallVec<[&'a [u32]; 8]>) {
        if !self.plain.is_empty() {
            lists.push(&self.plain);
        }
        for (name, values) in &self.by_header {
            any_value(head, name, |value| {
                lists.extend(values.get(value).map(Vec::as_slice));
                false // each of several fields counts
            });
        }
    }
}

/// The header and value without which a matcher fails, where it asks for exactly one.
fn exact_value(matcher: &HeaderMatcher) -> Option<(&HeaderName, &str)> {
    match &matcher.how {
        HeaderMatch::String(string) if !matcher.invert && !matcher.treat_missing_as_empty && !string.ignores_case() => {
            match string.how() {
                StringMatch::Exact(value) => Some((&matcher.name, value)),
                _ => None,
            }
        }
        _ => None,
    }
}

/// The positions of several ascending lists, ascending.
struct InOrder<'a>(SmallVec<[&'a [u32]; 8]>);

impl Iterator for InOrder<'_> {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        let list = self
            .0
            .iter_mut()
            .filter(|list| !list.is_empty())
            .min_by_key(|list| list.first().copied())?;
        let (first, rest) = list.split_first()?;
        *list = rest;
        Some(*first)
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, HeaderValue, uri::PathAndQuery};
    use proptest::prelude::*;

    use cairn_exchange::{DynamicMetadata, Scheme};

    use super::{Arc, Facts, HeaderMatch, HeaderMatcher, HeaderName, PathMatch, RequestHead, Route, RouteIndex};
    use crate::{
        matcher::{PathMatcher, Regex, StringMatch, StringMatcher},
        route::{Forward, RouteAction, RouteMatch, Target},
    };

    fn a_path() -> impl Strategy<Value = String> {
        "/[aAb]{0,2}(/[ab]{0,2})?"
    }

    fn a_path_match() -> impl Strategy<Value = PathMatch> {
        let regexes = prop::sample::select(vec![
            "/a.*",
            "/[ab]+",
            "/(a|b)/?",
            ".*b",
            "/a|/b",
            "/ab?",
            "(?i)/a",
            "/a/b",
            "/[ab]+/ab.*",
            ".*/b",
            "/.?bb",
        ]);
        prop_oneof![
            a_path().prop_map(|path| PathMatch::Exact(path.into())),
            a_path().prop_map(|path| PathMatch::Prefix(path.into())),
            a_path().prop_map(|path| PathMatch::SeparatedPrefix(path.trim_end_matches('/').into())),
            regexes.prop_map(|pattern| PathMatch::Regex(Regex::new(pattern).unwrap())),
            Just(PathMatch::Connect),
        ]
    }

    fn a_header() -> impl Strategy<Value = HeaderMatcher> {
        let name = prop::sample::select(vec![":method", "x-a", "x-b"]);
        let value = prop::sample::select(vec!["GET", "1", "2", ""]);
        (name, value, any::<[bool; 4]>()).prop_map(|(name, value, [invert, missing, fold, present])| HeaderMatcher {
            name: HeaderName::parse(name).unwrap(),
            how: match present {
                true => HeaderMatch::Present(fold),
                false => HeaderMatch::String(StringMatcher::new(StringMatch::Exact(value.into()), fold)),
            },
            invert,
            treat_missing_as_empty: missing,
        })
    }

    fn a_route() -> impl Strategy<Value = Arc<Route>> {
        (a_path_match(), any::<bool>(), prop::collection::vec(a_header(), 0..3)).prop_map(|(path, fold, headers)| {
            let matches = RouteMatch {
                headers,
                ..RouteMatch::path(PathMatcher::new(path, fold))
            };
            let action = RouteAction::Forward(Box::new(Forward::to(Target::Cluster("c".into()))));
            Arc::new(Route::new(matches, action))
        })
    }

    fn a_request() -> impl Strategy<Value = RequestHead> {
        let method = prop::sample::select(vec!["GET", "POST", "CONNECT"]);
        let value = || prop::option::of(prop::sample::select(vec!["1", "2", ""]));
        (method, a_path(), value(), value(), value()).prop_map(|(method, path, a, more_a, b)| {
            let mut headers = HeaderMap::new();
            for (name, value) in [("x-a", a), ("x-a", more_a), ("x-b", b)] {
                value.map(|value| headers.append(name, HeaderValue::from_static(value)));
            }
            RequestHead {
                method: method.parse().unwrap(),
                path: PathAndQuery::try_from(path).unwrap(),
                authority: HeaderValue::from_static("web"),
                scheme: Scheme::Http,
                headers,
            }
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]
        #[test]
        fn the_index_finds_what_asking_every_route_finds(
            routes in prop::collection::vec(a_route(), 0..24),
            requests in prop::collection::vec(a_request(), 8),
        ) {
            let index = RouteIndex::new(&routes);
            for head in requests {
                let facts = Facts { random: 0, metadata: DynamicMetadata::NONE };
                let linear = routes.iter().position(|route| route.matches.matches(&head, facts));
                let indexed = index.find(&routes, &head, facts).and_then(|found| {
                    routes.iter().position(|route| Arc::ptr_eq(route, found))
                });
                prop_assert_eq!(indexed, linear, "{:?}", head);
                // What is told of each is what was decided of it.
                for route in &routes {
                    prop_assert_eq!(route.matches.misses(&head, facts).is_empty(), route.matches.matches(&head, facts));
                }
            }
        }
    }

    #[test]
    fn of_many_routes_only_a_few_are_asked() {
        let route = |path: PathMatch| {
            let action = RouteAction::Forward(Box::new(Forward::to(Target::Cluster("c".into()))));
            Arc::new(Route::new(RouteMatch::path(PathMatcher::new(path, false)), action))
        };
        let mut routes: Vec<_> = (0..5_000)
            .map(|n| route(PathMatch::Exact(format!("/exact/{n}").into())))
            .collect();
        routes.extend((0..5_000).map(|n| route(PathMatch::Prefix(format!("/prefix/{n:04}/").into()))));
        let index = RouteIndex::worthwhile(&routes).unwrap();
        let head = RequestHead {
            method: http::Method::GET,
            path: PathAndQuery::from_static("/prefix/4321/x"),
            authority: HeaderValue::from_static("web"),
            scheme: Scheme::Http,
            headers: HeaderMap::new(),
        };
        let mut lists = smallvec::SmallVec::new();
        index.strict.collect(head.path.path().as_bytes(), &head, &mut lists);
        assert_eq!(lists.as_slice(), [&[9_321][..]]);
        assert!(RouteIndex::worthwhile(&routes[..3]).is_none());
    }
}
