//! Migrations over a datapath in memory and a scripted coordinator.

use futures_util::StreamExt as _;
use lb_core::{Gate, GateWord, Slot};
use migrate::client::AgentAt;
use migrate::protocol::Role;

use super::script::Play;
use super::*;
use crate::config::Config;
use crate::datapath::{Datapath as _, HoldStats};
use crate::memory::MemoryDatapath;
use crate::testing::{CONFIG, TestControl};

struct Test {
    control: TestControl,
    script: Arc<Script>,
    migrations: Arc<Migrations>,
}

impl Test {
    fn new(play: Play) -> Self {
        Self::over(TestControl::new(), play)
    }

    fn over(control: TestControl, play: Play) -> Self {
        let script = Script::new(play);
        let migrations =
            Arc::new(Migrations::new(control.control.clone(), control.config.clone(), script.clone()));
        Self { control, script, migrations }
    }

    fn start(&self, backend: &str, to: &str) -> Result<Arc<Migration>, MigrationError> {
        let wish = Wish { backend: backend.into(), to: to.into(), policy: Policy::Hold, deadline: None };
        self.migrations.start(&wish)
    }

    fn gate(&self) -> (String, Option<String>) {
        let view = self.control.control.view("chat-1").unwrap();
        (view.gate, view.location)
    }
}

async fn ended(migration: Arc<Migration>) -> MigrationView {
    let told: Vec<Told> =
        tokio::time::timeout(Duration::from_secs(5), migration.follow().collect()).await.unwrap();
    match told.into_iter().last() {
        Some(Told::Finished(view)) => *view,
        other => panic!("ended with {other:?}"),
    }
}

fn open_at(site: &str) -> (String, Option<String>) {
    ("forward".into(), Some(site.into()))
}

#[tokio::test]
async fn there_and_back_with_counts_of_the_hold() {
    let test = Test::new(Play::Commit);
    let stats = HoldStats { held_packets: 7, held_bytes: 700, replayed_packets: 6, dropped_packets: 1 };
    test.control.datapath.set_stats(stats);
    let view = ended(test.start("chat-1", "fra").unwrap()).await;
    assert_eq!((view.from.as_str(), view.to.as_str()), ("ams", "fra"));
    assert_eq!(view.state, MigrationState::Committed);
    let names: Vec<&str> = view.phases.iter().map(|phase| phase.name.as_str()).collect();
    assert_eq!(names, ["prepare", "hold", "flip", "release"]);
    let report = view.report.unwrap();
    assert_eq!((report.held_packets, report.held_bytes), (7, 700));
    assert_eq!((report.replayed_packets, report.dropped_packets), (6, 1));
    assert_eq!(report.first_replay_us, Some(40.0));
    assert_eq!((report.freeze_ms, report.image_bytes, report.sent_bytes), (9.5, 1000, 1100));
    assert_eq!(test.gate(), open_at("fra"));

    let back = ended(test.start("chat-1", "ams").unwrap()).await;
    assert_eq!((back.from.as_str(), back.state), ("fra", MigrationState::Committed));
    assert_eq!(test.gate(), open_at("ams"));
    assert!(back.id > view.id, "ids grow");
    assert_eq!(test.migrations.outcomes(), Outcomes { committed: 2, ..Outcomes::default() });

    let specs = test.script.specs.lock().unwrap();
    let plain = |site: &str, url: &str| AgentAt { site: site.into(), url: url.into(), tls: None };
    assert_eq!(specs[0].source, plain("ams", "http://10.2.1.1:7401"));
    assert_eq!(specs[0].target, plain("fra", "http://10.2.2.1:7401"));
    assert_eq!(specs[0].address, "10.1.0.1:6379".parse().unwrap());
    assert_eq!(specs[0].hold.deadline, Duration::from_secs(5));
    assert_eq!(specs[1].source.site, "fra");
}

#[tokio::test]
async fn a_late_follower_is_told_everything() {
    let test = Test::new(Play::Commit);
    let migration = test.start("chat-1", "fra").unwrap();
    let first: Vec<Told> = migration.clone().follow().collect().await;
    let late: Vec<Told> = migration.follow().collect().await;
    assert_eq!(first, late);
    assert_eq!(first.len(), 4 * 2 + 1, "each phase begins and ends, and then it is finished");
    assert!(matches!(&first[0], Told::Phase(phase) if phase.name == "prepare" && phase.end_ms.is_none()));
    assert!(matches!(&first[1], Told::Phase(phase) if phase.end_ms == Some(1.0)));
}

#[tokio::test]
async fn a_failed_restore_ends_where_it_began() {
    let test = Test::new(Play::FailRestore);
    test.control.datapath.set_stats(HoldStats {
        held_packets: 2,
        replayed_packets: 2,
        ..HoldStats::default()
    });
    let view = ended(test.start("chat-1", "fra").unwrap()).await;
    let report = view.report.unwrap();
    assert_eq!(report.outcome, Outcome::RolledBack);
    assert_eq!(report.reason.as_deref(), Some("the restore failed"));
    assert_eq!(report.replayed_packets, 2);
    assert_eq!(test.gate(), open_at("ams"));
    assert_eq!(test.migrations.outcomes(), Outcomes { rolled_back: 1, ..Outcomes::default() });
}

#[tokio::test]
async fn a_migration_that_never_held_reports_no_packets_of_an_earlier_hold() {
    let test = Test::new(Play::FailPrepare);
    test.control.datapath.set_stats(HoldStats { held_packets: 99, ..HoldStats::default() });
    let report = ended(test.start("chat-1", "fra").unwrap()).await.report.unwrap();
    assert_eq!((report.held_packets, report.first_replay_us), (0, None));
    assert!(test.control.datapath.stored().is_empty(), "the gate was never touched");
}

#[tokio::test]
async fn what_cannot_start_changes_nothing() {
    let test = Test::new(Play::Commit);
    let refused = |backend, to| test.start(backend, to).err().expect("it does not start");
    assert!(matches!(refused("x", "fra"), MigrationError::Control(ControlError::UnknownBackend(_))));
    assert!(matches!(refused("chat-1", "x"), MigrationError::Control(ControlError::UnknownSite(_))));
    assert!(matches!(refused("chat-1", "ams"), MigrationError::SameLocation { .. }));
    assert!(matches!(refused("chat-1", "bare"), MigrationError::NoAgent { site } if site == "bare"));
    assert!(matches!(refused("chat-2", "fra"), MigrationError::NoAgent { site } if site == "bare"));
    test.control.control.hold("chat-1", Policy::Hold, None).unwrap();
    assert!(matches!(refused("chat-1", "fra"), MigrationError::NotForward { state: "holding", .. }));
    assert!(test.migrations.all().is_empty() && test.script.specs.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_target_without_a_route_is_refused_before_anything_is_held() {
    let test = Test::new(Play::Commit);
    test.control.datapath.make_unreachable("fra");
    let report = ended(test.start("chat-1", "fra").unwrap()).await.report.unwrap();
    assert_eq!(report.outcome, Outcome::RolledBack);
    assert!(report.reason.unwrap().contains("no route"));
    assert!(test.control.datapath.stored().is_empty());
}

#[tokio::test]
async fn one_at_a_time_and_abort_before_the_flip() {
    let test = Test::new(Play::UntilAbort);
    let migration = test.start("chat-1", "fra").unwrap();
    let second = test.start("chat-1", "fra").err().unwrap();
    assert!(matches!(&second, MigrationError::UnderWay { id, .. } if *id == migration.id));
    let by_hand = test.migrations.unless_under_way("chat-1", |control| control.resume("chat-1", 2));
    assert!(matches!(by_hand, Err(MigrationError::UnderWay { .. })));
    assert!(matches!(test.migrations.abort("m-0"), Err(MigrationError::UnknownMigration(_))));
    test.migrations.abort(&migration.id).unwrap();
    let view = ended(migration.clone()).await;
    assert_eq!(view.state, MigrationState::RolledBack);
    assert_eq!(test.gate(), open_at("ams"));
    assert!(matches!(test.migrations.abort(&migration.id), Err(MigrationError::NotAbortable { .. })));
    test.migrations.unless_under_way("chat-1", |control| control.hold("chat-1", Policy::Hold, None)).unwrap();
}

#[tokio::test]
async fn after_the_flip_there_is_nothing_to_abort() {
    let test = Test::new(Play::FlipAndWait);
    let migration = test.start("chat-1", "fra").unwrap();
    while migration.cutover.opened().is_none() {
        tokio::task::yield_now().await;
    }
    let late = test.migrations.abort(&migration.id).err().unwrap();
    assert!(late.to_string().contains("past its flip"), "{late}");
    test.script.go.notify_one();
    assert_eq!(ended(migration).await.state, MigrationState::Committed);
}

#[tokio::test]
async fn an_aborted_migration_never_flips() {
    let test = TestControl::new();
    let cutover = MigrationCutover::new(test.control.clone(), false);
    use migrate::coordinator::Cutover as _;
    cutover.stage("chat-1", "fra").unwrap();
    let hold = HoldRequest { deadline: Duration::from_secs(5), policy: migrate::coordinator::Policy::Drop };
    let held = cutover.hold("chat-1", hold).unwrap();
    assert_eq!(test.control.view("chat-1").unwrap().gate, "drop");
    assert!(cutover.abort());
    assert!(cutover.flip("chat-1", held, "fra").is_err());
    cutover.resume("chat-1", held).unwrap();
}

#[tokio::test]
async fn a_broken_coordinator_is_in_doubt() {
    let test = Test::new(Play::Panic);
    let view = ended(test.start("chat-1", "fra").unwrap()).await;
    assert_eq!(view.state, MigrationState::InDoubt);
    assert!(view.report.unwrap().reason.unwrap().contains("by hand"));
    assert_eq!(test.gate().0, "hold");
    assert_eq!(test.migrations.outcomes().in_doubt, 1);
}

#[tokio::test]
async fn stopping_aborts_waits_and_starts_no_more() {
    let test = Test::new(Play::UntilAbort);
    let migration = test.start("chat-1", "fra").unwrap();
    assert!(test.migrations.stop(Duration::from_secs(5)).await);
    assert_eq!(migration.state(), MigrationState::RolledBack);
    assert!(matches!(test.start("chat-1", "fra"), Err(MigrationError::Stopping)));
}

#[tokio::test]
async fn old_ones_are_forgotten() {
    let test = Test::new(Play::FailPrepare);
    let first = test.start("chat-1", "fra").unwrap();
    ended(first.clone()).await;
    for _ in 0..REMEMBERED {
        ended(test.start("chat-1", "fra").unwrap()).await;
    }
    assert_eq!(test.migrations.all().len(), REMEMBERED);
    assert!(matches!(test.migrations.get(&first.id), Err(MigrationError::UnknownMigration(_))));
}

/// A daemon that finds tables of a former one; chat-1 is at `ams` (slot A), `fra` is staged.
fn after_restart(word: GateWord) -> Test {
    let control = TestControl::over(move |events| {
        let datapath = MemoryDatapath::new(events);
        let plan = Config::parse(CONFIG, "test.toml").unwrap().plan;
        datapath.pin(&plan, "chat-1", word, [0, 1]);
        datapath
    });
    Test::over(control, Play::Commit)
}

impl Test {
    fn leftover(&self, site: &str, role: Role) {
        let leftover = Some(Leftover { id: "m-old".into(), role });
        self.script.seen.lock().unwrap().insert(site.into(), Seen { leftover, is_there: false });
    }

    fn runs_at(&self, site: &str) {
        self.script.seen.lock().unwrap().insert(site.into(), Seen { leftover: None, is_there: true });
    }

    async fn recovered(&self) -> Vec<MigrationView> {
        self.migrations.recover();
        self.migrations.tasks.close();
        tokio::time::timeout(Duration::from_secs(5), self.migrations.tasks.wait()).await.unwrap();
        self.migrations.all().iter().map(|migration| migration.view()).collect()
    }
}

#[tokio::test]
async fn a_hold_that_was_left_behind_is_rolled_back_under_its_old_id() {
    let test = after_restart(GateWord::new(Gate::Hold, Slot::A, 41));
    test.leftover("fra", Role::Target);
    let views = test.recovered().await;
    assert_eq!(views.len(), 1);
    assert_eq!((views[0].id.as_str(), views[0].from.as_str(), views[0].to.as_str()), ("m-old", "ams", "fra"));
    assert_eq!(views[0].state, MigrationState::RolledBack);
    assert_eq!(test.gate(), open_at("ams"));
    assert_eq!(test.script.recovered.lock().unwrap()[0].2, 41);
}

#[tokio::test]
async fn a_hold_whose_agents_fell_back_by_themselves_is_rolled_back_too() {
    let test = after_restart(GateWord::new(Gate::Drop, Slot::A, 41));
    test.runs_at("ams");
    assert_eq!(test.recovered().await[0].state, MigrationState::RolledBack);
    assert_eq!(test.gate(), open_at("ams"));
}

#[tokio::test]
async fn a_gate_never_opens_to_a_backend_that_does_not_run() {
    for elsewhere in [None, Some("fra")] {
        let test = after_restart(GateWord::new(Gate::Hold, Slot::A, 41));
        elsewhere.into_iter().for_each(|site| test.runs_at(site));
        assert!(test.recovered().await.is_empty());
        assert_eq!(test.gate().0, "hold");
    }
}

#[tokio::test]
async fn a_flip_that_was_left_behind_is_finished() {
    for gate in [Gate::Replay, Gate::Forward] {
        let test = after_restart(GateWord::new(gate, Slot::B, 41));
        test.leftover("ams", Role::Source);
        let views = test.recovered().await;
        assert_eq!((views[0].from.as_str(), views[0].to.as_str()), ("ams", "fra"), "{gate:?}");
        assert_eq!(views[0].state, MigrationState::Committed);
        assert_eq!(test.gate(), open_at("fra"));
        assert_eq!(test.script.recovered.lock().unwrap()[0].1, "fra");
    }
}

#[tokio::test]
async fn a_rollback_that_had_opened_the_gate_already_is_finished() {
    for gate in [Gate::Replay, Gate::Forward] {
        let test = after_restart(GateWord::new(gate, Slot::A, 41));
        test.leftover("ams", Role::Source);
        let views = test.recovered().await;
        assert_eq!(views[0].state, MigrationState::RolledBack, "{gate:?}: {:?}", views[0].report);
        assert_eq!(test.gate(), open_at("ams"));
    }
}

#[tokio::test]
async fn an_open_gate_with_nothing_left_behind_is_left_alone() {
    let test = after_restart(GateWord::new(Gate::Forward, Slot::B, 41));
    assert!(test.recovered().await.is_empty());
    assert!(test.control.datapath.stored().is_empty());
}

#[tokio::test]
async fn a_hold_by_hand_without_a_staged_site_is_left_to_its_holder() {
    let control = TestControl::over(|events| {
        let datapath = MemoryDatapath::new(events);
        let plan = Config::parse(CONFIG, "test.toml").unwrap().plan;
        datapath.pin(&plan, "chat-1", GateWord::new(Gate::Hold, Slot::A, 41), [0, 0]);
        datapath
    });
    let test = Test::over(control, Play::Commit);
    assert!(test.recovered().await.is_empty());
    assert_eq!(test.gate().0, "hold");
    let number = test.control.datapath.backend("chat-1").unwrap();
    assert_eq!(test.control.datapath.state(number).word.generation(), 41);
}
