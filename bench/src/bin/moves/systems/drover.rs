//! Drover: the daemon, and an agent at each site.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, bail};
use bench::interrupt::Interrupt;
use bench::moves::case::Case;
use bench::report::{Coordinated, Outcome, Phase};
use lab::stack::{HoldOptions, Memory, Mode, Protocol, Runner, Stack, StackOptions, Workload};
use lab::{Lab, Site, address, processors};
use serde::Deserialize;
use serde_json::Value;

use super::{Moved, PORT, Place, link, own_program, server_address, server_arguments};

/// The backend's name.
const BACKEND: &str = "server";
/// How long a hold may last: what is measured is how long a move takes, not whether it is given up.
const HOLD_MS: u64 = 300_000;
/// How long a migration may take.
const MIGRATION_LIMIT: Duration = Duration::from_secs(400);
/// How often it is looked whether it has ended.
const LOOK: Duration = Duration::from_millis(10);

/// For the report.
pub fn describe(memory: Memory) -> String {
    let how = match memory {
        Memory::Auto => "as the agents see fit",
        Memory::Pre => "with the images",
        Memory::Post => "after the restore",
    };
    format!(
        "POST /v1/migrations: nat at the hook that `auto` chooses, policy hold, deadline and age {HOLD_MS} ms, the \
         rest as by default; the agents bring the memory {how}, over TLS"
    )
}

/// A stack with the server in it.
pub struct Placed {
    stack: Stack,
    site: Site,
}

/// A migration, as `GET /v1/migrations/{id}` has it.
#[derive(Deserialize)]
struct Migration {
    phases: Vec<Phase>,
    report: Option<Coordinated>,
}

impl Placed {
    /// Starts everything.
    pub fn new(case: &Case, memory: Memory) -> anyhow::Result<Placed> {
        let program = own_program().context("cannot find this program's own path")?;
        let workload = Workload {
            name: BACKEND.to_owned(),
            address: server_address(),
            protocol: Protocol::Tcp,
            command: std::iter::once(program.display().to_string()).chain(server_arguments(case)).collect(),
            dir: None,
            site: Site::A,
            service: SocketAddr::from((address::VIRTUAL4, PORT)),
            mode: Mode::Nat,
            memory,
            runner: Runner::Agent,
        };
        let hold =
            HoldOptions { deadline_ms: Some(HOLD_MS), max_age_ms: Some(HOLD_MS), ..HoldOptions::default() };
        let options = StackOptions {
            workloads: vec![workload],
            hold,
            site_processors: processors::halves().map_or(Vec::new(), |(_, sites)| sites),
            link: link(case),
            ..StackOptions::default()
        };
        Ok(Placed { stack: Stack::start(Lab::new()?, options)?, site: Site::A })
    }

    fn finished(&self, id: &str, interrupt: &Interrupt) -> anyhow::Result<(Vec<Phase>, Coordinated)> {
        let path = format!("/v1/migrations/{id}");
        let end = std::time::Instant::now() + MIGRATION_LIMIT;
        loop {
            let (status, answer) = self.stack.admin("GET", &path, None)?;
            let found: Result<Migration, _> = serde_json::from_value(answer.clone());
            let migration = found.with_context(|| format!("GET {path} answered {status}: {answer}"))?;
            if let Some(report) = migration.report {
                return Ok((migration.phases, report));
            }
            if std::time::Instant::now() > end {
                bail!("the migration has not ended within {MIGRATION_LIMIT:?}: {answer}");
            }
            interrupt.sleep(LOOK)?;
        }
    }
}

impl Place for Placed {
    fn lab(&self) -> &Lab {
        self.stack.lab()
    }

    fn target(&self) -> SocketAddr {
        SocketAddr::from((address::VIRTUAL4, PORT))
    }

    fn site(&self) -> Site {
        self.site
    }

    fn move_over(&mut self, interrupt: &Interrupt) -> anyhow::Result<Moved> {
        let id = self.stack.start_migration(BACKEND, self.site.other(), &Value::Null)?;
        let (phases, report) = self.finished(&id, interrupt)?;
        if report.outcome != Outcome::Committed {
            let reason = report.reason.as_deref().unwrap_or("it does not say why");
            bail!("the migration ended {:?}: {reason}", report.outcome);
        }
        self.site = self.site.other();
        let end_ms = phases.iter().filter_map(|phase| phase.end_ms).fold(0.0, f64::max);
        let length = |phase: Phase| Some((phase.name, phase.end_ms? - phase.start_ms));
        Ok(Moved {
            total: Duration::from_secs_f64(end_ms / 1e3),
            phases_ms: phases.into_iter().filter_map(length).collect(),
            exposed_ms: report.exposed_ms,
        })
    }
}
