//! The two requests to nf_tables that are made without `nft`, since clients wait for them: adding an element to a set,
//! and deleting a table.
//!
//! An `nft` takes milliseconds of a processor for what the kernel does in microseconds. And the end of whoever asked waits
//! until every processor has noticed (ten milliseconds and more); so the answer is taken from a socket of our own, and
//! closing it is left to the background.

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
const NFT_MSG_NEWSETELEM: u16 = 12;
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
const NFTA_SET_ELEM_LIST_SET: u16 = 2;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_SET_ELEM_TIMEOUT: u16 = 4;
const NFTA_DATA_VALUE: u16 = 1;
const NLA_F_NESTED: u16 = 1 << 15;
const NFPROTO_INET: u8 = 1;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_CREATE: u16 = 0x400;
/// Of the message that is to be acknowledged.
const SEQUENCE: u32 = 2;
const HEADER_LEN: usize = 16;

/// Deletes a table of the family `inet`; one that is not there is deleted already. Gives what is still to be
/// closed, which may take its time.
pub fn delete_inet_table(name: &str) -> io::Result<OwnedFd> {
    let done = ask(&batch(NFT_MSG_DELTABLE, 0, &text(NFTA_TABLE_NAME, name)))?;
    match done.errno {
        0 => Ok(done.to_close),
        errno if errno == Errno::ENOENT as i32 => Ok(done.to_close),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// Adds an element to a set of a table of the family `inet`, for good or for so many milliseconds. Gives what is still to
/// be closed, which may take its time.
pub fn add_to_inet_set(table: &str, set: &str, key: &[u8], timeout_ms: Option<u64>) -> io::Result<OwnedFd> {
    let mut element = attribute(NFTA_SET_ELEM_KEY | NLA_F_NESTED, &attribute(NFTA_DATA_VALUE, key));
    if let Some(timeout_ms) = timeout_ms {
        element.extend(attribute(NFTA_SET_ELEM_TIMEOUT, &timeout_ms.to_be_bytes()));
    }
    let mut payload = text(NFTA_SET_ELEM_LIST_TABLE, table);
    payload.extend(text(NFTA_SET_ELEM_LIST_SET, set));
    let list = attribute(NFTA_LIST_ELEM | NLA_F_NESTED, &element);
    payload.extend(attribute(NFTA_SET_ELEM_LIST_ELEMENTS | NLA_F_NESTED, &list));
    let done = ask(&batch(NFT_MSG_NEWSETELEM, NLM_F_CREATE, &payload))?;
    match done.errno {
        0 => Ok(done.to_close),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

struct Answered {
    /// 0 for success.
    errno: i32,
    to_close: OwnedFd,
}

fn ask(request: &[u8]) -> io::Result<Answered> {
    let netlink = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )?;
    bind(netlink.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    send(netlink.as_raw_fd(), request, MsgFlags::empty())?;
    let mut answer = [0; 4096];
    loop {
        let len = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        if let Some(errno) = acknowledged(&answer[..len]) {
            return Ok(Answered { errno, to_close: netlink });
        }
    }
}

/// `nlattr` and its payload, padded.
fn attribute(kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut attribute = Vec::with_capacity(4 + payload.len() + 4);
    attribute.extend_from_slice(&u16::try_from(4 + payload.len()).unwrap_or(u16::MAX).to_ne_bytes());
    attribute.extend_from_slice(&kind.to_ne_bytes());
    attribute.extend_from_slice(payload);
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    attribute
}

fn text(kind: u16, text: &str) -> Vec<u8> {
    attribute(kind, &[text.as_bytes(), b"\0"].concat())
}

/// A transaction of one message.
fn batch(kind: u16, flags: u16, payload: &[u8]) -> Vec<u8> {
    let kind = (NFNL_SUBSYS_NFTABLES << 8) | kind;
    let flags = NLM_F_REQUEST | NLM_F_ACK | flags;
    let mut batch = message(NFNL_MSG_BATCH_BEGIN, NLM_F_REQUEST, 1, 0, NFNL_SUBSYS_NFTABLES, &[]);
    batch.extend(message(kind, flags, SEQUENCE, NFPROTO_INET, 0, payload));
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
        let request = batch(NFT_MSG_DELTABLE, 0, &text(NFTA_TABLE_NAME, "drover_a"));
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
