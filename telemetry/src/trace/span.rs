//! A finished span.

use std::{
    borrow::Cow,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::Context;

/// Which side of a call a span tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpanKind {
    /// A request that came in.
    Server,
    /// One that was sent on.
    Client,
}

/// What is told of a request, or of one attempt to send it on.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// Its ids.
    pub context: Context,
    /// Whether the span around it is another process's.
    pub remote_parent: bool,
    /// What other systems have noted.
    pub state: Option<Box<str>>,
    /// Its name.
    pub name: Box<str>,
    /// Which side.
    pub kind: SpanKind,
    /// When it began.
    pub start: SystemTime,
    /// How long it took.
    pub took: Duration,
    /// Facts, in the order in which they were told; a name is told once.
    pub tags: Vec<(Cow<'static, str>, String)>,
    /// Moments in between.
    pub events: Vec<Event>,
    /// Whether it counts as failed.
    pub failed: bool,
}

/// A moment in a span.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// When.
    pub at: SystemTime,
    /// What.
    pub name: &'static str,
}

// === impl Span ===

impl Span {
    /// Tells a fact; one of the same name is replaced.
    pub fn tag(&mut self, name: impl Into<Cow<'static, str>>, value: impl Into<String>) {
        let (name, value) = (name.into(), value.into());
        match self.tags.iter_mut().find(|(known, _)| *known == name) {
            Some((_, known)) => *known = value,
            None => self.tags.push((name, value)),
        }
    }

    /// When it ended.
    pub fn end(&self) -> SystemTime {
        self.start + self.took
    }
}

/// Time since 1970.
pub(super) fn since_epoch(time: SystemTime) -> Duration {
    time.duration_since(UNIX_EPOCH).unwrap_or_default()
}
