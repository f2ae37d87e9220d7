//! What consistent hashing looks at.
//!
//! A policy names parts of a request; the bytes of the first parts found become the hash key. Hashing itself belongs to whoever
//! keeps rings and tables.

use std::time::Duration;

use crate::matcher::HeaderName;

/// One part of a hash key.
#[derive(Clone, Debug)]
pub struct HashPolicy {
    /// Where to look.
    pub source: HashSource,
    /// When this gives a value, later policies are not asked.
    pub terminal: bool,
}

/// Where a part of a hash key comes from.
#[derive(Clone, Debug)]
pub enum HashSource {
    /// A request header.
    Header(HeaderName),
    /// A cookie; made for the client when it is missing and `ttl` is given.
    Cookie {
        /// Its name.
        name: Box<str>,
        /// How long a made cookie lives.
        ttl: Option<CookieTtl>,
        /// Path of a made cookie.
        path: Box<str>,
        /// Other attributes of a made cookie, name and value.
        attributes: Vec<(Box<str>, Box<str>)>,
    },
    /// The client's address.
    SourceIp,
    /// A query parameter.
    Query(Box<str>),
    /// An object of filter state.
    FilterState(Box<str>),
}

/// How long a made cookie lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CookieTtl {
    /// As long as the client's session.
    Session,
    /// That long.
    For(Duration),
}
