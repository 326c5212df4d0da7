//! What prepare refuses, with real processes, real CRIU and real agents: named, and before anything is held.
#![expect(clippy::unwrap_used, reason = "a test states what it expects by unwrapping")]

mod common;

use std::sync::Arc;

use common::outcome::{assert_moves, assert_refused, assert_rolled_back, lab, scratch};
use common::{At, BACKEND, Client, DEADLINE, Lab, Options, possible};

#[test]
fn a_file_that_is_missing_at_the_target_is_found_before_anything_is_held() {
    if !possible() {
        return;
    }
    let scratch = scratch();
    let folder = scratch.path().to_owned();
    let file = folder.join("needed");
    std::fs::write(&file, "x").unwrap();
    let arguments = vec!["--open".to_owned(), file.to_str().unwrap().to_owned()];
    let lab =
        Arc::new(Lab::new(Options { arguments, hide_at_b: Some(folder.clone()), ..Options::default() }));
    let client = Client::start(&lab);
    for round in 0..2 {
        assert_refused(&lab, &client, &format!("missing-{round}"), "needed\" cannot be had there");
    }
    client.finish().unwrap();
}

#[test]
fn another_program_at_the_target_is_named_before_anything_is_held() {
    if !possible() {
        return;
    }
    let scratch = scratch();
    let [program, other] = ["counter", "other"].map(|name| scratch.path().join(name));
    for copy in [&program, &other] {
        std::fs::copy(common::counter(), copy).unwrap();
    }
    // The same size, one bit of difference.
    let mut code = std::fs::read(&other).unwrap();
    *code.last_mut().unwrap() ^= 1;
    std::fs::write(&other, code).unwrap();
    let command = Some(vec![program.to_str().unwrap().to_owned(), "10.1.0.1:7000".to_owned()]);
    let other_at_b = Some((program.clone(), other));
    let lab = Arc::new(Lab::new(Options { command, other_at_b, ..Options::default() }));
    let client = Client::start(&lab);
    let why = format!("workload \"chat-1\" cannot enter site \"b\": {program:?} has other content there");
    assert_refused(&lab, &client, "other-program", &why);
    client.finish().unwrap();
}

#[test]
fn a_device_is_named_before_anything_is_held() {
    let arguments = vec!["--open".to_owned(), "/dev/fuse".to_owned()];
    let Some(lab) = lab(Options { arguments, ..Options::default() }) else { return };
    let client = Client::start(&lab);
    assert_refused(&lab, &client, "device", "holds the device \"/dev/fuse\" (descriptor ");
    client.finish().unwrap();
}

#[test]
fn a_target_that_is_short_of_memory_says_so_before_anything_is_held() {
    let config_at_b = "spare_memory_mib = 1000000000\n".to_owned();
    let Some(lab) = lab(Options { config_at_b, ..Options::default() }) else { return };
    let client = Client::start(&lab);
    assert_refused(
        &lab,
        &client,
        "memory",
        "and 0 MiB of memory are available (1000000000 MiB are to be left",
    );
    client.finish().unwrap();
}

#[test]
fn a_port_that_is_taken_at_the_target_is_named_before_anything_is_held() {
    let Some(lab) = lab(Options::default()) else { return };
    let client = Client::start(&lab);
    let taken = lab.inside("b", || std::net::TcpListener::bind("0.0.0.0:7000").unwrap());
    assert_refused(&lab, &client, "port", "10.1.0.1:7000/tcp is taken there by another process");
    drop(taken);
    assert_moves(&lab, &client, "free", At::A);
    client.finish().unwrap();
}

#[test]
fn another_processor_is_refused() {
    let Some(lab) = lab(Options::default()) else { return };
    let client = Client::start(&lab);
    let prepare = format!(
        r#"{{"role":"target","workload":"{BACKEND}","address":"{}","protocol":"tcp","peer_site":"a","peer_url":"https://10.2.1.1:7401","hold_deadline_ms":1000,"lease_ms":10000}}"#,
        lab.address
    );
    let answer = lab.http(At::B, "PUT", "/v1/migrations/cpu", &prepare);
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let (_, [a, b]) = &lab.certificates;
    let manifest = |processor: &str| {
        format!(r#"{{"memory_bytes":0,"later":false,"files":[],"sockets":[],"processor":{processor}}}"#)
    };
    let ask = |files, processor: &str| {
        lab.http_as(files, At::B, "POST", "/v1/migrations/cpu/manifest", &manifest(processor))
    };
    // What CRIU cannot read is no processor that fits, and an instruction set of tomorrow is missing here.
    for (processor, words) in [
        (r#"{"instructions":["avx9"],"criu_image":"00"}"#, "using (avx9): `criu cpuinfo check` fails: "),
        (r#"{"instructions":["avx9"]}"#, "using (avx9): they are not in its /proc/cpuinfo"),
        (r#"{"instructions":[],"criu_image":"0"}"#, "what the source says of its processor makes no sense"),
    ] {
        let answer = ask(a, processor);
        assert!(answer.starts_with("HTTP/1.1 409 ") && answer.contains(words), "{answer}");
    }
    let none = r#"{"instructions":[]}"#;
    assert!(ask(a, none).starts_with("HTTP/1.1 200 "));
    // It is the source's to say what the workload needs.
    assert!(ask(b, none).starts_with("HTTP/1.1 403 "));
    client.wait(20);
    client.finish().unwrap();
}

#[test]
fn a_criu_that_is_not_there_is_said_before_anything_is_held() {
    let criu = Some("/nonexistent/criu".to_owned());
    let Some(lab) = lab(Options { criu, ..Options::default() }) else { return };
    let client = Client::start(&lab);
    let report = lab.migrate(lab.spec("no-criu", At::A, DEADLINE), |_| ());
    assert_rolled_back(&lab, &report, "start /nonexistent/criu");
    assert!(report.reason.unwrap().contains("cargo xtask setup"));
    assert!(report.phases.iter().all(|phase| phase.name != "hold"));
    client.finish().unwrap();
}

#[test]
fn a_unix_connection_to_the_outside_is_named_before_anything_is_held() {
    if !possible() {
        return;
    }
    let scratch = scratch();
    let path = scratch.path().join("outside");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let arguments = vec!["--unix".to_owned(), path.to_str().unwrap().to_owned()];
    let lab = Arc::new(Lab::new(Options { arguments, ..Options::default() }));
    let client = Client::start(&lab);
    let why = "holds a unix socket (descriptor ";
    assert_refused(&lab, &client, "not-accepted", why);
    let accepted = listener.accept().unwrap();
    assert_refused(
        &lab,
        &client,
        "accepted",
        &format!("that is connected to {path:?} outside of the workload"),
    );
    drop(accepted);
    client.finish().unwrap();
}
