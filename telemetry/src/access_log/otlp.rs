//! Log records for OpenTelemetry collectors: a body and attributes whose texts are formats.

use cairn_exchange::format::{Absent, FormatError, Template, View};
use http::HeaderName;
use opentelemetry_proto::tonic::{
    common::v1::{AnyValue, ArrayValue, KeyValue, KeyValueList, any_value::Value},
    logs::v1::{LogRecord, ResourceLogs, ScopeLogs},
};
use prost::Message;

use crate::{
    export::Envelope,
    trace::otlp::{layers, nanoseconds, resource},
};

/// The method of collectors.
pub const METHOD: &str = "/opentelemetry.proto.collector.logs.v1.LogsService/Export";

/// `ExportLogsServiceRequest.resource_logs`, `ResourceLogs.scope_logs`, `ScopeLogs.log_records`.
const FIELDS: [u32; 3] = [1, 2, 2];

/// A value whose texts are formats.
#[derive(Clone, Debug, PartialEq)]
pub enum Shape {
    /// A text.
    Text(Template),
    /// A list.
    List(Vec<Shape>),
    /// An object.
    Object(Vec<(String, Shape)>),
}

/// How a record looks.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OtlpRecord {
    /// What it says.
    pub body: Option<Shape>,
    /// Facts beside it.
    pub attributes: Vec<(String, Shape)>,
}

/// What records are sent in, told of this resource.
pub fn envelope<'a>(facts: impl IntoIterator<Item = (&'a str, &'a str)>) -> Envelope {
    let of_resource = ResourceLogs {
        resource: Some(resource(facts)),
        ..ResourceLogs::default()
    };
    layers(FIELDS, of_resource.encode_to_vec(), ScopeLogs::default().encode_to_vec())
}

// === impl Shape ===

impl Shape {
    /// A text of a log's configuration.
    pub fn text(format: &str) -> Result<Self, FormatError> {
        Template::parse_log(format).map(Self::Text)
    }

    fn value(&self, view: &View<'_>) -> AnyValue {
        let value = match self {
            Self::Text(template) => {
                let mut text = Vec::new();
                template.render_with(view, Absent::Dash, &mut text);
                Value::StringValue(String::from_utf8_lossy(&text).into_owned())
            }
            Self::List(values) => Value::ArrayValue(ArrayValue {
                values: values.iter().map(|value| value.value(view)).collect(),
            }),
            Self::Object(fields) => Value::KvlistValue(KeyValueList {
                values: facts(fields, view),
            }),
        };
        AnyValue { value: Some(value) }
    }

    fn templates<'s>(&'s self, found: &mut Vec<&'s Template>) {
        match self {
            Self::Text(template) => found.push(template),
            Self::List(values) => values.iter().for_each(|value| value.templates(found)),
            Self::Object(fields) => fields.iter().for_each(|(_, value)| value.templates(found)),
        }
    }
}

fn facts(fields: &[(String, Shape)], view: &View<'_>) -> Vec<KeyValue> {
    let fact = |(key, value): &(String, Shape)| KeyValue {
        key: key.clone(),
        value: Some(value.value(view)),
        ..KeyValue::default()
    };
    fields.iter().map(fact).collect()
}

// === impl OtlpRecord ===

impl OtlpRecord {
    /// Writes the record of an exchange.
    pub fn write(&self, view: &View<'_>) -> Vec<u8> {
        let ids = view.exchange.trace;
        LogRecord {
            time_unix_nano: nanoseconds(view.exchange.wall),
            body: self.body.as_ref().map(|body| body.value(view)),
            attributes: facts(&self.attributes, view),
            trace_id: ids.map(|ids| ids.trace.to_be_bytes().into()).unwrap_or_default(),
            span_id: ids.map(|ids| ids.span.to_be_bytes().into()).unwrap_or_default(),
            ..LogRecord::default()
        }
        .encode_to_vec()
    }

    /// Its formats.
    pub fn templates(&self) -> Vec<&Template> {
        let mut found = Vec::new();
        for shape in self.body.iter().chain(self.attributes.iter().map(|(_, shape)| shape)) {
            shape.templates(&mut found);
        }
        found
    }

    /// The fields of the answer that it reads.
    pub fn response_headers(&self) -> Vec<HeaderName> {
        let templates = self.templates().into_iter();
        templates.flat_map(Template::response_headers).cloned().collect()
    }
}
