//! A stack with one redis server under clients that never stop asking it, and what must be true of them at the end.

use std::time::Duration;

use bench::driver::{self, Load, Running, Source};
use bench::report::Verification;
use bench::scenario::{Scenario, redis};
use bench::verify::redis_counts;
use lab::stack::{Stack, StackOptions, Workload};
use lab::{Lab, Site, wait_for};
use serde_json::Value;

pub const CLIENTS: u32 = 20;
pub const LIMIT: Duration = Duration::from_secs(20);

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
