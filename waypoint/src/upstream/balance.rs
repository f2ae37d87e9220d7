//! Which endpoint gets the next attempt.

use std::sync::{Arc, atomic::Ordering::Relaxed};

use cairn_exchange::clock;
use cairn_policy::{
    balance::{Criteria, Load, SlowStart, choose_dynamic, untried_priority_shares, within_bounds},
    retry::PreviousPriorities,
};
use smallvec::SmallVec;

use super::{
    Cluster, Endpoint, EndpointSet, LbPolicy, LeastRequest, Resource,
    endpoint_set::{HashTable, List},
};

/// How often one is drawn again that was tried before, until the others are looked at one by one.
const REDRAWS: u32 = 8;

/// Endpoints that differ by less are equally warm.
const NO_COOLER: f64 = 0.01;

/// The choice of endpoints for one request: read anew at each attempt, and away from those that failed it.
pub struct Picking<'c> {
    cluster: &'c Cluster,
    tried: SmallVec<[Tried; 2]>,
    others: bool,
    hash: Option<u64>,
    by_latency: bool,
    asked: Option<Arc<Criteria>>,
}

struct Tried {
    endpoint: Arc<Endpoint>,
    priority: usize,
}

/// What the next attempt keeps away from.
#[derive(Clone, Copy, Debug, Default)]
pub struct Avoid {
    /// Endpoints that were tried.
    pub endpoints: bool,
    /// Priorities that were tried.
    pub priorities: Option<PreviousPriorities>,
}

// === impl Picking ===

impl<'c> Picking<'c> {
    /// Nothing tried yet.
    pub fn new(cluster: &'c Cluster) -> Self {
        Self {
            cluster,
            tried: SmallVec::new(),
            others: false,
            hash: None,
            by_latency: false,
            asked: None,
        }
    }

    /// The same for a request with a hash, where hashes decide.
    #[must_use]
    pub fn hashed(self, hash: Option<u64>) -> Self {
        Self { hash, ..self }
    }

    /// The same, with how long endpoints take counting where the number of their requests does (least request).
    #[must_use]
    pub fn by_latency(self, by_latency: bool) -> Self {
        Self { by_latency, ..self }
    }

    /// The same for a request that asks for a subset.
    #[must_use]
    pub fn asking(self, asked: Option<Arc<Criteria>>) -> Self {
        Self { asked, ..self }
    }

    /// The endpoint for the next attempt.
    pub fn next(&mut self, random: u64, avoid: Avoid) -> Option<Arc<Endpoint>> {
        let set = self.cluster.state.endpoints.load();
        let lot = self.hash.unwrap_or(random);
        let set = set.within(self.asked.as_deref())?;
        let (priority, degraded, panic) = self.priority(set, lot, avoid)?;
        if panic && self.cluster.settings.fail_on_panic {
            return None;
        }
        let level = set.priorities.get(priority)?;
        let (chosen, of) = match level.table() {
            Some(table) => (self.by_hash(table, lot, avoid), table.endpoints.len()),
            None => {
                let list = level.list(degraded, panic);
                // Another number than the one that chose the priority: the two choices have nothing to do with each other.
                (self.of_list(list, random.rotate_right(32), avoid), list.endpoints.len())
            }
        };
        let endpoint = chosen?;
        self.others = of > self.tried.len() + 1;
        self.tried.push(Tried {
            endpoint: endpoint.clone(),
            priority,
        });
        Some(endpoint)
    }

    /// The endpoint that was chosen last.
    pub fn last(&self) -> Option<&Arc<Endpoint>> {
        self.tried.last().map(|tried| &tried.endpoint)
    }

    /// Whether there is an endpoint that has not been tried.
    pub fn has_others(&self) -> bool {
        self.others
    }

    /// Priority, whether its degraded endpoints are meant, and whether it is in panic.
    fn priority(&self, set: &EndpointSet, lot: u64, avoid: Avoid) -> Option<(usize, bool, bool)> {
        let of = |shares: &cairn_policy::balance::PriorityShares| {
            let (priority, degraded) = shares.choose(lot)?;
            Some((priority, degraded, shares.panic.get(priority) == Some(&true)))
        };
        let PreviousPriorities { update_frequency } = match avoid.priorities {
            Some(previous) if set.priorities.len() > 1 => previous,
            _ => return of(&set.shares),
        };
        let every = update_frequency.max(1) as usize;
        let seen = self.tried.len() / every * every;
        if seen == 0 {
            return of(&set.shares);
        }
        let mut tried: SmallVec<[bool; 8]> = SmallVec::from_elem(false, set.priorities.len());
        for before in self.tried.iter().take(seen) {
            if let Some(tried) = tried.get_mut(before.priority) {
                *tried = true;
            }
        }
        let health: SmallVec<[_; 8]> = set.priorities.iter().map(|priority| priority.health).collect();
        of(&untried_priority_shares(
            &health,
            &tried,
            set.overprovisioning(),
            set.panic_threshold(),
        ))
    }

    fn was_tried(&self, endpoint: &Endpoint) -> bool {
        self.tried
            .iter()
            .any(|tried| Arc::ptr_eq(&tried.endpoint.state, &endpoint.state))
    }

    fn by_hash(&self, table: &HashTable, hash: u64, avoid: Avoid) -> Option<Arc<Endpoint>> {
        let avoids = avoid.endpoints && !self.tried.is_empty();
        let factor = self.cluster.settings.hashing.balance_factor;
        let mut last = None;
        for attempt in 0..if avoids { REDRAWS } else { 1 } {
            let mut at = table.choose(hash, attempt)?;
            if factor > 0 {
                let overall = self.cluster.state.usage.total(Resource::Request);
                at = within_bounds(at, hash, table.endpoints.len(), overall, factor, |at| {
                    table
                        .endpoints
                        .get(at)
                        .map_or(Load { active: 0, share: 1.0 }, |(endpoint, share)| Load {
                            active: endpoint.state.active.load(Relaxed),
                            share: *share,
                        })
                });
            }
            let (endpoint, _) = table.endpoints.get(at)?;
            if !avoids || !self.was_tried(endpoint) {
                return Some(endpoint.clone());
            }
            last = Some(endpoint);
        }
        let other = table.endpoints.iter().map(|(endpoint, _)| endpoint);
        other.clone().find(|endpoint| !self.was_tried(endpoint)).or(last).cloned()
    }

    fn of_list(&self, list: &List, mut random: u64, avoid: Avoid) -> Option<Arc<Endpoint>> {
        let mut chosen = self.choose(list, random)?;
        if !avoid.endpoints || self.tried.is_empty() || list.endpoints.len() <= 1 {
            return Some(chosen.clone());
        }
        for _ in 0..REDRAWS {
            if !self.was_tried(chosen) {
                return Some(chosen.clone());
            }
            random = another(random);
            chosen = self.choose(list, random)?;
        }
        let from = usize::try_from(random % list.endpoints.len() as u64).ok()?;
        let (before, after) = list.endpoints.split_at_checked(from)?;
        let other = after.iter().chain(before).find(|endpoint| !self.was_tried(endpoint));
        Some(other.unwrap_or(chosen).clone())
    }

    fn choose<'l>(&self, list: &'l List, random: u64) -> Option<&'l Arc<Endpoint>> {
        if list.endpoints.len() <= 1 {
            return list.endpoints.first();
        }
        let lb = &self.cluster.settings.lb;
        let warming = lb.slow_start().filter(|slow| list.is_warming(slow));
        match lb {
            LbPolicy::RoundRobin { .. } => match warming {
                Some(slow) => list.by_changing_weight(random, |endpoint| warmth(slow, endpoint)),
                None => list.in_turn(),
            },
            LbPolicy::LeastRequest(least) if warming.is_some() || list.spread.is_some() => {
                list.by_changing_weight(random, |endpoint| {
                    let leisure = if self.by_latency {
                        cost(endpoint).recip()
                    } else {
                        leisure(endpoint, least.bias)
                    };
                    warming.map_or(1.0, |slow| warmth(slow, endpoint)) * leisure
                })
            }
            LbPolicy::LeastRequest(LeastRequest { choices, .. }) if self.by_latency => list.least_of(*choices, random, cost),
            LbPolicy::LeastRequest(LeastRequest { choices, .. }) => {
                list.least_of(*choices, random, |endpoint| endpoint.state.active.load(Relaxed))
            }
            LbPolicy::Random | LbPolicy::RingHash(_) | LbPolicy::Maglev { .. } | LbPolicy::ClusterProvided => {
                list.at(random % list.endpoints.len() as u64)
            }
        }
    }
}

/// How much of its weight an endpoint has by its age.
fn warmth(slow: &SlowStart, endpoint: &Endpoint) -> f64 {
    slow.factor(clock::now().saturating_duration_since(endpoint.healthy_since))
}

/// How much of its weight an endpoint has beside its requests.
fn leisure(endpoint: &Endpoint, bias: f64) -> f64 {
    let busy = f64::from(endpoint.state.active.load(Relaxed)) + 1.0;
    if bias == 1.0 { busy.recip() } else { busy.powf(-bias) }
}

/// Seconds until an endpoint would have answered all its requests and one more.
fn cost(endpoint: &Endpoint) -> f64 {
    let requests = f64::from(endpoint.state.active.load(Relaxed)) + 1.0;
    requests * endpoint.state.latency.expected(clock::now())
}

/// A random number from another one.
fn another(random: u64) -> u64 {
    random.rotate_right(29).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

impl List {
    fn at(&self, index: u64) -> Option<&Arc<Endpoint>> {
        self.endpoints.get(usize::try_from(index).ok()?)
    }

    /// Whether some are less warm than others: all of the same age share as if they were warm.
    fn is_warming(&self, slow: &SlowStart) -> bool {
        let Some((oldest, newest)) = self.ages else { return false };
        let now = clock::now();
        let factor = |since| slow.factor(now.saturating_duration_since(since));
        factor(oldest) - factor(newest) > NO_COOLER
    }

    fn in_turn(&self) -> Option<&Arc<Endpoint>> {
        let turn = self.cursor.fetch_add(1, Relaxed);
        match &self.spread {
            Some(spread) => {
                let at = usize::try_from(turn % spread.sequence.len().max(1) as u64).ok()?;
                self.at(u64::from(*spread.sequence.get(at)?))
            }
            None => self.at(turn % self.endpoints.len() as u64),
        }
    }

    fn by_changing_weight(&self, random: u64, factor: impl Fn(&Endpoint) -> f64) -> Option<&Arc<Endpoint>> {
        let mut draws = random;
        let draw = || {
            draws = another(draws);
            match &self.spread {
                Some(spread) => spread.alias.choose(draws),
                None => (((draws >> 32) * self.endpoints.len() as u64) >> 32) as usize,
            }
        };
        let endpoint = |at: usize| self.endpoints.get(at);
        let weight = |at: usize| endpoint(at).map_or(0.0, |endpoint| f64::from(endpoint.weight));
        let factor = |at: usize| endpoint(at).map_or(0.0, |endpoint| factor(endpoint));
        let chosen = choose_dynamic(self.endpoints.len(), weight, factor, draw, random)?;
        endpoint(chosen)
    }

    /// The one with the least load of some chosen at random, or of all.
    fn least_of<L: PartialOrd + Copy>(
        &self,
        choices: Option<u32>,
        mut random: u64,
        load: impl Fn(&Endpoint) -> L,
    ) -> Option<&Arc<Endpoint>> {
        let count = self.endpoints.len() as u64;
        let tries = choices.map_or(count, |choices| u64::from(choices.max(1)));
        let mut best: Option<(&Arc<Endpoint>, L)> = None;
        for number in 0..tries {
            // All of them from a random one on, so that of equals not always the first is taken.
            let candidate = match choices {
                Some(_) => self.at(random % count)?,
                None => self.at((random.wrapping_add(number)) % count)?,
            };
            if choices.is_some() {
                random = another(random);
            }
            let mine = load(candidate);
            if best.is_none_or(|(_, least)| mine < least) {
                best = Some((candidate, mine));
            }
        }
        best.map(|(endpoint, _)| endpoint)
    }
}

#[cfg(test)]
mod tests;
