//! Dynamic metadata as the record has it: what filters have noted, and what rules that are only tried out would have done.
//!
//! Envoy's authorization filter notes the latter under its own name; here they are facts of the record.

use serde_json::{Map, Value as Json};

use super::Value;
use crate::{Exchange, ShadowDecision};

/// The namespaces of authorization's notes, for HTTP and for connections.
const RBAC: [&str; 2] = ["envoy.filters.http.rbac", "envoy.filters.network.rbac"];

/// The value at a path in a namespace; without a path, the namespace.
pub(super) fn noted<'a>(exchange: &'a Exchange, namespace: &str, path: &[Box<str>]) -> Value<'a> {
    let metadata = &exchange.metadata;
    if path.is_empty() {
        let noted = metadata
            .namespace(namespace)
            .map(|(key, value)| (key.to_owned(), value.clone()));
        let mut all: Map<String, Json> = noted.collect();
        if RBAC.contains(&namespace) {
            for decision in &exchange.shadow {
                let (result, policy) = words(decision);
                all.insert(format!("{}shadow_engine_result", decision.prefix), result.into());
                if let Some(policy) = policy {
                    all.insert(format!("{}shadow_effective_policy_id", decision.prefix), policy.into());
                }
            }
        }
        return if all.is_empty() {
            Value::Absent
        } else {
            Value::Json(Json::Object(all).to_string().into())
        };
    }
    match metadata.get(namespace, path) {
        Some(value) => of_json(value),
        None => tried_out(exchange, namespace, path),
    }
}

/// Text as it is, other things as JSON.
fn of_json(value: &Json) -> Value<'_> {
    match value {
        Json::Null => Value::Absent,
        Json::String(text) => Value::text(text),
        other => Value::Json(other.to_string().into()),
    }
}

fn words(decision: &ShadowDecision) -> (&'static str, Option<&str>) {
    let result = if decision.allowed { "allowed" } else { "denied" };
    (result, decision.policy.as_deref())
}

fn tried_out<'a>(exchange: &'a Exchange, namespace: &str, path: &[Box<str>]) -> Value<'a> {
    let ([key], true) = (path, RBAC.contains(&namespace)) else {
        return Value::Absent;
    };
    let found = exchange.shadow.iter().find_map(|decision| {
        let (result, policy) = words(decision);
        match key.strip_prefix(&*decision.prefix)? {
            "shadow_engine_result" => Some(result),
            "shadow_effective_policy_id" => policy,
            _ => None,
        }
    });
    found.map_or(Value::Absent, Value::text)
}
