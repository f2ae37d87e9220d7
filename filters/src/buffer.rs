//! Requests that go on only when all of their body is there, and are refused when it is too long.
//!
//! The pipeline reads the body; here is only how much, and that the backend is told its length.

use bytes::Bytes;
use cairn_exchange::Exchange;
use http::{HeaderValue, header};

use crate::{
    contract::{BodyNeed, HttpFilter, Needs, Slot, Verdict},
    on_route::{RouteConfig, Scope},
};

/// The filter.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// Most bytes of a body.
    pub limit: usize,
}

// === impl Buffer ===

impl HttpFilter for Buffer {
    fn name(&self) -> &str {
        "envoy.filters.http.buffer"
    }

    fn needs(&self) -> Needs {
        Needs {
            request: BodyNeed::Whole { limit: self.limit },
            observe_response: false,
        }
    }

    fn decode_head(&self, slot: &mut Slot, _: &mut Exchange, scope: &Scope<'_>) -> Verdict {
        let limit = match scope.config() {
            Some(RouteConfig::Buffer(limit)) => *limit,
            _ => Some(self.limit),
        };
        *slot = Slot::Other(Box::new(limit));
        Verdict::Continue
    }

    fn whole_body(&self, slot: &Slot) -> Option<usize> {
        match slot {
            Slot::Other(limit) => *limit.downcast_ref::<Option<usize>>()?,
            _ => None,
        }
    }

    fn decode_body(&self, _: &mut Slot, exchange: &mut Exchange, body: &mut Bytes) -> Verdict {
        if let Some(head) = exchange.request.as_mut().filter(|_| !body.is_empty())
            && !head.headers.contains_key(header::CONTENT_LENGTH)
        {
            head.headers.remove(header::TRANSFER_ENCODING);
            head.headers.insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
        }
        Verdict::Continue
    }
}
