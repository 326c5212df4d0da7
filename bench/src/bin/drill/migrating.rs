//! The drill in a lab: a server behind the load balancer moves there and back under its clients.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use bench::clock::unix_ns;
use bench::driver::{self, Load, Running, Source};
use bench::probe::wait_until_it_answers;
use bench::protocol::Transport;
use bench::report::{DrillReport, Migration, Outcome, Setting, Verification};
use bench::scenario::{self, Scenario};
use bench::timeline::Timeline;
use bench::verify::redis_counts;
use lab::processors;
use lab::stack::{Memory, Mode, Protocol, Runner, Stack, StackOptions, Workload};
use lab::{Lab, Site, address};
use serde_json::json;

use crate::args::{Args, Datapath};
use crate::narrator::Narrator;
use crate::{admin, summary};
use bench::interrupt::{Interrupt, Interrupted};

/// How long the service may take to answer through the load balancer.
const SERVICE_LIMIT: Duration = Duration::from_secs(20);

/// How long one migration may take; the load balancer's own deadlines are far shorter.
const MIGRATION_LIMIT: Duration = Duration::from_secs(60);

/// Before the first migration: enough messages for a picture of calm.
const CALM: Duration = Duration::from_secs(1);

/// After each migration: what a client sees until then counts as the migration's doing.
const SETTLE: Duration = Duration::from_millis(1200);

/// Up to this many migrations are told phase by phase, more with a line each.
const TOLD_IN_FULL: u32 = 4;

/// Lines of each log that are shown when a drill fails.
const LOG_LINES: usize = 25;

/// Runs the drill.
pub fn run(args: &Args, interrupt: &Interrupt) -> anyhow::Result<DrillReport> {
    if args.datapath == Datapath::Proxy {
        bail!("--datapath proxy does not exist yet: the load balancer carries packets with XDP only");
    }
    let narrator = Narrator::new();
    narrator.doing("making a lab");
    let lab = Lab::new()?;
    narrator.step("lab", "namespaces client - lb - ams, fra");
    interrupt.check()?;

    narrator.doing("starting agents, load balancer and server");
    let workload = workload(args.scenario(), &lab)?;
    let service = workload.service;
    let site_processors = processors::halves().map_or(Vec::new(), |(network, sites)| {
        processors::stay_on(&network);
        sites
    });
    let options = StackOptions { workloads: vec![workload], site_processors, ..StackOptions::default() };
    let stack = Stack::start(lab, options)?;
    let outcome = on_stack(args, interrupt, &narrator, &stack, service);
    if outcome.as_ref().is_err_and(|error| !error.is::<Interrupted>()) {
        narrator.finish();
        show_logs(&stack);
    }
    outcome
}

fn on_stack(
    args: &Args,
    interrupt: &Interrupt,
    narrator: &Narrator,
    stack: &Stack,
    service: SocketAddr,
) -> anyhow::Result<DrillReport> {
    interrupt.check()?;
    let (scenario, client) = (args.scenario(), stack.lab().client());
    let protocol = scenario.protocol();
    client.run(|| wait_until_it_answers(service, protocol.as_ref(), SERVICE_LIMIT))?;
    narrator.step(
        "server",
        &format!("{} at ams answers at {service} through the load balancer", scenario.name()),
    );

    let connected = client.run(|| driver::connect(load(args, service), protocol))?;
    let clients = connected.start()?;
    narrator.step("clients", &describe_load(args));
    narrator.watch(&clients, CALM, interrupt)?;
    let migrations = migrate(args, interrupt, narrator, stack, &clients)?;
    narrator.doing("waiting for the last replies");
    let timeline = clients.stop()?;
    let verification = client.run(|| verify(args, service, &timeline))?;
    narrator.finish();

    let report = DrillReport::new(setting(args), &timeline, &migrations, verification);
    print!("{}\n{}", summary::pictures(&report, &timeline, &migrations), summary::tables(&report));
    Ok(report)
}

fn migrate(
    args: &Args,
    interrupt: &Interrupt,
    narrator: &Narrator,
    stack: &Stack,
    clients: &Running,
) -> anyhow::Result<Vec<Migration>> {
    let backend = args.scenario().name();
    let mut at = Site::A;
    let mut migrations = Vec::new();
    for number in 1..=args.migrations {
        narrator.step(
            "migration",
            &format!("{number} of {}: {} to {}", args.migrations, at.name(), at.other().name()),
        );
        let in_full = args.migrations <= TOLD_IN_FULL;
        let migration = one_migration(args, interrupt, stack, backend, at.other(), |phase| {
            if in_full {
                narrator.phase(phase);
            }
        })?;
        narrator.outcome(&migration);
        let outcome = migration.coordinated.outcome;
        migrations.push(migration);
        match outcome {
            Outcome::Committed => at = at.other(),
            Outcome::RolledBack | Outcome::NotMigrated => {}
            Outcome::InDoubt => break,
        }
        narrator.watch(clients, SETTLE, interrupt)?;
    }
    Ok(migrations)
}

fn one_migration(
    args: &Args,
    interrupt: &Interrupt,
    stack: &Stack,
    backend: &str,
    to: Site,
    on_phase: impl FnMut(&bench::report::Phase),
) -> anyhow::Result<Migration> {
    let started_unix_ns = unix_ns();
    let id = stack.start_migration(backend, to, &json!({"policy": args.policy.name()}))?;
    let finished = admin::follow(stack.lab().lb(), &id, MIGRATION_LIMIT, interrupt, on_phase)
        .with_context(|| format!("migration {id} to {}", to.name()))?;
    let (from, to) = (finished.from.clone(), finished.to.clone());
    Ok(Migration { from, to, started_unix_ns, coordinated: finished.coordinated() })
}

/// The server as a backend that starts at the first site.
fn workload(scenario: Scenario, lab: &Lab) -> anyhow::Result<Workload> {
    let port = scenario.port();
    let address = SocketAddr::from((address::backend4(1), port));
    let dir = lab.dir().join(scenario.name());
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(Workload {
        name: scenario.name().to_owned(),
        address,
        protocol: match scenario.transport() {
            Transport::Tcp => Protocol::Tcp,
            Transport::Udp => Protocol::Udp,
        },
        command: scenario.command(address, &dir)?,
        dir: Some(dir),
        site: Site::A,
        service: SocketAddr::from((address::VIRTUAL4, port)),
        mode: Mode::Nat,
        memory: Memory::Auto,
        runner: Runner::Agent,
    })
}

/// What the clients do.
pub fn load(args: &Args, target: SocketAddr) -> Load {
    Load {
        target,
        source: Source::Any,
        clients: args.clients(),
        rate_per_s: args.rate_per_s(),
        connect_timeout: Duration::from_secs(10),
        // TCP may need several retransmission timeouts; UDP does not send again, what is held comes soon.
        drain: match args.scenario().transport() {
            Transport::Tcp => Duration::from_secs(10),
            Transport::Udp => Duration::from_secs(3),
        },
    }
}

/// The load in words.
pub fn describe_load(args: &Args) -> String {
    format!("{} connected, {} messages/s in total", args.clients(), args.rate_per_s())
}

/// What was asked for, for the report.
pub fn setting(args: &Args) -> Setting {
    Setting {
        scenario: args.scenario().name().to_owned(),
        datapath: "xdp".to_owned(),
        policy: args.policy.name().to_owned(),
        rate_per_s: args.rate_per_s(),
    }
}

/// Compares the run with the server's own count, where it keeps one.
pub fn verify(args: &Args, target: SocketAddr, timeline: &Timeline) -> anyhow::Result<Option<Verification>> {
    match args.scenario() {
        Scenario::Redis => {
            let counts = redis_counts(target, &scenario::redis(), timeline.clients)?;
            Ok(Some(Verification::compare(timeline, &counts)))
        }
        Scenario::OpenArena => Ok(None),
    }
}

fn show_logs(stack: &Stack) {
    for name in ["lb", "agent-ams", "agent-fra"] {
        let path = stack.log_path(name);
        let text = read_lossy(&path);
        let lines: Vec<&str> = text.lines().collect();
        eprintln!("---- the end of {}", path.display());
        lines[lines.len().saturating_sub(LOG_LINES)..].iter().for_each(|line| eprintln!("{line}"));
    }
}

fn read_lossy(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}
