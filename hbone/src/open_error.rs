//! Why a stream could not be opened, in words for people and as facts for decisions.
//!
//! The variants say how far an open came: no connection (nothing reached the destination), a connection without an answer, or an
//! answer that refuses. Only the first is a connect failure in the sense of Envoy's retry conditions.

use std::{fmt, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use h2::Reason;
use http::{HeaderMap, StatusCode};

use crate::dial::DialError;

/// Why a stream could not be opened.
#[derive(Clone, Debug, thiserror::Error)]
pub enum OpenError {
    /// The connection could not be made.
    #[error("tunnel to {address}: {source}")]
    Dial {
        /// The destination.
        address: SocketAddr,
        /// What went wrong; shared by all who waited for the same dial.
        source: Arc<DialError>,
    },
    /// No connection in time.
    #[error("tunnel to {address}: no connection within {after:?}")]
    ConnectTimeout {
        /// The destination.
        address: SocketAddr,
        /// The limit.
        after: Duration,
    },
    /// No answer to the CONNECT in time.
    #[error("tunnel to {address}: the CONNECT was not answered within {after:?}")]
    AnswerTimeout {
        /// The destination.
        address: SocketAddr,
        /// The limit.
        after: Duration,
    },
    /// The destination answered with another status than 2xx.
    #[error("tunnel to {address}: the CONNECT was answered {status}{}", Snippet(.body))]
    Refused {
        /// The destination.
        address: SocketAddr,
        /// Its answer.
        status: StatusCode,
        /// The headers of its answer.
        headers: Box<HeaderMap>,
        /// The beginning of the answer's body, at most 1 KiB.
        body: Bytes,
    },
    /// The destination reset the stream instead of answering.
    #[error("tunnel to {address}: the CONNECT was reset ({reason})")]
    Reset {
        /// The destination.
        address: SocketAddr,
        /// The code of the RST_STREAM.
        reason: Reason,
    },
    /// The connection ended before the answer.
    #[error("tunnel to {address}: the connection ended before the CONNECT was answered: {why}")]
    Closed {
        /// The destination.
        address: SocketAddr,
        /// As the connection told it; a TLS alert about our certificate arrives this way too.
        why: String,
    },
    /// Too many wait already.
    #[error("tunnel to {address}: {limit} others wait for a connection already")]
    Overflow {
        /// The destination.
        address: SocketAddr,
        /// The limit.
        limit: u32,
    },
    /// The authority or a header cannot be sent.
    #[error("the CONNECT cannot be sent: {0}")]
    Invalid(String),
}

/// What a caller decides by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenErrorKind {
    /// TCP refused or unreachable.
    ConnectFailure,
    /// No connection in time.
    ConnectTimeout,
    /// TLS failed, or its terms are not there yet.
    Tls,
    /// Connected, but no answer in time.
    AnswerTimeout,
    /// Answered with a status that refuses.
    Refused,
    /// The stream was reset.
    Reset,
    /// The connection ended.
    Closed,
    /// A limit on this side.
    Overflow,
    /// The request is unusable.
    Invalid,
}

/// The text of a refusal, after a colon, if there is one.
struct Snippet<'a>(&'a [u8]);

// === impl OpenError ===

impl OpenError {
    /// What happened, for decisions.
    pub fn kind(&self) -> OpenErrorKind {
        match self {
            Self::Dial { source, .. } => match **source {
                DialError::Connect(_) => OpenErrorKind::ConnectFailure,
                DialError::Tls(_) | DialError::Alpn(_) | DialError::Identity(_) | DialError::NotReady(_) => OpenErrorKind::Tls,
            },
            Self::ConnectTimeout { .. } => OpenErrorKind::ConnectTimeout,
            Self::AnswerTimeout { .. } => OpenErrorKind::AnswerTimeout,
            Self::Refused { .. } => OpenErrorKind::Refused,
            Self::Reset { .. } => OpenErrorKind::Reset,
            Self::Closed { .. } => OpenErrorKind::Closed,
            Self::Overflow { .. } => OpenErrorKind::Overflow,
            Self::Invalid(_) => OpenErrorKind::Invalid,
        }
    }

    /// Whether no connection came about: what Envoy's `connect-failure` retries.
    pub fn is_connect_failure(&self) -> bool {
        matches!(
            self.kind(),
            OpenErrorKind::ConnectFailure | OpenErrorKind::ConnectTimeout | OpenErrorKind::Tls
        )
    }

    /// The status that the destination answered with, if it answered.
    pub fn status(&self) -> Option<StatusCode> {
        match self {
            Self::Refused { status, .. } => Some(*status),
            _ => None,
        }
    }
}

impl fmt::Display for Snippet<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return Ok(());
        }
        write!(f, ": {}", self.0.escape_ascii())
    }
}
