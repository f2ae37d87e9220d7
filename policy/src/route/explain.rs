//! Why a request takes the route that it takes: which stood before it, and what of them did not match.
//!
//! A plain walk over the routes in configuration's order, without the index; the tests prove that both find the same.

use std::sync::Arc;

use cairn_exchange::RequestHead;
use http::Method;

use super::{Facts, Found, Route, RouteMatch, RouteTable, VirtualHost};
use crate::{
    matcher::PathMatch,
    miss::{Fact, path_words},
};

/// How many routes that did not match are told; the first ones.
pub const MOST_PASSED_OVER: usize = 50;

/// The story of a route.
#[derive(Debug)]
pub struct RouteStory<'a> {
    /// The virtual host of the authority.
    pub host: Option<&'a Arc<VirtualHost>>,
    /// Routes that stood before and did not match; [`MOST_PASSED_OVER`] at most.
    pub passed_over: Vec<PassedOver<'a>>,
    /// How many more there were.
    pub more: usize,
    /// The route.
    pub found: Option<Found<'a>>,
}

/// A route that did not match.
#[derive(Debug)]
pub struct PassedOver<'a> {
    /// Its place in its virtual host, from 0.
    pub at: usize,
    /// The route.
    pub route: &'a Arc<Route>,
    /// What did not match.
    pub misses: Vec<Fact>,
}

impl RouteMatch {
    /// What of the match a request does not meet; nothing where it matches.
    pub fn misses(&self, head: &RequestHead, facts: Facts<'_>) -> Vec<Fact> {
        let Self {
            path,
            headers,
            query,
            metadata,
            grpc,
            fraction,
        } = self;
        let mut misses = Vec::new();
        let there = match (path.how(), &head.method) {
            (PathMatch::Connect, method) => *method == Method::CONNECT,
            (_, &Method::CONNECT) => false,
            _ => path.matched(head.path.path()).is_some(),
        };
        if !there {
            let found = match (path.how(), &head.method) {
                (PathMatch::Connect, method) => method.as_str(),
                (_, &Method::CONNECT) => "CONNECT",
                _ => head.path.path(),
            };
            misses.push(Fact::new("path", path_words(path), Some(found.into())));
        }
        let asked = headers.iter().filter(|matcher| !matcher.matches(head));
        misses.extend(asked.map(|matcher| Fact::header_of(matcher, head)));
        let given = head.path.query().unwrap_or_default();
        let asked = query.iter().filter(|matcher| !matcher.matches(given));
        misses.extend(asked.map(|matcher| Fact::query(matcher, given)));
        let asked = metadata.iter().filter(|matcher| !matcher.matches(facts.metadata));
        misses.extend(asked.map(|matcher| Fact::metadata(matcher, facts.metadata)));
        if *grpc && !head.is_grpc() {
            misses.push(Fact::new("content type", "gRPC", None));
        }
        if let Some(fraction) = fraction.filter(|fraction| !fraction.contains(facts.random)) {
            let wanted = format!("{} of {} requests", fraction.numerator, fraction.denominator);
            misses.push(Fact::new("chance", wanted, Some("another one".into())));
        }
        misses
    }
}

impl RouteTable {
    /// Why a request takes the route that [`RouteTable::find`] finds for it.
    pub fn explain(&self, head: &RequestHead, facts: Facts<'_>) -> RouteStory<'_> {
        let host = self.host_of(head).and_then(|at| self.hosts().get(at));
        let mut story = RouteStory {
            host,
            passed_over: Vec::new(),
            more: 0,
            found: None,
        };
        let Some(host) = host else { return story };
        for (at, route) in host.routes.iter().enumerate() {
            let misses = route.matches.misses(head, facts);
            if misses.is_empty() {
                story.found = Some(Found {
                    table: self,
                    host,
                    route,
                });
                return story;
            }
            if story.passed_over.len() < MOST_PASSED_OVER {
                story.passed_over.push(PassedOver { at, route, misses });
            } else {
                story.more += 1;
            }
        }
        story
    }
}
