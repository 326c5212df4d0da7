//! Frames as the wire has them, out of what a kernel hands around: segments merged to one large frame, and transport
//! checksums that are to be completed by the sender's network card.
//!
//! At the tc hook packets may come in either shape. A hold queue keeps wire frames only: bounds, order, absorption and
//! sending then know of nothing else.

use lb_core::checksum::fold;
use lb_core::decide::{TCP, UDP};

const LINK_HEADER: usize = 14;
const FIN: u8 = 0x01;
const PSH: u8 = 0x08;

/// Where the headers of a frame lie.
struct Shape {
    v6: bool,
    protocol: u8,
    transport: usize,
    /// Where the payload starts.
    payload: usize,
    /// Where the transport checksum lies.
    checksum: usize,
}

impl Shape {
    /// Of a whole TCP segment or UDP datagram without IP options.
    fn of(frame: &[u8]) -> Option<Self> {
        let (v6, protocol, transport) = match frame.get(12..14)? {
            [0x08, 0x00] if frame.get(14) == Some(&0x45) => {
                let is_fragment = *frame.get(20)? & 0x3f != 0 || *frame.get(21)? != 0;
                (false, if is_fragment { 0 } else { *frame.get(23)? }, LINK_HEADER + 20)
            }
            [0x86, 0xdd] => (true, *frame.get(20)?, LINK_HEADER + 40),
            _ => return None,
        };
        let (payload, checksum) = match protocol {
            TCP => (transport + usize::from(frame.get(transport + 12)? >> 4) * 4, transport + 16),
            UDP => (transport + 8, transport + 6),
            _ => return None,
        };
        (payload <= frame.len()).then_some(Self { v6, protocol, transport, payload, checksum })
    }

    /// The sum of the pseudo header (RFC 9293, section 3.1; RFC 8200, section 8.1).
    fn pseudo_header(&self, frame: &[u8]) -> u64 {
        let addresses = if self.v6 { &frame[22..54] } else { &frame[26..34] };
        sum(addresses) + (frame.len() - self.transport) as u64 + u64::from(self.protocol)
    }

    /// Writes lengths and checksums of a frame that was cut or has a partial checksum.
    fn complete(&self, frame: &mut [u8]) {
        let length = frame.len();
        if self.v6 {
            frame[18..20].copy_from_slice(&((length - LINK_HEADER - 40) as u16).to_be_bytes());
        } else {
            frame[16..18].copy_from_slice(&((length - LINK_HEADER) as u16).to_be_bytes());
            frame[24..26].fill(0);
            let checksum = !fold(sum(&frame[LINK_HEADER..self.transport]));
            frame[24..26].copy_from_slice(&checksum.to_be_bytes());
        }
        if self.protocol == UDP {
            let at = self.transport + 4;
            frame[at..at + 2].copy_from_slice(&((length - self.transport) as u16).to_be_bytes());
        }
        frame[self.checksum..self.checksum + 2].fill(0);
        let mut checksum = !fold(self.pseudo_header(frame) + sum(&frame[self.transport..]));
        if checksum == 0 && self.protocol == UDP {
            checksum = 0xffff;
        }
        frame[self.checksum..self.checksum + 2].copy_from_slice(&checksum.to_be_bytes());
    }

    /// Whether the transport checksum covers the pseudo header only.
    fn is_partial(&self, frame: &[u8]) -> bool {
        let found = u16::from_be_bytes([frame[self.checksum], frame[self.checksum + 1]]);
        let pseudo_header = self.pseudo_header(frame);
        // The whole frame is summed only where that is the question: nearly no complete checksum gets there.
        found == fold(pseudo_header) && fold(pseudo_header + sum(&frame[self.transport..])) != 0xffff
    }

    /// The frames that were merged to one.
    fn cut(&self, frame: &[u8], segment: usize) -> Vec<Vec<u8>> {
        let (headers, payload) = frame.split_at(self.payload);
        let pieces = payload.len().div_ceil(segment);
        payload
            .chunks(segment)
            .enumerate()
            .map(|(number, piece)| {
                let mut wire = [headers, piece].concat();
                if !self.v6 {
                    add16(&mut wire, LINK_HEADER + 4, number as u16);
                }
                if self.protocol == TCP {
                    add32(&mut wire, self.transport + 4, (number * segment) as u32);
                    if number + 1 < pieces {
                        wire[self.transport + 13] &= !(FIN | PSH);
                    }
                }
                self.complete(&mut wire);
                wire
            })
            .collect()
    }
}

/// What a frame is on the wire.
#[derive(Debug)]
pub enum WireFrames<'f> {
    /// Itself: nearly always, so nothing is copied for it.
    AsItCame(&'f [u8]),
    /// These, one at least.
    Made(Vec<Vec<u8>>),
}

impl WireFrames<'_> {
    /// How many frames.
    pub fn count(&self) -> usize {
        self.iter().count()
    }

    /// The frames in order.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        let (whole, made) = match self {
            Self::AsItCame(frame) => (Some(*frame), [].as_slice()),
            Self::Made(frames) => (None, frames.as_slice()),
        };
        whole.into_iter().chain(made.iter().map(Vec::as_slice))
    }
}

/// The wire frames that a frame stands for, in order. `segment` is the payload of each where many were merged, else 0.
pub fn wire_frames(frame: &[u8], segment: usize) -> WireFrames<'_> {
    let Some(shape) = Shape::of(frame) else { return WireFrames::AsItCame(frame) };
    if segment == 0 && !shape.is_partial(frame) {
        return WireFrames::AsItCame(frame);
    }
    if segment == 0 || frame.len() - shape.payload <= segment {
        let mut whole = frame.to_vec();
        shape.complete(&mut whole);
        return WireFrames::Made(vec![whole]);
    }
    WireFrames::Made(shape.cut(frame, segment))
}

fn add16(frame: &mut [u8], at: usize, more: u16) {
    let sum = u16::from_be_bytes([frame[at], frame[at + 1]]).wrapping_add(more);
    frame[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

fn add32(frame: &mut [u8], at: usize, more: u32) {
    let old = u32::from_be_bytes([frame[at], frame[at + 1], frame[at + 2], frame[at + 3]]);
    frame[at..at + 4].copy_from_slice(&old.wrapping_add(more).to_be_bytes());
}

/// The sum of 16-bit words; a last odd byte counts as a high one.
fn sum(bytes: &[u8]) -> u64 {
    bytes.chunks(2).map(|pair| u64::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]))).sum()
}

#[cfg(test)]
mod tests {
    use lb_core::host::{Frame, FrameBuilder, Segment};

    use super::*;

    fn frame(v6: bool, segment: Segment, payload: usize) -> Frame {
        let (source, destination) =
            if v6 { ("[fd00::1]:1", "[fd00::2]:2") } else { ("10.0.0.1:1", "10.0.0.2:2") };
        FrameBuilder {
            link: ([1; 6], [2; 6]),
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
            ttl: 64,
            segment,
            payload: (0..payload).map(|n| n as u8).collect(),
        }
        .build()
    }

    fn made(frame: &[u8], segment: usize) -> Vec<Vec<u8>> {
        let frames = wire_frames(frame, segment);
        let made: Vec<_> = frames.iter().map(<[u8]>::to_vec).collect();
        assert_eq!(made.len(), frames.count());
        made
    }

    #[test]
    fn a_wire_frame_stays_as_it_is() {
        for v6 in [false, true] {
            for segment in [Segment::Tcp { flags: 0x18 }, Segment::Udp { checksum: true }] {
                let frame = frame(v6, segment, 33);
                assert!(matches!(wire_frames(&frame.0, 0), WireFrames::AsItCame(same) if same == frame.0));
            }
        }
        assert_eq!(made(&[1, 2, 3], 0), [[1, 2, 3]]);
    }

    #[test]
    fn a_partial_checksum_is_completed() {
        for v6 in [false, true] {
            for (segment, at) in [(Segment::Tcp { flags: 0x18 }, 16), (Segment::Udp { checksum: true }, 6)] {
                let whole = frame(v6, segment, 33);
                let mut partial = whole.clone();
                let shape = Shape::of(&partial.0).unwrap();
                let sum = fold(shape.pseudo_header(&partial.0)).to_be_bytes();
                let at = shape.transport + at;
                partial.0[at..at + 2].copy_from_slice(&sum);
                assert_eq!(made(&partial.0, 0), [whole.0]);
            }
        }
    }

    #[test]
    fn merged_segments_come_apart() {
        for v6 in [false, true] {
            let merged = frame(v6, Segment::Tcp { flags: 0x19 }, 2_500);
            let frames = made(&merged.0, 1_000);
            let shape = Shape::of(&merged.0).unwrap();
            let mut payload: Vec<u8> = Vec::new();
            for (number, bytes) in frames.iter().enumerate() {
                let wire = Frame(bytes.clone());
                assert!(wire.has_true_checksums(), "{number} v6 {v6}");
                assert_eq!(wire.ends(), merged.ends());
                let sequence = &bytes[shape.transport + 4..shape.transport + 8];
                assert_eq!(sequence, (1 + 1_000 * number as u32).to_be_bytes());
                assert_eq!(bytes[shape.transport + 13], if number == 2 { 0x19 } else { 0x10 });
                payload.extend(&bytes[shape.payload..]);
            }
            assert_eq!(frames.len(), 3);
            assert_eq!(payload, &merged.0[shape.payload..]);

            let datagrams = made(&frame(v6, Segment::Udp { checksum: true }, 70).0, 30);
            assert_eq!(datagrams.len(), 3);
            assert!(datagrams.into_iter().all(|datagram| Frame(datagram).has_true_checksums()));
        }
    }
}
