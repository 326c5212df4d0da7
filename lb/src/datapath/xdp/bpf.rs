//! The calls of bpf(2) that aya does not offer: many elements of a hash map at once, and the kernel's tick count.
#![expect(unsafe_code, reason = "bpf(2) is called directly")]

use std::ffi::c_long;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use super::records::Record;

/// Commands of bpf(2), from `linux/bpf.h`.
#[derive(Clone, Copy)]
#[repr(i32)]
enum Command {
    #[cfg(test)]
    CreateMap = 0,
    Lookup = 1,
    Update = 2,
    LoadProgram = 5,
    RunProgram = 10,
    LookupBatch = 24,
    DeleteBatch = 27,
}

/// The attributes of a command, zero where it has none.
///
/// # Safety
/// A `repr(C)` prefix of the kernel's `union bpf_attr` without padding; its addresses are readable (or writable,
/// where the command writes) for as long as the command says.
unsafe trait Attributes {}

#[derive(Default)]
#[repr(C)]
struct ElementAttributes {
    map: u32,
    reserved: u32,
    key: u64,
    value: u64,
    flags: u64,
}

// SAFETY: the layout of `BPF_MAP_*_ELEM`.
unsafe impl Attributes for ElementAttributes {}

#[derive(Default)]
#[repr(C)]
struct BatchAttributes {
    from: u64,
    next: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

// SAFETY: the layout of `BPF_MAP_*_BATCH`.
unsafe impl Attributes for BatchAttributes {}

#[cfg(test)]
#[derive(Default)]
#[repr(C)]
struct CreateAttributes {
    kind: u32,
    key_size: u32,
    value_size: u32,
    most: u32,
    flags: u32,
}

#[cfg(test)]
// SAFETY: the first fields of `BPF_MAP_CREATE`.
unsafe impl Attributes for CreateAttributes {}

#[derive(Default)]
#[repr(C)]
struct LoadAttributes {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

// SAFETY: the first fields of `BPF_PROG_LOAD`.
unsafe impl Attributes for LoadAttributes {}

#[derive(Default)]
#[repr(C)]
struct RunAttributes {
    program: u32,
    returned: u32,
    data_in_size: u32,
    data_out_size: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    context_in_size: u32,
    context_out_size: u32,
    context_in: u64,
    context_out: u64,
}

// SAFETY: the first fields of `BPF_PROG_TEST_RUN`.
unsafe impl Attributes for RunAttributes {}

/// # Safety
/// The addresses in the attributes are what the command expects there.
unsafe fn bpf(command: Command, attributes: &mut impl Attributes) -> io::Result<c_long> {
    let address: *mut _ = attributes;
    // SAFETY: the attributes are as long as said, and the caller vouches for what they point to.
    let answer =
        unsafe { libc::syscall(libc::SYS_bpf, command as i32, address, size_of_val(attributes) as u32) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer) }
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn address<T>(of: *const T) -> u64 {
    of.expose_provenance() as u64
}

/// Kinds of maps, from `linux/bpf.h`.
#[cfg(test)]
pub(super) const HASH: u32 = 1;
#[cfg(test)]
pub(super) const ARRAY: u32 = 2;
#[cfg(test)]
pub(super) const LRU_HASH: u32 = 9;

/// What one batched reading came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Batch {
    /// Go on from here.
    More(u32),
    /// That was the last one.
    End,
    /// Not even the first bucket fits into the buffers; they have to be larger.
    TooSmall,
}

/// Reads whole buckets from `from` on (the beginning: `None`) into the buffers, as many as their capacity takes.
/// What the buffers held before is gone. `K` and `V` must have the map's key and value size.
pub(super) fn lookup_batch<K: Record, V: Record>(
    map: BorrowedFd<'_>,
    from: Option<u32>,
    keys: &mut Vec<K>,
    values: &mut Vec<V>,
) -> io::Result<Batch> {
    keys.clear();
    values.clear();
    let mut next = 0_u32;
    let mut attributes = BatchAttributes {
        from: from.as_ref().map_or(0, |from| address(from)),
        next: address(&raw mut next),
        keys: address(keys.as_mut_ptr()),
        values: address(values.as_mut_ptr()),
        count: keys.capacity().min(values.capacity()).try_into().unwrap_or(u32::MAX),
        map: number(map),
        ..BatchAttributes::default()
    };
    // SAFETY: both buffers have room for `count` elements, and the positions are four bytes as of every hash and
    // array map.
    let outcome = unsafe { bpf(Command::LookupBatch, &mut attributes) };
    let read = attributes.count as usize;
    let batch = match outcome {
        Ok(_) => Batch::More(next),
        Err(error) => match error.raw_os_error() {
            Some(libc::ENOENT) => Batch::End,
            // Nothing was read then, and `count` is not what was.
            Some(libc::ENOSPC) => return Ok(Batch::TooSmall),
            _ => return Err(error),
        },
    };
    // SAFETY: the kernel wrote so many of each, not more than there is room for, and every bit pattern is valid.
    unsafe {
        keys.set_len(read);
        values.set_len(read);
    }
    Ok(batch)
}

/// Deletes the elements of these keys; how many of them there were.
pub(super) fn delete_batch<K: Record>(map: BorrowedFd<'_>, keys: &[K]) -> io::Result<usize> {
    let (mut deleted, mut done) = (0, 0);
    while done < keys.len() {
        let rest = &keys[done..];
        let mut attributes = BatchAttributes {
            keys: address(rest.as_ptr()),
            count: rest.len().try_into().unwrap_or(u32::MAX),
            map: number(map),
            ..BatchAttributes::default()
        };
        // SAFETY: the keys are readable; nothing else is touched.
        let outcome = unsafe { bpf(Command::DeleteBatch, &mut attributes) };
        let count = attributes.count as usize;
        match outcome {
            Ok(_) => {
                deleted += count;
                done += count;
            }
            // The kernel stops at a key that is not there.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                deleted += count;
                done += count + 1;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(deleted)
}

/// The value of a key. `K` and `V` must have the map's key and value size.
pub(super) fn lookup<K: Record, V: Record>(map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    let mut value = std::mem::MaybeUninit::<V>::uninit();
    let mut attributes = ElementAttributes {
        map: number(map),
        key: address(key),
        value: address(value.as_mut_ptr()),
        ..ElementAttributes::default()
    };
    // SAFETY: the key is readable and the value has room for one.
    match unsafe { bpf(Command::Lookup, &mut attributes) } {
        // SAFETY: the kernel wrote the whole value, and every bit pattern is valid.
        Ok(_) => Ok(Some(unsafe { value.assume_init() })),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes an element. `K` and `V` must have the map's key and value size.
pub(super) fn update<K: Record, V: Record>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<()> {
    let mut attributes = ElementAttributes {
        map: number(map),
        key: address(key),
        value: address(value),
        ..ElementAttributes::default()
    };
    // SAFETY: key and value are readable.
    unsafe { bpf(Command::Update, &mut attributes) }.map(drop)
}

/// Makes a map of `kind` (of `linux/bpf.h`) for tests.
#[cfg(test)]
pub(super) fn create_map<K: Record, V: Record>(kind: u32, most: u32) -> io::Result<OwnedFd> {
    let mut attributes = CreateAttributes {
        kind,
        key_size: size_of::<K>() as u32,
        value_size: size_of::<V>() as u32,
        most,
        flags: 0,
    };
    // SAFETY: plain numbers, and a descriptor comes back.
    let map = unsafe { bpf(Command::CreateMap, &mut attributes) }?;
    // SAFETY: a fresh descriptor that nothing else owns; descriptors are small.
    Ok(unsafe { OwnedFd::from_raw_fd(map as i32) })
}

/// Reads the kernel's tick count: the clock that the kernel program stamps flows with.
///
/// User space has no other way to it: `/proc/timer_list` needs a kernel built with it, `CLK_TCK` is another unit, and
/// the newest stamp in a table is old where nothing flows.
pub(super) struct TickCounter {
    program: OwnedFd,
}

impl TickCounter {
    /// Loads a program of five instructions that writes the count to its context.
    pub(super) fn new() -> io::Result<Self> {
        const SYSCALL_PROGRAM: u32 = 31;
        const SLEEPABLE: u32 = 1 << 4;
        const PROGRAM: [[u8; 8]; 5] = [
            [0xbf, 0x16, 0, 0, 0, 0, 0, 0],   // r6 = r1
            [0x85, 0x00, 0, 0, 118, 0, 0, 0], // r0 = bpf_jiffies64()
            [0x7b, 0x06, 0, 0, 0, 0, 0, 0],   // *(u64 *)(r6 + 0) = r0
            [0xb7, 0x00, 0, 0, 0, 0, 0, 0],   // r0 = 0
            [0x95, 0x00, 0, 0, 0, 0, 0, 0],   // exit
        ];
        let mut attributes = LoadAttributes {
            kind: SYSCALL_PROGRAM,
            instruction_count: PROGRAM.len() as u32,
            instructions: address(PROGRAM.as_ptr()),
            license: address(c"Dual MIT/GPL".as_ptr()),
            flags: SLEEPABLE,
            ..LoadAttributes::default()
        };
        // SAFETY: instructions and licence are readable, and a descriptor comes back.
        let program = unsafe { bpf(Command::LoadProgram, &mut attributes) }?;
        // SAFETY: a fresh descriptor that nothing else owns; descriptors are small.
        Ok(Self { program: unsafe { OwnedFd::from_raw_fd(program as i32) } })
    }

    /// The count now.
    pub(super) fn ticks(&self) -> io::Result<u64> {
        let mut count = 0_u64;
        let mut attributes = RunAttributes {
            program: number(self.program.as_fd()),
            context_in_size: size_of_val(&count) as u32,
            context_in: address(&raw mut count),
            ..RunAttributes::default()
        };
        // SAFETY: the context is writable for its size; programs of this type write back into it.
        unsafe { bpf(Command::RunProgram, &mut attributes) }?;
        Ok(count)
    }
}
