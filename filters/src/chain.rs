//! The filters of a chain, and their run over one request.

use std::sync::Arc;

use bytes::Bytes;
use cairn_exchange::Exchange;
use cairn_policy::rbac::Rbac;
use http::HeaderMap;
use smallvec::SmallVec;

use crate::{
    contract::{BodyNeed, HttpFilter, Needs, ResponseHead, Slot, Verdict},
    grpc_stats,
    header_mutation::{self, HeaderMutation},
    rbac,
};

/// One configured filter. What is built in is called without indirection.
#[derive(Clone, Debug)]
pub enum Filter {
    /// Counts gRPC messages.
    GrpcStats,
    /// Denies by policy.
    Rbac(Arc<Rbac>),
    /// Edits headers.
    HeaderMutation(Arc<HeaderMutation>),
    /// Any other.
    Other(Arc<dyn HttpFilter>),
}

/// The filters of one chain, in the order of the configuration, without the router.
#[derive(Clone, Debug, Default)]
pub struct FilterChain {
    filters: Vec<Filter>,
    needs: Needs,
}

/// The run of a chain's filters over one request: which have been called, and what each keeps.
#[derive(Debug, Default)]
pub struct Run {
    slots: SmallVec<[Slot; 4]>,
    /// Filters whose `decode_head` has been called: those take part in the answer.
    entered: usize,
    /// A filter that buffers and is waiting for the whole body.
    waiting_for_body: bool,
}

// === impl Filter ===

impl Filter {
    /// Its name in the configuration.
    pub fn name(&self) -> &str {
        match self {
            Filter::GrpcStats => "envoy.filters.http.grpc_stats",
            Filter::Rbac(_) => "envoy.filters.http.rbac",
            Filter::HeaderMutation(_) => "envoy.filters.http.header_mutation",
            Filter::Other(filter) => filter.name(),
        }
    }

    fn needs(&self) -> Needs {
        match self {
            Filter::GrpcStats => grpc_stats::NEEDS,
            Filter::Rbac(_) | Filter::HeaderMutation(_) => Needs::default(),
            Filter::Other(filter) => filter.needs(),
        }
    }
}

// === impl FilterChain ===

impl FilterChain {
    /// A chain of these filters.
    pub fn new(filters: Vec<Filter>) -> Self {
        let mut needs = Needs::default();
        for filter in &filters {
            let of_filter = filter.needs();
            needs.observe_response |= of_filter.observe_response;
            needs.request = match (needs.request, of_filter.request) {
                (BodyNeed::Whole { limit: a }, BodyNeed::Whole { limit: b }) => BodyNeed::Whole { limit: a.min(b) },
                (whole @ BodyNeed::Whole { .. }, _) | (_, whole @ BodyNeed::Whole { .. }) => whole,
                (BodyNeed::Observe, _) | (_, BodyNeed::Observe) => BodyNeed::Observe,
                _ => BodyNeed::Nothing,
            };
        }
        Self { filters, needs }
    }

    /// The filters, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Filter> {
        self.filters.iter()
    }

    /// Names of the filters, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.filters.iter().map(Filter::name)
    }

    /// What the filters need of bodies, all together.
    pub fn needs(&self) -> Needs {
        self.needs
    }

    /// Whether there is no filter.
    pub fn is_empty(&self) -> bool {
        self.filters.is_empty()
    }

    /// The request's head is there: calls the filters that have not been called, in order, until one stops, replies or wants the
    /// whole body. Call it again until [`Self::is_done`]: after a [`Verdict::Stop`] whose resumption says [`Verdict::Continue`], and
    /// after [`Self::decode_whole_body`].
    pub fn decode_head(&self, run: &mut Run, exchange: &mut Exchange) -> Verdict {
        while let Some(filter) = self.filters.get(run.entered) {
            if run.waiting_for_body {
                return Verdict::Continue;
            }
            run.slots.push(Slot::Empty);
            let slot = run.slots.last_mut();
            run.entered += 1;
            run.waiting_for_body = matches!(filter.needs().request, BodyNeed::Whole { .. });
            let Some(slot) = slot else { continue };
            let verdict = match filter {
                Filter::GrpcStats => grpc_stats::decode_head(slot, exchange),
                Filter::Rbac(rbac) => rbac::decode_head(rbac, exchange),
                Filter::HeaderMutation(mutation) => {
                    header_mutation::decode_head(mutation, exchange);
                    Verdict::Continue
                }
                Filter::Other(filter) => filter.decode_head(slot, exchange),
            };
            if !matches!(verdict, Verdict::Continue) {
                return verdict;
            }
        }
        Verdict::Continue
    }

    /// Whether every filter has let the request's head, and where it wanted it the body, pass.
    pub fn is_done(&self, run: &Run) -> bool {
        run.entered >= self.filters.len() && !run.waiting_for_body
    }

    /// Whether a filter has to see the whole body before the request can go on.
    pub fn wants_whole_body(&self, run: &Run) -> Option<usize> {
        match self.filters.get(run.entered.checked_sub(1)?)?.needs().request {
            BodyNeed::Whole { limit } if run.waiting_for_body => Some(limit),
            _ => None,
        }
    }

    /// The whole body is there: hands it to the filter that waits for it. Call [`Self::decode_head`] again afterwards.
    pub fn decode_whole_body(&self, run: &mut Run, exchange: &mut Exchange, body: &mut Bytes) -> Verdict {
        run.waiting_for_body = false;
        let at = run.entered.saturating_sub(1);
        match (self.filters.get(at), run.slots.get_mut(at)) {
            (Some(Filter::Other(filter)), Some(slot)) => filter.decode_body(slot, exchange, body),
            _ => Verdict::Continue,
        }
    }

    /// Whether a filter of this run watches the request's body as it passes.
    pub fn watches_request(&self, run: &Run) -> bool {
        self.filters.iter().zip(&run.slots).any(|(filter, slot)| match filter {
            Filter::GrpcStats => matches!(slot, Slot::GrpcStats(_)),
            Filter::Rbac(_) | Filter::HeaderMutation(_) => false,
            Filter::Other(filter) => filter.needs().request == BodyNeed::Observe,
        })
    }

    /// A piece of the request's body passes to those filters that watch it.
    pub fn decode_data(&self, run: &mut Run, data: &mut Bytes, end: bool) {
        for (filter, slot) in self.filters.iter().zip(&mut run.slots) {
            match filter {
                Filter::GrpcStats => grpc_stats::decode_data(slot, data),
                Filter::Other(filter) if filter.needs().request == BodyNeed::Observe => filter.decode_data(slot, data, end),
                Filter::Rbac(_) | Filter::HeaderMutation(_) | Filter::Other(_) => {}
            }
        }
    }

    /// The request's trailers.
    pub fn decode_trailers(&self, run: &mut Run, trailers: &mut HeaderMap) {
        for (filter, slot) in self.filters.iter().zip(&mut run.slots) {
            if let Filter::Other(filter) = filter {
                filter.decode_trailers(slot, trailers);
            }
        }
    }

    /// The head of the answer, from upstream or of a local reply: the filters that ran, in reverse order.
    pub fn encode_head(&self, run: &mut Run, exchange: &mut Exchange, head: &mut ResponseHead) {
        for (filter, slot) in self.filters.iter().zip(&mut run.slots).rev() {
            match filter {
                Filter::GrpcStats => grpc_stats::encode_head(slot, head),
                Filter::Rbac(_) => {}
                Filter::HeaderMutation(mutation) => header_mutation::encode_head(mutation, exchange, head),
                Filter::Other(filter) => filter.encode_head(slot, exchange, head),
            }
        }
    }

    /// A piece of the answer's body.
    pub fn encode_data(&self, run: &mut Run, data: &mut Bytes, end: bool) {
        for (filter, slot) in self.filters.iter().zip(&mut run.slots).rev() {
            match filter {
                Filter::GrpcStats => grpc_stats::encode_data(slot, data),
                Filter::Rbac(_) | Filter::HeaderMutation(_) => {}
                Filter::Other(filter) => filter.encode_data(slot, data, end),
            }
        }
    }

    /// The answer's trailers.
    pub fn encode_trailers(&self, run: &mut Run, trailers: &mut HeaderMap) {
        for (filter, slot) in self.filters.iter().zip(&mut run.slots).rev() {
            if let Filter::Other(filter) = filter {
                filter.encode_trailers(slot, trailers);
            }
        }
    }

    /// The exchange is over.
    pub fn finish(&self, run: &mut Run, exchange: &mut Exchange) {
        for (filter, slot) in self.filters.iter().zip(&mut run.slots) {
            match filter {
                Filter::GrpcStats => grpc_stats::finish(slot, exchange),
                Filter::Rbac(_) | Filter::HeaderMutation(_) => {}
                Filter::Other(filter) => filter.finish(slot, exchange),
            }
        }
    }
}
