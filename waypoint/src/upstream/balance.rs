//! Which endpoint gets the next attempt.

use std::sync::{Arc, atomic::Ordering};

use cairn_policy::balance::{DEFAULT_OVERPROVISIONING, priority_shares};
use smallvec::SmallVec;

use super::{Cluster, Endpoint, EndpointSet, LbPolicy, endpoint::Spread};

/// The choice of endpoints for one request: read anew at each attempt, and away from those that failed it.
pub struct Picking<'c> {
    cluster: &'c Cluster,
    tried: SmallVec<[Arc<Endpoint>; 2]>,
    others: bool,
}

// === impl Picking ===

impl<'c> Picking<'c> {
    /// Nothing tried yet.
    pub fn new(cluster: &'c Cluster) -> Self {
        Self {
            cluster,
            tried: SmallVec::new(),
            others: false,
        }
    }

    /// The endpoint for the next attempt.
    pub fn next(&mut self, random: u64) -> Option<Arc<Endpoint>> {
        let set = self.cluster.state.endpoints.load();
        let candidates = candidates(&set, self.cluster, random);
        // Another number than the one that chose the priority: the two choices have nothing to do with each other.
        let random = random.rotate_right(32);
        let fresh = |endpoint: &&Arc<Endpoint>| !self.tried.iter().any(|tried| tried.target == endpoint.target);
        let chosen = if self.tried.is_empty() {
            self.choose(candidates, random)
        } else {
            let others: SmallVec<[Arc<Endpoint>; 8]> = candidates.endpoints.iter().filter(fresh).cloned().collect();
            let others = Candidates {
                endpoints: &others,
                spread: None,
            };
            if others.endpoints.is_empty() {
                self.choose(candidates, random)
            } else {
                self.choose(others, random)
            }
        }?;
        self.others = candidates.endpoints.len() > self.tried.len() + 1;
        self.tried.push(chosen.clone());
        Some(chosen)
    }

    /// Whether there is an endpoint that has not been tried.
    pub fn has_others(&self) -> bool {
        self.others
    }

    fn choose(&self, among: Candidates<'_>, random: u64) -> Option<Arc<Endpoint>> {
        if among.endpoints.len() <= 1 {
            return among.endpoints.first().cloned();
        }
        match &self.cluster.settings.lb {
            LbPolicy::RoundRobin => among.in_turn(self.cluster.state.cursor.fetch_add(1, Ordering::Relaxed)),
            LbPolicy::LeastRequest { choices } => among.least_busy(*choices, random),
            LbPolicy::Random | LbPolicy::RingHash { .. } | LbPolicy::Maglev { .. } | LbPolicy::ClusterProvided => {
                among.at_random(random)
            }
        }
        .cloned()
    }
}

/// Endpoints that may be chosen.
#[derive(Clone, Copy)]
struct Candidates<'s> {
    endpoints: &'s [Arc<Endpoint>],
    /// Their weights, where they differ and are prepared.
    spread: Option<&'s Spread>,
}

/// The endpoints of the priority that a request falls to: those that may be chosen, or all of them in panic.
fn candidates<'s>(set: &'s EndpointSet, cluster: &Cluster, random: u64) -> Candidates<'s> {
    let threshold = cluster.settings.panic_threshold;
    let (priority, panic) = match set.priorities.as_slice() {
        [] => {
            return Candidates {
                endpoints: &[],
                spread: None,
            };
        }
        [only] => (
            only,
            (only.available.len() as f64) * 100.0 < threshold * only.all.len() as f64,
        ),
        several => {
            let health: SmallVec<[_; 4]> = several.iter().map(|priority| priority.health).collect();
            let shares = priority_shares(&health, DEFAULT_OVERPROVISIONING, threshold as u32);
            match shares
                .choose(random)
                .and_then(|(index, _degraded)| Some((several.get(index)?, shares.panic.get(index) == Some(&true))))
            {
                Some(chosen) => chosen,
                None => {
                    return Candidates {
                        endpoints: &[],
                        spread: None,
                    };
                }
            }
        }
    };
    if panic {
        Candidates {
            endpoints: &priority.all,
            spread: None,
        }
    } else {
        Candidates {
            endpoints: &priority.available,
            spread: priority.spread.as_ref(),
        }
    }
}

impl<'s> Candidates<'s> {
    fn at(self, index: u64) -> Option<&'s Arc<Endpoint>> {
        self.endpoints.get(usize::try_from(index).ok()?)
    }

    fn in_turn(self, turn: u64) -> Option<&'s Arc<Endpoint>> {
        match self.spread {
            Some(spread) => {
                let at = usize::try_from(turn % spread.sequence.len().max(1) as u64).ok()?;
                self.at(u64::from(*spread.sequence.get(at)?))
            }
            None => self.at(turn % self.endpoints.len() as u64),
        }
    }

    fn at_random(self, random: u64) -> Option<&'s Arc<Endpoint>> {
        match self.spread {
            Some(spread) => self.endpoints.get(spread.alias.choose(random)),
            None => self.at(random % self.endpoints.len() as u64),
        }
    }

    /// The least busy of some chosen at random by weight.
    fn least_busy(self, choices: u32, mut random: u64) -> Option<&'s Arc<Endpoint>> {
        let mut best: Option<(&Arc<Endpoint>, u32)> = None;
        for _ in 0..choices.max(1) {
            let candidate = self.at_random(random)?;
            random = random.rotate_right(29).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let active = candidate.state.active.load(Ordering::Relaxed);
            if best.is_none_or(|(_, least)| active < least) {
                best = Some((candidate, active));
            }
        }
        best.map(|(endpoint, _)| endpoint)
    }
}
