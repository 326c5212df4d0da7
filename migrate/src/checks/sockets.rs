//! Addresses of a workload's sockets: which they are, and whether they are free at a site.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

use socket2::{Domain, SockRef, Socket, Type};

use super::problem::Problem;
use crate::protocol::Protocol;
use crate::protocol::manifest::NeededSocket;

/// Protocols over IP whose sockets CRIU dumps besides raw ones (`can_dump_ipproto` of its `sk-inet.c`).
const DUMPED: [i32; 6] = [
    libc::IPPROTO_IP,
    libc::IPPROTO_TCP,
    libc::IPPROTO_UDP,
    libc::IPPROTO_UDPLITE,
    libc::IPPROTO_ICMP,
    libc::IPPROTO_ICMPV6,
];

/// What a socket is to a checkpoint.
#[derive(Debug, PartialEq, Eq)]
pub enum Kind {
    /// One of the unix family.
    Unix,
    /// A socket with an address that the target has to have.
    Bound(NeededSocket),
    /// One that CRIU dumps and that needs nothing.
    Plain,
    /// One that CRIU does not dump.
    Unknown(String),
}

/// Looks at a socket.
pub fn kind_of(socket: &OwnedFd) -> io::Result<Kind> {
    let socket = SockRef::from(socket);
    match i32::from(socket.domain()?) {
        libc::AF_UNIX => Ok(Kind::Unix),
        libc::AF_NETLINK | libc::AF_PACKET => Ok(Kind::Plain),
        libc::AF_INET | libc::AF_INET6 => internet(&socket),
        family => Ok(Kind::Unknown(format!("a socket of address family {family}"))),
    }
}

fn internet(socket: &SockRef<'_>) -> io::Result<Kind> {
    let kind = socket.r#type()?;
    if kind == Type::RAW {
        return Ok(Kind::Plain);
    }
    let protocol = socket.protocol()?.map_or(0, i32::from);
    if !DUMPED.contains(&protocol) {
        let mptcp = if protocol == libc::IPPROTO_MPTCP {
            " (MPTCP; Go programs take GODEBUG=multipathtcp=0)"
        } else {
            ""
        };
        return Ok(Kind::Unknown(format!("a socket of IP protocol {protocol}{mptcp}")));
    }
    let Some(mut address) = socket.local_addr()?.as_socket() else { return Ok(Kind::Plain) };
    let (protocol, is_open) = match kind {
        Type::STREAM => (Protocol::Tcp, socket.is_listener()?),
        // One that is connected shares its port with others.
        _ => (Protocol::Udp, socket.peer_addr().is_err()),
    };
    if address.port() == 0 {
        return Ok(Kind::Plain);
    }
    if !is_open {
        // Thousands of connections may differ in nothing else.
        address.set_port(0);
    }
    Ok(Kind::Bound(NeededSocket { protocol, address, is_open }))
}

/// What is not free here.
pub fn compare(sockets: &[NeededSocket]) -> Vec<Problem> {
    sockets.iter().filter_map(|socket| compare_one(socket).err()).collect()
}

fn compare_one(needed: &NeededSocket) -> Result<(), Problem> {
    let address = needed.address;
    if !address.ip().is_unspecified() && !is_link_local(address.ip()) {
        let anywhere = SocketAddr::new(address.ip(), 0);
        bind(Protocol::Udp, anywhere).map_err(|source| Problem::Address { address: address.ip(), source })?;
    }
    if needed.is_open && !is_link_local(address.ip()) {
        let protocol = needed.protocol.as_str();
        bind(needed.protocol, address).map_err(|source| Problem::Port { address, protocol, source })?;
    }
    Ok(())
}

/// Such an address says nothing without its interface.
fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(six) if six.is_unicast_link_local())
}

/// As CRIU binds it; nothing is listened for, so nobody can connect.
fn bind(protocol: Protocol, address: SocketAddr) -> io::Result<()> {
    let kind = match protocol {
        Protocol::Tcp => Type::STREAM,
        Protocol::Udp => Type::DGRAM,
    };
    let socket = Socket::new(Domain::for_address(address), kind, None)?;
    // What is left of old TCP connections is not in the way. With UDP it would mean to share the port.
    socket.set_reuse_address(protocol == Protocol::Tcp)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn needed(protocol: Protocol, address: SocketAddr) -> NeededSocket {
        NeededSocket { protocol, address, is_open: true }
    }

    fn said(needed: NeededSocket) -> String {
        compare(&[needed]).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_port_that_is_taken_is_named() {
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let (tcp_at, udp_at) = (tcp.local_addr().unwrap(), udp.local_addr().unwrap());
        assert!(said(needed(Protocol::Tcp, tcp_at)).contains(&format!("{tcp_at}/tcp is taken there")));
        assert!(said(needed(Protocol::Udp, udp_at)).contains(&format!("{udp_at}/udp is taken there")));
        assert_eq!(said(NeededSocket { is_open: false, ..needed(Protocol::Tcp, tcp_at) }), "");
        drop((tcp, udp));
        assert_eq!(said(needed(Protocol::Tcp, tcp_at)), "");
        assert_eq!(said(needed(Protocol::Udp, udp_at)), "");
        assert_eq!(said(needed(Protocol::Tcp, ([0, 0, 0, 0], tcp_at.port()).into())), "");
    }

    #[test]
    fn an_address_that_is_not_held_is_named() {
        let text = said(needed(Protocol::Tcp, "203.0.113.7:80".parse().unwrap()));
        assert!(text.contains("bound to 203.0.113.7, which is not an address of this site"), "{text}");
    }

    #[test]
    fn sockets_are_told_apart() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let client = std::net::TcpStream::connect(address).unwrap();
        let local = client.local_addr().unwrap();
        let of = |socket: OwnedFd| kind_of(&socket).unwrap();
        assert_eq!(of(listener.into()), Kind::Bound(needed(Protocol::Tcp, address)));
        let expected = NeededSocket { is_open: false, ..needed(Protocol::Tcp, (local.ip(), 0).into()) };
        assert_eq!(of(client.into()), Kind::Bound(expected));
        assert_eq!(of(std::os::unix::net::UnixDatagram::unbound().unwrap().into()), Kind::Unix);
        let unbound = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
        assert_eq!(of(unbound.into()), Kind::Plain);
        let vsock = Socket::new(Domain::VSOCK, Type::STREAM, None);
        if let Ok(vsock) = vsock {
            assert_eq!(of(vsock.into()), Kind::Unknown("a socket of address family 40".into()));
        }
    }
}
