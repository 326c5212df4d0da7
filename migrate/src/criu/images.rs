//! The few of CRIU's images that are read or written here, with the field numbers of its `images/*.proto` (4.2).
//!
//! An image is a magic number (two where it is not the inventory) and records: a length and a protobuf message each.

use prost::Message;

/// CRIU and the kernels that it knows here have pages of this size.
pub const PAGE_BYTES: u64 = 4096;

/// Begins every image but the inventory.
const COMMON_MAGIC: u32 = 0x5456_4319;
const INVENTORY_MAGIC: u32 = 0x5831_3116;
const PAGEMAP_MAGIC: u32 = 0x5608_4025;
const MM_MAGIC: u32 = 0x5749_2820;

/// `vma_entry.status`: the pages of the kernel's own mappings, of which CRIU has `VDSO`, `VSYSCALL` and `VVAR` as bits.
const KERNEL_AREAS: u32 = 1 << 2 | 1 << 3 | 1 << 12;

/// Why an image could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// Not this kind of image.
    #[error("image {0} begins with another magic number: is CRIU 4.2 or newer?")]
    Magic(String),
    /// It breaks off or makes no sense.
    #[error("image {0} makes no sense: is CRIU 4.2 or newer?")]
    Content(String),
}

/// The first record of a pagemap.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct PagemapHead {
    /// Number of the file with the pages.
    #[prost(uint32, required, tag = "1")]
    pub pages_id: u32,
}

/// Pages that follow each other and are alike.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct PagemapEntry {
    /// Address of the first.
    #[prost(uint64, required, tag = "1")]
    pub vaddr: u64,
    /// How many, for a CRIU before 4.1.
    #[prost(uint32, required, tag = "2")]
    pub compat_nr_pages: u32,
    /// For an old CRIU.
    #[prost(bool, optional, tag = "3")]
    pub in_parent: Option<bool>,
    /// [`Self::PARENT`], [`Self::LAZY`], [`Self::PRESENT`].
    #[prost(uint32, optional, tag = "4")]
    pub flags: Option<u32>,
    /// How many.
    #[prost(uint64, optional, tag = "5")]
    pub nr_pages: Option<u64>,
}

impl PagemapEntry {
    /// In the images of an earlier dump.
    pub const PARENT: u32 = 1;
    /// Not needed to restore: they come when they are touched.
    pub const LAZY: u32 = 1 << 1;
    /// In the file with the pages.
    pub const PRESENT: u32 = 1 << 2;

    /// `pages` pages from `vaddr` on.
    pub fn new(vaddr: u64, pages: u64, flags: u32) -> Self {
        Self { vaddr, compat_nr_pages: 0, in_parent: None, flags: Some(flags), nr_pages: Some(pages) }
    }

    /// How many pages.
    pub fn pages(&self) -> u64 {
        self.nr_pages.unwrap_or_else(|| self.compat_nr_pages.into())
    }

    /// The address behind the last page.
    pub fn end(&self) -> u64 {
        self.vaddr + self.pages() * PAGE_BYTES
    }

    /// Whether one of the flags is set.
    pub fn is(&self, flag: u32) -> bool {
        self.flags.unwrap_or_default() & flag != 0
    }
}

/// A mapping; what is not used here is left out.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct VmaEntry {
    /// First address.
    #[prost(uint64, required, tag = "1")]
    pub start: u64,
    /// The address behind it.
    #[prost(uint64, required, tag = "2")]
    pub end: u64,
    /// As for `mmap`.
    #[prost(uint32, required, tag = "6")]
    pub flags: u32,
    /// What CRIU knows of it.
    #[prost(uint32, required, tag = "7")]
    pub status: u32,
}

impl VmaEntry {
    /// Whether CRIU, restoring lazily, has its pages brought by userfaultfd (`vma_entry_can_be_lazy`).
    pub fn can_be_lazy(&self) -> bool {
        let has = |flag: i32| self.flags & flag.unsigned_abs() != 0;
        has(libc::MAP_ANONYMOUS)
            && has(libc::MAP_PRIVATE)
            && !has(libc::MAP_LOCKED)
            && !has(libc::MAP_HUGETLB)
            && self.status & KERNEL_AREAS == 0
    }
}

#[derive(Clone, PartialEq, Eq, Message)]
struct MmEntry {
    #[prost(message, repeated, tag = "14")]
    vmas: Vec<VmaEntry>,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
struct InventoryEntry {
    #[prost(uint32, required, tag = "1")]
    img_version: u32,
    #[prost(bool, optional, tag = "2")]
    fdinfo_per_id: Option<bool>,
    #[prost(uint64, optional, tag = "8")]
    dump_uptime: Option<u64>,
}

/// Reads a pagemap: the number of its file with the pages, and its entries.
pub fn read_pagemap(name: &str, bytes: &[u8]) -> Result<(u32, Vec<PagemapEntry>), ImageError> {
    let mut records = Records::open(name, &[COMMON_MAGIC, PAGEMAP_MAGIC], bytes)?;
    let head = records.next::<PagemapHead>()?.ok_or_else(|| ImageError::Content(name.to_owned()))?;
    let mut entries = Vec::new();
    while let Some(entry) = records.next::<PagemapEntry>()? {
        entries.push(entry);
    }
    Ok((head.pages_id, entries))
}

/// Writes a pagemap.
pub fn write_pagemap(pages_id: u32, entries: &[PagemapEntry]) -> Vec<u8> {
    let mut image = [COMMON_MAGIC, PAGEMAP_MAGIC].iter().flat_map(|magic| magic.to_le_bytes()).collect();
    put(&mut image, &PagemapHead { pages_id });
    entries.iter().for_each(|entry| put(&mut image, entry));
    image
}

/// Reads the mappings out of a task's `mm` image.
pub fn read_mappings(name: &str, bytes: &[u8]) -> Result<Vec<VmaEntry>, ImageError> {
    let mut records = Records::open(name, &[COMMON_MAGIC, MM_MAGIC], bytes)?;
    let mm = records.next::<MmEntry>()?.ok_or_else(|| ImageError::Content(name.to_owned()))?;
    Ok(mm.vmas)
}

/// An inventory of a dump that was made `uptime_us` after the machine's start.
pub fn write_inventory(uptime_us: u64) -> Vec<u8> {
    let mut image = INVENTORY_MAGIC.to_le_bytes().to_vec();
    put(
        &mut image,
        &InventoryEntry { img_version: 1, fdinfo_per_id: Some(true), dump_uptime: Some(uptime_us) },
    );
    image
}

fn put(image: &mut Vec<u8>, message: &impl Message) {
    let length = u32::try_from(message.encoded_len()).expect("these messages are small");
    image.extend_from_slice(&length.to_le_bytes());
    image.extend_from_slice(&message.encode_to_vec());
}

struct Records<'a> {
    name: &'a str,
    rest: &'a [u8],
}

impl<'a> Records<'a> {
    fn open(name: &'a str, magics: &[u32], mut rest: &'a [u8]) -> Result<Self, ImageError> {
        for magic in magics {
            rest =
                rest.strip_prefix(&magic.to_le_bytes()).ok_or_else(|| ImageError::Magic(name.to_owned()))?;
        }
        Ok(Self { name, rest })
    }

    fn next<M: Message + Default>(&mut self) -> Result<Option<M>, ImageError> {
        let content = || ImageError::Content(self.name.to_owned());
        if self.rest.is_empty() {
            return Ok(None);
        }
        let (length, rest) = self.rest.split_first_chunk().ok_or_else(content)?;
        let length = usize::try_from(u32::from_le_bytes(*length)).map_err(|_| content())?;
        let (record, rest) = rest.split_at_checked(length).ok_or_else(content)?;
        let message = M::decode(record).map_err(|_| content())?;
        self.rest = rest;
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The beginning of one that CRIU 4.2.1 wrote.
    const PAGEMAP: [u8; 32] = [
        0x19, 0x43, 0x56, 0x54, 0x25, 0x40, 0x08, 0x56, 2, 0, 0, 0, 0x08, 1, 14, 0, 0, 0, 0x08, 0x80, 0xe0,
        0x94, 0xa4, 0xed, 0xbe, 0x15, 0x10, 0, 0x20, 1, 0x28, 1,
    ];

    #[test]
    fn a_pagemap_of_crius_is_understood() {
        let (pages_id, entries) = read_pagemap("pagemap-5001.img", &PAGEMAP).unwrap();
        assert_eq!(pages_id, 1);
        assert_eq!(entries, [PagemapEntry::new(0x55f6_d485_3000, 1, PagemapEntry::PARENT)]);
        assert_eq!(write_pagemap(1, &entries), PAGEMAP);
    }

    #[test]
    fn what_is_no_pagemap_is_refused() {
        let name = "pagemap-1.img";
        assert_eq!(read_pagemap(name, &[1, 2, 3]), Err(ImageError::Magic(name.into())));
        let image = write_pagemap(7, &[PagemapEntry::new(0x1000, 3, PagemapEntry::LAZY)]);
        assert_eq!(read_pagemap(name, &image).unwrap().0, 7);
        for cut in 9..image.len() {
            let read = read_pagemap(name, &image[..cut]);
            assert!(read.is_err() || read.unwrap().1.is_empty(), "{cut}");
        }
    }

    #[test]
    fn only_anonymous_memory_of_the_servers_own_can_be_lazy() {
        let vma = |flags: i32, status| VmaEntry { start: 0, end: 4096, flags: flags.unsigned_abs(), status };
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        assert!(vma(private, 0x201).can_be_lazy());
        assert!(vma(private | libc::MAP_GROWSDOWN, 0x201).can_be_lazy());
        for (flags, status) in [
            (libc::MAP_PRIVATE, 0x201),
            (libc::MAP_SHARED | libc::MAP_ANONYMOUS, 0x201),
            (private | libc::MAP_LOCKED, 0x201),
            (private | libc::MAP_HUGETLB, 0x201),
            (private, 0x209),
        ] {
            assert!(!vma(flags, status).can_be_lazy(), "{flags:x} {status:x}");
        }
    }
}
