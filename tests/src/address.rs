//! The lab's addresses: the same in every lab, since namespaces keep labs apart.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::Site;

/// The client's address.
pub const CLIENT4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
/// The client's address.
pub const CLIENT6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
/// The load balancer's address towards the client.
pub const LB4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 254);
/// The load balancer's address towards the client.
pub const LB6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0xfe);
/// What clients connect to.
pub const VIRTUAL4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 100);
/// What clients connect to.
pub const VIRTUAL6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x100);
/// How many backend addresses each site holds, per family.
pub const BACKENDS: u8 = 4;
/// The load balancer's source addresses towards backends, as a prefix.
pub const NAT_SOURCE4: &str = "10.9.0.0/16";
/// The load balancer's source addresses towards backends, as a prefix.
pub const NAT_SOURCE6: &str = "fd00:9::/112";
/// Where the daemon's admin API listens, inside the namespace `lb`.
pub const ADMIN: &str = "127.0.0.1:7400";
/// Port of a site's agent.
pub const AGENT_PORT: u16 = 7401;

/// A backend's address, the same at both sites; `number` is 1 to [`BACKENDS`].
pub const fn backend4(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 1, 0, number)
}

/// A backend's address, the same at both sites; `number` is 1 to [`BACKENDS`].
pub const fn backend6(number: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, number as u16)
}

/// A site's own address on its link to the load balancer.
pub const fn site4(site: Site) -> Ipv4Addr {
    Ipv4Addr::new(10, 2, site as u8 + 1, 1)
}

/// A site's own address on its link to the load balancer.
pub const fn site6(site: Site) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 2, site as u16 + 1, 0, 0, 0, 0, 1)
}

/// A site's tunnel endpoint, with [`Lab::hold_virtual_addresses`](crate::Lab::hold_virtual_addresses).
pub const fn tunnel4(site: Site) -> Ipv4Addr {
    Ipv4Addr::new(10, 2, site as u8 + 1, 2)
}

/// A site's tunnel endpoint, with [`Lab::hold_virtual_addresses`](crate::Lab::hold_virtual_addresses).
pub const fn tunnel6(site: Site) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 2, site as u16 + 1, 0, 0, 0, 0, 2)
}

/// A site's address on the link between the sites.
pub const fn between4(site: Site) -> Ipv4Addr {
    Ipv4Addr::new(10, 3, 0, site as u8 + 1)
}

/// The load balancer's address on its link to a site.
pub const fn lb_at4(site: Site) -> Ipv4Addr {
    Ipv4Addr::new(10, 2, site as u8 + 1, 254)
}

/// The load balancer's address on its link to a site.
pub const fn lb_at6(site: Site) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 2, site as u16 + 1, 0, 0, 0, 0, 0xfe)
}

/// A site's own address in the family of `like`.
pub fn site_like(site: Site, like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => site4(site).into(),
        IpAddr::V6(_) => site6(site).into(),
    }
}

/// The name of the load balancer's interface towards a site.
pub const fn lb_interface(site: Site) -> &'static str {
    match site {
        Site::A => "a0",
        Site::B => "b0",
    }
}
