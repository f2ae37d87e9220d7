//! Access logs (contract runtime §7.5): files with their formats and filters; other loggers are listed and left out.
//!
//! A log decides nothing, so nothing here refuses traffic. A sink whose filter cannot be done is left out rather than
//! logging more than was asked for. An operator that is not known is an absent value, and is listed; a format that is wrong in itself
//! is so for Envoy too.

use cairn_exchange::{
    ResponseFlags,
    format::{Absent, Template},
};
use cairn_proto::envoy::{
    config::{
        accesslog::v3::{
            AccessLog as EnvoyAccessLog, AccessLogFilter, AndFilter, ComparisonFilter, DurationFilter, OrFilter,
            ResponseFlagFilter, StatusCodeFilter, access_log::ConfigType, access_log_filter::FilterSpecifier,
            comparison_filter::Op,
        },
        core::v3::{SubstitutionFormatString, TypedExtensionConfig, substitution_format_string::Format},
    },
    extensions::access_loggers::file::v3::{FileAccessLog, file_access_log::AccessLogFormat},
};
use cairn_telemetry::access_log::{AccessLog, Comparison, Filter, JsonFormat, JsonValue, LogFiles, LogFormat, Sink};
use prost_types::{Struct, Value, value::Kind};

use super::{
    any::{Typed, Unknown, type_name, typed, unpack},
    report::{Malformed, Notes, ignore_set},
    value::inline,
};

/// Formatters whose operators are known without them.
const FORMATTERS: [&str; 3] = [
    "envoy.extensions.formatter.cel.v3.Cel",
    "envoy.extensions.formatter.metadata.v3.Metadata",
    "envoy.extensions.formatter.req_without_query.v3.ReqWithoutQuery",
];

/// Compiles the logs of a chain. Without `files` (nothing is served) formats are checked and nothing is opened.
pub(crate) fn compile(logs: Vec<EnvoyAccessLog>, files: Option<&LogFiles>, notes: &mut Notes) -> Result<AccessLog, Malformed> {
    compile_those(logs, files, notes, |_, _| ())
}

/// Compiles the logs of tunnels. Refused ones have lines; a log that is not about those alone is listed.
pub(crate) fn refusals(logs: Vec<EnvoyAccessLog>, files: Option<&LogFiles>, notes: &mut Notes) -> Result<AccessLog, Malformed> {
    compile_those(logs, files, notes, |filter, notes| {
        if !is_about_refusals(filter) {
            notes.ignore("filter", "only tunnels that are refused are written");
        }
    })
}

fn compile_those(
    logs: Vec<EnvoyAccessLog>,
    files: Option<&LogFiles>,
    notes: &mut Notes,
    check: fn(&Filter, &mut Notes),
) -> Result<AccessLog, Malformed> {
    let mut sinks = Vec::new();
    for (index, log) in logs.into_iter().enumerate() {
        let sink = notes.at("access_log", index, |notes| compile_sink(log, files, notes, check))?;
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
        Filter::Always | Filter::Status(Comparison::AtMost, _) | Filter::Duration(..) | Filter::Flags(_) => false,
    }
}

fn compile_sink(
    log: EnvoyAccessLog,
    files: Option<&LogFiles>,
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
    let path;
    let format = match typed(&any, notes)? {
        Typed::Message("envoy.extensions.access_loggers.file.v3.FileAccessLog", any) => {
            let log: FileAccessLog = unpack(any, Unknown::Ignored, notes)?;
            let FileAccessLog {
                path: own_path,
                access_log_format,
            } = log;
            path = own_path;
            compile_format(access_log_format, notes)?
        }
        other => {
            notes.ignore("", format!("log {name} ({}) is not supported yet", other.name()));
            return Ok(None);
        }
    };
    let filter = match filter.map(|filter| notes.within("filter", |notes| compile_filter(filter, notes))) {
        None => Filter::Always,
        Some(Ok(filter)) => filter,
        Some(Err(NotDone)) => return Ok(None),
    };
    check(&filter, notes);
    let Some(files) = files else { return Ok(None) };
    match files.open(&path) {
        Ok(file) => Ok(Some(Sink { format, filter, file })),
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
                    let mut aside = Notes::of("");
                    let text = inline("text_format_source", source, &mut aside)
                        .and_then(|text| String::from_utf8(text).ok())
                        .ok_or_else(|| {
                            notes.malformed("log_format.text_format_source", "is no text in the configuration itself")
                        })?;
                    compile_text(&text, omit_empty_values, notes)
                }
                None => Err(notes.malformed("log_format", "is empty")),
            }
        }
    }
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

/// A filter that cannot be done, and is listed.
struct NotDone;

fn compile_filter(filter: AccessLogFilter, notes: &mut Notes) -> Result<Filter, NotDone> {
    let AccessLogFilter { filter_specifier } = filter;
    let mut not_done = |what: &str| {
        notes.ignore("", format!("{what} is not supported yet; the log is left out"));
        Err(NotDone)
    };
    match filter_specifier {
        None => Ok(Filter::Always),
        Some(FilterSpecifier::StatusCodeFilter(StatusCodeFilter { comparison })) => match comparison.and_then(compare) {
            Some((comparison, than)) => Ok(Filter::Status(comparison, than)),
            None => not_done("this status_code_filter"),
        },
        Some(FilterSpecifier::DurationFilter(DurationFilter { comparison })) => match comparison.and_then(compare) {
            Some((comparison, than)) => Ok(Filter::Duration(comparison, than)),
            None => not_done("this duration_filter"),
        },
        Some(FilterSpecifier::ResponseFlagFilter(ResponseFlagFilter { flags: names })) => {
            let mut flags = ResponseFlags::NONE;
            for name in names {
                match ResponseFlags::from_short(&name) {
                    Some(flag) => flags.insert(flag),
                    None => notes.ignore("flags", format!("`{name}` never occurs")),
                }
            }
            Ok(Filter::Flags(flags))
        }
        Some(FilterSpecifier::AndFilter(AndFilter { filters })) => Ok(Filter::All(all(filters, notes)?)),
        Some(FilterSpecifier::OrFilter(OrFilter { filters })) => Ok(Filter::Any(all(filters, notes)?)),
        // Health checks are answered by an HTTP filter that istiod does not send.
        Some(FilterSpecifier::NotHealthCheckFilter(_)) => Ok(Filter::Always),
        Some(FilterSpecifier::ExtensionFilter(extension)) => not_done(&format!("filter {}", extension.name)),
        Some(FilterSpecifier::TraceableFilter(_)) => not_done("traceable_filter"),
        Some(FilterSpecifier::RuntimeFilter(_)) => not_done("runtime_filter"),
        Some(FilterSpecifier::HeaderFilter(_)) => not_done("header_filter"),
        Some(FilterSpecifier::GrpcStatusFilter(_)) => not_done("grpc_status_filter"),
        Some(FilterSpecifier::MetadataFilter(_)) => not_done("metadata_filter"),
        Some(FilterSpecifier::LogTypeFilter(_)) => not_done("log_type_filter"),
    }
}

fn all(filters: Vec<AccessLogFilter>, notes: &mut Notes) -> Result<Box<[Filter]>, NotDone> {
    filters.into_iter().map(|filter| compile_filter(filter, notes)).collect()
}

fn compare(comparison: ComparisonFilter) -> Option<(Comparison, u64)> {
    let ComparisonFilter { op, value } = comparison;
    let comparison = match Op::try_from(op).ok()? {
        Op::Eq => Comparison::Equal,
        Op::Ge => Comparison::AtLeast,
        Op::Le => Comparison::AtMost,
        Op::Ne => Comparison::NotEqual,
    };
    Some((comparison, value?.default_value.into()))
}
