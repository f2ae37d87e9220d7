//! The object as it is written: YAML or JSON, every member known.

use std::fmt;

use serde::Deserialize;

use super::OwnLimitsError;

/// The most limits in one object.
const MAX_LIMITS: usize = 256;
/// The most parts of what requests are told apart by.
const MAX_PARTS: usize = 16;

/// One limit.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Limit {
    /// The service's host; all without.
    service: Option<String>,
    /// Its port; all without.
    port: Option<u16>,
    /// The name of one route of it.
    route: Option<String>,
    /// What requests are told apart by; all count together without.
    #[serde(default)]
    pub by: Vec<Part>,
    /// Counted here.
    pub local: Option<Local>,
    /// Counted by a service.
    pub global: Option<Global>,
    /// Clients are told what is left.
    #[serde(default)]
    pub headers: bool,
    /// Status of a denial; 429 without.
    pub status: Option<u16>,
}

/// What a limit is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Scope {
    /// The service's host; all without.
    pub service: Option<String>,
    /// Its port; all without.
    pub port: Option<u16>,
    /// The name of one route of it.
    pub route: Option<String>,
}

/// A part of what requests are told apart by: exactly one of its sources.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Part {
    /// Its name in the descriptor; that of the source without.
    pub key: Option<String>,
    /// A header; a request without it is not counted.
    pub header: Option<String>,
    /// A query parameter; a request without it is not counted.
    pub query: Option<String>,
    /// The client's address.
    #[serde(default)]
    pub address: bool,
    /// The client's identity.
    #[serde(default)]
    pub principal: bool,
    /// The path, without the query.
    #[serde(default)]
    pub path: bool,
    /// The method.
    #[serde(default)]
    pub method: bool,
    /// Always this.
    pub value: Option<String>,
    /// The value of a CEL expression.
    pub cel: Option<String>,
    /// Only requests with this value are counted.
    pub is: Option<String>,
}

/// Counted here.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Local {
    /// So many requests …
    pub requests: u32,
    /// … in this time.
    pub per: String,
    /// So many at once, after a time without; as many as `requests` without.
    pub burst: Option<u32>,
    /// How many that are told apart are counted at once; the one that was idle longest gives way.
    pub distinct: Option<u32>,
}

/// Counted by a service that speaks Envoy's rate limit protocol.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Global {
    /// `host:port` of it, asked in plain HTTP/2.
    pub service: Option<String>,
    /// A cluster that istiod delivers, instead.
    pub cluster: Option<String>,
    /// The domain of its descriptors.
    pub domain: String,
    /// How long it may take; 20ms without.
    pub timeout: Option<String>,
    /// Requests are denied when it does not answer.
    #[serde(default)]
    pub fail_closed: bool,
}

/// Reads an object.
pub(super) fn parse(text: &str) -> Result<Vec<Limit>, OwnLimitsError> {
    let wrong = |place: &str, what: String| OwnLimitsError {
        place: place.to_owned(),
        what,
    };
    let limits: Vec<Limit> = serde_saphyr::from_str(text).map_err(|error| {
        let error = error.to_string();
        wrong("the object", error.lines().next().unwrap_or_default().to_owned())
    })?;
    if limits.len() > MAX_LIMITS {
        return Err(wrong(
            "the object",
            format!("{} limits are more than {MAX_LIMITS}", limits.len()),
        ));
    }
    for (index, limit) in limits.iter().enumerate() {
        let here = format!("[{index}]");
        if limit.local.is_some() == limit.global.is_some() {
            return Err(wrong(&here, "has to have either `local` or `global`".to_owned()));
        }
        if limit.by.len() > MAX_PARTS {
            return Err(wrong(
                &here,
                format!("{} parts in `by` are more than {MAX_PARTS}", limit.by.len()),
            ));
        }
        if limit.global.is_some() && limit.by.is_empty() {
            return Err(wrong(&here, "`global` needs `by`: a service counts descriptors".to_owned()));
        }
    }
    Ok(limits)
}

// === impl Limit ===

impl Limit {
    /// What it is for.
    pub fn scope(&self) -> Scope {
        Scope {
            service: self.service.clone(),
            port: self.port,
            route: self.route.clone(),
        }
    }
}

// === impl Scope ===

impl Scope {
    /// Whether it is for the chain of this name: `inbound-vip|80|http|web.app.svc.cluster.local`.
    pub fn is_of(&self, chain: &str) -> bool {
        let mut parts = chain.splitn(4, '|');
        let (Some("inbound-vip"), Some(port), Some(kind), Some(host)) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return false;
        };
        (kind == "http" || kind.starts_with("http/"))
            && self.service.as_deref().is_none_or(|service| service == host)
            && self.port.is_none_or(|own| port.parse() == Ok(own))
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.service.as_deref().unwrap_or("at all that speaks HTTP"))?;
        self.port.map_or(Ok(()), |port| write!(f, " with port {port}"))
    }
}
