//! The tracing of a chain: what becomes of the context that a request brings, and what its span tells at the end.

use std::{net::IpAddr, sync::Arc, time::Duration};

use cairn_exchange::{
    Exchange, Protocol, RequestHead, Scheme, TraceIds,
    format::{Absent, Template, Value, View},
};
use http::{HeaderMap, HeaderName, HeaderValue, header};

use super::{Context, Event, Parent, Span, SpanKind, b3, otlp, w3c, zipkin};
use crate::export::Exporter;

/// The settings of a chain.
#[derive(Clone, Debug)]
pub struct Tracer {
    /// Who is told.
    pub provider: Provider,
    /// Further facts.
    pub tags: Box<[CustomTag]>,
    /// Names of spans of requests, where routes and requests do not name them.
    pub operation: Option<Template>,
    /// Names of spans of attempts.
    pub upstream_operation: Option<Template>,
    /// Most bytes of a path.
    pub max_path: usize,
    /// Spans tell of moments in between.
    pub verbose: bool,
    /// Each attempt to send a request on has a span of its own.
    pub upstream_spans: bool,
    /// Requests take their context along.
    pub propagate: bool,
}

/// Who is told of spans, and in which form requests have their context.
#[derive(Clone, Debug)]
pub enum Provider {
    /// Nobody that we can tell. What requests bring passes as it is.
    None,
    /// A collector of OpenTelemetry.
    OpenTelemetry {
        /// The way to it.
        exporter: Exporter,
        /// Spans are kept whatever their parents say.
        always: bool,
    },
    /// Zipkin.
    Zipkin {
        /// The way to it.
        exporter: Exporter,
        /// How requests have their context.
        propagation: Propagation,
    },
}

/// Details of Zipkin's context.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Propagation {
    /// New traces have ids of 128 bits.
    pub wide: bool,
    /// A span has the id of its caller's span.
    pub shared: bool,
    /// W3C's context is read where there is none of Zipkin's, and written beside it.
    pub w3c: bool,
}

/// A further fact.
#[derive(Clone, Debug)]
pub struct CustomTag {
    /// Its name.
    pub name: Box<str>,
    /// Where it is from.
    pub value: TagValue,
}

/// Where a further fact is from; an empty one is not told.
#[derive(Clone, Debug)]
pub enum TagValue {
    /// It is known.
    Literal(Box<str>),
    /// A field of the request, or else this.
    Header(HeaderName, Box<str>),
    /// A format string.
    Format(Template),
    /// A piece of metadata, or else this.
    Metadata(Template, Box<str>),
}

/// Who we are to collectors.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeFacts {
    /// The node's name.
    pub id: Arc<str>,
    /// Its cluster.
    pub cluster: Arc<str>,
    /// Its zone.
    pub zone: Arc<str>,
    /// Its address.
    pub address: Option<IpAddr>,
}

/// The trace of a request that is under way.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    /// The request's own span; `None` where it has none.
    context: Option<Context>,
    remote_parent: bool,
    state: Option<HeaderValue>,
    form: b3::Form,
    /// The name that the request has brought for its span.
    operation: Option<Box<str>>,
    /// The name that the route has for it.
    decorator: Option<HeaderValue>,
    attempt: Option<AttemptSpan>,
}

/// The span of an attempt that is under way.
#[derive(Clone, Copy, Debug)]
struct AttemptSpan {
    context: Context,
    /// Since the start of the request.
    begun: Duration,
    number: u32,
}

const OPERATION: HeaderName = HeaderName::from_static("x-envoy-decorator-operation");
const ORIGINAL_PATH: HeaderName = HeaderName::from_static("x-envoy-original-path");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// Name of a span that nothing names.
const INGRESS: &str = "ingress";

/// Codes of gRPC that count as failures of the server.
const GRPC_FAILURES: [u32; 6] = [2, 4, 12, 13, 14, 15];

// === impl Tracer ===

impl Tracer {
    /// Begins the trace of a request; `traced` is the chain's decision.
    pub fn begin(&self, headers: &mut HeaderMap, traced: bool) -> Trace {
        let mut trace = match &self.provider {
            Provider::None => Trace::default(),
            Provider::OpenTelemetry { always, .. } => begin_w3c(headers, traced, *always),
            Provider::Zipkin { propagation, .. } => begin_b3(headers, traced, *propagation),
        };
        if let Some(operation) = headers.remove(OPERATION) {
            trace.operation = operation.to_str().ok().filter(|name| !name.is_empty()).map(Into::into);
        }
        trace
    }

    /// The request is about to be sent on once more, and takes its context along.
    pub fn attempt(&self, trace: &mut Trace, exchange: &mut Exchange, node: &NodeFacts) {
        if self.upstream_spans {
            self.attempt_ends(trace, exchange, node);
        }
        let Some(own) = trace.context else { return };
        let mut context = own;
        if self.upstream_spans {
            context = Context {
                span: new_span(),
                parent: Some(own.span),
                ..own
            };
            trace.attempt = Some(AttemptSpan {
                context,
                begun: exchange.elapsed(),
                number: exchange.attempts + 1,
            });
        }
        if let Some(head) = exchange.request.as_mut().filter(|_| self.propagate) {
            self.write(&context, trace, &mut head.headers);
        }
    }

    fn write(&self, context: &Context, trace: &Trace, headers: &mut HeaderMap) {
        match &self.provider {
            Provider::None => {}
            Provider::OpenTelemetry { .. } => w3c::write(context, trace.state.as_ref(), headers),
            Provider::Zipkin { propagation, .. } => {
                b3::write(context, trace.form, headers);
                if propagation.w3c {
                    w3c::write(context, trace.state.as_ref(), headers);
                }
            }
        }
    }

    /// An attempt is over, with the answer that the record has now.
    pub fn attempt_ends(&self, trace: &mut Trace, exchange: &Exchange, node: &NodeFacts) {
        let Some(attempt) = trace.attempt.take().filter(|attempt| attempt.context.sampled) else {
            return;
        };
        let view = View::new(exchange);
        let cluster = exchange.cluster.as_deref();
        let shown = cluster.map_or("", |cluster| cluster.alt_stat_name.as_deref().unwrap_or(&cluster.name));
        let name = named(self.upstream_operation.as_ref(), &view).unwrap_or_else(|| format!("router {shown} egress"));
        let mut span = Span {
            context: attempt.context,
            remote_parent: false,
            state: state_text(trace),
            name: name.into(),
            kind: SpanKind::Client,
            start: exchange.wall + attempt.begun,
            took: exchange.elapsed().saturating_sub(attempt.begun),
            tags: Vec::with_capacity(16 + self.tags.len()),
            events: Vec::new(),
            failed: exchange.status.is_none_or(|status| status.as_u16() >= 400),
        };
        span.tag(
            "http.protocol",
            protocol(exchange.upstream_protocol.unwrap_or(exchange.protocol)),
        );
        if let Some(upstream) = &exchange.upstream {
            span.tag("upstream_address", &*upstream.display);
            span.tag("peer.address", &*upstream.display);
        }
        if attempt.number > 1 {
            span.tag("retry.count", (attempt.number - 1).to_string());
        }
        self.common(&mut span, &view);
        if self.verbose {
            let moments = &exchange.moments;
            span.events
                .extend(events(exchange, UPSTREAM_MOMENTS.map(|(name, of)| (name, of(moments)))));
        }
        self.tell(&span, node);
    }

    /// The request is over.
    pub fn finish(&self, mut trace: Trace, exchange: &Exchange, node: &NodeFacts) {
        self.attempt_ends(&mut trace, exchange, node);
        let Some(context) = trace.context.filter(|context| context.sampled) else {
            return;
        };
        let view = View::new(exchange);
        let by_route = || {
            trace
                .decorator
                .as_ref()
                .and_then(|name| name.to_str().ok())
                .map(str::to_owned)
        };
        let given = trace.operation.as_deref().map(str::to_owned);
        let name = given.or_else(|| named(self.operation.as_ref(), &view)).or_else(by_route);
        let status = exchange.status.map(|status| status.as_u16());
        let mut span = Span {
            context,
            remote_parent: trace.remote_parent,
            state: state_text(&trace),
            name: name.unwrap_or_else(|| INGRESS.to_owned()).into(),
            kind: SpanKind::Server,
            start: exchange.wall,
            took: exchange.duration(),
            tags: Vec::with_capacity(24 + self.tags.len()),
            events: Vec::new(),
            failed: status.is_none_or(|status| status >= 500),
        };
        span.tag("node_id", &*node.id);
        span.tag("zone", &*node.zone);
        if let Some(head) = view.request() {
            self.request(&mut span, head, exchange);
        }
        span.tag("request_size", exchange.counts.received.to_string());
        span.tag("response_size", exchange.counts.sent.to_string());
        self.common(&mut span, &view);
        if let Some(code) = exchange.grpc_status {
            span.tag("grpc.status_code", code.to_string());
            if GRPC_FAILURES.contains(&code) {
                span.tag("error", "true");
            }
        }
        if self.verbose {
            let moments = &exchange.moments;
            span.events
                .extend(events(exchange, REQUEST_MOMENTS.map(|(name, of)| (name, of(moments)))));
        }
        self.tell(&span, node);
    }

    fn request(&self, span: &mut Span, head: &RequestHead, exchange: &Exchange) {
        let field = |name: &str| {
            head.headers
                .get(name)
                .map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
        };
        let tag_if = |span: &mut Span, name: &'static str, value: Option<String>| {
            if let Some(value) = value {
                span.tag(name, value);
            }
        };
        tag_if(span, "guid:x-request-id", field("x-request-id"));
        span.tag("http.url", url(head, self.max_path));
        span.tag("http.method", head.method.as_str());
        span.tag(
            "downstream_cluster",
            field("x-envoy-downstream-service-cluster").unwrap_or_else(|| "-".into()),
        );
        span.tag("user_agent", field(header::USER_AGENT.as_str()).unwrap_or_else(|| "-".into()));
        span.tag("http.protocol", protocol(exchange.protocol));
        span.tag("peer.address", exchange.connection.remote_address.ip().to_string());
        tag_if(span, "guid:x-client-trace-id", field("x-client-trace-id"));
        if head.is_grpc() {
            span.tag("grpc.path", head.path.as_str());
            span.tag("grpc.authority", String::from_utf8_lossy(head.authority.as_bytes()));
            tag_if(span, "grpc.content_type", field(header::CONTENT_TYPE.as_str()));
            tag_if(span, "grpc.timeout", field("grpc-timeout"));
        }
    }

    /// What spans of both sides tell.
    fn common(&self, span: &mut Span, view: &View<'_>) {
        let exchange = view.exchange;
        span.tag("component", "proxy");
        if let Some(cluster) = &exchange.cluster {
            span.tag("upstream_cluster", &*cluster.name);
            span.tag(
                "upstream_cluster.name",
                cluster.alt_stat_name.as_deref().unwrap_or(&cluster.name),
            );
        }
        let status = exchange.status.map_or(0, |status| status.as_u16());
        span.tag("http.status_code", status.to_string());
        span.tag("response_flags", exchange.flags.to_string());
        if status == 0 || status >= 500 {
            span.tag("error", "true");
        }
        for tag in &self.tags {
            if let Some(value) = tag.value.of(view) {
                span.tag(tag.name.to_string(), value);
            }
        }
    }

    fn tell(&self, span: &Span, node: &NodeFacts) {
        match &self.provider {
            Provider::None => {}
            Provider::OpenTelemetry { exporter, .. } => exporter.push(otlp::write(span)),
            Provider::Zipkin { exporter, propagation } => {
                let shared = propagation.shared && span.remote_parent;
                exporter.push(zipkin::write(span, node, shared));
            }
        }
    }

    /// The fields of the answer that tags and names read.
    pub fn response_headers(&self) -> impl Iterator<Item = &HeaderName> {
        let tags = self.tags.iter().filter_map(|tag| match &tag.value {
            TagValue::Format(template) => Some(template),
            TagValue::Literal(_) | TagValue::Header(..) | TagValue::Metadata(..) => None,
        });
        let names = self.operation.iter().chain(&self.upstream_operation);
        tags.chain(names).flat_map(Template::response_headers)
    }
}

fn begin_w3c(headers: &HeaderMap, traced: bool, always: bool) -> Trace {
    match w3c::read(headers) {
        Err(_) => Trace::default(),
        Ok(Parent::Span {
            trace, span, sampled, ..
        }) => Trace {
            context: Some(Context {
                trace,
                span: new_span(),
                parent: Some(span),
                sampled: traced && (always || sampled == Some(true)),
            }),
            remote_parent: true,
            state: w3c::state(headers),
            ..Trace::default()
        },
        Ok(Parent::None | Parent::Decision(_)) => Trace {
            context: Some(Context {
                trace: fastrand::u128(1..),
                span: new_span(),
                parent: None,
                sampled: traced,
            }),
            ..Trace::default()
        },
    }
}

fn begin_b3(headers: &HeaderMap, traced: bool, propagation: Propagation) -> Trace {
    let parent = match b3::read(headers) {
        Ok(Parent::None) if propagation.w3c => w3c::read(headers),
        parent => parent,
    };
    let Ok(parent) = parent else { return Trace::default() };
    let form = b3::form(headers);
    let root = |sampled| {
        let span = new_span();
        let high = if propagation.wide { fastrand::u64(1..) } else { 0 };
        Context {
            trace: u128::from(high) << 64 | u128::from(span),
            span,
            parent: None,
            sampled,
        }
    };
    let (context, remote_parent) = match parent {
        Parent::None => (root(traced), false),
        Parent::Decision(sampled) => (root(sampled), false),
        Parent::Span {
            trace,
            span,
            parent,
            sampled,
        } => {
            let sampled = sampled.unwrap_or(traced);
            let (span, parent) = if propagation.shared {
                (span, parent)
            } else {
                (new_span(), Some(span))
            };
            let context = Context {
                trace,
                span,
                parent,
                sampled,
            };
            (context, true)
        }
    };
    Trace {
        context: Some(context),
        remote_parent,
        form,
        state: propagation.w3c.then(|| w3c::state(headers)).flatten(),
        ..Trace::default()
    }
}

fn new_span() -> u64 {
    fastrand::u64(1..)
}

fn state_text(trace: &Trace) -> Option<Box<str>> {
    let state = trace.state.as_ref()?.to_str().ok()?;
    (!state.is_empty()).then(|| state.into())
}

fn named(template: Option<&Template>, view: &View<'_>) -> Option<String> {
    let mut name = Vec::new();
    template?.render_with(view, Absent::Empty, &mut name);
    Some(String::from_utf8_lossy(&name).into_owned()).filter(|name| !name.is_empty())
}

fn protocol(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Http10 => "HTTP/1.0",
        Protocol::Http11 => "HTTP/1.1",
        Protocol::Http2 => "HTTP/2",
        Protocol::Tcp => "-",
    }
}

/// The address that was asked for, with at most so many bytes of the path.
fn url(head: &RequestHead, max_path: usize) -> String {
    let scheme = head.headers.get(FORWARDED_PROTO).and_then(|proto| proto.to_str().ok());
    let scheme = scheme.unwrap_or(match head.scheme {
        Scheme::Http => "http",
        Scheme::Https => "https",
    });
    let original = head.headers.get(ORIGINAL_PATH).map(HeaderValue::as_bytes);
    let path = original.unwrap_or(head.path.as_str().as_bytes());
    let path = path.get(..max_path).unwrap_or(path);
    let (authority, path) = (
        String::from_utf8_lossy(head.authority.as_bytes()),
        String::from_utf8_lossy(path),
    );
    format!("{scheme}://{authority}{path}")
}

type Moment = fn(&cairn_exchange::Moments) -> Option<Duration>;

const UPSTREAM_MOMENTS: [(&str, Moment); 4] = [
    ("first_upstream_tx_byte_sent", |moments| moments.first_upstream_sent),
    ("last_upstream_tx_byte_sent", |moments| moments.last_upstream_sent),
    ("first_upstream_rx_byte_received", |moments| moments.first_upstream_received),
    ("last_upstream_rx_byte_received", |moments| moments.last_upstream_received),
];

const REQUEST_MOMENTS: [(&str, Moment); 7] = [
    ("last_downstream_rx_byte_received", |moments| moments.request_received),
    UPSTREAM_MOMENTS[0],
    UPSTREAM_MOMENTS[1],
    UPSTREAM_MOMENTS[2],
    UPSTREAM_MOMENTS[3],
    ("first_downstream_tx_byte_sent", |moments| moments.first_sent),
    ("last_downstream_tx_byte_sent", |moments| moments.last_sent),
];

fn events<const N: usize>(
    exchange: &Exchange,
    moments: [(&'static str, Option<Duration>); N],
) -> impl Iterator<Item = Event> + use<N> {
    let start = exchange.wall;
    let reached = moments.into_iter().filter_map(|(name, at)| Some((name, at?)));
    reached.map(move |(name, at)| Event { at: start + at, name })
}

// === impl Trace ===

impl Trace {
    /// The request's span.
    pub fn ids(&self) -> Option<TraceIds> {
        self.context.map(|context| TraceIds {
            trace: context.trace,
            span: context.span,
            sampled: context.sampled,
        })
    }

    /// The name that the request's route has for it.
    pub fn decorate(&mut self, operation: HeaderValue) {
        self.decorator = Some(operation);
    }

    /// Whether the client is told the name of the operation: unless it has told one itself.
    pub fn tells_operation(&self) -> bool {
        self.operation.is_none()
    }
}

// === impl TagValue ===

impl TagValue {
    fn of(&self, view: &View<'_>) -> Option<String> {
        let text = match self {
            Self::Literal(text) => text.to_string(),
            Self::Header(name, default) => {
                let value = view.request().and_then(|head| head.headers.get(name));
                value.map_or_else(
                    || default.to_string(),
                    |value| String::from_utf8_lossy(value.as_bytes()).into_owned(),
                )
            }
            Self::Format(template) => named(Some(template), view)?,
            Self::Metadata(template, default) => match template.evaluate(view, Absent::Empty) {
                Value::Absent => default.to_string(),
                value => {
                    let mut text = Vec::new();
                    value.write(&mut text);
                    String::from_utf8_lossy(&text).into_owned()
                }
            },
        };
        (!text.is_empty()).then_some(text)
    }
}
