//! `scale`: what large configurations cost: reading them, the first install, a change of one backend, memory.
//!
//! The real control and the real tables, in a lab; no packets.

use std::fmt::Write as _;
use std::os::fd::{AsFd, AsRawFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aya::maps::MapData;
use bench::program::ended;
use bench::table::{Table, bytes, number};
use clap::Parser;
use lab::{Lab, Site, address};
use lb::config::Config;
use lb::control::Control;
use lb::datapath::xdp::XdpDatapath;
use lb::datapath::{Datapath, Plan};
use tokio::sync::mpsc::unbounded_channel;

#[derive(Parser)]
#[command(
    bin_name = "cargo xtask bench scale",
    about = "What large configurations cost: the first install, a change of one backend, memory",
    after_help = "Needs root. Times are worth something only while nothing else runs."
)]
struct Args {
    /// Few backends and one change of each kind: shows that it works
    #[arg(long)]
    quick: bool,
}

/// One configuration.
#[derive(Clone, Copy)]
struct Shape {
    services: usize,
    /// Of each service.
    backends: usize,
}

/// What it took, in the order of [`ROWS`].
type Times = [Duration; 6];

const ROWS: [&str; 6] = [
    "file read and checked",
    "first install",
    "one backend's weight changed",
    "one backend added",
    "one backend removed",
    "one backend drained, or no longer",
];

fn main() -> ExitCode {
    ended("scale", measure(&Args::parse()))
}

fn measure(args: &Args) -> Result<()> {
    let (total, rounds) = if args.quick { (100, 1) } else { (10_000, 15) };
    let shapes = [Shape { services: total / 10, backends: 10 }, Shape { services: 1, backends: total }];
    let head = shapes.map(|shape| format!("{} x {}", shape.services, shape.backends));
    let measured = [run(shapes[0], rounds)?, run(shapes[1], rounds)?];
    let mut table = Table::new();
    table.row(["services x backends", &head[0], &head[1]]);
    for (row, what) in ROWS.iter().enumerate() {
        let ms = |times: &Times| format!("{} ms", number(times[row].as_secs_f64() * 1e3));
        table.row([(*what).to_owned(), ms(&measured[0].0), ms(&measured[1].0)]);
    }
    print!("{table}\n{}", measured[0].1);
    Ok(())
}

/// Installs a configuration and changes it `rounds` times in each way (the medians count); also the tables' memory.
fn run(shape: Shape, rounds: usize) -> Result<(Times, Table)> {
    let lab = Lab::new()?;
    let text = configuration(&lab, shape);
    let start = Instant::now();
    let config = Config::parse(&text, "the benchmark's configuration")?;
    let read = start.elapsed();
    let (events, _reports) = unbounded_channel();
    let datapath = Arc::new(lab.lb().run(|| XdpDatapath::open(&config.datapath, events))?);
    let start = Instant::now();
    let control = Control::start(datapath.clone(), &config.plan, config.hold)?;
    let first = start.elapsed();

    let replan = |plan: &Plan| {
        let start = Instant::now();
        control.replan(plan, config.hold, |_| false).map(|()| start.elapsed())
    };
    let numbers = |plan: &Plan| -> Vec<_> {
        plan.backends.iter().map(|backend| datapath.backend(&backend.name)).collect()
    };
    let known = numbers(&config.plan);
    ensure!(known.iter().all(Option::is_some), "not every backend is in the tables");
    let mut times: [Vec<Duration>; 4] = Default::default();
    for round in 0..rounds {
        let service = round * 7 % shape.services;
        let name = config.plan.services[service].backends[0].clone();
        let mut weighed = config.plan.clone();
        weighed.services[service].weights[0] = 50;
        times[0].push(replan(&weighed)?);
        times[0].push(replan(&config.plan)?);

        let removed = without(&config.plan, service, &name);
        times[2].push(replan(&removed)?);
        ensure!(datapath.backend(&name).is_none(), "{name} is still in the tables");
        times[1].push(replan(&config.plan)?);
        ensure!(datapath.backend(&name).is_some(), "{name} is not in the tables");

        let mut drained = config.plan.services[service].clone();
        drained.weights[0] = 0;
        for service in [&drained, &config.plan.services[service]] {
            let start = Instant::now();
            datapath.weigh(std::slice::from_ref(service))?;
            times[3].push(start.elapsed());
        }
    }
    // Only those that went and came have other numbers, if at all.
    let moved = numbers(&config.plan).iter().zip(&known).filter(|(now, then)| now != then).count();
    ensure!(moved <= rounds, "{moved} backends have other numbers than before");
    let [weighed, added, removed, drained] = times.map(median);
    let memory = memory(&lab, &config)?;
    Ok(([read, first, weighed, added, removed, drained], memory))
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn without(plan: &Plan, service: usize, name: &str) -> Plan {
    let mut plan = plan.clone();
    plan.backends.retain(|backend| backend.name != name);
    let service = &mut plan.services[service];
    service.backends.remove(0);
    service.weights.remove(0);
    plan
}

/// What the kernel says that the tables take; flows have an entry in each direction.
fn memory(lab: &Lab, config: &Config) -> Result<Table> {
    let mut table = Table::new();
    let folder = lab.pin_path().join("maps");
    let (mut all, limits) = (0, config.datapath.limits);
    for entry in std::fs::read_dir(&folder)? {
        all += size(&entry?.path())?;
    }
    table.row(["memory of all tables".to_owned(), bytes(all)]);
    for (name, flows, what) in [
        ("FLOWS_V4", limits.flows, "of an IPv4 flow"),
        ("FLOWS_V6", limits.flows, "of an IPv6 flow"),
        ("NEWCOMERS_V4", limits.newcomers, "of an IPv4 newcomer"),
        ("NEWCOMERS_V6", limits.newcomers, "of an IPv6 newcomer"),
    ] {
        let each = size(&folder.join(name))? as f64 / f64::from(flows);
        table.row([what.to_owned(), format!("{} B", number(each))]);
    }
    let members =
        size(&folder.join("TRAFFIC"))? + size(&folder.join("MEMBERS"))? + size(&folder.join("RINGS"))?;
    let each = members as f64 / f64::from(limits.members);
    table.row(["of a service's backend (ring and counters)".to_owned(), format!("{} B", number(each))]);
    Ok(table)
}

/// Bytes that the kernel counts for a pinned table.
fn size(pin: &std::path::Path) -> Result<u64> {
    let map = MapData::from_pin(pin).with_context(|| format!("cannot open {}", pin.display()))?;
    let path = format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd());
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("memlock:"));
    line.and_then(|bytes| bytes.trim().parse().ok()).with_context(|| format!("{path} has no memlock"))
}

fn configuration(lab: &Lab, shape: Shape) -> String {
    let mut text = format!(
        "[datapath]\ninterfaces = [\"c0\", \"a0\", \"b0\"]\npin_path = {:?}\nnat_source4 = {:?}\nnat_source6 = {:?}\n",
        lab.pin_path(),
        address::NAT_SOURCE4,
        address::NAT_SOURCE6
    );
    for site in Site::ALL {
        let _ =
            writeln!(text, "[[sites]]\nname = {:?}\nnext_hop = \"{}\"", site.name(), address::site4(site));
    }
    for number in 0..shape.services * shape.backends {
        let (high, low, site) = (number / 250 + 1, number % 250, Site::ALL[number % 2].name());
        let _ = writeln!(
            text,
            "[[backends]]\nname = \"b-{number}\"\naddress = \"10.1.{high}.{low}:7000\"\nsite = {site:?}"
        );
    }
    for service in 0..shape.services {
        let first = service * shape.backends;
        let backends: Vec<_> = (first..first + shape.backends).map(|number| format!("b-{number}")).collect();
        let port = 10_000 + service;
        let _ = writeln!(
            text,
            "[[services]]\nname = \"s-{service}\"\naddress = \"10.0.0.100:{port}\"\nprotocol = \"tcp\"\n\
             backends = {backends:?}"
        );
    }
    text
}
