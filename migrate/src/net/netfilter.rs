//! The one request to nf_tables that is made without `nft`: deleting a table.
//!
//! The kernel is done with it in microseconds, but the end of whoever asked waits until every processor has
//! noticed (ten milliseconds and more), and clients may be waiting for the rules to go. So the answer is
//! taken from a socket of our own, and closing it is left to the background.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, socket,
};

const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_DELTABLE: u16 = 2;
const NFTA_TABLE_NAME: u16 = 1;
const NFPROTO_INET: u8 = 1;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
/// Of the message that is to be acknowledged.
const SEQUENCE: u32 = 2;
const HEADER_LEN: usize = 16;

/// Deletes a table of the family `inet`; one that is not there is deleted already. Gives what is still to be
/// closed, which may take its time.
pub fn delete_inet_table(name: &str) -> io::Result<OwnedFd> {
    let netlink = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )?;
    bind(netlink.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    send(netlink.as_raw_fd(), &delete_request(name), MsgFlags::empty())?;
    let mut answer = [0; 4096];
    loop {
        let len = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        match acknowledged(&answer[..len]) {
            None => {}
            Some(0) => return Ok(netlink),
            Some(errno) if errno == Errno::ENOENT as i32 => return Ok(netlink),
            Some(errno) => return Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

fn delete_request(name: &str) -> Vec<u8> {
    let mut attribute = Vec::with_capacity(4 + name.len() + 4);
    let len = u16::try_from(4 + name.len() + 1).unwrap_or(u16::MAX);
    attribute.extend_from_slice(&len.to_ne_bytes());
    attribute.extend_from_slice(&NFTA_TABLE_NAME.to_ne_bytes());
    attribute.extend_from_slice(name.as_bytes());
    attribute.push(0);
    attribute.resize(attribute.len().next_multiple_of(4), 0);

    let kind = (NFNL_SUBSYS_NFTABLES << 8) | NFT_MSG_DELTABLE;
    let mut batch = message(NFNL_MSG_BATCH_BEGIN, NLM_F_REQUEST, 1, 0, NFNL_SUBSYS_NFTABLES, &[]);
    batch.extend(message(kind, NLM_F_REQUEST | NLM_F_ACK, SEQUENCE, NFPROTO_INET, 0, &attribute));
    batch.extend(message(NFNL_MSG_BATCH_END, NLM_F_REQUEST, 3, 0, NFNL_SUBSYS_NFTABLES, &[]));
    batch
}

/// `nlmsghdr` and `nfgenmsg`, then the payload.
fn message(kind: u16, flags: u16, sequence: u32, family: u8, resource: u16, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(HEADER_LEN + 4 + payload.len()).unwrap_or(u32::MAX);
    let mut message = Vec::with_capacity(HEADER_LEN + 4 + payload.len());
    message.extend_from_slice(&len.to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&flags.to_ne_bytes());
    message.extend_from_slice(&sequence.to_ne_bytes());
    message.extend_from_slice(&0u32.to_ne_bytes());
    message.push(family);
    message.push(0);
    message.extend_from_slice(&resource.to_be_bytes());
    message.extend_from_slice(payload);
    message
}

/// The errno of the answer to our message, 0 for success; `None` if the packet has no answer to it.
fn acknowledged(mut packet: &[u8]) -> Option<i32> {
    let word = |at: usize, packet: &[u8]| Some(u32::from_ne_bytes(*packet.get(at..)?.first_chunk()?));
    while let Some(len) = word(0, packet) {
        let kind = u16::from_ne_bytes(*packet.get(4..)?.first_chunk()?);
        // A batch that is refused as a whole is answered with the number of its beginning.
        let sequence = word(8, packet)?;
        if kind == NLMSG_ERROR {
            let errno = -(word(HEADER_LEN, packet)?.cast_signed());
            if sequence == SEQUENCE || errno != 0 {
                return Some(errno);
            }
        }
        let next = usize::try_from(len).ok()?.max(HEADER_LEN).next_multiple_of(4);
        packet = packet.get(next..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_is_well_formed() {
        let request = delete_request("drover_a");
        let mut at = 0;
        let mut kinds = Vec::new();
        while at < request.len() {
            let len = u32::from_ne_bytes(*request[at..].first_chunk().unwrap()) as usize;
            kinds.push(u16::from_ne_bytes(*request[at + 4..].first_chunk().unwrap()));
            assert_eq!(len % 4, 0);
            at += len;
        }
        assert_eq!(at, request.len());
        assert_eq!(kinds, [0x10, 0x0a02, 0x11]);
        let name = &request[20 + 20..20 + 20 + 16];
        assert_eq!(name, [&13u16.to_ne_bytes()[..], &1u16.to_ne_bytes(), b"drover_a\0\0\0\0"].concat());
    }

    #[test]
    fn answers_are_told_apart() {
        let answer = |sequence, errno: i32| {
            let mut packet = message(NLMSG_ERROR, 0, sequence, 0, 0, &[0; 16]);
            packet[16..20].copy_from_slice(&(-errno).to_ne_bytes());
            packet
        };
        assert_eq!(acknowledged(&answer(SEQUENCE, 0)), Some(0));
        assert_eq!(acknowledged(&answer(SEQUENCE, 2)), Some(2));
        assert_eq!(acknowledged(&answer(1, 1)), Some(1));
        assert_eq!(acknowledged(&answer(1, 0)), None);
        assert_eq!(acknowledged(&[answer(3, 0), answer(SEQUENCE, 2)].concat()), Some(2));
        assert_eq!(acknowledged(&[1, 2, 3]), None);
    }
}
