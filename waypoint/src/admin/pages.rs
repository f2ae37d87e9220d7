//! What the pages are made of.

use std::{fmt, sync::Arc};

use cairn_agent::shutdown;
use cairn_exchange::clock::{self, Instant};
use cairn_proto::envoy::config::core::v3::Node;
use cairn_telemetry::Registry;
use prost::Message as _;
use prost_reflect::DynamicMessage;
use serde_json::{Value, json};

use super::Readiness;
use crate::{config::Store, engine::Engine, logging, proxy::Proxy, recorder::Recorder};

/// Everything that pages show or change; clones are the same, and cheap.
#[derive(Clone)]
pub struct Pages {
    pub(super) registry: Registry,
    pub(super) proxy: Arc<Proxy>,
    pub(super) store: Arc<Store>,
    pub(super) readiness: Readiness,
    pub(super) recorder: Option<Arc<Recorder>>,
    pub(super) begin: Instant,
    pub(super) about: Arc<About>,
    pub(super) istiod: Option<cairn_xds::Status>,
    pub(super) logging: Option<logging::Handle>,
    pub(super) shutdown: Option<shutdown::Control>,
}

/// Who the proxy is.
#[derive(Clone, Debug, Default)]
pub struct About {
    /// The node, as JSON.
    pub node: Value,
    /// Options as Envoy names them.
    pub options: Value,
}

// === impl Pages ===

impl Pages {
    /// Pages about `engine`.
    pub fn new(engine: &Engine, store: Arc<Store>, readiness: Readiness) -> Self {
        Self {
            registry: engine.registry.clone(),
            proxy: engine.proxy.clone(),
            store,
            readiness,
            recorder: engine.recorder.clone(),
            begin: clock::now(),
            about: Arc::new(About {
                node: json!({}),
                options: json!({}),
            }),
            istiod: None,
            logging: None,
            shutdown: None,
        }
    }

    /// With what is known of the proxy.
    #[must_use]
    pub fn about(self, about: About) -> Self {
        Self {
            about: Arc::new(about),
            ..self
        }
    }

    /// With the state of the stream to istiod.
    #[must_use]
    pub fn istiod(self, status: cairn_xds::Status) -> Self {
        Self {
            istiod: Some(status),
            ..self
        }
    }

    /// With log levels that can be changed.
    #[must_use]
    pub fn logging(self, handle: logging::Handle) -> Self {
        Self {
            logging: Some(handle),
            ..self
        }
    }

    /// With an end that can be asked for.
    #[must_use]
    pub fn shutdown(self, control: shutdown::Control) -> Self {
        Self {
            shutdown: Some(control),
            ..self
        }
    }
}

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pages")
            .field("readiness", &self.readiness)
            .finish_non_exhaustive()
    }
}

// === impl About ===

impl About {
    /// A node in protobuf's JSON.
    pub fn node_json(node: &Node) -> Value {
        let message = cairn_proto::pool().get_message_by_name("envoy.config.core.v3.Node");
        let json = message
            .and_then(|descriptor| DynamicMessage::decode(descriptor, node.encode_to_vec().as_slice()).ok())
            .and_then(|message| serde_json::to_value(message).ok());
        json.map_or(Value::Null, whole_numbers)
    }
}

/// A `Struct` knows floating numbers only; Envoy prints a port as `15021`, not as `15021.0`.
fn whole_numbers(value: Value) -> Value {
    /// Beyond this not every whole number has a form of its own.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    match value {
        Value::Number(number) => match number.as_f64() {
            Some(float) if float.fract() == 0.0 && float.abs() < EXACT => Value::from(float as i64),
            _ => Value::Number(number),
        },
        Value::Array(items) => items.into_iter().map(whole_numbers).collect(),
        Value::Object(fields) => fields.into_iter().map(|(key, value)| (key, whole_numbers(value))).collect(),
        other => other,
    }
}
