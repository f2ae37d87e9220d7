//! Takes out of messages what nobody may see: what Envoy's definitions call sensitive.
//!
//! Keys, passwords and tokens may stand in secrets, in transport sockets and in filters, also in ones that we do not know how to serve:
//! the mark is in the definition of the field (`udpa.annotations.sensitive`), so no list of names can be out of date. As Envoy's dump
//! does, texts and bytes below a marked field are replaced, all else below it is left out.

use std::{collections::HashSet, sync::OnceLock};

use bytes::Bytes;
use cairn_proto::pool;
use prost_reflect::{DynamicMessage, FieldDescriptor, ReflectMessage as _, Value};

use super::any::type_name;

/// What stands in the place of what is secret, as in Envoy.
const REDACTED: &str = "[redacted]";
const MARK: &str = "udpa.annotations.sensitive";
const ANY: &str = "google.protobuf.Any";

/// Replaces what is secret in a message, and in the messages that are packed in it.
pub fn redact(message: &mut DynamicMessage) {
    hide(message, false);
}

/// The full names of the fields that are marked.
fn marked() -> &'static HashSet<String> {
    static MARKED: OnceLock<HashSet<String>> = OnceLock::new();
    MARKED.get_or_init(|| {
        let is_marked = |field: &FieldDescriptor| {
            let options = field.options();
            options
                .extensions()
                .any(|(mark, value)| mark.full_name() == MARK && *value == Value::Bool(true))
        };
        pool()
            .all_messages()
            .flat_map(|message| message.fields().collect::<Vec<_>>())
            .filter(is_marked)
            .map(|field| field.full_name().to_owned())
            .collect()
    })
}

fn hide(message: &mut DynamicMessage, secret: bool) {
    if message.descriptor().full_name() == ANY {
        return hide_packed(message, secret);
    }
    let fields: Vec<FieldDescriptor> = message.fields().map(|(field, _)| field).collect();
    for field in fields {
        let secret = secret || marked().contains(field.full_name());
        if !hide_value(message.get_field_mut(&field), secret) {
            message.clear_field(&field);
        }
    }
}

/// Replaces what is secret in a value; `false` when it cannot stay.
fn hide_value(value: &mut Value, secret: bool) -> bool {
    match value {
        Value::Message(message) => hide(message, secret),
        Value::List(values) => values.retain_mut(|value| hide_value(value, secret)),
        Value::Map(values) => values.retain(|_, value| hide_value(value, secret)),
        Value::String(text) if secret => REDACTED.clone_into(text),
        Value::Bytes(bytes) if secret => *bytes = Bytes::from_static(REDACTED.as_bytes()),
        _ => return !secret,
    }
    true
}

/// What is in an `Any`. Of a type that is not known nothing can be shown anyway, and nothing is kept.
fn hide_packed(any: &mut DynamicMessage, secret: bool) {
    let unpacked = match (any.get_field_by_name("type_url"), any.get_field_by_name("value")) {
        (Some(type_url), Some(value)) => type_url
            .as_str()
            .and_then(|type_url| pool().get_message_by_name(type_name(type_url)))
            .zip(value.as_bytes().cloned())
            .and_then(|(descriptor, bytes)| DynamicMessage::decode(descriptor, bytes).ok()),
        _ => None,
    };
    match unpacked {
        Some(mut message) => {
            hide(&mut message, secret);
            let bytes = prost::Message::encode_to_vec(&message);
            any.set_field_by_name("value", Value::Bytes(bytes.into()));
        }
        None if secret => any.clear_field_by_name("value"),
        None => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::dump::resource_json;
    use super::*;

    /// Encodes a message that is written as JSON, and shows it as a dump does.
    fn shown(kind: &str, written: &serde_json::Value) -> String {
        let held = pool();
        let descriptor = held.get_message_by_name(kind).unwrap();
        let message = DynamicMessage::deserialize(descriptor, written).unwrap();
        let bytes = prost::Message::encode_to_vec(&message);
        resource_json(&format!("type.googleapis.com/{kind}"), &bytes).to_string()
    }

    #[test]
    fn nothing_that_is_marked_is_shown_wherever_it_stands() {
        let key = json!({ "inline_string": "HIDE-key" });
        let certificate = json!({
            "certificate_chain": { "inline_string": "SHOW-chain" },
            "private_key": key,
            "pkcs12": { "inline_bytes": "SElERS1wa2NzMTI=" },
            "password": { "inline_string": "HIDE-password" },
        });
        let secret = "envoy.extensions.transport_sockets.tls.v3.Secret";
        let cases = [
            (secret, json!({ "name": "SHOW-name", "tls_certificate": certificate })),
            (
                secret,
                json!({ "name": "SHOW-name", "session_ticket_keys": { "keys": [key, key] } }),
            ),
            (secret, json!({ "name": "SHOW-name", "generic_secret": { "secret": key } })),
            (
                "envoy.config.cluster.v3.Cluster",
                json!({
                    "name": "SHOW-name",
                    "transport_socket": {
                        "name": "SHOW-socket",
                        "typed_config": {
                            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                            "sni": "SHOW-sni",
                            "common_tls_context": { "tls_certificates": [certificate] },
                        },
                    },
                }),
            ),
        ];
        for (kind, written) in cases {
            let shown = shown(kind, &written);
            assert!(shown.contains("[redacted]") || shown.contains("W3JlZGFjdGVkXQ=="), "{shown}");
            assert!(!shown.contains("HIDE") && !shown.contains("SElERS1wa2NzMTI="), "{shown}");
            let written = written.to_string();
            for show in ["SHOW-name", "SHOW-socket", "SHOW-sni", "SHOW-chain"] {
                assert_eq!(shown.contains(show), written.contains(show), "{show}: {shown}");
            }
        }
    }
}
