//! The drill report: what clients saw and what the load balancer said, in one JSON document.
//!
//! Every demo, test and benchmark of a migration writes the same fields, so that any two runs can be
//! compared. A run with several migrations fills the single fields like this: times (`freeze_ms`,
//! `flip_us`, `first_replay_us`) are medians over the migrations, `image_bytes` is the largest, counts of packets
//! and `sent_bytes` are sums, `phases` are the last migration's, and `outcome` is the worst. Each migration by
//! itself is in `migrations`.

use serde::{Deserialize, Serialize};

use crate::stall::{ClientStall, Percentiles, Window, stalls};
use crate::timeline::Timeline;

/// How migrations ended; the later, the worse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Nothing was migrated in this run.
    NotMigrated,
    /// The backend runs at the target.
    Committed,
    /// The backend runs at the source, as before.
    RolledBack,
    /// Nobody can tell without an operator.
    InDoubt,
}

/// A phase of a migration, in milliseconds since its start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    /// Such as `hold` or `transfer`.
    pub name: String,
    /// When it began.
    pub start_ms: f64,
    /// When it ended.
    #[serde(default)]
    pub end_ms: Option<f64>,
}

/// What the load balancer's admin API reports of a finished migration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Coordinated {
    /// How it ended.
    pub outcome: Outcome,
    /// Why it did not commit.
    #[serde(default)]
    pub reason: Option<String>,
    /// In order.
    #[serde(default)]
    pub phases: Vec<Phase>,
    /// Length of the freeze window in milliseconds.
    #[serde(default)]
    pub freeze_ms: f64,
    /// From the arrival of the target's report to the store of the gate word, in microseconds.
    #[serde(default)]
    pub flip_us: f64,
    /// When the source stopped, microseconds since the Unix epoch.
    #[serde(default)]
    pub frozen_at_unix_us: Option<i64>,
    /// When the restored process ran, microseconds since the Unix epoch.
    #[serde(default)]
    pub running_at_unix_us: Option<i64>,
    /// How long the server ran while some of its memory was only at the source, in milliseconds.
    #[serde(default)]
    pub exposed_ms: f64,
    /// Size of the checkpoint.
    #[serde(default)]
    pub image_bytes: u64,
    /// What of it crossed the network.
    #[serde(default)]
    pub sent_bytes: u64,
    /// Packets that were held.
    #[serde(default)]
    pub held_packets: u64,
    /// Bytes that were held.
    #[serde(default)]
    pub held_bytes: u64,
    /// Packets that the hold dropped: by policy, or because the queue was full.
    #[serde(default)]
    pub dropped_packets: u64,
    /// Held packets that were sent on.
    #[serde(default)]
    pub replayed_packets: u64,
    /// From the store of the gate word to the first held packet leaving, in microseconds; none if nothing
    /// was held.
    #[serde(default)]
    pub first_replay_us: Option<f64>,
}

/// One migration of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Migration {
    /// Site it began at.
    pub from: String,
    /// Site it was to go to.
    pub to: String,
    /// When it was asked for, nanoseconds since the Unix epoch: the zero of its phases' times.
    pub started_unix_ns: i64,
    /// What the load balancer reported.
    pub coordinated: Coordinated,
}

impl Migration {
    /// Its times in a timeline's nanoseconds.
    pub fn window(&self, timeline: &Timeline) -> Window {
        let report = &self.coordinated;
        let freeze =
            report.frozen_at_unix_us.zip(report.running_at_unix_us).map(|(frozen_us, running_us)| {
                (timeline.from_unix_ns(frozen_us * 1000), timeline.from_unix_ns(running_us * 1000))
            });
        let phase = |name: &str| report.phases.iter().find(|phase| phase.name == name);
        let hold_ns =
            phase("hold").map_or(self.at_ns(timeline, 0.0), |hold| self.at_ns(timeline, hold.start_ms));
        let opened = phase("flip").or(phase("rollback")).or(report.phases.last());
        let opened_ns =
            opened.map_or(hold_ns, |phase| self.at_ns(timeline, phase.end_ms.unwrap_or(phase.start_ms)));
        let replay_ns = opened_ns + (report.first_replay_us.unwrap_or_default() * 1e3) as i64;
        Window { hold_ns, freeze, replay_ns }
    }

    /// A time of its phases in a timeline's nanoseconds.
    pub fn at_ns(&self, timeline: &Timeline, ms: f64) -> i64 {
        timeline.from_unix_ns(self.started_unix_ns) + (ms * 1e6) as i64
    }
}

/// What the server itself counted, compared with what clients saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verification {
    /// Messages that the server had answered and no longer knows of: state was lost.
    pub forgotten: u64,
    /// Messages that the server counted though no client sent them: something was executed twice.
    pub extra: u64,
}

impl Verification {
    /// Compares the server's count of each client's messages with the run.
    pub fn compare(timeline: &Timeline, counts: &[u64]) -> Self {
        let mut due = vec![0u64; counts.len()];
        let mut answered = vec![0u64; counts.len()];
        for message in &timeline.messages {
            due[message.client as usize] += 1;
            answered[message.client as usize] += u64::from(message.answered_ns.is_some());
        }
        let sum = |left: &[u64], right: &[u64]| -> u64 {
            left.iter().zip(right).map(|(left, right)| left.saturating_sub(*right)).sum()
        };
        Self { forgotten: sum(&answered, counts), extra: sum(counts, &due) }
    }
}

/// What was asked for.
#[derive(Clone, Debug)]
pub struct Setting {
    /// `redis` or `openarena`.
    pub scenario: String,
    /// `xdp`, `proxy` or `direct`.
    pub datapath: String,
    /// `hold` or `drop`.
    pub policy: String,
    /// Messages a second, all clients together.
    pub rate_per_s: f64,
}

/// The drill report.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[expect(missing_docs, reason = "the module's text and the design name the fields; units are in their names")]
pub struct DrillReport {
    pub scenario: String,
    pub datapath: String,
    pub policy: String,
    pub clients: u32,
    pub sent: u64,
    pub received: u64,
    pub lost: u64,
    pub duplicated: u64,
    pub reordered: u64,
    pub resets: u64,
    pub freeze_ms: f64,
    pub stall_ms: Percentiles,
    pub added_stall_ms: Percentiles,
    pub flip_us: f64,
    pub first_replay_us: f64,
    pub held_packets: u64,
    pub held_bytes: u64,
    pub dropped_packets: u64,
    pub image_bytes: u64,
    pub sent_bytes: u64,
    pub outcome: Outcome,
    pub phases: Vec<Phase>,
    pub rate_per_s: f64,
    /// All messages of the run.
    pub latency_ms: Percentiles,
    /// The strict sister of `added_stall_ms` (see [`crate::stall`]).
    pub beside_freeze_ms: Percentiles,
    /// Over how many clients (times migrations) the stalls are: those that had a message in a freeze window.
    pub stalled_clients: u64,
    /// Replies that could not be read.
    pub unreadable: u64,
    /// The server's own count; null where the server keeps none.
    pub verification: Option<Verification>,
    pub migrations: Vec<MigrationReport>,
    /// The first few errors of clients, in words.
    pub errors: Vec<String>,
}

/// One migration in the drill report.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[expect(missing_docs, reason = "as in `DrillReport`")]
pub struct MigrationReport {
    pub from: String,
    pub to: String,
    pub stall_ms: Percentiles,
    pub added_stall_ms: Percentiles,
    pub beside_freeze_ms: Percentiles,
    pub stalled_clients: u64,
    #[serde(flatten)]
    pub coordinated: Coordinated,
}

impl DrillReport {
    /// Puts a run and its migrations together.
    pub fn new(
        setting: Setting,
        timeline: &Timeline,
        migrations: &[Migration],
        verification: Option<Verification>,
    ) -> Self {
        let mut all_stalls = Vec::new();
        let mut reports = Vec::with_capacity(migrations.len());
        for migration in migrations {
            let stalls = stalls(timeline, &migration.window(timeline));
            reports.push(MigrationReport {
                from: migration.from.clone(),
                to: migration.to.clone(),
                stall_ms: percentiles(&stalls, |stall| stall.stall_ms),
                added_stall_ms: percentiles(&stalls, |stall| stall.added_ms),
                beside_freeze_ms: percentiles(&stalls, |stall| stall.beside_freeze_ms),
                stalled_clients: stalls.len() as u64,
                coordinated: migration.coordinated.clone(),
            });
            all_stalls.extend(stalls);
        }
        let coordinated = || migrations.iter().map(|migration| &migration.coordinated);
        let median = |value: fn(&Coordinated) -> Option<f64>| {
            Percentiles::of(coordinated().filter_map(value).collect()).p50
        };
        let sum = |value: fn(&Coordinated) -> u64| coordinated().map(value).sum();
        let faults = timeline.faults;
        let Verification { forgotten, extra } = verification.unwrap_or_default();
        Self {
            scenario: setting.scenario,
            datapath: setting.datapath,
            policy: setting.policy,
            clients: timeline.clients,
            sent: timeline.messages.len() as u64,
            received: timeline.answered(),
            lost: faults.lost + forgotten,
            // What was executed twice shows at the clients too, as a rule: not to be counted again.
            duplicated: faults.duplicated.max(extra),
            reordered: faults.reordered,
            resets: faults.resets,
            freeze_ms: median(|report| Some(report.freeze_ms)),
            stall_ms: percentiles(&all_stalls, |stall| stall.stall_ms),
            added_stall_ms: percentiles(&all_stalls, |stall| stall.added_ms),
            flip_us: median(|report| Some(report.flip_us)),
            first_replay_us: median(|report| report.first_replay_us),
            held_packets: sum(|report| report.held_packets),
            held_bytes: sum(|report| report.held_bytes),
            dropped_packets: sum(|report| report.dropped_packets),
            image_bytes: coordinated().map(|report| report.image_bytes).max().unwrap_or_default(),
            sent_bytes: sum(|report| report.sent_bytes),
            outcome: coordinated().map(|report| report.outcome).max().unwrap_or(Outcome::NotMigrated),
            phases: migrations.last().map(|last| last.coordinated.phases.clone()).unwrap_or_default(),
            rate_per_s: setting.rate_per_s,
            latency_ms: Percentiles::of(timeline.latencies_ms()),
            beside_freeze_ms: percentiles(&all_stalls, |stall| stall.beside_freeze_ms),
            stalled_clients: all_stalls.len() as u64,
            unreadable: faults.unreadable,
            verification,
            migrations: reports,
            errors: timeline.errors.clone(),
        }
    }

    /// Whether nothing went wrong for any client.
    pub fn is_clean(&self) -> bool {
        [self.lost, self.duplicated, self.reordered, self.resets, self.unreadable] == [0; 5]
    }
}

fn percentiles(stalls: &[ClientStall], value: fn(&ClientStall) -> f64) -> Percentiles {
    Percentiles::of(stalls.iter().map(value).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tally::Faults;
    use crate::timeline::constructed::{message, timeline};
    use serde_json::{Value, json};

    fn setting() -> Setting {
        Setting { scenario: "redis".into(), datapath: "xdp".into(), policy: "hold".into(), rate_per_s: 100.0 }
    }

    /// Started at 1000 ms, held from 1002, frozen 1005 to 1020, flipped at 1020, first replay 500 us later.
    fn migration() -> Migration {
        let coordinated = serde_json::from_value(json!({
            "outcome": "committed",
            "phases": [
                {"name": "prepare", "start_ms": 0.0, "end_ms": 2.0},
                {"name": "hold", "start_ms": 2.0, "end_ms": 5.0},
                {"name": "flip", "start_ms": 19.9, "end_ms": 20.0},
                {"name": "release", "start_ms": 20.0, "end_ms": 24.0},
            ],
            "freeze_ms": 15.0, "flip_us": 80.0, "first_replay_us": 500.0,
            "frozen_at_unix_us": 1_005_000, "running_at_unix_us": 1_020_000,
            "image_bytes": 3000, "sent_bytes": 2000,
            "held_packets": 4, "held_bytes": 400, "dropped_packets": 1, "replayed_packets": 3,
        }))
        .unwrap();
        Migration { from: "ams".into(), to: "fra".into(), started_unix_ns: 1_000_000_000, coordinated }
    }

    #[test]
    fn the_migrations_times_are_found_on_the_timeline() {
        let mut run = timeline(1, vec![]);
        run.start_unix_ns = 900_000_000;
        let window = migration().window(&run);
        assert_eq!(
            window,
            Window { hold_ns: 102_000_000, freeze: Some((105_000_000, 120_000_000)), replay_ns: 120_500_000 }
        );
    }

    #[test]
    fn a_rollback_without_a_freeze_has_a_window_too() {
        let mut migration = migration();
        migration.coordinated = serde_json::from_value(json!({
            "outcome": "rolled_back", "reason": "no space at fra",
            "phases": [{"name": "hold", "start_ms": 1.0, "end_ms": 2.0}, {"name": "rollback", "start_ms": 2.0, "end_ms": 4.0}],
        }))
        .unwrap();
        let window = migration.window(&timeline(1, vec![]));
        assert_eq!(window, Window { hold_ns: 1_001_000_000, freeze: None, replay_ns: 1_004_000_000 });
    }

    #[test]
    fn the_document_has_the_designs_fields_in_order_and_the_details_after_them() {
        let run = timeline(2, vec![message(0, 1, 1004.0, Some(1021.0)), message(1, 1, 1030.0, Some(1031.0))]);
        let report = DrillReport::new(setting(), &run, &[migration()], Some(Verification::default()));
        let text = serde_json::to_string(&report).unwrap();
        let designed = "{\"scenario\":\"redis\",\"datapath\":\"xdp\",\"policy\":\"hold\",\"clients\":2,\
            \"sent\":2,\"received\":2,\"lost\":0,\"duplicated\":0,\"reordered\":0,\"resets\":0,\"freeze_ms\":15.0,\
            \"stall_ms\":{\"p50\":17.0,\"p99\":17.0,\"max\":17.0},\"added_stall_ms\":{\"p50\":2.0,\"p99\":2.0,\"max\":2.0},\
            \"flip_us\":80.0,\"first_replay_us\":500.0,\"held_packets\":4,\"held_bytes\":400,\"dropped_packets\":1,\
            \"image_bytes\":3000,\"sent_bytes\":2000,\"outcome\":\"committed\",\
            \"phases\":[{\"name\":\"prepare\",\"start_ms\":0.0,\"end_ms\":2.0},";
        assert!(text.starts_with(designed), "{text}");
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["stalled_clients"], 1);
        assert_eq!(value["migrations"][0]["to"], "fra");
        assert_eq!(value["migrations"][0]["replayed_packets"], 3);
        assert!(report.is_clean());
    }

    #[test]
    fn several_migrations_are_summed_up_as_the_module_says() {
        let mut worse = migration();
        worse.started_unix_ns += 2_000_000_000;
        worse.coordinated.outcome = Outcome::RolledBack;
        worse.coordinated.flip_us = 90.0;
        worse.coordinated.first_replay_us = None;
        worse.coordinated.phases.truncate(1);
        let report = DrillReport::new(setting(), &timeline(1, vec![]), &[migration(), worse], None);
        assert_eq!(report.outcome, Outcome::RolledBack);
        assert_eq!((report.flip_us, report.first_replay_us), (80.0, 500.0));
        assert_eq!((report.held_packets, report.dropped_packets, report.sent_bytes), (8, 2, 4000));
        assert_eq!((report.image_bytes, report.phases.len()), (3000, 1));
        let none = DrillReport::new(setting(), &timeline(1, vec![]), &[], None);
        assert_eq!(none.outcome, Outcome::NotMigrated);
    }

    #[test]
    fn every_fault_shows_and_makes_the_run_unclean() {
        type Set = fn(&mut Faults);
        let cases: [(&str, Set); 5] = [
            ("lost", |faults| faults.lost = 3),
            ("duplicated", |faults| faults.duplicated = 3),
            ("reordered", |faults| faults.reordered = 3),
            ("resets", |faults| faults.resets = 3),
            ("unreadable", |faults| faults.unreadable = 3),
        ];
        for (name, set) in cases {
            let mut run =
                timeline(1, (1..=3).map(|n| message(0, n, n as f64, Some(n as f64 + 1.0))).collect());
            set(&mut run.faults);
            let report = DrillReport::new(setting(), &run, &[], None);
            assert!(!report.is_clean(), "{name}");
            assert_eq!(serde_json::to_value(&report).unwrap()[name], 3);
        }
    }

    #[test]
    fn the_servers_count_finds_lost_state_and_double_execution() {
        // Client 0: two answered. Client 1: one answered, one not.
        let run = timeline(
            2,
            vec![
                message(0, 1, 1.0, Some(2.0)),
                message(1, 1, 1.0, Some(2.0)),
                message(0, 2, 3.0, Some(4.0)),
                message(1, 2, 3.0, None),
            ],
        );
        for (counts, forgotten, extra) in
            [([2, 2], 0, 0), ([2, 1], 0, 0), ([1, 1], 1, 0), ([0, 0], 3, 0), ([3, 2], 0, 1), ([1, 4], 1, 2)]
        {
            assert_eq!(Verification::compare(&run, &counts), Verification { forgotten, extra }, "{counts:?}");
        }
        let report = DrillReport::new(setting(), &run, &[], Some(Verification { forgotten: 2, extra: 5 }));
        assert_eq!((report.lost, report.duplicated), (3, 5));
    }
}
