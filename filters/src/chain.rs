//! The filters of a chain, and their run over one request.

use std::sync::Arc;

use bytes::Bytes;
use cairn_exchange::Exchange;
use cairn_policy::rbac::Rbac;
use http::HeaderMap;
use smallvec::SmallVec;

use crate::{
    contract::{BodyNeed, BodyRefusal, BodyStart, HttpFilter, Needs, ResponseHead, Slot, Verdict},
    cors,
    fault::Fault,
    grpc_stats,
    header_mutation::{self, HeaderMutation},
    on_route::{OnRoute, Scope},
    rbac,
    services::Services,
};

/// One filter. What most chains have is called without indirection.
#[derive(Clone, Debug)]
pub enum Filter {
    /// Counts gRPC messages.
    GrpcStats,
    /// Denies by policy.
    Rbac(Arc<Rbac>),
    /// Edits headers.
    HeaderMutation(Arc<HeaderMutation>),
    /// Puts faults in.
    Fault(Arc<Fault>),
    /// Lets other origins call.
    Cors,
    /// Any other.
    Other(Arc<dyn HttpFilter>),
}

/// A filter in its place in a chain.
#[derive(Clone, Debug)]
pub struct Placed {
    /// Its name in the configuration, by which routes speak of it.
    pub name: Arc<str>,
    /// The filter.
    pub filter: Filter,
    /// It runs only where a route turns it on.
    pub off: bool,
}

/// The filters of one chain, in the order of the configuration, without the router.
#[derive(Clone, Debug, Default)]
pub struct FilterChain {
    filters: Vec<Placed>,
    needs: Needs,
    slows: bool,
}

/// The run of a chain's filters over one request: which have been called, and what each keeps.
#[derive(Debug, Default)]
pub struct Run {
    slots: SmallVec<[Slot; 4]>,
    /// Filters whose `decode_head` has been called: those take part in the answer.
    entered: usize,
    /// A filter that buffers is waiting for the whole body, of so many bytes at most.
    waiting_for_body: Option<usize>,
    /// A filter is waiting for the beginning of the body.
    waiting_for_start: Option<BodyStart>,
}

// === impl Filter ===

impl Filter {
    /// Its usual name in the configuration.
    pub fn name(&self) -> &str {
        match self {
            Filter::GrpcStats => "envoy.filters.http.grpc_stats",
            Filter::Rbac(_) => "envoy.filters.http.rbac",
            Filter::HeaderMutation(_) => "envoy.filters.http.header_mutation",
            Filter::Fault(_) => "envoy.filters.http.fault",
            Filter::Cors => "envoy.filters.http.cors",
            Filter::Other(filter) => filter.name(),
        }
    }

    fn needs(&self) -> Needs {
        match self {
            Filter::GrpcStats => grpc_stats::NEEDS,
            Filter::HeaderMutation(mutation) => mutation.needs(),
            Filter::Rbac(_) | Filter::Fault(_) | Filter::Cors => Needs::default(),
            Filter::Other(filter) => filter.needs(),
        }
    }
}

// === impl Placed ===

impl From<Filter> for Placed {
    /// Under its usual name.
    fn from(filter: Filter) -> Self {
        Self {
            name: filter.name().into(),
            filter,
            off: false,
        }
    }
}

// === impl FilterChain ===

impl FilterChain {
    /// A chain of these filters, each under its usual name.
    pub fn new(filters: Vec<Filter>) -> Self {
        Self::of(filters.into_iter().map(Placed::from).collect())
    }

    /// A chain of these filters.
    pub fn of(filters: Vec<Placed>) -> Self {
        let mut needs = Needs::default();
        for placed in &filters {
            let of_filter = placed.filter.needs();
            needs.observe_response |= of_filter.observe_response;
            needs.request = match (needs.request, of_filter.request) {
                (BodyNeed::Whole { limit: a }, BodyNeed::Whole { limit: b }) => BodyNeed::Whole { limit: a.min(b) },
                (whole @ BodyNeed::Whole { .. }, _) | (_, whole @ BodyNeed::Whole { .. }) => whole,
                (BodyNeed::Observe, _) | (_, BodyNeed::Observe) => BodyNeed::Observe,
                _ => BodyNeed::Nothing,
            };
        }
        let slows = filters.iter().any(|placed| matches!(placed.filter, Filter::Fault(_)));
        Self { filters, needs, slows }
    }

    /// The filters, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Filter> {
        self.filters.iter().map(|placed| &placed.filter)
    }

    /// The filters in their places, in order.
    pub fn placed(&self) -> &[Placed] {
        &self.filters
    }

    /// Names of the filters, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.filters.iter().map(|placed| &*placed.name)
    }

    /// What the filters need of bodies, all together.
    pub fn needs(&self) -> Needs {
        self.needs
    }

    /// Whether there is no filter.
    pub fn is_empty(&self) -> bool {
        self.filters.is_empty()
    }

    /// The request's head is there: calls the filters that have not been called, in order, until one stops, replies, wants the whole
    /// body or has the route chosen again. Call it again until [`Self::is_done`]: after a [`Verdict::Stop`] whose resumption says
    /// [`Verdict::Continue`], after [`Self::decode_whole_body`] and [`Self::decode_body_start`], and with the new route.
    pub fn decode_head(&self, run: &mut Run, exchange: &mut Exchange, route: &OnRoute<'_>, services: &dyn Services) -> Verdict {
        while let Some(placed) = self.filters.get(run.entered) {
            if run.waiting_for_body.is_some() || run.waiting_for_start.is_some() || exchange.reroute {
                return Verdict::Continue;
            }
            run.entered += 1;
            if route.disabled(&placed.name).unwrap_or(placed.off) {
                run.slots.push(Slot::Off);
                continue;
            }
            run.slots.push(Slot::Empty);
            let Some(slot) = run.slots.last_mut() else { continue };
            let scope = Scope {
                filter: &placed.name,
                route,
                services,
            };
            let verdict = match &placed.filter {
                Filter::GrpcStats => grpc_stats::decode_head(slot, exchange),
                Filter::Rbac(rbac) => rbac::decode_head(rbac, exchange, &scope),
                Filter::HeaderMutation(mutation) => {
                    header_mutation::decode_head(mutation, slot, exchange, &scope);
                    Verdict::Continue
                }
                Filter::Fault(fault) => fault.decode_head(slot, exchange, &scope),
                Filter::Cors => cors::decode_head(slot, exchange, &scope),
                Filter::Other(filter) => {
                    let verdict = filter.decode_head(slot, exchange, &scope);
                    run.waiting_for_body = filter.whole_body(slot);
                    run.waiting_for_start = filter.body_start(slot);
                    verdict
                }
            };
            if !matches!(verdict, Verdict::Continue) {
                return verdict;
            }
        }
        Verdict::Continue
    }

    /// Why the rules of this chain would deny a request that has passed before; other filters are not asked again.
    pub fn denies(&self, exchange: &mut Exchange, route: &OnRoute<'_>, services: &dyn Services) -> Option<String> {
        self.filters.iter().find_map(|placed| {
            let Filter::Rbac(rbac) = &placed.filter else { return None };
            if route.disabled(&placed.name).unwrap_or(placed.off) {
                return None;
            }
            let scope = Scope {
                filter: &placed.name,
                route,
                services,
            };
            match rbac::decode_head(rbac, exchange, &scope) {
                Verdict::Reply(reply) => Some(reply.details.into_owned()),
                Verdict::Continue | Verdict::Stop(_) => None,
            }
        })
    }

    /// Whether every filter has let the request's head, and where it wanted it the body, pass.
    pub fn is_done(&self, run: &Run) -> bool {
        run.entered >= self.filters.len() && run.waiting_for_body.is_none() && run.waiting_for_start.is_none()
    }

    /// Whether a filter has to see the whole body before the request can go on, and how much of it at most.
    pub fn wants_whole_body(&self, run: &Run) -> Option<usize> {
        run.waiting_for_body
    }

    /// The whole body is there: hands it to the filter that waits for it. Call [`Self::decode_head`] again afterwards.
    pub fn decode_whole_body(&self, run: &mut Run, exchange: &mut Exchange, body: &mut Bytes) -> Verdict {
        run.waiting_for_body = None;
        let at = run.entered.saturating_sub(1);
        match (self.filters.get(at).map(|placed| &placed.filter), run.slots.get_mut(at)) {
            (Some(Filter::Other(filter)), Some(slot)) => filter.decode_body(slot, exchange, body),
            _ => Verdict::Continue,
        }
    }

    /// Whether a filter has to see the beginning of the body before the request can go on.
    pub fn wants_body_start(&self, run: &Run) -> Option<BodyStart> {
        run.waiting_for_start
    }

    /// The beginning of the body is there: hands it to the filter that waits for it. Call [`Self::decode_head`] again afterwards.
    pub fn decode_body_start(
        &self,
        run: &mut Run,
        exchange: &mut Exchange,
        route: &OnRoute<'_>,
        services: &dyn Services,
        start: (&Bytes, bool),
    ) -> Verdict {
        run.waiting_for_start = None;
        let at = run.entered.saturating_sub(1);
        let (Some(placed), Some(slot)) = (self.filters.get(at), run.slots.get_mut(at)) else {
            return Verdict::Continue;
        };
        let scope = Scope {
            filter: &placed.name,
            route,
            services,
        };
        match &placed.filter {
            Filter::Other(filter) => filter.decode_body_start(slot, exchange, &scope, start.0, start.1),
            _ => Verdict::Continue,
        }
    }

    /// Whether a filter of this run watches the request's body as it passes.
    pub fn watches_request(&self, run: &Run) -> bool {
        self.filters
            .iter()
            .map(|placed| &placed.filter)
            .zip(&run.slots)
            .any(|(filter, slot)| match filter {
                Filter::GrpcStats => matches!(slot, Slot::GrpcStats(_)),
                Filter::HeaderMutation(mutation) => header_mutation::watches(mutation, slot),
                Filter::Rbac(_) | Filter::Fault(_) | Filter::Cors => false,
                Filter::Other(filter) => !matches!(slot, Slot::Off) && filter.watches(slot),
            })
    }

    /// A piece of the request's body passes to those filters that watch it.
    pub fn decode_data(&self, run: &mut Run, data: &mut Bytes, end: bool) {
        for (filter, slot) in self.running(run) {
            match filter {
                Filter::GrpcStats => grpc_stats::decode_data(slot, data),
                Filter::Other(filter) if filter.needs().request == BodyNeed::Observe => filter.decode_data(slot, data, end),
                Filter::Rbac(_) | Filter::HeaderMutation(_) | Filter::Fault(_) | Filter::Cors | Filter::Other(_) => {}
            }
        }
    }

    /// Why nothing more of the request's body can go on.
    pub fn refused_body(&self, run: &Run) -> Option<BodyRefusal> {
        let refused = |(filter, slot): (&Filter, &Slot)| match filter {
            Filter::Other(filter) if !matches!(slot, Slot::Off) => filter.refused_body(slot),
            _ => None,
        };
        self.filters
            .iter()
            .map(|placed| &placed.filter)
            .zip(&run.slots)
            .find_map(refused)
    }

    /// The request's trailers.
    pub fn decode_trailers(&self, run: &mut Run, trailers: &mut HeaderMap) {
        for (filter, slot) in self.running(run) {
            match filter {
                Filter::HeaderMutation(mutation) => header_mutation::decode_trailers(mutation, slot, trailers),
                Filter::Other(filter) => filter.decode_trailers(slot, trailers),
                Filter::GrpcStats | Filter::Rbac(_) | Filter::Fault(_) | Filter::Cors => {}
            }
        }
    }

    /// The head of the answer, from upstream or of a local reply: the filters that ran, in reverse order.
    pub fn encode_head(&self, run: &mut Run, exchange: &mut Exchange, head: &mut ResponseHead) {
        for (filter, slot) in self.running(run).rev() {
            match filter {
                Filter::GrpcStats => grpc_stats::encode_head(slot, head),
                Filter::Rbac(_) | Filter::Fault(_) => {}
                Filter::Cors => cors::encode_head(slot, head),
                Filter::HeaderMutation(mutation) => header_mutation::encode_head(mutation, slot, exchange, head),
                Filter::Other(filter) => filter.encode_head(slot, exchange, head),
            }
        }
    }

    /// A piece of the answer's body.
    pub fn encode_data(&self, run: &mut Run, data: &mut Bytes, end: bool) {
        for (filter, slot) in self.running(run).rev() {
            match filter {
                Filter::GrpcStats => grpc_stats::encode_data(slot, data),
                Filter::Rbac(_) | Filter::HeaderMutation(_) | Filter::Fault(_) | Filter::Cors => {}
                Filter::Other(filter) => filter.encode_data(slot, data, end),
            }
        }
    }

    /// The answer's trailers; what is returned goes out as the end of the body in their place.
    pub fn encode_trailers(&self, run: &mut Run, trailers: &mut HeaderMap) -> Option<Bytes> {
        let mut instead = None;
        for (filter, slot) in self.running(run).rev() {
            match filter {
                Filter::HeaderMutation(mutation) => header_mutation::encode_trailers(mutation, slot, trailers),
                Filter::Other(filter) => instead = filter.encode_trailers(slot, trailers).or(instead),
                Filter::GrpcStats | Filter::Rbac(_) | Filter::Fault(_) | Filter::Cors => {}
            }
        }
        instead
    }

    /// Whether any filter can slow answers down.
    pub fn may_slow_down(&self) -> bool {
        self.slows
    }

    /// Bytes a second that the answer may have, where a filter limits it.
    pub fn answer_rate(&self, run: &Run) -> Option<u64> {
        let limited = run.slots.iter().filter_map(|slot| match slot {
            Slot::Fault(injected) => injected.rate(),
            _ => None,
        });
        limited.min()
    }

    /// The exchange is over.
    pub fn finish(&self, run: &mut Run, exchange: &mut Exchange) {
        for (filter, slot) in self.running(run) {
            match filter {
                Filter::GrpcStats => grpc_stats::finish(slot, exchange),
                Filter::Rbac(_) | Filter::HeaderMutation(_) | Filter::Fault(_) | Filter::Cors => {}
                Filter::Other(filter) => filter.finish(slot, exchange),
            }
        }
    }

    /// The filters that were called and not turned off, with what each keeps.
    fn running<'a>(&'a self, run: &'a mut Run) -> impl DoubleEndedIterator<Item = (&'a Filter, &'a mut Slot)> {
        let called = self.filters.iter().map(|placed| &placed.filter).zip(&mut run.slots);
        called.filter(|(_, slot)| !matches!(slot, Slot::Off))
    }
}
