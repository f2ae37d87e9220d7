//! Edits of headers before anything else sees them (contract xds §3.3: the client's identity for applications).
//!
//! Mutations are made one after the other, in their order; what decides later sees the edited request.

use cairn_exchange::Exchange;
use cairn_policy::headers::{HeaderEdits, record_alone};

use crate::contract::ResponseHead;

/// Edits of requests and of their answers, each list in order.
#[derive(Clone, Debug, Default)]
pub struct HeaderMutation {
    /// Of requests.
    pub request: Vec<HeaderEdits>,
    /// Of answers.
    pub response: Vec<HeaderEdits>,
}

/// The request's head is there.
pub fn decode_head(mutation: &HeaderMutation, exchange: &mut Exchange) {
    for edits in &mutation.request {
        edits.apply_to_request(exchange, &record_alone);
    }
}

/// The answer's head is there.
pub fn encode_head(mutation: &HeaderMutation, exchange: &Exchange, head: &mut ResponseHead) {
    for edits in &mutation.response {
        edits.apply_to_response(&mut head.headers, exchange, &record_alone);
    }
}
