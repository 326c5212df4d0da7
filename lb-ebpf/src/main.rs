//! The kernel programs: `lb_core::process` on kernel maps, at the XDP and at the tc hook.
//!
//! The only place where packet pointers are touched. What a packet's fate is, is decided in `lb-core`; here are the
//! maps, the checked window over the packet, and the hooks' return codes.
//!
//! A program has 512 bytes of stack, counted along a chain of calls. So the steps of `process` are functions of their
//! own, called one after the other.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod atomic;
mod capture;
mod frame;
mod log;
mod maps;
mod sample;

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_REDIRECT, XDP_TX};
use aya_ebpf::bindings::{__sk_buff, TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_md};
use aya_ebpf::helpers::{bpf_jiffies64, bpf_redirect, bpf_redirect_peer};
use aya_ebpf::macros::{classifier, xdp};
use aya_ebpf::programs::{TcContext, XdpContext};
use lb_core::packet::{ETHER_TYPE_V4, ETHER_TYPE_V6, ether_type};
use lb_core::{Action, Arrival, Family, Mode, Reason, Step, V4, V6, take, walk};

use crate::frame::{Frame, SkbFrame, XdpFrame};
use crate::maps::Kernel;

/// Forwards, holds, passes or drops a frame. Attached to every interface of the load balancer.
#[xdp]
pub fn drover(context: XdpContext) -> u32 {
    let context: *mut xdp_md = context.as_ptr().cast();
    let mut frame = XdpFrame::of(context);
    let interface = frame.interface();
    let now = now();
    let action = match ether_type(&mut frame) {
        Some(ETHER_TYPE_V4) => xdp_v4(context, now),
        Some(ETHER_TYPE_V6) => xdp_v6(context, now),
        other => not_ip(other),
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
        Action::Capture { backend, mode } => {
            capture::capture(&XdpFrame::of(context), backend, mode, false);
            XDP_DROP
        }
    }
}

/// The same for packets that the kernel has received already; on virtual interfaces they come merged to large
/// segments there.
#[classifier]
pub fn drover_tc(context: TcContext) -> i32 {
    let context: *mut __sk_buff = context.as_ptr().cast();
    let mut frame = SkbFrame::of(context);
    frame.pull_headers();
    let now = now();
    let action = match ether_type(&mut frame) {
        Some(ETHER_TYPE_V4) => skb_v4(context, now),
        Some(ETHER_TYPE_V6) => skb_v6(context, now),
        other => not_ip(other),
    };
    match action {
        Action::Pass => TC_ACT_UNSPEC,
        Action::Drop => TC_ACT_SHOT,
        Action::Transmit { interface } => {
            // Into another namespace without the queue between: that saves a wake-up on each packet's way.
            // SAFETY: helpers with plain numbers.
            let verdict = match maps::is_peered(interface) {
                true => unsafe { bpf_redirect_peer(interface, 0) },
                false => unsafe { bpf_redirect(interface, 0) },
            } as i32;
            if verdict == TC_ACT_REDIRECT { verdict } else { TC_ACT_SHOT }
        }
        Action::Capture { backend, mode } => {
            capture::capture(&SkbFrame::of(context), backend, mode, true);
            TC_ACT_SHOT
        }
    }
}

/// Coarse (1 to 10 ms) but 30 ns cheaper than reading the clock.
#[inline(always)]
fn now() -> u64 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_jiffies64() }
}

#[inline(always)]
fn not_ip(ether_type: Option<u16>) -> Action {
    maps::count(if ether_type.is_some() { Reason::NotIp } else { Reason::Truncated });
    Action::Pass
}

/// One function for each step, so that none of them lives on another's stack.
macro_rules! steps {
    ($steps:ident, $frame:ty, $family:ident) => {
        #[inline(always)]
        fn $steps(context: *mut <$frame as Frame>::Context, now: u64) -> Action {
            #[inline(never)]
            fn forward(context: *mut <$frame as Frame>::Context, now: u64) -> u64 {
                take_step::<_, _, $frame>($family, context, now, Step::Forward)
            }
            #[inline(never)]
            fn search(context: *mut <$frame as Frame>::Context, now: u64) -> u64 {
                take_step::<_, _, $frame>($family, context, now, Step::Search)
            }
            #[inline(never)]
            fn open(context: *mut <$frame as Frame>::Context, now: u64) -> u64 {
                take_step::<_, _, $frame>($family, context, now, Step::Open)
            }
            #[inline(never)]
            fn icmp(context: *mut <$frame as Frame>::Context, now: u64) -> u64 {
                take_step::<_, _, $frame>($family, context, now, Step::Icmp)
            }
            #[inline(never)]
            fn too_big(context: *mut <$frame as Frame>::Context, now: u64, mtu: u32) -> u64 {
                take_step::<_, _, $frame>($family, context, now, Step::TooBig { mtu })
            }
            #[inline(never)]
            fn refuse(context: *mut <$frame as Frame>::Context, now: u64, reason: u32) -> u64 {
                log::refused(&<$frame>::of(context), reason);
                let reason = Reason::from_number(reason);
                take_step::<_, _, $frame>($family, context, now, Step::Refuse(reason))
            }
            // What is forwarded at once is on its way after one call.
            #[inline(never)]
            fn rest(context: *mut <$frame as Frame>::Context, now: u64, next: u64) -> u64 {
                let action = walk(from_bits(next), |step| {
                    from_bits(match step {
                        Step::Search => search(context, now),
                        Step::Open => open(context, now),
                        Step::Icmp => icmp(context, now),
                        Step::TooBig { mtu } => too_big(context, now, mtu),
                        Step::Refuse(reason) => refuse(context, now, reason as u32),
                        Step::Forward | Step::Done(_) => return step,
                    })
                });
                to_bits(Step::Done(action))
            }
            let mut next = from_bits(forward(context, now));
            if !matches!(next, Step::Done(_)) {
                next = from_bits(rest(context, now, to_bits(next)));
            }
            match next {
                Step::Done(action) => action,
                _ => Action::Drop,
            }
        }
    };
}

steps!(xdp_v4, XdpFrame, V4);
steps!(xdp_v6, XdpFrame, V6);
steps!(skb_v4, SkbFrame, V4);
steps!(skb_v6, SkbFrame, V6);

#[inline(always)]
fn take_step<const W: usize, F: Family<W>, R: Frame>(
    family: F,
    context: *mut R::Context,
    now: u64,
    step: Step,
) -> u64
where
    Kernel: lb_core::Tables<W>,
{
    let mut frame = R::of(context);
    let arrival = Arrival { interface: frame.interface(), now };
    to_bits(take(family, &mut frame, &Kernel, arrival, step))
}

// A function of a kernel program answers with one number: the step or action, and above it an interface, a backend,
// a reason or an MTU.

const SEARCH: u32 = 0;
const OPEN: u32 = 1;
const ICMP: u32 = 2;
const TOO_BIG: u32 = 3;
const REFUSE: u32 = 4;
const PASS: u32 = 5;
const DROP: u32 = 6;
const TRANSMIT: u32 = 7;
/// The mode is added.
const CAPTURE: u32 = 8;

#[inline(always)]
fn to_bits(step: Step) -> u64 {
    let (what, number) = match step {
        Step::Search | Step::Forward => (SEARCH, 0),
        Step::Open => (OPEN, 0),
        Step::Icmp => (ICMP, 0),
        Step::TooBig { mtu } => (TOO_BIG, mtu),
        Step::Refuse(reason) => (REFUSE, reason as u32),
        Step::Done(Action::Pass) => (PASS, 0),
        Step::Done(Action::Drop) => (DROP, 0),
        Step::Done(Action::Transmit { interface }) => (TRANSMIT, interface),
        Step::Done(Action::Capture { backend, mode }) => (CAPTURE + mode as u32, backend),
    };
    what as u64 | (number as u64) << 32
}

#[inline(always)]
fn from_bits(bits: u64) -> Step {
    let number = (bits >> 32) as u32;
    Step::Done(match bits as u32 {
        SEARCH => return Step::Search,
        OPEN => return Step::Open,
        ICMP => return Step::Icmp,
        TOO_BIG => return Step::TooBig { mtu: number },
        REFUSE => return Step::Refuse(Reason::from_number(number)),
        PASS => Action::Pass,
        DROP => Action::Drop,
        TRANSMIT => Action::Transmit { interface: number },
        what => Action::Capture { backend: number, mode: Mode::from_bits(what - CAPTURE) },
    })
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
