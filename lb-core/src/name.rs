//! How a packet is named whose name takes more than a look at its headers: fragments, of which only the first has ports,
//! so that it is remembered what they were (RFC 791, section 3.2; RFC 8200, section 4.5).

use crate::decide::{TCP, Transport, UDP};
use crate::family::{Family, Fragment, IpHeader};
use crate::flow::FlowKey;
use crate::packet::{Packet, read32};
use crate::process::Step;
use crate::reason::Reason;
use crate::tables::Tables;

const TCP_FLAGS: usize = 13;

/// What the fragments of a datagram have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C)]
pub struct FragmentKey<const W: usize> {
    /// Source address.
    pub source: [u32; W],
    /// Destination address.
    pub destination: [u32; W],
    /// The datagram's identification.
    pub id: u32,
    /// IP protocol number of its transport.
    pub protocol: u32,
}

/// Which part of a datagram a packet has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// With the transport header.
    Transport {
        /// [`TCP`] or [`UDP`].
        protocol: u8,
        /// Where the header lies in the frame.
        at: usize,
    },
    /// A later fragment, without it.
    Later,
}

/// A packet's name, and what decisions need beside it.
pub(crate) struct Named<const W: usize> {
    pub key: FlowKey<W>,
    pub transport: Transport,
    pub part: Part,
}

/// Names a TCP or UDP packet, or says what else is to be done with it.
#[inline(always)]
pub(crate) fn name<const W: usize, F: Family<W>, P: Packet, T: Tables<W>>(
    family: F,
    packet: &mut P,
    tables: &T,
) -> Result<Named<W>, Step> {
    let IpHeader { source, destination, mut protocol, ttl, is_fragment } = match family.parse(packet) {
        Ok(header) => header,
        Err(reason) => return Err(Step::Refuse(reason)),
    };
    if protocol == F::ICMP && !is_fragment {
        return Err(Step::Icmp);
    }
    let mut at = F::TRANSPORT;
    let mut id = 0;
    if is_fragment {
        let Some(fragment) = family.fragment(packet) else {
            return Err(Step::Refuse(Reason::Truncated));
        };
        Fragment { id, protocol, at, .. } = fragment;
        if !fragment.is_first {
            let remembered = FragmentKey { source, destination, id, protocol: protocol as u32 };
            let Some(ports) = tables.fragment(&remembered) else {
                return Err(Step::Refuse(Reason::UnknownFragment));
            };
            return Ok(Named {
                key: FlowKey { source, destination, ports, protocol: protocol as u32 },
                transport: Transport { protocol, ttl, flags: 0 },
                part: Part::Later,
            });
        }
    }
    let truncated = if is_fragment { Reason::BadFragment } else { Reason::Truncated };
    let (ports, flags) = if protocol == TCP {
        match packet.window::<20>(at) {
            Some(header) => (read32(header, 0), header[TCP_FLAGS]),
            None => return Err(Step::Refuse(truncated)),
        }
    } else if protocol == UDP {
        match packet.window::<8>(at) {
            Some(header) => (read32(header, 0), 0),
            None => return Err(Step::Refuse(truncated)),
        }
    } else {
        return Err(Step::Refuse(Reason::OtherProtocol));
    };
    if is_fragment {
        tables.put_fragment(&FragmentKey { source, destination, id, protocol: protocol as u32 }, ports);
    }
    Ok(Named {
        key: FlowKey { source, destination, ports, protocol: protocol as u32 },
        transport: Transport { protocol, ttl, flags },
        part: Part::Transport { protocol, at },
    })
}
