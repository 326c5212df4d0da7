//! What of a sampled packet goes into a capture.

use lb_core::{Class, Reason};

use super::format::{self, Verdict};

/// What HTTP calls a pcap-ng stream.
pub const MEDIA_TYPE: &str = "application/x-pcapng";

/// Where packets of an interface are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hook {
    /// In the driver, or before traffic control.
    #[default]
    Xdp,
    /// In traffic control.
    Tc,
}

/// An interface as a capture shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Where its packets are taken.
    pub hook: Hook,
}

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
    /// The interfaces' own numbers and hooks, by the number that the stream gives them.
    interfaces: Vec<(u32, Hook)>,
}

impl Recorder {
    /// A recorder, and what its stream begins with.
    pub fn new(epoch_unix_ns: u64) -> (Self, Vec<u8>) {
        let mut head = Vec::new();
        format::section(&mut head, concat!("Drover ", env!("CARGO_PKG_VERSION")));
        (Self { epoch_unix_ns, interfaces: Vec::new() }, head)
    }

    /// Appends a sample to `out`, and its interface before it where it is new. `describe` is asked about
    /// interfaces by number.
    pub fn record(
        &mut self,
        sample: &Sample,
        describe: impl FnOnce(u32) -> Option<Interface>,
        out: &mut Vec<u8>,
    ) {
        let known = self.interfaces.iter().position(|(number, _)| *number == sample.interface);
        let interface = known.unwrap_or_else(|| {
            let gone =
                || Interface { name: format!("interface {}", sample.interface), hook: Hook::default() };
            let Interface { name, hook } = describe(sample.interface).unwrap_or_else(gone);
            format::interface(out, &name);
            self.interfaces.push((sample.interface, hook));
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
            verdict: verdict(self.interfaces[interface].1, sample.reason),
        };
        format::packet(out, &packet);
    }
}

/// What the hook's program returned; a held packet is dropped as far as the kernel is concerned.
fn verdict(hook: Hook, reason: Option<Reason>) -> Verdict {
    // `linux/bpf.h` and `linux/pkt_cls.h`: drop, pass, redirect.
    let (xdp, tc) = match reason.map(Reason::class) {
        Some(Class::Hold | Class::Drop) => (1, 2),
        // To traffic control: unspecified, -1.
        Some(Class::Pass) | None => (2, u64::MAX),
        Some(Class::Forward) => (4, 7),
    };
    match hook {
        Hook::Xdp => Verdict::Xdp(xdp),
        Hook::Tc => Verdict::Tc(tc),
    }
}
