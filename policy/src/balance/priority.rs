//! Which priority gets which share of the requests, as Envoy computes it from the counts of healthy endpoints.
//!
//! A priority is as available as its healthy share times the overprovisioning factor (140 %), at most 100: with 72 % of the endpoints
//! of priority 0 healthy nothing spills over to priority 1. Below the panic threshold a priority sends to all its endpoints,
//! healthy or not, but only when all priorities together are not fully available. A threshold of 0 turns panic off: with no healthy
//! endpoint there is then none at all (503, `UH`).

/// Percent by which a priority's healthy share counts for more.
pub const DEFAULT_OVERPROVISIONING: u32 = 140;
/// Percent of healthy endpoints below which a priority is in panic, where configuration says nothing.
pub const DEFAULT_PANIC_THRESHOLD: u32 = 50;

/// Counts of endpoints of one priority.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PriorityHealth {
    /// Healthy ones.
    pub healthy: u32,
    /// Degraded ones: used when healthy ones do not suffice.
    pub degraded: u32,
    /// All, except those that wait for their first health check.
    pub total: u32,
}

/// What each priority gets; lists are indexed by priority.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PriorityShares {
    /// Percent of the requests for its healthy endpoints.
    pub healthy: Vec<u32>,
    /// Percent of the requests for its degraded endpoints.
    pub degraded: Vec<u32>,
    /// It uses all its endpoints, whatever their health.
    pub panic: Vec<bool>,
}

/// A share for each priority, of 100 together (unless there are no priorities).
pub fn priority_shares(priorities: &[PriorityHealth], overprovisioning: u32, panic_threshold: u32) -> PriorityShares {
    let available = |count: u32, total: u32| percent(u64::from(count) * u64::from(overprovisioning), total);
    let healthy: Vec<u32> = priorities.iter().map(|each| available(each.healthy, each.total)).collect();
    let degraded: Vec<u32> = priorities.iter().map(|each| available(each.degraded, each.total)).collect();
    let sum = healthy
        .iter()
        .chain(&degraded)
        .fold(0, |sum: u32, each| sum.saturating_add(*each))
        .min(100);
    let mut shares = PriorityShares {
        panic: vec![false; priorities.len()],
        ..distribute(&healthy, &degraded, sum)
    };
    if panic_threshold == 0 {
        return shares;
    }
    if sum == 0 {
        if let Some(first) = shares.panic.first_mut() {
            *first = true;
        }
        // All priorities are in panic: the share goes by the number of endpoints.
        return total_panic(priorities, shares);
    }
    if sum < 100 {
        shares.panic = priorities.iter().map(|each| in_panic(each, panic_threshold)).collect();
        if shares.panic.iter().all(|panic| *panic) {
            return total_panic(priorities, shares);
        }
    }
    shares
}

/// Shares for a retry that avoids the priorities already tried: as if nothing there were healthy. When nothing is left, all count again.
pub fn untried_priority_shares(
    priorities: &[PriorityHealth],
    tried: &[bool],
    overprovisioning: u32,
    panic_threshold: u32,
) -> PriorityShares {
    let tried = |at: usize| tried.get(at).copied().unwrap_or(false);
    let untried: Vec<PriorityHealth> = priorities
        .iter()
        .enumerate()
        .map(|(at, each)| {
            if tried(at) {
                PriorityHealth {
                    healthy: 0,
                    degraded: 0,
                    ..*each
                }
            } else {
                *each
            }
        })
        .collect();
    if untried.iter().all(|each| each.healthy == 0 && each.degraded == 0) {
        return priority_shares(priorities, overprovisioning, panic_threshold);
    }
    priority_shares(&untried, overprovisioning, 0)
}

/// Shares in order of priority until 100 are given; what rounding leaves goes to the first that has any.
fn distribute(healthy: &[u32], degraded: &[u32], sum: u32) -> PriorityShares {
    let mut rest = 100;
    let mut give = |availability: &[u32]| -> Vec<u32> {
        let mut give_one = |available: &u32| {
            let share = (available * 100).checked_div(sum).unwrap_or(0).min(rest);
            rest -= share;
            share
        };
        availability.iter().map(&mut give_one).collect()
    };
    let mut shares = PriorityShares {
        healthy: give(healthy),
        degraded: give(degraded),
        panic: Vec::new(),
    };
    let to = if let Some(first) = healthy.iter().position(|available| *available > 0) {
        shares.healthy.get_mut(first)
    } else if let Some(first) = degraded.iter().position(|available| *available > 0) {
        shares.degraded.get_mut(first)
    } else {
        shares.healthy.first_mut()
    };
    if let Some(to) = to {
        *to += rest;
    }
    shares
}

fn total_panic(priorities: &[PriorityHealth], shares: PriorityShares) -> PriorityShares {
    let all: u64 = priorities.iter().map(|each| u64::from(each.total)).sum();
    if all == 0 {
        return shares;
    }
    let share = |each: &PriorityHealth| u32::try_from(100 * u64::from(each.total) / all).unwrap_or(100);
    let mut healthy: Vec<u32> = priorities.iter().map(share).collect();
    let rest = 100 - healthy.iter().sum::<u32>();
    let first = priorities
        .iter()
        .position(|each| each.total > 0)
        .and_then(|first| healthy.get_mut(first));
    if let Some(first) = first {
        *first += rest;
    }
    PriorityShares {
        healthy,
        degraded: vec![0; priorities.len()],
        panic: vec![true; priorities.len()],
    }
}

fn in_panic(each: &PriorityHealth, threshold: u32) -> bool {
    let share = |count: u32| percent(u64::from(count) * 100, each.total);
    share(each.healthy) + share(each.degraded) < threshold.min(100)
}

/// `amount / total`, at most 100; nothing of nothing is 0.
fn percent(amount: u64, total: u32) -> u32 {
    amount
        .checked_div(u64::from(total))
        .map_or(0, |percent| u32::try_from(percent.min(100)).unwrap_or(100))
}

/// Weights of the localities of one priority: the configured ones, lowered where too few endpoints are available. Each item is
/// (weight, available endpoints, all endpoints). The weights are scaled by 10 000.
pub fn locality_shares(localities: &[(u32, u32, u32)], overprovisioning: u32) -> Vec<u64> {
    let share = |(weight, available, total): &(u32, u32, u32)| {
        let factor = u64::from(overprovisioning) * u64::from(*available) * 100;
        let factor = factor.checked_div(u64::from(*total)).unwrap_or(0).min(10_000);
        u64::from(*weight) * factor
    };
    localities.iter().map(share).collect()
}

// === impl PriorityShares ===

impl PriorityShares {
    /// The priority of a request, and whether it goes to the degraded endpoints there. The same random number chooses the same.
    pub fn choose(&self, random: u64) -> Option<(usize, bool)> {
        let mut lot = random % 100;
        for (shares, degraded) in [(&self.healthy, false), (&self.degraded, true)] {
            for (priority, share) in shares.iter().enumerate() {
                match lot.checked_sub(u64::from(*share)) {
                    Some(rest) => lot = rest,
                    None => return Some((priority, degraded)),
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        DEFAULT_OVERPROVISIONING, DEFAULT_PANIC_THRESHOLD, PriorityHealth, locality_shares, priority_shares,
        untried_priority_shares,
    };

    fn health((healthy, degraded, total): (u32, u32, u32)) -> PriorityHealth {
        PriorityHealth {
            healthy,
            degraded,
            total,
        }
    }

    #[test]
    fn priorities_spill_over_as_envoys_documentation_tabulates() {
        // Without panic. From "Priority levels" and "Degraded endpoints" of Envoy's load balancing documentation.
        for (priorities, healthy, degraded) in [
            (vec![(100, 0, 100), (100, 0, 100)], vec![100, 0], vec![0, 0]),
            (vec![(72, 0, 100), (72, 0, 100)], vec![100, 0], vec![0, 0]),
            (vec![(71, 0, 100), (71, 0, 100)], vec![99, 1], vec![0, 0]),
            (vec![(50, 0, 100), (50, 0, 100)], vec![70, 30], vec![0, 0]),
            (vec![(25, 0, 100), (100, 0, 100)], vec![35, 65], vec![0, 0]),
            (vec![(25, 0, 100), (25, 0, 100)], vec![50, 50], vec![0, 0]),
            (vec![(25, 0, 100), (20, 0, 100)], vec![56, 44], vec![0, 0]),
            (vec![(0, 0, 10), (10, 0, 10)], vec![0, 100], vec![0, 0]),
            (vec![(0, 0, 10), (0, 0, 10)], vec![100, 0], vec![0, 0]),
            (vec![(0, 0, 0), (1, 0, 1)], vec![0, 100], vec![0, 0]),
            (vec![(0, 10, 10)], vec![0], vec![100]),
            (vec![(5, 5, 10)], vec![70], vec![30]),
            (vec![], vec![], vec![]),
        ] {
            let counts: Vec<_> = priorities.iter().copied().map(health).collect();
            let shares = priority_shares(&counts, DEFAULT_OVERPROVISIONING, 0);
            assert_eq!((shares.healthy, shares.degraded), (healthy, degraded), "{priorities:?}");
            assert!(shares.panic.iter().all(|panic| !panic));
        }
    }

    #[test]
    fn below_the_threshold_a_priority_panics_unless_others_suffice() {
        for (priorities, healthy, panic) in [
            (vec![(4, 0, 10), (10, 0, 10)], vec![56, 44], vec![false, false]),
            (vec![(1, 0, 10), (5, 0, 10)], vec![17, 83], vec![true, false]),
            (vec![(1, 0, 10), (1, 0, 30)], vec![25, 75], vec![true, true]),
            (vec![(0, 0, 10), (0, 0, 10)], vec![50, 50], vec![true, true]),
            (vec![(0, 0, 0), (0, 0, 0)], vec![100, 0], vec![true, false]),
            (vec![(0, 0, 3)], vec![100], vec![true]),
        ] {
            let counts: Vec<_> = priorities.iter().copied().map(health).collect();
            let shares = priority_shares(&counts, DEFAULT_OVERPROVISIONING, DEFAULT_PANIC_THRESHOLD);
            assert_eq!((shares.healthy, shares.panic), (healthy, panic), "{priorities:?}");
        }
    }

    #[test]
    fn a_retry_goes_to_priorities_that_were_not_tried_while_there_are_some() {
        let counts = [(10, 0, 10), (5, 0, 10), (0, 0, 10)].map(health);
        for (tried, healthy) in [
            (&[][..], [100, 0, 0]),
            (&[true][..], [0, 100, 0]),
            (&[true, true], [100, 0, 0]),
            (&[false, true], [100, 0, 0]),
        ] {
            assert_eq!(
                untried_priority_shares(&counts, tried, DEFAULT_OVERPROVISIONING, 0).healthy,
                healthy,
                "{tried:?}"
            );
        }
    }

    #[test]
    fn a_locality_loses_weight_only_when_it_lacks_endpoints() {
        let shares = locality_shares(
            &[(80, 10, 10), (80, 5, 10), (80, 8, 10), (10, 0, 10), (5, 0, 0)],
            DEFAULT_OVERPROVISIONING,
        );
        assert_eq!(shares, [800_000, 560_000, 800_000, 0, 0]);
    }

    #[test]
    fn a_request_chooses_a_priority_by_its_share() {
        let counts = [health((5, 2, 10)), health((0, 10, 100))];
        let shares = priority_shares(&counts, DEFAULT_OVERPROVISIONING, 0);
        let count = |wanted| (0..100).filter(|random| shares.choose(*random) == Some(wanted)).count();
        assert_eq!(count((0, false)), shares.healthy[0] as usize);
        assert_eq!(count((0, true)), shares.degraded[0] as usize);
        assert_eq!(count((1, true)), shares.degraded[1] as usize);
        assert_eq!(priority_shares(&[], 140, 50).choose(3), None);
    }

    proptest! {
        #[test]
        fn shares_always_add_up_to_a_hundred(
            counts in proptest::collection::vec((0u32..20, 0u32..20, 0u32..20), 1..6),
            threshold in 0u32..=100,
        ) {
            let counts: Vec<_> = counts
                .into_iter()
                .map(|(healthy, degraded, sick)| PriorityHealth { healthy, degraded, total: healthy + degraded + sick })
                .collect();
            let shares = priority_shares(&counts, DEFAULT_OVERPROVISIONING, threshold);
            prop_assert_eq!(shares.healthy.iter().chain(&shares.degraded).sum::<u32>(), 100);
            prop_assert_eq!(shares.panic.len(), counts.len());
            prop_assert!(shares.choose(99).is_some());
        }
    }
}
