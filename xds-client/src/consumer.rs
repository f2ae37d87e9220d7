//! What the client hands out, and what it wants back.
//!
//! A [`Consumer`] gives resources their meaning. For each answer of istiod it gets one [`Update`] and returns one [`Verdict`]:
//! accepted, or refused in words that istiod will log. With the verdict come its wishes: the names of dependent resources
//! that it wants from now on (endpoints of the clusters it has just read, say).
//!
//! [`Consumer::apply`] runs on a blocking thread of the runtime that the client runs on. It may take long: the connection stays
//! alive meanwhile, and the next answer waits in istiod's and the kernel's flow-controlled buffers.

use std::{borrow::Borrow, collections::BTreeSet, fmt, sync::Arc};

use bytes::Bytes;
use cairn_exchange::clock::Instant;

use crate::StreamError;

/// The type of a resource, as `type.googleapis.com/package.Message`. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TypeUrl(Arc<str>);

/// Which resources of a type are wanted when the client starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Interest {
    /// All that there are.
    Wildcard,
    /// These, and those that verdicts ask for. Nothing is asked of istiod while the set is empty, since a request without
    /// names would mean all of them (contract xds §1.9).
    Named(BTreeSet<String>),
}

/// One type that the client subscribes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subscription {
    /// The type.
    pub type_url: TypeUrl,
    /// Which resources of it.
    pub interest: Interest,
}

/// One resource that is new or was sent again (istiod re-sends much that has not changed).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changed {
    /// The name that the type's `removed` uses too.
    pub name: String,
    /// The server's version of this resource; empty where istiod versions nothing (all Envoy types).
    pub version: String,
    /// Other names under which it may have been asked for.
    pub aliases: Vec<String>,
    /// The type of the message in `bytes`: always the type of the answer.
    pub type_url: TypeUrl,
    /// The encoded message.
    pub bytes: Bytes,
}

/// One answer of istiod.
#[derive(Clone, Debug)]
pub struct Update {
    /// The type of everything in it.
    pub type_url: TypeUrl,
    /// istiod's name for the state that it pushed; for people and logs.
    pub system_version: String,
    /// What the ACK or NACK will refer to; for logs.
    pub nonce: String,
    /// New or re-sent resources, no name twice.
    pub changed: Vec<Changed>,
    /// Names that are gone, some of which the consumer may never have seen.
    pub removed: Vec<String>,
    /// When the last byte of the message had arrived.
    pub received: Instant,
    /// The size of the encoded message.
    pub bytes: usize,
}

/// What the consumer makes of an [`Update`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// `None` accepts. `Some` refuses: istiod shows these words (cut at 8 KiB) in its log and to `istioctl`.
    pub error: Option<String>,
    /// Changed needs for resources of other types.
    pub wishes: Vec<Wish>,
}

/// A change of the names wanted of a type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wish {
    /// From now on exactly these names.
    Exactly {
        /// The type that the names belong to.
        type_url: TypeUrl,
        /// All names that are wanted.
        names: BTreeSet<String>,
    },
    /// Some names more, some less; what is wanted already or not wanted anyway changes nothing.
    Change {
        /// The type that the names belong to.
        type_url: TypeUrl,
        /// Names wanted from now on.
        subscribe: BTreeSet<String>,
        /// Names no longer wanted.
        unsubscribe: BTreeSet<String>,
    },
}

/// Gives resources their meaning.
pub trait Consumer: Send + 'static {
    /// Takes over one answer. Called for one answer at a time, in the order of arrival. A panic is answered as a NACK.
    fn apply(&mut self, update: Update) -> Verdict;

    /// A stream is open: istiod has accepted the proxy. What was applied before stays valid. Must be short.
    fn connected(&mut self) {}

    /// The stream that [`connected`](Self::connected) announced is gone; another one will be opened. Must be short.
    fn disconnected(&mut self, reason: &StreamError) {
        let _ = reason;
    }
}

// === impl TypeUrl ===

impl TypeUrl {
    /// The whole URL.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The message's name without host and package, for log lines: `Cluster`.
    pub fn short(&self) -> &str {
        self.0.rsplit(['/', '.']).next().unwrap_or(&self.0)
    }
}

impl From<&str> for TypeUrl {
    fn from(url: &str) -> Self {
        Self(url.into())
    }
}

impl From<String> for TypeUrl {
    fn from(url: String) -> Self {
        Self(url.into())
    }
}

impl Borrow<str> for TypeUrl {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TypeUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

// === impl Subscription ===

impl Subscription {
    /// Everything of a type.
    pub fn wildcard(type_url: impl Into<TypeUrl>) -> Self {
        Self {
            type_url: type_url.into(),
            interest: Interest::Wildcard,
        }
    }

    /// Only what verdicts will ask for; here the type gets its place in the order of requests.
    pub fn by_name(type_url: impl Into<TypeUrl>) -> Self {
        Self {
            type_url: type_url.into(),
            interest: Interest::Named(BTreeSet::new()),
        }
    }
}

// === impl Verdict ===

impl Verdict {
    /// Accepted, and nothing else is wanted.
    pub fn accepted() -> Self {
        Self::default()
    }

    /// Refused in these words.
    pub fn refused(words: impl Into<String>) -> Self {
        Self {
            error: Some(words.into()),
            wishes: Vec::new(),
        }
    }
}

// === impl Wish ===

impl Wish {
    /// From now on exactly these names.
    pub fn exactly<S: Into<String>>(type_url: impl Into<TypeUrl>, names: impl IntoIterator<Item = S>) -> Self {
        Self::Exactly {
            type_url: type_url.into(),
            names: names.into_iter().map(Into::into).collect(),
        }
    }
}
