//! `set_filter_state` before requests: texts for formats. An object that Envoy itself would act on (a cluster, a server name, a key of
//! connections) is refused.

use cairn_exchange::format::Template;
use cairn_filters::set_filter_state::{Object, SetFilterState};
use cairn_proto::envoy::{
    config::core::v3::{SubstitutionFormatString, data_source::Specifier, substitution_format_string::Format},
    extensions::filters::{
        common::set_filter_state::v3::{
            FilterStateValue,
            filter_state_value::{Key, SharedWithUpstream, Value},
        },
        http::set_filter_state::v3::Config,
    },
};

use super::report::{Malformed, Notes, unneeded};

/// Kinds of objects that are texts and nothing else.
const TEXTS: [&str; 3] = ["envoy.string", "envoy.hashable_string", "istio.hashable_string"];

/// Compiles the filter.
pub(crate) fn compile(config: Config, notes: &mut Notes) -> Result<SetFilterState, Malformed> {
    let Config {
        on_request_headers,
        clear_route_cache,
    } = config;
    let mut objects = Vec::with_capacity(on_request_headers.len());
    for (index, value) in on_request_headers.into_iter().enumerate() {
        objects.extend(notes.at("on_request_headers", index, |notes| object(value, notes))?);
    }
    Ok(SetFilterState {
        objects,
        clear_route_cache,
    })
}

fn object(value: FilterStateValue, notes: &mut Notes) -> Result<Option<Object>, Malformed> {
    let FilterStateValue {
        factory_key,
        read_only,
        shared_with_upstream,
        skip_if_empty,
        key,
        value,
    } = value;
    let Some(Key::ObjectKey(key)) = key else {
        return Err(notes.malformed("object_key", "is missing"));
    };
    let kind = if factory_key.is_empty() { &key } else { &factory_key };
    if !TEXTS.contains(&kind.as_str()) {
        notes.refuse("factory_key", format!("objects of the kind {kind} are not supported"));
        return Ok(None);
    }
    if shared_with_upstream != SharedWithUpstream::None as i32 {
        notes.refuse("shared_with_upstream", "is not supported before requests");
    }
    let Some(Value::FormatString(SubstitutionFormatString {
        omit_empty_values,
        content_type,
        formatters,
        json_format_options,
        format,
    })) = value
    else {
        return Err(notes.malformed("format_string", "is missing"));
    };
    unneeded!(omit_empty_values, content_type, json_format_options);
    if !formatters.is_empty() {
        notes.refuse("format_string.formatters", "are not supported");
    }
    let text = match format {
        Some(Format::TextFormat(text)) => Some(text),
        Some(Format::TextFormatSource(source)) => match source.specifier {
            Some(Specifier::InlineString(text)) => Some(text),
            _ => None,
        },
        Some(Format::JsonFormat(_)) | None => None,
    };
    let Some(text) = text else {
        notes.refuse("format_string", "only an inline text is supported");
        return Ok(None);
    };
    let format = Template::parse(&text).map_err(|error| notes.malformed("format_string", error.to_string()))?;
    for operator in format.unrecorded() {
        notes.refuse("format_string", format!("%{operator}% is not known here"));
    }
    Ok(Some(Object {
        key: key.into(),
        format,
        skip_if_empty,
        read_only,
    }))
}
