//! The place where probes come from: a network namespace of the daemon's own, with one wire to the data path.
//!
//! ```text
//!   thread "probes"'s namespace               the daemon's namespace
//!   drover-probe  169.254.77.1  ------------  drover-pPID  [data path's program]  ---->  like any client's packets
//!                 fd77:d7:..::1
//! ```
//!
//! A probe is a client: its packets enter the data path over an interface, and only what the data path forwards
//! back to that interface is an answer. The namespace has no name and no holder but the thread, so the kernel
//! removes it, and the wire with it, when the daemon ends in whatever way.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};

use futures_util::TryStreamExt;
use lb_core::record::Link;
use nix::sched::{CloneFlags, unshare};
use rtnetlink::packet_route::link::{InfoData, InfoKind, InfoVeth};
use rtnetlink::packet_route::route::RouteScope;
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};

use super::offloads::{self, Offload};

/// The probes' end of the wire, in their own namespace.
const INNER: &str = "drover-probe";
/// Locally administered addresses: there is nobody else on the wire.
const INNER_ADDRESS: [u8; 6] = [0x02, 0xd7, 0x0e, 0x77, 0x00, 0x01];
const OUTER_ADDRESS: [u8; 6] = [0x02, 0xd7, 0x0e, 0x77, 0x00, 0x02];
const LOOPBACK: u32 = 1;

/// Where probes come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sources {
    /// Of IPv4 services.
    pub v4: Ipv4Addr,
    /// Of IPv6 services.
    pub v6: Ipv6Addr,
}

impl Default for Sources {
    fn default() -> Self {
        Self {
            v4: Ipv4Addr::new(169, 254, 77, 1),
            // A local prefix (RFC 4193) that nobody else has drawn.
            v6: Ipv6Addr::new(0xfd77, 0xd70e, 0x7e57, 0, 0, 0, 0, 1),
        }
    }
}

impl Sources {
    /// The one of the same family.
    pub fn like(&self, address: IpAddr) -> IpAddr {
        match address {
            IpAddr::V4(_) => self.v4.into(),
            IpAddr::V6(_) => self.v6.into(),
        }
    }
}

/// Why there is no place for probes.
#[derive(Debug, thiserror::Error)]
#[error(
    "health checks cannot be made: {doing} failed; the daemon needs the right to make network namespaces and \
         interfaces (CAP_SYS_ADMIN, CAP_NET_ADMIN)"
)]
pub struct NamespaceError {
    doing: &'static str,
    #[source]
    source: Box<dyn std::error::Error + Send + Sync>,
}

fn failed<E>(doing: &'static str) -> impl FnOnce(E) -> NamespaceError
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    move |error| NamespaceError { doing, source: error.into() }
}

/// The wire into the data path.
#[derive(Clone, Debug)]
pub struct Wire {
    /// The data path's end: an interface of the daemon's namespace.
    pub interface: String,
    /// Back to the probes.
    pub back: Link,
}

/// Moves the calling thread into a fresh namespace for the rest of its life and lays the wire. To be called on a
/// thread, within a runtime, that does nothing else: all its sockets from then on are probes'.
pub async fn enter(interface: &str, sources: Sources) -> Result<Wire, NamespaceError> {
    let home = std::fs::File::open("/proc/thread-self/ns/net").map_err(failed("looking at the namespace"))?;
    let home = OwnedFd::from(home);
    // A netlink socket stays in the namespace where it was made.
    let outside = netlink().map_err(failed("opening a netlink socket"))?;
    unshare(CloneFlags::CLONE_NEWNET).map_err(failed("making a network namespace"))?;
    let inside = netlink().map_err(failed("opening a netlink socket"))?;

    lay(&inside, interface, &home).await.map_err(failed("making the probes' interfaces"))?;
    let inner = raise(&inside, INNER).await.map_err(failed("starting the probes' interface"))?;
    let outer = raise(&outside, interface).await.map_err(failed("starting the data path's interface"))?;
    address(&inside, inner, sources).await.map_err(failed("giving addresses to the probes' interface"))?;
    // What leaves has to be complete, since the data path sends it on as it is. Joining makes the interface take
    // what the data path redirects to it.
    for (offload, on) in [
        (Offload::TransmitChecksum, false),
        (Offload::TcpSegmentation, false),
        (Offload::Segmentation, false),
        (Offload::Receive, true),
    ] {
        offloads::set(INNER, offload, on).map_err(failed("setting the probes' interface's offloads"))?;
    }
    Ok(Wire { interface: interface.to_owned(), back: Link::new(outer, INNER_ADDRESS, OUTER_ADDRESS) })
}

fn netlink() -> io::Result<Handle> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    tokio::spawn(connection);
    Ok(handle)
}

/// Makes both ends. Neither asks for neighbours or speaks to groups: frames go to the other end in any case.
async fn lay(inside: &Handle, interface: &str, home: &OwnedFd) -> Result<(), rtnetlink::Error> {
    let loopback = LinkUnspec::new_with_index(LOOPBACK).up().build();
    inside.link().set(loopback).execute().await?;
    let outer = LinkMessageBuilder::<LinkUnspec>::new()
        .name(interface)
        .setns_by_fd(home.as_raw_fd())
        .address(OUTER_ADDRESS.to_vec())
        .arp(false)
        .multicast(false)
        .build();
    let inner = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
        .name(INNER)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(outer)))
        .address(INNER_ADDRESS.to_vec())
        .arp(false)
        .multicast(false)
        .build();
    inside.link().add(inner).execute().await
}

/// Sets an interface up, which one end of a wire refuses while there is no other; its number.
async fn raise(handle: &Handle, interface: &str) -> Result<u32, rtnetlink::Error> {
    handle.link().set(LinkUnspec::new_with_name(interface).up().build()).execute().await?;
    let found = handle.link().get().match_name(interface.to_owned()).execute().try_next().await?;
    found.map(|link| link.header.index).ok_or(rtnetlink::Error::RequestFailed)
}

async fn address(inside: &Handle, interface: u32, sources: Sources) -> Result<(), rtnetlink::Error> {
    inside.address().add(interface, sources.v4.into(), 32).execute().await?;
    let route = RouteMessageBuilder::<Ipv4Addr>::new().output_interface(interface).scope(RouteScope::Link);
    inside.route().add(route.build()).execute().await?;
    // A machine without IPv6 has no IPv6 services either.
    let added = inside.address().add(interface, sources.v6.into(), 128).execute().await;
    if let Err(error) = added {
        tracing::info!(%error, "no IPv6 health checks on this machine");
        return Ok(());
    }
    let route = RouteMessageBuilder::<Ipv6Addr>::new().output_interface(interface).build();
    inside.route().add(route).execute().await
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::time::Duration;

    use super::*;
    use crate::config::Probe;
    use crate::health::prober::{Ailment, Finding, probe};

    fn interfaces() -> Vec<String> {
        let names = std::fs::read_dir("/proc/thread-self/net/dev_snmp6").into_iter().flatten().flatten();
        names.map(|name| name.file_name().to_string_lossy().into_owned()).collect()
    }

    /// Runs a future on a thread whose namespace may be left.
    fn on_a_thread<T: Send + 'static>(work: impl AsyncFnOnce() -> T + Send + 'static) -> T {
        let run = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(work())
        };
        std::thread::spawn(run).join().unwrap()
    }

    #[test]
    fn the_wire_leads_to_the_data_paths_end_and_goes_with_its_thread() {
        // All of it in a namespace of this test's own.
        let (before, during, after, found) = on_a_thread(async || {
            unshare(CloneFlags::CLONE_NEWNET).expect("tests of namespaces are run by root");
            let before = interfaces();
            let (laid, waits) = tokio::sync::oneshot::channel();
            let (look, looked) = std::sync::mpsc::channel::<()>();
            let probes = std::thread::spawn(move || {
                on_a_thread_here(async move {
                    let wire = enter("drover-p1", Sources::default()).await.unwrap();
                    let mut found = Vec::new();
                    for (from, to) in [
                        ("169.254.77.1:1024", "198.51.100.1:80"),
                        ("[fd77:d70e:7e57::1]:1024", "[2001:db8::1]:80"),
                    ] {
                        let (from, to): (SocketAddr, SocketAddr) =
                            (from.parse().unwrap(), to.parse().unwrap());
                        found.push(probe(&Probe::Tcp, from, to, to, Duration::from_millis(100)).await);
                    }
                    laid.send(wire).unwrap();
                    looked.recv().unwrap();
                    found
                })
            });
            let wire = waits.await.unwrap();
            let during = interfaces();
            let packets = received("drover-p1");
            assert!(packets >= 2, "{packets} packets came over the wire");
            assert_ne!(wire.back.interface, 0);
            look.send(()).unwrap();
            let found = probes.join().unwrap();
            // The kernel takes a namespace down in its own time.
            for _ in 0..500 {
                if !interfaces().contains(&wire.interface) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            (before, during, interfaces(), found)
        });
        assert!(during.contains(&"drover-p1".to_owned()), "{during:?}");
        assert_eq!(before, after);
        // Nobody is at the other end.
        let silent = Finding::Unwell(Ailment::Silent(Duration::from_millis(100)));
        assert_eq!(found, [silent.clone(), silent]);
    }

    fn on_a_thread_here<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
    }

    /// Packets that an interface has received (proc's dev table: name, bytes, packets).
    fn received(interface: &str) -> u64 {
        let table = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        let line = table.lines().find(|line| line.trim_start().starts_with(interface)).unwrap();
        line.split(':').nth(1).unwrap().split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}
