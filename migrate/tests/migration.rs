//! Whole migrations with real processes, real CRIU and real agents between two network namespaces.
#![expect(clippy::unwrap_used, reason = "a test states what it expects by unwrapping")]

mod common;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use common::outcome::{assert_moves, assert_rolled_back, lab, scratch, show};
use common::{At, BACKEND, Client, DEADLINE, Lab, Options, possible};
use migrate::coordinator::{Left, Operator, Orders, Outcome, Progress, Report};

/// A server whose memory takes a while to go over, all of it in the freeze.
fn slow_to_leave() -> Options {
    let memory = || "memory = \"pre\"\n".to_owned();
    Options {
        arguments: vec!["--fill-mib".to_owned(), "150".to_owned()],
        workload: [memory(), memory()],
        ..Options::default()
    }
}

#[test]
fn there_and_back() {
    let Some(lab) = lab(Options::default()) else { return };
    let client = Client::start(&lab);
    let mut from = At::A;
    for round in 0..6 {
        let report = lab.migrate(lab.spec(&format!("m-{round}"), from, DEADLINE), |_| ());
        show(&format!("{from:?} -> {:?}", from.other()), &report);
        assert_eq!(report.outcome, Outcome::Committed, "{:?}", report.reason);
        assert_eq!(report.reason, None);
        let names: Vec<_> = report.phases.iter().map(|phase| phase.name).collect();
        assert_eq!(names, migrate::coordinator::phases::PHASES);
        assert!(report.phases.iter().is_sorted_by(|a, b| a.end_ms == b.start_ms));
        assert!(report.freeze_ms > 0.0 && report.image_bytes > 0 && report.sent_bytes > report.image_bytes);
        client.wait(20);
        lab.assert_unsilenced(At::A);
        lab.assert_unsilenced(At::B);
        let (here, gone) = (lab.get(from.other(), "/v1/workloads"), lab.get(from, "/v1/workloads"));
        assert!(
            here.contains("\"state\":\"running\"") && gone.contains("\"state\":\"absent\""),
            "{here}{gone}"
        );
        from = from.other();
    }
    for at in [At::A, At::B] {
        let images = lab.dir.join(format!("state-{}/images", at.name()));
        let wiped = || std::fs::read_dir(&images).unwrap().all(|entry| entry.unwrap().path().is_file());
        // Those of a server that runs have a moment.
        let end = std::time::Instant::now() + DEADLINE;
        while !wiped() {
            assert!(std::time::Instant::now() < end, "images are left at {at:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    client.finish().unwrap();
}

#[test]
fn redis_keeps_its_data_and_its_client() {
    if !possible() {
        return;
    }
    if std::process::Command::new("redis-server").arg("--version").output().is_err() {
        eprintln!("skipped: no redis-server; `cargo xtask setup` installs it");
        return;
    }
    let words = "redis-server --bind 10.1.0.1 --port 7000 --save \"\" --protected-mode no";
    let command = words.split(' ').map(|word| word.trim_matches('"').to_owned()).collect();
    let lab = Arc::new(Lab::new(Options { command: Some(command), ..Options::default() }));
    let client = Client::start_saying(&lab, "INCR counter\r\n", ":");
    let mut from = At::A;
    for round in 0..4 {
        assert_moves(&lab, &client, &format!("redis-{round}"), from);
        from = from.other();
    }
    client.finish().unwrap();
}

#[test]
fn over_ipv6() {
    let Some(lab) = lab(Options { ipv6: true, ..Options::default() }) else { return };
    let client = Client::start(&lab);
    assert_moves(&lab, &client, "v6-there", At::A);
    assert_moves(&lab, &client, "v6-back", At::B);
    client.finish().unwrap();
}

#[test]
fn a_file_that_is_another_at_the_target_rolls_back() {
    if !possible() {
        return;
    }
    let scratch = scratch();
    let [file, other] = ["file", "other"].map(|name| scratch.path().join(name));
    std::fs::write(&file, "x").unwrap();
    std::fs::write(&other, "another").unwrap();
    // A file that is written to may have any size in prepare; CRIU compares it in the restore.
    let arguments = vec!["--write".to_owned(), file.to_str().unwrap().to_owned()];
    let lab =
        Arc::new(Lab::new(Options { arguments, other_at_b: Some((file, other)), ..Options::default() }));
    let client = Client::start(&lab);
    for round in 0..2 {
        let report = lab.migrate(lab.spec(&format!("other-file-{round}"), At::A, DEADLINE), |_| ());
        assert_rolled_back(&lab, &report, "bad size");
        assert!(report.phases.iter().any(|phase| phase.name == "restore"), "{:?}", report.phases);
        client.wait(20);
        let target = lab.get(At::B, "/v1/workloads");
        assert!(target.contains("\"state\":\"absent\""), "{target}");
    }
    client.finish().unwrap();
}

#[test]
fn a_server_that_cannot_be_dumped_goes_on() {
    if !possible() {
        return;
    }
    let scratch = scratch();
    let path = scratch.path().join("outside");
    let _outside = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let arguments = vec!["--unix-in-flight".to_owned(), path.to_str().unwrap().to_owned()];
    let lab = Arc::new(Lab::new(Options { arguments, ..Options::default() }));
    let client = Client::start(&lab);
    let report = lab.migrate(lab.spec("outside", At::A, DEADLINE), |_| ());
    assert_rolled_back(&lab, &report, "CRIU: ");
    assert!(report.phases.iter().any(|phase| phase.name == "freeze"), "{:?}", report.phases);
    client.wait(20);
    client.finish().unwrap();
}

/// Kills an agent when a phase begins; the phases before the flip all end in a rollback.
fn kill_in(lab: &Arc<Lab>, id: &str, at: At, phase: &str) -> Report {
    let killer = lab.clone();
    lab.migrate(lab.spec(id, At::A, DEADLINE), move |progress| {
        if matches!(progress, Progress::Phase { name, end_ms: None, .. } if *name == phase) {
            killer.kill_agent(at);
        }
    })
}

#[test]
fn a_target_agent_that_dies_rolls_back_and_the_next_try_succeeds() {
    let Some(lab) = lab(slow_to_leave()) else { return };
    let client = Client::start(&lab);
    for phase in ["prepare", "drain", "freeze", "transfer", "restore"] {
        let report = kill_in(&lab, &format!("kill-b-{phase}"), At::B, phase);
        // The source may notice it first, since it can no longer send.
        assert_rolled_back(&lab, &report, "target");
        client.wait(20);
        lab.start_agent(At::B);
        assert!(lab.get(At::B, "/v1/workloads").contains("\"state\":\"absent\""));
    }
    assert_moves(&lab, &client, "after", At::A);
    client.finish().unwrap();
}

#[test]
fn a_source_agent_that_dies_leaves_its_workload_running() {
    let Some(lab) = lab(slow_to_leave()) else { return };
    let client = Client::start(&lab);
    for phase in ["freeze", "transfer"] {
        let restarter = lab.clone();
        let report = lab.migrate(lab.spec(&format!("kill-a-{phase}"), At::A, DEADLINE), move |progress| {
            if matches!(progress, Progress::Phase { name, end_ms: None, .. } if *name == phase) {
                restarter.kill_agent(At::A);
                restarter.start_agent(At::A);
            }
        });
        assert_rolled_back(&lab, &report, "the source failed");
        assert!(lab.log(At::A).contains("adopted"));
        client.wait(20);
    }
    assert_moves(&lab, &client, "after", At::A);
    client.finish().unwrap();
}

#[test]
fn a_deadline_that_passes_rolls_back() {
    let Some(lab) = lab(slow_to_leave()) else { return };
    let client = Client::start(&lab);
    let report = lab.migrate(lab.spec("late", At::A, Duration::from_millis(30)), |_| ());
    assert_rolled_back(&lab, &report, "deadline of 30 ms passed");
    client.wait(20);
    assert_moves(&lab, &client, "after", At::A);
    client.finish().unwrap();
}

#[test]
fn an_abort_before_the_flip_rolls_back() {
    let Some(lab) = lab(Options::default()) else { return };
    let client = Client::start(&lab);
    for phase in ["prepare", "drain"] {
        let (operator, orders) = Operator::new();
        let phase_name = phase;
        let spec = lab.spec(&format!("abort-{phase}"), At::A, DEADLINE);
        let report = lab.coordinate(
            move |progress| {
                if matches!(progress, Progress::Phase { name, .. } if *name == phase_name) {
                    operator.abort();
                }
            },
            |lab, progress| async move {
                migrate::coordinator::run(spec, common::Gate::at(&lab), orders, progress).await
            },
        );
        // The test may be too late for a drain of a millisecond; then it is a migration like any other.
        if phase == "prepare" || report.outcome == Outcome::RolledBack {
            assert_rolled_back(&lab, &report, "aborted");
            client.wait(20);
        }
    }
    client.finish().unwrap();
}

#[test]
fn agents_can_be_killed_while_nothing_moves() {
    let Some(lab) = lab(Options::default()) else { return };
    let client = Client::start(&lab);
    for _ in 0..2 {
        lab.kill_agent(At::A);
        client.wait(20);
        lab.start_agent(At::A);
        client.wait(20);
    }
    assert_moves(&lab, &client, "there", At::A);
    lab.kill_agent(At::B);
    client.wait(20);
    lab.start_agent(At::B);
    assert_moves(&lab, &client, "back", At::B);
    client.finish().unwrap();
}

/// Runs a migration whose coordinator crashes at the flip, then recovers it as a restarted one does.
fn crash_and_recover(lab: &Arc<Lab>, id: &str, from: At, after_flip: bool) -> Report {
    let spec = lab.spec(id, from, DEADLINE);
    let gate = common::Gate::at(lab);
    lab.coordinate(
        |_| (),
        move |_, progress| async move {
            let cutover = Arc::new(common::Crashing { gate: gate.clone(), after_flip });
            let (spec_then, ignored) = (spec.clone(), tokio::sync::mpsc::unbounded_channel().0);
            let run = migrate::coordinator::run(spec_then, cutover, Orders::none(), ignored);
            assert!(tokio::spawn(run).await.is_err(), "the coordinator did not get to its flip");
            let left = match after_flip {
                true => Left::After { confirmed: false },
                false => Left::Before { generation: gate.generation() },
            };
            migrate::coordinator::recover(spec, left, gate, Orders::none(), progress).await
        },
    )
}

#[test]
fn a_coordinator_that_dies_is_recovered_from() {
    let Some(lab) = lab(Options::default()) else { return };
    let client = Client::start(&lab);
    let report = crash_and_recover(&lab, "before", At::A, false);
    assert_rolled_back(&lab, &report, "restarted before the flip");
    client.wait(20);
    let report = crash_and_recover(&lab, "after", At::A, true);
    show("recovered", &report);
    assert_eq!(report.outcome, Outcome::Committed, "{:?}", report.reason);
    client.wait(20);
    assert!(lab.get(At::A, "/v1/workloads").contains("\"state\":\"absent\""));
    assert_moves(&lab, &client, "back", At::B);
    client.finish().unwrap();
}

#[test]
fn a_coordinator_that_comes_back_late_finds_both_copies_waiting() {
    let Some(lab) = lab(Options::default()) else { return };
    let client = Client::start(&lab);
    let spec = lab.spec("silent", At::A, Duration::from_millis(200));
    let gate = common::Gate::at(&lab);
    let report = lab.coordinate(
        |_| (),
        move |lab, progress| async move {
            let cutover = Arc::new(common::Crashing { gate: gate.clone(), after_flip: false });
            let run = migrate::coordinator::run(spec.clone(), cutover, Orders::none(), progress.clone());
            assert!(tokio::spawn(run).await.is_err());
            // Past the hold's deadline and every margin: neither may run unless the coordinator says which.
            tokio::time::sleep(Duration::from_secs(5)).await;
            let state = |at| lab.get(at, "/v1/workloads");
            assert!(state(At::A).contains("frozen"), "{}", state(At::A));
            assert!(state(At::B).contains("restored"), "{}", state(At::B));
            let left = Left::Before { generation: gate.generation() };
            migrate::coordinator::recover(spec, left, gate, Orders::none(), progress).await
        },
    );
    assert_rolled_back(&lab, &report, "restarted");
    lab.assert_unsilenced(At::A);
    client.wait(20);
    client.finish().unwrap();
}

#[test]
fn bad_requests_have_their_own_answers_and_change_nothing() {
    let Some(lab) = lab(Options::default()) else { return };
    let client = Client::start(&lab);
    let prepare = |role: &str, workload: &str, address: &str| {
        format!(
            r#"{{"role":"{role}","workload":"{workload}","address":"{address}","protocol":"tcp","peer_site":"c","peer_url":"http://10.2.2.1:7401","hold_deadline_ms":1000,"lease_ms":10000}}"#
        )
    };
    let address = lab.address.to_string();
    for (at, path, body, status, detail) in [
        (At::A, "/v1/migrations/x", "{".to_owned(), "400", "EOF"),
        (At::A, "/v1/migrations/x", "{}".to_owned(), "422", "missing field"),
        (At::A, "/v1/migrations/x", prepare("target", BACKEND, &address), "409", "running here"),
        (At::B, "/v1/migrations/x", prepare("source", BACKEND, &address), "409", "does not run at site"),
        (At::A, "/v1/migrations/x", prepare("target", "chat-2", &address), "404", "no workload"),
        (At::A, "/v1/migrations/x", prepare("target", BACKEND, "10.1.0.2:7000"), "400", "10.1.0.2:7000/tcp"),
        (At::A, "/v1/migrations/.x", prepare("target", BACKEND, &address), "400", "id"),
        (At::A, "/v1/nothing", String::new(), "404", "nothing at this path"),
    ] {
        let answer = lab.http(at, "PUT", path, &body);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{path} {body}: {answer}");
        assert!(answer.contains("application/problem+json") && answer.contains(detail), "{answer}");
    }
    for verb in ["freeze", "release", "offer", "go", "confirm", "abort"] {
        let body = match verb {
            "freeze" => r#"{"settle_us":0}"#.into(),
            "go" => format!(r#"{{"workload":"{BACKEND}","offer":0}}"#),
            _ => format!(r#"{{"role":"source","workload":"{BACKEND}"}}"#),
        };
        let answer = lab.http(At::B, "POST", &format!("/v1/migrations/none/{verb}"), &body);
        // To release what is not here is done already.
        let status = match verb {
            "freeze" => "404",
            "release" => "200",
            // The coordinator takes that for an answer: it may go back.
            "offer" | "go" => "410",
            _ => "409",
        };
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{verb}: {answer}");
    }
    assert!(lab.get(At::A, "/healthz").ends_with("ok\n"));
    client.wait(20);
    client.finish().unwrap();
}

#[test]
fn an_agent_commands_no_other_and_sends_only_what_is_expected_of_it() {
    let Some(lab) = lab(Options::default()) else { return };
    let client = Client::start(&lab);
    let (coordinator, [a, b]) = &lab.certificates;
    let prepare = |peer: &str| {
        format!(
            r#"{{"role":"target","workload":"{BACKEND}","address":"{}","protocol":"tcp","peer_site":"{peer}","peer_url":"https://10.2.1.1:7401","hold_deadline_ms":1000,"lease_ms":10000}}"#,
            lab.address
        )
    };
    let part = format!(r#"{{"role":"source","workload":"{BACKEND}"}}"#);
    for (method, path, body) in [
        ("GET", "/v1/workloads".to_owned(), String::new()),
        ("POST", format!("/v1/workloads/{BACKEND}/stop"), String::new()),
        ("PUT", "/v1/migrations/x".to_owned(), prepare("b")),
        ("GET", "/v1/migrations/x/events".to_owned(), String::new()),
        ("POST", "/v1/migrations/x/freeze".to_owned(), r#"{"settle_us":0}"#.to_owned()),
        ("POST", "/v1/migrations/x/release".to_owned(), part.clone()),
        ("POST", "/v1/migrations/x/verb-of-tomorrow".to_owned(), part),
    ] {
        let answer = lab.http_as(b, At::A, method, &path, &body);
        assert!(answer.starts_with("HTTP/1.1 403 "), "{method} {path}: {answer}");
        assert!(answer.contains("this is for coordinators"), "{answer}");
    }
    assert!(lab.http_as(b, At::A, "GET", "/healthz", "").ends_with("ok\n"));
    assert!(lab.log(At::A).contains("refused: this is for coordinators"), "{}", lab.log(At::A));

    let images = |files, id: &str| {
        lab.http_as(files, At::B, "POST", &format!("/v1/migrations/{id}/images"), "no images")
    };
    assert!(images(a, "none").starts_with("HTTP/1.1 404 "));
    for (id, peer, status) in [("from-c", "c", "403"), ("from-a", "a", "422")] {
        let answer = lab.http_as(coordinator, At::B, "PUT", &format!("/v1/migrations/{id}"), &prepare(peer));
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        // What is let in is found to be no images.
        let answer = images(a, id);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{id}: {answer}");
    }
    client.wait(20);
    client.finish().unwrap();
}

#[test]
fn a_coordinator_that_means_another_site_moves_nothing() {
    let Some(lab) = lab(Options::default()) else { return };
    let client = Client::start(&lab);
    let mut spec = lab.spec("m-wrong", At::A, DEADLINE);
    spec.target.url = spec.source.url.clone();
    let report = lab.migrate(spec, |_| ());
    assert_rolled_back(
        &lab,
        &report,
        "it is that of the agent of site \"a\", and the agent of site \"b\" is meant",
    );
    client.wait(20);
    client.finish().unwrap();
}

#[test]
fn images_and_keys_are_for_root_alone() {
    use std::os::unix::fs::PermissionsExt;
    let Some(lab) = lab(Options::default()) else { return };
    let client = Client::start(&lab);
    let mode = |path: PathBuf| std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
    let frozen = std::sync::Mutex::new(Vec::new());
    let report = lab.migrate(lab.spec("m-modes", At::A, DEADLINE), |_| {
        for at in ["a", "b"] {
            let folder = lab.dir.join(format!("state-{at}/images/m-modes"));
            let Ok(metadata) = std::fs::metadata(folder) else { continue };
            frozen.lock().unwrap().push(metadata.permissions().mode() & 0o777);
        }
    });
    assert_eq!(report.outcome, Outcome::Committed, "{:?}", report.reason);
    let frozen = frozen.into_inner().unwrap();
    assert!(!frozen.is_empty() && frozen.iter().all(|mode| *mode == 0o700), "{frozen:?}");
    for at in ["a", "b"] {
        assert_eq!(mode(lab.dir.join(format!("state-{at}/images"))), 0o700);
        assert_eq!(mode(lab.dir.join(format!("pki/agent-{at}.key"))), 0o600);
    }
    assert_eq!(mode(lab.dir.join("pki/ca.key")), 0o600);
    client.finish().unwrap();
}
