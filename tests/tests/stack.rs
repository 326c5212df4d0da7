//! The stack: our processes start in a lab, can be killed and started again one by one, and leave nothing behind.

#![expect(clippy::unwrap_used, reason = "a test states what it expects by unwrapping, in its helpers too")]

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use lab::stack::{Stack, StackOptions, Workload};
use lab::{Lab, Site};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(5);

fn start(workloads: Vec<Workload>) -> Stack {
    Stack::start(Lab::new().unwrap(), StackOptions { workloads, ..StackOptions::default() }).unwrap()
}

/// A client's connection to a redis server.
struct Redis(BufReader<TcpStream>);

impl Redis {
    fn connect(stack: &Stack, service: SocketAddr) -> Redis {
        let stream = stack.lab().client().run(|| TcpStream::connect_timeout(&service, LIMIT)).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Redis(BufReader::new(stream))
    }

    fn ask(&mut self, command: &str) -> String {
        self.0.get_mut().write_all(format!("{command}\r\n").as_bytes()).unwrap();
        let mut answer = String::new();
        self.0.read_line(&mut answer).unwrap();
        answer.trim_end().to_owned()
    }
}

fn workload_pid(stack: &Stack, site: Site) -> Value {
    let (status, workloads) = stack.agent(site, "GET", "/v1/workloads", None).unwrap();
    assert_eq!((status, &workloads[0]["state"]), (200, &Value::from("running")), "{workloads}");
    workloads[0]["pid"].clone()
}

#[test]
fn clients_reach_workloads_of_both_families_and_sites() {
    let at_b = Workload { site: Site::B, ..Workload::redis(2) };
    let stack = start(vec![Workload::redis(1), at_b, Workload::redis6(3)]);
    for workload in stack.workloads() {
        let mut redis = Redis::connect(&stack, workload.service);
        assert_eq!(redis.ask("PING"), "+PONG", "{}", workload.name);
    }
    let (status, backends) = stack.admin("GET", "/v1/backends", None).unwrap();
    let locations: Vec<_> =
        backends.as_array().unwrap().iter().map(|backend| backend["location"].clone()).collect();
    assert_eq!((status, locations), (200, ["ams", "fra", "ams"].map(Value::from).to_vec()));
}

#[test]
fn daemon_and_agents_are_killed_and_started_again_under_a_connection() {
    let mut stack = start(vec![Workload::redis(1)]);
    let mut redis = Redis::connect(&stack, stack.workloads()[0].service);
    assert_eq!(redis.ask("INCR count"), ":1");
    let pid = workload_pid(&stack, Site::A);

    stack.kill_daemon();
    assert!(stack.admin("GET", "/healthz", None).is_err());
    assert_eq!(redis.ask("INCR count"), ":2");
    stack.restart_daemon().unwrap();
    assert_eq!(redis.ask("INCR count"), ":3");
    let ended = stack.stop_daemon().unwrap();
    assert!(ended.success(), "{ended}");
    assert_eq!(redis.ask("INCR count"), ":4");
    stack.restart_daemon().unwrap();

    stack.kill_agent(Site::A);
    assert_eq!(redis.ask("INCR count"), ":5");
    stack.restart_agent(Site::A).unwrap();
    assert_eq!(redis.ask("INCR count"), ":6");
    assert_eq!(workload_pid(&stack, Site::A), pid);
}

#[test]
fn what_does_not_start_is_named_with_the_end_of_its_log() {
    let lab = Lab::new().unwrap();
    let scratch = lab.dir().to_owned();
    let broken = Workload { command: vec!["/no/such/program".to_owned()], ..Workload::redis(1) };
    let options = StackOptions { workloads: vec![broken], ..StackOptions::default() };
    let error = Stack::start(lab, options).unwrap_err().to_string();
    assert!(error.contains("agent-ams") && error.contains("/no/such/program"), "{error}");
    assert!(!scratch.exists());
}

#[test]
fn a_migration_there_and_back_keeps_the_connection() {
    let stack = start(vec![Workload::redis(1)]);
    let mut redis = Redis::connect(&stack, stack.workloads()[0].service);
    for (count, site) in [Site::B, Site::A, Site::B].into_iter().enumerate() {
        assert_eq!(redis.ask("INCR count"), format!(":{}", 2 * count + 1));
        let id = stack.start_migration("redis-1", site, &Value::Null).unwrap();
        let migration = stack.finished_migration(&id, Duration::from_secs(30)).unwrap();
        assert_eq!(migration["state"], "committed", "{migration:#}");
        assert_eq!(redis.ask("INCR count"), format!(":{}", 2 * count + 2));
    }
}
