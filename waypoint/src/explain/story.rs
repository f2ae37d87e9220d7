//! The way of a request or connection through a configuration, and what each part of it says.

use std::sync::Arc;

use cairn_exchange::{Exchange, Protocol, RequestHead, Scheme};
use cairn_filters::OnRoute;
use cairn_policy::{
    headers::incoming::Arrival,
    miss::{is_secret, without_secrets},
    path::Normalized,
    rbac::{Denied, Facts, Filters},
    route::{self, Forward, RouteAction, RouteStory, Target},
};
use http::{HeaderMap, HeaderValue, Method, StatusCode, uri::PathAndQuery};
use serde::{Deserialize, Serialize};

use super::{
    Asked,
    filters::{self, Stopped},
    question::facts,
};
use crate::snapshot::{ChainKind, HttpChain, Serves, Snapshot, TcpChain, matcher::Spoken};

/// Routes that are told of among those that did not match; the JSON has no more either.
const PASSED_OVER: usize = 10;

/// The story.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Story {
    /// Who wants what.
    pub request: String,
    /// The configuration's version.
    pub snapshot: u64,
    /// The chain that serves the address.
    pub chain: Option<String>,
    /// What is asked on the way, in order.
    pub steps: Vec<Step>,
    /// The route.
    pub route: Option<RouteTold>,
    /// The clusters that it may go to, the chosen one first.
    pub clusters: Vec<ClusterTold>,
    /// What comes of it.
    pub verdict: Verdict,
    /// What the reader should know of the story itself.
    pub notes: Vec<String>,
}

/// One part of the way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Step {
    /// Its name.
    pub name: String,
    /// What it does.
    pub outcome: StepOutcome,
    /// Why, in sentences.
    pub says: Vec<String>,
}

/// What a part of the way does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StepOutcome {
    /// Lets it pass.
    Passes,
    /// Stops it.
    Denies,
    /// Answers it.
    Answers,
    /// Does not run here.
    Off,
    /// Can only be decided live.
    Undecided,
}

/// The route.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RouteTold {
    /// Its name.
    pub name: Option<String>,
    /// Its place in its virtual host, from 0.
    pub at: Option<usize>,
    /// The virtual host of the authority.
    pub virtual_host: Option<String>,
    /// The Istio object that it was made from.
    pub config: Option<String>,
    /// Routes before it, and why they do not match.
    pub passed_over: Vec<String>,
}

/// A cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ClusterTold {
    /// Its name.
    pub name: String,
    /// Its share, where there are several.
    pub share: Option<String>,
    /// Whether it is there, and how many endpoints it has.
    pub says: String,
}

/// What comes of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Whether it gets through, as far as the configuration decides.
    pub allowed: bool,
    /// Status of the answer, where the proxy answers.
    pub status: Option<u16>,
    /// The reason, in Envoy's words as in access logs.
    pub details: Option<String>,
    /// The policy that decided, `NAMESPACE/NAME`.
    pub policy: Option<String>,
    /// Why, in a sentence.
    pub because: String,
}

// === impl Story ===

impl Story {
    pub(super) fn step(&mut self, name: impl Into<String>, outcome: StepOutcome, says: Vec<String>) {
        self.steps.push(Step {
            name: name.into(),
            outcome,
            says,
        });
    }

    pub(super) fn denied(&mut self, status: u16, details: &str, because: impl Into<String>) {
        self.verdict = Verdict {
            allowed: false,
            status: Some(status),
            details: Some(details.to_owned()),
            policy: self.verdict.policy.take(),
            because: because.into(),
        };
    }

    fn unserved(mut self, status: u16, details: &str, because: impl Into<String>) -> Self {
        self.denied(status, details, because);
        self
    }
}

/// Tells what becomes of a request or connection under a configuration, and why.
pub fn explain(snapshot: &Snapshot, asked: &Asked) -> Story {
    let mut story = Story {
        request: words(asked),
        snapshot: snapshot.version,
        ..Story::default()
    };
    if !asked.source_given {
        story
            .notes
            .push("no source address was given: 0.0.0.0 was taken, which no range but 0.0.0.0/0 holds".to_owned());
    }
    if let Err(story) = tunnel(snapshot, asked, &mut story) {
        return *story;
    }
    let connection = &asked.connection;
    let spoken = if asked.head.is_some() { Spoken::Http11 } else { Spoken::Other };
    let source_ip = connection.remote_address.ip();
    let serves = snapshot.serves(&facts(asked.address, source_ip, &connection.authority, spoken));
    let (Serves::Http(chain) | Serves::Tcp(chain)) = &serves else {
        let why = match serves {
            Serves::Nobody(why) => why.why(),
            _ => "what is spoken decides, and that is not known",
        };
        return story.unserved(503, "filter_chain_not_found", why);
    };
    story.chain = Some(chain.name.to_string());
    if let Some(refusal) = &chain.refuse {
        return story.unserved(
            403,
            "chain_not_supported",
            format!("the chain refuses everything: {}", refusal.reason),
        );
    }
    match (&chain.kind, &asked.head) {
        (ChainKind::Http(http), Some(head)) => requests(snapshot, http, asked, head.clone(), story),
        (ChainKind::Tcp(tcp), _) => connections(snapshot, tcp, asked, story),
        (ChainKind::Http(_), None) => story.unserved(400, "http1.codec_error", "this port speaks HTTP, and bytes are no request"),
        (ChainKind::Refused { .. }, _) => story.unserved(403, "chain_not_supported", "nothing of the chain could be applied"),
    }
}

fn words(asked: &Asked) -> String {
    let connection = &asked.connection;
    let what = match &asked.head {
        Some(head) => {
            let host = String::from_utf8_lossy(head.authority.as_bytes()).into_owned();
            let mut headers: Vec<_> = head
                .headers
                .iter()
                .map(|(name, value)| {
                    let value = if is_secret(name.as_str()) {
                        "(hidden)".into()
                    } else {
                        String::from_utf8_lossy(value.as_bytes())
                    };
                    format!(" {name}={value}")
                })
                .collect();
            headers.sort();
            let path = without_secrets(head.path.as_str());
            format!("{} {path} of {host}{}", head.method, headers.concat())
        }
        None => "bytes".to_owned(),
    };
    let peer = connection.peer.as_ref().map_or("nobody in particular", |peer| peer.as_str());
    format!("{what} to {} as {peer}", connection.authority)
}

/// Whether the tunnel is let in at all.
fn tunnel(snapshot: &Snapshot, asked: &Asked, story: &mut Story) -> Result<(), Box<Story>> {
    const NAME: &str = "tunnel";
    let end = |story: &mut Story| Err(Box::new(std::mem::take(story)));
    let Some(terminate) = &snapshot.terminate else {
        story.denied(
            503,
            "connect_terminate",
            "the configuration has no listener that accepts tunnels (connect_terminate)",
        );
        return end(story);
    };
    if let Some(refusal) = &terminate.refuse {
        story.denied(
            403,
            "chain_not_supported",
            format!("every tunnel is refused: {}", refusal.reason),
        );
        return end(story);
    }
    let prefixes = &terminate.tls.uri_san_prefixes;
    if let Some(peer) = &asked.connection.peer
        && !prefixes.is_empty()
        && !prefixes.iter().any(|prefix| peer.as_str().starts_with(prefix.as_str()))
    {
        let why = format!("{peer} is of none of the trusted domains: {}*", prefixes.join("*, "));
        story.step(NAME, StepOutcome::Denies, vec![why.clone()]);
        story.denied(0, "tls_handshake", why);
        story.verdict.status = None;
        return end(story);
    }
    if terminate.rbac.is_empty() {
        return Ok(());
    }
    let connect = RequestHead {
        method: Method::CONNECT,
        path: PathAndQuery::from_static("/"),
        authority: HeaderValue::from_str(&asked.connection.authority).unwrap_or(HeaderValue::from_static("")),
        scheme: Scheme::Http,
        headers: HeaderMap::new(),
    };
    let any = std::net::SocketAddr::from(([0, 0, 0, 0], 0));
    let accepted_at = terminate.addresses.first().copied().unwrap_or(any);
    let facts = Facts::tunnel(&asked.connection, &connect, accepted_at);
    if policies(&terminate.rbac, NAME, &facts, story) {
        Ok(())
    } else {
        end(story)
    }
}

/// Policies of connections; whether they let it pass.
fn policies(rbac: &Filters, name: &str, facts: &Facts<'_>, story: &mut Story) -> bool {
    for filter in rbac.iter() {
        if let Some(denied) = filters::rbac(filter, name, facts, story) {
            deny_by(story, &denied);
            return false;
        }
    }
    true
}

pub(super) fn deny_by(story: &mut Story, denied: &Denied) {
    let because = story
        .steps
        .last()
        .and_then(|step| step.says.first().cloned())
        .unwrap_or_else(|| "a policy denies it".to_owned());
    story.denied(403, &denied.details(), because);
}

// === bytes ===

fn connections(snapshot: &Snapshot, tcp: &TcpChain, asked: &Asked, mut story: Story) -> Story {
    if asked.head.is_some() {
        story
            .notes
            .push("this port passes bytes: nothing of the request itself is looked at".to_owned());
    }
    let exchange = Exchange::begin(Protocol::Tcp, asked.connection.clone(), "".into(), snapshot.version);
    if !policies(&tcp.rbac, "envoy.filters.network.rbac", &Facts::inside(&exchange), &mut story) {
        story.verdict.status = None;
        return story;
    }
    if !tcp.limits.is_empty() {
        let says = vec!["how many have connected is known to the running proxy only".to_owned()];
        story.step("envoy.filters.network.local_ratelimit", StepOutcome::Undecided, says);
    }
    for (name, weight) in &tcp.targets {
        let share = (tcp.targets.len() > 1).then(|| format!("{weight} of {}", tcp.total_weight));
        story.clusters.push(cluster(snapshot, name, share));
    }
    story.verdict = allowed(&story);
    story
}

// === requests ===

fn requests(snapshot: &Snapshot, http: &HttpChain, asked: &Asked, mut head: RequestHead, mut story: Story) -> Story {
    let connection = &asked.connection;
    let arrival = Arrival {
        tls: false,
        scheme_given: false,
        port: connection.service_port,
        remote: connection.remote_address.ip(),
    };
    let origin = http
        .settings
        .incoming
        .prepare(&mut head, arrival, || HeaderValue::from_static(""));
    match http.settings.path.apply(&head.path) {
        Normalized::Same => {}
        Normalized::Changed(path) => {
            story
                .notes
                .push(format!("the path is taken as {}", without_secrets(path.as_str())));
            head.path = path;
        }
        Normalized::Redirect(path) => {
            let why = format!(
                "the client is sent to the normal form of its path, {}",
                without_secrets(path.as_str())
            );
            return story.unserved(307, "path_normalization_redirect", why);
        }
        Normalized::Reject => return story.unserved(400, "path_normalization_failed", "the path has no normal form"),
    }
    let mut exchange = Exchange::begin(
        Protocol::Http11,
        connection.clone(),
        story.chain.clone().unwrap_or_default().into(),
        snapshot.version,
    );
    exchange.client_address = (origin.address != arrival.remote).then(|| (origin.address, 0).into());
    exchange.request = Some(head);
    let mut route = choose(http, &mut exchange, &mut story);
    for placed in http.filters.placed() {
        let stopped = filters::tell(placed, &mut exchange, &route, asked, &mut story);
        match stopped {
            None => {}
            Some(Stopped::Denied(denied)) => {
                deny_by(&mut story, &denied);
                return story;
            }
            Some(Stopped::Answered(status, details)) => {
                let allowed = status < StatusCode::BAD_REQUEST;
                story.verdict.policy = None;
                let because = format!("{} answers by itself", placed.name);
                let because = story
                    .steps
                    .last()
                    .and_then(|step| step.says.first().cloned())
                    .unwrap_or(because);
                story.denied(status.as_u16(), &details, because);
                story.verdict.allowed = allowed;
                return story;
            }
        }
        if exchange.reroute {
            story.notes.push(format!("after {} the route was chosen again", placed.name));
            route = choose(http, &mut exchange, &mut story);
        }
    }
    let Some(found) = route.found else {
        let host = story.route.as_ref().and_then(|route| route.virtual_host.clone());
        let why = match host {
            None => "no virtual host has the authority".to_owned(),
            Some(host) => format!("no route of the virtual host {host} matches"),
        };
        return story.unserved(404, "route_not_found", why);
    };
    match &found.route.action {
        RouteAction::Forward(to) => forward(snapshot, to, story),
        RouteAction::Redirect(redirect) => answered(story, redirect.status, "the route redirects"),
        RouteAction::DirectResponse(response) => answered(story, response.status, "the route answers by itself"),
    }
}

fn answered(mut story: Story, status: StatusCode, because: &str) -> Story {
    story.denied(status.as_u16(), "direct_response", because);
    story.verdict.allowed = status < StatusCode::BAD_REQUEST;
    story
}

fn choose<'a>(http: &'a HttpChain, exchange: &mut Exchange, story: &mut Story) -> OnRoute<'a> {
    exchange.reroute = false;
    let Some(head) = &exchange.request else { return OnRoute::NONE };
    let facts = route::Facts {
        random: 0,
        metadata: &exchange.metadata,
    };
    let RouteStory {
        host,
        passed_over,
        more,
        found,
    } = http.routes.explain(head, facts);
    let mut told: Vec<_> = passed_over
        .iter()
        .take(PASSED_OVER)
        .map(|passed| {
            let misses: Vec<_> = passed.misses.iter().map(ToString::to_string).collect();
            let name = passed.route.name.as_deref().unwrap_or("route");
            format!("{name} (#{}) does not match: {}", passed.at, misses.join("; "))
        })
        .collect();
    let left = more + passed_over.len().saturating_sub(PASSED_OVER);
    if left > 0 {
        told.push(format!("and {left} more do not match"));
    }
    story.route = Some(RouteTold {
        name: found.and_then(|found| Some(found.route.name.as_ref()?.to_string())),
        at: found.map(|_| passed_over.len() + more),
        virtual_host: host.map(|host| host.name.to_string()),
        config: found.and_then(|found| Some(found.route.config.as_ref()?.to_string())),
        passed_over: told,
    });
    let by_chance = found.is_some_and(|found| found.route.matches.fraction.is_some());
    if by_chance {
        story
            .notes
            .push("the route takes a share of the requests only: another request may take the next one".to_owned());
    }
    exchange.route = found.and_then(|found| found.route.name.clone());
    let weighted = match found.map(|found| &found.route.action) {
        Some(RouteAction::Forward(to)) => to.target.choose(0).1,
        _ => None,
    };
    OnRoute::new(found, weighted)
}

fn forward(snapshot: &Snapshot, to: &Forward, mut story: Story) -> Story {
    match &to.target {
        Target::Cluster(name) => story.clusters.push(cluster(snapshot, name, None)),
        Target::Weighted(weighted) => {
            let sum: u64 = weighted.clusters().iter().map(|one| u64::from(one.weight)).sum();
            for one in weighted.clusters() {
                let share = Some(format!("{} of {sum}", one.weight));
                story.clusters.push(cluster(snapshot, &one.name, share));
            }
        }
    }
    let (name, _) = to.target.choose(0);
    if snapshot.clusters.get(name).is_none() {
        let why = format!("the route leads to {name}, and there is no such cluster");
        return story.unserved(to.cluster_not_found.as_u16(), "cluster_not_found", why);
    }
    story.verdict = allowed(&story);
    story
}

fn cluster(snapshot: &Snapshot, name: &Arc<str>, share: Option<String>) -> ClusterTold {
    let says = match snapshot.clusters.get(name) {
        None => "does not exist".to_owned(),
        Some(cluster) => {
            let endpoints = cluster.state.endpoints.load();
            match endpoints.iter().count() {
                0 if !endpoints.known => "no endpoints are known".to_owned(),
                0 => "has no endpoints: 503 until there is one".to_owned(),
                1 => "1 endpoint".to_owned(),
                more => format!("{more} endpoints"),
            }
        }
    };
    ClusterTold {
        name: name.to_string(),
        share,
        says,
    }
}

fn allowed(story: &Story) -> Verdict {
    let open: Vec<_> = story
        .steps
        .iter()
        .filter(|step| step.outcome == StepOutcome::Undecided)
        .map(|step| step.name.as_str())
        .collect();
    let because = if open.is_empty() {
        "nothing on its way stops it".to_owned()
    } else {
        format!(
            "nothing that configuration decides stops it; {} decides live",
            open.join(", ")
        )
    };
    Verdict {
        allowed: true,
        status: None,
        details: None,
        policy: story.verdict.policy.clone(),
        because,
    }
}
