//! What a filter may do, and when.
//!
//! For a request the filters are called in order, `decode_head`, then body and trailers; for its answer in reverse order,
//! `encode_head`, body, trailers. A filter that replies ends the way inward: the reply passes the encode side of the filters that ran,
//! its own among them, as an answer from upstream would, and of no others. A filter says once, when it is compiled, what it needs of bodies; a chain whose filters
//! need nothing streams bodies without calling anybody. What the chosen route says of a filter is in [`Scope`].

use std::{any::Any, borrow::Cow, fmt, future::Future, pin::Pin};

use bytes::Bytes;
use cairn_exchange::{Exchange, ResponseFlags};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use crate::on_route::Scope;

/// What a filter needs of a body.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BodyNeed {
    /// Nothing: bytes pass by.
    #[default]
    Nothing,
    /// To see each piece as it passes.
    Observe,
    /// All of it before anything goes on, at most `limit` bytes; a longer body is answered with 413.
    Whole {
        /// Most bytes.
        limit: usize,
    },
}

/// How much of a request's body a filter waits for before it decides; the body then goes on from its beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BodyStart {
    /// So many bytes.
    pub limit: usize,
    /// A longer body's beginning will do; else it is answered with 413.
    pub partial: bool,
}

/// What a filter needs of the bodies of requests and answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Of the request's.
    pub request: BodyNeed,
    /// Of the answer's; [`BodyNeed::Whole`] is not offered there.
    pub observe_response: bool,
}

/// What a filter says of a request's head or body.
pub enum Verdict {
    /// Go on.
    Continue,
    /// Wait for this; the outcome says how to go on. The future owns what it needs.
    Stop(Pin<Box<dyn Future<Output = Resume> + Send>>),
    /// Answer with this.
    Reply(LocalReply),
}

/// How to go on after waiting: looks at the record again, may edit it, and decides.
pub type Resume = Box<dyn FnOnce(&mut Exchange) -> Verdict + Send>;

/// An answer of ours.
#[derive(Clone, Debug)]
pub struct LocalReply {
    /// Status; gRPC callers get its gRPC equivalent.
    pub status: StatusCode,
    /// Why, in Envoy's words.
    pub details: Cow<'static, str>,
    /// Flags.
    pub flags: ResponseFlags,
    /// Fields.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// Text.
    pub body: Bytes,
    /// A gRPC status that differs from the status's equivalent.
    pub grpc_status: Option<u32>,
    /// It goes out as it is, to gRPC callers too.
    pub as_it_is: bool,
}

/// Why the rest of a request's body is refused: the answer is 400, as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BodyRefusal {
    /// Why, in Envoy's words for logs.
    pub details: &'static str,
    /// And for the client.
    pub body: &'static str,
}

/// The head of an answer.
#[derive(Debug)]
pub struct ResponseHead {
    /// Status.
    pub status: StatusCode,
    /// Fields.
    pub headers: HeaderMap,
}

/// What a filter keeps for one request.
#[derive(Default)]
pub enum Slot {
    /// Nothing.
    #[default]
    Empty,
    /// The filter is turned off for this request.
    Off,
    /// The counters of `grpc_stats`.
    GrpcStats(crate::grpc_stats::Counters),
    /// The faults of a request.
    Fault(crate::fault::Injected),
    /// What the answer to an allowed origin carries.
    Cors(Box<cairn_policy::cors::Allowed>),
    /// Mutations that stand on the route.
    HeaderMutation(Box<crate::header_mutation::Levels>),
    /// Whatever a [`HttpFilter`] put there.
    Other(Box<dyn Any + Send>),
}

/// One filter. Every method has a default that lets everything pass.
pub trait HttpFilter: Any + fmt::Debug + Send + Sync {
    /// Its name in the configuration.
    fn name(&self) -> &str;

    /// What it needs of bodies.
    fn needs(&self) -> Needs {
        Needs::default()
    }

    /// The request's head is there.
    fn decode_head(&self, _slot: &mut Slot, _exchange: &mut Exchange, _scope: &Scope<'_>) -> Verdict {
        Verdict::Continue
    }

    /// Whether it watches the body of this request ([`BodyNeed::Observe`]).
    fn watches(&self, _slot: &Slot) -> bool {
        self.needs().request == BodyNeed::Observe
    }

    /// A piece of the request's body passes ([`BodyNeed::Observe`]).
    fn decode_data(&self, _slot: &mut Slot, _data: &mut Bytes, _end: bool) {}

    /// Why nothing more of the request's body can go on, after what was seen of it; the request is answered with that.
    fn refused_body(&self, _slot: &Slot) -> Option<BodyRefusal> {
        None
    }

    /// Whether it wants the whole body of this request, and how much of it at most; asked after `decode_head`.
    fn whole_body(&self, _slot: &Slot) -> Option<usize> {
        match self.needs().request {
            BodyNeed::Whole { limit } => Some(limit),
            BodyNeed::Nothing | BodyNeed::Observe => None,
        }
    }

    /// All of the request's body is there ([`BodyNeed::Whole`]).
    fn decode_body(&self, _slot: &mut Slot, _exchange: &mut Exchange, _body: &mut Bytes) -> Verdict {
        Verdict::Continue
    }

    /// Whether it waits for the beginning of this request's body, and for how much of it; asked after `decode_head`.
    fn body_start(&self, _slot: &Slot) -> Option<BodyStart> {
        None
    }

    /// The beginning of the request's body is there, and may be a little more than was asked for; `whole` when nothing follows.
    fn decode_body_start(
        &self,
        _slot: &mut Slot,
        _exchange: &mut Exchange,
        _scope: &Scope<'_>,
        _start: &Bytes,
        _whole: bool,
    ) -> Verdict {
        Verdict::Continue
    }

    /// The request's trailers.
    fn decode_trailers(&self, _slot: &mut Slot, _trailers: &mut HeaderMap) {}

    /// The answer's head is there.
    fn encode_head(&self, _slot: &mut Slot, _exchange: &mut Exchange, _head: &mut ResponseHead) {}

    /// A piece of the answer's body passes.
    fn encode_data(&self, _slot: &mut Slot, _data: &mut Bytes, _end: bool) {}

    /// The answer's trailers; what is returned goes out as the end of the body in their place.
    fn encode_trailers(&self, _slot: &mut Slot, _trailers: &mut HeaderMap) -> Option<Bytes> {
        None
    }

    /// The exchange is over: what the slot knows goes into the record.
    fn finish(&self, _slot: &mut Slot, _exchange: &mut Exchange) {}
}

// === impl LocalReply ===

impl LocalReply {
    /// An answer with this status, reason and text.
    pub fn new(status: StatusCode, flags: ResponseFlags, details: impl Into<Cow<'static, str>>, body: impl Into<Bytes>) -> Self {
        Self {
            status,
            details: details.into(),
            flags,
            headers: Vec::new(),
            body: body.into(),
            grpc_status: None,
            as_it_is: false,
        }
    }

    /// The same with one more field.
    #[must_use]
    pub fn with_header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }
}

impl fmt::Debug for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Continue => f.write_str("Continue"),
            Verdict::Stop(_) => f.write_str("Stop"),
            Verdict::Reply(reply) => f.debug_tuple("Reply").field(reply).finish(),
        }
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Slot::Empty => "Empty",
            Slot::Off => "Off",
            Slot::GrpcStats(_) => "GrpcStats",
            Slot::Fault(_) => "Fault",
            Slot::Cors(_) => "Cors",
            Slot::HeaderMutation(_) => "HeaderMutation",
            Slot::Other(_) => "Other",
        })
    }
}
