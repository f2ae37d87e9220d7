//! Live things of filters that outlive their compiled form: counts of rate limits, of faults under way.
//!
//! They are known by chain, filter and content of its configuration, and live while any compiled chain, old or new, holds them. The
//! same content twice in a chain is two things, told apart by their order.

use std::{
    any::Any,
    collections::HashMap,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;

/// What is known of those that are compiled.
#[derive(Debug, Default)]
pub(crate) struct Live {
    kept: Mutex<HashMap<Name, Weak<dyn Any + Send + Sync>>>,
}

/// Chain, filter, content, and which of several with this content.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Name {
    /// Name of the chain.
    pub chain: Arc<str>,
    /// What it is.
    pub filter: &'static str,
    /// The configuration.
    pub content: Vec<u8>,
    /// Those before it in the chain.
    pub nth: usize,
}

// === impl Live ===

impl Live {
    /// The thing of this name, or a new one.
    pub(crate) fn keep<T: Any + Send + Sync>(&self, name: Name, make: impl FnOnce() -> T) -> Arc<T> {
        let mut kept = self.kept.lock();
        let known = kept.get(&name).and_then(Weak::upgrade);
        if let Some(known) = known.and_then(|known| known.downcast::<T>().ok()) {
            return known;
        }
        kept.retain(|_, kept| kept.strong_count() > 0);
        let made = Arc::new(make());
        let any: Arc<dyn Any + Send + Sync> = made.clone();
        kept.insert(name, Arc::downgrade(&any));
        made
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thing_lives_while_a_chain_holds_it() {
        let live = Live::default();
        let name = |nth| Name {
            chain: "c".into(),
            filter: "f",
            content: vec![1],
            nth,
        };
        let first = live.keep(name(0), || 1);
        assert!(Arc::ptr_eq(&first, &live.keep(name(0), || 2)));
        assert_eq!(*live.keep(name(1), || 3), 3);
        drop(first);
        assert_eq!(*live.keep(name(0), || 4), 4);
        assert_eq!(live.kept.lock().len(), 1, "what nobody holds is forgotten");
    }
}
