//! The command operators, and those that are neither a plain fact nor a time span.

use std::{borrow::Cow, sync::Arc};

use http::HeaderName;
use percent_encoding::percent_decode;

use super::{
    MetadataOf, Value, View,
    fact::Fact,
    fields::{Field, Fields, map_field, request_field, response_value},
    noted::noted,
    span::{Moment, Unit, between},
    state::filter_state,
    time::TimeFormat,
};
use crate::cel::Program;

/// An operator with its parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Operator {
    Request(Fields),
    RequestWithoutQuery(Fields),
    Response(Fields),
    Trailer(Fields),
    Path {
        of: PathOf,
        query: bool,
    },
    QueryParameter(Box<str>),
    Fact(Fact),
    CodeDetails {
        whitespace: bool,
    },
    GrpcStatus(GrpcStatusForm),
    StartTime(TimeFormat),
    EmitTime(TimeFormat),
    Between {
        from: Moment,
        to: Moment,
        unit: Unit,
    },
    Environment(Option<Box<str>>),
    FilterState {
        key: Box<str>,
        field: Option<Box<str>>,
        lookup: Box<str>,
    },
    Metadata {
        of: MetadataOf,
        namespace: Box<str>,
        path: Box<[Box<str>]>,
    },
    Cel {
        program: Arc<Program>,
        typed: bool,
    },
    Unrecorded,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PathOf {
    Original,
    Current,
    OriginalOrCurrent,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum GrpcStatusForm {
    Camel,
    Snake,
    Number,
}

// === impl Operator ===

impl Operator {
    pub(super) fn value<'t, 'a: 't>(&'t self, view: &View<'a>) -> Value<'t> {
        match self {
            Self::Request(fields) => fields.find(|field| request_field(view.request()?, field)),
            Self::RequestWithoutQuery(fields) => match fields.find(|field| request_field(view.request()?, field)) {
                Value::Text(Cow::Borrowed(text)) => Value::Text(without_query(text).into()),
                value => value,
            },
            Self::Response(fields) => response_value(fields, view),
            Self::Trailer(fields) => fields.find(|field| map_field(view.trailers?, field)),
            Self::Path { of, query } => path(*of, *query, view),
            Self::QueryParameter(name) => query_parameter(name, view),
            Self::Fact(fact) => fact.value(view),
            Self::CodeDetails { whitespace } => match view.exchange.details.as_deref() {
                Some(details) if !whitespace => underscored(details, char::is_whitespace),
                details => Value::optional(details),
            },
            Self::GrpcStatus(form) => grpc_status(*form, view),
            Self::StartTime(format) => Value::Time(format, view.exchange.wall),
            Self::EmitTime(format) => Value::Time(format, crate::clock::wall()),
            Self::Between { from, to, unit } => between(view.exchange, *from, *to, *unit),
            Self::Environment(value) => Value::optional(value.as_deref()),
            Self::FilterState { key, field, lookup } => filter_state(view, key, field.as_deref(), lookup),
            Self::Metadata { of, namespace, path } => match (view.metadata, of) {
                (Some(metadata), _) => metadata(*of, namespace, path).unwrap_or(Value::Absent),
                (None, MetadataOf::Dynamic) => noted(view.exchange, namespace, path),
                (None, _) => Value::Absent,
            },
            Self::Cel { program, typed: false } => program.format(view),
            Self::Cel { program, typed: true } => program.format_typed(view),
            Self::Unrecorded => Value::Absent,
        }
    }

    pub(super) fn response_headers(&self) -> impl Iterator<Item = &HeaderName> {
        let (fields, program) = match self {
            Self::Response(fields) => (Some(fields), None),
            Self::Cel { program, .. } => (None, Some(program)),
            _ => (None, None),
        };
        let of_program = program.into_iter().flat_map(|program| program.response_headers());
        let fields = fields
            .into_iter()
            .flat_map(|fields| [Some(&fields.main), fields.alternative.as_ref()])
            .filter_map(|field| match field {
                Some(Field::Name(name)) => Some(name),
                _ => None,
            });
        fields.chain(of_program)
    }

    /// What it asks for that the record has not: all of it, or some attributes of an expression.
    pub(super) fn lacks(&self) -> bool {
        match self {
            Self::Unrecorded => true,
            Self::Cel { program, .. } => program.unrecorded().next().is_some(),
            _ => false,
        }
    }
}

fn without_query(path: &[u8]) -> &[u8] {
    path.split(|byte| *byte == b'?').next().unwrap_or(path)
}

const ORIGINAL_PATH: HeaderName = HeaderName::from_static("x-envoy-original-path");

fn path<'a>(of: PathOf, query: bool, view: &View<'a>) -> Value<'a> {
    let Some(head) = view.request() else {
        return Value::Absent;
    };
    let original = || head.headers.get(ORIGINAL_PATH).map(|value| value.as_bytes());
    let current = || Some(head.path.as_str().as_bytes());
    let found = match of {
        PathOf::Original => original(),
        PathOf::Current => current(),
        PathOf::OriginalOrCurrent => original().or_else(current),
    };
    found.map_or(Value::Absent, |path| {
        Value::Text(if query { path } else { without_query(path) }.into())
    })
}

fn query_parameter<'a>(name: &str, view: &View<'a>) -> Value<'a> {
    let query = view.request().and_then(|head| head.path.query()).unwrap_or_default();
    query
        .split('&')
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .find(|(key, _)| percent_decode(key.as_bytes()).eq(name.bytes()))
        .map_or(Value::Absent, |(_, value)| {
            Value::Text(percent_decode(value.as_bytes()).into())
        })
}

/// The text with underscores for some characters.
pub(super) fn underscored(text: &str, replaced: impl Fn(char) -> bool + Copy) -> Value<'_> {
    if text.contains(replaced) {
        Value::Text(text.replace(replaced, "_").into_bytes().into())
    } else {
        Value::optional(Some(text))
    }
}

/// Names of the gRPC codes by number, as Envoy prints them in camel and in snake form.
const GRPC_CODES: [(&str, &str); 17] = [
    ("OK", "OK"),
    ("Canceled", "CANCELLED"),
    ("Unknown", "UNKNOWN"),
    ("InvalidArgument", "INVALID_ARGUMENT"),
    ("DeadlineExceeded", "DEADLINE_EXCEEDED"),
    ("NotFound", "NOT_FOUND"),
    ("AlreadyExists", "ALREADY_EXISTS"),
    ("PermissionDenied", "PERMISSION_DENIED"),
    ("ResourceExhausted", "RESOURCE_EXHAUSTED"),
    ("FailedPrecondition", "FAILED_PRECONDITION"),
    ("Aborted", "ABORTED"),
    ("OutOfRange", "OUT_OF_RANGE"),
    ("Unimplemented", "UNIMPLEMENTED"),
    ("Internal", "INTERNAL"),
    ("Unavailable", "UNAVAILABLE"),
    ("DataLoss", "DATA_LOSS"),
    ("Unauthenticated", "UNAUTHENTICATED"),
];

fn grpc_status<'a>(form: GrpcStatusForm, view: &View<'a>) -> Value<'a> {
    let Some(code) = view.grpc_code() else {
        return Value::Absent;
    };
    let names = usize::try_from(code).ok().and_then(|index| GRPC_CODES.get(index));
    match (form, names) {
        (GrpcStatusForm::Camel, Some((camel, _))) => Value::text(camel),
        (GrpcStatusForm::Snake, Some((_, snake))) => Value::text(snake),
        (GrpcStatusForm::Number, _) => Value::Number(code.into()),
        (GrpcStatusForm::Camel | GrpcStatusForm::Snake, None) => {
            Value::Text(itoa::Buffer::new().format(code).as_bytes().to_vec().into())
        }
    }
}
