//! The lab: a client, a load balancer and two sites as network namespaces of this machine.
//!
//! ```text
//!   client                      lb                             site-a
//!   eth0 10.0.0.1   -----  c0 10.0.0.254   a0 10.2.1.254 ---- eth0 10.2.1.1     lo 10.1.0.1..4
//!        fd00::1           c0 10.0.0.100                           fd00:2:1::1     fd00:1::1..4
//!                          c0 fd00::100                           x0 10.3.0.1
//!                                                                   |
//!                                                              site-b  x0 10.3.0.2
//!                                          b0 10.2.2.254 ---- eth0 10.2.2.1     lo 10.1.0.1..4
//!                                                                  fd00:2:2::1     fd00:1::1..4
//! ```
//!
//! A [`Lab`] is made in a fraction of a second, can stand beside others, and is removed when it is
//! dropped; what a crashed process left behind is removed by the next one to make a lab.
//! [`stack::Stack`] starts our own processes in one: a daemon and an agent at each site. The link between the sites can
//! be given delay, rate, losses and cuts ([`Lab::join_sites`], [`link::Link`]).
//!
//! Here is no knowledge of what our processes do, only of how to start, reach and kill them.
//! Tests that use the lab are in this package's `tests/` and in the packages they test.

pub mod address;
pub mod bundle;
mod error;
pub mod http;
mod lab_id;
pub mod link;
mod namespace;
pub mod podman;
pub mod process;
pub mod processors;
mod programs;
mod remains;
pub mod stack;
mod topology;

use std::path::{Path, PathBuf};
use std::time::Duration;

pub use error::LabError;
pub use namespace::Namespace;
pub use programs::{installed, program};
pub use remains::sweep;

use lab_id::LabId;
use link::{Link, Spec};

/// One of the two places where a backend can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Site {
    /// Namespace `site-a`, called `ams` in configurations.
    A,
    /// Namespace `site-b`, called `fra` in configurations.
    B,
}

impl Site {
    /// Both, in order.
    pub const ALL: [Site; 2] = [Site::A, Site::B];

    /// The site's name in configurations and in the admin API.
    pub fn name(self) -> &'static str {
        match self {
            Site::A => "ams",
            Site::B => "fra",
        }
    }

    /// The one that is not this one.
    pub fn other(self) -> Site {
        match self {
            Site::A => Site::B,
            Site::B => Site::A,
        }
    }
}

/// Four namespaces joined by veth pairs, a scratch folder and a place for pins. Removed on drop, together with every
/// process that lives in one of the namespaces.
#[derive(Debug)]
pub struct Lab {
    id: LabId,
    client: Namespace,
    lb: Namespace,
    sites: [Namespace; 2],
    dir: PathBuf,
    /// Between the sites, in place of a plain one.
    link: Option<Link>,
}

impl Lab {
    /// Makes a lab; first removes what labs of crashed processes left behind. Needs root.
    pub fn new() -> Result<Lab, LabError> {
        if !nix::unistd::geteuid().is_root() {
            return Err(LabError::NotRoot);
        }
        remains::sweep()?;
        let id = LabId::next()?;
        Lab::build(&id).inspect_err(|_| remains::remove(&id))
    }

    fn build(id: &LabId) -> Result<Lab, LabError> {
        remains::mount_bpffs()?;
        let dir = id.dir();
        std::fs::create_dir(&dir)
            .map_err(LabError::io(format!("create the scratch folder {}", dir.display())))?;
        let [client, lb, site_a, site_b] = topology::create(id)?;
        Ok(Lab { id: id.clone(), client, lb, sites: [site_a, site_b], dir, link: None })
    }

    /// Where clients run.
    pub fn client(&self) -> &Namespace {
        &self.client
    }

    /// Where the load balancer runs.
    pub fn lb(&self) -> &Namespace {
        &self.lb
    }

    /// Where backends run.
    pub fn site(&self, site: Site) -> &Namespace {
        &self.sites[site as usize]
    }

    /// Scratch folder of this lab, on a tmpfs where the machine has one.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where this lab's daemon is to pin its tables; not created here.
    pub fn pin_path(&self) -> PathBuf {
        self.id.pin_path()
    }

    /// Adds routes to `backend` (an address of [`address::backend4`] or [`address::backend6`]) at `lb`, towards
    /// `site`: with them the lab carries packets between client and backend by plain routing.
    pub fn route(&self, backend: std::net::IpAddr, site: Site) -> Result<(), LabError> {
        topology::route(&self.lb, backend, site)
    }

    /// Gives both sites what servers need that answer clients directly: the virtual addresses on `lo`, a tunnel endpoint
    /// per family ([`address::tunnel4`], [`address::tunnel6`]), and links towards the load balancer on which a client's
    /// largest packet has room for an outer header.
    pub fn hold_virtual_addresses(&self) -> Result<(), LabError> {
        topology::hold_virtual_addresses(&self.lb, &self.sites)
    }

    /// Puts an emulated link in the place of the plain one between the sites: what agents send each other goes through
    /// it (the first way is [`Site::A`] to [`Site::B`]), under the same addresses, and nothing else does. TCP connections
    /// between the sites survive it; what is under way may be lost.
    pub fn join_sites(&mut self, spec: &Spec) -> Result<(), LabError> {
        // First goes what is there, since the names are the same.
        self.link = None;
        topology::remove_between(&self.sites)?;
        let link = Link::new(self.site(Site::A), self.site(Site::B), topology::BETWEEN, spec)?;
        topology::address_between(&self.sites)?;
        self.link = Some(link);
        Ok(())
    }

    /// Bytes that a site has sent to the other over the link between them, whichever link that is, since it was made.
    pub fn sent_between(&self, from: Site) -> Result<u64, LabError> {
        // The calling thread's namespace, which is not that of the process.
        let read = || std::fs::read_to_string("/proc/thread-self/net/dev");
        let text = self.site(from).run(read).map_err(LabError::io("read the counters of interfaces"))?;
        let sent = topology::sent_bytes(&text, topology::BETWEEN).ok_or(std::io::ErrorKind::NotFound.into());
        sent.map_err(LabError::io(format!("find the interface {} in /proc/net/dev", topology::BETWEEN)))
    }

    /// The emulated link between the sites, after [`Lab::join_sites`].
    pub fn link(&self) -> Option<&Link> {
        self.link.as_ref()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.link = None;
        remains::remove(&self.id);
    }
}

/// Polls `done` every 2 ms until it returns a value or `limit` has passed.
pub fn wait_for<T>(limit: Duration, mut done: impl FnMut() -> Option<T>) -> Option<T> {
    let end = std::time::Instant::now() + limit;
    loop {
        if let Some(value) = done() {
            return Some(value);
        }
        if std::time::Instant::now() >= end {
            return None;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
