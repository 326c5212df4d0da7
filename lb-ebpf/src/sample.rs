//! Copies packets to the samples, for whoever captures.

use aya_ebpf::bindings::{__sk_buff, xdp_md};
use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_ktime_get_ns};
use lb_core::packet::LINK_HEADER;
use lb_core::record::{SAMPLE_BYTES, SampleHead};

use crate::frame::{Frame, SkbFrame, XdpFrame};
use crate::maps;

/// A slot of the ring.
#[repr(C, align(8))]
struct Slot {
    head: SampleHead,
    bytes: [u8; SAMPLE_BYTES],
}

// Functions of their own: while nobody captures they cost a branch, and nothing on the caller's stack.

#[inline(never)]
pub fn xdp(context: *mut xdp_md, every: u32, reason: u32) {
    copy(&XdpFrame::of(context), every, reason);
}

#[inline(never)]
pub fn skb(context: *mut __sk_buff, every: u32, reason: u32) {
    copy(&SkbFrame::of(context), every, reason);
}

#[inline(always)]
fn copy(frame: &impl Frame, every: u32, reason: u32) {
    // SAFETY: a helper without arguments.
    if every == 0 || unsafe { bpf_get_prandom_u32() } % every != 0 {
        return;
    }
    let length = frame.length_for_helper();
    if length < LINK_HEADER {
        return;
    }
    let captured = if length < SAMPLE_BYTES { length } else { SAMPLE_BYTES };
    let Some(mut slot) = maps::SAMPLES.reserve::<Slot>(0) else {
        maps::lose_sample();
        return;
    };
    let at = slot.as_mut_ptr();
    // SAFETY: the slot is as large as its type, and `captured` at most its bytes.
    let copied = unsafe {
        (*at).head = SampleHead {
            reason,
            interface: frame.interface(),
            length: length as u32,
            captured: captured as u32,
            time_ns: bpf_ktime_get_ns(),
        };
        frame.copy((&raw mut (*at).bytes).cast(), captured as u32)
    };
    if copied { slot.submit(0) } else { slot.discard(0) }
}
