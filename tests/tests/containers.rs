//! A server in a container of runc's or podman's moves as one that is a process does: under live clients, nothing lost, no reset;
//! and what is wrong with it is said.

#![expect(clippy::unwrap_used, reason = "a test states what it expects by unwrapping")]

mod drill;

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use lab::stack::{Stack, StackOptions, Workload};
use lab::{Lab, Site, bundle, installed, podman, wait_for};
use serde_json::{Value, json};

use drill::{Drill, LIMIT, large};

fn container() -> Workload {
    Workload::redis(1).in_container()
}

/// The state of the workload at a site, as its agent says.
fn state(drill: &Drill, site: Site) -> String {
    let (_, all) = drill.stack.agent(site, "GET", "/v1/workloads", None).unwrap();
    all[0]["state"].as_str().unwrap().to_owned()
}

/// Asks podman at a site.
fn ask(drill: &Drill, site: Site, words: &[&str]) -> String {
    podman::run(drill.stack.lab(), site, words).unwrap()
}

/// What podman says of the container at a site.
fn podmans(drill: &Drill, site: Site) -> String {
    ask(drill, site, &["inspect", "--format", "{{.State.Status}}", drill.name()])
}

/// podman has written down that the container has ended at a site.
fn ends(drill: &Drill, site: Site) {
    let word = || {
        // podman needs the container's lock for its own work, too.
        std::thread::sleep(Duration::from_millis(50));
        (podmans(drill, site) == "exited").then_some(())
    };
    assert!(wait_for(LIMIT, word).is_some(), "{}", podmans(drill, site));
}

fn moves_there_and_back(drill: &Drill, times: usize, mut after: impl FnMut(Site)) {
    for to in [Site::B, Site::A].repeat(times) {
        drill.commits(to);
        drill.goes_on();
        assert_eq!(state(drill, to), "running");
        // A monitor of podman's may take longer to go than the release waits.
        wait_for(LIMIT, || (state(drill, to.other()) == "absent").then_some(())).unwrap();
        after(to);
    }
}

#[test]
fn a_container_moves_there_and_back_under_its_clients() {
    let drill = Drill::new(container());
    moves_there_and_back(&drill, 10, |_| {});
    drill.must_be_whole();
}

#[test]
fn podmans_container_moves_there_and_back_under_its_clients() {
    let drill = Drill::new(Workload::redis(1).in_podman());
    moves_there_and_back(&drill, 10, |to| {
        assert_eq!(podmans(&drill, to), "running");
        // The source is let go a moment later, and podman tidies up after that.
        ends(&drill, to.other());
    });
    // What podman is asked for by others goes on working.
    drill.commits(Site::B);
    let version = ask(&drill, Site::B, &["exec", drill.name(), "/server", "--version"]);
    assert!(version.starts_with("Redis server"), "{version}");
    drill.must_be_whole();
}

#[test]
fn podmans_container_that_podman_stops_and_starts_is_the_agents() {
    let mut drill = Drill::new(Workload::redis(1).in_podman());
    drill.commits(Site::B);
    drill.ends_whole();
    ask(&drill, Site::B, &["stop", drill.name()]);
    wait_for(LIMIT, || (state(&drill, Site::B) == "absent").then_some(())).unwrap();
    ends(&drill, Site::B);
    ask(&drill, Site::B, &["start", drill.name()]);
    drill.stack.restart_agent(Site::B).unwrap();
    assert_eq!(state(&drill, Site::B), "running");
    for (what, podmans_word) in [("stop", "exited"), ("start", "running")] {
        let path = format!("/v1/workloads/{}/{what}", drill.name());
        let (status, answer) = drill.stack.agent(Site::B, "POST", &path, None).unwrap();
        assert!(status < 300, "{answer}");
        assert_eq!(podmans(&drill, Site::B), podmans_word);
    }
}

fn that_cannot_move_goes_on(workload: Workload) {
    let drill = Drill::new(workload);
    drill.fill();
    let migration = drill.migrate(Site::B, json!({"deadline_ms": 40}));
    drill.rolled_back(&migration, "deadline");
    drill.ends_when_aborted();
    drill.commits(Site::B);
    drill.commits(Site::A);
    drill.must_be_whole();
}

#[test]
fn a_container_that_cannot_move_goes_on() {
    that_cannot_move_goes_on(large().in_container());
}

#[test]
fn podmans_container_that_cannot_move_goes_on() {
    that_cannot_move_goes_on(large().in_podman());
}

fn is_adopted_by_the_next_agent(workload: Workload) {
    let mut drill = Drill::new(workload);
    for to in [Site::B, Site::A] {
        for site in Site::ALL {
            drill.stack.restart_agent(site).unwrap();
        }
        drill.goes_on();
        assert_eq!(state(&drill, to.other()), "running");
        drill.commits(to);
    }
    drill.must_be_whole();
}

#[test]
fn an_agent_that_was_killed_adopts_its_container() {
    is_adopted_by_the_next_agent(container());
}

#[test]
fn an_agent_that_was_killed_adopts_podmans_container() {
    is_adopted_by_the_next_agent(Workload::redis(1).in_podman());
}

fn survives_an_agent_that_dies_in_its_move(workload: Workload) {
    let mut drill = Drill::new(workload);
    drill.fill();
    for (dying, phase) in
        [(Site::B, "freeze"), (Site::B, "transfer"), (Site::A, "freeze"), (Site::A, "transfer")]
    {
        let id = drill.stack.start_migration(drill.name(), Site::B, &Value::Null).unwrap();
        drill.reaches(&id, phase);
        drill.stack.kill_agent(dying);
        drill.stack.restart_agent(dying).unwrap();
        let migration = drill.stack.finished_migration(&id, LIMIT).unwrap();
        drill.rolled_back(&migration, "");
        // podman takes a moment to tidy up.
        wait_for(LIMIT, || (state(&drill, Site::B) == "absent").then_some(())).unwrap();
    }
    drill.commits(Site::B);
    drill.must_be_whole();
}

#[test]
fn an_agent_that_dies_in_a_containers_move_loses_nothing() {
    survives_an_agent_that_dies_in_its_move(large().in_container());
}

#[test]
fn an_agent_that_dies_in_the_move_of_podmans_container_loses_nothing() {
    survives_an_agent_that_dies_in_its_move(large().in_podman());
}

#[test]
fn what_a_container_needs_is_looked_for_before_anything_is_held() {
    let lab = Lab::new().unwrap();
    let workload = container();
    let config = workload.bundle(&lab, Site::B).join("config.json");
    let mut drill =
        Drill::within(lab, StackOptions { workloads: vec![workload.clone()], ..StackOptions::default() });
    let refused = |drill: &Drill, why: &str| {
        let migration = drill.migrate(Site::B, Value::Null);
        drill.rolled_back(&migration, why);
        let phases = migration["report"]["phases"].as_array().unwrap();
        assert!(phases.iter().all(|phase| phase["name"] != "hold"), "{phases:?}");
    };

    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::remove_file(&config).unwrap();
    refused(&drill, "config.json cannot be read: an oci bundle");
    std::fs::write(&config, "{").unwrap();
    refused(&drill, "is no oci configuration");
    let root = workload.root(drill.stack.lab());
    let elsewhere = root.with_extension("none");
    std::fs::write(&config, text.replace(root.to_str().unwrap(), elsewhere.to_str().unwrap())).unwrap();
    refused(&drill, "is not a folder");
    std::fs::create_dir(&elsewhere).unwrap();
    refused(&drill, "libc.so.6\" cannot be had there");
    bundle::fill_root(&elsewhere, &installed("redis-server").unwrap()).unwrap();
    let mut program = File::options().append(true).open(elsewhere.join("server")).unwrap();
    program.write_all(b"x").unwrap();
    refused(&drill, "server\" has");
    std::fs::write(&config, &text).unwrap();

    let agent = drill.stack.config_path("agent-fra");
    let lines = std::fs::read_to_string(&agent).unwrap();
    std::fs::write(&agent, format!("runc = \"/nonexistent/runc\"\n{lines}")).unwrap();
    drill.stack.restart_agent(Site::B).unwrap();
    refused(&drill, "/nonexistent/runc is not here: install runc");
    std::fs::write(&agent, &lines).unwrap();
    drill.stack.restart_agent(Site::B).unwrap();

    drill.commits(Site::B);
    drill.must_be_whole();
}

#[test]
fn what_podmans_container_needs_is_looked_for_before_anything_is_held() {
    let drill = Drill::new(Workload::redis(1).in_podman());
    let (lab, name) = (drill.stack.lab(), drill.name());
    let program = drill.workload.contained();
    let refused = |why: &str| drill.rolled_back(&drill.migrate(Site::B, Value::Null), why);
    ask(&drill, Site::B, &["rm", name]);
    refused("podman knows no container");
    for (options, why) in [
        (&["--restart", "always"][..], "has a restart policy"),
        (&["--rm"], "is removed when it ends"),
        (&["--tty"], "a terminal cannot be moved"),
    ] {
        podman::create(lab, Site::B, name, options, &program).unwrap();
        refused(why);
        ask(&drill, Site::B, &["rm", "--force", name]);
    }
    podman::create(lab, Site::B, name, &[], &program).unwrap();
    ask(&drill, Site::B, &["start", name]);
    refused("runs at the target already");
    ask(&drill, Site::B, &["stop", name]);
    drill.commits(Site::B);
    drill.must_be_whole();
}

#[test]
fn a_container_whose_name_is_taken_is_not_started() {
    let lab = Lab::new().unwrap();
    let workload = container();
    let group = workload.container_group(&lab, Site::B);
    let stack =
        Stack::start(lab, StackOptions { workloads: vec![workload.clone()], ..StackOptions::default() })
            .unwrap();
    let _squatter = Squatter::in_group(&group);
    let start = |site| {
        let path = format!("/v1/workloads/{}/start", workload.name);
        stack.agent(site, "POST", &path, None).unwrap()
    };
    let (status, answer) = start(Site::B);
    let said = answer["detail"].as_str().unwrap();
    assert!(status == 409 && said.contains(&format!("control group {group:?} is taken by pid")), "{answer}");
    let (status, answer) = start(Site::A);
    assert!(status == 409 && answer["detail"].as_str().unwrap().contains("there cannot be two"), "{answer}");
}

/// A process in a control group, whichever version this host has.
struct Squatter(std::process::Child, PathBuf);

impl Squatter {
    fn in_group(group: &str) -> Self {
        let roots = ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"].map(PathBuf::from);
        let root = roots.into_iter().find(|root| root.join("cgroup.procs").is_file()).unwrap();
        let folder = root.join(group.trim_start_matches('/'));
        std::fs::create_dir_all(&folder).unwrap();
        let child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        std::fs::write(folder.join("cgroup.procs"), child.id().to_string()).unwrap();
        Self(child, folder)
    }
}

impl Drop for Squatter {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        let _ = std::fs::remove_dir(&self.1);
    }
}
