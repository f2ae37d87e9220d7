//! What an authorizer may say.
//!
//! Names and values are as it wrote them: whether they can stand in a head is found out when they are to be written there.

use bytes::Bytes;
use http::StatusCode;
use serde_json::Value;

/// An answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// What becomes of the request.
    pub decision: Decision,
    /// What is noted of it, for filters behind this one and for logs.
    pub notes: Vec<(String, Value)>,
}

/// What becomes of a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Decision {
    /// It goes on, edited.
    Allowed(Box<Allowed>),
    /// It is answered with this.
    Denied(Denied),
    /// The authorizer could not decide; where that denies requests they are answered with this.
    Failed(Denied),
}

/// Edits of a request that is allowed, and of its answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Allowed {
    /// Headers of the request.
    pub request: Vec<Edit>,
    /// Headers that are removed from it.
    pub remove: Vec<String>,
    /// Parameters of its query: name and value.
    pub set_parameters: Vec<(String, String)>,
    /// Parameters that are removed.
    pub remove_parameters: Vec<String>,
    /// Headers of the answer.
    pub response: Vec<Edit>,
}

/// What a denied request is answered with.
#[derive(Clone, Debug, PartialEq)]
pub struct Denied {
    /// Status.
    pub status: StatusCode,
    /// Fields.
    pub headers: Vec<Edit>,
    /// Text.
    pub body: Bytes,
}

/// An edit of one header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edit {
    /// Its name; a request's pseudo-headers are written like others.
    pub name: String,
    /// The value.
    pub value: Vec<u8>,
    /// What becomes of fields of the same name.
    pub how: How,
}

/// What becomes of fields of the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// They are replaced.
    Set,
    /// One more.
    Add,
    /// One more, where there is one; else nothing happens.
    AppendIfThere,
    /// They stay, and nothing happens; else it is added.
    AddIfAbsent,
    /// They are replaced, where there is one; else nothing happens.
    ReplaceIfThere,
}

// === impl Edit ===

impl Edit {
    /// An edit.
    pub fn new(name: impl Into<String>, value: impl Into<Vec<u8>>, how: How) -> Self {
        Self {
            name: name.into(),
            value: value.into(),
            how,
        }
    }
}
