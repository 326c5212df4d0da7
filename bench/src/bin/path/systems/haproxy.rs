//! haproxy in TCP mode, without logs, a thread for each of two processors.

use lab::process::Process;

use super::{find, write_config};
use crate::place::Place;

/// Its configuration. `splice-auto` moves bulk bytes between sockets inside the kernel.
pub const CONFIG: &str = "\
global
  nbthread 2
  maxconn 4000
defaults
  mode tcp
  option splice-auto
  timeout connect 5s
  timeout client 1m
  timeout server 1m
listen requests
  bind VIRTUAL:7000 backlog 4096
  server one BACKEND:7000
listen iperf
  bind VIRTUAL:7100 backlog 4096
  server one BACKEND:7100
";

/// Starts it in the foreground.
pub fn start(place: &Place) -> anyhow::Result<Process> {
    let path = write_config(place, "haproxy.cfg", CONFIG, &[])?;
    let mut command = place.lab().lb().command(find("haproxy").unwrap_or("haproxy".into()));
    command.arg("-db").arg("-f").arg(path);
    Ok(Process::spawn("haproxy", place.lab().dir(), command)?)
}
