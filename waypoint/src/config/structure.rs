//! `TypedStruct`: a message of ours written as a structure, as EnvoyFilters often do.
//!
//! The structure is read as the JSON of the message, so that a name or value that the message does not have is found and refused, as
//! Envoy does. The same structure stands in every chain of a waypoint: the last ones that were read are remembered.

use std::borrow::Cow;

use cairn_proto as proto;
use parking_lot::Mutex;
use prost::Message as _;
use prost_reflect::DynamicMessage;
use prost_types::{Any, Struct, Value, value::Kind};

use super::{
    any::{Unknown, type_name, unpack},
    report::{Malformed, Notes},
};

/// Structures that are remembered.
const REMEMBERED: usize = 16;
/// Nesting of values that is read.
const MAX_DEPTH: usize = 64;

/// Wrapping bytes and what was in them.
static LAST: Mutex<Vec<(Vec<u8>, Any)>> = Mutex::new(Vec::new());

/// Types that are read as structures too: those of filters and of what routes say of them.
const READ: &str = "envoy.extensions.filters.";

/// The message itself where a structure stands for it, and is one that we know; anything else as it is.
pub(crate) fn unwrapped<'a>(any: &'a Any, notes: &mut Notes) -> Result<Cow<'a, Any>, Malformed> {
    let (type_url, value) = match type_name(&any.type_url) {
        "udpa.type.v1.TypedStruct" => {
            let proto::udpa::r#type::v1::TypedStruct { type_url, value } = unpack(any, Unknown::Refuses, notes)?;
            (type_url, value)
        }
        "xds.type.v3.TypedStruct" => {
            let proto::xds::r#type::v3::TypedStruct { type_url, value } = unpack(any, Unknown::Refuses, notes)?;
            (type_url, value)
        }
        _ => return Ok(Cow::Borrowed(any)),
    };
    let name = type_name(&type_url);
    if !name.starts_with(READ) {
        return Ok(Cow::Borrowed(any));
    }
    if let Some((_, known)) = LAST.lock().iter().find(|(bytes, _)| *bytes == any.value) {
        return Ok(Cow::Owned(known.clone()));
    }
    let Some(descriptor) = proto::pool().get_message_by_name(name) else {
        return Ok(Cow::Borrowed(any));
    };
    let json = fields(&value.unwrap_or_default(), 0).ok_or_else(|| notes.malformed("", "is nested too deeply"))?;
    let message =
        DynamicMessage::deserialize(descriptor, json).map_err(|error| notes.malformed("", format!("is no {name}: {error}")))?;
    let message = Any {
        type_url,
        value: message.encode_to_vec(),
    };
    let mut last = LAST.lock();
    if last.len() >= REMEMBERED {
        last.remove(0);
    }
    last.push((any.value.clone(), message.clone()));
    Ok(Cow::Owned(message))
}

pub(crate) fn fields(value: &Struct, depth: usize) -> Option<serde_json::Value> {
    let each = value
        .fields
        .iter()
        .map(|(name, value)| Some((name.clone(), json(value, depth)?)));
    each.collect::<Option<serde_json::Map<_, _>>>().map(Into::into)
}

fn json(value: &Value, depth: usize) -> Option<serde_json::Value> {
    use serde_json::Value as Json;
    if depth > MAX_DEPTH {
        return None;
    }
    Some(match &value.kind {
        None | Some(Kind::NullValue(_)) => Json::Null,
        // A whole number is written as one: integers of messages take nothing else.
        Some(Kind::NumberValue(number)) if number.fract() == 0.0 && number.abs() < 9e15 => Json::from(*number as i64),
        Some(Kind::NumberValue(number)) => Json::from(*number),
        Some(Kind::StringValue(text)) => Json::from(text.as_str()),
        Some(Kind::BoolValue(truth)) => Json::from(*truth),
        Some(Kind::StructValue(inner)) => fields(inner, depth + 1)?,
        Some(Kind::ListValue(list)) => {
            let items = list.values.iter().map(|item| json(item, depth + 1));
            Json::Array(items.collect::<Option<_>>()?)
        }
    })
}
