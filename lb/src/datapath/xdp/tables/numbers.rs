//! Numbers that are given out and come back, and the numbers of members.

use std::collections::{HashMap, VecDeque};

/// Free numbers. One that comes back is given out last: what still refers to it has the longest time to end.
#[derive(Clone, Debug)]
pub struct Numbers {
    free: VecDeque<u32>,
}

impl Numbers {
    /// Numbers of a range, without those that a former daemon gave out.
    pub fn new(range: std::ops::Range<u32>, taken: impl Iterator<Item = u32>) -> Self {
        let mut is_taken = vec![false; range.end as usize];
        taken.for_each(|number| {
            if let Some(taken) = is_taken.get_mut(number as usize) {
                *taken = true;
            }
        });
        Self { free: range.filter(|number| !is_taken[*number as usize]).collect() }
    }

    /// The next free number.
    pub fn take(&mut self) -> Option<u32> {
        self.free.pop_front()
    }

    /// Gives a number back that was taken.
    pub fn give(&mut self, number: u32) {
        self.free.push_back(number);
    }

    /// How many are free.
    pub fn left(&self) -> usize {
        self.free.len()
    }
}

/// Members: pairs of a service and a backend, by number.
#[derive(Clone, Debug)]
pub struct Members {
    numbers: Numbers,
    by_pair: HashMap<(u32, u32), u32>,
    /// Numbers of a backend's members.
    of_backend: HashMap<u32, Vec<u32>>,
}

impl Members {
    /// Those that the pinned table has: element by number, 0 where the number is free. Services count from 1.
    pub fn new(table: &[u64]) -> Self {
        let used = |number: u32| table[number as usize] != 0;
        let most = u32::try_from(table.len()).expect("maps have fewer elements than that");
        let mut members = Self {
            numbers: Numbers::new(0..most, (0..most).filter(|number| used(*number))),
            by_pair: HashMap::new(),
            of_backend: HashMap::new(),
        };
        for number in (0..most).filter(|number| used(*number)) {
            let (service, backend) = unpack(table[number as usize]);
            members.by_pair.insert((service, backend), number);
            members.of_backend.entry(backend).or_default().push(number);
        }
        members
    }

    /// The number of a pair, if it has one.
    pub fn number(&self, service: u32, backend: u32) -> Option<u32> {
        self.by_pair.get(&(service, backend)).copied()
    }

    /// Gives a pair a number that it has not yet.
    pub fn add(&mut self, service: u32, backend: u32) -> Option<u32> {
        let number = self.numbers.take()?;
        self.by_pair.insert((service, backend), number);
        self.of_backend.entry(backend).or_default().push(number);
        Some(number)
    }

    /// How many numbers are free.
    pub fn left(&self) -> usize {
        self.numbers.left()
    }

    /// Frees the pairs that are not wanted any more; their numbers.
    pub fn retain(&mut self, mut wanted: impl FnMut(u32, u32) -> bool) -> Vec<u32> {
        let mut gone = Vec::new();
        self.by_pair.retain(|(service, backend), number| {
            let stays = wanted(*service, *backend);
            if !stays {
                gone.push((*backend, *number));
            }
            stays
        });
        // Whatever order a hash map has, numbers come back in their own.
        gone.sort_unstable_by_key(|(_, number)| *number);
        for (backend, number) in &gone {
            self.numbers.give(*number);
            if let Some(numbers) = self.of_backend.get_mut(backend) {
                numbers.retain(|known| known != number);
            }
        }
        gone.into_iter().map(|(_, number)| number).collect()
    }

    /// The members of a backend.
    pub fn of_backend(&self, backend: u32) -> &[u32] {
        self.of_backend.get(&backend).map_or(&[], Vec::as_slice)
    }

    /// Every member: service, backend, number.
    pub fn all(&self) -> impl Iterator<Item = (u32, u32, u32)> {
        self.by_pair.iter().map(|((service, backend), number)| (*service, *backend, *number))
    }
}

/// A pair as the pinned table has it.
pub fn pack(service: u32, backend: u32) -> u64 {
    u64::from(service) | u64::from(backend) << 32
}

fn unpack(bits: u64) -> (u32, u32) {
    let [s0, s1, s2, s3, b0, b1, b2, b3] = bits.to_le_bytes();
    (u32::from_le_bytes([s0, s1, s2, s3]), u32::from_le_bytes([b0, b1, b2, b3]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_came_back_is_given_out_last() {
        let mut numbers = Numbers::new(1..6, [2, 4, 99].into_iter());
        assert_eq!((numbers.left(), numbers.take()), (3, Some(1)));
        numbers.give(1);
        assert_eq!(
            [numbers.take(), numbers.take(), numbers.take(), numbers.take()],
            [Some(3), Some(5), Some(1), None]
        );
    }

    #[test]
    fn members_keep_their_numbers_over_a_restart() {
        let mut members = Members::new(&[0; 4]);
        let mut table = [0; 4];
        for (service, backend) in [(1, 0), (1, 7), (2, 7)] {
            let number = members.add(service, backend).unwrap();
            table[number as usize] = pack(service, backend);
        }
        let mut next = Members::new(&table);
        for (service, backend, number) in members.all() {
            assert_eq!(next.number(service, backend), Some(number));
        }
        assert_eq!((next.number(2, 0), next.left()), (None, 1));
        assert_eq!(next.of_backend(7).len(), 2);
        let gone = next.retain(|service, _| service != 1);
        assert_eq!((gone, next.of_backend(7).len(), next.left()), (vec![0, 1], 1, 3));
        assert_eq!([next.add(3, 3), next.add(3, 4)], [Some(3), Some(0)]);
    }
}
