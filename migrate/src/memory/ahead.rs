//! Memory that goes over ahead of the images, while its server runs.
//!
//! Round by round the pages of all tasks are read and hashed, and those whose hash is another one than before are sent.
//! At the target they are CRIU's images of an earlier dump, of which the last dump says that its pages are there. Which
//! pages these are is settled before the first round: a page that comes into being later goes with the images. In the
//! freeze the pages are hashed once more, and what has changed is written over what was sent before.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::read::read_memory;
use crate::criu::images::{PAGE_BYTES, PagemapEntry, write_pagemap};

/// The earlier dump at the target, in the images folder.
pub const AHEAD_FOLDER: &str = "ahead";
/// How CRIU finds the earlier dump.
pub const PARENT_LINK: &str = "parent";
/// With less memory a freeze is short without this.
pub const LEAST_BYTES: u64 = 4 << 20;
/// Rounds after which a server that writes faster than the link is frozen all the same.
const ROUNDS: u32 = 4;
/// Pages that are read and sent at a time: a mebibyte.
const BLOCK_PAGES: usize = 256;
const PAGE: usize = PAGE_BYTES as usize;
/// Bits of an entry of `/proc/PID/pagemap`: in memory; of a file, or shared.
const PRESENT: u64 = 1 << 63;
const OF_A_FILE: u64 = 1 << 61;
/// Entries of it that are read at a time.
const ENTRIES: u64 = 64 << 10;

/// Of no page: what has not been sent.
const UNSENT: [u8; 32] = [0; 32];

/// Some bytes of a file: where they begin, and how many.
pub type Extent = (u64, u32);

/// The way to the target.
pub trait Way {
    /// Why nothing more is sent.
    type End;
    /// Asked now and then, whether or not there is something to send.
    fn goes_on(&mut self) -> Result<(), Self::End>;
    /// Sends parts of a file.
    fn send(&mut self, name: &str, extents: &[Extent], data: &[u8]) -> Result<(), Self::End>;
}

/// What was sent of all tasks, by their pids as their own namespace counts.
#[derive(Debug, Default)]
pub struct Ahead {
    tasks: BTreeMap<i32, Sent>,
}

/// What was sent of a task: its pages one after the other, in the order of their addresses.
#[derive(Debug, Default)]
struct Sent {
    runs: Vec<Run>,
    hashes: Vec<[u8; 32]>,
}

/// Pages that follow each other in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    address: u64,
    pages: u64,
    /// Which of the task's pages the first is.
    first: u64,
}

/// Which of the pages are not as they were sent, by task.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changed(BTreeMap<i32, Vec<bool>>);

/// Pages that follow each other, as they stand to what was sent ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Of the first.
    pub address: u64,
    /// How many.
    pub pages: u64,
    /// How they stand.
    pub standing: Standing,
}

/// How a page stands to what was sent ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It was not sent.
    New,
    /// It is as it was sent.
    Kept,
    /// It is to be sent again.
    Changed {
        /// Where it is in the file with the task's pages.
        offset: u64,
    },
}

/// Name of the file with a task's pages.
pub fn pages_name(inner_pid: i32) -> String {
    format!("pages-{inner_pid}.img")
}

/// Whether another round is worth it after one that has sent so much, the one before it so much, of all.
pub fn goes_on(round: u32, sent: u64, before: u64, all: u64) -> bool {
    round < ROUNDS && sent >= LEAST_BYTES.min(all / 16) && sent < before
}

impl Ahead {
    /// The pages that these tasks (host's pid by their own) have now.
    pub fn of(tasks: &BTreeMap<i32, i32>) -> Self {
        let sent = tasks.iter().filter_map(|(inner_pid, pid)| {
            // A task that has gone has none.
            let present = present(*pid).ok()?;
            Some((*inner_pid, Sent::of(&present)))
        });
        Self { tasks: sent.collect() }
    }

    /// All of them.
    pub fn bytes(&self) -> u64 {
        self.tasks.values().map(|task| task.hashes.len() as u64 * PAGE_BYTES).sum()
    }

    /// CRIU's lists of the pages: names and contents.
    pub fn lists(&self) -> impl Iterator<Item = (String, Vec<u8>)> {
        self.tasks.iter().map(|(inner_pid, task)| {
            let present = |run: &Run| PagemapEntry::new(run.address, run.pages, PagemapEntry::PRESENT);
            let entries: Vec<_> = task.runs.iter().map(present).collect();
            (format!("pagemap-{inner_pid}.img"), write_pagemap(inner_pid.unsigned_abs(), &entries))
        })
    }

    /// Sends what is not as it was sent, a mebibyte at a time and at most; how much that was.
    pub fn round<W: Way>(&mut self, tasks: &BTreeMap<i32, i32>, way: &mut W) -> Result<u64, W::End> {
        let mut buffer = vec![0; BLOCK_PAGES * PAGE];
        let mut sent_bytes = 0;
        for (inner_pid, task) in &mut self.tasks {
            let Some(pid) = tasks.get(inner_pid) else { continue };
            let name = pages_name(*inner_pid);
            let mut gathered = Gathered::default();
            for first in (0..task.hashes.len()).step_by(BLOCK_PAGES) {
                way.goes_on()?;
                let hashes = task.hash(*pid, first, &mut buffer);
                for (page, (hash, content)) in hashes.iter().zip(buffer.chunks_exact(PAGE)).enumerate() {
                    if *hash == UNSENT || *hash == task.hashes[first + page] {
                        continue;
                    }
                    task.hashes[first + page] = *hash;
                    sent_bytes += PAGE_BYTES;
                    if gathered.add((first + page) as u64 * PAGE_BYTES, content) {
                        let Gathered { extents, data } = std::mem::take(&mut gathered);
                        way.send(&name, &extents, &data)?;
                    }
                }
            }
            if !gathered.data.is_empty() {
                way.send(&name, &gathered.extents, &gathered.data)?;
            }
        }
        Ok(sent_bytes)
    }

    /// Which pages of these tasks, none of which runs, are not as they were sent. Takes all processors.
    pub fn changed(&self, tasks: &BTreeMap<i32, i32>) -> Changed {
        let blocks: Vec<(i32, usize)> = self
            .tasks
            .iter()
            .flat_map(|(pid, task)| (0..task.hashes.len()).step_by(BLOCK_PAGES).map(|first| (*pid, first)))
            .collect();
        let next = AtomicUsize::new(0);
        let work = || {
            let mut buffer = vec![0; BLOCK_PAGES * PAGE];
            let mut changed = Vec::new();
            while let Some((inner_pid, first)) = blocks.get(next.fetch_add(1, Ordering::Relaxed)) {
                let task = &self.tasks[inner_pid];
                let Some(pid) = tasks.get(inner_pid) else { continue };
                let hashes = task.hash(*pid, *first, &mut buffer);
                let differs = |(page, hash): (usize, &[u8; 32])| {
                    (*hash == UNSENT || *hash != task.hashes[first + page]).then_some(first + page)
                };
                changed.extend(hashes.iter().enumerate().filter_map(differs).map(|page| (*inner_pid, page)));
            }
            changed
        };
        let workers = std::thread::available_parallelism().map_or(1, NonZeroUsize::get).min(blocks.len());
        let mut all: BTreeMap<_, _> =
            self.tasks.iter().map(|(pid, task)| (*pid, vec![false; task.hashes.len()])).collect();
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..workers).map(|_| scope.spawn(work)).collect();
            let own = work();
            let found = others.into_iter().flat_map(|other| other.join().expect("hashing does not panic"));
            for (inner_pid, page) in own.into_iter().chain(found) {
                all.entry(inner_pid).and_modify(|pages| pages[page] = true);
            }
        });
        Changed(all)
    }

    /// How the pages from `address` on stand.
    pub fn stretches(&self, changed: &Changed, inner_pid: i32, address: u64, pages: u64) -> Vec<Stretch> {
        let mut stretches: Vec<Stretch> = Vec::new();
        for address in (address..).step_by(PAGE).take(usize::try_from(pages).unwrap_or(usize::MAX)) {
            let place = self.tasks.get(&inner_pid).and_then(|task| task.place(address));
            let is_changed = |place: u64| {
                let changed = changed.0.get(&inner_pid).zip(usize::try_from(place).ok());
                changed.and_then(|(pages, place)| pages.get(place).copied()).unwrap_or(true)
            };
            let standing = match place {
                None => Standing::New,
                Some(place) if is_changed(place) => Standing::Changed { offset: place * PAGE_BYTES },
                Some(_) => Standing::Kept,
            };
            match stretches.last_mut() {
                Some(last) if last.goes_on_with(standing) => last.pages += 1,
                _ => stretches.push(Stretch { address, pages: 1, standing }),
            }
        }
        stretches
    }
}

impl Stretch {
    /// How many bytes.
    pub fn bytes(&self) -> u64 {
        self.pages * PAGE_BYTES
    }

    fn goes_on_with(&self, next: Standing) -> bool {
        match (self.standing, next) {
            (Standing::Changed { offset }, Standing::Changed { offset: next }) => {
                offset + self.bytes() == next
            }
            (standing, next) => standing == next,
        }
    }
}

impl Sent {
    fn of(present: &[(u64, u64)]) -> Self {
        let mut runs = Vec::new();
        let mut first = 0;
        for &(address, pages) in present {
            runs.push(Run { address, pages, first });
            first += pages;
        }
        let pages = usize::try_from(first).expect("there is memory for these pages");
        Self { runs, hashes: vec![UNSENT; pages] }
    }

    /// Which of the task's pages this is.
    fn place(&self, address: u64) -> Option<u64> {
        let behind = self.runs.partition_point(|run| run.address <= address);
        let run = self.runs.get(behind.checked_sub(1)?)?;
        let page = (address - run.address) / PAGE_BYTES;
        (page < run.pages).then_some(run.first + page)
    }

    /// Reads the block of pages that begins with the `first`, and hashes each; one that cannot be read has none.
    fn hash(&self, pid: i32, first: usize, buffer: &mut [u8]) -> Vec<[u8; 32]> {
        let pages = BLOCK_PAGES.min(self.hashes.len() - first);
        let (from, to) = (first as u64, (first + pages) as u64);
        let mut hashes = Vec::with_capacity(pages);
        let begin = self.runs.partition_point(|run| run.first + run.pages <= from);
        for run in self.runs[begin..].iter().take_while(|run| run.first < to) {
            let (start, end) = (run.first.max(from), (run.first + run.pages).min(to));
            let mut at = start;
            while at < end {
                let (address, room) = (run.address + (at - run.first) * PAGE_BYTES, end - at);
                let place = (at - from) as usize * PAGE;
                let content = &mut buffer[place..place + room as usize * PAGE];
                // The server may give memory back meanwhile.
                let read = read_memory(pid, address, content).unwrap_or(0) / PAGE;
                let whole = content.chunks_exact(PAGE).take(read);
                hashes.extend(whole.map(|page| *blake3::hash(page).as_bytes()));
                at += read as u64;
                if read < room as usize {
                    hashes.push(UNSENT);
                    at += 1;
                }
            }
        }
        hashes
    }
}

#[derive(Debug, Default)]
struct Gathered {
    extents: Vec<Extent>,
    data: Vec<u8>,
}

impl Gathered {
    /// Takes a page; true when it is full.
    fn add(&mut self, offset: u64, content: &[u8]) -> bool {
        match self.extents.last_mut() {
            Some((start, len)) if *start + u64::from(*len) == offset => *len += PAGE as u32,
            _ => self.extents.push((offset, PAGE as u32)),
        }
        self.data.extend_from_slice(content);
        self.data.len() == BLOCK_PAGES * PAGE
    }
}

/// Addresses and numbers of pages of a task's own that are in memory, as CRIU would dump them. One too many does no
/// harm.
fn present(pid: i32) -> io::Result<Vec<(u64, u64)>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    let mut runs: Vec<(u64, u64)> = Vec::new();
    let mut buffer = vec![0; (ENTRIES * 8) as usize];
    for (start, end) in maps.lines().filter_map(private) {
        let mut page = start / PAGE_BYTES;
        while page < end / PAGE_BYTES {
            let count = (end / PAGE_BYTES - page).min(ENTRIES);
            let entries = &mut buffer[..(count * 8) as usize];
            pagemap.read_exact_at(entries, page * 8)?;
            for entry in entries.as_chunks().0 {
                if u64::from_ne_bytes(*entry) & (PRESENT | OF_A_FILE) == PRESENT {
                    match runs.last_mut() {
                        Some((first, pages)) if *first + *pages * PAGE_BYTES == page * PAGE_BYTES => {
                            *pages += 1
                        }
                        _ => runs.push((page * PAGE_BYTES, 1)),
                    }
                }
                page += 1;
            }
        }
    }
    Ok(runs)
}

/// The addresses of a line of `/proc/PID/maps`, if it is a mapping that may be read and is the task's own.
fn private(line: &str) -> Option<(u64, u64)> {
    let mut words = line.split_ascii_whitespace();
    let (addresses, may, name) = (words.next()?, words.next()?, words.nth(3).unwrap_or_default());
    let is_kernels = name.starts_with("[v");
    if !may.starts_with('r') || !may.ends_with('p') || is_kernels {
        return None;
    }
    let (start, end) = addresses.split_once('-')?;
    Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn rounds_go_on_while_they_are_worth_it() {
        for (round, sent, before, all, expected) in [
            (1, 100 * MIB, u64::MAX, 100 * MIB, true),
            (2, 10 * MIB, 100 * MIB, 100 * MIB, true),
            // Little is left.
            (2, 3 * MIB, 100 * MIB, 100 * MIB, false),
            (2, MIB, 16 * MIB, 16 * MIB, true),
            (2, MIB - 4096, 16 * MIB, 16 * MIB, false),
            // It does not become less.
            (3, 10 * MIB, 10 * MIB, 100 * MIB, false),
            (ROUNDS, 10 * MIB, 100 * MIB, 100 * MIB, false),
        ] {
            assert_eq!(goes_on(round, sent, before, all), expected, "{round} {sent} {before} {all}");
        }
    }

    #[test]
    fn mappings_of_a_tasks_own_are_found() {
        let own = |line| private(line).is_some();
        assert_eq!(
            private("7f0000000000-7f0000004000 rw-p 00000000 00:00 0 "),
            Some((0x7f00_0000_0000, 0x7f00_0000_4000))
        );
        assert!(own("55d000000000-55d000021000 rw-p 00000000 00:00 0                [heap]"));
        assert!(own("55d000000000-55d000021000 r--p 00000000 fe:00 12 /usr/bin/redis server"));
        assert!(!own("7f0000000000-7f0000004000 rw-s 00000000 00:01 12 /dev/zero (deleted)"));
        assert!(!own("7f0000000000-7f0000004000 ---p 00000000 00:00 0 "));
        assert!(!own("7ffd00000000-7ffd00004000 r--p 00000000 00:00 0                [vvar]"));
        assert!(!own("ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0        [vsyscall]"));
        assert!(!own("nonsense"));
    }

    /// Files at the target, as pieces make them.
    #[derive(Default)]
    struct Files(BTreeMap<String, Vec<u8>>);

    impl Way for Files {
        type End = Infallible;

        fn goes_on(&mut self) -> Result<(), Infallible> {
            Ok(())
        }

        fn send(&mut self, name: &str, extents: &[Extent], mut data: &[u8]) -> Result<(), Infallible> {
            let file = self.0.entry(name.to_owned()).or_default();
            for (offset, len) in extents {
                let (part, rest) = data.split_at(*len as usize);
                let (start, end) = (*offset as usize, *offset as usize + part.len());
                file.resize(file.len().max(end), 0);
                file[start..end].copy_from_slice(part);
                data = rest;
            }
            assert!(data.is_empty());
            Ok(())
        }
    }

    #[test]
    fn what_changes_goes_again_and_nothing_else() {
        let mut memory = vec![0_u8; 700 * PAGE];
        let start = memory.as_ptr().addr().next_multiple_of(PAGE) as u64;
        let skip = start as usize - memory.as_ptr().addr();
        let pid = std::process::id().cast_signed();
        let tasks = BTreeMap::from([(7, pid)]);
        // Two runs with a gap.
        let mut ahead = Ahead {
            tasks: BTreeMap::from([(7, Sent::of(&[(start, 300), (start + 310 * PAGE_BYTES, 300)]))]),
        };
        let at = |page: usize| skip + if page < 300 { page } else { page + 10 } * PAGE;
        let mut files = Files::default();
        let mut round = |ahead: &mut Ahead| ahead.round(&tasks, &mut files).unwrap();
        assert_eq!(round(&mut ahead), 600 * PAGE_BYTES);
        assert_eq!(round(&mut ahead), 0);
        let changes = [0, 1, 299, 300, 599];
        for page in changes {
            memory[at(page) + 17] = 1;
        }
        // In the gap.
        memory[skip + 305 * PAGE] = 1;
        let changed = ahead.changed(&tasks);
        let found: Vec<_> = (0..600).filter(|page| changed.0[&7][*page]).collect();
        assert_eq!(found, changes);
        assert_eq!(round(&mut ahead), 5 * PAGE_BYTES);
        let (_, own) = ahead.changed(&tasks).0.pop_first().unwrap();
        assert!(own.iter().all(|changed| !changed));
        for page in 0..600 {
            let sent = &files.0["pages-7.img"][page * PAGE..][..PAGE];
            assert_eq!(sent, &memory[at(page)..][..PAGE], "page {page}");
        }
        assert_eq!(ahead.bytes(), 600 * PAGE_BYTES);
        let (name, list) = ahead.lists().next().unwrap();
        let (pages_id, entries) = crate::criu::images::read_pagemap(&name, &list).unwrap();
        assert_eq!((name.as_str(), pages_id, entries.len()), ("pagemap-7.img", 7, 2));
    }

    #[test]
    fn memory_that_is_gone_counts_as_changed() {
        let tasks = BTreeMap::from([(7, std::process::id().cast_signed())]);
        let mut ahead = Ahead { tasks: BTreeMap::from([(7, Sent::of(&[(PAGE_BYTES, 3)]))]) };
        let mut files = Files::default();
        let sent = ahead.round(&tasks, &mut files).unwrap();
        assert_eq!((sent, files.0.len()), (0, 0));
        assert_eq!(ahead.changed(&tasks).0[&7], [true; 3]);
    }

    #[test]
    fn own_memory_is_found() {
        let memory = std::hint::black_box(vec![1_u8; 64 * PAGE]);
        let ahead = Ahead::of(&BTreeMap::from([(7, std::process::id().cast_signed())]));
        let start = memory.as_ptr().addr().next_multiple_of(PAGE) as u64;
        for page in 0..63 {
            assert!(ahead.tasks[&7].place(start + page * PAGE_BYTES).is_some(), "page {page}");
        }
        let runs = &ahead.tasks[&7].runs;
        assert!(runs.is_sorted_by(|a, b| a.address + a.pages * PAGE_BYTES <= b.address), "{runs:?}");
    }

    proptest! {
        #[test]
        fn stretches_cover_what_they_are_asked_for(
            gaps in prop::collection::vec((1_u64..4, 1_u64..6), 0..8),
            changed in prop::collection::vec(any::<bool>(), 48),
            from in 0_u64..60,
            pages in 1_u64..60,
        ) {
            let mut runs = Vec::new();
            let mut page = 1;
            for (gap, len) in gaps {
                runs.push(((page + gap) * PAGE_BYTES, len));
                page += gap + len;
            }
            let sent = Sent::of(&runs);
            let changed = changed[..sent.hashes.len()].to_vec();
            let places: BTreeMap<u64, u64> = runs
                .iter()
                .flat_map(|(address, pages)| (0..*pages).map(move |page| address + page * PAGE_BYTES))
                .zip(0..)
                .collect();
            let ahead = Ahead { tasks: BTreeMap::from([(7, sent)]) };
            let all = Changed(BTreeMap::from([(7, changed.clone())]));
            let mut address = from * PAGE_BYTES;
            let end = address + pages * PAGE_BYTES;
            for stretch in ahead.stretches(&all, 7, address, pages) {
                prop_assert_eq!(stretch.address, address);
                for page in 0..stretch.pages {
                    let place = places.get(&(address + page * PAGE_BYTES)).copied();
                    let expected = match place {
                        None => Standing::New,
                        Some(place) if changed[place as usize] => {
                            Standing::Changed { offset: (place - page) * PAGE_BYTES }
                        }
                        Some(_) => Standing::Kept,
                    };
                    prop_assert_eq!(stretch.standing, expected);
                }
                address += stretch.bytes();
            }
            prop_assert_eq!(address, end);
        }
    }
}
