//! Whole migrations through the whole stack: real redis servers, CRIU, agents, daemon and XDP under live clients.
//!
//! After each test the clients must have had every answer once and in order over the connection that they began
//! with, and the server must have counted what they sent.

#![expect(clippy::unwrap_used, reason = "a test states what it expects by unwrapping")]

mod drill;
mod player;

use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use bench::driver::{self, Load, Source};
use bench::probe::wait_until_it_answers;
use bench::scenario::Scenario;
use lab::link::{QueueLimit, Spec, Way, WaySpec};
use lab::stack::{HoldOptions, Runner, Stack, StackOptions, Workload};
use lab::{Lab, Site, address, wait_for};
use serde_json::{Value, json};

use drill::{Drill, LIMIT, large};
use player::Player;

#[test]
fn a_server_moves_there_and_back_under_its_clients() {
    for workload in [Workload::redis(1), Workload::redis6(1)] {
        let drill = Drill::new(workload);
        for to in [Site::B, Site::A].repeat(10) {
            drill.commits(to);
            drill.goes_on();
        }
        drill.must_be_whole();
    }
}

/// A game server, with these settings too.
fn arena(settings: &[(&str, &str)]) -> (Lab, Workload) {
    let lab = Lab::new().unwrap();
    let scenario = Scenario::OpenArena;
    let address = SocketAddr::new(address::backend4(1).into(), scenario.port());
    let home = lab.dir().join("home");
    std::fs::create_dir(&home).unwrap();
    let settings = settings.iter().flat_map(|(name, value)| ["+set", name, value]).map(str::to_owned);
    let command = scenario.command(address, &home).unwrap().into_iter().chain(settings);
    let workload = Workload {
        name: "arena".to_owned(),
        address,
        protocol: lab::stack::Protocol::Udp,
        command: command.collect(),
        dir: None,
        site: Site::A,
        service: SocketAddr::new(address::VIRTUAL4.into(), scenario.port()),
        mode: lab::stack::Mode::Nat,
        memory: lab::stack::Memory::Auto,
        runner: Runner::Agent,
    };
    (lab, workload)
}

/// Moves the game server there and back, twenty moves in all.
fn move_arena(stack: &Stack, mut between: impl FnMut(usize)) {
    for (number, to) in [Site::B, Site::A].repeat(10).into_iter().enumerate() {
        let id = stack.start_migration("arena", to, &Value::Null).unwrap();
        let migration = stack.finished_migration(&id, LIMIT).unwrap();
        assert_eq!(migration["state"], "committed", "{migration:#}");
        between(number);
    }
}

#[test]
fn a_real_player_stays_in_the_game_while_its_server_moves() {
    // The server gives a silent player up after five seconds, as the player does with it; and takes what is said at once.
    let (lab, workload) = arena(&[("sv_timeout", "5"), ("sv_floodProtect", "0")]);
    let game = workload.service;
    let stack =
        Stack::start(lab, StackOptions { workloads: vec![workload], ..StackOptions::default() }).unwrap();
    let mut player = Player::joins(&stack, game);
    let (began, before) = (Instant::now(), player.processor_time());
    let first = player.standing(&stack);
    move_arena(&stack, |number| {
        player.is_heard(&format!("move-{number}."));
        std::thread::sleep(Duration::from_millis(300));
    });
    let share = (player.processor_time() - before).as_secs_f64() / began.elapsed().as_secs_f64();
    let standing = player.standing(&stack);
    println!("{standing:?} after the moves; the client took {:.0} % of a processor", share * 100.0);
    assert_eq!(standing.game_began, first.game_began, "the game is the same");
    assert_eq!(standing.score, first.score);
    assert!(standing.ping_ms < 200, "{standing:?}");
    assert_eq!(player.joined(), 1, "the client joined once");
    assert!(!player.gave_up(), "the client lost its connection");
}

#[test]
fn a_game_server_moves_there_and_back_and_no_datagram_is_lost() {
    let scenario = Scenario::OpenArena;
    let (lab, workload) = arena(&[]);
    let target = workload.service;
    let stack =
        Stack::start(lab, StackOptions { workloads: vec![workload], ..StackOptions::default() }).unwrap();
    // Below what the server grants to all of its askers together.
    let load = Load {
        target,
        source: Source::Any,
        clients: 8,
        rate_per_s: 6.0,
        connect_timeout: LIMIT,
        drain: Duration::from_secs(3),
    };
    let clients = stack.lab().client().run(|| {
        wait_until_it_answers(target, scenario.protocol().as_ref(), LIMIT).unwrap();
        driver::connect(load, scenario.protocol()).unwrap().start().unwrap()
    });
    std::thread::sleep(Duration::from_millis(300));
    move_arena(&stack, |_| std::thread::sleep(Duration::from_millis(300)));
    std::thread::sleep(Duration::from_millis(500));
    let timeline = clients.stop().unwrap();
    assert_eq!((timeline.faults.lost, timeline.faults.duplicated), (0, 0), "{:?}", timeline.errors);
    assert!(timeline.answered() >= 6, "{}", timeline.answered());
}

#[test]
fn a_server_moves_over_a_long_way_with_losses() {
    let way = WaySpec {
        delay: Duration::from_millis(10),
        rate_bits_per_s: NonZeroU64::new(400_000_000),
        queue: QueueLimit::Bytes(1 << 20),
        loss: 0.0005,
        ..WaySpec::default()
    };
    let hold = HoldOptions { deadline_ms: Some(15_000), max_age_ms: Some(20_000), ..HoldOptions::default() };
    let link = Some(Spec::symmetric(way));
    let drill = Drill::with(StackOptions {
        workloads: vec![Workload::redis(1)],
        hold,
        link,
        ..StackOptions::default()
    });
    let crossed = |way| drill.stack.lab().link().unwrap().counters(way).forwarded_bytes;
    for (to, way) in [(Site::B, Way::AToB), (Site::A, Way::BToA)] {
        let before = crossed(way);
        drill.goes_on();
        assert!(crossed(way) - before < 20_000, "clients do not go over the sites' link");
        drill.commits(to);
        assert!(crossed(way) - before > 500_000, "images do: {}", crossed(way) - before);
    }
    drill.must_be_whole();
}

#[test]
fn policy_drop_loses_nothing_of_tcp() {
    let drill = Drill::new(Workload::redis(1));
    let migration = drill.migrate(Site::B, json!({"policy": "drop"}));
    assert_eq!(migration["state"], "committed", "{migration:#}");
    assert_eq!(migration["report"]["held_packets"], 0);
    drill.must_be_whole();
}

#[test]
fn a_restore_that_fails_ends_at_the_source() {
    let lab = Lab::new().unwrap();
    // A file that is written to may have any size in prepare; the restore finds that it is another file there.
    let [here, there] = ["here", "there"].map(|name| lab.dir().join(name));
    std::fs::write(&here, "x").unwrap();
    std::fs::write(&there, "another").unwrap();
    let mut workload = Workload::redis(1);
    let keep_open = format!("exec \"$@\" 9<>{}", here.display());
    workload.command.splice(0..0, ["sh", "-c", &keep_open, "sh"].map(str::to_owned));
    let replaced = vec![(Site::B, here, there)];
    let drill =
        Drill::within(lab, StackOptions { workloads: vec![workload], replaced, ..StackOptions::default() });
    for _ in 0..2 {
        let migration = drill.migrate(Site::B, Value::Null);
        drill.rolled_back(&migration, "bad size");
    }
    drill.must_be_whole();
}

#[test]
fn a_program_that_is_not_at_the_target_is_found_before_anything_is_held() {
    let lab = Lab::new().unwrap();
    let only_here = lab.dir().join("only-here");
    std::fs::create_dir(&only_here).unwrap();
    let mut workload = Workload::redis(1);
    let program = only_here.join("redis-server");
    std::fs::copy(lab::installed("redis-server").unwrap(), &program).unwrap();
    workload.command[0] = program.display().to_string();
    let hidden = vec![(Site::B, only_here)];
    let drill =
        Drill::within(lab, StackOptions { workloads: vec![workload], hidden, ..StackOptions::default() });
    for _ in 0..2 {
        let migration = drill.migrate(Site::B, Value::Null);
        drill.rolled_back(&migration, "only-here");
        let phases = migration["report"]["phases"].as_array().unwrap();
        assert!(phases.iter().all(|phase| phase["name"] != "hold"), "{phases:?}");
    }
    drill.must_be_whole();
}

#[test]
fn a_server_that_cannot_be_dumped_stays_where_it_is() {
    let lab = Lab::new().unwrap();
    let socket = lab.dir().join("redis.sock");
    let mut workload = Workload::redis(1);
    workload.command.extend(["--unixsocket".to_owned(), socket.display().to_string()]);
    let drill = Drill::within(lab, StackOptions { workloads: vec![workload], ..StackOptions::default() });
    // The other end of this connection is outside of what is dumped.
    let outside = UnixStream::connect(&socket).unwrap();
    let migration = drill.migrate(Site::B, Value::Null);
    drill.rolled_back(&migration, "unix");
    drop(outside);
    std::thread::sleep(Duration::from_millis(100));
    drill.commits(Site::B);
    drill.must_be_whole();
}

#[test]
fn a_target_agent_that_dies_ends_at_the_source_and_the_next_try_succeeds() {
    let mut drill = Drill::new(large());
    drill.fill();
    for phase in ["freeze", "transfer"] {
        let id = drill.stack.start_migration(drill.name(), Site::B, &Value::Null).unwrap();
        drill.reaches(&id, phase);
        drill.stack.kill_agent(Site::B);
        let migration = drill.stack.finished_migration(&id, LIMIT).unwrap();
        drill.rolled_back(&migration, "target");
        drill.stack.restart_agent(Site::B).unwrap();
    }
    drill.commits(Site::B);
    drill.must_be_whole();
}

#[test]
fn a_deadline_that_passes_ends_at_the_source() {
    let drill = Drill::new(large());
    drill.fill();
    let migration = drill.migrate(Site::B, json!({"deadline_ms": 40}));
    drill.rolled_back(&migration, "deadline");
    drill.commits(Site::B);
    drill.must_be_whole();
}

#[test]
fn an_abort_ends_at_the_source() {
    let drill = Drill::new(large());
    drill.fill();
    drill.ends_when_aborted();
    drill.must_be_whole();
}

#[test]
fn one_backend_migrates_once_at_a_time() {
    let drill = Drill::new(large());
    drill.fill();
    let id = drill.stack.start_migration(drill.name(), Site::B, &Value::Null).unwrap();
    let body = json!({"backend": drill.name(), "to": Site::B.name()});
    let (status, problem) = drill.stack.admin("POST", "/v1/migrations", Some(&body)).unwrap();
    assert_eq!(status, 409, "{problem}");
    drill.stack.finished_migration(&id, LIMIT).unwrap();
    assert_eq!(drill.backend()["location"], Site::B.name());
    drill.must_be_whole();
}

#[test]
fn a_daemon_killed_while_forwarding_is_not_missed() {
    let mut drill = Drill::new(Workload::redis(1));
    drill.commits(Site::B);
    let before = drill.backend();
    drill.stack.kill_daemon();
    drill.goes_on();
    drill.stack.restart_daemon().unwrap();
    let after = drill.backend();
    for field in ["location", "gate", "generation", "address"] {
        assert_eq!(after[field], before[field], "{field}");
    }
    drill.commits(Site::A);
    let ended = drill.stack.stop_daemon().unwrap();
    assert!(ended.success(), "SIGTERM is no failure: {ended}");
    drill.goes_on();
    drill.stack.restart_daemon().unwrap();
    drill.must_be_whole();
}

#[test]
fn a_daemon_killed_while_holding_goes_on_holding() {
    let mut drill = Drill::new(Workload::redis(1));
    // Both of its places are known then, and their agents could be asked.
    drill.commits(Site::B);
    let hold = format!("/v1/backends/{}/hold", drill.name());
    let (status, held) = drill.stack.admin("POST", &hold, Some(&json!({"deadline_ms": 20_000}))).unwrap();
    assert_eq!(status, 200, "{held}");
    std::thread::sleep(Duration::from_millis(100));
    drill.stack.kill_daemon();
    drill.stack.restart_daemon().unwrap();
    let backend = drill.backend();
    assert_eq!(backend["gate"], "hold", "{backend:#}");
    let resume = format!("/v1/backends/{}/resume", drill.name());
    let body = json!({"generation": backend["generation"]});
    let (status, answer) = drill.stack.admin("POST", &resume, Some(&body)).unwrap();
    assert_eq!(status, 200, "{answer}");
    drill.is_open();
    drill.must_be_whole();
}

#[test]
fn a_daemon_killed_in_a_migration_is_recovered_from() {
    let mut drill = Drill::new(large());
    drill.fill();
    for phase in ["freeze", "transfer"] {
        let id = drill.stack.start_migration(drill.name(), Site::B, &Value::Null).unwrap();
        drill.reaches(&id, phase);
        drill.stack.kill_daemon();
        drill.stack.restart_daemon().unwrap();
        drill.is_open();
        drill.nothing_runs();
        drill.goes_on();
    }
    let away = if drill.backend()["location"] == Site::A.name() { Site::B } else { Site::A };
    drill.commits(away);
    drill.must_be_whole();
}

#[test]
fn a_hold_whose_deadline_passes_drops_and_waits_for_its_operator() {
    let drill = Drill::new(Workload::redis(1));
    let hold = format!("/v1/backends/{}/hold", drill.name());
    let (status, _) = drill.stack.admin("POST", &hold, Some(&json!({"deadline_ms": 50}))).unwrap();
    assert_eq!(status, 200);
    wait_for(LIMIT, || (drill.backend()["gate"] == "drop").then_some(())).expect("the deadline passes");
    let generation = drill.backend()["generation"].clone();
    let resume = format!("/v1/backends/{}/resume", drill.name());
    let (status, _) = drill.stack.admin("POST", &resume, Some(&json!({"generation": generation}))).unwrap();
    assert_eq!(status, 200);
    drill.is_open();
    drill.must_be_whole();
}
