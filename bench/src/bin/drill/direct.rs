//! Clients straight at a server on loopback, without a load balancer: the baseline of the measurement.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use bench::driver::{self, Load, Source};
use bench::probe::wait_until_it_answers;
use bench::protocol::Transport;
use bench::report::{DrillReport, Setting};

use crate::args::Args;
use crate::narrator::Narrator;
use crate::{migrating, summary};
use bench::interrupt::Interrupt;

/// How long the server may take to start.
const START_LIMIT: Duration = Duration::from_secs(20);

/// A server that is killed when it is no longer needed.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // Fails only if it has ended by itself, which the clients have noticed then.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs the clients for `--seconds`.
pub fn run(args: &Args, interrupt: &Interrupt) -> anyhow::Result<DrillReport> {
    let scenario = args.scenario();
    let narrator = Narrator::new();
    let dir = tempfile::tempdir().context("cannot make a scratch folder")?;
    let target = free_address(scenario.transport()).context("no free port on loopback")?;
    let words = scenario.command(target, dir.path())?;
    let (program, arguments) = words.split_first().context("a server's command line is empty")?;
    let log =
        std::fs::File::create(dir.path().join("server.log")).context("cannot write the server's log")?;
    let child = Command::new(program)
        .args(arguments)
        .current_dir(dir.path())
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("cannot start {program}"))?;
    let mut server = Server(child);
    let protocol = scenario.protocol();
    wait_until_it_answers(target, protocol.as_ref(), START_LIMIT)?;
    narrator.step("server", &format!("{} at {target}, no load balancer", scenario.name()));

    // Through the load balancer clients have different addresses too.
    let load = Load { source: Source::OwnLoopback, ..migrating::load(args, target) };
    let clients = driver::connect(load, protocol)?.start()?;
    narrator.step("clients", &migrating::describe_load(args));
    narrator.watch(&clients, Duration::from_secs(args.seconds), interrupt)?;
    let timeline = clients.stop()?;
    let ended = server.0.try_wait().context("cannot ask for the server's state")?;
    ensure!(ended.is_none(), "the server ended by itself: {ended:?}");
    let verification = migrating::verify(args, target, &timeline)?;
    narrator.finish();

    let setting = Setting { datapath: "direct".to_owned(), ..migrating::setting(args) };
    let report = DrillReport::new(setting, &timeline, &[], verification);
    print!("\n{}", summary::tables(&report));
    Ok(report)
}

/// A port that nobody has at the moment.
fn free_address(transport: Transport) -> std::io::Result<SocketAddr> {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    match transport {
        Transport::Tcp => TcpListener::bind(any)?.local_addr(),
        Transport::Udp => UdpSocket::bind(any)?.local_addr(),
    }
}
