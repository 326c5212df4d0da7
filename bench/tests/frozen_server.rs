//! A real redis server is frozen for a moment under its clients: the freeze must show as stall, and must not
//! show as added stall.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bench::clock::unix_ns;
use bench::driver::{self, Load, Source};
use bench::picture::{Scene, Span, draw};
use bench::probe::wait_until_it_answers;
use bench::report::{DrillReport, Migration, Outcome, Setting, Verification};
use bench::scenario::{Scenario, redis};
use bench::verify::redis_counts;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const FROZEN: Duration = Duration::from_millis(200);

#[test]
fn a_freeze_is_stall_but_not_added_stall() {
    let dir = tempfile::tempdir().unwrap();
    let target = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap().local_addr().unwrap();
    let words = Scenario::Redis.command(target, dir.path()).unwrap();
    let child = Command::new(&words[0]).args(&words[1..]).stdin(Stdio::null()).stdout(Stdio::null()).spawn();
    let server = Server(child.unwrap());
    let pid = Pid::from_raw(server.0.id().cast_signed());
    let protocol = Scenario::Redis.protocol();
    wait_until_it_answers(target, protocol.as_ref(), Duration::from_secs(10)).unwrap();

    let second = Duration::from_secs(1);
    let load = Load {
        target,
        source: Source::Any,
        clients: 20,
        rate_per_s: 1000.0,
        connect_timeout: second * 5,
        drain: second * 5,
    };
    let clients = driver::connect(load, protocol).unwrap().start().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let frozen_unix_ns = unix_ns();
    kill(pid, Signal::SIGSTOP).unwrap();
    std::thread::sleep(FROZEN);
    let running_unix_ns = unix_ns();
    kill(pid, Signal::SIGCONT).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let timeline = clients.stop().unwrap();
    let counts = redis_counts(target, &redis(), 20).unwrap();

    let freeze_ms = (running_unix_ns - frozen_unix_ns) as f64 / 1e6;
    let migration = Migration {
        from: "here".into(),
        to: "here".into(),
        started_unix_ns: frozen_unix_ns,
        coordinated: serde_json::from_value(json!({
            "outcome": "committed", "freeze_ms": freeze_ms,
            "phases": [{"name": "hold", "start_ms": 0.0, "end_ms": freeze_ms}],
            "frozen_at_unix_us": frozen_unix_ns / 1000, "running_at_unix_us": running_unix_ns / 1000,
        }))
        .unwrap(),
    };
    let setting = Setting {
        scenario: "redis".into(),
        datapath: "direct".into(),
        policy: "hold".into(),
        rate_per_s: 1000.0,
    };
    let verification = Verification::compare(&timeline, &counts);
    let report = DrillReport::new(setting, &timeline, std::slice::from_ref(&migration), Some(verification));
    let phases = [Span {
        name: "hold".into(),
        from_ns: migration.at_ns(&timeline, 0.0),
        to_ns: migration.at_ns(&timeline, freeze_ms),
    }];
    let freeze = migration.window(&timeline).freeze;
    println!("{}", draw(&Scene { timeline: &timeline, phases: &phases, freeze, width: 80 }));

    assert!(report.is_clean(), "{report:?}");
    assert_eq!((report.outcome, report.stalled_clients), (Outcome::Committed, 20));
    assert_eq!((report.sent, report.received), (counts.iter().sum(), counts.iter().sum()));
    assert!(report.stall_ms.max >= 190.0, "{report:?}");
    for without in [report.added_stall_ms.max, report.beside_freeze_ms.max] {
        assert!(report.stall_ms.max - without > 100.0, "the freeze was not taken off: {report:?}");
    }
}
