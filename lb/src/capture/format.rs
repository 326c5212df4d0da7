//! Blocks of the pcap-ng format (draft-ietf-opsawg-pcapng), in this machine's byte order.
//!
//! ```text
//! type u32 | length u32 | body, padded to four bytes | options | length u32
//! ```

const SECTION_HEADER: u32 = 0x0a0d_0d0a;
const INTERFACE: u32 = 1;
const ENHANCED_PACKET: u32 = 6;
const BYTE_ORDER_MAGIC: u32 = 0x1a2b_3c4d;
const LENGTH_UNKNOWN: u64 = u64::MAX;

/// Of the packets' bytes that are kept.
const LENGTH_UNBOUNDED: u32 = 0;

const END_OF_OPTIONS: u16 = 0;
const COMMENT: u16 = 1;
const SECTION_OS: u16 = 3;
const SECTION_APPLICATION: u16 = 4;
const INTERFACE_NAME: u16 = 2;
const INTERFACE_RESOLUTION: u16 = 9;
const PACKET_FLAGS: u16 = 2;
const PACKET_VERDICT: u16 = 7;

const ETHERNET: u16 = 1;
/// Times are powers of ten of a second: 10^-9.
const NANOSECONDS: u8 = 9;
const INBOUND: u32 = 1;

/// A packet as a block says it.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    /// Which interface of those described before, counted from 0.
    pub interface: u32,
    /// When, in nanoseconds since 1970.
    pub unix_ns: u64,
    /// Its first bytes, with the link header.
    pub bytes: &'a [u8],
    /// Its whole length in bytes.
    pub length: u32,
    /// What a reader is told about it.
    pub comment: &'a str,
    /// What the hook's program returned.
    pub verdict: Verdict,
}

/// What an eBPF program returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// In traffic control: `TC_ACT_*`.
    Tc(u64),
    /// At the XDP hook: `XDP_*`.
    Xdp(u64),
}

/// Begins a section: what a stream starts with.
pub fn section(out: &mut Vec<u8>, application: &str) {
    block(out, SECTION_HEADER, |out| {
        out.extend(BYTE_ORDER_MAGIC.to_ne_bytes());
        // Version 1.0.
        out.extend(1_u16.to_ne_bytes());
        out.extend(0_u16.to_ne_bytes());
        out.extend(LENGTH_UNKNOWN.to_ne_bytes());
        option(out, SECTION_OS, b"Linux");
        option(out, SECTION_APPLICATION, application.as_bytes());
        option(out, END_OF_OPTIONS, &[]);
    });
}

/// Describes an Ethernet interface.
pub fn interface(out: &mut Vec<u8>, name: &str) {
    block(out, INTERFACE, |out| {
        out.extend(ETHERNET.to_ne_bytes());
        out.extend([0; 2]);
        out.extend(LENGTH_UNBOUNDED.to_ne_bytes());
        option(out, INTERFACE_NAME, name.as_bytes());
        option(out, INTERFACE_RESOLUTION, &[NANOSECONDS]);
        option(out, END_OF_OPTIONS, &[]);
    });
}

/// Adds a packet.
pub fn packet(out: &mut Vec<u8>, packet: &Packet<'_>) {
    block(out, ENHANCED_PACKET, |out| {
        out.extend(packet.interface.to_ne_bytes());
        out.extend(((packet.unix_ns >> 32) as u32).to_ne_bytes());
        out.extend((packet.unix_ns as u32).to_ne_bytes());
        out.extend((packet.bytes.len() as u32).to_ne_bytes());
        out.extend(packet.length.to_ne_bytes());
        padded(out, packet.bytes);
        option(out, COMMENT, packet.comment.as_bytes());
        option(out, PACKET_FLAGS, &INBOUND.to_ne_bytes());
        let (kind, verdict) = match packet.verdict {
            Verdict::Tc(verdict) => (1, verdict),
            Verdict::Xdp(verdict) => (2, verdict),
        };
        option(out, PACKET_VERDICT, &[&[kind][..], &verdict.to_ne_bytes()].concat());
        option(out, END_OF_OPTIONS, &[]);
    });
}

fn block(out: &mut Vec<u8>, kind: u32, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend(kind.to_ne_bytes());
    // Known once the body is there.
    out.extend([0; 4]);
    body(out);
    let length = ((out.len() - start + 4) as u32).to_ne_bytes();
    out.extend(length);
    out[start + 4..start + 8].copy_from_slice(&length);
}

fn option(out: &mut Vec<u8>, code: u16, value: &[u8]) {
    let value = &value[..value.len().min(u16::MAX.into())];
    out.extend(code.to_ne_bytes());
    out.extend((value.len() as u16).to_ne_bytes());
    padded(out, value);
}

fn padded(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend(bytes);
    out.extend(&[0; 3][..bytes.len().next_multiple_of(4) - bytes.len()]);
}
