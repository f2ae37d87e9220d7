//! Choosing by weights that change at every request: active requests, slow start.
//!
//! Few candidates are weighed one by one, exactly. Of many, some are drawn by their fixed weights, and one of those by how much its
//! weight has changed (sampling importance resampling): the same proportions nearly, at a cost that does not grow.

/// Up to so many are weighed one by one.
const EXACT: usize = 32;
/// So many are drawn of more.
const DRAWN: usize = 16;

/// One of `count`, in proportion to `weight(i) · factor(i)`. `draw` draws one by `weight` alone.
pub fn choose_dynamic(
    count: usize,
    weight: impl Fn(usize) -> f64,
    factor: impl Fn(usize) -> f64,
    mut draw: impl FnMut() -> usize,
    lot: u64,
) -> Option<usize> {
    // 53 bits, as many as a float holds.
    let lot = (lot >> 11) as f64 / (1u64 << 53) as f64;
    if count <= EXACT {
        return by_lot((0..count).map(|at| (at, weight(at) * factor(at))), lot);
    }
    let mut drawn = [(0, 0.0); DRAWN];
    for each in &mut drawn {
        let at = draw();
        *each = (at, factor(at));
    }
    by_lot(drawn.into_iter(), lot)
}

fn by_lot(candidates: impl Iterator<Item = (usize, f64)> + Clone, lot: f64) -> Option<usize> {
    let sum: f64 = candidates.clone().map(|(_, weight)| weight).sum();
    let mut left = lot * sum;
    let mut last = None;
    for (at, weight) in candidates {
        last = Some(at);
        left -= weight;
        if left < 0.0 {
            break;
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::choose_dynamic;

    #[test]
    fn few_are_weighed_exactly() {
        let mut random = fastrand::Rng::with_seed(1);
        let mut taken = [0u32; 3];
        for _ in 0..100_000 {
            let weights = [2.0, 1.0, 1.0];
            let factors = [0.5, 1.0, 0.1];
            let at = choose_dynamic(3, |at| weights[at], |at| factors[at], || 0, random.u64(..)).unwrap();
            taken[at] += 1;
        }
        for (taken, expected) in taken.iter().zip([47_619, 47_619, 4_762]) {
            assert!(taken.abs_diff(expected) < 600, "{taken} {expected}");
        }
        assert_eq!(choose_dynamic(0, |_| 1.0, |_| 1.0, || 0, 1), None);
    }

    #[test]
    fn of_many_those_with_a_small_factor_are_taken_seldom() {
        let mut random = fastrand::Rng::with_seed(1);
        let mut draws = fastrand::Rng::with_seed(2);
        let slow = (0..100_000)
            .filter(|_| {
                let factor = |at: usize| if at < 50 { 0.1 } else { 1.0 };
                choose_dynamic(100, |_| 1.0, factor, || draws.usize(..100), random.u64(..)).unwrap() < 50
            })
            .count();
        // Exactly it would be one in eleven.
        assert!((8_000..11_500).contains(&slow), "{slow}");
    }
}
