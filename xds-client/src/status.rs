//! How the stream fares, for readiness, metrics and the admin pages.
//!
//! [`Status`] is a handle that any thread may ask for a [`StatusSnapshot`], or wait on until the facts are as wished; the client is
//! the only writer. Readiness reads [`TypeStatus::acked`]: a type is in when its first answer was taken over.

use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

use cairn_exchange::clock;
use tokio::sync::watch;

use crate::{StreamError, consumer::TypeUrl, state::bounded};

/// A shared view of one client.
#[derive(Clone, Debug, Default)]
pub struct Status(Arc<watch::Sender<StatusSnapshot>>);

/// The facts at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StatusSnapshot {
    /// Since when the present stream is open; `None` while there is none.
    pub connected_since: Option<SystemTime>,
    /// Streams that istiod has accepted.
    pub streams: u64,
    /// Attempts that led to no stream.
    pub failed_attempts: u64,
    /// Why the last attempt failed or the last stream ended.
    pub last_error: Option<String>,
    /// Answers of types that were not requested.
    pub unrequested: u64,
    /// By type; a type is here from its first answer on.
    pub types: BTreeMap<TypeUrl, TypeStatus>,
}

/// One type's facts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TypeStatus {
    /// The nonce of the last answer.
    pub last_nonce: String,
    /// istiod's name for the state of the last answer.
    pub last_system_version: String,
    /// Answers received.
    pub responses: u64,
    /// Answers accepted.
    pub acked: u64,
    /// Answers refused.
    pub nacked: u64,
    /// The words of the last refusal, until an answer is accepted.
    pub last_nack: Option<String>,
    /// Bytes of all answers.
    pub bytes: u64,
    /// When the last verdict was given.
    pub last_update: Option<SystemTime>,
}

// === impl Status ===

impl Status {
    /// The facts now.
    pub fn snapshot(&self) -> StatusSnapshot {
        self.0.borrow().clone()
    }

    /// Waits until `wished` holds, which it may already.
    pub async fn until(&self, wished: impl FnMut(&StatusSnapshot) -> bool) {
        // An error would mean that the sender is gone, which is in `self`.
        let _ = self.0.subscribe().wait_for(wished).await;
    }

    pub(crate) fn opened(&self) {
        self.0.send_modify(|inner| {
            inner.connected_since = Some(clock::wall());
            inner.streams += 1;
        });
    }

    pub(crate) fn ended(&self, reason: &StreamError) {
        self.0.send_modify(|inner| {
            if inner.connected_since.take().is_none() {
                inner.failed_attempts += 1;
            }
            inner.last_error = Some(bounded(&reason.to_string()));
        });
    }

    pub(crate) fn unrequested(&self) {
        self.0.send_modify(|inner| inner.unrequested += 1);
    }

    pub(crate) fn received(&self, url: &TypeUrl, nonce: &str, system_version: &str, bytes: usize) {
        self.0.send_modify(|inner| {
            let kind = inner.types.entry(url.clone()).or_default();
            kind.responses += 1;
            kind.bytes = kind.bytes.saturating_add(u64::try_from(bytes).unwrap_or(u64::MAX));
            nonce.clone_into(&mut kind.last_nonce);
            system_version.clone_into(&mut kind.last_system_version);
        });
    }

    pub(crate) fn settled(&self, url: &TypeUrl, error: Option<&str>) {
        self.0.send_modify(|inner| {
            let kind = inner.types.entry(url.clone()).or_default();
            match error {
                None => kind.acked += 1,
                Some(_) => kind.nacked += 1,
            }
            kind.last_nack = error.map(bounded);
            kind.last_update = Some(clock::wall());
        });
    }
}
