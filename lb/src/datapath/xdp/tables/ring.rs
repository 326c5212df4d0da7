//! A service's Maglev ring as the tables have it: places that name backend and member.

use lb_core::maglev::{Candidate, NO_BACKEND, Turn, populate, ring_size};
use lb_core::record::Place;

/// A backend of a service as a candidate for the service's ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seat {
    /// Hash of the backend's name.
    pub identity: u64,
    /// Where its places lead.
    pub place: Place,
    /// Share beside the others; 0 takes no place.
    pub weight: u32,
}

/// The ring of a service. The order of the seats means nothing.
pub fn ring(mut seats: Vec<Seat>) -> Vec<u64> {
    // The same everywhere, whatever the numbers that a load balancer gave.
    seats.sort_unstable_by_key(|seat| seat.identity);
    let number = |index: usize| u32::try_from(index).expect("a service has fewer backends than that");
    let candidates: Vec<Candidate> = seats
        .iter()
        .enumerate()
        .map(|(index, seat)| Candidate {
            identity: seat.identity,
            number: number(index),
            weight: seat.weight,
        })
        .collect();
    // The size is that of all backends, up or not: who comes back finds the others where they were.
    let mut places = vec![NO_BACKEND; ring_size(seats.len()) as usize];
    populate(&mut places, &candidates, &mut vec![Turn::default(); candidates.len()]);
    let place = |index: u32| seats.get(index as usize).map_or(Place::EMPTY, |seat| seat.place);
    places.into_iter().map(|index| place(index).bits()).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use lb_core::maglev::identity;

    use super::*;

    fn seats(count: u32) -> Vec<Seat> {
        let seat = |n| Seat {
            identity: identity(&format!("backend-{n}")),
            place: Place::new(n + 7, n * 3),
            weight: 100,
        };
        (0..count).map(seat).collect()
    }

    #[test]
    fn places_name_backend_and_member_and_their_shares_follow_the_weights() {
        let mut seats = seats(10);
        seats[0].weight = 50;
        seats[1].weight = 0;
        let ring = ring(seats.clone());
        let mut shares: HashMap<u64, usize> = HashMap::new();
        ring.iter().for_each(|place| *shares.entry(*place).or_default() += 1);
        assert_eq!(shares.len(), 9, "a weight of nothing takes no place");
        for seat in seats.iter().filter(|seat| seat.weight > 0) {
            let ideal = ring.len() as f64 * f64::from(seat.weight) / 850.0;
            let share = shares[&seat.place.bits()] as f64;
            assert!((share - ideal).abs() <= 0.02 * ideal + 1.0, "{seat:?}: {share} of {ideal}");
        }
    }

    #[test]
    fn nobody_there_leaves_the_ring_empty() {
        let mut down = seats(3);
        down.iter_mut().for_each(|seat| seat.weight = 0);
        assert!(ring(down).iter().all(|place| *place == Place::EMPTY.bits()));
        assert!(ring(Vec::new()).iter().all(|place| *place == Place::EMPTY.bits()));
    }

    #[test]
    fn the_order_of_the_seats_means_nothing() {
        let mut reversed = seats(20);
        reversed.reverse();
        assert_eq!(ring(seats(20)), ring(reversed));
    }

    #[test]
    fn one_of_a_hundred_that_leaves_moves_little_more_than_its_own_share() {
        let all = seats(100);
        let before = ring(all.clone());
        for gone in [0, 37, 99] {
            let mut without = all.clone();
            without[gone].weight = 0;
            let after = ring(without);
            let moved =
                before.iter().zip(&after).filter(|(a, b)| a != b).count() as f64 / before.len() as f64;
            // Within five points of the ideal, which is the share of the one that left.
            assert!((0.009..0.06).contains(&moved), "{moved}");
        }
    }
}
