//! The two ends of `cargo xtask bench cutover`: what makes clients' datagrams, and what a site does with them.

use aya_ebpf::bindings::xdp_action::{XDP_ABORTED, XDP_DROP, XDP_PASS, XDP_TX};
use aya_ebpf::helpers::{bpf_ktime_get_ns, bpf_redirect};
use aya_ebpf::macros::{map, xdp};
use aya_ebpf::maps::Array;
use aya_ebpf::programs::XdpContext;

/// A datagram without options: link, IPv4 and UDP header, and a number of eight bytes.
const DATAGRAM: usize = 14 + 20 + 8 + 8;
const NUMBER: usize = 42;

/// What is sent; user space writes it.
#[repr(C)]
struct Injection {
    datagram: [u8; 56],
    /// Interface to send out of.
    interface: u32,
    /// Clients minus one; a power of two of them.
    mask: u32,
    /// The next datagram's client.
    client: u64,
    /// The next datagram's number; 0: none is numbered.
    number: u64,
}

#[map]
static INJECTION: Array<Injection> = Array::with_max_entries(1, 0);

/// Sends the next client's datagram. Run for live frames, by one thread.
#[xdp]
pub fn inject(context: XdpContext) -> u32 {
    let Some(injection) = INJECTION.get_ptr_mut(0) else { return XDP_ABORTED };
    // SAFETY: one thread runs this, and user space writes only in between.
    let injection = unsafe { &mut *injection };
    let data = context.data();
    if data + DATAGRAM > context.data_end() {
        return XDP_ABORTED;
    }
    // SAFETY: these bytes lie within the frame, and nothing else refers to them.
    let frame = unsafe { &mut *(data as *mut [u8; DATAGRAM]) };
    let mut i = 0;
    while i < NUMBER {
        frame[i] = injection.datagram[i];
        i += 1;
    }
    let client = injection.client as u32 & injection.mask;
    injection.client += 1;
    // Fourteen bits make the port, six the address.
    frame[34..36].copy_from_slice(&(0x4000 | client as u16 & 0x3fff).to_be_bytes());
    frame[29] = (client >> 14) as u8;
    // No UDP checksum (RFC 768); the IPv4 header's is kept true by the identification.
    (frame[18], frame[19]) = (!frame[28], !frame[29]);
    frame[NUMBER..].copy_from_slice(&injection.number.to_ne_bytes());
    if injection.number != 0 {
        injection.number += 1;
    }
    // SAFETY: a helper with plain numbers.
    unsafe { bpf_redirect(injection.interface, 0) as u32 }
}

/// What came to a site.
#[repr(C)]
struct Arrivals {
    /// Numbered datagrams.
    count: u64,
    /// Those whose number was not above the one before.
    disordered: u64,
    /// The last number.
    last: u64,
    /// When the first came, in nanoseconds of the monotonic clock.
    first_ns: u64,
    /// When the last came.
    last_ns: u64,
}

#[map]
static ARRIVALS: Array<Arrivals> = Array::with_max_entries(1, 0);

/// The port that backends have.
const PORT: [u8; 2] = 7000_u16.to_be_bytes();

/// A backend without a server: answers what has no number, and counts what has one.
#[xdp]
pub fn site(context: XdpContext) -> u32 {
    let data = context.data();
    if data + DATAGRAM > context.data_end() {
        return XDP_PASS;
    }
    // SAFETY: these bytes lie within the frame, and nothing else refers to them.
    let frame = unsafe { &mut *(data as *mut [u8; DATAGRAM]) };
    if frame[12..14] != [8, 0] || frame[23] != 17 || frame[36..38] != PORT {
        return XDP_PASS;
    }
    let mut number = [0; 8];
    number.copy_from_slice(&frame[NUMBER..]);
    let number = u64::from_ne_bytes(number);
    if number == 0 {
        // Swapped, neither checksum changes.
        swap::<6>(frame, 0, 6);
        swap::<4>(frame, 26, 30);
        swap::<2>(frame, 34, 36);
        return XDP_TX;
    }
    let Some(arrivals) = ARRIVALS.get_ptr_mut(0) else { return XDP_ABORTED };
    // SAFETY: an interface with one queue runs one of these at a time.
    let arrivals = unsafe { &mut *arrivals };
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    if arrivals.count == 0 {
        arrivals.first_ns = now;
    } else if number <= arrivals.last {
        arrivals.disordered += 1;
    }
    arrivals.count += 1;
    arrivals.last = number;
    arrivals.last_ns = now;
    XDP_DROP
}

#[inline(always)]
fn swap<const N: usize>(frame: &mut [u8; DATAGRAM], a: usize, b: usize) {
    let mut i = 0;
    while i < N {
        frame.swap(a + i, b + i);
        i += 1;
    }
}
