//! What is asked of an explanation: who wants what from whom.
//!
//! A [`Question`] is text, as the command line, a table of cases or a recorded exchange has it; [`Asked`] is the same, checked, with
//! the service looked up in a configuration.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
};

use cairn_exchange::{Connection, DynamicMetadata, RequestHead, Scheme, SpiffeId, clock};
use http::{HeaderMap, HeaderName, HeaderValue, Method, header, uri::PathAndQuery};
use serde::{Deserialize, Serialize};

use crate::snapshot::{
    Serves, Snapshot,
    matcher::{Facts, Input, Node, Spoken},
};

/// Most fields of a request in a question.
const MOST_HEADERS: usize = 200;
/// Services that are named where one is not found.
const MOST_NAMES: usize = 8;
/// The trust domain of a client that is named without one.
const TRUST_DOMAIN: &str = "cluster.local";

/// Who wants what from whom.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Question {
    /// The client: `spiffe://…`, or `NAMESPACE/SERVICEACCOUNT` of `cluster.local`. Without it, a client without an identity.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// `SERVICE:PORT` or `ADDRESS:PORT`.
    pub to: String,
    /// GET without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
    /// `/` without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// `name: value`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub headers: Vec<String>,
    /// The client's address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_ip: Option<IpAddr>,
    /// A token, sent as `authorization: Bearer`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jwt: Option<String>,
    /// Not HTTP.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub tcp: bool,
}

/// What is wrong with a question.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum QuestionError {
    /// A part of it is not what it should be.
    #[error("{part} {given:?} is not {wanted}")]
    Part {
        /// Which part.
        part: &'static str,
        /// What was given.
        given: String,
        /// What it should be.
        wanted: &'static str,
    },
    /// There are too many fields.
    #[error("there are more than {MOST_HEADERS} headers")]
    TooManyHeaders,
    /// The configuration has no such service.
    #[error("no service of this waypoint is called {host:?} and has the port {port}{}", known(.names))]
    NoService {
        /// The name.
        host: String,
        /// The port.
        port: u16,
        /// Some that are there.
        names: Vec<String>,
    },
}

fn known(names: &[String]) -> String {
    if names.is_empty() {
        "; it serves none".to_owned()
    } else {
        format!("; it serves {}", names.join(", "))
    }
}

/// A question that was checked.
#[derive(Clone, Debug)]
pub struct Asked {
    /// The parties.
    pub connection: Arc<Connection>,
    /// The authority, when it is an address.
    pub address: Option<SocketAddr>,
    /// The request; `None` for bytes.
    pub head: Option<RequestHead>,
    /// Whether the client's address was given.
    pub source_given: bool,
    /// What filters noted when the exchange was recorded; its tokens are not in the record.
    pub noted: Option<DynamicMetadata>,
}

// === impl Question ===

impl Question {
    /// Checks it, and looks its service up.
    pub fn ask(&self, snapshot: &Snapshot) -> Result<Asked, QuestionError> {
        let peer = self.from.as_deref().map(identity).transpose()?;
        let (host, port) = self
            .to
            .rsplit_once(':')
            .and_then(|(host, port)| Some((host, port.parse().ok().filter(|port| *port != 0)?)))
            .filter(|(host, _)| !host.is_empty())
            .ok_or_else(|| part("to", &self.to, "SERVICE:PORT or ADDRESS:PORT"))?;
        let spoken = if self.tcp { Spoken::Other } else { Spoken::Http11 };
        let given: Option<SocketAddr> = self.to.parse().ok();
        let found = match given {
            Some(address) => (address, self.to.clone()),
            None => find(snapshot, host, port, spoken)?,
        };
        let (address, authority) = found;
        let host = match given {
            Some(_) => self.to.clone(),
            None if port == 80 => authority,
            None => format!("{authority}:{port}"),
        };
        let head = if self.tcp { None } else { Some(self.head(&host)?) };
        let connection = Connection {
            id: 0,
            authority: address.to_string().into(),
            local_address: Some(address),
            service_port: port,
            remote_address: SocketAddr::new(self.source_ip.unwrap_or(Ipv4Addr::UNSPECIFIED.into()), 0),
            peer,
            local: None,
            source: self.source_ip.and_then(|address| snapshot.workloads.workload_at(address)),
            requested_server_name: None,
            opened: clock::now(),
        };
        Ok(Asked {
            connection: Arc::new(connection),
            address: Some(address),
            head,
            source_given: self.source_ip.is_some(),
            noted: None,
        })
    }

    fn head(&self, host: &str) -> Result<RequestHead, QuestionError> {
        if self.headers.len() > MOST_HEADERS {
            return Err(QuestionError::TooManyHeaders);
        }
        let method = self.method.as_deref().unwrap_or("GET");
        let path = self.path.as_deref().unwrap_or("/");
        let mut head = RequestHead {
            method: Method::from_bytes(method.as_bytes()).map_err(|_| part("method", method, "a method"))?,
            path: PathAndQuery::try_from(path)
                .ok()
                .filter(|_| path.starts_with('/') || path == "*")
                .ok_or_else(|| part("path", path, "a path that begins with /"))?,
            authority: HeaderValue::from_str(host).map_err(|_| part("to", host, "a host"))?,
            scheme: Scheme::Http,
            headers: HeaderMap::new(),
        };
        for line in &self.headers {
            let wrong = || part("header", line, "`name: value`");
            let (name, value) = line.split_once(':').filter(|(name, _)| !name.is_empty()).ok_or_else(wrong)?;
            let value = HeaderValue::from_str(value.trim()).map_err(|_| wrong())?;
            let name = HeaderName::from_bytes(name.trim().as_bytes()).map_err(|_| wrong())?;
            if name == header::HOST {
                head.authority = value;
            } else {
                head.headers.append(name, value);
            }
        }
        if let Some(token) = &self.jwt {
            let wrong = || part("jwt", "(hidden)", "a token");
            let value = HeaderValue::from_str(&format!("Bearer {}", token.trim())).map_err(|_| wrong())?;
            head.headers.insert(header::AUTHORIZATION, value);
        }
        Ok(head)
    }
}

fn part(part: &'static str, given: &str, wanted: &'static str) -> QuestionError {
    QuestionError::Part {
        part,
        given: given.to_owned(),
        wanted,
    }
}

fn identity(text: &str) -> Result<SpiffeId, QuestionError> {
    let parsed = match text.split_once('/') {
        Some((namespace, account)) if !text.contains(':') => SpiffeId::workload(TRUST_DOMAIN, namespace, account),
        _ => text.parse(),
    };
    parsed.map_err(|_| {
        part(
            "from",
            text,
            "spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT or NAMESPACE/ACCOUNT",
        )
    })
}

// === looking services up ===

/// What a matcher is asked, with an address.
pub(super) fn facts<'a>(address: Option<SocketAddr>, source_ip: IpAddr, authority: &'a str, spoken: Spoken) -> Facts<'a> {
    Facts {
        destination_ip: address.map(|address| address.ip()),
        destination_port: address.map(|address| address.port()),
        source_ip,
        authority,
        source: None,
        spoken: Some(spoken),
    }
}

/// An address at which the service is served, and its full name: `web.app` is `web.app.svc.cluster.local`.
fn find(snapshot: &Snapshot, host: &str, port: u16, spoken: Spoken) -> Result<(SocketAddr, String), QuestionError> {
    let is = |name: &str| name == host || name.strip_prefix(host).is_some_and(|rest| rest.starts_with('.'));
    let served = |address: IpAddr| {
        let address = SocketAddr::new(address, port);
        let authority = address.to_string();
        let facts = facts(Some(address), Ipv4Addr::UNSPECIFIED.into(), &authority, spoken);
        match snapshot.serves(&facts) {
            Serves::Http(chain) | Serves::Tcp(chain) => Some((address, Some(chain))),
            // It is known, and refused.
            Serves::Nobody(_) | Serves::Detect => None,
        }
    };
    let mut services = snapshot.workloads.services();
    services.retain(|service| is(&service.hostname));
    for service in services {
        if let Some((address, _)) = service.addresses.iter().find_map(|address| served(*address)) {
            return Ok((address, service.hostname.to_string()));
        }
    }
    // Without workload discovery, chains are called after their services.
    let mut addresses = Vec::new();
    if let Some(matcher) = &snapshot.matcher {
        collect(matcher, &mut addresses);
    }
    addresses.sort_unstable();
    addresses.dedup();
    for address in addresses {
        if let Some((address, Some(chain))) = served(address)
            && let Some(name) = chain.name.rsplit('|').next().filter(|name| is(name))
        {
            return Ok((address, name.to_owned()));
        }
    }
    let mut names: Vec<_> = snapshot
        .chains
        .sorted()
        .into_iter()
        .filter_map(|(name, chain)| Some(format!("{}:{}", name.rsplit_once('|')?.1, chain.service_port)))
        .collect();
    names.dedup();
    names.truncate(MOST_NAMES);
    Err(QuestionError::NoService {
        host: host.to_owned(),
        port,
        names,
    })
}

/// Every single address that the matcher knows.
fn collect(node: &Node, into: &mut Vec<IpAddr>) {
    let (next, otherwise): (Vec<&Node>, _) = match node {
        Node::Chain(_) | Node::Refused => return,
        Node::Exact { map, otherwise, .. } => (map.values().collect(), otherwise),
        Node::Prefix { prefixes, otherwise, .. } => (prefixes.iter().map(|(_, node)| node).collect(), otherwise),
        Node::List { entries, otherwise } => (entries.iter().map(|(_, node)| node).collect(), otherwise),
        Node::Ranges {
            input,
            ranges,
            otherwise,
        } => {
            if *input == Input::DestinationIp {
                let nets = ranges.iter().flat_map(|(nets, _)| nets);
                into.extend(
                    nets.filter(|net| net.prefix_len() == net.max_prefix_len())
                        .map(|net| net.addr()),
                );
            }
            (ranges.nodes().collect(), otherwise)
        }
    };
    for node in next.into_iter().chain(otherwise.as_deref()) {
        collect(node, into);
    }
}
