//! From a site's next hop to the link header that reaches it: route, neighbour and interface, from netlink.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::time::{Duration, Instant};

use futures_util::TryStreamExt;
use lb_core::record::Link;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute};
use rtnetlink::{Handle, RouteMessageBuilder};

/// How long a neighbour may take to answer an address resolution.
const PATIENCE: Duration = Duration::from_secs(2);

/// Discard (RFC 863): where the datagram that makes the kernel resolve a neighbour goes.
const DISCARD_PORT: u16 = 9;

/// Why a locator leads nowhere.
#[derive(Debug, thiserror::Error)]
pub enum LocatorError {
    /// No route.
    #[error("there is no route to {0}")]
    NoRoute(IpAddr),
    /// The next hop does not answer.
    #[error("{0} did not answer address resolution within {PATIENCE:?}")]
    NoNeighbour(IpAddr),
    /// The interface has no Ethernet address.
    #[error("interface {0} has no Ethernet address")]
    NoLinkAddress(u32),
    /// Netlink failed.
    #[error("netlink: {0}")]
    Netlink(#[from] rtnetlink::Error),
}

/// Resolves a next hop, making the kernel ask for its address where it is not known yet.
pub async fn resolve(handle: &Handle, next_hop: IpAddr) -> Result<Link, LocatorError> {
    let (interface, neighbour) = route(handle, next_hop).await?;
    let own = interface_address(handle, interface).await?;
    let deadline = Instant::now() + PATIENCE;
    let mut asked = false;
    loop {
        if let Some(neighbour) = neighbour_address(handle, interface, neighbour).await? {
            return Ok(Link::new(interface, neighbour, own));
        }
        if Instant::now() > deadline {
            return Err(LocatorError::NoNeighbour(neighbour));
        }
        if !asked {
            asked = true;
            provoke_resolution(neighbour, interface);
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Output interface and the neighbour to send to.
async fn route(handle: &Handle, next_hop: IpAddr) -> Result<(u32, IpAddr), LocatorError> {
    let question = match next_hop {
        IpAddr::V4(to) => RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(to, 32).build(),
        IpAddr::V6(to) => RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(to, 128).build(),
    };
    let unreachable = || LocatorError::NoRoute(next_hop);
    let answer = handle.route().get(question).execute().try_next().await.map_err(|_| unreachable())?;
    let answer = answer.ok_or_else(unreachable)?;
    let mut interface = None;
    let mut neighbour = next_hop;
    for attribute in answer.attributes {
        match attribute {
            RouteAttribute::Oif(index) => interface = Some(index),
            RouteAttribute::Gateway(RouteAddress::Inet(gateway)) => neighbour = gateway.into(),
            RouteAttribute::Gateway(RouteAddress::Inet6(gateway)) => neighbour = gateway.into(),
            _ => {}
        }
    }
    Ok((interface.ok_or_else(unreachable)?, neighbour))
}

async fn interface_address(handle: &Handle, interface: u32) -> Result<[u8; 6], LocatorError> {
    let mut links = handle.link().get().match_index(interface).execute();
    let link = links.try_next().await?;
    link.into_iter()
        .flat_map(|link| link.attributes)
        .find_map(|attribute| match attribute {
            LinkAttribute::Address(address) => address.try_into().ok(),
            _ => None,
        })
        .ok_or(LocatorError::NoLinkAddress(interface))
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
