//! The systems: how each is set up between client and server, and what it can carry. Nothing of them is left when their
//! place is gone.

mod drover;
mod haproxy;
mod nftables;
mod nginx;

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use bench::path::report::Links;
use lab::Site;
use lab::address;
use lab::process::Process;

use crate::place::{Offloads, Place};

/// What carries packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum System {
    /// The kernel forwards; the client asks the server's own address.
    Routing,
    /// One nftables rule translates the virtual address.
    NftDnat,
    /// The same, and known flows bypass the kernel's forwarding.
    NftFlowtable,
    /// haproxy in TCP mode.
    Haproxy,
    /// nginx's stream module.
    NginxStream,
    /// Drover at one of its hooks, in one of its modes.
    Drover(Hook, Mode),
}

pub use drover::{Hook, Mode};

use System::{Drover, Haproxy, NftDnat, NftFlowtable, NginxStream, Routing};

/// A system that is set up. Dropping it ends its processes; its rules go with its place.
pub struct Running {
    system: System,
    processes: Vec<Process>,
}

impl Running {
    /// An error if one of its processes has ended.
    pub fn check(&mut self) -> anyhow::Result<()> {
        match self.processes.iter_mut().find_map(|process| process.ended().map(|_| process)) {
            Some(process) => Err(process.not_ready("ended").into()),
            None => Ok(()),
        }
    }

    /// An error if it carries packets otherwise than it was told to.
    pub fn verify(&self, place: &Place) -> anyhow::Result<()> {
        match self.system {
            Drover(hook, _) => drover::verify(place, hook),
            _ => Ok(()),
        }
    }
}

impl System {
    /// All, in the order of the report.
    pub const ALL: [System; 11] = [
        Routing,
        NftDnat,
        NftFlowtable,
        Haproxy,
        NginxStream,
        Drover(Hook::Xdp, Mode::Nat),
        Drover(Hook::Xdp, Mode::Transparent),
        Drover(Hook::Xdp, Mode::Dsr),
        Drover(Hook::Tc, Mode::Nat),
        Drover(Hook::Tc, Mode::Transparent),
        Drover(Hook::Tc, Mode::Dsr),
    ];

    /// As in the report and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Routing => "routing",
            NftDnat => "nft-dnat",
            NftFlowtable => "nft-flowtable",
            Haproxy => "haproxy",
            NginxStream => "nginx-stream",
            Drover(hook, mode) => drover::name(hook, mode),
        }
    }

    /// The system of this name.
    pub fn parse(name: &str) -> Result<System, String> {
        let names = Self::ALL.map(System::name).join(", ");
        Self::ALL.into_iter().find(|one| one.name() == name).ok_or(format!("expected one or more of {names}"))
    }

    /// The offloads for these links; none where they are what [`Links::Same`] are anyway.
    pub fn offloads(self, links: Links) -> Option<Offloads> {
        match (links, self) {
            (Links::Same, _) => Some(Offloads::Off),
            // XDP programs see frames as they are, which TSO and checksum offload leave unfinished.
            (Links::Best, Drover(Hook::Xdp, _)) => None,
            (Links::Best, _) => Some(Offloads::On),
        }
    }

    /// Whether it carries UDP.
    pub fn has_udp(self) -> bool {
        self != Haproxy
    }

    /// Where clients connect.
    pub fn target(self, port: u16) -> SocketAddr {
        let address = if self == Routing { address::backend4(1) } else { address::VIRTUAL4 };
        SocketAddr::new(IpAddr::V4(address), port)
    }

    /// What is set and started for it, for the report.
    pub fn describe(self) -> String {
        match self {
            Routing => "ip_forward = 1, the client asks the backend's address".to_owned(),
            NftDnat => nftables::rules(false),
            NftFlowtable => nftables::rules(true),
            Haproxy => haproxy::CONFIG.to_owned(),
            NginxStream => nginx::CONFIG.to_owned(),
            Drover(hook, mode) => drover::describe(hook, mode),
        }
    }

    /// Why it cannot be measured here, if so.
    pub fn missing(self) -> Option<String> {
        let (program, package) = match self {
            Routing => return None,
            NftDnat | NftFlowtable => ("nft", "nftables"),
            Haproxy => ("haproxy", "haproxy"),
            NginxStream if nginx::module().is_none() => {
                return Some(
                    "nginx's stream module is not installed (package libnginx-mod-stream)".to_owned(),
                );
            }
            NginxStream => ("nginx", "nginx-light"),
            Drover(..) => return lab::program("lb").err().map(|error| error.to_string()),
        };
        find(program).is_none().then(|| format!("{program} is not installed (package {package})"))
    }

    /// Sets it up in a fresh place. It may take a moment until it carries packets.
    pub fn start(self, place: &Place) -> anyhow::Result<Running> {
        // All but Drover leave it to the kernel how the server is reached.
        if !matches!(self, Drover(..)) {
            place.lab().route(address::backend4(1).into(), Site::A)?;
        }
        let processes = match self {
            Routing => Vec::new(),
            NftDnat | NftFlowtable => {
                nftables::start(place, self == NftFlowtable)?;
                Vec::new()
            }
            Haproxy => vec![haproxy::start(place)?],
            NginxStream => vec![nginx::start(place)?],
            Drover(hook, mode) => drover::start(place, hook, mode)?,
        };
        Ok(Running { system: self, processes })
    }
}

/// Finds an installed program; administrators' folders are not on everybody's path.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    folders.map(|folder| folder.join(program)).find(|path| path.is_file())
}

/// Writes a configuration file into the place's folder, with what is known only now put in.
fn write_config(
    place: &Place,
    name: &str,
    template: &str,
    values: &[(&str, &Path)],
) -> anyhow::Result<PathBuf> {
    let known = [
        ("VIRTUAL", address::VIRTUAL4.to_string()),
        ("BACKEND", address::backend4(1).to_string()),
        ("NEXT_HOP", address::site4(Site::A).to_string()),
        ("NAT_SOURCE", address::NAT_SOURCE4.to_owned()),
        ("ADMIN", address::ADMIN.to_owned()),
    ];
    let mut text = template.to_owned();
    for (name, value) in known {
        text = text.replace(name, &value);
    }
    for (name, value) in values {
        text = text.replace(name, &value.display().to_string());
    }
    let path = place.lab().dir().join(name);
    std::fs::write(&path, text)?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_system_is_found_by_its_name() {
        for system in System::ALL {
            assert_eq!(System::parse(system.name()), Ok(system));
            assert!(system.offloads(Links::Same).is_some());
        }
        assert!(System::parse("ipvs").unwrap_err().contains("drover-xdp-nat"));
    }
}
