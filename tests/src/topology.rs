//! Makes a lab's namespaces, links, addresses and routes.

use std::fs::File;
use std::io::Write;
use std::net::IpAddr;
use std::process::{Command, Stdio};

use crate::Site;
use crate::address::{self, BACKENDS, lb_interface};
use crate::error::LabError;
use crate::lab_id::{LabId, SCRATCH};
use crate::namespace::Namespace;

/// What the load balancer's ends have off: frames that a local stack sends must be complete (checksums included), since
/// XDP forwards them as they are.
const OFFLOADS_LB: &str = "tx off tso off gso off gro off";
/// The other ends have GRO on: it makes the veth receive what XDP redirects into its peer, without a program there.
const OFFLOADS_PEER: &str = "tx off tso off gso off gro on";

/// The name of both ends of the link between the sites.
pub(crate) const BETWEEN: &str = "x0";

/// Set before any interface exists, so that interfaces are born with them.
const SETTINGS: &[(&str, &str)] = &[
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
    // Addresses are usable at once, and nothing is sent that no test asked for.
    ("ipv6/conf/default/accept_dad", "0"),
    ("ipv6/conf/default/router_solicitations", "0"),
];

/// Makes the namespaces client, lb, site-a, site-b, joined and addressed as the crate's documentation shows.
pub(crate) fn create(id: &LabId) -> Result<[Namespace; 4], LabError> {
    let names = ["client", "lb", "site-a", "site-b"].map(|role| id.namespace(role));
    add_namespaces(&names)?;
    let [client, lb, site_a, site_b] = names.map(Namespace::open);
    let [client, lb, site_a, site_b] = [client?, lb?, site_a?, site_b?];

    for namespace in [&client, &lb, &site_a, &site_b] {
        set(namespace, SETTINGS)?;
    }
    set(&lb, &[("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")])?;

    ip_batch(&lb, &lb_lines(&client, &site_a, &site_b))?;
    std::thread::scope(|scope| {
        let peers =
            [(&client, client_lines()), (&site_a, site_lines(Site::A)), (&site_b, site_lines(Site::B))];
        let work: Vec<_> = peers
            .into_iter()
            .map(|(namespace, lines)| {
                scope.spawn(move || {
                    ip_batch(namespace, &lines)?;
                    offloads(namespace, "eth0", OFFLOADS_PEER)
                })
            })
            .chain(["c0", "a0", "b0"].into_iter().map(|device| {
                let lb = &lb;
                scope.spawn(move || offloads(lb, device, OFFLOADS_LB))
            }))
            .collect();
        work.into_iter().try_for_each(|thread| thread.join().expect("setting up a namespace does not panic"))
    })?;
    Ok([client, lb, site_a, site_b])
}

/// Adds a route to `backend` via `site` in the namespace `lb`.
pub(crate) fn route(lb: &Namespace, backend: IpAddr, site: Site) -> Result<(), LabError> {
    let via = address::site_like(site, backend);
    ip_batch(lb, &[format!("route replace {backend} via {via}")])
}

/// On the links to the sites: 1500 bytes and the larger outer header, with room to spare.
const TUNNEL_MTU: u16 = 1600;

/// See [`Lab::hold_virtual_addresses`](crate::Lab::hold_virtual_addresses).
pub(crate) fn hold_virtual_addresses(lb: &Namespace, sites: &[Namespace; 2]) -> Result<(), LabError> {
    // Answers pass the load balancer's stack on their way to the client, from addresses that it holds itself.
    set(lb, &[("ipv4/conf/all/accept_local", "1")])?;
    for (site, namespace) in Site::ALL.into_iter().zip(sites) {
        ip_batch(lb, &[format!("link set {} mtu {TUNNEL_MTU}", lb_interface(site))])?;
        let mut lines = vec![
            format!("link set eth0 mtu {TUNNEL_MTU}"),
            format!("addr add {}/24 dev eth0", address::tunnel4(site)),
            format!("addr add {}/64 dev eth0 nodad", address::tunnel6(site)),
            format!("addr add {}/32 dev lo", address::VIRTUAL4),
            format!("addr add {}/128 dev lo nodad", address::VIRTUAL6),
        ];
        // What is sent to clients fits the way to them, which no outer header is put on.
        let (via4, via6) = (address::lb_at4(site), address::lb_at6(site));
        lines.push(format!("route replace {}/32 via {via4} mtu 1500", address::CLIENT4));
        lines.push(format!("route replace {}/128 via {via6} mtu 1500", address::CLIENT6));
        ip_batch(namespace, &lines)?;
    }
    Ok(())
}

fn lb_lines(client: &Namespace, site_a: &Namespace, site_b: &Namespace) -> Vec<String> {
    let mut lines = vec!["link set lo up".to_owned()];
    for (device, peer) in [("c0", client), ("a0", site_a), ("b0", site_b)] {
        lines.push(format!("link add {device} type veth peer name eth0 netns {}", peer.name()));
        lines.push(format!("link set {device} up"));
    }
    let (at_a, at_b) = (site_a.name(), site_b.name());
    lines.push(format!("link add {BETWEEN} netns {at_a} type veth peer name {BETWEEN} netns {at_b}"));
    lines.push(format!("addr add {}/24 dev c0", address::LB4));
    lines.push(format!("addr add {}/64 dev c0 nodad", address::LB6));
    lines.push(format!("addr add {}/32 dev c0", address::VIRTUAL4));
    lines.push(format!("addr add {}/128 dev c0 nodad", address::VIRTUAL6));
    for site in Site::ALL {
        let device = lb_interface(site);
        lines.push(format!("addr add {}/24 dev {device}", address::lb_at4(site)));
        lines.push(format!("addr add {}/64 dev {device} nodad", address::lb_at6(site)));
    }
    lines
}

fn client_lines() -> Vec<String> {
    vec![
        "link set lo up".to_owned(),
        "link set eth0 up".to_owned(),
        format!("addr add {}/24 dev eth0", address::CLIENT4),
        format!("addr add {}/64 dev eth0 nodad", address::CLIENT6),
        format!("route add default via {}", address::LB4),
        format!("route add default via {}", address::LB6),
    ]
}

fn site_lines(site: Site) -> Vec<String> {
    let mut lines = vec!["link set lo up".to_owned(), "link set eth0 up".to_owned()];
    lines.push(format!("addr add {}/24 dev eth0", address::site4(site)));
    lines.push(format!("addr add {}/64 dev eth0 nodad", address::site6(site)));
    for number in 1..=BACKENDS {
        lines.push(format!("addr add {}/32 dev lo", address::backend4(number)));
        lines.push(format!("addr add {}/128 dev lo nodad", address::backend6(number)));
    }
    // A UDP server bound to no address answers from the route's source: it has to be the backend's.
    let (via4, source4) = (address::lb_at4(site), address::backend4(1));
    let (via6, source6) = (address::lb_at6(site), address::backend6(1));
    for prefix in ["default", "10.9.0.0/16"] {
        lines.push(format!("route add {prefix} via {via4} src {source4}"));
    }
    for prefix in ["default", "fd00:9::/64"] {
        lines.push(format!("route add {prefix} via {via6} src {source6}"));
    }
    lines.extend(between_lines(site));
    lines
}

fn between_lines(site: Site) -> [String; 3] {
    // Agents speak over the sites' own link and from their own address: the other site holds the backend's too, and
    // would answer itself.
    let other = site.other();
    let (to, via, from) = (address::site4(other), address::between4(other), address::site4(site));
    [
        format!("link set {BETWEEN} up"),
        format!("addr add {}/24 dev {BETWEEN}", address::between4(site)),
        format!("route add {to} via {via} src {from}"),
    ]
}

/// Removes the link between the sites, if it is there.
pub(crate) fn remove_between([site, _]: &[Namespace; 2]) -> Result<(), LabError> {
    let is_there = site.run(|| nix::net::if_::if_nametoindex(BETWEEN)).is_ok();
    // A veth goes with its peer.
    if is_there { ip_batch(site, &[format!("link del {BETWEEN}")]) } else { Ok(()) }
}

/// Gives a new link between the sites the addresses and routes of the plain one.
pub(crate) fn address_between(sites: &[Namespace; 2]) -> Result<(), LabError> {
    Site::ALL
        .into_iter()
        .zip(sites)
        .try_for_each(|(site, namespace)| ip_batch(namespace, &between_lines(site)))
}

/// Bytes that an interface has sent, in `/proc/net/dev`: the ninth number behind its name (proc_pid_net(5)).
pub(crate) fn sent_bytes(text: &str, interface: &str) -> Option<u64> {
    let numbers = text.lines().find_map(|line| {
        let (name, numbers) = line.split_once(':')?;
        (name.trim() == interface).then_some(numbers)
    })?;
    numbers.split_whitespace().nth(8)?.parse().ok()
}

fn add_namespaces(names: &[String]) -> Result<(), LabError> {
    // The first `ip netns add` on a machine turns /run/netns into a shared mount; two at once would do so twice.
    let path = SCRATCH.join("drover.lock");
    let file = File::create(&path).map_err(LabError::io(format!("create {}", path.display())))?;
    file.lock().map_err(LabError::io(format!("lock {}", path.display())))?;
    let lines: Vec<_> = names.iter().map(|name| format!("netns add {name}")).collect();
    feed(Command::new("ip").args(["-batch", "-"]), &lines)
}

pub(crate) fn ip_batch(namespace: &Namespace, lines: &[String]) -> Result<(), LabError> {
    feed(Command::new("ip").args(["-n", namespace.name(), "-batch", "-"]), lines)
}

fn offloads(namespace: &Namespace, device: &str, offloads: &str) -> Result<(), LabError> {
    feed(namespace.command("ethtool").args(["-K", device]).args(offloads.split(' ')), &[])
}

fn set(namespace: &Namespace, settings: &[(&str, &str)]) -> Result<(), LabError> {
    namespace.run(|| {
        settings.iter().try_for_each(|(name, value)| {
            std::fs::write(format!("/proc/sys/net/{name}"), value)
                .map_err(LabError::io(format!("set net/{name} in the namespace {}", namespace.name())))
        })
    })
}

/// Runs `command` with `lines` as its input.
fn feed(command: &mut Command, lines: &[String]) -> Result<(), LabError> {
    let shown = format!("{command:?}");
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().map_err(
            LabError::io(format!("start {shown} (`cargo xtask setup` installs what the lab needs)")),
        )?;
    // A few kilobytes at most: they fit the pipe, whether or not the program reads them.
    let mut input = child.stdin.take().expect("stdin is a pipe");
    let _ = input.write_all((lines.join("\n") + "\n").as_bytes());
    drop(input);
    let output = child.wait_with_output().map_err(LabError::io(format!("wait for {shown}")))?;
    if output.status.success() {
        return Ok(());
    }
    let printed = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(LabError::Command { command: shown, output: format!("{printed} ({})", output.status) })
}

#[cfg(test)]
mod tests {
    use super::sent_bytes;

    #[test]
    fn the_bytes_that_an_interface_sent_are_found_by_its_name() {
        let text = "Inter-|   Receive                            |  Transmit\n \
                    face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs\n    \
                    lo:     100       1    0    0    0     0          0         0     100       1    0\n    \
                    x0:     200       2    0    0    0     0          0         0   12345       3    0\n";
        assert_eq!((sent_bytes(text, "x0"), sent_bytes(text, "lo")), (Some(12345), Some(100)));
        assert_eq!(sent_bytes(text, "x1"), None);
    }
}
