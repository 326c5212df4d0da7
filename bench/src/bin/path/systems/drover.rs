//! Drover as it is used: its daemon with a configuration file. Without agents, since nothing migrates.

use lab::process::Process;
use lab::program;

use super::write_config;
use crate::place::Place;

/// Its configuration.
pub const CONFIG: &str = "\
[admin]
listen = 'ADMIN'
[datapath]
interfaces = ['c0', 'a0']
pin_path = 'PIN_PATH'
nat_source4 = 'NAT_SOURCE'
[[sites]]
name = 'ams'
next_hop = 'NEXT_HOP'
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
backends = ['one']
[[services]]
name = 'datagrams'
address = 'VIRTUAL:7000'
protocol = 'udp'
backends = ['one']
[[services]]
name = 'iperf'
address = 'VIRTUAL:7100'
protocol = 'tcp'
backends = ['iperf']
";

/// Starts the daemon.
pub fn start(place: &Place) -> anyhow::Result<Process> {
    let path = write_config(place, "lb.toml", CONFIG, &[("PIN_PATH", &place.lab().pin_path())])?;
    let mut command = place.lab().lb().command(program("lb")?);
    command.arg("run").arg("--config").arg(path);
    Ok(Process::spawn("lb", place.lab().dir(), command)?)
}
