//! Least request: of a few endpoints taken by chance, the one with the least to do.

/// Two different indices below `count` from one random number; the same twice only when there is but one. `None` when there is none.
pub fn two_of(count: usize, random: u64) -> Option<(usize, usize)> {
    let choices = u64::try_from(count).ok().filter(|count| *count > 0)?;
    let first = ((random >> 32) * choices) >> 32;
    let distance = match choices {
        1 => 0,
        _ => 1 + (((random & 0xffff_ffff) * (choices - 1)) >> 32),
    };
    // Both are below `choices`, which came from a `usize`.
    Some((first as usize, ((first + distance) % choices) as usize))
}

/// Of candidates, the one with the smallest load; the first of equals. `None` without candidates.
pub fn least_loaded<L: PartialOrd>(candidates: impl IntoIterator<Item = usize>, load: impl Fn(usize) -> L) -> Option<usize> {
    let mut best: Option<(usize, L)> = None;
    for candidate in candidates {
        let mine = load(candidate);
        if best.as_ref().is_none_or(|(_, least)| mine < *least) {
            best = Some((candidate, mine));
        }
    }
    best.map(|(candidate, _)| candidate)
}

/// How busy an endpoint is for its weight: Envoy's `weight / (active + 1) ^ bias`, turned over so that less is better.
pub fn weighted_load(active: u64, weight: u32, bias: f64) -> f64 {
    let busy = active as f64 + 1.0;
    let busy = if bias == 1.0 { busy } else { busy.powf(bias) };
    busy / f64::from(weight.max(1))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{least_loaded, two_of, weighted_load};

    #[test]
    fn the_one_with_the_least_to_do_gets_it() {
        let active = [4, 2, 2, 0];
        for (candidates, chosen) in [
            (&[0, 1][..], Some(1)),
            (&[1, 2], Some(1)),
            (&[2, 1], Some(2)),
            (&[0, 3], Some(3)),
            (&[0, 0], Some(0)),
            (&[], None),
        ] {
            assert_eq!(
                least_loaded(candidates.iter().copied(), |index| active[index]),
                chosen,
                "{candidates:?}"
            );
        }
    }

    #[test]
    fn weight_and_bias_scale_the_load() {
        for ((active, weight, bias), (other_active, other_weight, other_bias)) in [
            ((1, 2, 1.0), (1, 1, 1.0)),
            ((0, 1, 1.0), (1, 1, 1.0)),
            ((9, 2, 0.0), (0, 1, 0.0)),
            ((3, 10, 1.0), (0, 1, 1.0)),
            ((3, 0, 1.0), (4, 1, 1.0)),
        ] {
            assert!(weighted_load(active, weight, bias) < weighted_load(other_active, other_weight, other_bias));
        }
    }

    #[test]
    fn every_pair_is_taken_equally_often() {
        let mut random = fastrand::Rng::with_seed(3);
        let mut taken = [[0u32; 4]; 4];
        for _ in 0..120_000 {
            let (first, second) = two_of(4, random.u64(..)).unwrap();
            taken[first][second] += 1;
        }
        for (first, row) in taken.iter().enumerate() {
            for (second, count) in row.iter().enumerate() {
                let expected = if first == second { 0 } else { 10_000 };
                assert!(count.abs_diff(expected) < 500, "{taken:?}");
            }
        }
        assert_eq!(two_of(1, u64::MAX), Some((0, 0)));
        assert_eq!(two_of(0, 1), None);
    }

    proptest! {
        #[test]
        fn two_are_different_and_there(count in 2usize..5000, random in any::<u64>()) {
            let (first, second) = two_of(count, random).unwrap();
            prop_assert!(first < count && second < count && first != second);
        }
    }
}
