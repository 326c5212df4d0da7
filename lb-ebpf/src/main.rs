//! The XDP program: `lb_core::process` on kernel maps.
//!
//! The only place where packet pointers are touched. What a packet's fate is, is decided in `lb-core`; here
//! are the maps, the checked window over the packet, and the hook's return codes.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod atomic;
mod capture;
mod maps;
mod packet;

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_REDIRECT, XDP_TX};
use aya_ebpf::helpers::{bpf_jiffies64, bpf_redirect};
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use lb_core::packet::{ETHER_TYPE_V4, ETHER_TYPE_V6, ether_type};
use lb_core::{Action, Arrival, Reason, V4, V6, process};

use crate::packet::Frame;

/// Forwards, holds, passes or drops a frame. Attached to every interface of the load balancer.
#[xdp]
pub fn drover(context: XdpContext) -> u32 {
    let mut frame = Frame::new(&context);
    let interface = frame.interface();
    // Coarse (4 to 10 ms) but 30 ns cheaper than reading the clock.
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_jiffies64() };
    let arrival = Arrival { interface, now };
    let action = match ether_type(&mut frame) {
        Some(ETHER_TYPE_V4) => process(V4, &mut frame, &maps::v4::Kernel, arrival),
        Some(ETHER_TYPE_V6) => process(V6, &mut frame, &maps::v6::Kernel, arrival),
        Some(_) => {
            maps::count(Reason::NotIp);
            Action::Pass
        }
        None => {
            maps::count(Reason::Truncated);
            Action::Pass
        }
    };
    match action {
        Action::Pass => XDP_PASS,
        Action::Drop => XDP_DROP,
        Action::Transmit { interface: out } if out == interface => XDP_TX,
        Action::Transmit { interface: out } => {
            // SAFETY: a helper with plain numbers.
            let verdict = unsafe { bpf_redirect(out, 0) } as u32;
            if verdict == XDP_REDIRECT { XDP_REDIRECT } else { XDP_DROP }
        }
        Action::Capture { backend } => {
            capture::capture(&frame, backend);
            XDP_DROP
        }
    }
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
