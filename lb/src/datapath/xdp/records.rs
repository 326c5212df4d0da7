//! Table records as bytes and back, for the map system calls.
#![expect(unsafe_code, reason = "records are viewed as bytes")]

use lb_core::record::{
    Backend, CaptureHead, HoldCounters, Location, NatSource, SampleHead, Service, ServiceKey, Settings,
    Traffic,
};
use lb_core::{Flow, FlowKey};

/// A record of the data path's tables.
///
/// # Safety
/// The type has no padding and every bit pattern is valid for it.
pub unsafe trait Record: Sized {}

// SAFETY: a number.
unsafe impl Record for u32 {}
// SAFETY: a number.
unsafe impl Record for u64 {}
// SAFETY: bytes.
unsafe impl<const N: usize> Record for [u8; N] {}
// SAFETY: `repr(C)`, fields of integers and arrays of them, sizes asserted in lb-core to leave no padding.
unsafe impl<const W: usize> Record for FlowKey<W> {}
// SAFETY: as above.
unsafe impl<const W: usize> Record for Flow<W> {}
// SAFETY: as above.
unsafe impl<const W: usize> Record for ServiceKey<W> {}
// SAFETY: as above.
unsafe impl<const W: usize> Record for NatSource<W> {}
// SAFETY: as above.
unsafe impl Record for Service {}
// SAFETY: as above.
unsafe impl Record for Backend {}
// SAFETY: as above.
unsafe impl Record for Location {}
// SAFETY: as above.
unsafe impl Record for HoldCounters {}
// SAFETY: as above.
unsafe impl Record for CaptureHead {}
// SAFETY: as above.
unsafe impl Record for Traffic {}
// SAFETY: as above.
unsafe impl Record for Settings {}
// SAFETY: as above.
unsafe impl Record for SampleHead {}

/// The record's bytes.
///
/// # Panics
/// If `N` is not the record's size.
pub fn to_bytes<const N: usize, T: Record>(record: &T) -> [u8; N] {
    assert_eq!(N, size_of::<T>(), "the map's value size is the record's size");
    // SAFETY: `T` has no padding (see `Record`) and is readable for its whole size.
    let bytes = unsafe { std::slice::from_raw_parts((&raw const *record).cast::<u8>(), N) };
    bytes.try_into().expect("lengths were compared")
}

/// The record that lies in these bytes.
///
/// # Panics
/// If `N` is not the record's size.
pub fn from_bytes<const N: usize, T: Record>(bytes: &[u8; N]) -> T {
    assert_eq!(N, size_of::<T>(), "the map's value size is the record's size");
    // SAFETY: every bit pattern is a valid `T` (see `Record`), and the read is unaligned.
    unsafe { bytes.as_ptr().cast::<T>().read_unaligned() }
}
