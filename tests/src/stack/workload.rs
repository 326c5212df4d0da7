//! The servers that a stack runs behind the load balancer.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use crate::bundle::{self, Bundle};
use crate::error::LabError;
use crate::podman;
use crate::programs::installed;
use crate::{Lab, Site, address};

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

/// How packets get to a server and back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Both addresses are translated.
    #[default]
    Nat,
    /// Only the destination is; the server's answers are routed through the load balancer.
    Transparent,
    /// Through the site's tunnel as they are; the server is bound to the service's address and answers directly. The
    /// stack has to have tunnels then ([`StackOptions::tunnels`](super::StackOptions)).
    Dsr,
}

impl Mode {
    /// As configurations have it.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Nat => "nat",
            Mode::Transparent => "transparent",
            Mode::Dsr => "dsr",
        }
    }
}

/// When a workload's memory goes over, as the agents' configuration has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Memory {
    /// As its agents see fit.
    #[default]
    Auto,
    /// Before the server runs there.
    Pre,
    /// After the restore.
    Post,
}

impl Memory {
    /// As configurations have it.
    pub fn name(self) -> &'static str {
        match self {
            Memory::Auto => "auto",
            Memory::Pre => "pre",
            Memory::Post => "post",
        }
    }
}

/// The family of the tunnels to the sites.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tunnels {
    /// IPv4.
    V4,
    /// IPv6; they carry both families.
    V6,
}

/// Who runs a server at a site.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Runner {
    /// The agent, as a process.
    #[default]
    Agent,
    /// runc, in a container of a bundle that the stack makes ([`Workload::bundle`]).
    Runc,
    /// podman, in a container of an image that the stack makes.
    Podman,
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
    /// How their packets get to it.
    pub mode: Mode,
    /// When its memory goes over.
    pub memory: Memory,
    /// Who runs it.
    pub runner: Runner,
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
            mode: Mode::Nat,
            memory: Memory::Auto,
            runner: Runner::Agent,
        }
    }

    /// The same server in a container of runc's.
    pub fn in_container(self) -> Workload {
        Workload { runner: Runner::Runc, ..self }
    }

    /// The same server in a container of podman's.
    pub fn in_podman(self) -> Workload {
        Workload { runner: Runner::Podman, ..self }
    }

    /// The bundle of its container at a site.
    pub fn bundle(&self, lab: &Lab, site: Site) -> PathBuf {
        lab.dir().join(format!("{}-bundle-{}", self.name, site.name()))
    }

    /// The root folder of its containers, which is one for both sites.
    pub fn root(&self, lab: &Lab) -> PathBuf {
        lab.dir().join(format!("{}-root", self.name))
    }

    /// The control group of its container at a site.
    pub fn container_group(&self, lab: &Lab, site: Site) -> String {
        let id = lab.dir().file_name().and_then(|name| name.to_str()).expect("a lab's name is plain");
        format!("/{id}-{}-{}", site.name(), self.name)
    }

    /// Makes what its runner needs at both sites: nothing for a process.
    pub(super) fn make_containers(&self, lab: &Lab) -> Result<(), LabError> {
        if self.runner == Runner::Agent {
            return Ok(());
        }
        let (program, arguments) = self.command.split_first().expect("a workload has a program");
        let root = self.root(lab);
        bundle::fill_root(&root, &installed(program)?)?;
        if self.runner == Runner::Podman {
            podman::make_images(lab, &root)?;
            let create = |site| podman::create(lab, site, &self.name, &[], &self.contained()).map(drop);
            return Site::ALL.into_iter().try_for_each(create);
        }
        Site::ALL.into_iter().try_for_each(|site| {
            let cgroup = self.container_group(lab, site);
            let bundle = Bundle { root: &root, cgroup: &cgroup, network: None, criu_config: None, arguments };
            bundle.write(&self.bundle(lab, site))
        })
    }

    /// Its program and arguments inside of a container.
    pub fn contained(&self) -> Vec<&str> {
        let arguments = self.command.iter().skip(1).map(String::as_str);
        std::iter::once(bundle::PROGRAM).chain(arguments).collect()
    }

    /// The same server in another mode: where that is [`Mode::Dsr`] it is bound to the service's address, which its
    /// command has to name as it names the server's own.
    pub fn in_mode(mut self, mode: Mode) -> Workload {
        if mode == Mode::Dsr {
            let change = |word: &String| {
                if *word == self.address.ip().to_string() {
                    self.service.ip().to_string()
                } else if *word == self.address.port().to_string() {
                    self.service.port().to_string()
                } else if *word == self.address.to_string() {
                    self.service.to_string()
                } else {
                    word.clone()
                }
            };
            self.command = self.command.iter().map(change).collect();
            self.address = self.service;
        }
        Workload { mode, ..self }
    }
}
