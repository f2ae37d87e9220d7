//! A map that is cheap to publish: a new version shares every shard that did not change.

use std::sync::Arc;

use foldhash::fast::FixedState;
use std::hash::BuildHasher as _;

type Shard<V> = Arc<std::collections::HashMap<Arc<str>, V, FixedState>>;

/// Number of shards. Publishing one changed entry among 2,000 copies about 30 of them.
const SHARDS: usize = 64;

/// A persistent map from names to values, in two levels.
#[derive(Clone, Debug)]
pub struct Table<V> {
    shards: Vec<Shard<V>>,
}

impl<V: Clone> Default for Table<V> {
    fn default() -> Self {
        let empty = Shard::default();
        Self {
            shards: vec![empty; SHARDS],
        }
    }
}

// === impl Table ===

impl<V: Clone> Table<V> {
    fn shard(name: &str) -> usize {
        // The high bits: the maps inside use the low ones.
        (FixedState::default().hash_one(name) >> 32) as usize % SHARDS
    }

    /// The value under this name.
    pub fn get(&self, name: &str) -> Option<&V> {
        self.shards.get(Self::shard(name))?.get(name)
    }

    /// Puts a value under a name.
    pub fn insert(&mut self, name: Arc<str>, value: V) {
        if let Some(shard) = self.shards.get_mut(Self::shard(&name)) {
            Arc::make_mut(shard).insert(name, value);
        }
    }

    /// Takes a name away.
    pub fn remove(&mut self, name: &str) -> Option<V> {
        let shard = self.shards.get_mut(Self::shard(name))?;
        if shard.contains_key(name) {
            Arc::make_mut(shard).remove(name)
        } else {
            None
        }
    }

    /// All entries, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&Arc<str>, &V)> {
        self.shards.iter().flat_map(|shard| shard.iter())
    }

    /// All entries in order of their names.
    pub fn sorted(&self) -> Vec<(&Arc<str>, &V)> {
        let mut all: Vec<_> = self.iter().collect();
        all.sort_by(|a, b| a.0.cmp(b.0));
        all
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.len()).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.shards.iter().all(|shard| shard.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_version_shares_what_did_not_change() {
        let mut first = Table::default();
        for i in 0..1000 {
            first.insert(format!("inbound-vip|80|http|s{i}").into(), i);
        }
        let mut second = first.clone();
        second.insert("inbound-vip|80|http|s7".into(), 7000);
        let shared = first
            .shards
            .iter()
            .zip(&second.shards)
            .filter(|(a, b)| Arc::ptr_eq(a, b))
            .count();
        assert_eq!(shared, SHARDS - 1);
        assert_eq!(
            (first.get("inbound-vip|80|http|s7"), second.get("inbound-vip|80|http|s7")),
            (Some(&7), Some(&7000))
        );
        assert_eq!(second.remove("inbound-vip|80|http|s8"), Some(8));
        assert_eq!((first.len(), second.len()), (1000, 999));
    }
}
