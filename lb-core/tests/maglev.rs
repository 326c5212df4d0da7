//! Maglev's promises: even shares by weight, and little moved when a backend comes or goes.

use std::collections::BTreeMap;

use lb_core::maglev::{Candidate, NO_BACKEND, Turn, identity, populate, ring_size};
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

    #[test]
    fn no_more_moves_than_has_to_among_a_hundred_backends(
        weights in prop::collection::vec(1_u32..=8, 100),
        changes in prop::collection::vec((any::<prop::sample::Index>(), change()), 1..5),
    ) {
        let mut all = candidates(&weights);
        assert_eq!(ring_size(all.len()), PLACES, "what the daemon would choose");
        let mut before = ring(&all);
        for (number, (at, change)) in changes.into_iter().enumerate() {
            let at = at.index(all.len());
            match change {
                Change::Goes => drop(all.remove(at)),
                Change::Comes(weight) => {
                    let number = 1000 + number as u32;
                    all.push(Candidate { identity: identity(&format!("new-{number}")), number, weight });
                }
                Change::Weighs(weight) => all[at].weight = weight,
            }
            let after = ring(&all);
            let moved = before.iter().zip(&after).filter(|(a, b)| a != b).count() as f64 / PLACES as f64;
            let ideal = lost(&before, &after);
            prop_assert!(moved - ideal <= 0.05, "{moved} moved where {ideal} had to: {change:?}");
            before = after;
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Change {
    Goes,
    Comes(u32),
    Weighs(u32),
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![Just(Change::Goes), (1_u32..=8).prop_map(Change::Comes), (0_u32..=8).prop_map(Change::Weighs)]
}

/// The share of places that had to move: what some backends have less than before.
fn lost(before: &[u32], after: &[u32]) -> f64 {
    let count = |ring: &[u32]| {
        let mut shares = BTreeMap::<u32, i64>::new();
        for number in ring {
            *shares.entry(*number).or_default() += 1;
        }
        shares
    };
    let after = count(after);
    let lost = |(number, share): (u32, i64)| (share - after.get(&number).copied().unwrap_or(0)).max(0);
    count(before).into_iter().map(lost).sum::<i64>() as f64 / PLACES as f64
}
