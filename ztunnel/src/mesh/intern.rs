//! Texts that many have in common are kept once.

use std::{collections::HashSet, sync::Arc};

use cairn_exchange::SpiffeId;
use foldhash::fast::RandomState;

use super::workload::Ports;

/// Keeps one copy of each text for as long as anybody uses it.
#[derive(Debug, Default)]
pub struct Interner {
    texts: HashSet<Arc<str>, RandomState>,
    identities: HashSet<SpiffeId, RandomState>,
    ports: HashSet<Ports, RandomState>,
    /// Look for texts that nobody uses any more when there are this many.
    sweep_at: usize,
}

/// No sweep below this number.
const SWEEP_MIN: usize = 4096;

// === impl Interner ===

impl Interner {
    /// The kept copy of a text.
    pub fn text(&mut self, text: &str) -> Arc<str> {
        if let Some(kept) = self.texts.get(text) {
            return kept.clone();
        }
        self.sweep();
        let kept: Arc<str> = text.into();
        self.texts.insert(kept.clone());
        kept
    }

    /// The identity of a workload; `None` where its parts make none.
    pub fn identity(&mut self, trust_domain: &str, namespace: &str, account: &str) -> Option<SpiffeId> {
        let identity = SpiffeId::workload(trust_domain, namespace, account).ok()?;
        if let Some(kept) = self.identities.get(&identity) {
            return Some(kept.clone());
        }
        self.identities.insert(identity.clone());
        Some(identity)
    }

    /// The kept copy of a table of ports.
    pub fn ports(&mut self, ports: Vec<(u16, u16)>) -> Ports {
        if let Some(kept) = self.ports.get(ports.as_slice()) {
            return kept.clone();
        }
        let kept: Ports = ports.into();
        self.ports.insert(kept.clone());
        kept
    }

    /// Forgets what nobody uses, now and then, so that its cost is spread over many insertions.
    fn sweep(&mut self) {
        if self.texts.len() < self.sweep_at.max(SWEEP_MIN) {
            return;
        }
        self.texts.retain(|text| Arc::strong_count(text) > 1);
        self.ports.retain(|ports| Arc::strong_count(ports) > 1);
        // Identities do not tell who uses them; they are few, and cheap to make anew.
        self.identities.clear();
        self.sweep_at = self.texts.len() * 2;
    }
}
