//! A held frame: translated already, and addressed to a location when it is sent.

use std::time::Instant;

use lb_core::packet::LINK_HEADER;
use lb_core::process::address;
use lb_core::record::Location;
use lb_core::{Mode, Packet, V4, V6, encapsulate};

/// Room before a frame for the largest outer header.
const HEADROOM: usize = 40;

/// A frame that waits.
#[derive(Debug)]
pub struct HeldFrame {
    /// When it was taken out of the capture ring.
    pub at: Instant,
    bytes: Box<[u8]>,
    /// Where the frame starts in `bytes`: where there is room before it, it goes through the site's tunnel.
    start: usize,
}

impl HeldFrame {
    /// Keeps a frame as it was captured.
    pub fn new(at: Instant, frame: &[u8], mode: Mode) -> Self {
        if mode == Mode::Dsr {
            Self { at, bytes: [&[0; HEADROOM], frame].concat().into(), start: HEADROOM }
        } else {
            Self { at, bytes: frame.into(), start: 0 }
        }
    }

    /// The frame as it was captured.
    pub fn frame(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    /// The frame as it goes to a location, or `None` where it does not get there. May be asked again, for another
    /// location too.
    pub fn addressed(&mut self, location: &Location) -> Option<&mut [u8]> {
        let tunnelled = self.start > 0;
        let mut view = View { bytes: &mut self.bytes, start: self.start };
        if !tunnelled {
            address(&mut view, &location.link)?;
        } else if location.tunnel == 0 {
            return None;
        } else if view.bytes.get(view.start + LINK_HEADER)? >> 4 == 6 {
            encapsulate(V6, &mut view, location)?;
        } else {
            encapsulate(V4, &mut view, location)?;
        }
        let start = view.start;
        Some(&mut self.bytes[start..])
    }
}

/// A frame with room before it.
struct View<'f> {
    bytes: &'f mut [u8],
    start: usize,
}

impl Packet for View<'_> {
    fn window<const N: usize>(&mut self, offset: usize) -> Option<&mut [u8; N]> {
        self.bytes.get_mut(self.start + offset..self.start + offset + N)?.try_into().ok()
    }

    fn length(&self) -> usize {
        self.bytes.len() - self.start
    }

    fn insert<const N: usize>(&mut self) -> Option<()> {
        self.start = self.start.checked_sub(N)?;
        Some(())
    }

    fn truncate(&mut self, _: usize) -> Option<()> {
        // A held frame goes out as it came.
        None
    }
}

#[cfg(test)]
mod tests {
    use lb_core::host::{Frame, FrameBuilder, Segment};
    use lb_core::record::Link;

    use super::*;

    fn frame(source: &str, destination: &str) -> Frame {
        FrameBuilder {
            link: ([1; 6], [2; 6]),
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
            ttl: 9,
            segment: Segment::Udp { checksum: true },
            payload: vec![5; 20],
        }
        .build()
    }

    #[test]
    fn a_frame_is_addressed_to_whatever_location_is_asked_for_last() {
        let link = |n| Link::new(1, [n; 6], [9; 6]);
        let tunnels = [
            Location::tunnel4(link(3), 0, 0x0101_0101, 0x0202_0202),
            Location::tunnel6(link(4), 0, [1; 4], [2; 4]),
        ];
        for inner in [frame("10.0.0.1:1", "10.0.0.2:2"), frame("[fd00::1]:1", "[fd00::2]:2")] {
            let mut held = HeldFrame::new(Instant::now(), &inner.0, Mode::Dsr);
            for location in tunnels.iter().chain(&tunnels) {
                let mut expected = inner.clone();
                match inner.0[12] {
                    8 => encapsulate(V4, &mut expected, location),
                    _ => encapsulate(V6, &mut expected, location),
                }
                .unwrap();
                // A second location finds the frame's head overwritten by the first one's outer header.
                let again =
                    HeldFrame::new(held.at, &inner.0, Mode::Dsr).addressed(location).map(|f| f.to_vec());
                assert_eq!(again.unwrap(), expected.0);
                assert_eq!(held.addressed(location).unwrap(), expected.0);
            }
            assert_eq!(held.addressed(&Location::plain(link(5), 0)), None, "no tunnel");
        }
        let mut held = HeldFrame::new(Instant::now(), &frame("10.0.0.1:1", "10.0.0.2:2").0, Mode::Nat);
        assert_eq!(
            held.addressed(&tunnels[0]).unwrap()[..6],
            [3; 6],
            "translated, so not through the tunnel"
        );
    }
}
