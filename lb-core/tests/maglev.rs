//! Maglev's promises: even shares by weight, and little moved when a backend comes or goes.

use lb_core::maglev::{Candidate, NO_BACKEND, Turn, identity, populate};
use proptest::prelude::*;

const PLACES: u32 = 16_381;

fn ring(candidates: &[Candidate]) -> Vec<u32> {
    let mut ring = vec![0; PLACES as usize];
    populate(&mut ring, candidates, &mut vec![Turn::default(); candidates.len()]);
    ring
}

fn candidates(weights: &[u32]) -> Vec<Candidate> {
    weights
        .iter()
        .enumerate()
        .map(|(n, &weight)| Candidate {
            identity: identity(&format!("backend-{n}")),
            number: n as u32,
            weight,
        })
        .collect()
}

#[test]
fn nobody_leaves_an_empty_ring() {
    assert!(ring(&[]).iter().all(|&number| number == NO_BACKEND));
    assert!(ring(&candidates(&[0, 0])).iter().all(|&number| number == NO_BACKEND));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn shares_follow_weights(weights in prop::collection::vec(0_u32..=10, 1..40)) {
        let total: u32 = weights.iter().sum();
        let ring = ring(&candidates(&weights));
        for (number, weight) in weights.iter().enumerate() {
            let share = ring.iter().filter(|&&owner| owner == number as u32).count() as f64 / PLACES as f64;
            if total > 0 {
                let ideal = *weight as f64 / total as f64;
                prop_assert!((share - ideal).abs() <= 0.01, "backend {number}: {share} instead of {ideal}");
            }
        }
    }

    #[test]
    fn a_backend_that_goes_moves_little_else(count in 2_usize..100, gone in any::<prop::sample::Index>()) {
        let all = candidates(&vec![1; count]);
        let gone = gone.index(count);
        let mut rest = all.clone();
        rest.remove(gone);
        let (before, after) = (ring(&all), ring(&rest));
        let moved = before.iter().zip(&after).filter(|(a, b)| a != b && **a != gone as u32).count();
        prop_assert!((moved as f64) < 0.05 * PLACES as f64, "{moved} places moved besides");
    }
}
