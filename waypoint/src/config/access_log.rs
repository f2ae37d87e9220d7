//! Access logs (contract runtime §7.5): files with their formats, gRPC and OpenTelemetry, and their filters; other loggers are listed and
//! left out.
//!
//! A log decides nothing, so nothing here refuses traffic. A sink whose filter cannot be done is left out rather than
//! logging more than was asked for. An operator that is not known is an absent value, and is listed; a format that is wrong in itself
//! is so for Envoy too.

mod entry;
mod filter;
mod remote;
#[cfg(test)]
mod tests;

use cairn_exchange::format::{Absent, Template};
use cairn_proto::envoy::{
    config::{
        accesslog::v3::{AccessLog as EnvoyAccessLog, access_log::ConfigType},
        core::v3::{
            DataSource, SubstitutionFormatString, TypedExtensionConfig, data_source::Specifier,
            substitution_format_string::Format,
        },
    },
    extensions::access_loggers::file::v3::{FileAccessLog, file_access_log::AccessLogFormat},
};
use cairn_telemetry::access_log::{AccessLog, Comparison, Filter, JsonFormat, JsonValue, LogFormat, Output, Sink};
use prost_types::{Struct, Value, value::Kind};

use std::io;

use self::filter::NotDone;
use super::{
    any::{Typed, Unknown, type_name, typed, unpack},
    chain::Outputs,
    report::{Malformed, Notes, ignore_set},
    tracer,
};

/// Formatters whose operators are known without them.
const FORMATTERS: [&str; 3] = [
    "envoy.extensions.formatter.cel.v3.Cel",
    "envoy.extensions.formatter.metadata.v3.Metadata",
    "envoy.extensions.formatter.req_without_query.v3.ReqWithoutQuery",
];

/// Most bytes of a format in a file.
const MAX_FORMAT: u64 = 64 * 1024;

/// Compiles the logs of a chain. Without files (nothing is served) formats are checked and nothing is opened.
pub(crate) fn compile(logs: Vec<EnvoyAccessLog>, outputs: &Outputs, notes: &mut Notes) -> Result<AccessLog, Malformed> {
    compile_those(logs, outputs, notes, |_, _| ())
}

/// Compiles the logs of tunnels. Refused ones have lines; a log that is not about those alone is listed.
pub(crate) fn refusals(logs: Vec<EnvoyAccessLog>, outputs: &Outputs, notes: &mut Notes) -> Result<AccessLog, Malformed> {
    compile_those(logs, outputs, notes, |filter, notes| {
        if !is_about_refusals(filter) {
            notes.ignore("filter", "only tunnels that are refused are written");
        }
    })
}

fn compile_those(
    logs: Vec<EnvoyAccessLog>,
    outputs: &Outputs,
    notes: &mut Notes,
    check: fn(&Filter, &mut Notes),
) -> Result<AccessLog, Malformed> {
    let mut sinks = Vec::new();
    for (index, log) in logs.into_iter().enumerate() {
        let sink = notes.at("access_log", index, |notes| compile_sink(log, outputs, notes, check))?;
        sinks.extend(sink);
    }
    Ok(AccessLog::new(sinks))
}

/// Whether nothing passes that was answered 200.
fn is_about_refusals(filter: &Filter) -> bool {
    match filter {
        Filter::Status(Comparison::AtLeast, status) => *status > 200,
        Filter::Status(Comparison::Equal, status) => *status != 200,
        Filter::Status(Comparison::NotEqual, status) => *status == 200,
        Filter::All(all) => all.iter().any(is_about_refusals),
        Filter::Any(any) => any.iter().all(is_about_refusals),
        Filter::Always
        | Filter::Status(Comparison::AtMost, _)
        | Filter::Duration(..)
        | Filter::Flags(_)
        | Filter::Traceable
        | Filter::Sampled(_)
        | Filter::GrpcStatus { .. }
        | Filter::Requests(_)
        | Filter::When(_) => false,
    }
}

fn compile_sink(
    log: EnvoyAccessLog,
    outputs: &Outputs,
    notes: &mut Notes,
    check: fn(&Filter, &mut Notes),
) -> Result<Option<Sink>, Malformed> {
    let EnvoyAccessLog {
        name,
        filter,
        config_type,
    } = log;
    let Some(ConfigType::TypedConfig(any)) = config_type else {
        return Err(notes.malformed("", format!("log {name} has no configuration")));
    };
    let output = match typed(&any, notes)? {
        Typed::Message("envoy.extensions.access_loggers.file.v3.FileAccessLog", any) => {
            file(unpack(any, Unknown::Ignored, notes)?, outputs, notes)?
        }
        Typed::Message("envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig", any) => {
            remote::http(unpack(any, Unknown::Ignored, notes)?, outputs, notes)?
        }
        Typed::Message("envoy.extensions.access_loggers.grpc.v3.TcpGrpcAccessLogConfig", any) => {
            remote::tcp(unpack(any, Unknown::Ignored, notes)?, outputs, notes)?
        }
        Typed::Message("envoy.extensions.access_loggers.open_telemetry.v3.OpenTelemetryAccessLogConfig", any) => {
            remote::open_telemetry(unpack(any, Unknown::Ignored, notes)?, outputs, notes)?
        }
        other => {
            notes.ignore("", format!("log {name} ({}) is not supported yet", other.name()));
            return Ok(None);
        }
    };
    let filter = match filter.map(|filter| notes.within("filter", |notes| filter::compile(filter, notes))) {
        None => Filter::Always,
        Some(Ok(filter)) => filter,
        Some(Err(NotDone::Listed)) => return Ok(None),
        Some(Err(NotDone::Malformed(malformed))) => return Err(malformed),
    };
    check(&filter, notes);
    Ok(output.map(|output| Sink { filter, output }))
}

fn file(log: FileAccessLog, outputs: &Outputs, notes: &mut Notes) -> Result<Option<Output>, Malformed> {
    let FileAccessLog { path, access_log_format } = log;
    let format = compile_format(access_log_format, notes)?;
    let Some(files) = &outputs.files else { return Ok(None) };
    match files.open(&path) {
        Ok(file) => Ok(Some(Output::File { format, file })),
        Err(error) => {
            notes.ignore("path", error.to_string());
            Ok(None)
        }
    }
}

fn compile_format(format: Option<AccessLogFormat>, notes: &mut Notes) -> Result<LogFormat, Malformed> {
    match format {
        None => Ok(LogFormat::istio_text()),
        Some(AccessLogFormat::Format(text)) => compile_text(&text, false, notes),
        Some(AccessLogFormat::JsonFormat(json) | AccessLogFormat::TypedJsonFormat(json)) => compile_json(json, false, notes),
        Some(AccessLogFormat::LogFormat(format)) => {
            let SubstitutionFormatString {
                omit_empty_values,
                content_type,
                formatters,
                json_format_options: _,
                format,
            } = format;
            ignore_set!(notes, content_type);
            check_formatters(&formatters, notes);
            match format {
                Some(Format::TextFormat(text)) => compile_text(&text, omit_empty_values, notes),
                Some(Format::JsonFormat(json)) => compile_json(json, omit_empty_values, notes),
                Some(Format::TextFormatSource(source)) => {
                    let text = notes.within("log_format.text_format_source", |notes| text_of(source, notes))?;
                    compile_text(&text, omit_empty_values, notes)
                }
                None => Err(notes.malformed("log_format", "is empty")),
            }
        }
    }
}

/// A format that stands elsewhere: Envoy reads it once too, and takes nothing of what it cannot read.
fn text_of(source: DataSource, notes: &Notes) -> Result<String, Malformed> {
    let DataSource {
        watched_directory: _,
        specifier,
    } = source;
    let bytes = match specifier {
        None => Vec::new(),
        Some(Specifier::InlineBytes(bytes)) => bytes,
        Some(Specifier::InlineString(text)) => return Ok(text),
        Some(Specifier::EnvironmentVariable(name)) => {
            let missing = || notes.malformed("environment_variable", format!("{name} is not set"));
            return tracer::environment(&name).ok_or_else(missing);
        }
        Some(Specifier::Filename(name)) => {
            let whole = std::fs::metadata(&name).and_then(|file| match file.len() {
                0..=MAX_FORMAT => std::fs::read(&name),
                length => Err(io::Error::other(format!(
                    "it has {length} bytes, and a format {MAX_FORMAT} at most"
                ))),
            });
            whole.map_err(|error| notes.malformed("filename", format!("{name} cannot be read: {error}")))?
        }
    };
    String::from_utf8(bytes).map_err(|_| notes.malformed("", "is no text"))
}

/// Formatters add operators. Those that we know need no configuration; the operators of others are listed where they stand.
fn check_formatters(formatters: &[TypedExtensionConfig], notes: &mut Notes) {
    for TypedExtensionConfig { name, typed_config } in formatters {
        let kind = typed_config.as_ref().map_or("", |any| type_name(&any.type_url));
        if !FORMATTERS.contains(&kind) {
            notes.ignore("log_format.formatters", format!("formatter {name} ({kind}) is not known"));
        }
    }
}

fn compile_text(text: &str, omit_empty: bool, notes: &mut Notes) -> Result<LogFormat, Malformed> {
    let template = Template::parse_log(text).map_err(|error| notes.malformed("log_format", error.to_string()))?;
    let format = LogFormat::Text {
        template,
        absent: if omit_empty { Absent::Empty } else { Absent::Dash },
    };
    Ok(listed(format, notes))
}

fn compile_json(json: Struct, omit_empty: bool, notes: &mut Notes) -> Result<LogFormat, Malformed> {
    let format = JsonFormat::new(fields(json), omit_empty).map_err(|error| notes.malformed("log_format", error.to_string()))?;
    Ok(listed(LogFormat::Json(format), notes))
}

/// Lists the operators of a format that have no value here.
fn listed(format: LogFormat, notes: &mut Notes) -> LogFormat {
    for operator in format.unrecorded() {
        notes.ignore("log_format", format!("%{operator}% has no value here"));
    }
    format
}

fn fields(json: Struct) -> Vec<(String, JsonValue)> {
    json.fields.into_iter().map(|(key, value)| (key, json_value(value))).collect()
}

fn json_value(value: Value) -> JsonValue {
    match value.kind {
        None | Some(Kind::NullValue(_)) => JsonValue::Null,
        Some(Kind::BoolValue(value)) => JsonValue::Bool(value),
        Some(Kind::NumberValue(value)) => JsonValue::Number(value),
        Some(Kind::StringValue(text)) => JsonValue::Text(text),
        Some(Kind::StructValue(object)) => JsonValue::Object(fields(object)),
        Some(Kind::ListValue(list)) => JsonValue::List(list.values.into_iter().map(json_value).collect()),
    }
}
