//! What a packet of a TUN device is on the wire.
//!
//! In front of each packet is a `virtio_net_hdr` (linux/virtio_net.h): flags and kind of segmentation (a byte each),
//! header length, segment size, checksum start and offset (two bytes each, in the machine's order).

use super::queue::Size;

/// Length of the `virtio_net_hdr`.
pub(crate) const PREFIX_BYTES: usize = 10;
/// Length of an Ethernet header, which a TUN device's packets do without.
const ETHERNET_BYTES: u64 = 14;
/// Kinds of segmentation, without the bit for ECN.
const GSO_NONE: u8 = 0;
const GSO_TCP4: u8 = 1;
const GSO_TCP6: u8 = 4;
const GSO_ECN: u8 = 0x80;

/// The size of `packet`, which begins with its `virtio_net_hdr`; `None` if it is shorter than that.
pub(crate) fn size(packet: &[u8]) -> Option<Size> {
    let (prefix, ip) = packet.split_first_chunk::<PREFIX_BYTES>()?;
    let whole = Size { frames: 1, bytes: ip.len() as u64 + ETHERNET_BYTES };
    let word = |at: usize| u16::from_ne_bytes([prefix[at], prefix[at + 1]]);
    let (kind, segment, transport) = (prefix[1] & !GSO_ECN, u64::from(word(4)), usize::from(word(6)));
    if kind == GSO_NONE || segment == 0 {
        return Some(whole);
    }
    let header = match kind {
        // The data offset, RFC 9293 section 3.1.
        GSO_TCP4 | GSO_TCP6 => ip.get(transport + 12).map_or(20, |offset| usize::from(offset >> 4) * 4),
        _ => 8,
    };
    let headers = (transport + header).min(ip.len()) as u64;
    let payload = ip.len() as u64 - headers;
    let frames = payload.div_ceil(segment).max(1);
    Some(Size { frames, bytes: payload + frames * (headers + ETHERNET_BYTES) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(kind: u8, segment: u16, transport: u16, length: usize, offset: u8) -> Vec<u8> {
        let mut bytes = vec![0; PREFIX_BYTES + length];
        bytes[1] = kind;
        bytes[4..6].copy_from_slice(&segment.to_ne_bytes());
        bytes[6..8].copy_from_slice(&transport.to_ne_bytes());
        if let Some(byte) = bytes.get_mut(PREFIX_BYTES + usize::from(transport) + 12) {
            *byte = offset << 4;
        }
        bytes
    }

    #[test]
    fn large_segments_count_as_the_frames_they_would_be() {
        let rows = [
            ("a plain packet", packet(0, 0, 0, 1500, 0), 1, 1514),
            ("TCP with timestamps, two full frames", packet(1, 1448, 20, 52 + 2 * 1448, 8), 2, 2 * 1514),
            ("and a byte more", packet(1, 1448, 20, 52 + 2 * 1448 + 1, 8), 3, 2 * 1514 + 67),
            ("with ECN", packet(0x81, 1448, 20, 52 + 2 * 1448, 8), 2, 2 * 1514),
            ("over IPv6", packet(4, 1440, 40, 60 + 3 * 1440, 5), 3, 3 * 1514),
            ("UDP", packet(5, 1472, 20, 28 + 2 * 1472, 0), 2, 2 * 1514),
            ("a header that is cut off", packet(1, 1448, 20, 25, 8), 1, 39),
        ];
        for (what, packet, frames, bytes) in rows {
            assert_eq!(size(&packet), Some(Size { frames, bytes }), "{what}");
        }
        assert_eq!(size(&[0; PREFIX_BYTES - 1]), None);
    }
}
