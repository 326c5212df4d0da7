//! From a site's locator to its location: link header, MTU and the tunnel's ends, from netlink.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::time::{Duration, Instant};

use futures_util::TryStreamExt;
use lb_core::record::{Link, Location};
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMetric};
use rtnetlink::{Handle, RouteMessageBuilder};

use super::tables::words;
use crate::datapath::{SitePlan, Tunnel};

/// How long a neighbour may take to answer an address resolution.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// Discard (RFC 863): where the datagram that makes the kernel resolve a neighbour goes.
const DISCARD_PORT: u16 = 9;

/// Why a locator leads nowhere.
#[derive(Debug, thiserror::Error)]
pub enum LocatorError {
    /// No route.
    #[error("there is no route to {0}")]
    NoRoute(IpAddr),
    /// The next hop does not answer.
    #[error("{0} does not answer address resolution")]
    NoNeighbour(IpAddr),
    /// No address of ours for the tunnel.
    #[error("no address of this machine leads to the tunnel's end {0}; set tunnel_source")]
    NoSource(IpAddr),
    /// The interface has no Ethernet address.
    #[error("interface {0} has no Ethernet address")]
    NoLinkAddress(u32),
    /// Netlink failed.
    #[error("netlink: {0}")]
    Netlink(#[from] rtnetlink::Error),
}

/// How a site is to be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Locator {
    /// Where frames go.
    pub next_hop: IpAddr,
    /// What packets are put into.
    pub tunnel: Option<Tunnel>,
}

impl Locator {
    /// A site's.
    pub fn of(site: &SitePlan) -> Self {
        Self { next_hop: site.next_hop, tunnel: site.tunnel }
    }
}

/// Resolves a locator, making the kernel ask for the next hop's address where it is not known yet, and waits for the
/// answer as long as `patience` says.
pub async fn resolve(
    handle: &Handle,
    locator: Locator,
    patience: Duration,
) -> Result<Location, LocatorError> {
    let way = route(handle, locator.next_hop).await?;
    let (own, mtu) = interface(handle, way.interface).await?;
    let mtu = way.mtu.map_or(mtu, |way| way.min(mtu));
    let neighbour = neighbour(handle, way.interface, way.neighbour, patience).await?;
    let link = Link::new(way.interface, neighbour, own);
    let Some(tunnel) = locator.tunnel else { return Ok(Location::plain(link, mtu)) };
    let source = match tunnel.source {
        Some(source) => source,
        // Where the endpoint itself has no route, the next hop's is the way.
        None => {
            let of_endpoint = route(handle, tunnel.endpoint).await.ok().and_then(|way| way.source);
            of_endpoint.or(way.source).ok_or(LocatorError::NoSource(tunnel.endpoint))?
        }
    };
    match (words(source), words(tunnel.endpoint)) {
        ([.., source4], [.., endpoint]) if source.is_ipv4() && tunnel.endpoint.is_ipv4() => {
            Ok(Location::tunnel4(link, mtu, source4, endpoint))
        }
        (from, to) if source.is_ipv6() && tunnel.endpoint.is_ipv6() => {
            Ok(Location::tunnel6(link, mtu, from, to))
        }
        _ => Err(LocatorError::NoSource(tunnel.endpoint)),
    }
}

/// The hardware address of a neighbour.
async fn neighbour(
    handle: &Handle,
    interface: u32,
    neighbour: IpAddr,
    patience: Duration,
) -> Result<[u8; 6], LocatorError> {
    let deadline = Instant::now() + patience;
    let mut asked = false;
    loop {
        if let Some(neighbour) = neighbour_address(handle, interface, neighbour).await? {
            return Ok(neighbour);
        }
        if !asked {
            asked = true;
            provoke_resolution(neighbour, interface);
        }
        if Instant::now() >= deadline {
            return Err(LocatorError::NoNeighbour(neighbour));
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// What the kernel would do with a packet.
struct Way {
    interface: u32,
    neighbour: IpAddr,
    /// Our address on the way there.
    source: Option<IpAddr>,
    mtu: Option<u32>,
}

async fn route(handle: &Handle, next_hop: IpAddr) -> Result<Way, LocatorError> {
    let question = match next_hop {
        IpAddr::V4(to) => RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(to, 32).build(),
        IpAddr::V6(to) => RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(to, 128).build(),
    };
    let unreachable = || LocatorError::NoRoute(next_hop);
    let answer = handle.route().get(question).execute().try_next().await.map_err(|_| unreachable())?;
    let answer = answer.ok_or_else(unreachable)?;
    let mut interface = None;
    let mut neighbour = next_hop;
    let (mut source, mut mtu) = (None, None);
    for attribute in answer.attributes {
        match attribute {
            RouteAttribute::Oif(index) => interface = Some(index),
            RouteAttribute::Gateway(RouteAddress::Inet(gateway)) => neighbour = gateway.into(),
            RouteAttribute::Gateway(RouteAddress::Inet6(gateway)) => neighbour = gateway.into(),
            RouteAttribute::PrefSource(RouteAddress::Inet(address)) => source = Some(address.into()),
            RouteAttribute::PrefSource(RouteAddress::Inet6(address)) => source = Some(address.into()),
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) if *mtu > 0 => Some(*mtu),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    Ok(Way { interface: interface.ok_or_else(unreachable)?, neighbour, source, mtu })
}

/// An interface's own hardware address and its MTU in bytes.
async fn interface(handle: &Handle, interface: u32) -> Result<([u8; 6], u32), LocatorError> {
    let mut links = handle.link().get().match_index(interface).execute();
    let link = links.try_next().await?;
    let (mut own, mut mtu) = (None, 0);
    for attribute in link.into_iter().flat_map(|link| link.attributes) {
        match attribute {
            LinkAttribute::Address(address) => own = address.try_into().ok(),
            LinkAttribute::Mtu(bytes) => mtu = bytes,
            _ => {}
        }
    }
    Ok((own.ok_or(LocatorError::NoLinkAddress(interface))?, mtu))
}

async fn neighbour_address(
    handle: &Handle,
    interface: u32,
    address: IpAddr,
) -> Result<Option<[u8; 6]>, LocatorError> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let mut neighbours = handle.neighbours().get().set_address_family(family).execute();
    while let Some(entry) = neighbours.try_next().await? {
        if entry.header.ifindex != interface {
            continue;
        }
        let mut is_it = false;
        let mut link_address = None;
        for attribute in entry.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => {
                    is_it = address == IpAddr::V4(ip)
                }
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => {
                    is_it = address == IpAddr::V6(ip)
                }
                NeighbourAttribute::LinkLayerAddress(bytes) => link_address = bytes.try_into().ok(),
                _ => {}
            }
        }
        // An entry that is still being resolved, or that failed, carries no link address.
        if is_it && link_address.is_some() {
            return Ok(link_address);
        }
    }
    Ok(None)
}

/// Sends an empty datagram to the neighbour. That it arrives does not matter, only that the kernel asks.
fn provoke_resolution(neighbour: IpAddr, interface: u32) {
    let target: std::net::SocketAddr = match neighbour {
        IpAddr::V4(v4) => (v4, DISCARD_PORT).into(),
        IpAddr::V6(v6) => std::net::SocketAddrV6::new(v6, DISCARD_PORT, 0, interface).into(),
    };
    let local: IpAddr =
        if neighbour.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let sent = UdpSocket::bind((local, 0)).and_then(|socket| socket.send_to(&[], target).map(drop));
    if let Err(error) = sent {
        tracing::debug!(%neighbour, %error, "could not provoke address resolution");
    }
}
