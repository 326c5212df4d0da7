//! Copies a held frame to the capture ring, where user space takes it into the backend's hold queue.

use aya_ebpf::bindings::BPF_RB_NO_WAKEUP;
use aya_ebpf::helpers::bpf_xdp_load_bytes;
use lb_core::packet::LINK_HEADER;
use lb_core::record::{CAPTURE_LARGE, CAPTURE_SMALL, CaptureHead};
use lb_core::{Packet, Reason};

use crate::atomic::increment;
use crate::maps;
use crate::packet::Frame;

const HEAD: usize = size_of::<CaptureHead>();

/// A slot of the ring; two sizes, since small packets are most and the ring's memory is bounded.
#[repr(C, align(8))]
struct Slot<const N: usize> {
    head: CaptureHead,
    frame: [u8; N],
}

/// Captures the frame as it is now, or counts that it was refused.
#[inline(always)]
pub fn capture(frame: &Frame, backend: u32) {
    let captured = if frame.length() <= CAPTURE_SMALL - HEAD {
        copy::<{ CAPTURE_SMALL - HEAD }>(frame, backend)
    } else {
        copy::<{ CAPTURE_LARGE - HEAD }>(frame, backend)
    };
    if !captured {
        maps::count(Reason::HoldRefused);
        maps::refuse(backend);
    }
}

#[inline(always)]
fn copy<const N: usize>(frame: &Frame, backend: u32) -> bool {
    let Some(hold) = maps::HOLDS.get(backend) else { return false };
    let length = frame.length_for_helper();
    if length < LINK_HEADER || length > N {
        return false;
    }
    let Some(mut slot) = maps::CAPTURE.reserve::<Slot<N>>(0) else { return false };
    let at = slot.as_mut_ptr();
    // SAFETY: the slot is `N` bytes and the verifier knows `length` to be at most that.
    let loaded = unsafe {
        (*at).head = CaptureHead { backend, length: length as u32 };
        bpf_xdp_load_bytes(frame.context(), 0, (&raw mut (*at).frame).cast(), length as u32)
    };
    if loaded != 0 {
        slot.discard(BPF_RB_NO_WAKEUP as u64);
        return false;
    }
    // Before the slot becomes visible: whoever then sees `captured == settled` sees all of them sent.
    increment(&hold.captured);
    // The hold's thread polls while a gate is closed; a wake-up per packet would cost more than the copy.
    slot.submit(BPF_RB_NO_WAKEUP as u64);
    true
}
