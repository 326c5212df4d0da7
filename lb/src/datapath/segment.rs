//! What a TCP frame takes up in its flow's sequence space (RFC 9293, section 3.4).

use std::ops::Range;

/// Addresses, ports and family of a frame's flow, as on the wire; zeroes behind the shorter ones.
pub type Flow = [u8; 38];

/// A stretch of a flow's sequence space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First sequence number.
    pub from: u32,
    /// How many; SYN and FIN take one each.
    pub length: u32,
}

/// What a TCP frame says, as far as a queue cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Data, or the opening or end of a direction.
    Segment(Segment),
    /// An acknowledgement and nothing else. The next frame of its flow says the same again, or more.
    Acknowledgement,
    /// A reset, or what is not understood.
    Other,
}

const TCP: u8 = 6;
const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// Whether a frame opens a TCP connection.
pub fn opens(frame: &[u8]) -> bool {
    let flags = places(frame).and_then(|(_, transport, _)| frame.get(transport + 13));
    flags.is_some_and(|flags| flags & (SYN | ACK) == SYN)
}

/// Where the addresses and the TCP header of an Ethernet frame are, and where its datagram ends.
fn places(frame: &[u8]) -> Option<(Range<usize>, usize, usize)> {
    Some(match frame.get(12..14)? {
        // A fragment has no header, or not all that it speaks of.
        [0x08, 0x00]
            if frame.get(20)? & 0x3f == 0 && frame.get(21) == Some(&0) && frame.get(23) == Some(&TCP) =>
        {
            (26..34, 34, 14 + length(frame, 16)?)
        }
        [0x86, 0xdd] if frame.get(20) == Some(&TCP) => (22..54, 54, 54 + length(frame, 18)?),
        _ => return None,
    })
}

/// Flow and content of an Ethernet frame with TCP over IPv4 or IPv6 without options.
pub fn read(frame: &[u8]) -> Option<(Flow, Content)> {
    let (addresses, transport, end) = places(frame)?;
    let header = frame.get(transport..transport + 20)?;
    let flags = header[13];
    let mut flow = [0; 38];
    flow[..2].copy_from_slice(&frame[12..14]);
    let addresses = frame.get(addresses)?;
    flow[2..6].copy_from_slice(&header[..4]);
    flow[6..6 + addresses.len()].copy_from_slice(addresses);

    let payload = end.checked_sub(transport + usize::from(header[12] >> 4) * 4)?;
    let length = payload as u32 + u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
    let from = u32::from_be_bytes(header[4..8].try_into().ok()?);
    let content = match length {
        _ if flags & RST != 0 => Content::Other,
        0 if flags == ACK => Content::Acknowledgement,
        0 => Content::Other,
        _ => Content::Segment(Segment { from, length }),
    };
    Some((flow, content))
}

impl Segment {
    /// Whether all of the other lies in this one. Sequence numbers wrap.
    pub fn covers(self, other: Self) -> bool {
        let start = other.from.wrapping_sub(self.from);
        start.checked_add(other.length).is_some_and(|end| end <= self.length)
    }

    /// Adds the other where it follows this one or overlaps its end.
    pub fn extend(&mut self, other: Self) {
        let start = other.from.wrapping_sub(self.from);
        if start <= self.length {
            self.length = self.length.max(start.saturating_add(other.length));
        }
    }
}

fn length(frame: &[u8], at: usize) -> Option<usize> {
    Some(usize::from(u16::from_be_bytes(frame.get(at..at + 2)?.try_into().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn coverage_is_judged_across_the_wrap() {
        let segment = |from, length| Segment { from, length };
        let mut held = segment(u32::MAX - 9, 10);
        held.extend(segment(0, 30));
        assert_eq!(held, segment(u32::MAX - 9, 40));
        assert!(held.covers(segment(u32::MAX - 4, 10)));
        assert!(!held.covers(segment(25, 10)));
        assert!(!held.covers(segment(u32::MAX - 20, 5)));
        // Behind a gap: kept apart.
        held.extend(segment(100, 5));
        assert_eq!(held.length, 40);
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken(frame in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = read(&frame);
        }
    }
}
