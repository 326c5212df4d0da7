//! Drover as it is used: its daemon with a configuration file. Without agents, since nothing migrates; but for `dsr`,
//! where the agent at the server takes packets out of the tunnel.

use anyhow::{Context, bail};
use lab::process::Process;
use lab::{Site, address, http, program};
use serde_json::Value;

use super::write_config;
use crate::place::{self, Place};

/// Where its program takes packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// In the driver.
    Xdp,
    /// In traffic control.
    Tc,
}

/// What its services do with packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Source and destination are rewritten.
    Nat,
    /// The destination is rewritten; replies are routed through the load balancer.
    Transparent,
    /// Nothing is rewritten; the server holds the virtual address, and its replies go to the client on a link of their own.
    Dsr,
}

const CONFIG: &str = "\
[admin]
listen = 'ADMIN'
[datapath]
interfaces = ['c0', 'a0']
pin_path = 'PIN_PATH'
hook = 'HOOK'
nat_source4 = 'NAT_SOURCE'
[[sites]]
name = 'ams'
next_hop = 'NEXT_HOP'
tunnel = 'NEXT_HOP'
[[backends]]
name = 'one'
address = 'BACKEND:7000'
site = 'ams'
[[backends]]
name = 'iperf'
address = 'BACKEND:7100'
site = 'ams'
[[services]]
name = 'requests'
address = 'VIRTUAL:7000'
protocol = 'tcp'
mode = 'MODE'
backends = ['one']
[[services]]
name = 'datagrams'
address = 'VIRTUAL:7000'
protocol = 'udp'
mode = 'MODE'
backends = ['one']
[[services]]
name = 'iperf'
address = 'VIRTUAL:7100'
protocol = 'tcp'
mode = 'MODE'
backends = ['iperf']
";

const AGENT: &str = "\
site = 'ams'
listen = '127.0.0.1:7401'
state_dir = 'STATE'
[decapsulator]
interfaces = ['eth0']
endpoints = ['NEXT_HOP']
hook = 'HOOK'
pin_path = 'PIN_PATH'
[[workloads]]
name = 'one'
address = 'VIRTUAL:7000'
protocol = 'tcp'
command = ['/bin/true']
";

/// Bytes of an IP packet on the link that the tunnel takes: those of other links and the outer header.
const TUNNEL_MTU: u32 = 1520;

/// As in the report.
pub fn name(hook: Hook, mode: Mode) -> &'static str {
    match (hook, mode) {
        (Hook::Xdp, Mode::Nat) => "drover-xdp-nat",
        (Hook::Xdp, Mode::Transparent) => "drover-xdp-transparent",
        (Hook::Xdp, Mode::Dsr) => "drover-xdp-dsr",
        (Hook::Tc, Mode::Nat) => "drover-tc-nat",
        (Hook::Tc, Mode::Transparent) => "drover-tc-transparent",
        (Hook::Tc, Mode::Dsr) => "drover-tc-dsr",
    }
}

impl Hook {
    /// As in configuration files.
    fn label(self) -> &'static str {
        match self {
            Self::Xdp => "xdp",
            Self::Tc => "tc",
        }
    }
}

fn config(hook: Hook, mode: Mode) -> String {
    let hook = hook.label();
    let mode = match mode {
        Mode::Nat => "nat",
        Mode::Transparent => "transparent",
        Mode::Dsr => "dsr",
    };
    CONFIG.replace("HOOK", hook).replace("MODE", mode)
}

/// For the report.
pub fn describe(hook: Hook, mode: Mode) -> String {
    let config = config(hook, mode);
    match mode {
        Mode::Dsr => {
            config
                + "# the server holds the virtual address and has an agent with a decapsulator at the same hook;\n\
                   # it replies on a link of its own to the client\n"
        }
        _ => config,
    }
}

/// Starts the daemon, and what else the mode needs.
pub fn start(place: &Place, hook: Hook, mode: Mode) -> anyhow::Result<Vec<Process>> {
    let mut processes = Vec::new();
    if mode == Mode::Dsr {
        reply_directly(place)?;
        processes.push(start_agent(place, hook)?);
    }
    let values = [("PIN_PATH", &*place.lab().pin_path())];
    let path = write_config(place, "lb.toml", &config(hook, mode), &values)?;
    let mut command = place.lab().lb().command(program("lb")?);
    command.arg("run").arg("--config").arg(path);
    processes.push(Process::spawn("lb", place.lab().dir(), command)?);
    Ok(processes)
}

/// Starts the agent that takes packets out of the tunnel.
fn start_agent(place: &Place, hook: Hook) -> anyhow::Result<Process> {
    let state = place.lab().dir().join("agent");
    let pins = place.lab().pin_path().join("agent");
    let values = [("STATE", &*state), ("PIN_PATH", &*pins)];
    let path = write_config(place, "agent.toml", &AGENT.replace("HOOK", hook.label()), &values)?;
    let mut command = place.lab().site(Site::A).command(program("migrate")?);
    command.arg("agent").arg("--config").arg(path);
    Ok(Process::spawn("agent", place.lab().dir(), command)?)
}

/// Asks the daemon at which hook it takes packets.
pub fn verify(place: &Place, hook: Hook) -> anyhow::Result<()> {
    let server = address::ADMIN.parse().context("the admin API's address is none")?;
    let status =
        http::request(place.lab().lb(), server, "GET", "/v1/status", "application/json", b"")?.json();
    let word = match hook {
        Hook::Xdp => "xdp native",
        // In one of the two ways in which the kernel has it.
        Hook::Tc => "tc",
    };
    let hooks = status["hooks"].as_array().map(Vec::as_slice).unwrap_or_default();
    if hooks.is_empty()
        || hooks.iter().any(|found| !found["mode"].as_str().is_some_and(|mode| mode.starts_with(word)))
    {
        bail!("Drover was to take packets at {word:?} and does so at {}", Value::from(hooks));
    }
    Ok(())
}

/// Gives the server the virtual address and a link to the client: what it answers does not pass the load balancer.
fn reply_directly(place: &Place) -> anyhow::Result<()> {
    let (client, lb, server) = (place.lab().client(), place.lab().lb(), place.lab().site(Site::A));
    let ip = |namespace: &lab::Namespace, words: String| {
        place::run(namespace.command("ip").args(words.split(' ')))
    };
    for (namespace, device) in [(lb, "a0"), (server, "eth0")] {
        ip(namespace, format!("link set {device} mtu {TUNNEL_MTU}"))?;
    }
    ip(server, format!("link add d0 type veth peer name d0 netns {}", client.name()))?;
    for (namespace, address) in [(client, "10.4.0.1/24"), (server, "10.4.0.2/24")] {
        ip(namespace, format!("addr add {address} dev d0"))?;
        ip(namespace, "link set d0 up".to_owned())?;
        place::set_offloads(namespace, "d0", place.offloads())?;
    }
    ip(server, format!("addr add {}/32 dev lo", address::VIRTUAL4))?;
    ip(server, "route add 10.0.0.0/24 via 10.4.0.1 dev d0".to_owned())
}
