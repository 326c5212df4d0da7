//! What `cargo xtask bench xdp` runs packets with: a wrapper that makes each packet anew and hands it to the program
//! under test, and the programs that are the floor of what any load balancer costs.
//!
//! `BPF_PROG_TEST_RUN` gives a repeated run the packet as the last one left it. The wrapper puts the template back and
//! makes it one of many clients', so that a run of a million repeats is a run of a million flows.
#![no_std]
#![no_main]

#[path = "../bench_cutover.rs"]
mod cutover;

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::xdp_action::{XDP_ABORTED, XDP_TX};
use aya_ebpf::helpers::bpf_xdp_adjust_head;
use aya_ebpf::macros::{map, xdp};
use aya_ebpf::maps::{Array, ProgramArray};
use aya_ebpf::programs::XdpContext;

/// Bytes of a packet that are put back: all headers that a program may have changed.
const RESTORED: usize = 80;

/// The packet to make; `bench::xdp::wrapper` writes it. It is client 0's, whose number is no bits.
#[repr(C)]
struct Template {
    words: [u64; RESTORED / 8],
    /// Length of the whole frame.
    length: u32,
    /// Clients minus one; a power of two of them.
    mask: u32,
    /// Which client comes next: this number times the last one's, plus `step`.
    factor: u32,
    step: u32,
}

#[map]
static TEMPLATE: Array<Template> = Array::with_max_entries(1, 0);

/// Number of the last packet's client.
#[map]
static CLIENT: Array<u32> = Array::with_max_entries(1, 0);

/// The program under test, at place 0.
#[map]
static PROGRAMS: ProgramArray = ProgramArray::with_max_entries(1, 0);

/// Where the bytes lie that tell clients apart, for each family and protocol: the low word of the source address, the
/// ports, and words that no program reads, which keep the checksums true (`client` beside `!client` always adds up to the same).
struct Layout {
    address: usize,
    ports: usize,
    /// Two half words under the transport checksum.
    spare: usize,
    /// IPv4: the identification, under the header's checksum.
    identification: Option<usize>,
}

const V4_TCP: Layout = Layout { address: 26, ports: 34, spare: 38, identification: Some(18) };
const V4_UDP: Layout = Layout { address: 26, ports: 34, spare: 42, identification: Some(18) };
const V6_TCP: Layout = Layout { address: 34, ports: 54, spare: 58, identification: None };
const V6_UDP: Layout = Layout { address: 34, ports: 54, spare: 62, identification: None };

#[xdp]
pub fn wrap_v4_tcp(context: XdpContext) -> u32 {
    wrap(&context, V4_TCP)
}

#[xdp]
pub fn wrap_v4_udp(context: XdpContext) -> u32 {
    wrap(&context, V4_UDP)
}

#[xdp]
pub fn wrap_v6_tcp(context: XdpContext) -> u32 {
    wrap(&context, V6_TCP)
}

#[xdp]
pub fn wrap_v6_udp(context: XdpContext) -> u32 {
    wrap(&context, V6_UDP)
}

#[inline(always)]
fn wrap(context: &XdpContext, layout: Layout) -> u32 {
    let (Some(template), Some(client)) = (TEMPLATE.get(0), CLIENT.get_ptr_mut(0)) else { return XDP_ABORTED };
    let length = (context.data_end() - context.data()) as i32;
    // What encapsulated the last packet made room at its front.
    if length != template.length as i32 {
        // SAFETY: the context is this run's; every packet pointer is read anew below.
        unsafe { bpf_xdp_adjust_head(context.as_ptr().cast(), length - template.length as i32) };
    }
    let data = context.data();
    if data + RESTORED > context.data_end() {
        return XDP_ABORTED;
    }
    // Word by word: what the compiler calls for so many bytes at once copies them one after the other.
    for (place, word) in template.words.iter().enumerate() {
        // SAFETY: `RESTORED` bytes lie within the frame.
        unsafe { (data as *mut u64).add(place).write_unaligned(*word) };
    }
    // SAFETY: as above, and nothing else refers to them.
    let packet = unsafe { &mut *(data as *mut [u8; RESTORED]) };

    // SAFETY: one run at a time uses the map.
    let number = unsafe {
        *client = (*client).wrapping_mul(template.factor).wrapping_add(template.step) & template.mask;
        *client
    };
    // Written in words as the program reads them: what was written in parts would have to leave the processor's store
    // buffer before it could be read as a whole, which frames from a network card never have to.
    let (mut address, mut ports) = (template.word(layout.address), template.word(layout.ports));
    let (client_port, client_host) = (0x4000 | number & 0x3fff, number >> 14);
    address |= client_host;
    ports |= client_port << 16;
    put32(packet, layout.address, address);
    put32(packet, layout.ports, ports);
    put32(packet, layout.spare, !(client_port << 16 | address & 0xffff));
    if let Some(identification) = layout.identification {
        packet[identification..identification + 2].copy_from_slice(&(!address as u16).to_be_bytes());
    }
    // SAFETY: the program under test takes the packet over; that it comes back here means that there is none.
    unsafe { PROGRAMS.tail_call(context, 0) };
    XDP_ABORTED
}

impl Template {
    /// A word of the packet in host order.
    #[inline(always)]
    fn word(&self, at: usize) -> u32 {
        // SAFETY: the offsets of the layouts lie within the packet.
        u32::from_be(unsafe { self.words.as_ptr().cast::<u8>().add(at).cast::<u32>().read_unaligned() })
    }
}

#[inline(always)]
fn put32(packet: &mut [u8; RESTORED], at: usize, word: u32) {
    packet[at..at + 4].copy_from_slice(&word.to_be_bytes());
}

/// The least that a program can do with a packet that it sends on.
#[xdp]
pub fn floor_transmit(_: XdpContext) -> u32 {
    XDP_TX
}

const LINK: usize = 14;
const OUTER: usize = 20;

/// The least that IPIP encapsulation (RFC 2003) can cost: room at the front, a link and an IPv4 header.
#[xdp]
pub fn floor_ipip(context: XdpContext) -> u32 {
    let inner = context.data_end() - context.data() - LINK;
    // SAFETY: the context is this run's; packet pointers are read below.
    if unsafe { bpf_xdp_adjust_head(context.as_ptr().cast(), -(OUTER as i32)) } != 0 {
        return XDP_ABORTED;
    }
    let data = context.data();
    if data + LINK + OUTER > context.data_end() {
        return XDP_ABORTED;
    }
    // SAFETY: these bytes lie within the frame, and nothing else refers to them.
    let header = unsafe { &mut *(data as *mut [u8; LINK + OUTER]) };
    // In words: from an array of bytes the compiler would copy byte by byte.
    header[..8].copy_from_slice(&0x0002_0b00_0000_0002_u64.to_le_bytes());
    header[8..12].copy_from_slice(&0x0b01_0000_u32.to_le_bytes());
    header[12..LINK].copy_from_slice(&0x0008_u16.to_le_bytes());
    let [high, low] = ((inner + OUTER) as u16).to_be_bytes();
    // Version, length, no fragment, TTL 64, protocol 4, 10.0.0.254 to 10.2.1.1; the checksum without the length.
    let sum = 0x4500 + 0x4000 + 0x4004 + 0x0a00 + 0x00fe + 0x0a02 + 0x0101 + (inner + OUTER) as u32;
    let [c0, c1] = (!((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes();
    header[LINK..]
        .copy_from_slice(&[0x45, 0, high, low, 0, 0, 0x40, 0, 64, 4, c0, c1, 10, 0, 0, 254, 10, 2, 1, 1]);
    XDP_TX
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // Never reached: the verifier accepts no program that could get here.
    loop {}
}

/// The helpers that the programs call are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
