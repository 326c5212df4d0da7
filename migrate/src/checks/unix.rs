//! Whom unix sockets are connected to, by sock_diag(7): both ends of a connection have to be dumped together.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

/// `SOCK_DIAG_BY_FAMILY`, linux/sock_diag.h.
const BY_FAMILY: u16 = 20;
/// `UDIAG_SHOW_NAME | UDIAG_SHOW_PEER | UDIAG_SHOW_ICONS`, linux/unix_diag.h.
const SHOW: u32 = 1 | 4 | 8;
/// `UNIX_DIAG_NAME`, `UNIX_DIAG_PEER`, `UNIX_DIAG_ICONS`.
const NAME: u16 = 0;
/// See [`NAME`].
const PEER: u16 = 2;
/// See [`NAME`].
const WAITING: u16 = 3;
/// See [`NAME`].
const SHUTDOWN: u16 = 6;
/// `RCV_SHUTDOWN | SEND_SHUTDOWN`: the other end is gone.
const BOTH_WAYS: u8 = 3;
/// `nlmsghdr`, `unix_diag_msg`, `nlattr` of linux/netlink.h.
const HEADER_LEN: usize = 16;
/// See [`HEADER_LEN`].
const MESSAGE_LEN: usize = 16;
/// See [`HEADER_LEN`].
const ATTRIBUTE_LEN: usize = 4;
const BUFFER_LEN: usize = 64 << 10;

/// What the kernel says of one socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Known {
    /// The other end's inode; 0 where that has not been accepted yet.
    peer: Option<u32>,
    /// Nothing comes or goes any more.
    is_over: bool,
    /// Ends of connections that this one has not accepted yet.
    waiting: Vec<u32>,
    /// A path, or `@` and an abstract name.
    name: Option<String>,
}

/// The unix sockets of this network namespace, by inode.
#[derive(Debug, Default)]
pub struct UnixSockets(HashMap<u32, Known>);

impl UnixSockets {
    /// Asks the kernel.
    pub fn here() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkSockDiag,
        )?;
        send(socket.as_raw_fd(), &request(), MsgFlags::empty())?;
        let mut all = Self::default();
        while all.take(&receive(&socket)?)? {}
        Ok(all)
    }

    /// The other end of a connection of the socket `inode`, in words, if it is none of `inside`.
    pub fn outside_peer(&self, inode: u32, inside: &HashSet<u32>) -> Option<String> {
        let known = self.0.get(&inode)?;
        let peer = known.peer?;
        if peer == 0 && known.is_over {
            return None;
        }
        if peer == 0 {
            // It waits in an accept queue: in whose?
            let listener = self.0.iter().find(|(_, known)| known.waiting.contains(&inode));
            return match listener {
                Some((listener, _)) if inside.contains(listener) => None,
                Some((listener, _)) => Some(self.name_of(*listener)),
                None => Some("a socket".to_owned()),
            };
        }
        (!inside.contains(&peer)).then(|| self.name_of(peer))
    }

    fn name_of(&self, inode: u32) -> String {
        let name = self.0.get(&inode).and_then(|known| known.name.as_ref());
        name.map_or_else(|| "a socket".to_owned(), |name| format!("{name:?}"))
    }

    /// Takes netlink messages; false after the last.
    fn take(&mut self, mut bytes: &[u8]) -> io::Result<bool> {
        let broken = || io::Error::from(io::ErrorKind::InvalidData);
        while bytes.len() >= HEADER_LEN {
            let len = read_u32(bytes, 0) as usize;
            let message = bytes.get(HEADER_LEN..len).ok_or_else(broken)?;
            match i32::from(read_u16(bytes, 4)) {
                libc::NLMSG_DONE => return Ok(false),
                libc::NLMSG_ERROR => {
                    let errno = message.get(..4).map(|errno| read_u32(errno, 0).cast_signed());
                    return Err(errno.map_or_else(broken, |errno| io::Error::from_raw_os_error(-errno)));
                }
                _ => {
                    let attributes = message.get(MESSAGE_LEN..).ok_or_else(broken)?;
                    self.0.insert(read_u32(message, 4), known(attributes).ok_or_else(broken)?);
                }
            }
            bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(true)
    }
}

/// A dump of all unix sockets: `nlmsghdr` and `unix_diag_req`.
fn request() -> Vec<u8> {
    let flags = u16::try_from(libc::NLM_F_REQUEST | libc::NLM_F_DUMP).expect("netlink's flags have 16 bits");
    let body_len = 24;
    let mut bytes = Vec::with_capacity(HEADER_LEN + body_len);
    bytes.extend_from_slice(&((HEADER_LEN + body_len) as u32).to_ne_bytes());
    bytes.extend_from_slice(&BY_FAMILY.to_ne_bytes());
    bytes.extend_from_slice(&flags.to_ne_bytes());
    bytes.extend_from_slice(&[0; 8]); // sequence, port
    bytes.extend_from_slice(&[libc::AF_UNIX as u8, 0, 0, 0]);
    bytes.extend_from_slice(&u32::MAX.to_ne_bytes()); // every state
    bytes.extend_from_slice(&0u32.to_ne_bytes()); // every inode
    bytes.extend_from_slice(&SHOW.to_ne_bytes());
    bytes.extend_from_slice(&[0xff; 8]); // no cookie
    bytes
}

fn receive(socket: &OwnedFd) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; BUFFER_LEN];
    let len = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
    buffer.truncate(len);
    Ok(buffer)
}

fn known(mut attributes: &[u8]) -> Option<Known> {
    let mut known = Known::default();
    while attributes.len() >= ATTRIBUTE_LEN {
        let len = usize::from(read_u16(attributes, 0));
        let value = attributes.get(ATTRIBUTE_LEN..len)?;
        match read_u16(attributes, 2) {
            NAME => known.name = Some(name(value)),
            PEER if value.len() >= 4 => known.peer = Some(read_u32(value, 0)),
            SHUTDOWN => known.is_over = value.first() == Some(&BOTH_WAYS),
            WAITING => known.waiting = value.chunks_exact(4).map(|inode| read_u32(inode, 0)).collect(),
            _ => {}
        }
        attributes = attributes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(known)
}

fn name(bytes: &[u8]) -> String {
    match bytes.strip_prefix(b"\0") {
        Some(abstract_name) => format!("@{}", String::from_utf8_lossy(abstract_name)),
        None => String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned(),
    }
}

fn read_u16(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).map_or(0, |bytes| u16::from_ne_bytes([bytes[0], bytes[1]]))
}

fn read_u32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |bytes| u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    fn inode(socket: impl AsFd) -> u32 {
        u32::try_from(nix::sys::stat::fstat(socket).unwrap().st_ino).unwrap()
    }

    #[test]
    fn a_pair_needs_both_ends() {
        let (one, other) = UnixStream::pair().unwrap();
        let (one, other) = (inode(&one), inode(&other));
        let all = UnixSockets::here().unwrap();
        assert_eq!(all.outside_peer(one, &HashSet::from([one, other])), None);
        assert_eq!(all.outside_peer(one, &HashSet::from([one])).unwrap(), "a socket");
    }

    #[test]
    fn a_listener_is_named_before_and_after_it_accepts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("outside.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let client = UnixStream::connect(&path).unwrap();
        let (listening, connected) = (inode(&listener), inode(&client));
        let all = UnixSockets::here().unwrap();
        let named = format!("{:?}", path.to_str().unwrap());
        assert_eq!(all.outside_peer(connected, &HashSet::from([connected])).unwrap(), named);
        assert_eq!(all.outside_peer(connected, &HashSet::from([connected, listening])), None);
        assert_eq!(all.outside_peer(listening, &HashSet::from([listening])), None);

        let (accepted, _) = listener.accept().unwrap();
        let all = UnixSockets::here().unwrap();
        assert_eq!(all.outside_peer(connected, &HashSet::from([connected, listening])).unwrap(), named);
        assert_eq!(all.outside_peer(connected, &HashSet::from([connected, inode(&accepted)])), None);
        drop(accepted);
        let all = UnixSockets::here().unwrap();
        assert_eq!(all.outside_peer(connected, &HashSet::from([connected])), None);
    }

    #[test]
    fn what_is_cut_off_is_an_error_and_no_panic() {
        let mut message = request();
        message[0] = 200;
        assert!(UnixSockets::default().take(&message).is_err());
        for len in 0..message.len() {
            let _ = UnixSockets::default().take(&message[..len]);
        }
    }
}
