//! The decapsulator of a site: `lb_core::decapsulate` at the XDP hook and at tc's ingress.
//!
//! Both variants share maps and decision. They differ in how the outer header is cut off: XDP moves the frame's
//! beginning, tc asks the kernel to, which keeps segments that arrived merged together as they are.
#![no_std]
#![no_main]

mod maps;
mod packet;

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS};
use aya_ebpf::bindings::{
    BPF_F_ADJ_ROOM_DECAP_L3_IPV4, BPF_F_ADJ_ROOM_FIXED_GSO, TC_ACT_SHOT, TC_ACT_UNSPEC,
    bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
};
use aya_ebpf::helpers::{bpf_csum_update, bpf_xdp_adjust_head};
use aya_ebpf::macros::{classifier, xdp};
use aya_ebpf::programs::{TcContext, XdpContext};
use lb_core::decapsulate::{
    Encapsulation, Reason, Strip, Verdict, decapsulate, move_link_header, set_ether_type,
};

use crate::maps::Kernel;
use crate::packet::Frame;

/// The XDP variant.
#[xdp]
pub fn decapsulate_xdp(context: XdpContext) -> u32 {
    let mut frame = Frame::of_xdp(&context);
    match decapsulate(&mut frame, &Kernel) {
        Verdict::Pass => XDP_PASS,
        Verdict::Drop => XDP_DROP,
        Verdict::Strip(Strip { encapsulation, .. }) => {
            let moved = move_link_header(&mut frame, encapsulation).is_some();
            // SAFETY: the context is the hook's own, and the frame is not looked at afterwards.
            if moved && unsafe { bpf_xdp_adjust_head(context.ctx, encapsulation.outer_header() as i32) } == 0
            {
                XDP_PASS
            } else {
                maps::count(Reason::Refused);
                XDP_DROP
            }
        }
    }
}

/// The variant for tc's ingress (TCX, or a filter of clsact).
#[classifier]
pub fn decapsulate_tc(mut context: TcContext) -> i32 {
    let mut frame = Frame::of_tc(&mut context);
    match decapsulate(&mut frame, &Kernel) {
        // Whatever else is attached has its turn.
        Verdict::Pass => TC_ACT_UNSPEC,
        Verdict::Drop => TC_ACT_SHOT,
        Verdict::Strip(strip) => {
            let written = set_ether_type(&mut frame, strip.encapsulation).is_some();
            if written && cut(&context, strip) {
                TC_ACT_UNSPEC
            } else {
                maps::count(Reason::Refused);
                TC_ACT_SHOT
            }
        }
    }
}

/// Has the kernel take the outer header off.
#[inline(always)]
fn cut(context: &TcContext, Strip { encapsulation, change }: Strip) -> bool {
    if change != 0 {
        // A network card's sum over the whole packet; the helper does nothing where there is none.
        // SAFETY: a helper with the hook's own context and a number.
        unsafe { bpf_csum_update(context.skb.skb, change as u32) };
    }
    // Segments that were merged stay as large as their sender made them.
    let same_size = BPF_F_ADJ_ROOM_FIXED_GSO as u64;
    // The kernel takes the packet for one of the outer family until it is told (since Linux 6.3). Where the family
    // stays nothing has to be said, which older kernels would not understand.
    let (length, flags) = match encapsulation {
        Encapsulation::V4InV4 => (20, same_size),
        Encapsulation::V6InV6 => (40, same_size),
        Encapsulation::V4InV6 => (40, same_size | BPF_F_ADJ_ROOM_DECAP_L3_IPV4 as u64),
    };
    context.adjust_room(-length, BPF_ADJ_ROOM_MAC, flags).is_ok()
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // Never reached: the verifier accepts no program that could get here.
    loop {}
}

/// The helpers that the program calls are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
