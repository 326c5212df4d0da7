//! A stack with one redis server under clients that never stop asking it, and what must be true of them at the end.

#![allow(dead_code, reason = "each test file uses its part")]

use std::time::Duration;

use bench::driver::{self, Load, Running, Source};
use bench::report::Verification;
use bench::scenario::{Scenario, redis};
use bench::verify::redis_counts;
use lab::stack::{HoldOptions, Memory, Stack, StackOptions, Workload};
use lab::{Lab, Site, wait_for};
use serde_json::Value;

pub const CLIENTS: u32 = 20;
pub const LIMIT: Duration = Duration::from_secs(20);

/// A redis server that can be given much memory ([`Drill::fill`]), which goes over in the freeze: there is time then for
/// something to happen.
pub fn large() -> Workload {
    let mut workload = Workload { memory: Memory::Pre, ..Workload::redis(1) };
    workload.command.extend(["--enable-debug-command", "yes"].map(str::to_owned));
    workload
}

/// A stack with one redis server and clients that never stop asking it.
pub struct Drill {
    clients: Option<Running>,
    pub workload: Workload,
    pub stack: Stack,
}

impl Drill {
    pub fn with(options: StackOptions) -> Self {
        Self::within(Lab::new().unwrap(), options)
    }

    pub fn within(lab: Lab, options: StackOptions) -> Self {
        let workload = options.workloads[0].clone();
        let stack = Stack::start(lab, options).unwrap();
        let load = Load {
            target: workload.service,
            source: Source::Any,
            clients: CLIENTS,
            rate_per_s: 400.0,
            connect_timeout: LIMIT,
            drain: LIMIT,
        };
        let clients = stack
            .lab()
            .client()
            .run(|| driver::connect(load, Scenario::Redis.protocol()).unwrap().start().unwrap());
        let drill = Self { clients: Some(clients), workload, stack };
        drill.goes_on();
        drill
    }

    pub fn new(workload: Workload) -> Self {
        // A large server's move takes seconds where other tests take the processors; deadlines have tests of their own.
        let hold =
            HoldOptions { deadline_ms: Some(15_000), max_age_ms: Some(20_000), ..HoldOptions::default() };
        Self::with(StackOptions { workloads: vec![workload], hold, ..StackOptions::default() })
    }

    /// The migration ended where it began, for the reason given.
    pub fn rolled_back(&self, migration: &Value, why: &str) {
        assert_eq!(migration["state"], "rolled_back", "{migration:#}");
        let reason = migration["report"]["reason"].as_str().unwrap();
        assert!(reason.to_lowercase().contains(why), "{reason:?} does not say {why:?}");
        assert_eq!(self.backend()["location"], self.workload.site.name());
        self.is_open();
        self.goes_on();
    }

    /// Called off in its freeze, a migration ends where it began.
    pub fn ends_when_aborted(&self) {
        let id = self.stack.start_migration(self.name(), Site::B, &Value::Null).unwrap();
        self.reaches(&id, "freeze");
        let (status, _) = self.stack.admin("DELETE", &format!("/v1/migrations/{id}"), None).unwrap();
        assert!((200..300).contains(&status), "{status}");
        let migration = self.stack.finished_migration(&id, LIMIT).unwrap();
        self.rolled_back(&migration, "abort");
    }

    /// Waits until every migration has come to its end: an open gate is not yet one.
    pub fn nothing_runs(&self) {
        wait_for(LIMIT, || {
            let (_, migrations) = self.stack.admin("GET", "/v1/migrations", None).unwrap();
            let mut all = migrations.as_array().unwrap().iter();
            all.all(|migration| migration["state"] != "running").then_some(())
        })
        .expect("every migration ends");
    }

    /// Waits until a phase of a migration has begun.
    pub fn reaches(&self, id: &str, phase: &str) {
        let path = format!("/v1/migrations/{id}");
        wait_for(LIMIT, || {
            let (_, migration) = self.stack.admin("GET", &path, None).unwrap();
            let phases = migration["phases"].as_array()?.clone();
            (phases.iter().any(|reached| reached["name"] == phase)).then_some(())
        })
        .expect("the phase is reached");
    }

    /// Gives the server enough memory that its transfer takes a while; it has to be [`large`].
    pub fn fill(&self) {
        let (server, port) =
            (self.workload.address.ip().to_string(), self.workload.address.port().to_string());
        let output = self
            .stack
            .lab()
            .site(Site::A)
            .command("redis-cli")
            .args(["-h", &server, "-p", &port, "DEBUG", "POPULATE", "200", "filler", "1000000"])
            .output()
            .unwrap();
        assert!(output.status.success() && output.stdout.starts_with(b"OK"), "{output:?}");
    }

    /// Lets the clients ask for a while.
    pub fn goes_on(&self) {
        std::thread::sleep(Duration::from_millis(200));
        assert!(!self.clients.as_ref().unwrap().has_failed());
    }

    pub fn name(&self) -> &str {
        &self.workload.name
    }

    pub fn migrate(&self, to: Site, more: Value) -> Value {
        let id = self.stack.start_migration(self.name(), to, &more).unwrap();
        self.stack.finished_migration(&id, LIMIT).unwrap()
    }

    pub fn commits(&self, to: Site) {
        let migration = self.migrate(to, Value::Null);
        assert_eq!(migration["state"], "committed", "{migration:#}");
        assert_eq!(self.backend()["location"], to.name());
        self.is_open();
    }

    pub fn backend(&self) -> Value {
        let (status, backends) = self.stack.admin("GET", "/v1/backends", None).unwrap();
        assert_eq!(status, 200);
        let mut backends = backends.as_array().unwrap().iter();
        backends.find(|backend| backend["name"] == self.name()).unwrap().clone()
    }

    pub fn is_open(&self) {
        let open = wait_for(LIMIT, || (self.backend()["gate"] == "forward").then_some(()));
        assert!(open.is_some(), "{:#}", self.backend());
    }

    /// The clients stop: nothing lost, nothing twice, nothing out of order, no connection broken.
    pub fn must_be_whole(mut self) {
        self.ends_whole();
    }

    /// The same, where the stack has still to be used.
    pub fn ends_whole(&mut self) {
        self.goes_on();
        let timeline = self.clients.take().unwrap().stop().unwrap();
        let faults = &timeline.faults;
        assert_eq!(
            (faults.lost, faults.duplicated, faults.reordered, faults.resets),
            (0, 0, 0, 0),
            "{:?}",
            timeline.errors
        );
        let target = self.workload.service;
        let counts = self.stack.lab().client().run(|| redis_counts(target, &redis(), CLIENTS).unwrap());
        assert_eq!(Verification::compare(&timeline, &counts), Verification::default());
        assert!(timeline.answered() > 100);
    }
}
