//! Which pages a restored task still lacks: pure book-keeping, told by userfaultfd what the task does to its memory.

use std::collections::BTreeMap;

use crate::criu::images::PAGE_BYTES;

/// A range of addresses; the end does not belong to it.
pub type Range = std::ops::Range<u64>;

/// What one address space lacks. Every page has the address that it had at the source (its *origin*), under which it is
/// asked for, and the one where it is wanted now, which `mremap` changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Space {
    /// Start -> (end, origin of the start).
    lacking: BTreeMap<u64, (u64, u64)>,
}

impl Space {
    /// One that lacks these.
    pub fn lacking(ranges: impl IntoIterator<Item = Range>) -> Self {
        Self { lacking: ranges.into_iter().map(|range| (range.start, (range.end, range.start))).collect() }
    }

    /// Whether nothing is lacking.
    pub fn is_complete(&self) -> bool {
        self.lacking.is_empty()
    }

    /// Bytes that are lacking.
    pub fn lacking_bytes(&self) -> u64 {
        self.lacking.iter().map(|(start, (end, _))| end - start).sum()
    }

    /// The origins of what is lacking from `address` on, at most so many pages; `None` if that page is here.
    pub fn origin_of(&self, address: u64, pages: u32) -> Option<Range> {
        let (start, (end, origin)) = self.lacking.range(..=address).next_back()?;
        if address >= *end {
            return None;
        }
        let from = origin + (address - start);
        Some(from..(from + u64::from(pages) * PAGE_BYTES).min(origin + (end - start)))
    }

    /// Where pages of these origins are lacking: each place with its origin.
    pub fn wanted(&self, origins: &Range) -> Vec<(Range, u64)> {
        let mut places = Vec::new();
        for (start, (end, origin)) in &self.lacking {
            let from = origins.start.max(*origin);
            let to = origins.end.min(origin + (end - start));
            if from < to {
                let place = start + (from - origin);
                places.push((place..place + (to - from), from));
            }
        }
        places
    }

    /// These addresses are not lacking any more: filled, unmapped, or given up by the task.
    pub fn remove(&mut self, range: &Range) {
        self.take(range);
    }

    /// The task has moved its memory.
    pub fn remap(&mut self, from: u64, to: u64, len: u64) {
        // What was there before is gone.
        self.take(&(to..to + len));
        for (range, origin) in self.take(&(from..from + len)) {
            let start = to + (range.start - from);
            self.lacking.insert(start, (start + (range.end - range.start), origin));
        }
    }

    /// Cuts a range out; gives what was lacking in it, with the origins.
    fn take(&mut self, range: &Range) -> Vec<(Range, u64)> {
        let before = self.lacking.range(..range.start).next_back().map(|(start, _)| *start);
        let inside = self.lacking.range(range.start..range.end).map(|(start, _)| *start);
        let touched: Vec<u64> = before.into_iter().chain(inside).collect();
        let mut taken = Vec::new();
        for start in touched {
            let Some((end, origin)) = self.lacking.remove(&start) else { continue };
            let (from, to) = (start.max(range.start), end.min(range.end));
            if from >= to {
                self.lacking.insert(start, (end, origin));
                continue;
            }
            if start < from {
                self.lacking.insert(start, (from, origin));
            }
            if to < end {
                self.lacking.insert(to, (end, origin + (to - start)));
            }
            taken.push((from..to, origin + (from - start)));
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGE: u64 = PAGE_BYTES;

    #[derive(Clone, Debug)]
    enum Step {
        Remove(Range),
        Remap { from: u64, to: u64, len: u64 },
    }

    fn step() -> impl Strategy<Value = Step> {
        let remove =
            (0..64_u64, 1..16_u64).prop_map(|(start, len)| Step::Remove(start * PAGE..(start + len) * PAGE));
        let remap = (0..64_u64, 100..164_u64, 1..16_u64, any::<bool>()).prop_map(|(from, to, len, back)| {
            let (from, to) = if back { (to, from) } else { (from, to) };
            Step::Remap { from: from * PAGE, to: to * PAGE, len: len * PAGE }
        });
        prop_oneof![remove, remap]
    }

    proptest! {
        /// Against one entry for each page.
        #[test]
        fn it_does_what_a_table_of_pages_does(
            ranges in proptest::collection::vec((0..8_u64, 1..8_u64), 0..8),
            steps in proptest::collection::vec(step(), 0..20),
        ) {
            let ranges = ranges.into_iter().enumerate().map(|(n, (skip, len))| {
                let start = (n as u64 * 16 + skip) * PAGE;
                start..start + len * PAGE
            });
            let ranges: Vec<Range> = ranges.collect();
            let mut table: BTreeMap<u64, u64> = ranges
                .iter()
                .flat_map(|range| (range.start..range.end).step_by(PAGE as usize))
                .map(|page| (page, page))
                .collect();
            let mut space = Space::lacking(ranges);
            for step in steps {
                match step {
                    Step::Remove(range) => {
                        space.remove(&range);
                        table.retain(|page, _| !range.contains(page));
                    }
                    Step::Remap { from, to, len } => {
                        space.remap(from, to, len);
                        table.retain(|page, _| !(to..to + len).contains(page));
                        let moved = table.extract_if(from..from + len, |_, _| true).collect::<Vec<_>>();
                        table.extend(moved.into_iter().map(|(page, origin)| (page - from + to, origin)));
                    }
                }
                prop_assert_eq!(space.lacking_bytes(), table.len() as u64 * PAGE);
                prop_assert_eq!(space.is_complete(), table.is_empty());
                for page in (0..200 * PAGE).step_by(PAGE as usize) {
                    let origin = space.origin_of(page, 1).map(|range| range.start);
                    prop_assert_eq!(origin, table.get(&page).copied());
                }
                let all = space.wanted(&(0..200 * PAGE));
                prop_assert_eq!(all.iter().map(|(place, _)| place.end - place.start).sum::<u64>(), space.lacking_bytes());
            }
        }
    }

    #[test]
    fn neighbours_come_along_as_far_as_they_are_lacking() {
        let space = Space::lacking(std::iter::once(PAGE..4 * PAGE));
        assert_eq!(space.origin_of(2 * PAGE, 8), Some(2 * PAGE..4 * PAGE));
        assert_eq!(space.origin_of(2 * PAGE + 5, 1).unwrap().start, 2 * PAGE + 5);
        assert_eq!(space.origin_of(0, 8), None);
        assert_eq!(space.origin_of(4 * PAGE, 8), None);
    }
}
