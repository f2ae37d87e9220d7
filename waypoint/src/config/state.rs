//! What outlives a snapshot: the live state of clusters, by name.
//!
//! A cluster of a new snapshot adopts the state of the cluster that had its name, with its endpoints, counters and connections, as long
//! as anybody holds it: a published snapshot, or a request under way. The state of an endpoint is adopted inside of its cluster
//! when a new set of endpoints is made.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
};

use crate::upstream::ClusterState;

/// Number of entries below which dead ones are not looked for.
const SWEEP_FROM: usize = 64;

/// Live states by name.
#[derive(Debug, Default)]
pub(crate) struct StateStore {
    clusters: HashMap<Arc<str>, Weak<ClusterState>>,
    /// The size after the last sweep: the next one comes when it has doubled.
    swept: usize,
}

// === impl StateStore ===

impl StateStore {
    /// The state of this cluster: the one that is alive, else a new one.
    pub(crate) fn cluster(&mut self, name: &Arc<str>) -> Arc<ClusterState> {
        if let Some(state) = self.clusters.get(name).and_then(Weak::upgrade) {
            return state;
        }
        if self.clusters.len() >= SWEEP_FROM.max(2 * self.swept) {
            self.clusters.retain(|_, state| state.strong_count() > 0);
            self.swept = self.clusters.len();
        }
        let state = Arc::new(ClusterState::default());
        self.clusters.insert(name.clone(), Arc::downgrade(&state));
        state
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_adopted_while_anybody_holds_it() {
        let mut store = StateStore::default();
        let name: Arc<str> = "inbound-vip|80|http|web.app".into();
        let first = store.cluster(&name);
        assert!(Arc::ptr_eq(&first, &store.cluster(&name)));
        let address = Arc::downgrade(&first);
        drop(first);
        assert!(!address.ptr_eq(&Arc::downgrade(&store.cluster(&name))));
    }

    #[test]
    fn names_that_are_gone_do_not_pile_up() {
        let mut store = StateStore::default();
        for number in 0..10_000 {
            store.cluster(&format!("cluster-{number}").into());
        }
        assert!(store.clusters.len() <= 2 * SWEEP_FROM, "{}", store.clusters.len());
    }
}
