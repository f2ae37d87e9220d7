//! Choosing by weight: exactly in proportion ([`Weights`], a binary search), or in constant time ([`AliasTable`]).

/// Why weights are refused.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum WeightSumError {
    /// Nothing could be chosen.
    #[error("the weights add up to zero; give at least one a positive weight")]
    Zero,
    /// Envoy counts in 32 bits.
    #[error("the weights add up to more than 4294967295; use smaller ones")]
    TooLarge,
}

/// Weights with a positive sum.
#[derive(Clone, Debug)]
pub struct Weights {
    /// Sums up to and including each weight.
    sums: Box<[u32]>,
    total: u32,
}

/// Weights in a form that chooses in constant time (Walker's alias method).
#[derive(Clone, Debug)]
pub struct AliasTable {
    /// For each slot: the share of 2³² that is its own, and who gets the rest.
    slots: Box<[(u64, u32)]>,
}

// === impl Weights ===

impl Weights {
    /// Weights in order.
    pub fn new(weights: impl IntoIterator<Item = u32>) -> Result<Self, WeightSumError> {
        let mut total: u32 = 0;
        let mut sums = Vec::new();
        for weight in weights {
            total = total.checked_add(weight).ok_or(WeightSumError::TooLarge)?;
            sums.push(total);
        }
        if total == 0 {
            Err(WeightSumError::Zero)
        } else {
            Ok(Self {
                sums: sums.into(),
                total,
            })
        }
    }

    /// Their sum.
    pub fn total(&self) -> u32 {
        self.total
    }

    /// The index that a random number stands for; one of weight zero never.
    pub fn choose(&self, random: u64) -> usize {
        let lot = random % u64::from(self.total);
        self.sums.partition_point(|sum| u64::from(*sum) <= lot)
    }
}

// === impl AliasTable ===

impl AliasTable {
    /// A table over weights; `None` when none is positive.
    pub fn new(weights: &[u32]) -> Option<Self> {
        let total: u128 = weights.iter().map(|weight| u128::from(*weight)).sum();
        let count = u128::try_from(weights.len()).ok()?;
        if total == 0 || u32::try_from(weights.len()).is_err() {
            return None;
        }
        // Scaled so that the average is `total`: a slot keeps what it has up to that, and its rest goes to one that has more.
        let mut left: Vec<u128> = weights.iter().map(|weight| u128::from(*weight) * count).collect();
        let mut slots: Vec<(u64, u32)> = (0..weights.len() as u32).map(|index| (1 << 32, index)).collect();
        let (mut poor, mut rich): (Vec<usize>, Vec<usize>) = (0..weights.len()).partition(|index| left[*index] < total);
        while let (Some(needy), Some(giver)) = (poor.pop(), rich.pop()) {
            // All indices are positions in `weights`, and the lists made from it are as long.
            let own = u64::try_from((left[needy] << 32) / total).unwrap_or(1 << 32);
            slots[needy] = (own, giver as u32);
            left[giver] -= total - left[needy];
            if left[giver] < total {
                poor.push(giver)
            } else {
                rich.push(giver)
            }
        }
        Some(Self { slots: slots.into() })
    }

    /// The index that a random number stands for.
    pub fn choose(&self, random: u64) -> usize {
        // The high half chooses the slot without division, the low half decides inside.
        // Less than 2³² times the length, shifted back, is below the length; the other of a slot is a position as well.
        let slot = (((random >> 32) * self.slots.len() as u64) >> 32) as usize;
        let (own, other) = self.slots[slot];
        if random & 0xffff_ffff < own { slot } else { other as usize }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{AliasTable, WeightSumError, Weights};

    #[test]
    fn weights_choose_exactly_in_proportion() {
        let weights = Weights::new([0, 3, 0, 1, 0]).unwrap();
        assert_eq!(weights.total(), 4);
        assert_eq!(
            (0..8).map(|random| weights.choose(random)).collect::<Vec<_>>(),
            [1, 1, 1, 3, 1, 1, 1, 3]
        );
    }

    #[test]
    fn sums_of_nothing_or_too_much_are_refused() {
        assert_eq!(Weights::new([]).unwrap_err(), WeightSumError::Zero);
        assert_eq!(Weights::new([0, 0]).unwrap_err(), WeightSumError::Zero);
        assert_eq!(Weights::new([u32::MAX, 1]).unwrap_err(), WeightSumError::TooLarge);
        assert_eq!(Weights::new([u32::MAX, 0]).unwrap().choose(u64::MAX), 0);
        assert!(AliasTable::new(&[]).is_none() && AliasTable::new(&[0]).is_none());
    }

    #[test]
    fn an_alias_table_keeps_the_proportions() {
        for weights in [
            &[1, 1, 1][..],
            &[1, 2, 3, 4],
            &[100, 1],
            &[0, 5, 0, 5],
            &[7],
            &[u32::MAX, u32::MAX, 1],
        ] {
            let table = AliasTable::new(weights).unwrap();
            let mut random = fastrand::Rng::with_seed(7);
            let mut chosen = vec![0u32; weights.len()];
            let rounds = 200_000;
            for _ in 0..rounds {
                chosen[table.choose(random.u64(..))] += 1;
            }
            let total: f64 = weights.iter().map(|weight| f64::from(*weight)).sum();
            for (count, weight) in chosen.iter().zip(weights) {
                let expected = f64::from(*weight) / total;
                let found = f64::from(*count) / f64::from(rounds);
                assert!((found - expected).abs() < 0.005, "{weights:?}: {chosen:?}");
            }
        }
    }

    proptest! {
        #[test]
        fn an_index_of_weight_zero_is_never_chosen(weights in proptest::collection::vec(0u32..5, 1..12), random in any::<u64>()) {
            if let Some(table) = AliasTable::new(&weights) {
                prop_assert!(weights[table.choose(random)] > 0);
                prop_assert!(weights[Weights::new(weights.iter().copied()).unwrap().choose(random)] > 0);
            }
        }
    }
}
