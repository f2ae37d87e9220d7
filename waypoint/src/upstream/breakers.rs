//! Circuit breakers: how much of a cluster may be in use at once.
//!
//! Counts belong to the cluster's name and outlive configurations; limits belong to the configuration. What is counted is given back
//! when the [`Counted`] that stands for it is dropped, whatever way that comes about.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use cairn_policy::retry::RetryBudget;

use super::ClusterState;

/// Limits of a cluster (contract xds §5.2).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Breakers {
    /// For requests of routes that say nothing, and for bytes.
    pub default: Thresholds,
    /// For requests of routes with high priority.
    pub high: Thresholds,
    /// Connections to one endpoint.
    pub connections_per_endpoint: Option<u32>,
}

/// Limits for requests of one priority.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Thresholds {
    /// Connections.
    pub max_connections: u32,
    /// Requests that wait for a connection.
    pub max_pending_requests: u32,
    /// Requests under way.
    pub max_requests: u32,
    /// Retries under way.
    pub max_retries: u32,
    /// Retries under way, in relation to requests; counts instead of `max_retries`.
    pub retry_budget: Option<RetryBudget>,
}

/// The priority of a request's route, which has limits and connections of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Level {
    /// Where routes say nothing.
    #[default]
    Default,
    /// High.
    High,
}

/// What is in use, by level.
#[derive(Debug, Default)]
pub struct Usage([Counts; 2]);

/// What is in use of one level.
#[derive(Debug, Default)]
pub struct Counts {
    connections: AtomicU32,
    pending: AtomicU32,
    requests: AtomicU32,
    retries: AtomicU32,
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// A connection.
    Connection,
    /// A request that waits for one.
    Pending,
    /// A request under way.
    Request,
    /// A retry under way.
    Retry,
}

/// One piece of a resource, in use.
#[derive(Debug)]
pub struct Counted {
    state: Arc<ClusterState>,
    level: Level,
    resource: Resource,
}

impl Default for Thresholds {
    /// Envoy's defaults; istiod always sends its own.
    fn default() -> Self {
        Self {
            max_connections: 1024,
            max_pending_requests: 1024,
            max_requests: 1024,
            max_retries: 3,
            retry_budget: None,
        }
    }
}

// === impl Breakers ===

impl Breakers {
    /// The limits for requests of a level.
    pub fn of(&self, level: Level) -> &Thresholds {
        match level {
            Level::Default => &self.default,
            Level::High => &self.high,
        }
    }

    /// How much of a resource is left.
    pub fn remaining(&self, usage: &Usage, level: Level, resource: Resource) -> u32 {
        let counts = usage.of(level);
        let used = counts.of(resource).load(Ordering::Relaxed);
        self.of(level).limit(resource, counts).saturating_sub(used)
    }
}

// === impl Thresholds ===

impl Thresholds {
    fn limit(&self, resource: Resource, counts: &Counts) -> u32 {
        match resource {
            Resource::Connection => self.max_connections,
            Resource::Pending => self.max_pending_requests,
            Resource::Request => self.max_requests,
            Resource::Retry => match self.retry_budget {
                None => self.max_retries,
                Some(budget) => {
                    let load = |count: &AtomicU32| u64::from(count.load(Ordering::Relaxed));
                    let most = budget.most(load(&counts.requests) + load(&counts.pending));
                    u32::try_from(most).unwrap_or(u32::MAX)
                }
            },
        }
    }
}

// === impl Usage ===

impl Usage {
    /// What is in use of a level.
    pub fn of(&self, level: Level) -> &Counts {
        match (level, &self.0) {
            (Level::Default, [default, _]) => default,
            (Level::High, [_, high]) => high,
        }
    }

    /// How many are in use, of all levels.
    pub fn total(&self, resource: Resource) -> u32 {
        self.0
            .iter()
            .map(|counts| counts.of(resource).load(Ordering::Relaxed))
            .fold(0, u32::saturating_add)
    }
}

// === impl Counts ===

impl Counts {
    fn of(&self, resource: Resource) -> &AtomicU32 {
        match resource {
            Resource::Connection => &self.connections,
            Resource::Pending => &self.pending,
            Resource::Request => &self.requests,
            Resource::Retry => &self.retries,
        }
    }
}

// === impl Counted ===

impl Counted {
    /// One more, unless that is too many.
    pub fn within(state: &Arc<ClusterState>, breakers: &Breakers, level: Level, resource: Resource) -> Option<Self> {
        let counts = state.usage.of(level);
        let limit = breakers.of(level).limit(resource, counts);
        let before = counts.of(resource).fetch_add(1, Ordering::Relaxed);
        // It is given back by the drop when there are too many.
        let counted = Self {
            state: state.clone(),
            level,
            resource,
        };
        (before < limit).then_some(counted)
    }

    /// One more, whatever the limit.
    pub fn anyway(state: &Arc<ClusterState>, level: Level, resource: Resource) -> Self {
        state.usage.of(level).of(resource).fetch_add(1, Ordering::Relaxed);
        Self {
            state: state.clone(),
            level,
            resource,
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.state
            .usage
            .of(self.level)
            .of(self.resource)
            .fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use cairn_policy::retry::RetryBudget;

    use super::{Breakers, Counted, Level, Resource, Thresholds};
    use crate::upstream::ClusterState;

    #[test]
    fn a_limit_is_reached_and_left_again_by_level() {
        let state = Arc::new(ClusterState::default());
        let breakers = Breakers {
            default: Thresholds {
                max_requests: 2,
                ..Thresholds::default()
            },
            ..Breakers::default()
        };
        let one = |level| Counted::within(&state, &breakers, level, Resource::Request);
        let left = || breakers.remaining(&state.usage, Level::Default, Resource::Request);
        let (first, second) = (one(Level::Default), one(Level::Default));
        assert!(first.is_some() && second.is_some() && one(Level::Default).is_none());
        assert_eq!(left(), 0);
        assert!(one(Level::High).is_some());
        drop(first);
        assert_eq!(left(), 1);
        assert!(one(Level::Default).is_some());
        drop(second);
        assert_eq!(state.usage.total(Resource::Request), 0);
    }

    #[test]
    fn a_retry_budget_follows_the_requests() {
        let state = Arc::new(ClusterState::default());
        let breakers = Breakers {
            default: Thresholds {
                max_retries: 0,
                retry_budget: Some(RetryBudget { percent: 25.0, least: 1 }),
                ..Thresholds::default()
            },
            ..Breakers::default()
        };
        let retries = |expected: usize| {
            let held: Vec<_> =
                std::iter::from_fn(|| Counted::within(&state, &breakers, Level::Default, Resource::Retry)).collect();
            assert_eq!(held.len(), expected);
        };
        retries(1);
        let _requests: Vec<_> = (0..10)
            .map(|_| Counted::anyway(&state, Level::Default, Resource::Request))
            .collect();
        retries(2);
        let _waiting: Vec<_> = (0..10)
            .map(|_| Counted::anyway(&state, Level::Default, Resource::Pending))
            .collect();
        retries(5);
    }
}
