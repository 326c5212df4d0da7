//! The fault matrix: each part killed, each way cut, at each step of a migration, with a real server under clients
//! that never stop. Whatever happens, the migration ends committed or rolled back by itself, and the clients have
//! every answer once and in order over the connections that they began with.
//!
//! Each test prints its column; the documentation has them side by side.

#![expect(clippy::unwrap_used, reason = "a test states what it expects by unwrapping")]

mod drill;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::os::unix::fs::MetadataExt;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use drill::{Drill, LIMIT};
use lab::link::Spec;
use lab::stack::{HoldOptions, StackOptions, Workload};
use lab::{Site, address, program, wait_for};
use nix::sys::signal::Signal::SIGKILL;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use serde_json::Value;

/// The steps at whose beginning something breaks. A flip is over before anybody could be killed at it.
const STEPS: [&str; 7] = ["prepare", "drain", "freeze", "transfer", "restore", "confirm", "release"];

/// How long what broke stays so.
const BROKEN: Duration = Duration::from_millis(700);

/// Longer than a target runs unconfirmed.
const LONG: Duration = Duration::from_secs(13);

/// How long a migration may take to end once everything is mended: the longest of what parties wait for each other.
const ENDS_WITHIN: Duration = Duration::from_secs(40);

/// What breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    /// `kill -9` of the load balancer's daemon.
    Daemon,
    /// `kill -9` of the source's agent.
    SourceAgent,
    /// `kill -9` of the target's agent.
    TargetAgent,
    /// `kill -9` of every CRIU process at the source.
    SourceCriu,
    /// `kill -9` of every CRIU process at the target.
    TargetCriu,
    /// The link between the sites carries nothing.
    SitesLink,
    /// The daemon and the source's agent do not hear each other.
    SourceCut,
    /// The daemon and the target's agent do not hear each other.
    TargetCut,
    /// The daemon and neither agent hear each other.
    BothCut,
}

struct Matrix {
    drill: Drill,
    victim: Victim,
    broken: Duration,
    at: Site,
}

/// Breaks it at each of some steps in turn, under the same clients.
fn column(victim: Victim, steps: &[&str], broken: Duration) {
    column_of(Workload::redis(1), victim, steps, broken);
}

fn column_of(workload: Workload, victim: Victim, steps: &[&str], broken: Duration) {
    let mut matrix = Matrix::new(workload, victim, broken);
    for step in steps {
        let (outcome, took) = matrix.cell(step);
        println!("{step:<9} {victim:?}: {outcome} after {:.1} s", took.as_secs_f64());
    }
    matrix.drill.must_be_whole();
}

impl Matrix {
    /// A stack whose server is at its second site: the first migration of all is a case of its own.
    fn new(workload: Workload, victim: Victim, broken: Duration) -> Self {
        let hold =
            HoldOptions { deadline_ms: Some(15_000), max_age_ms: Some(20_000), ..HoldOptions::default() };
        let options = StackOptions {
            workloads: vec![workload],
            hold,
            link: Some(Spec::default()),
            ..StackOptions::default()
        };
        let drill = Drill::with(options);
        drill.commits(Site::B);
        Self { drill, victim, broken, at: Site::B }
    }

    /// One migration in which the victim breaks when the step begins; how it ended, and after how long.
    fn cell(&mut self, step: &str) -> (String, Duration) {
        let (from, to) = (self.at, self.at.other());
        let began = Instant::now();
        let nft = self.nft();
        let criu = match self.victim {
            Victim::SourceCriu => Some(self.watch_for_criu(from)),
            Victim::TargetCriu => Some(self.watch_for_criu(to)),
            _ => None,
        };
        let id = self.drill.stack.start_migration(self.drill.name(), to, &Value::Null).unwrap();
        self.wait_for_step(&id, step);
        match criu {
            Some(criu) => println!("{step:<9} CRIU there to be killed: {}", criu.kill(step)),
            None => self.break_it(from, nft),
        }
        std::thread::sleep(self.broken);
        self.mend(from);
        let migration = self.drill.stack.finished_migration(&id, ENDS_WITHIN).unwrap();
        let took = began.elapsed();
        let outcome = migration["state"].as_str().unwrap().to_owned();
        println!("{step:<9} why: {}", migration["report"]["reason"]);
        self.at = match outcome.as_str() {
            "committed" => to,
            "rolled_back" => from,
            _ => panic!("at {step}: {migration:#}"),
        };
        assert_eq!(self.drill.backend()["location"], self.at.name(), "at {step}: {migration:#}");
        self.drill.is_open();
        self.drill.goes_on();
        self.one_copy(step);
        (outcome, took)
    }

    /// Returns when the step has begun, or the migration has ended.
    fn wait_for_step(&self, id: &str, step: &str) {
        let lb = self.drill.stack.lab().lb();
        let stream = lb.run(|| TcpStream::connect(address::ADMIN)).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let host = address::ADMIN;
        let request = format!("GET /v1/migrations/{id}/events HTTP/1.1\r\nHost: {host}\r\n\r\n");
        (&stream).write_all(request.as_bytes()).unwrap();
        let wanted = format!("\"name\":\"{step}\"");
        for line in BufReader::new(stream).lines() {
            let line = line.unwrap();
            assert!(!line.starts_with("HTTP/1.1") || line.contains(" 200 "), "{line}");
            if line.starts_with("data:") && line.contains(&wanted) || line.starts_with("event: finished") {
                return;
            }
        }
    }

    fn break_it(&mut self, from: Site, nft: Child) {
        let stack = &mut self.drill.stack;
        match self.victim {
            Victim::Daemon => stack.kill_daemon(),
            Victim::SourceAgent => stack.kill_agent(from),
            Victim::TargetAgent => stack.kill_agent(from.other()),
            Victim::SourceCriu | Victim::TargetCriu => {}
            Victim::SitesLink => stack.lab().link().unwrap().cut(),
            Victim::SourceCut => cut(nft, &[from]),
            Victim::TargetCut => cut(nft, &[from.other()]),
            Victim::BothCut => cut(nft, &Site::ALL),
        }
    }

    fn mend(&mut self, from: Site) {
        let stack = &mut self.drill.stack;
        match self.victim {
            Victim::Daemon => stack.restart_daemon().unwrap(),
            Victim::SourceAgent => stack.restart_agent(from).unwrap(),
            Victim::TargetAgent => stack.restart_agent(from.other()).unwrap(),
            Victim::SourceCriu | Victim::TargetCriu => {}
            Victim::SitesLink => stack.lab().link().unwrap().heal(),
            Victim::SourceCut | Victim::TargetCut | Victim::BothCut => {
                tell(self.nft(), "delete table ip cut\n")
            }
        }
    }

    /// An `nft` that waits to be told. Its rules stop only what the daemon itself sends and gets: packets of clients do
    /// not come by there.
    fn nft(&self) -> Child {
        let mut nft = self.drill.stack.lab().lb().command("nft");
        nft.args(["-f", "-"]).stdin(Stdio::piped()).spawn().unwrap()
    }

    fn watch_for_criu(&self, site: Site) -> Criu {
        Criu::watch(std::fs::metadata(self.drill.stack.lab().site(site).path()).unwrap().ino())
    }

    /// What our command line says.
    fn lb(&self, arguments: &[&str]) -> String {
        let mut lb = self.drill.stack.lab().lb().command(program("lb").unwrap());
        let output = lb.args(arguments).output().unwrap();
        String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
    }

    /// The server runs where the gate points, and nowhere else is a copy that waits.
    fn one_copy(&self, step: &str) {
        for site in Site::ALL {
            let wanted = if site == self.at { "running" } else { "absent" };
            let mut last = Value::Null;
            let settled = wait_for(LIMIT, || {
                last = self.drill.stack.agent(site, "GET", "/v1/workloads", None).unwrap().1;
                (last[0]["state"] == wanted).then_some(())
            });
            assert!(settled.is_some(), "at {step}: {site:?} should be {wanted}: {last:#}");
        }
    }
}

/// The daemon and the agents of these sites hear each other no more.
fn cut(nft: Child, sites: &[Site]) {
    let addresses: Vec<String> = sites.iter().map(|site| address::site4(*site).to_string()).collect();
    let set = addresses.join(", ");
    let rules = format!(
        "table ip cut {{\n\
         chain out {{ type filter hook output priority 0; ip daddr {{ {set} }} drop; }}\n\
         chain in {{ type filter hook input priority 0; ip saddr {{ {set} }} drop; }}\n\
         }}\n"
    );
    tell(nft, &rules);
}

fn tell(mut nft: Child, rules: &str) {
    nft.stdin.take().unwrap().write_all(rules.as_bytes()).unwrap();
    assert!(nft.wait().unwrap().success(), "{rules}");
}

/// A site's CRIU processes, once they are there: they are not looked for when a step of milliseconds has begun.
struct Criu {
    seen: Arc<Mutex<BTreeSet<i32>>>,
    stop: Arc<AtomicBool>,
    watcher: JoinHandle<()>,
}

impl Criu {
    /// Those in a network namespace, from now on.
    fn watch(namespace: u64) -> Self {
        let (seen, stop) = (Arc::new(Mutex::new(BTreeSet::new())), Arc::new(AtomicBool::new(false)));
        let (find, stopped) = (seen.clone(), stop.clone());
        let watcher = std::thread::spawn(move || {
            while !stopped.load(Relaxed) {
                find.lock().unwrap().extend(criu_in(namespace));
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        Self { seen, stop, watcher }
    }

    /// `kill -9`; how many there were.
    fn kill(self, step: &str) -> usize {
        if step == "prepare" {
            // It is started in this step.
            wait_for(LIMIT, || (!self.seen.lock().unwrap().is_empty()).then_some(()))
                .expect("CRIU is started");
        }
        let killed = self
            .seen
            .lock()
            .unwrap()
            .iter()
            .filter(|pid| kill(Pid::from_raw(**pid), SIGKILL).is_ok())
            .count();
        self.stop.store(true, Relaxed);
        self.watcher.join().unwrap();
        killed
    }
}

/// CRIU runs in its agent's network namespace.
fn criu_in(namespace: u64) -> Vec<i32> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let found = processes.filter_map(|process| {
        let pid = process.file_name().to_str()?.parse().ok()?;
        let command = std::fs::read_to_string(process.path().join("cmdline")).ok()?;
        let is_there = std::fs::metadata(process.path().join("ns/net")).ok()?.ino() == namespace;
        (command.contains("criu\0swrk") && is_there).then_some(pid)
    });
    found.collect()
}

#[test]
fn the_daemon_is_killed_at_each_step() {
    column(Victim::Daemon, &STEPS, BROKEN);
}

#[test]
fn the_sources_agent_is_killed_at_each_step() {
    column(Victim::SourceAgent, &STEPS, BROKEN);
}

#[test]
fn the_targets_agent_is_killed_at_each_step() {
    column(Victim::TargetAgent, &STEPS, BROKEN);
}

#[test]
fn criu_is_killed_at_the_source_at_each_step() {
    column(Victim::SourceCriu, &STEPS, BROKEN);
}

#[test]
fn criu_is_killed_at_the_target_at_each_step() {
    column(Victim::TargetCriu, &STEPS, BROKEN);
}

#[test]
fn the_agents_of_a_container_are_killed_at_each_step() {
    for victim in [Victim::SourceAgent, Victim::TargetAgent] {
        column_of(Workload::redis(1).in_container(), victim, &STEPS, BROKEN);
    }
}

#[test]
fn a_containers_criu_is_killed_at_each_step() {
    for victim in [Victim::SourceCriu, Victim::TargetCriu] {
        column_of(Workload::redis(1).in_container(), victim, &STEPS, BROKEN);
    }
}

#[test]
fn the_link_between_the_sites_is_cut_at_each_step() {
    column(Victim::SitesLink, &STEPS, BROKEN);
}

#[test]
fn the_source_is_cut_off_at_each_step() {
    column(Victim::SourceCut, &STEPS, BROKEN);
}

#[test]
fn the_target_is_cut_off_at_each_step() {
    column(Victim::TargetCut, &STEPS, BROKEN);
}

#[test]
fn both_sites_are_cut_off_at_each_step() {
    column(Victim::BothCut, &STEPS, BROKEN);
}

#[test]
fn a_target_that_is_cut_off_suspends_itself_and_goes_on_when_it_is_heard_again() {
    column(Victim::TargetCut, &["restore", "confirm"], LONG);
}

#[test]
fn a_source_that_is_cut_off_for_long_stays_stopped() {
    column(Victim::SourceCut, &["transfer", "release"], LONG);
}

#[test]
fn a_daemon_that_is_cut_off_from_both_sites_for_long_comes_back() {
    column(Victim::BothCut, &["transfer", "confirm"], LONG);
}

#[test]
fn an_operator_says_how_a_migration_ends_whose_target_never_answers_again() {
    let mut matrix = Matrix::new(Workload::redis(1), Victim::TargetAgent, Duration::ZERO);
    // Killed too late, its target has confirmed; then it is the next one's turn.
    for _ in 0..5 {
        let (from, to) = (matrix.at, matrix.at.other());
        let id = matrix.drill.stack.start_migration(matrix.drill.name(), to, &Value::Null).unwrap();
        matrix.wait_for_step(&id, "confirm");
        matrix.drill.stack.kill_agent(to);
        let settled = wait_for(ENDS_WITHIN, || {
            let (_, migration) =
                matrix.drill.stack.admin("GET", &format!("/v1/migrations/{id}"), None).unwrap();
            (migration["state"] != "running").then_some(migration)
        });
        let settled = settled.expect("it is in doubt, or over");
        if settled["state"] == "in_doubt" {
            assert!(settled["doubt"].as_str().unwrap().contains("say how it ends"), "{settled:#}");
            let shown = matrix.lb(&["migrations"]);
            assert!(shown.contains("IN DOUBT, still trying"), "{shown}");
            let resolved = matrix.lb(&["migration", &id, "resolve", "--as", "rolled-back"]);
            assert!(resolved.contains(&id), "{resolved}");
            let migration = matrix.drill.stack.finished_migration(&id, ENDS_WITHIN).unwrap();
            assert_eq!(migration["state"], "rolled_back", "{migration:#}");
            assert_eq!(matrix.drill.backend()["location"], from.name());
            matrix.drill.is_open();
            let late = matrix.lb(&["migration", &id, "resolve", "--as", "committed"]);
            assert!(late.contains("it has ended"), "{late}");
            // It has nothing to say that could change that.
            matrix.drill.stack.restart_agent(to).unwrap();
            matrix.one_copy("confirm");
            matrix.drill.must_be_whole();
            return;
        }
        assert_eq!(settled["state"], "committed", "{settled:#}");
        matrix.at = to;
        matrix.drill.stack.restart_agent(to).unwrap();
    }
    panic!("the target's agent was killed too late each time");
}
