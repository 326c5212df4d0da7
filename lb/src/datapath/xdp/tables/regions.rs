//! Which places of the rings' table are free: a list of free regions, first fit.

use std::collections::BTreeMap;

/// A run of places.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Region {
    /// The first place.
    pub start: u32,
    /// How many.
    pub length: u32,
}

impl Region {
    fn end(self) -> u32 {
        self.start + self.length
    }
}

/// The free regions of a table. Neighbours are always joined.
#[derive(Clone, Debug)]
pub struct Regions {
    /// Lengths by start.
    free: BTreeMap<u32, u32>,
    size: u32,
}

impl Regions {
    /// A table of `size` places, all free.
    pub fn new(size: u32) -> Self {
        Self { free: BTreeMap::from_iter((size > 0).then_some((0, size))), size }
    }

    /// Takes the first free region of a length; `None` where there is none.
    pub fn take(&mut self, length: u32) -> Option<Region> {
        let start = self.free.iter().find(|(_, free)| **free >= length).map(|(start, _)| *start)?;
        let region = Region { start, length };
        self.cut(start, region);
        Some(region)
    }

    /// Takes a region that a former daemon took; false where part of it is taken already or lies outside.
    pub fn reserve(&mut self, region: Region) -> bool {
        let fits = region.start.checked_add(region.length).is_some_and(|end| end <= self.size);
        let Some((start, length)) = self.free.range(..=region.start).next_back().map(|(s, l)| (*s, *l))
        else {
            return false;
        };
        if !fits || start + length < region.end() {
            return false;
        }
        self.cut(start, region);
        true
    }

    /// Gives a region back that was taken.
    pub fn give(&mut self, region: Region) {
        if region.length == 0 {
            return;
        }
        let mut joined = region;
        if let Some((start, length)) = self.free.range(..region.start).next_back().map(|(s, l)| (*s, *l)) {
            debug_assert!(start + length <= region.start, "a region is given back once");
            if start + length == region.start {
                self.free.remove(&start);
                joined = Region { start, length: length + region.length };
            }
        }
        if let Some(length) = self.free.remove(&region.end()) {
            joined.length += length;
        }
        self.free.insert(joined.start, joined.length);
    }

    /// Cuts a region out of the free one that starts at `start`.
    fn cut(&mut self, start: u32, region: Region) {
        let length = self.free.remove(&start).expect("the region is free");
        if region.start > start {
            self.free.insert(start, region.start - start);
        }
        if start + length > region.end() {
            self.free.insert(region.end(), start + length - region.end());
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_first_that_fits_is_taken_and_neighbours_join_again() {
        let mut regions = Regions::new(100);
        let [a, b, c] = [40, 20, 40].map(|length| regions.take(length).unwrap());
        assert_eq!([a.start, b.start, c.start], [0, 40, 60]);
        assert_eq!(regions.take(1), None);
        regions.give(b);
        assert_eq!(regions.take(21), None);
        regions.give(a);
        regions.give(c);
        assert_eq!(regions.take(100), Some(Region { start: 0, length: 100 }));
    }

    #[test]
    fn what_is_taken_cannot_be_reserved() {
        let mut regions = Regions::new(100);
        let at = |start, length| Region { start, length };
        assert!(regions.reserve(at(50, 10)));
        for taken in [at(50, 10), at(45, 6), at(59, 1), at(40, 30), at(95, 6), at(100, 1), at(u32::MAX, 2)] {
            assert!(!regions.reserve(taken), "{taken:?}");
        }
        assert!(regions.reserve(at(0, 50)) && regions.reserve(at(60, 40)));
        assert_eq!(regions.take(1), None);
    }

    proptest! {
        #[test]
        fn regions_never_overlap_and_nothing_is_lost(steps in prop::collection::vec((1_u32..60, any::<prop::sample::Index>(), any::<bool>()), 1..200)) {
            let mut regions = Regions::new(500);
            let mut taken: Vec<Region> = Vec::new();
            for (length, which, take) in steps {
                if take || taken.is_empty() {
                    taken.extend(regions.take(length));
                } else {
                    regions.give(taken.swap_remove(which.index(taken.len())));
                }
                let mut owner = [0_u8; 500];
                for region in &taken {
                    owner[region.start as usize..region.end() as usize].iter_mut().for_each(|n| *n += 1);
                }
                prop_assert!(owner.iter().all(|count| *count <= 1));
                let free: u32 = regions.free.values().sum();
                prop_assert_eq!(free, owner.iter().filter(|count| **count == 0).count() as u32);
            }
            for region in taken {
                regions.give(region);
            }
            prop_assert_eq!(regions.take(500), Some(Region { start: 0, length: 500 }));
        }
    }
}
