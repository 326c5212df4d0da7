//! Reloads of a large configuration under load: what differs is said and done, and nobody notices.

#![expect(clippy::unwrap_used, reason = "a test states what it expects by unwrapping")]

mod steady;

use std::fmt::Write as _;
use std::time::Duration;

use lab::wait_for;
use serde_json::{Value, json};

use steady::{Bench, LIMIT, Load, UNDER_LOAD};

const SERVICES: usize = 998;
const BACKENDS: usize = 9990;
const BETWEEN: Duration = Duration::from_millis(200);

/// The services under load, and so many that nobody uses that there are a thousand with ten thousand backends.
fn text() -> String {
    let mut text = UNDER_LOAD.to_owned();
    for number in 0..BACKENDS {
        let (high, low, site) = (number / 250 + 1, number % 250, ["ams", "fra"][number % 2]);
        let _ = write!(
            text,
            "[[backends]]\nname = \"idle-{number}\"\naddress = \"10.1.{high}.{low}:7000\"\nsite = {site:?}\n"
        );
    }
    for number in 0..SERVICES {
        // Each takes every SERVICES-th backend: ten, some eleven.
        let backends: Vec<_> = (number..BACKENDS).step_by(SERVICES).map(|n| format!("idle-{n}")).collect();
        let port = 10_000 + number;
        let _ = write!(
            text,
            "[[services]]\nname = \"quiet-{number}\"\naddress = \"10.0.0.100:{port}\"\nprotocol = \"tcp\"\n\
             backends = {backends:?}\n"
        );
    }
    text
}

impl Bench {
    fn reload(&self) -> (u16, Value) {
        let answer = self.admin("POST", "/v1/reload", "{\"check\": false}");
        (answer.status, answer.json())
    }

    /// Reloads `text` and expects these changes: added, removed, changed.
    fn reloads(&self, text: &str, changes: [&[&str]; 3]) {
        self.configure("auto", text);
        let (status, report) = self.reload();
        let [added, removed, changed] = changes;
        let found = json!([report["added"], report["removed"], report["changed"]]);
        assert_eq!((status, found), (200, json!([added, removed, changed])), "{report}");
        println!("{changes:?}: read in {} ms, applied in {} ms", report["read_ms"], report["apply_ms"]);
        std::thread::sleep(BETWEEN);
    }

    fn post(&self, path: &str, body: &Value) -> Value {
        let answer = self.admin("POST", path, &body.to_string());
        assert_eq!(answer.status, 200, "{path}: {}", answer.json());
        answer.json()
    }

    fn state(&self, backend: &str) -> Value {
        self.admin("GET", &format!("/v1/backends/{backend}"), "").json()
    }
}

/// `text` with one backend otherwise.
fn with(text: &str, backend: &str, more: &str) -> String {
    let head = format!("name = \"{backend}\"\n");
    assert_eq!(text.matches(&head).count(), 1);
    text.replacen(&head, &format!("{head}{more}\n"), 1)
}

#[test]
fn one_backend_of_ten_thousand_changes_under_load() {
    let first = text();
    let bench = Bench::start("auto", &first);
    let load = Load::start(&bench.lab);
    std::thread::sleep(BETWEEN);

    let weighed = with(&first, "idle-77", "weight = 7");
    bench.reloads(&weighed, [&[], &[], &["service quiet-77", "backend idle-77"]]);
    let without = |text: &str| {
        text.replace("[[backends]]\nname = \"idle-9\"\naddress = \"10.1.1.9:7000\"\nsite = \"fra\"\n", "")
            .replacen("\"idle-9\", ", "", 1)
    };
    bench.reloads(&without(&weighed), [&[], &["backend idle-9"], &["service quiet-9"]]);
    bench.reloads(&weighed, [&["backend idle-9"], &[], &["service quiet-9"]]);
    assert_eq!(load.reached()[1], 0);

    // A server comes to a service under load: it gets new connections, the others stay where they are.
    let second = "[[backends]]\nname = \"four-2\"\naddress = \"10.1.0.2:7000\"\nsite = \"ams\"\n";
    let joined = second.to_owned() + &weighed.replace("[\"four\"]", "[\"four\", \"four-2\"]");
    bench.reloads(&joined, [&["backend four-2"], &[], &["service tcp4", "service udp4"]]);
    wait_for(LIMIT, || (load.reached()[1] > 20).then_some(())).expect("the new server is reached");
    let heavier = with(&joined, "four-2", "weight = 1000");
    bench.reloads(&heavier, [&[], &[], &["service tcp4", "service udp4", "backend four-2"]]);
    // And leaves again: drained first, since connections end with their backend.
    let drained = with(&joined, "four-2", "drain = true");
    bench.reloads(&drained, [&[], &[], &["service tcp4", "service udp4", "backend four-2"]]);
    let before = load.reached();
    std::thread::sleep(BETWEEN);
    let after = load.reached();
    assert!(after[0] > before[0] && after[1] <= before[1] + 1, "{before:?}, {after:?}");
    bench.reloads(&weighed, [&[], &["backend four-2"], &["service tcp4", "service udp4"]]);
    bench.reloads(&weighed, [&[], &[], &[]]);
    load.must_be_whole();
}

#[test]
fn a_held_backend_stays_held_through_reloads_that_leave_it_and_refuses_to_go() {
    let first = text();
    let bench = Bench::start("auto", &first);
    let load = Load::start(&bench.lab);
    std::thread::sleep(BETWEEN);
    let held = bench.post("/v1/backends/six/hold", &json!({"deadline_ms": 15_000}));
    let state = bench.state("six");
    assert_eq!(state["state"], "holding", "{state}");

    let moved = first.replace("[fd00:1::1]:7000", "[fd00:1::2]:7000");
    let tables =
        ["[[backends]]\nname = \"six\"", "[[services]]\nname = \"tcp6\"", "[[services]]\nname = \"udp6\""];
    let gone = tables.iter().fold(first.clone(), |text, table| {
        let start = text.find(table).unwrap();
        let end = start + 2 + text[start + 2..].find("[[").unwrap();
        text[..start].to_owned() + &text[end..]
    });
    for text in [moved, gone] {
        bench.configure("auto", &text);
        let (status, problem) = bench.reload();
        assert_eq!((status, &problem["type"]), (409, &json!("urn:drover:backend-in-use")), "{problem}");
        assert!(problem["detail"].as_str().unwrap().contains("flip or resume it"), "{problem}");
    }
    let weighed = with(&with(&first, "idle-77", "weight = 7"), "six", "weight = 50");
    bench.reloads(
        &weighed,
        [&[], &[], &["service tcp6", "service udp6", "service quiet-77", "backend six", "backend idle-77"]],
    );
    let same =
        |state: &Value| (state["state"].clone(), state["generation"].clone(), state["location"].clone());
    assert_eq!(same(&bench.state("six")), same(&state));
    bench.post("/v1/backends/six/resume", &held);
    std::thread::sleep(BETWEEN);
    load.must_be_whole();
}
