//! `/config_dump`, as Envoy's, from the resources as istiod sent them (contract runtime §8.6).
//!
//! Nothing of the compiled form is in it: what tools read is what istiod wrote, field for field. Private keys are left out.

use std::time::SystemTime;

use cairn_proto::TYPE_URL_PREFIX;
use prost_reflect::{DynamicMessage, SerializeOptions};
use serde_json::{Map, Value, json};

use super::{
    any::type_name,
    compiler::{CLUSTERS, ENDPOINTS, EXTENSIONS, LISTENERS, SECRETS},
    redact,
    store::{Store, Stored},
};

/// What stands in the place of what is secret, as in Envoy: base64 of `[redacted]`.
const REDACTED: &str = "W3JlZGFjdGVkXQ==";

/// Fields of a secret that are replaced as a whole, so that not even their form is seen; what else is secret [`redact`] replaces.
const SECRET_FIELDS: [&str; 5] = ["private_key", "pkcs12", "password", "session_ticket_keys", "generic_secret"];

/// The whole page. `node` is the node of the bootstrap section; endpoints are shown on demand, as in Envoy.
pub fn config_dump(store: &Store, node: Value, include_endpoints: bool) -> Value {
    let _held_for_all = cairn_proto::pool();
    let mut configs = vec![
        json!({ "@type": section("BootstrapConfigDump"), "bootstrap": { "node": node } }),
        clusters(store),
    ];
    if include_endpoints {
        configs.push(endpoints(store));
    }
    configs.extend([listeners(store), routes(store), secrets(store), extensions(store)]);
    // Not only in secrets: a key may stand in any transport socket that a user has patched in.
    configs.iter_mut().for_each(replace_secrets);
    json!({ "configs": configs })
}

fn section(name: &str) -> String {
    format!("{TYPE_URL_PREFIX}envoy.admin.v3.{name}")
}

/// A resource as JSON with its type, without what is secret in it.
pub fn resource_json(type_url: &str, bytes: &[u8]) -> Value {
    let message = cairn_proto::pool()
        .get_message_by_name(type_name(type_url))
        .ok_or_else(|| format!("{type_url} is not known"))
        .and_then(|descriptor| DynamicMessage::decode(descriptor, bytes).map_err(|error| error.to_string()))
        .and_then(|mut message| {
            redact::redact(&mut message);
            message_json(&message)
        });
    match message {
        Ok(Value::Object(fields)) => {
            let mut object = Map::from_iter([("@type".to_owned(), Value::from(type_url))]);
            object.extend(fields);
            Value::Object(object)
        }
        Ok(other) => other,
        Err(error) => json!({ "@type": type_url, "error": format!("cannot be shown: {error}") }),
    }
}

fn message_json(message: &DynamicMessage) -> Result<Value, String> {
    let options = SerializeOptions::new()
        .use_proto_field_name(true)
        .skip_default_fields(true)
        .stringify_64_bit_integers(true);
    message
        .serialize_with_options(serde_json::value::Serializer, &options)
        .map_err(|error| error.to_string())
}

fn timestamp(time: SystemTime) -> Value {
    humantime::format_rfc3339_millis(time).to_string().into()
}

/// What every dynamic resource is shown with.
fn dynamic(store: &Store, type_url: &str, stored: &Stored, field: &str) -> Map<String, Value> {
    let mut entry = Map::from_iter([
        ("version_info".to_owned(), Value::from(store.version(type_url))),
        (field.to_owned(), resource_json(type_url, &stored.bytes)),
        ("last_updated".to_owned(), timestamp(stored.updated)),
    ]);
    if let Some((details, at)) = &stored.error {
        let state = json!({ "failed_configuration": null, "last_update_attempt": timestamp(*at), "details": details });
        entry.insert("error_state".to_owned(), state);
    }
    entry
}

fn clusters(store: &Store) -> Value {
    let active: Vec<Value> = store
        .resources(CLUSTERS)
        .iter()
        .map(|(_, stored)| Value::Object(dynamic(store, CLUSTERS, stored, "cluster")))
        .collect();
    json!({
        "@type": section("ClustersConfigDump"),
        "version_info": store.version(CLUSTERS),
        "static_clusters": [],
        "dynamic_active_clusters": active,
    })
}

fn endpoints(store: &Store) -> Value {
    let of = |(_, stored): &(String, Stored)| Value::Object(dynamic(store, ENDPOINTS, stored, "endpoint_config"));
    let configs: Vec<Value> = store.resources(ENDPOINTS).iter().map(of).collect();
    json!({ "@type": section("EndpointsConfigDump"), "dynamic_endpoint_configs": configs })
}

fn listeners(store: &Store) -> Value {
    let of = |(name, stored): &(String, Stored)| {
        let mut state = dynamic(store, LISTENERS, stored, "listener");
        let mut entry = Map::from_iter([("name".to_owned(), Value::from(name.as_str()))]);
        if let Some(error) = state.remove("error_state") {
            entry.insert("error_state".to_owned(), error);
        }
        entry.insert("active_state".to_owned(), Value::Object(state));
        Value::Object(entry)
    };
    let listeners: Vec<Value> = store.resources(LISTENERS).iter().map(of).collect();
    json!({
        "@type": section("ListenersConfigDump"),
        "version_info": store.version(LISTENERS),
        "static_listeners": [],
        "dynamic_listeners": listeners,
    })
}

/// Routes stand in listeners; Envoy shows them once more here.
fn routes(store: &Store) -> Value {
    let mut routes = Vec::new();
    for (_, stored) in store.resources(LISTENERS) {
        find_routes(
            &resource_json(LISTENERS, &stored.bytes),
            &timestamp(stored.updated),
            &mut routes,
        );
    }
    json!({ "@type": section("RoutesConfigDump"), "static_route_configs": routes })
}

fn find_routes(value: &Value, updated: &Value, routes: &mut Vec<Value>) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                match value {
                    Value::Object(config) if key == "route_config" => {
                        let type_url = format!("{TYPE_URL_PREFIX}envoy.config.route.v3.RouteConfiguration");
                        let mut object = Map::from_iter([("@type".to_owned(), Value::from(type_url))]);
                        object.extend(config.clone());
                        routes.push(json!({ "route_config": object, "last_updated": updated }));
                    }
                    other => find_routes(other, updated, routes),
                }
            }
        }
        Value::Array(values) => values.iter().for_each(|value| find_routes(value, updated, routes)),
        _ => {}
    }
}

fn secrets(store: &Store) -> Value {
    let of = |(name, stored): &(String, Stored)| {
        let mut entry = dynamic(store, SECRETS, stored, "secret");
        entry.insert("name".to_owned(), Value::from(name.as_str()));
        Value::Object(entry)
    };
    let secrets: Vec<Value> = store.resources(SECRETS).iter().map(of).collect();
    json!({ "@type": section("SecretsConfigDump"), "dynamic_active_secrets": secrets })
}

fn replace_secrets(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                if SECRET_FIELDS.contains(&key.as_str()) {
                    *value = json!({ "inline_bytes": REDACTED });
                } else {
                    replace_secrets(value);
                }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(replace_secrets),
        _ => {}
    }
}

fn extensions(store: &Store) -> Value {
    let of = |(_, stored): &(String, Stored)| Value::Object(dynamic(store, EXTENSIONS, stored, "ecds_filter"));
    let filters: Vec<Value> = store.resources(EXTENSIONS).iter().map(of).collect();
    json!({ "@type": section("EcdsConfigDump"), "ecds_filters": filters })
}
