//! What of a sampled packet goes into a capture.

use lb_core::{Class, Reason};

use super::format;

/// What HTTP calls a pcap-ng stream.
pub const MEDIA_TYPE: &str = "application/x-pcapng";

/// XDP's actions, from `linux/bpf.h`.
const XDP_DROP: u64 = 1;
const XDP_PASS: u64 = 2;
const XDP_REDIRECT: u64 = 4;

/// A packet that was sampled at its verdict, as it came in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Why the data path did what it did; `None` for a reason of another version.
    pub reason: Option<Reason>,
    /// Number of the interface that it came in on.
    pub interface: u32,
    /// Length of the packet in bytes.
    pub length: u32,
    /// Nanoseconds of the monotonic clock.
    pub time_ns: u64,
    /// The packet's first bytes.
    pub bytes: Box<[u8]>,
}

/// Turns samples into a pcap-ng stream.
#[derive(Debug)]
pub struct Recorder {
    /// What the monotonic clock's zero is, in nanoseconds since 1970.
    epoch_unix_ns: u64,
    /// Interfaces by the number that the stream gives them.
    interfaces: Vec<u32>,
}

impl Recorder {
    /// A recorder, and what its stream begins with.
    pub fn new(epoch_unix_ns: u64) -> (Self, Vec<u8>) {
        let mut head = Vec::new();
        format::section(&mut head, concat!("Drover ", env!("CARGO_PKG_VERSION")));
        (Self { epoch_unix_ns, interfaces: Vec::new() }, head)
    }

    /// Appends a sample to `out`, and its interface before it where it is new. `name` is asked for names of
    /// interfaces by number.
    pub fn record(&mut self, sample: &Sample, name: impl FnOnce(u32) -> Option<String>, out: &mut Vec<u8>) {
        let known = self.interfaces.iter().position(|known| *known == sample.interface);
        let interface = known.unwrap_or_else(|| {
            let name = name(sample.interface).unwrap_or_else(|| format!("interface {}", sample.interface));
            format::interface(out, &name);
            self.interfaces.push(sample.interface);
            self.interfaces.len() - 1
        });
        let comment = match sample.reason {
            Some(reason) => format!("{}: {}", reason.label(), reason.text()),
            None => "a reason that this version does not know".to_owned(),
        };
        let packet = format::Packet {
            interface: interface as u32,
            unix_ns: self.epoch_unix_ns.saturating_add(sample.time_ns),
            bytes: &sample.bytes,
            length: sample.length,
            comment: &comment,
            verdict: sample.reason.map_or(XDP_PASS, verdict),
        };
        format::packet(out, &packet);
    }
}

/// A held packet is dropped as far as the kernel is concerned.
fn verdict(reason: Reason) -> u64 {
    match reason.class() {
        Class::Forward => XDP_REDIRECT,
        Class::Hold | Class::Drop => XDP_DROP,
        Class::Pass => XDP_PASS,
    }
}
