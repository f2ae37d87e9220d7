//! Listeners between answers of istiod: the chains of `main_internal` one by one, the matcher, and the listeners around them.
//!
//! istiod sends `main_internal` whole for nearly every change. Its chains are compared by their bytes, before anything is decoded. A
//! chain that names a cluster that is still coming waits, and the one before it stays; the matcher waits for the chains that it
//! names; a chain that istiod has removed stays until the matcher that named it is gone.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use bytes::Bytes;
use cairn_proto::envoy::config::core::v3::TypedExtensionConfig;
use cairn_telemetry::{access_log::LogFiles, trace::NodeFacts};

use super::{
    any::{Unknown, decode},
    chain::{self, Extensions, Outputs},
    clusters::Clusters,
    compiler::Resource,
    listener,
    live::Live,
    matcher,
    originate::{self, TunnelListener},
    own_limits::OwnLimits,
    report::{Effect, Malformed, Notes, ResourceError, Unsupported},
    store::Pending,
    terminate, wire,
};
use crate::{
    export::Exports,
    snapshot::{Chain, Table, Terminate, matcher::Node},
};

/// The listener that accepts tunnels.
const TERMINATE: &str = "connect_terminate";
/// The listener with a chain for each service port.
const MAIN: &str = "main_internal";

/// All listeners.
#[derive(Debug, Default)]
pub(crate) struct Listeners {
    outputs: Outputs,
    live: Arc<Live>,
    extensions: Arc<Extensions>,
    own_limits: Arc<OwnLimits>,
    chains: HashMap<Arc<str>, Entry>,
    /// Chains of which a version waits.
    waiting: BTreeSet<Arc<str>>,
    /// Chains that istiod has removed and the matcher may still name.
    gone: BTreeSet<Arc<str>>,
    main: Main,
    terminate: Around<Terminate>,
    /// Every other listener, by name, with what it says of tunnels.
    others: BTreeMap<String, Around<TunnelListener>>,
}

#[derive(Debug)]
struct Entry {
    bytes: Bytes,
    latest: Option<Arc<chain::Compiled>>,
    active: Option<Arc<chain::Compiled>>,
    malformed: Option<ResourceError>,
}

/// `main_internal` without its chains.
#[derive(Debug, Default)]
struct Main {
    known: bool,
    rest: Bytes,
    latest: Option<Arc<Node>>,
    /// Whether `latest` is not published yet.
    waits: bool,
    malformed: Vec<ResourceError>,
    unsupported: Vec<Unsupported>,
}

/// A listener around `main_internal`.
#[derive(Debug)]
struct Around<T> {
    bytes: Bytes,
    compiled: Option<Arc<T>>,
    malformed: Option<ResourceError>,
    unsupported: Vec<Unsupported>,
}

/// The parts of a snapshot that come from listeners.
pub(crate) struct Published<'a> {
    pub terminate: &'a mut Option<Arc<Terminate>>,
    pub matcher: &'a mut Option<Arc<Node>>,
    pub chains: &'a mut Table<Arc<Chain>>,
}

// === impl Listeners ===

impl Listeners {
    /// No listeners yet; access logs go to `log_files`.
    pub(crate) fn new(log_files: Option<LogFiles>) -> Self {
        Self {
            outputs: Outputs {
                files: log_files,
                ..Outputs::default()
            },
            ..Self::default()
        }
    }

    /// Traces and logs go to collectors these ways, and say that they are from this node.
    pub(crate) fn export_to(&mut self, exports: Exports, node: NodeFacts) {
        self.outputs.exports = exports;
        self.outputs.node = node;
    }

    /// Takes over listeners. What is wrong with any of those sent, now or since before, is added to `errors`.
    pub(crate) fn apply(&mut self, changed: &[Resource], removed: &[String], errors: &mut Vec<ResourceError>) -> bool {
        let mut any = false;
        for resource in changed {
            match resource.name.as_str() {
                MAIN => any |= self.apply_main(resource, errors),
                TERMINATE => {
                    let outputs = &self.outputs;
                    any |= self
                        .terminate
                        .apply(resource, || terminate::terminate(TERMINATE, &resource.bytes, outputs));
                    errors.extend(self.terminate.errors());
                }
                name => {
                    let around = self.others.entry(name.to_owned()).or_default();
                    any |= around.apply(resource, || other(name, &resource.bytes));
                    errors.extend(around.errors());
                }
            }
        }
        for name in removed {
            any |= match name.as_str() {
                MAIN => {
                    self.gone.extend(self.chains.keys().cloned());
                    std::mem::take(&mut self.main).known
                }
                TERMINATE => std::mem::take(&mut self.terminate).compiled.is_some(),
                name => self.others.remove(name).is_some(),
            };
        }
        any
    }

    fn apply_main(&mut self, resource: &Resource, errors: &mut Vec<ResourceError>) -> bool {
        let wrong = |what: String| {
            ResourceError::malformed(
                MAIN,
                None,
                Malformed {
                    field: String::new(),
                    what,
                },
            )
        };
        let parts = match wire::split_listener(&resource.bytes) {
            Ok(parts) if parts.name == MAIN => parts,
            Ok(parts) => {
                errors.push(wrong(format!("`{}` is not the name of the resource", parts.name)));
                return false;
            }
            Err(error) => {
                errors.push(wrong(format!("is no listener: {error}")));
                return false;
            }
        };
        let mut any = false;
        let mut seen = HashSet::with_capacity(parts.chains.len());
        for bytes in parts.chains {
            match wire::chain_name(&bytes) {
                Err(error) => errors.push(wrong(format!("has a filter chain that is none: {error}"))),
                // Only the matcher leads to chains, and it does so by name.
                Ok(name) if name.is_empty() => errors.push(wrong("has a filter chain without a name".into())),
                Ok(name) => {
                    let name: Arc<str> = match self.chains.get_key_value(name.as_str()) {
                        Some((name, _)) => name.clone(),
                        None => name.into(),
                    };
                    if !seen.insert(name.clone()) {
                        errors.push(wrong(format!(
                            "has two filter chains with the name {name}; the first is used"
                        )));
                        continue;
                    }
                    any |= self.apply_chain(&name, bytes);
                    errors.extend(self.chains.get(&name).iter().flat_map(|entry| entry.errors()));
                }
            }
        }
        let gone: Vec<_> = self.chains.keys().filter(|name| !seen.contains(*name)).cloned().collect();
        for name in gone {
            any |= self.gone.insert(name);
        }
        any |= self.apply_rest(parts.rest);
        errors.extend(self.main.malformed.iter().cloned());
        errors.extend(self.main.unsupported.iter().filter_map(Unsupported::error));
        any
    }

    fn apply_chain(&mut self, name: &Arc<str>, bytes: Bytes) -> bool {
        let back = self.gone.remove(name);
        if let Some(entry) = self.chains.get_mut(name)
            && entry.bytes == bytes
        {
            // The new slice takes over, so that the message that brought the old one can go.
            entry.bytes = bytes;
            return back;
        }
        let compiled = self.compile_chain(name, &bytes);
        let entry = self.chains.entry(name.clone()).or_insert_with(|| Entry {
            bytes: Bytes::new(),
            latest: None,
            active: None,
            malformed: None,
        });
        entry.bytes = bytes;
        match compiled {
            Ok(compiled) => {
                entry.latest = Some(Arc::new(compiled));
                entry.malformed = None;
                self.waiting.insert(name.clone());
            }
            Err(malformed) => entry.malformed = Some(ResourceError::malformed(MAIN, Some(name), malformed)),
        }
        true
    }

    fn compile_chain(&self, name: &str, bytes: &Bytes) -> Result<chain::Compiled, Malformed> {
        chain::compile(
            MAIN,
            name,
            bytes,
            &self.outputs,
            &self.live,
            &self.extensions,
            &self.own_limits,
        )
    }

    /// Takes over extension configurations; chains that name one are compiled anew. They are only ever replaced.
    pub(crate) fn apply_extensions(&mut self, changed: &[Resource], errors: &mut Vec<ResourceError>) -> bool {
        let mut news = HashSet::new();
        for resource in changed {
            let mut notes = Notes::of(&resource.name);
            let config = decode(&resource.bytes, Unknown::Refuses, &mut notes);
            let config = config.and_then(|TypedExtensionConfig { name: _, typed_config }| {
                typed_config.ok_or_else(|| notes.malformed("typed_config", "is missing"))
            });
            match config {
                Ok(config) if self.extensions.get(&resource.name) == Some(&config) => {}
                Ok(config) => {
                    Arc::make_mut(&mut self.extensions).insert(resource.name.clone(), config);
                    news.insert(resource.name.as_str());
                }
                Err(malformed) => errors.push(ResourceError::malformed(&resource.name, None, malformed)),
            }
        }
        let names = |entry: &Entry| {
            let named = entry.latest.as_ref().map(|latest| &latest.extensions);
            named.is_some_and(|named| named.iter().any(|name| news.contains(name.as_str())))
        };
        let affected: Vec<_> = self
            .chains
            .iter()
            .filter(|(_, entry)| names(entry))
            .map(|(name, _)| name.clone())
            .collect();
        self.compile_anew(affected, errors);
        true
    }

    /// Takes over the operator's own limits; chains that had or get some are compiled anew.
    pub(crate) fn limit(&mut self, own: Arc<OwnLimits>) {
        let before = std::mem::replace(&mut self.own_limits, own.clone());
        let concerned = self.chains.keys().filter(|name| before.concern(name) || own.concern(name));
        let concerned = concerned.cloned().collect();
        // Of what is wrong with chains istiod has been told.
        self.compile_anew(concerned, &mut Vec::new());
    }

    /// The operator's own limits that are for no chain.
    pub(crate) fn unused_limits(&self) -> Vec<Unsupported> {
        self.own_limits.unused(self.chains.keys().map(|name| &**name))
    }

    fn compile_anew(&mut self, affected: Vec<Arc<str>>, errors: &mut Vec<ResourceError>) {
        for name in affected {
            let Some(bytes) = self.chains.get(&name).map(|entry| entry.bytes.clone()) else {
                continue;
            };
            let compiled = self.compile_chain(&name, &bytes);
            let Some(entry) = self.chains.get_mut(&name) else { continue };
            match compiled {
                Ok(compiled) => {
                    entry.latest = Some(Arc::new(compiled));
                    entry.malformed = None;
                    self.waiting.insert(name.clone());
                }
                Err(malformed) => entry.malformed = Some(ResourceError::malformed(MAIN, Some(&name), malformed)),
            }
            errors.extend(self.chains.get(&name).iter().flat_map(|entry| entry.errors()));
        }
    }

    fn apply_rest(&mut self, rest: Bytes) -> bool {
        if self.main.known && self.main.rest == rest {
            return false;
        }
        let mut notes = Notes::of(MAIN);
        let mut refused = false;
        let compiled = listener::take(&rest, &mut notes).and_then(|parts| {
            if !parts.access_log.is_empty() {
                notes.ignore(
                    "access_log",
                    "connections without a chain have no lines; their refused CONNECTs have",
                );
            }
            // What the matcher refuses it refuses where it stands.
            refused = notes.refusal().is_some();
            let matcher = parts
                .matcher
                .ok_or_else(|| notes.malformed("filter_chain_matcher", "is missing"))?;
            notes.within("filter_chain_matcher", |notes| matcher::compile(&matcher, notes))
        });
        self.main.known = true;
        self.main.rest = rest;
        self.main.unsupported = notes.into_list();
        match compiled {
            Ok(node) => {
                self.main.malformed.clear();
                // What refuses here may decide about every connection: then no chain is reached.
                let node = if refused { Node::Refused } else { node };
                self.main.latest = Some(Arc::new(node));
                self.main.waits = true;
            }
            Err(malformed) => self.main.malformed = vec![ResourceError::malformed(MAIN, None, malformed)],
        }
        true
    }

    /// Publishes what need not wait any longer; `true` when anything has changed.
    pub(crate) fn settle(&mut self, clusters: &Clusters, published: Published<'_>) -> bool {
        let mut any = false;
        let ready: Vec<Arc<str>> = self
            .waiting
            .iter()
            .filter(|name| {
                let latest = self.chains.get(*name).and_then(|entry| entry.latest.as_ref());
                // Until a configuration of a filter is there, what was there before serves, as with Envoy; without that it refuses.
                let served = self.chains.get(*name).is_some_and(|entry| entry.active.is_some());
                latest.is_none_or(|latest| {
                    let comes = latest.clusters.iter().any(|cluster| clusters.is_coming(cluster));
                    !(comes || served && latest.extensions_missing)
                })
            })
            .cloned()
            .collect();
        for name in ready {
            self.waiting.remove(&name);
            if let Some(entry) = self.chains.get_mut(&name)
                && let Some(latest) = &entry.latest
            {
                entry.active = Some(latest.clone());
                published.chains.insert(name, latest.chain.clone());
                any = true;
            }
        }
        if self.main.waits && self.chains_are_there() {
            self.main.waits = false;
            any = true;
            *published.matcher = self.main.latest.clone();
        }
        if !self.main.known && published.matcher.is_some() {
            *published.matcher = None;
            any = true;
        }
        any |= self.drop_unnamed(published.matcher.as_deref(), published.chains);
        if !same(published.terminate.as_ref(), self.terminate.compiled.as_ref()) {
            *published.terminate = self.terminate.compiled.clone();
            any = true;
        }
        any
    }

    /// Whether no chain that the new matcher names is still waiting to be published for the first time.
    fn chains_are_there(&self) -> bool {
        let mut names = Vec::new();
        if let Some(node) = &self.main.latest {
            matcher::chains(node, &mut names);
        }
        let waits =
            |name: &&str| self.waiting.contains(*name) && self.chains.get(*name).is_some_and(|entry| entry.active.is_none());
        !names.iter().any(waits)
    }

    /// Takes chains away that istiod has removed and the published matcher does not name.
    fn drop_unnamed(&mut self, matcher: Option<&Node>, table: &mut Table<Arc<Chain>>) -> bool {
        if self.gone.is_empty() {
            return false;
        }
        let mut names = Vec::new();
        if let Some(node) = matcher {
            matcher::chains(node, &mut names);
        }
        let named: HashSet<&str> = names.into_iter().collect();
        let mut any = false;
        let drop: Vec<Arc<str>> = self.gone.iter().filter(|name| !named.contains(&***name)).cloned().collect();
        for name in drop {
            self.gone.remove(&name);
            self.waiting.remove(&name);
            self.chains.remove(&name);
            any |= table.remove(&name).is_some();
        }
        any
    }

    /// Clusters that chains name.
    pub(crate) fn named_clusters(&self) -> HashSet<&str> {
        let versions = self
            .chains
            .values()
            .flat_map(|entry| entry.latest.iter().chain(&entry.active));
        versions
            .flat_map(|compiled| compiled.clusters.iter().map(|name| &**name))
            .collect()
    }

    /// Extension configurations that chains name.
    pub(crate) fn wanted_extensions(&self) -> BTreeSet<String> {
        self.chains
            .values()
            .filter_map(|entry| entry.latest.as_ref())
            .flat_map(|compiled| compiled.extensions.iter().cloned())
            .collect()
    }

    /// What listeners say of tunnels, by cluster.
    pub(crate) fn tunnels(&self) -> BTreeMap<String, TunnelListener> {
        let said = |(name, around): (&String, &Around<TunnelListener>)| {
            let said = around.compiled.as_deref()?;
            (*said != TunnelListener::default()).then(|| (name.clone(), said.clone()))
        };
        self.others.iter().filter_map(said).collect()
    }

    /// Chains that wait.
    pub(crate) fn waiting(&self) -> impl ExactSizeIterator<Item = &Arc<str>> {
        self.waiting.iter()
    }

    /// The same, with what each waits for; a matcher that waits for them is not counted twice.
    pub(crate) fn pending(&self, clusters: &Clusters, list: &mut Vec<Pending>) {
        for name in &self.waiting {
            let latest = self.chains.get(name).and_then(|entry| entry.latest.as_ref());
            let names = latest.iter().flat_map(|latest| latest.clusters.iter());
            list.push(Pending {
                resource: MAIN.to_owned(),
                chain: Some(name.to_string()),
                waits_for: names
                    .filter(|cluster| clusters.is_coming(cluster))
                    .map(|cluster| format!("cluster {cluster}"))
                    .collect(),
                overdue: false,
            });
        }
    }

    /// Listeners without which nothing is served, and that are not there.
    pub(crate) fn missing(&self) -> impl Iterator<Item = &'static str> {
        let terminate = self.terminate.compiled.is_none().then_some(TERMINATE);
        let main = self.main.latest.is_none().then_some(MAIN);
        terminate.into_iter().chain(main)
    }

    /// What is not done.
    pub(crate) fn unsupported(&self, list: &mut Vec<Unsupported>) {
        let chains = self.chains.values().filter_map(|entry| entry.latest.as_ref());
        list.extend(chains.flat_map(|compiled| compiled.unsupported.iter().cloned()));
        list.extend(self.main.unsupported.iter().cloned());
        list.extend(self.terminate.unsupported.iter().cloned());
        list.extend(self.others.values().flat_map(|around| around.unsupported.iter().cloned()));
    }
}

/// Compiles a listener that is neither of the two that serve: those that open tunnels, and ones that we do not know.
fn other(name: &str, bytes: &Bytes) -> Result<(TunnelListener, Vec<Unsupported>), Malformed> {
    if originate::is_originate(name) {
        return originate::originate(name, bytes);
    }
    let what = "this listener is not known; nothing listens for it".to_owned();
    let item = Unsupported {
        resource: name.to_owned(),
        chain: None,
        route: None,
        field: String::new(),
        what,
        effect: Effect::Refused,
    };
    Ok((TunnelListener::default(), vec![item]))
}

fn same<T>(a: Option<&Arc<T>>, b: Option<&Arc<T>>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
        (None, None) => true,
        _ => false,
    }
}

// === impl Entry ===

impl Entry {
    fn errors(&self) -> impl Iterator<Item = ResourceError> {
        let refused = self
            .latest
            .iter()
            .flat_map(|compiled| compiled.unsupported.iter().filter_map(Unsupported::error));
        self.malformed.clone().into_iter().chain(refused)
    }
}

// === impl Around ===

impl<T> Default for Around<T> {
    fn default() -> Self {
        Self {
            bytes: Bytes::new(),
            compiled: None,
            malformed: None,
            unsupported: Vec::new(),
        }
    }
}

impl<T: PartialEq> Around<T> {
    fn apply(&mut self, resource: &Resource, compile: impl FnOnce() -> Result<(T, Vec<Unsupported>), Malformed>) -> bool {
        let known = self.compiled.is_some() || self.malformed.is_some();
        if known && self.bytes == resource.bytes {
            self.bytes = resource.bytes.clone();
            return false;
        }
        self.bytes = resource.bytes.clone();
        match compile() {
            Ok((compiled, unsupported)) => {
                self.malformed = None;
                self.unsupported = unsupported;
                // A listener that means the same stays the same one, so that nothing is opened anew.
                if self.compiled.as_ref().is_none_or(|before| **before != compiled) {
                    self.compiled = Some(Arc::new(compiled));
                }
            }
            Err(malformed) => self.malformed = Some(ResourceError::malformed(&resource.name, None, malformed)),
        }
        true
    }

    fn errors(&self) -> impl Iterator<Item = ResourceError> {
        self.malformed
            .clone()
            .into_iter()
            .chain(self.unsupported.iter().filter_map(Unsupported::error))
    }
}
