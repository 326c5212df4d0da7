//! Memory that is full of what no compressor makes smaller, of which a share is rewritten each second, and of which each
//! page can be told whether it still holds what was written there.

use std::time::Duration;

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;
/// Pages in a megabyte of 2^20 bytes.
const PAGES_PER_MB: usize = (1 << 20) / PAGE_BYTES;
/// What is not rewritten because nobody ran for longer than this is not made up for.
const LONGEST_DEBT: Duration = Duration::from_millis(20);

/// A page of memory, where the kernel has one too.
#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u64; PAGE_BYTES / 8]);

const _: () = assert!(size_of::<Page>() == PAGE_BYTES);

/// The memory.
pub struct Memory {
    pages: Vec<Page>,
    /// How often each page was written.
    generations: Vec<u32>,
    pages_per_s: f64,
    /// Pages, and parts of one, that should have been rewritten by now.
    owed: f64,
    /// Which page is next; they are taken in steps that lead to all of them.
    next: usize,
    step: usize,
}

impl Memory {
    /// Fills `resident_mb` megabytes; of their pages `dirty_pct` percent are rewritten each second.
    pub fn new(resident_mb: u32, dirty_pct: f64) -> Memory {
        let count = resident_mb as usize * PAGES_PER_MB;
        let mut pages = vec![Page([0; PAGE_BYTES / 8]); count];
        for (number, page) in pages.iter_mut().enumerate() {
            fill(page, number, 0);
        }
        let pages_per_s = count as f64 * dirty_pct / 100.0;
        Memory { pages, generations: vec![0; count], pages_per_s, owed: 0.0, next: 0, step: step(count) }
    }

    /// Rewrites the pages that are due after so much time; says how many that were.
    pub fn rewrite(&mut self, elapsed: Duration) -> u64 {
        self.owed += self.pages_per_s * elapsed.min(LONGEST_DEBT).as_secs_f64();
        let due = self.owed as u64;
        self.owed -= due as f64;
        for _ in 0..due {
            self.generations[self.next] += 1;
            fill(&mut self.pages[self.next], self.next, self.generations[self.next]);
            self.next = (self.next + self.step) % self.pages.len();
        }
        due
    }

    /// How many pages hold something else than was written there.
    pub fn wrong_pages(&self) -> u64 {
        let pages = self.pages.iter().zip(&self.generations).enumerate();
        pages.filter(|(number, (page, generation))| !holds(page, *number, **generation)).count() as u64
    }
}

/// A step that comes to each of `count` pages before it comes to one again, and far away each time: a server's writes
/// are not beside each other.
fn step(count: usize) -> usize {
    let wanted = (count as f64 * 0.618) as usize;
    (wanted.max(1)..).find(|step| greatest_common_divisor(*step, count) == 1).unwrap_or(1)
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

fn fill(page: &mut Page, number: usize, generation: u32) {
    page.0.iter_mut().zip(content(number, generation)).for_each(|(word, value)| *word = value);
}

fn holds(page: &Page, number: usize, generation: u32) -> bool {
    page.0.iter().zip(content(number, generation)).all(|(word, value)| *word == value)
}

/// The words of a page: splitmix64 from a seed of its own.
fn content(number: usize, generation: u32) -> impl Iterator<Item = u64> {
    let mut state = (number as u64) << 32 | u64::from(generation);
    std::iter::from_fn(move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        Some(mixed ^ mixed >> 31)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_is_rewritten_each_second_and_no_page_twice_before_all_were() {
        let mut memory = Memory::new(2, 25.0);
        let count = memory.pages.len() as u64;
        assert_eq!(count, 512);
        let rewritten: u64 = (0..1000).map(|_| memory.rewrite(Duration::from_millis(1))).sum();
        assert!((127..=128).contains(&rewritten), "{rewritten}");
        assert_eq!(
            memory.generations.iter().filter(|generation| **generation == 1).count() as u64,
            rewritten
        );
        for _ in 0..3001 {
            memory.rewrite(Duration::from_millis(1));
        }
        assert!(memory.generations.iter().all(|generation| *generation >= 1));
        assert_eq!(memory.wrong_pages(), 0);
    }

    #[test]
    fn what_was_missed_while_frozen_is_not_made_up_for() {
        let mut memory = Memory::new(1, 100.0);
        assert!(memory.rewrite(Duration::from_secs(60)) <= 6);
        assert_eq!(Memory::new(1, 0.0).rewrite(Duration::from_secs(1)), 0);
    }

    #[test]
    fn a_page_that_changed_by_itself_is_found() {
        let mut memory = Memory::new(1, 10.0);
        memory.pages[17].0[511] ^= 1;
        memory.generations[3] += 1;
        assert_eq!(memory.wrong_pages(), 2);
    }

    #[test]
    fn contents_differ_from_page_to_page_and_from_time_to_time() {
        let words = |number, generation| content(number, generation).take(512).collect::<Vec<_>>();
        let all = [words(0, 0), words(1, 0), words(0, 1)].concat();
        let different: std::collections::HashSet<_> = all.iter().collect();
        assert_eq!(different.len(), all.len());
    }
}
