//! The servers that a stack runs behind the load balancer.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use crate::{Site, address};

/// Transport protocol of a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// RFC 9293.
    Tcp,
    /// RFC 768.
    Udp,
}

impl Protocol {
    /// As configurations have it.
    pub fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        }
    }
}

/// A server, which is one backend.
#[derive(Clone, Debug)]
pub struct Workload {
    /// The backend's name.
    pub name: String,
    /// What its sockets are bound to: an address of [`address::backend4`] or [`address::backend6`], and a port.
    pub address: SocketAddr,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Working directory; the lab's scratch folder where it is `None`.
    pub dir: Option<PathBuf>,
    /// Where it starts.
    pub site: Site,
    /// What clients connect to.
    pub service: SocketAddr,
}

impl Workload {
    /// A redis server `redis-NUMBER` at backend address `number` (1 to [`address::BACKENDS`]), which starts at
    /// [`Site::A`]; clients reach it at the virtual address, port 6378 + `number`.
    pub fn redis(number: u8) -> Workload {
        Workload::redis_at(number, address::backend4(number).into(), address::VIRTUAL4.into())
    }

    /// The same over IPv6: `redis6-NUMBER`.
    pub fn redis6(number: u8) -> Workload {
        let workload = Workload::redis_at(number, address::backend6(number).into(), address::VIRTUAL6.into());
        Workload { name: format!("redis6-{number}"), ..workload }
    }

    fn redis_at(number: u8, address: IpAddr, service: IpAddr) -> Workload {
        const PORT: u16 = 6379;
        let bind = address.to_string();
        // Nothing is saved: what a migration carries is the only copy, as in the servers that need one.
        let command =
            ["redis-server", "--port", "6379", "--bind", &bind, "--protected-mode", "no", "--save", ""];
        Workload {
            name: format!("redis-{number}"),
            address: SocketAddr::new(address, PORT),
            protocol: Protocol::Tcp,
            command: command.map(str::to_owned).to_vec(),
            dir: None,
            site: Site::A,
            service: SocketAddr::new(service, PORT + u16::from(number) - 1),
        }
    }
}
