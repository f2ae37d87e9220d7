//! Who may connect: the policies of a TCP chain and the authorizers that it asks, in the order of its filters.
//!
//! All of it is decided before the destination is connected. A chain without authorizers waits for nothing.

use std::sync::Arc;

use cairn_exchange::Exchange;
use cairn_policy::rbac::Denied;

use super::{Inner, ask};
use crate::snapshot::{Snapshot, TcpChain};

/// What a client is told whose connection an authorizer does not let pass.
const NOT_AUTHORIZED: &str = "external authorization: access denied";

/// Decides about a connection; an error says why it may not be, in Envoy's words, and stands in the record too.
pub async fn connection(inner: &Inner, snapshot: &Arc<Snapshot>, tcp: &TcpChain, exchange: &mut Exchange) -> Result<(), String> {
    let mut decided = 0;
    for authorizer in &tcp.authorizers {
        policies(tcp, decided, authorizer.after, exchange)?;
        decided = authorizer.after;
        let services = ask::FromRequest::new(inner, snapshot);
        let answer = Box::pin(authorizer.decide(exchange, &services)).await;
        answer.map_err(|refused| refused.0.to_owned())?;
    }
    policies(tcp, decided, usize::MAX, exchange)
}

/// Decides by some of the chain's policies.
fn policies(tcp: &TcpChain, from: usize, to: usize, exchange: &mut Exchange) -> Result<(), String> {
    tcp.rbac.check_from(from, to, exchange).map_err(|denied| {
        let why = denied.details();
        exchange.termination_details = Some(why.clone().into());
        why
    })
}

/// The text for a client that is denied for this reason: not which policy it was.
pub fn answer_of(why: &str) -> &'static str {
    if why.starts_with("ext_authz") {
        NOT_AUTHORIZED
    } else {
        Denied::ANSWER
    }
}
