//! `ProxyConfig`: what the mesh, the variable `PROXY_CONFIG` and the pod's annotation say about this proxy.
//!
//! Each layer lies over the one before (contract runtime §8.2): defaults, `PROXY_CONFIG` (into which istiod has merged the
//! mesh's), the annotation `proxy.istio.io/config`. Objects are merged field by field, as protobuf merges messages and as Istio
//! merges `proxyMetadata`; everything else is replaced. JSON is YAML, so both are read as YAML. The merged object goes to istiod
//! as it is; here it is asked only for what an agent needs.

use std::time::Duration;

use serde_json::{Map, Value};

use super::environment::{self, SettingError, wrong};

/// The pod's annotation.
pub const ANNOTATION: &str = "proxy.istio.io/config";
/// The variable.
pub const VARIABLE: &str = "PROXY_CONFIG";

/// The merged configuration.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ProxyConfig(Map<String, Value>);

// === impl ProxyConfig ===

impl ProxyConfig {
    /// The variable's text, and the annotation's over it.
    pub fn merge(variable: Option<&str>, annotation: Option<&str>) -> Result<Self, SettingError> {
        let mut merged = Map::new();
        for (name, text) in [(VARIABLE, variable), (ANNOTATION, annotation)] {
            if let Some(text) = text.filter(|text| !text.trim().is_empty()) {
                lay_over(&mut merged, read(name, text)?);
            }
        }
        Ok(Self(merged))
    }

    /// As protobuf JSON, without defaults.
    pub fn json(&self) -> &Map<String, Value> {
        &self.0
    }

    /// A text field that is set and not empty.
    pub fn text(&self, field: &str) -> Option<&str> {
        self.0.get(field).and_then(Value::as_str).filter(|text| !text.is_empty())
    }

    /// A time.
    pub fn duration(&self, field: &str, default: Duration) -> Result<Duration, SettingError> {
        let name = named(field);
        match self.0.get(field) {
            None | Some(Value::Null) => Ok(default),
            Some(Value::String(text)) => environment::duration(&name, text),
            Some(other) => Err(wrong(&name, other, "a time such as \"5s\"")),
        }
    }

    /// A port.
    pub fn port(&self, field: &str, default: u16) -> Result<u16, SettingError> {
        Ok(match self.number(field, "a port from 1 to 65535")? {
            None | Some(0) => default,
            Some(port) => u16::try_from(port).map_err(|_| wrong(&named(field), port, "a port from 1 to 65535"))?,
        })
    }

    /// A count.
    pub fn number(&self, field: &str, accepted: &'static str) -> Result<Option<u64>, SettingError> {
        match self.0.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => {
                // Protobuf JSON allows numbers as text.
                let number = value.as_u64().or_else(|| value.as_str()?.parse().ok());
                number.map(Some).ok_or_else(|| wrong(&named(field), value, accepted))
            }
        }
    }

    /// Variables that it sets: `proxyMetadata`.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, &str)> {
        let entries = self.0.get("proxyMetadata").and_then(Value::as_object).into_iter().flatten();
        entries.filter_map(|(name, value)| Some((name.as_str(), value.as_str()?)))
    }
}

fn named(field: &str) -> String {
    format!("{VARIABLE}.{field}")
}

fn read(name: &str, text: &str) -> Result<Map<String, Value>, SettingError> {
    let unreadable = |reason| SettingError::Unreadable {
        name: name.to_owned(),
        form: "JSON or YAML",
        reason,
    };
    let value: Value = serde_saphyr::from_str(text).map_err(|error| unreadable(first_line(&error.to_string())))?;
    match value {
        Value::Object(fields) => Ok(fields),
        Value::Null => Ok(Map::new()),
        _ => Err(unreadable("it is not an object with fields".to_owned())),
    }
}

fn first_line(words: &str) -> String {
    words.lines().next().unwrap_or_default().to_owned()
}

fn lay_over(below: &mut Map<String, Value>, above: Map<String, Value>) {
    for (field, value) in above {
        match (below.get_mut(&field), value) {
            (Some(Value::Object(below)), Value::Object(above)) => lay_over(below, above),
            (_, value) => {
                below.insert(field, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_annotation_lies_over_the_variable() {
        let variable = r#"{"discoveryAddress":"istiod-canary.istio-system.svc:15012","terminationDrainDuration":"20s","proxyMetadata":{"A":"1","B":"2"}}"#;
        let annotation =
            "terminationDrainDuration: 1m\nconcurrency: 3\nproxyMetadata:\n  B: \"3\"\nholdApplicationUntilProxyStarts: true\n";
        let config = ProxyConfig::merge(Some(variable), Some(annotation)).unwrap();
        assert_eq!(config.text("discoveryAddress"), Some("istiod-canary.istio-system.svc:15012"));
        assert_eq!(
            config.duration("terminationDrainDuration", Duration::ZERO),
            Ok(Duration::from_secs(60))
        );
        assert_eq!(config.number("concurrency", ""), Ok(Some(3)));
        assert_eq!(config.metadata().collect::<Vec<_>>(), [("A", "1"), ("B", "3")]);
        assert_eq!(config.json().get("holdApplicationUntilProxyStarts"), Some(&json!(true)));
    }

    #[test]
    fn nothing_set_is_no_error() {
        for text in [None, Some(""), Some("{}"), Some("  \n")] {
            let config = ProxyConfig::merge(text, None).unwrap();
            assert_eq!(config.port("statusPort", 15020), Ok(15020));
            assert_eq!(
                config.duration("terminationDrainDuration", Duration::from_secs(5)),
                Ok(Duration::from_secs(5))
            );
        }
    }

    #[test]
    fn what_cannot_be_read_is_one_sentence() {
        let cases = [
            (r#"{"a":"#, "PROXY_CONFIG cannot be read as JSON or YAML: "),
            (
                "[1, 2]",
                "PROXY_CONFIG cannot be read as JSON or YAML: it is not an object with fields",
            ),
        ];
        for (text, start) in cases {
            let error = ProxyConfig::merge(Some(text), None).unwrap_err().to_string();
            assert!(error.starts_with(start) && !error.contains('\n'), "{error}");
        }
        let config = ProxyConfig::merge(
            Some(r#"{"statusPort": 70000, "drainDuration": 45, "concurrency": "many"}"#),
            None,
        )
        .unwrap();
        for (error, want) in [
            (
                config.port("statusPort", 1).unwrap_err(),
                "PROXY_CONFIG.statusPort=\"70000\" cannot be used",
            ),
            (
                config.duration("drainDuration", Duration::ZERO).unwrap_err(),
                "PROXY_CONFIG.drainDuration=\"45\" cannot be used",
            ),
            (
                config.number("concurrency", "a number").unwrap_err(),
                "PROXY_CONFIG.concurrency=\"\\\"many\\\"\" cannot be used",
            ),
        ] {
            assert!(error.to_string().starts_with(want), "{error}");
        }
    }
}
