//! Memory that goes over after the restore, or before the freeze: a redis server with tens of thousands of keys under live
//! clients, moved there and back, and what becomes of it when somebody dies before all of it is there.

#![expect(clippy::unwrap_used, reason = "a test states what it expects by unwrapping")]

mod drill;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::num::NonZeroU64;
use std::time::Duration;

use lab::link::{Spec, WaySpec};
use lab::stack::{HoldOptions, Memory, StackOptions, Workload};
use lab::{Site, wait_for};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use drill::{Drill, LIMIT, large};

/// Keys of a kilobyte each.
const KEYS: u32 = 60_000;

impl Drill {
    /// With memory that goes over after the restore, on a link of so many bits a second.
    fn large(rate: Option<u64>) -> Self {
        Self::with_keys(large(), rate)
    }

    fn with_keys(workload: Workload, rate: Option<u64>) -> Self {
        Self::with_memory(Memory::Post, workload, rate)
    }

    fn with_memory(memory: Memory, workload: Workload, rate: Option<u64>) -> Self {
        let workload = Workload { memory, ..workload };
        let hold =
            HoldOptions { deadline_ms: Some(15_000), max_age_ms: Some(20_000), ..HoldOptions::default() };
        let way = |rate| WaySpec { rate_bits_per_s: NonZeroU64::new(rate), ..WaySpec::default() };
        let link = rate.map(|rate| Spec::symmetric(way(rate)));
        let drill =
            Self::with(StackOptions { workloads: vec![workload], hold, link, ..StackOptions::default() });
        assert!(drill.redis(&["DEBUG", "POPULATE", &KEYS.to_string(), "key", "1000"]).starts_with("+OK"));
        drill
    }

    /// What redis answers, from a connection of its own.
    fn redis(&self, words: &[&str]) -> String {
        let mut question = format!("*{}\r\n", words.len());
        for word in words {
            question += &format!("${}\r\n{word}\r\n", word.len());
        }
        let target = self.workload.service;
        self.stack.lab().client().run(|| {
            let mut stream = TcpStream::connect_timeout(&target, LIMIT).unwrap();
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            stream.write_all(question.as_bytes()).unwrap();
            let mut lines = BufReader::new(stream);
            let mut line = || {
                let mut line = String::new();
                lines.read_line(&mut line).unwrap();
                line
            };
            let first = line();
            // What follows an array's head are its lines; what follows a text's are those up to the empty one.
            match first.strip_prefix('*').map(|count| count.trim().parse().unwrap()) {
                Some(count) => (0..count).fold(first, |all: String, _: u32| all + &line()),
                None if first.starts_with('$') => {
                    first.clone()
                        + &std::iter::repeat_with(line).take_while(|line| line != "\r\n").collect::<String>()
                }
                None => first,
            }
        })
    }

    /// Of all keys and values; the clients' counters change meanwhile, so only what was populated is asked for.
    fn digest(&self) -> String {
        let keys: Vec<String> = (0..KEYS).step_by(7).map(|key| format!("key:{key}")).collect();
        let mut words = vec!["DEBUG", "DIGEST-VALUE"];
        words.extend(keys.iter().map(String::as_str));
        self.redis(&words)
    }
}

#[test]
fn a_large_server_moves_there_and_back_before_its_memory() {
    let drill = Drill::large(None);
    let digest = drill.digest();
    assert!(digest.starts_with('*'), "{digest}");
    for (number, to) in [Site::B, Site::A].repeat(5).into_iter().enumerate() {
        let migration = drill.migrate(to, Value::Null);
        assert_eq!(migration["state"], "committed", "{migration:#}");
        let report = &migration["report"];
        assert!(report["exposed_ms"].as_f64().unwrap() > 0.0, "{report:#}");
        assert!(report["image_bytes"].as_u64().unwrap() < 8 << 20, "{report:#}");
        assert!(report["sent_bytes"].as_u64().unwrap() > 60 << 20, "{report:#}");
        if number % 3 == 0 {
            assert_eq!(drill.digest(), digest, "move {number}");
        }
    }
    assert_eq!(drill.digest(), digest);
    drill.must_be_whole();
}

#[test]
fn a_container_moves_there_and_back_before_its_memory() {
    let drill = Drill::with_keys(large().in_container(), None);
    let digest = drill.digest();
    for to in [Site::B, Site::A].repeat(2) {
        let migration = drill.migrate(to, Value::Null);
        assert_eq!(migration["state"], "committed", "{migration:#}");
        assert!(migration["report"]["exposed_ms"].as_f64().unwrap() > 0.0, "{migration:#}");
        assert_eq!(drill.digest(), digest);
    }
    drill.must_be_whole();
}

#[test]
fn a_server_may_fork_and_free_memory_that_it_has_not_got_yet() {
    // Slow enough that all of it happens before the memory is there.
    let drill = Drill::large(Some(200_000_000));
    let digest = drill.digest();
    let id = drill.stack.start_migration(drill.name(), Site::B, &Value::Null).unwrap();
    wait_for(LIMIT, || (drill.backend()["location"] == "fra").then_some(())).expect("it flips");
    assert!(drill.redis(&["DEBUG", "POPULATE", "20000", "more", "1000"]).starts_with("+OK"));
    let saved = drill.redis(&["BGSAVE"]);
    assert!(saved.starts_with("+Background saving started"), "{saved}");
    assert!(drill.redis(&["MEMORY", "PURGE"]).starts_with("+OK"));
    assert_eq!(drill.digest(), digest);
    let migration = drill.stack.finished_migration(&id, 3 * LIMIT).unwrap();
    assert_eq!(migration["state"], "committed", "{migration:#}");
    assert!(migration["report"]["exposed_ms"].as_f64().unwrap() > 500.0, "{migration:#}");
    let status = wait_for(LIMIT, || {
        let info = drill.redis(&["INFO", "persistence"]);
        info.contains("rdb_bgsave_in_progress:0").then_some(info)
    });
    assert!(status.expect("the child ends").contains("rdb_last_bgsave_status:ok"));
    assert_eq!(drill.digest(), digest);
    drill.must_be_whole();
}

#[test]
fn both_agents_may_die_before_all_memory_is_there() {
    let mut drill = Drill::large(Some(200_000_000));
    let digest = drill.digest();
    let id = drill.stack.start_migration(drill.name(), Site::B, &Value::Null).unwrap();
    wait_for(LIMIT, || (drill.backend()["location"] == "fra").then_some(())).expect("it flips");
    drill.goes_on();
    drill.stack.restart_agent(Site::A).unwrap();
    drill.stack.restart_agent(Site::B).unwrap();
    let migration = drill.stack.finished_migration(&id, 3 * LIMIT).unwrap();
    assert_eq!(migration["state"], "committed", "{migration:#}");
    assert_eq!(drill.digest(), digest);
    // What has all of its memory can move on.
    std::thread::sleep(Duration::from_millis(200));
    drill.commits(Site::A);
    assert_eq!(drill.digest(), digest);
    drill.must_be_whole();
}

/// Memory goes over before the freeze while keys change, and what has changed goes in the freeze.
fn moves_after_its_memory(drill: Drill, moves: usize) {
    let digest = drill.digest();
    let mut written = BTreeMap::new();
    for (number, to) in [Site::B, Site::A].into_iter().cycle().take(moves).enumerate() {
        let id = drill.stack.start_migration(drill.name(), to, &Value::Null).unwrap();
        let migration = loop {
            // Beside those that the digest is of, and in the pages that they are in.
            for key in (3..KEYS).step_by(7 * 1001).map(|key| key + 7 * (number as u32)) {
                let value = format!("{number}-{key}-").repeat(60);
                assert!(drill.redis(&["SET", &format!("key:{key}"), &value]).starts_with("+OK"));
                written.insert(key, value);
            }
            let (_, migration) = drill.stack.admin("GET", &format!("/v1/migrations/{id}"), None).unwrap();
            if migration["state"] != "running" {
                break migration;
            }
        };
        assert_eq!(migration["state"], "committed", "{migration:#}");
        let report = &migration["report"];
        assert!(report["image_bytes"].as_u64().unwrap() < 16 << 20, "{report:#}");
        assert_eq!(report["exposed_ms"].as_f64(), Some(0.0), "{report:#}");
        assert_eq!(drill.digest(), digest, "move {number}");
        for (key, value) in &written {
            let same = "return redis.call('GET', KEYS[1]) == ARGV[1]";
            let answer = drill.redis(&["EVAL", same, "1", &format!("key:{key}"), value]);
            assert!(answer.starts_with(":1"), "move {number}, key {key}");
        }
    }
    drill.must_be_whole();
}

#[test]
fn a_large_server_moves_there_and_back_after_its_memory() {
    moves_after_its_memory(Drill::with_memory(Memory::Pre, large(), None), 6);
}

#[test]
fn a_container_moves_there_and_back_after_its_memory() {
    moves_after_its_memory(Drill::with_memory(Memory::Pre, large().in_container(), None), 2);
}

#[test]
fn a_slow_link_takes_the_memory_before_the_freeze() {
    moves_after_its_memory(Drill::with_memory(Memory::Pre, large(), Some(100_000_000)), 2);
}

#[test]
fn a_server_whose_memory_goes_over_is_as_it_was_when_that_is_called_off() {
    let drill = Drill::with_memory(Memory::Pre, large(), Some(20_000_000));
    // Which cannot be packed.
    assert!(drill.redis(&["CONFIG", "SET", "lua-time-limit", "20000"]).starts_with("+OK"));
    let fill = "for key = 1, 20000 do local part = '' for n = 1, 25 do part = part .. redis.sha1hex(key .. '.' .. n) end \
                redis.call('SET', 'noise:' .. key, part) end return 1";
    assert!(drill.redis(&["EVAL", fill, "0"]).starts_with(":1"));
    let digest = drill.digest();
    let id = drill.stack.start_migration(drill.name(), Site::B, &Value::Null).unwrap();
    drill.reaches(&id, "prepare");
    std::thread::sleep(Duration::from_secs(2));
    let (_, migration) = drill.stack.admin("GET", &format!("/v1/migrations/{id}"), None).unwrap();
    assert_eq!(migration["phases"].as_array().unwrap().len(), 1, "{migration:#}");
    let (status, _) = drill.stack.admin("DELETE", &format!("/v1/migrations/{id}"), None).unwrap();
    assert!((200..300).contains(&status), "{status}");
    let migration = drill.stack.finished_migration(&id, LIMIT).unwrap();
    drill.rolled_back(&migration, "abort");
    assert_eq!(drill.digest(), digest);
    drill.must_be_whole();
}

/// The server that lacks a page must not read zeros for it.
#[test]
fn a_server_does_not_outlive_who_brings_its_memory() {
    let drill = Drill::large(Some(100_000_000));
    let id = drill.stack.start_migration(drill.name(), Site::B, &Value::Null).unwrap();
    wait_for(LIMIT, || (drill.backend()["location"] == "fra").then_some(())).expect("it flips");
    drill.goes_on();
    let pagers = pagers_of(&id);
    assert_eq!(pagers.len(), 1);
    kill(Pid::from_raw(pagers[0]), Signal::SIGKILL).unwrap();
    let target = drill.workload.service;
    let gone = || {
        let dial = || TcpStream::connect_timeout(&target, Duration::from_millis(200));
        drill.stack.lab().client().run(dial).is_err().then_some(())
    };
    wait_for(LIMIT, gone).expect("the server is gone");
    assert!(pagers_of(&id).is_empty());
}

/// Processes that bring a migration's pages.
fn pagers_of(id: &str) -> Vec<i32> {
    let pids = std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str().and_then(|name| name.parse::<i32>().ok()));
    let is_one = |pid: &i32| {
        let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = words.split(|byte| *byte == 0);
        words.clone().any(|word| word == b"pager") && words.any(|word| word == id.as_bytes())
    };
    pids.filter(is_one).collect()
}
