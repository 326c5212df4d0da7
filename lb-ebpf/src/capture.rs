//! Copies a held frame to the capture ring, where user space takes it into the backend's hold queue.

use aya_ebpf::bindings::BPF_RB_NO_WAKEUP;
use lb_core::packet::LINK_HEADER;
use lb_core::record::{CAPTURE_LARGE, CAPTURE_MERGED, CAPTURE_SMALL, CaptureHead};
use lb_core::{Mode, Reason};

use crate::atomic::increment;
use crate::frame::Frame;
use crate::maps;

const HEAD: usize = size_of::<CaptureHead>();
const SMALL: usize = CAPTURE_SMALL - HEAD;
const LARGE: usize = CAPTURE_LARGE - HEAD;
const MERGED: usize = CAPTURE_MERGED - HEAD;

/// A slot of the ring; few sizes, since small packets are most and the ring's memory is bounded.
#[repr(C, align(8))]
struct Slot<const N: usize> {
    head: CaptureHead,
    frame: [u8; N],
}

/// Captures the frame as it is now, or counts that it was refused. `merged`: whether the hook's frames may be merged
/// segments.
#[inline(always)]
pub fn capture(frame: &impl Frame, backend: u32, mode: Mode, merged: bool) {
    let length = frame.length();
    let captured = if length <= SMALL {
        copy::<SMALL>(frame, backend, mode)
    } else if length <= LARGE || !merged {
        copy::<LARGE>(frame, backend, mode)
    } else {
        copy::<MERGED>(frame, backend, mode)
    };
    if !captured {
        maps::count(Reason::HoldRefused);
        maps::refuse(backend);
    }
}

#[inline(always)]
fn copy<const N: usize>(frame: &impl Frame, backend: u32, mode: Mode) -> bool {
    let Some(hold) = maps::HOLDS.get(backend) else { return false };
    let length = frame.length_for_helper();
    if length < LINK_HEADER || length > N {
        return false;
    }
    let Some(mut slot) = maps::CAPTURE.reserve::<Slot<N>>(0) else { return false };
    let at = slot.as_mut_ptr();
    // SAFETY: the slot is `N` bytes and the verifier knows `length` to be at most that.
    let copied = unsafe {
        (*at).head = CaptureHead {
            backend,
            length: length as u32,
            mode: mode as u32,
            segment: frame.segment() as u32,
        };
        frame.copy((&raw mut (*at).frame).cast(), length as u32)
    };
    if !copied {
        slot.discard(BPF_RB_NO_WAKEUP as u64);
        return false;
    }
    // Before the slot becomes visible: whoever then sees `captured == settled` sees all of them sent.
    increment(&hold.captured);
    // The hold's thread polls while a gate is closed; a wake-up per packet would cost more than the copy.
    slot.submit(BPF_RB_NO_WAKEUP as u64);
    true
}
