//! Weighted round robin as a sequence that is made once: each index as often as its weight says, and spread as evenly as can be.
//!
//! Whoever serves it moves an atomic cursor through it; no lock, no arithmetic at a request.

use std::{cmp::Ordering, collections::BinaryHeap};

/// The longest sequence that is made; weights with a larger sum are scaled down to it.
pub const MOST_SEQUENCE: usize = 1 << 16;

/// The next turn of an index: due in the middle of its `turn`-th equal part of the round.
#[derive(PartialEq, Eq)]
struct Due {
    turn: u64,
    weight: u64,
    index: u32,
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> Ordering {
        // (2·turn + 1) / (2·weight), compared without division; the heap wants the earliest to be the greatest.
        let mine = (2 * self.turn + 1) * other.weight;
        let theirs = (2 * other.turn + 1) * self.weight;
        theirs.cmp(&mine).then_with(|| other.index.cmp(&self.index))
    }
}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The sequence of one round. An index with a positive weight occurs at least once (up to [`MOST_SEQUENCE`] of them), one with
/// weight zero never; without positive weights the sequence is empty.
pub fn smooth_sequence(weights: &[u32]) -> Vec<u32> {
    let weights = scaled(weights);
    let length = weights.iter().sum();
    let due = weights.iter().enumerate().filter(|(_, weight)| **weight > 0);
    let mut heap: BinaryHeap<Due> = due
        .map(|(index, weight)| Due {
            turn: 0,
            weight: *weight,
            index: u32::try_from(index).unwrap_or(u32::MAX),
        })
        .collect();
    let mut sequence = Vec::new();
    while (sequence.len() as u64) < length
        && let Some(due) = heap.pop()
    {
        sequence.push(due.index);
        if due.turn + 1 < due.weight {
            heap.push(Due {
                turn: due.turn + 1,
                ..due
            });
        }
    }
    sequence
}

/// Weights without their common divisor, and with a sum of at most [`MOST_SEQUENCE`].
fn scaled(weights: &[u32]) -> Vec<u64> {
    let divisor = weights
        .iter()
        .fold(0, |divisor, weight| gcd(divisor, u64::from(*weight)))
        .max(1);
    let mut scaled: Vec<u64> = weights.iter().map(|weight| u64::from(*weight) / divisor).collect();
    let total: u64 = scaled.iter().sum();
    let most = MOST_SEQUENCE as u64;
    if total > most {
        let positive = scaled.iter().filter(|weight| **weight > 0).count() as u64;
        // One turn each is sure, the others are shared in proportion.
        let to_share = most.saturating_sub(positive);
        for weight in scaled.iter_mut().filter(|weight| **weight > 0) {
            *weight = 1 + u64::try_from(u128::from(*weight) * u128::from(to_share) / u128::from(total)).unwrap_or(0);
        }
    }
    scaled
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{MOST_SEQUENCE, smooth_sequence};

    #[test]
    fn turns_are_spread_evenly() {
        for (weights, sequence) in [
            (&[][..], &[][..]),
            (&[0, 0], &[]),
            (&[1, 1, 1], &[0, 1, 2]),
            (&[5, 5], &[0, 1]),
            (&[4, 1], &[0, 0, 1, 0, 0]),
            (&[3, 0, 1], &[0, 0, 2, 0]),
            (&[200, 100], &[0, 1, 0]),
        ] {
            assert_eq!(smooth_sequence(weights), sequence, "{weights:?}");
        }
    }

    #[test]
    fn huge_weights_are_scaled_down_and_nobody_is_forgotten() {
        let sequence = smooth_sequence(&[u32::MAX, u32::MAX - 1, 1]);
        assert!(sequence.len() <= MOST_SEQUENCE);
        let count = |index| sequence.iter().filter(|turn| **turn == index).count();
        assert_eq!(count(2), 1);
        assert!(count(0).abs_diff(count(1)) <= 1);
    }

    proptest! {
        #[test]
        fn each_index_has_its_turns_and_never_waits_long(weights in proptest::collection::vec(0u32..20, 1..10)) {
            let sequence = smooth_sequence(&weights);
            let total = sequence.len();
            let all: u64 = weights.iter().map(|weight| u64::from(*weight)).sum();
            for (index, weight) in weights.iter().enumerate() {
                let turns: Vec<usize> = (0..total).filter(|at| sequence[*at] as usize == index).collect();
                prop_assert_eq!(turns.len() as u64 * all, u64::from(*weight) * total as u64);
                for pair in turns.windows(2) {
                    prop_assert!((pair[1] - pair[0]) <= 2 * total / turns.len() + weights.len());
                }
            }
        }
    }
}
