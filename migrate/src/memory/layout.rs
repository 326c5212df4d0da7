//! CRIU's dump without pages, and what takes their place in the images.
//!
//! CRIU is told of an earlier dump ([`write_earlier`]) that has every page there is, so that it writes down which pages
//! there are and none of them. Afterwards its lists of pages are changed ([`images`]): pages that the restore itself
//! needs go into the file where CRIU looks for them, straight from the stopped tasks' memory; the others, if they are to
//! come later, are marked as lazy.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use bytes::Bytes;

use super::ahead::{Ahead, Changed, Standing, pages_name};
use super::read::{Content, Image, Part};
use crate::criu::images::{
    ImageError, PAGE_BYTES, PagemapEntry, VmaEntry, read_mappings, read_pagemap, write_inventory,
    write_pagemap,
};

/// The earlier dump, in the images folder.
pub const EARLIER_FOLDER: &str = "earlier";
/// What a task on x86-64 can have, but its first page.
const USER_SPACE: (u64, u64) = (PAGE_BYTES, 0x7fff_ffff_f000);
/// No task of the workload was started after this, so none has taken an earlier one's pid: 10,000 years.
const LATE_US: u64 = 10_000 * 365 * 86_400 * 1_000_000;

/// Why the memory could not be laid out.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// A file of the images folder.
    #[error("image {0} cannot be read or written: is there memory left?")]
    File(String, #[source] io::Error),
    /// CRIU's list of pages.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A task that nobody knows.
    #[error("CRIU has dumped a task {0} that is not there")]
    Task(i32),
    /// CRIU's list of pages and the file with them do not fit.
    #[error("image {0} has another size than its list of pages says")]
    Pages(String),
}

/// Whether pages come with the images or later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// All come with the images.
    Now,
    /// What a restore can do without comes when it is touched, or in its turn.
    Later,
}

/// Makes CRIU believe in an earlier dump of these tasks (as their own namespace counts) that has all of their pages.
pub fn write_earlier(folder: &Path, inner_pids: impl IntoIterator<Item = i32>) -> Result<(), LayoutError> {
    let earlier = folder.join(EARLIER_FOLDER);
    let failed = |name: &str| {
        let name = format!("{EARLIER_FOLDER}/{name}");
        move |error| LayoutError::File(name, error)
    };
    match fs::DirBuilder::new().mode(0o700).create(&earlier) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        made => {
            made.map_err(failed(""))?;
            fs::write(earlier.join("inventory.img"), write_inventory(LATE_US))
                .map_err(failed("inventory.img"))?;
            // CRIU opens it, and does not look for a page in it.
            File::create(earlier.join("pages-1.img")).map_err(failed("pages-1.img"))?;
        }
    }
    let (start, end) = USER_SPACE;
    let every = PagemapEntry::new(start, (end - start) / PAGE_BYTES, PagemapEntry::PRESENT);
    for pid in inner_pids {
        let name = format!("pagemap-{pid}.img");
        let path = earlier.join(&name);
        if !path.exists() {
            fs::write(path, write_pagemap(1, &[every])).map_err(failed(&name))?;
        }
    }
    Ok(())
}

/// A finished dump as it is sent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Laid {
    /// What has changed since it went ahead.
    pub changes: Vec<Change>,
    /// What goes at once besides.
    pub images: Vec<Image>,
    /// Bytes of the pages that come later.
    pub later_bytes: u64,
}

/// Memory that is to be written over what went ahead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The file that it is in.
    pub name: String,
    /// Where in the file.
    pub offset: u64,
    /// Whose it is, as this host counts.
    pub pid: i32,
    /// Where in the task.
    pub address: u64,
    /// Bytes.
    pub len: u64,
}

/// What went ahead of the images, and what of it is not so any more.
#[derive(Clone, Copy, Debug)]
pub struct Earlier<'a> {
    /// The pages.
    pub ahead: &'a Ahead,
    /// Which have changed.
    pub changed: &'a Changed,
}

impl Laid {
    /// Bytes of all that goes at once.
    pub fn bytes(&self) -> u64 {
        let images = self.images.iter().map(|image| image.len);
        images.chain(self.changes.iter().map(|change| change.len)).sum()
    }
}

/// What is to be sent of a finished dump: `files` are CRIU's images with their sizes, `tasks` the workload's, host's pid
/// by their own. The tasks have to stay as they are until it is sent.
pub fn images(
    folder: &Path,
    files: Vec<(String, u64)>,
    tasks: &BTreeMap<i32, i32>,
    pages: Pages,
    earlier: Option<Earlier<'_>>,
) -> Result<Laid, LayoutError> {
    let (mut later_bytes, mut changes) = (0, Vec::new());
    let mut images: BTreeMap<String, Image> = files
        .into_iter()
        .map(|(name, len)| (name.clone(), Image { name, len, content: Content::File }))
        .collect();
    let pids = images.keys().filter_map(|name| number(name, "pagemap-")).collect::<Vec<i32>>();
    for inner_pid in pids {
        let name = format!("pagemap-{inner_pid}.img");
        let (pages_id, entries) = read_pagemap(&name, &read(folder, &name)?)?;
        if !entries.iter().any(|entry| entry.is(PagemapEntry::PARENT)) {
            continue;
        }
        let mappings = format!("mm-{inner_pid}.img");
        let mappings = read_mappings(&mappings, &read(folder, &mappings)?)?;
        let pid = *tasks.get(&inner_pid).ok_or(LayoutError::Task(inner_pid))?;
        let from = From { pid, inner_pid, mappings: &mappings, pages, earlier };
        let task = Task::lay_out(from, &entries);
        let pages_name = format!("pages-{pages_id}.img");
        let file = images.get(&pages_name).map_or(0, |image| image.len);
        if file != task.file_bytes {
            return Err(LayoutError::Pages(pages_name));
        }
        later_bytes += task.later_bytes;
        changes.extend(task.changes);
        let list = Bytes::from(write_pagemap(pages_id, &task.entries));
        let mut put = |name: String, len, content| images.insert(name.clone(), Image { name, len, content });
        put(name, list.len() as u64, Content::Bytes(list));
        put(pages_name, task.bytes, Content::Parts(task.parts));
    }
    Ok(Laid { changes, images: images.into_values().collect(), later_bytes })
}

fn read(folder: &Path, name: &str) -> Result<Vec<u8>, LayoutError> {
    let mut bytes = Vec::new();
    File::open(folder.join(name))
        .and_then(|mut file| file.read_to_end(&mut bytes))
        .map_err(|error| LayoutError::File(name.to_owned(), error))?;
    Ok(bytes)
}

/// The number in an image's name; shared memory's lists (`pagemap-shmem-1.img`) have none.
pub fn number(name: &str, prefix: &str) -> Option<i32> {
    name.strip_prefix(prefix)?.strip_suffix(".img")?.parse().ok()
}

/// A task's pages.
#[derive(Debug, Default, PartialEq, Eq)]
struct Task {
    entries: Vec<PagemapEntry>,
    parts: Vec<Part>,
    changes: Vec<Change>,
    /// Of the file as it will be.
    bytes: u64,
    /// Of the file as CRIU wrote it.
    file_bytes: u64,
    /// Of the pages that are not in it.
    later_bytes: u64,
}

/// Where a task's pages come from.
#[derive(Clone, Copy)]
struct From<'a> {
    pid: i32,
    inner_pid: i32,
    mappings: &'a [VmaEntry],
    pages: Pages,
    earlier: Option<Earlier<'a>>,
}

impl Task {
    fn lay_out(from: From<'_>, entries: &[PagemapEntry]) -> Self {
        let mut task = Self::default();
        for entry in entries {
            let len = entry.pages() * PAGE_BYTES;
            if entry.is(PagemapEntry::PRESENT) {
                task.entries.push(*entry);
                task.parts.push(Part::File { len });
                task.file_bytes += len;
                task.bytes += len;
            } else if entry.is(PagemapEntry::PARENT) {
                task.take(from, entry);
            } else {
                task.entries.push(*entry);
            }
        }
        task
    }

    /// Lays out pages that CRIU has left out; they may lie in several mappings.
    fn take(&mut self, from: From<'_>, entry: &PagemapEntry) {
        let mut address = entry.vaddr;
        while address < entry.end() {
            let mapping = from.mappings.iter().find(|vma| (vma.start..vma.end).contains(&address));
            let is_lazy = from.pages == Pages::Later && mapping.is_some_and(VmaEntry::can_be_lazy);
            // Nothing is mapped in between, so the next mapping begins where this one ends.
            let end = mapping.map_or(entry.end(), |vma| vma.end.min(entry.end()));
            let len = end - address;
            if is_lazy {
                self.entries.push(PagemapEntry::new(address, len / PAGE_BYTES, PagemapEntry::LAZY));
                self.later_bytes += len;
            } else if let Some(earlier) = from.earlier {
                self.compare(from, earlier, address, len / PAGE_BYTES);
            } else {
                self.add(from.pid, address, len);
            }
            address = end;
        }
    }

    /// Pages that come with the images.
    fn add(&mut self, pid: i32, address: u64, len: u64) {
        self.entries.push(PagemapEntry::new(address, len / PAGE_BYTES, PagemapEntry::PRESENT));
        self.parts.push(Part::Memory { pid, address, len });
        self.bytes += len;
    }

    /// Pages of which some went ahead.
    fn compare(&mut self, from: From<'_>, earlier: Earlier<'_>, address: u64, pages: u64) {
        let begin = self.entries.len();
        for stretch in earlier.ahead.stretches(earlier.changed, from.inner_pid, address, pages) {
            let (address, len) = (stretch.address, stretch.bytes());
            if let Standing::Changed { offset } = stretch.standing {
                let name = pages_name(from.inner_pid);
                self.changes.push(Change { name, offset, pid: from.pid, address, len });
            }
            if stretch.standing == Standing::New {
                self.add(from.pid, address, len);
                continue;
            }
            // To CRIU they are alike.
            match self.entries[begin..].last_mut().filter(|last| last.is(PagemapEntry::PARENT)) {
                Some(last) => {
                    *last = PagemapEntry::new(last.vaddr, last.pages() + stretch.pages, PagemapEntry::PARENT)
                }
                None => self.entries.push(PagemapEntry::new(address, stretch.pages, PagemapEntry::PARENT)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRIVATE: u32 = 0x22;
    const FILE: u32 = 0x02;

    fn vma(start: u64, end: u64, flags: u32) -> VmaEntry {
        VmaEntry { start, end, flags, status: 1 }
    }

    fn entry(vaddr: u64, pages: u64, flags: u32) -> PagemapEntry {
        PagemapEntry::new(vaddr, pages, flags)
    }

    #[test]
    fn what_criu_left_out_is_taken_from_memory() {
        let entries = [
            entry(0x1000, 4, PagemapEntry::PARENT),
            entry(0x9000, 1, PagemapEntry::PRESENT),
            entry(0xa000, 1, PagemapEntry::PARENT),
        ];
        let mappings =
            [vma(0x1000, 0x3000, FILE), vma(0x3000, 0x9000, PRIVATE), vma(0x9000, 0xb000, PRIVATE)];
        let from = |pages| From { pid: 7, inner_pid: 7, mappings: &mappings, pages, earlier: None };
        let now = Task::lay_out(from(Pages::Now), &entries);
        assert_eq!((now.bytes, now.file_bytes), (6 * 4096, 4096));
        assert!(now.entries.iter().all(|entry| entry.is(PagemapEntry::PRESENT)));
        assert_eq!(
            now.parts,
            [
                Part::Memory { pid: 7, address: 0x1000, len: 0x2000 },
                Part::Memory { pid: 7, address: 0x3000, len: 0x2000 },
                Part::File { len: 0x1000 },
                Part::Memory { pid: 7, address: 0xa000, len: 0x1000 },
            ]
        );
        let later = Task::lay_out(from(Pages::Later), &entries);
        assert_eq!((later.bytes, later.later_bytes), (3 * 4096, 3 * 4096));
        assert_eq!(
            later.entries,
            [
                entry(0x1000, 2, PagemapEntry::PRESENT),
                entry(0x3000, 2, PagemapEntry::LAZY),
                entry(0x9000, 1, PagemapEntry::PRESENT),
                entry(0xa000, 1, PagemapEntry::LAZY),
            ]
        );
        assert_eq!(
            later.parts,
            [Part::Memory { pid: 7, address: 0x1000, len: 0x2000 }, Part::File { len: 0x1000 }]
        );
    }

    #[test]
    fn what_went_ahead_is_left_there() {
        let content = std::hint::black_box(vec![1_u8; 8 * PAGE_BYTES as usize]);
        let pid = std::process::id().cast_signed();
        let ahead = Ahead::of(&BTreeMap::from([(7, pid)]));
        // Nobody has looked yet for what has changed, so all of it has.
        let changed = Changed::default();
        let start = (content.as_ptr().addr() as u64).next_multiple_of(PAGE_BYTES);
        let entries = [entry(0x1000, 2, PagemapEntry::PARENT), entry(start, 4, PagemapEntry::PARENT)];
        let earlier = Some(Earlier { ahead: &ahead, changed: &changed });
        let from = From { pid, inner_pid: 7, mappings: &[], pages: Pages::Now, earlier };
        let task = Task::lay_out(from, &entries);
        let expected = [entry(0x1000, 2, PagemapEntry::PRESENT), entry(start, 4, PagemapEntry::PARENT)];
        assert_eq!(task.entries, expected);
        assert_eq!(task.parts, [Part::Memory { pid, address: 0x1000, len: 2 * PAGE_BYTES }]);
        assert_eq!((task.bytes, task.later_bytes), (2 * PAGE_BYTES, 0));
        let change = &task.changes[0];
        assert_eq!((task.changes.len(), change.address, change.len), (1, start, 4 * PAGE_BYTES));
        assert_eq!((change.name.as_str(), change.offset % PAGE_BYTES), ("pages-7.img", 0));
    }

    #[test]
    fn a_dump_becomes_images() {
        let folder = tempfile::tempdir().unwrap();
        write_earlier(folder.path(), [5000]).unwrap();
        write_earlier(folder.path(), [5000, 5001]).unwrap();
        for pid in [5000, 5001] {
            let earlier = fs::read(folder.path().join(format!("earlier/pagemap-{pid}.img"))).unwrap();
            let (_, entries) = read_pagemap("earlier", &earlier).unwrap();
            assert_eq!((entries[0].vaddr, entries[0].end()), USER_SPACE);
        }
        let list = write_pagemap(3, &[entry(0x1000, 1, PagemapEntry::PRESENT)]);
        fs::write(folder.path().join("pagemap-5000.img"), &list).unwrap();
        let files =
            vec![("pagemap-5000.img".to_owned(), list.len() as u64), ("pages-3.img".to_owned(), 4096)];
        // Nothing was left out of it.
        let tasks = BTreeMap::from([(5000, 70)]);
        let all = images(folder.path(), files.clone(), &tasks, Pages::Now, None).unwrap().images;
        assert!(all.iter().all(|image| image.content == Content::File), "{all:?}");
        let list = write_pagemap(3, &[entry(0x1000, 1, PagemapEntry::PARENT)]);
        fs::write(folder.path().join("pagemap-5000.img"), &list).unwrap();
        let error = images(folder.path(), files, &tasks, Pages::Now, None).unwrap_err();
        assert!(matches!(error, LayoutError::File(..)), "{error}");
    }
}
