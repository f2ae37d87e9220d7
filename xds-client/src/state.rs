//! The protocol without IO: what is wanted, what is held, and which requests follow from an event.
//!
//! Events are [`State::open`] (a new stream), [`State::receive`] (an answer) and [`State::settle`] (the consumer's verdict on it).
//! The rules come from the xDS protocol and from how istiod implements it (contract xds §1.9):
//!
//! * The node is in the first request of a stream only. A first request without names means all resources of the type, so a type
//!   of which no name is wanted is not requested at all.
//! * An ACK never carries a change of names, and a change of names never carries a nonce: istiod takes the mixture for an error,
//!   and ignores the names that come with a NACK. A change that changes nothing is not sent.
//! * On a new stream the held names go along as `initial_resource_versions`, from which istiod computes what to remove and, where it
//!   versions resources, what to leave out. It cannot leave out what was held without a version; so whatever of that is missing in
//!   the first answer to a wildcard is gone, and is handed out as removed even if the server has not said so.
//! * What a NACK refused is held without its version, so that the next stream brings it again.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    mem,
};

use bytes::Bytes;
use cairn_exchange::clock::Instant;
use cairn_proto::{
    envoy::{
        config::core::v3::Node,
        service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource},
    },
    google::rpc,
};
use tracing::warn;

use crate::consumer::{Changed, Interest, Subscription, TypeUrl, Update, Verdict, Wish};

/// The names in one request, in bytes. istiod reads at most 4 MiB (its `ISTIO_GPRC_MAXRECVMSGSIZE`) and refuses the stream
/// for more, so longer lists are split, and longer versions are left out.
const NAMES_LIMIT: usize = 1024 * 1024;
/// A refusal's words, in bytes; istiod keeps the last one of each proxy and type.
const WORDS_LIMIT: usize = 8 * 1024;
/// gRPC's INVALID_ARGUMENT, the code of a NACK.
const INVALID_ARGUMENT: i32 = tonic::Code::InvalidArgument as i32;

/// What is wanted and held, over all streams.
#[derive(Debug)]
pub(crate) struct State {
    node: Node,
    node_sent: bool,
    /// In the order of their first requests.
    types: Vec<Type>,
    names_limit: usize,
}

/// One type's part.
#[derive(Debug)]
struct Type {
    url: TypeUrl,
    interest: Interest,
    /// Name and version of each resource that the consumer has.
    held: BTreeMap<String, String>,
    /// Requested on this stream.
    requested: bool,
    /// The held versions went along with that request.
    announced: bool,
    /// Answered on this stream.
    answered: bool,
}

/// What an answer turned out to be.
#[derive(Debug)]
pub(crate) enum Received {
    /// For the consumer; its verdict goes to [`State::settle`] with the receipt.
    Update(Update, Receipt),
    /// Refused whole before anybody looked inside.
    Malformed {
        /// Why.
        words: String,
        /// The NACK.
        request: Box<DeltaDiscoveryRequest>,
    },
    /// Nobody asked for this type on this stream, so there is nothing to acknowledge.
    Unrequested,
}

/// What must be remembered of an update until its verdict is there.
#[derive(Debug)]
pub(crate) struct Receipt {
    url: TypeUrl,
    nonce: String,
    changed: Vec<(String, String)>,
    removed: Vec<String>,
}

// === impl State ===

impl State {
    pub(crate) fn new(node: Node, subscriptions: Vec<Subscription>) -> Self {
        let mut state = Self {
            node,
            node_sent: false,
            types: Vec::new(),
            names_limit: NAMES_LIMIT,
        };
        for Subscription { type_url, interest } in subscriptions {
            match state.find(&type_url) {
                Some(known) => known.interest = interest,
                None => state.types.push(Type::new(type_url, interest)),
            }
        }
        state
    }

    /// A new stream: everything that is wanted is requested again, nothing is dropped.
    pub(crate) fn open(&mut self) -> Vec<DeltaDiscoveryRequest> {
        self.node_sent = false;
        let mut requests = Vec::new();
        for kind in &mut self.types {
            (kind.requested, kind.announced, kind.answered) = (false, false, false);
            requests.extend(kind.first_requests(self.names_limit));
        }
        self.introduce(&mut requests);
        requests
    }

    /// An answer has arrived.
    pub(crate) fn receive(&mut self, response: DeltaDiscoveryResponse, received: Instant, bytes: usize) -> Received {
        let Some(kind) = self
            .types
            .iter_mut()
            .find(|kind| kind.requested && kind.url.as_str() == response.type_url)
        else {
            return Received::Unrequested;
        };
        for error in &response.resource_errors {
            let name = error.resource_name.as_ref().map_or("?", |name| name.name.as_str());
            let words = error
                .error_detail
                .as_ref()
                .map_or("no reason given", |status| status.message.as_str());
            warn!(r#type = kind.url.short(), name, "istiod has no such resource for us: {words}");
        }
        let mut removed = response.removed_resources;
        removed.extend(response.removed_resource_names.into_iter().map(|name| name.name));
        let changed = match kind.changed(response.resources, &removed) {
            Ok(changed) => changed,
            Err(words) => {
                let request = Box::new(nack(&kind.url, response.nonce, &words));
                return Received::Malformed { words, request };
            }
        };
        if !mem::replace(&mut kind.answered, true) && kind.interest == Interest::Wildcard {
            kind.add_vanished(&changed, &mut removed);
        }
        let receipt = Receipt {
            url: kind.url.clone(),
            nonce: response.nonce.clone(),
            changed: changed
                .iter()
                .filter(|c| kind.wants(c))
                .map(|c| (c.name.clone(), c.version.clone()))
                .collect(),
            removed: removed.clone(),
        };
        let update = Update {
            type_url: kind.url.clone(),
            system_version: response.system_version_info,
            nonce: response.nonce,
            changed,
            removed,
            received,
            bytes,
        };
        Received::Update(update, receipt)
    }

    /// The consumer's verdict: the ACK or NACK, then the changes of names that it wishes.
    pub(crate) fn settle(&mut self, receipt: Receipt, verdict: Verdict) -> Vec<DeltaDiscoveryRequest> {
        let Verdict { error, wishes } = verdict;
        let mut requests = vec![match &error {
            None => ack(&receipt.url, receipt.nonce.clone()),
            Some(words) => nack(&receipt.url, receipt.nonce.clone(), words),
        }];
        if let Some(kind) = self.find(&receipt.url) {
            kind.hold(receipt, error.is_some());
        }
        for wish in wishes {
            requests.extend(self.wish(wish));
        }
        self.introduce(&mut requests);
        requests
    }

    fn find(&mut self, url: &TypeUrl) -> Option<&mut Type> {
        self.types.iter_mut().find(|kind| kind.url == *url)
    }

    fn wish(&mut self, wish: Wish) -> Vec<DeltaDiscoveryRequest> {
        let limit = self.names_limit;
        let (Wish::Exactly { type_url: url, .. } | Wish::Change { type_url: url, .. }) = &wish;
        let url = url.clone();
        if self.find(&url).is_none() {
            self.types.push(Type::new(url.clone(), Interest::Named(BTreeSet::new())));
        }
        let Some(kind) = self.find(&url) else { return Vec::new() };
        let Interest::Named(wanted) = &mut kind.interest else {
            // The consumer gets all of them anyway.
            return Vec::new();
        };
        let (subscribe, unsubscribe): (Vec<_>, Vec<_>) = match wish {
            Wish::Exactly { names, .. } => (
                names.difference(wanted).cloned().collect(),
                wanted.difference(&names).cloned().collect(),
            ),
            Wish::Change {
                subscribe, unsubscribe, ..
            } => (
                subscribe.difference(wanted).cloned().collect(),
                unsubscribe
                    .intersection(wanted)
                    .filter(|name| !subscribe.contains(*name))
                    .cloned()
                    .collect(),
            ),
        };
        for name in &unsubscribe {
            wanted.remove(name);
            kind.held.remove(name);
        }
        wanted.extend(subscribe.iter().cloned());
        if kind.requested {
            kind.change_requests(subscribe, unsubscribe, limit)
        } else {
            kind.first_requests(limit)
        }
    }

    /// Puts the node into the first request of the stream.
    fn introduce(&mut self, requests: &mut [DeltaDiscoveryRequest]) {
        if let Some(first) = requests.first_mut().filter(|_| !self.node_sent) {
            first.node = Some(self.node.clone());
            self.node_sent = true;
        }
    }
}

// === impl Type ===

impl Type {
    fn new(url: TypeUrl, interest: Interest) -> Self {
        Self {
            url,
            interest,
            held: BTreeMap::new(),
            requested: false,
            announced: false,
            answered: false,
        }
    }

    /// The subscription as a new stream needs it.
    fn first_requests(&mut self, limit: usize) -> Vec<DeltaDiscoveryRequest> {
        let names = match &self.interest {
            Interest::Named(names) if names.is_empty() => return Vec::new(),
            Interest::Named(names) => names.iter().cloned().collect(),
            Interest::Wildcard => Vec::new(),
        };
        self.requested = true;
        let mut requests = self.change_requests(names, Vec::new(), limit);
        if requests.is_empty() {
            requests.push(DeltaDiscoveryRequest {
                type_url: self.url.to_string(),
                ..Default::default()
            });
        }
        self.announced = self
            .held
            .iter()
            .map(|(name, version)| name.len() + version.len())
            .sum::<usize>()
            <= limit;
        if let Some(first) = requests.first_mut().filter(|_| self.announced) {
            first.initial_resource_versions = self.held.clone();
        }
        requests
    }

    /// Requests for a change of names, each of bounded size, without a nonce.
    fn change_requests(&self, subscribe: Vec<String>, unsubscribe: Vec<String>, limit: usize) -> Vec<DeltaDiscoveryRequest> {
        let request = || DeltaDiscoveryRequest {
            type_url: self.url.to_string(),
            ..Default::default()
        };
        let mut requests = Vec::new();
        let mut open = request();
        let mut size = 0;
        let all = subscribe
            .into_iter()
            .map(|name| (name, true))
            .chain(unsubscribe.into_iter().map(|name| (name, false)));
        for (name, wanted) in all {
            if size > 0 && size + name.len() > limit {
                requests.push(mem::replace(&mut open, request()));
                size = 0;
            }
            size += name.len();
            if wanted {
                &mut open.resource_names_subscribe
            } else {
                &mut open.resource_names_unsubscribe
            }
            .push(name);
        }
        if size > 0 {
            requests.push(open);
        }
        requests
    }

    /// Checks what Envoy checks before it looks at any resource, and refuses the answer in the same cases.
    fn changed(&self, resources: Vec<Resource>, removed: &[String]) -> Result<Vec<Changed>, String> {
        let removed: HashSet<&str> = removed.iter().map(String::as_str).collect();
        let mut seen = HashSet::with_capacity(resources.len());
        let mut changed = Vec::with_capacity(resources.len());
        for resource in resources {
            let Resource {
                name,
                resource_name,
                aliases,
                version,
                resource: body,
                ttl: _,
                cache_control: _,
                metadata: _,
            } = resource;
            let name = if name.is_empty() {
                resource_name.map(|name| name.name).unwrap_or_default()
            } else {
                name
            };
            if !seen.insert(name.clone()) {
                return Err(format!("{name}: the name is there twice"));
            }
            if removed.contains(name.as_str()) {
                return Err(format!("{name}: the name is both sent and removed"));
            }
            let Some(body) = body else {
                // A heartbeat of a resource with a time to live says that the known version is still right.
                if self
                    .held
                    .get(&name)
                    .is_some_and(|held| *held == version && !version.is_empty())
                {
                    continue;
                }
                return Err(format!("{name}: the resource has no content"));
            };
            if body.type_url != self.url.as_str() {
                return Err(format!(
                    "{name}: its type is {:?} in an answer of type {:?}",
                    body.type_url,
                    self.url.as_str()
                ));
            }
            changed.push(Changed {
                name,
                version,
                aliases,
                type_url: self.url.clone(),
                bytes: Bytes::from(body.value),
            });
        }
        Ok(changed)
    }

    /// Adds to `removed` what this stream's first answer shows to be gone.
    fn add_vanished(&self, changed: &[Changed], removed: &mut Vec<String>) {
        let mentioned: HashSet<&str> = changed
            .iter()
            .map(|c| c.name.as_str())
            .chain(removed.iter().map(String::as_str))
            .collect();
        let vanished: Vec<_> = self
            .held
            .iter()
            .filter(|(name, version)| (!self.announced || version.is_empty()) && !mentioned.contains(name.as_str()))
            .map(|(name, _)| name.clone())
            .collect();
        removed.extend(vanished);
    }

    /// A name that was not asked for must not be held: istiod would subscribe to what is announced.
    fn wants(&self, changed: &Changed) -> bool {
        match &self.interest {
            Interest::Wildcard => true,
            Interest::Named(names) => names.contains(&changed.name) || changed.aliases.iter().any(|alias| names.contains(alias)),
        }
    }

    fn hold(&mut self, receipt: Receipt, refused: bool) {
        for (name, version) in receipt.changed {
            self.held.insert(name, if refused { String::new() } else { version });
        }
        for name in receipt.removed {
            if !refused {
                self.held.remove(&name);
            } else if let Some(version) = self.held.get_mut(&name) {
                // Perhaps the consumer could not let go of it: the next stream decides again.
                version.clear();
            }
        }
    }
}

fn ack(url: &TypeUrl, nonce: String) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: url.to_string(),
        response_nonce: nonce,
        ..Default::default()
    }
}

fn nack(url: &TypeUrl, nonce: String, words: &str) -> DeltaDiscoveryRequest {
    let detail = rpc::Status {
        code: INVALID_ARGUMENT,
        message: bounded(words),
        details: Vec::new(),
    };
    DeltaDiscoveryRequest {
        error_detail: Some(detail),
        ..ack(url, nonce)
    }
}

/// The words of a refusal, cut where they would become too long.
pub(crate) fn bounded(words: &str) -> String {
    if words.len() <= WORDS_LIMIT {
        return words.to_owned();
    }
    let end = words.floor_char_boundary(WORDS_LIMIT);
    format!("{} … ({} more bytes)", &words[..end], words.len() - end)
}

#[cfg(test)]
mod tests;
