//! Array maps in this process's memory: writing an element is a store and not a system call.
#![expect(unsafe_code, reason = "the kernel's map memory is mapped and shared with it")]

use std::io;
use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use super::settings::SharedSettings;
use aya::maps::MapData;
use lb_core::record::{Backend, HoldCounters};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// An element that the kernel and user space may write at the same time.
///
/// # Safety
/// `repr(C)`, valid for every bit pattern, a multiple of eight bytes long, and whatever changes while
/// shared references exist is atomic.
pub(super) unsafe trait Shared {}

// SAFETY: an atomic.
unsafe impl Shared for AtomicU64 {}
// SAFETY: atomics only.
unsafe impl Shared for HoldCounters {}
// SAFETY: atomics only.
unsafe impl Shared for SharedSettings {}
// SAFETY: word and sites are atomics; the other fields change by a map update only while nothing in this
// process reads them (they are written by `tables` alone, which keeps its own copy).
unsafe impl Shared for Backend {}

const PAGE: usize = 4096;

/// A memory-mapped array map.
pub(super) struct MappedArray<T: Shared> {
    base: NonNull<T>,
    length: usize,
    bytes: NonZeroUsize,
    elements: PhantomData<T>,
}

// SAFETY: shared memory whose elements are atomics where they change (see `Shared`).
unsafe impl<T: Shared> Send for MappedArray<T> {}
// SAFETY: as above.
unsafe impl<T: Shared> Sync for MappedArray<T> {}

impl<T: Shared> MappedArray<T> {
    /// Maps all of an array map that was made with `BPF_F_MMAPABLE`, whatever its size is.
    pub(super) fn whole(map: &MapData) -> io::Result<Self> {
        let info = map.info().map_err(io::Error::other)?;
        if info.value_size() as usize != size_of::<T>() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Self::new(map.fd().as_fd(), info.max_entries())
    }

    /// Maps an array map that was made with `BPF_F_MMAPABLE` and has `length` elements of `T`'s size.
    fn new(map: BorrowedFd<'_>, length: u32) -> io::Result<Self> {
        const { assert!(size_of::<T>().is_multiple_of(8), "the kernel rounds its stride up to eight bytes") };
        let length = length as usize;
        let bytes = NonZeroUsize::new((size_of::<T>() * length).next_multiple_of(PAGE))
            .ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a fresh mapping of a map's memory; nothing else is replaced.
        let base = unsafe {
            mmap(None, bytes, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, map, 0)?
        };
        Ok(Self { base: base.cast(), length, bytes, elements: PhantomData })
    }

    /// How many elements there are.
    pub(super) fn length(&self) -> u32 {
        u32::try_from(self.length).expect("it was made with as many")
    }

    /// All elements.
    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        (0..self.length()).filter_map(|index| self.get(index))
    }

    /// The element at an index.
    pub(super) fn get(&self, index: u32) -> Option<&T> {
        let index = index as usize;
        // SAFETY: within the mapping, which lives as long as `self`; aligned since the stride is.
        (index < self.length).then(|| unsafe { self.base.add(index).as_ref() })
    }
}

impl<T: Shared> Drop for MappedArray<T> {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `new`; no reference outlives `self`.
        let _ = unsafe { munmap(self.base.cast(), self.bytes.get()) };
    }
}
