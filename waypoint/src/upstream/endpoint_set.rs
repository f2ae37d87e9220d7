//! The endpoints that a cluster has at a moment, prepared for the choice among them.
//!
//! Everything that does not change from request to request is computed here, beside the data path, whenever endpoints, their health
//! or the cluster's settings change: shares of priorities and localities, sequences and tables of weights, rings. A pick costs the
//! same among ten endpoints and among ten thousand.

use std::sync::{Arc, atomic::AtomicU64};

use cairn_exchange::clock::Instant;
use cairn_policy::balance::{
    AliasTable, Criteria, DEFAULT_OVERPROVISIONING, DEFAULT_PANIC_THRESHOLD, Maglev, PriorityHealth, PriorityShares, Ring,
    SubsetRules, locality_shares, priority_shares, smooth_sequence,
};

use super::{
    Endpoint, Hashing, Health, LbPolicy, LeastRequest, LocalityGroup,
    subsets::{Subsets, Within},
};

/// What a set is prepared for.
#[derive(Clone, Debug, PartialEq)]
pub struct Arrangement {
    /// How one is chosen.
    pub lb: LbPolicy,
    /// Consistent hashing.
    pub hashing: Hashing,
    /// Whether localities share by weight.
    pub locality_weighted: bool,
    /// Percent of healthy endpoints below which all are used.
    pub panic_threshold: u32,
    /// Percent by which healthy endpoints count for more.
    pub overprovisioning: u32,
    /// How endpoints are put together in subsets.
    pub subsets: Option<Arc<SubsetRules>>,
}

/// The endpoints of a cluster at a moment.
#[derive(Debug, Default)]
pub struct EndpointSet {
    /// By priority, 0 first.
    pub priorities: Vec<Priority>,
    /// Whether istiod has said anything yet: a cluster without an answer is not the same as one without endpoints.
    pub known: bool,
    /// What each priority gets.
    pub shares: PriorityShares,
    /// Share of requests that are dropped, of a million (`drop_overloads`).
    pub dropped: u32,
    subsets: Option<Box<Subsets>>,
    arrangement: Arrangement,
}

/// Endpoints of one priority.
#[derive(Debug, Default)]
pub struct Priority {
    /// By locality.
    pub localities: Vec<Arc<LocalityGroup>>,
    /// All of them.
    pub all: Arc<[Arc<Endpoint>]>,
    /// Counts, for the choice among priorities.
    pub health: PriorityHealth,
    healthy: Choice,
    degraded: Choice,
    /// All that may get requests at all.
    panic: List,
    table: Option<HashTable>,
}

/// Endpoints of which one is to be chosen: perhaps first a locality by its weight.
#[derive(Debug, Default)]
pub struct Choice {
    whole: List,
    localities: Option<Localities>,
}

#[derive(Debug)]
struct Localities {
    sequence: Vec<u32>,
    cursor: AtomicU64,
    lists: Vec<List>,
}

/// Endpoints in order, with what the choice among them needs.
#[derive(Debug, Default)]
pub struct List {
    /// They.
    pub endpoints: Arc<[Arc<Endpoint>]>,
    /// How unequal weights spread requests; `None` when all are the same.
    pub spread: Option<Spread>,
    /// Position of round robin.
    pub cursor: AtomicU64,
    /// When the first and the last of them have become healthy, where new ones warm up.
    pub ages: Option<(Instant, Instant)>,
}

/// Unequal weights, prepared.
#[derive(Debug)]
pub struct Spread {
    /// For a choice by a random number.
    pub alias: AliasTable,
    /// For a choice in turn.
    pub sequence: Vec<u32>,
}

/// Endpoints by hash.
#[derive(Debug)]
pub struct HashTable {
    /// They, with their shares of all.
    pub endpoints: Vec<(Arc<Endpoint>, f64)>,
    table: Table,
}

#[derive(Debug)]
enum Table {
    Ring(Ring),
    Maglev(Maglev),
}

impl Default for Arrangement {
    fn default() -> Self {
        Self {
            lb: LbPolicy::LeastRequest(LeastRequest::default()),
            hashing: Hashing::default(),
            locality_weighted: false,
            panic_threshold: DEFAULT_PANIC_THRESHOLD,
            overprovisioning: DEFAULT_OVERPROVISIONING,
            subsets: None,
        }
    }
}

// === impl EndpointSet ===

impl EndpointSet {
    /// Prepares endpoints: `groups` are localities with their priorities, in order.
    pub fn new(groups: Vec<(usize, LocalityGroup)>, arrangement: Arrangement) -> Self {
        let levels = groups.iter().map(|(priority, _)| priority + 1).max().unwrap_or(0);
        let mut localities: Vec<Vec<Arc<LocalityGroup>>> = vec![Vec::new(); levels];
        for (priority, group) in groups {
            if let Some(level) = localities.get_mut(priority) {
                level.push(Arc::new(group));
            }
        }
        Self::arranged(localities, arrangement, 0)
    }

    /// The same, with a share of requests that are dropped.
    #[must_use]
    pub fn dropping(self, dropped: u32) -> Self {
        Self { dropped, ..self }
    }

    /// The same endpoints with the health that they have now.
    pub fn reassessed(&self) -> Self {
        let localities = self.priorities.iter().map(|priority| priority.localities.clone()).collect();
        Self {
            known: self.known,
            ..Self::arranged(localities, self.arrangement.clone(), self.dropped)
        }
    }

    fn arranged(localities: Vec<Vec<Arc<LocalityGroup>>>, arrangement: Arrangement, dropped: u32) -> Self {
        let rules = arrangement.subsets.as_ref();
        let subsets = rules.map(|rules| Box::new(Subsets::new(&localities, rules, &arrangement)));
        let all: Vec<Arc<[Arc<Endpoint>]>> = localities
            .iter()
            .map(|groups| match groups.as_slice() {
                [group] => group.endpoints.clone(),
                groups => groups.iter().flat_map(|group| group.endpoints.iter().cloned()).collect(),
            })
            .collect();
        let health: Vec<PriorityHealth> = all.iter().map(|all| count(all)).collect();
        let shares = priority_shares(&health, arrangement.overprovisioning, arrangement.panic_threshold);
        let priorities = localities
            .into_iter()
            .zip(all)
            .zip(health)
            .zip(shares.panic.iter())
            .map(|(((localities, all), health), panic)| Priority::new(localities, all, health, *panic, &arrangement))
            .collect();
        Self {
            priorities,
            known: true,
            shares,
            dropped,
            subsets,
            arrangement,
        }
    }

    /// The endpoints among which one is chosen for a request that asks for these labels; `None` when there are none for it.
    pub fn within(&self, asked: Option<&Criteria>) -> Option<&Self> {
        let Some(subsets) = &self.subsets else { return Some(self) };
        match subsets.choose(asked.unwrap_or(&Criteria::default())) {
            Within::All => Some(self),
            Within::Subset(subset) => Some(subset),
            Within::Nobody => None,
        }
    }

    /// Every endpoint.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Endpoint>> {
        self.priorities.iter().flat_map(|priority| priority.all.iter())
    }

    /// Percent by which healthy endpoints count for more.
    pub fn overprovisioning(&self) -> u32 {
        self.arrangement.overprovisioning
    }

    /// The panic threshold.
    pub fn panic_threshold(&self) -> u32 {
        self.arrangement.panic_threshold
    }
}

fn count(all: &[Arc<Endpoint>]) -> PriorityHealth {
    let (mut healthy, mut degraded) = (0, 0);
    for endpoint in all {
        healthy += u32::from(endpoint.is_healthy());
        degraded += u32::from(endpoint.is_degraded());
    }
    PriorityHealth {
        healthy,
        degraded,
        total: u32::try_from(all.len()).unwrap_or(u32::MAX),
    }
}

// === impl Priority ===

impl Priority {
    fn new(
        localities: Vec<Arc<LocalityGroup>>,
        all: Arc<[Arc<Endpoint>]>,
        health: PriorityHealth,
        in_panic: bool,
        arrangement: &Arrangement,
    ) -> Self {
        let share_all = |wanted: u32, of: fn(&Endpoint) -> bool| -> Arc<[Arc<Endpoint>]> {
            if wanted == health.total {
                all.clone()
            } else if wanted == 0 {
                Arc::default()
            } else {
                all.iter().filter(|endpoint| of(endpoint)).cloned().collect()
            }
        };
        let healthy = share_all(health.healthy, Endpoint::is_healthy);
        let degraded = share_all(health.degraded, Endpoint::is_degraded);
        // Who is leaving gets nothing new, unless everybody is.
        let staying = |endpoint: &Endpoint| endpoint.health != Health::Draining;
        let panic: Arc<[Arc<Endpoint>]> = match all.iter().filter(|endpoint| staying(endpoint)).count() {
            0 => all.clone(),
            some if some == all.len() => all.clone(),
            _ => all.iter().filter(|endpoint| staying(endpoint)).cloned().collect(),
        };
        let table = if in_panic {
            HashTable::new(&localities, &panic, staying, arrangement)
        } else {
            HashTable::new(&localities, &healthy, Endpoint::is_healthy, arrangement)
        };
        Self {
            healthy: Choice::new(&localities, healthy, Endpoint::is_healthy, arrangement),
            degraded: Choice::new(&localities, degraded, Endpoint::is_degraded, arrangement),
            panic: List::new(panic, arrangement),
            localities,
            all,
            health,
            table,
        }
    }

    /// The endpoints for a request: those of the health that it falls to, or in panic all.
    pub fn list(&self, degraded: bool, panic: bool) -> &List {
        match (panic, degraded) {
            (true, _) => &self.panic,
            (false, true) => self.degraded.list(),
            (false, false) => self.healthy.list(),
        }
    }

    /// Endpoints by hash, where hashes decide.
    pub fn table(&self) -> Option<&HashTable> {
        self.table.as_ref()
    }
}

// === impl Choice ===

impl Choice {
    fn new(
        localities: &[Arc<LocalityGroup>],
        whole: Arc<[Arc<Endpoint>]>,
        may: impl Fn(&Endpoint) -> bool,
        arrangement: &Arrangement,
    ) -> Self {
        let localities = if arrangement.locality_weighted && !whole.is_empty() {
            Localities::new(localities, may, arrangement)
        } else {
            None
        };
        Self {
            whole: List::new(whole, arrangement),
            localities,
        }
    }

    fn list(&self) -> &List {
        use std::sync::atomic::Ordering::Relaxed;
        let of_locality = |localities: &Localities| {
            let turn = localities.cursor.fetch_add(1, Relaxed) % localities.sequence.len().max(1) as u64;
            let index = *localities.sequence.get(usize::try_from(turn).ok()?)?;
            Some(index as usize)
        };
        let Some(localities) = &self.localities else {
            return &self.whole;
        };
        of_locality(localities)
            .and_then(|index| localities.lists.get(index))
            .unwrap_or(&self.whole)
    }
}

impl Localities {
    fn new(groups: &[Arc<LocalityGroup>], may: impl Fn(&Endpoint) -> bool, arrangement: &Arrangement) -> Option<Self> {
        let lists: Vec<Arc<[Arc<Endpoint>]>> = groups
            .iter()
            .map(|group| group.endpoints.iter().filter(|endpoint| may(endpoint)).cloned().collect())
            .collect();
        let size = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let counted: Vec<(u32, u32, u32)> = groups
            .iter()
            .zip(&lists)
            .map(|(group, list)| (group.weight, size(list.len()), size(group.endpoints.len())))
            .collect();
        let shares = locality_shares(&counted, arrangement.overprovisioning);
        let most = shares.iter().copied().max().filter(|most| *most > 0)?;
        let scale = most / u64::from(u32::MAX) + 1;
        // They fit after scaling.
        let weights: Vec<u32> = shares
            .iter()
            .map(|share| u32::try_from(share / scale).unwrap_or(u32::MAX))
            .collect();
        Some(Self {
            sequence: smooth_sequence(&weights),
            cursor: AtomicU64::new(fastrand::u64(..u64::from(u32::MAX))),
            lists: lists.into_iter().map(|list| List::new(list, arrangement)).collect(),
        })
    }
}

// === impl List ===

impl List {
    fn new(endpoints: Arc<[Arc<Endpoint>]>, arrangement: &Arrangement) -> Self {
        let weighted = matches!(arrangement.lb, LbPolicy::RoundRobin { .. } | LbPolicy::LeastRequest(_));
        let since = endpoints.iter().map(|endpoint| endpoint.healthy_since);
        let ages = arrangement.lb.slow_start().and_then(|_| since.clone().min().zip(since.max()));
        Self {
            spread: Spread::of(&endpoints, &arrangement.lb).filter(|_| weighted),
            // Beginning anew always at the first would prefer it where endpoints change often.
            cursor: AtomicU64::new(fastrand::u64(..u64::from(u32::MAX))),
            ages,
            endpoints,
        }
    }
}

impl Spread {
    fn of(endpoints: &[Arc<Endpoint>], lb: &LbPolicy) -> Option<Self> {
        if endpoints
            .windows(2)
            .all(|pair| matches!(pair, [a, b] if a.weight == b.weight))
        {
            return None;
        }
        let weights: Vec<u32> = endpoints.iter().map(|endpoint| endpoint.weight).collect();
        Some(Self {
            alias: AliasTable::new(&weights)?,
            sequence: match lb {
                LbPolicy::RoundRobin { .. } => smooth_sequence(&weights),
                _ => Vec::new(),
            },
        })
    }
}

// === impl HashTable ===

impl HashTable {
    fn new(
        localities: &[Arc<LocalityGroup>],
        flat: &[Arc<Endpoint>],
        may: impl Fn(&Endpoint) -> bool,
        arrangement: &Arrangement,
    ) -> Option<Self> {
        if !arrangement.lb.is_hashed() {
            return None;
        }
        let mut endpoints = Vec::with_capacity(flat.len());
        let total: u64 = localities.iter().map(|group| u64::from(group.weight)).sum();
        if arrangement.locality_weighted && total > 0 {
            // Envoy has them in order of their names.
            let mut sorted: Vec<&Arc<LocalityGroup>> = localities.iter().filter(|group| group.weight > 0).collect();
            sorted.sort_by(|a, b| a.locality.cmp(&b.locality));
            for group in sorted {
                let share = f64::from(group.weight) / total as f64;
                let those: Vec<_> = group.endpoints.iter().filter(|endpoint| may(endpoint)).collect();
                add_shares(those.iter().copied(), share, &mut endpoints);
            }
        } else {
            add_shares(flat.iter(), 1.0, &mut endpoints);
        }
        let by_hostname = arrangement.hashing.by_hostname;
        let keys = endpoints
            .iter()
            .map(|(endpoint, share): &(Arc<Endpoint>, f64)| (endpoint.hash_key(by_hostname), *share));
        let table = match arrangement.lb {
            LbPolicy::RingHash(size) => Table::Ring(Ring::new(keys, size)),
            LbPolicy::Maglev { table_size } => Table::Maglev(Maglev::new(keys, table_size)),
            _ => return None,
        };
        Some(Self { endpoints, table })
    }

    /// The endpoint for a hash; later attempts look elsewhere.
    pub fn choose(&self, hash: u64, attempt: u32) -> Option<usize> {
        match &self.table {
            Table::Ring(ring) => ring.choose(hash, attempt),
            Table::Maglev(maglev) => maglev.choose(hash, attempt),
        }
    }
}

/// Each endpoint with its part of a share, by weight.
fn add_shares<'s>(endpoints: impl Iterator<Item = &'s Arc<Endpoint>> + Clone, share: f64, into: &mut Vec<(Arc<Endpoint>, f64)>) {
    let sum: u64 = endpoints.clone().map(|endpoint| u64::from(endpoint.weight)).sum();
    // In this order of operations, as the last bit decides which endpoint a point of a ring falls to.
    into.extend(endpoints.map(|endpoint| (endpoint.clone(), f64::from(endpoint.weight) * share / sum as f64)));
}
