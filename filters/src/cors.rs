//! Cross-origin resource sharing (contract xds §3.7): preflights are answered, answers tell browsers who may read them.
//!
//! The chain's filter says nothing by itself; the policy stands on the route, and the decision is [`cairn_policy::cors`]'s.

use cairn_exchange::{Exchange, ResponseFlags};
use cairn_policy::cors::Cors;
use http::StatusCode;

use crate::{
    contract::{LocalReply, ResponseHead, Slot, Verdict},
    on_route::{RouteConfig, Scope},
};

pub(crate) fn decode_head(slot: &mut Slot, exchange: &Exchange, scope: &Scope<'_>) -> Verdict {
    let Some(forward) = scope.route.forward() else {
        return Verdict::Continue;
    };
    let policy = match scope.config() {
        Some(RouteConfig::Cors(policy)) => policy,
        _ => match &forward.cors {
            Some(policy) => policy,
            None => return Verdict::Continue,
        },
    };
    let Some(head) = &exchange.request else {
        return Verdict::Continue;
    };
    match policy.decide(&head.method, &head.headers, fastrand::u64(..)) {
        Cors::Pass => Verdict::Continue,
        Cors::Allow(allowed) => {
            *slot = Slot::Cors(Box::new(allowed));
            Verdict::Continue
        }
        Cors::Preflight(fields, allowed) => {
            if let Some(allowed) = allowed {
                *slot = Slot::Cors(Box::new(allowed));
            }
            let mut reply = LocalReply::new(StatusCode::OK, ResponseFlags::NONE, "cors_response", "");
            reply.as_it_is = true;
            // Each name occurs once.
            reply.headers = fields.into_iter().filter_map(|(name, value)| Some((name?, value))).collect();
            Verdict::Reply(reply)
        }
    }
}

pub(crate) fn encode_head(slot: &Slot, head: &mut ResponseHead) {
    if let Slot::Cors(allowed) = slot {
        allowed.write(&mut head.headers);
    }
}
