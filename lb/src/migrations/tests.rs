//! Migrations over a datapath in memory and a scripted coordinator.

use futures_util::StreamExt as _;
use lb_core::{Gate, GateWord, Slot};
use migrate::client::AgentAt;
use migrate::coordinator::Left;
use migrate::protocol::Role;

use super::script::Play;
use super::*;
use crate::config::Config;
use crate::datapath::{Datapath as _, HoldStats};
use crate::memory::MemoryDatapath;
use crate::testing::{CONFIG, TestControl};
use tempfile::TempDir;

struct Test {
    control: TestControl,
    script: Arc<Script>,
    migrations: Arc<Migrations>,
    folder: TempDir,
}

impl Test {
    fn new(play: Play) -> Self {
        Self::over(TestControl::new(), play)
    }

    fn over(control: TestControl, play: Play) -> Self {
        let script = Script::new(play);
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::at(&folder.path().join("journal.redb"));
        Self::with(control, script, journal, folder)
    }

    fn with(control: TestControl, script: Arc<Script>, journal: Journal, folder: TempDir) -> Self {
        let (gates, config) = (control.control.clone(), control.config.clone());
        let migrations = Arc::new(Migrations::new(gates, config, script.clone(), journal));
        Self { control, script, migrations, folder }
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
    while migration.cutover.as_ref().unwrap().opened().is_none() {
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
    use migrate::coordinator::Cutover as _;
    let journal = Arc::new(Journal::at("/nowhere".as_ref()));
    let (cutover, _) = MigrationCutover::new(test.control.clone(), journal, "m-1".into(), false);
    cutover.stage("chat-1", "fra").unwrap();
    let hold = HoldRequest { deadline: Duration::from_secs(5), policy: migrate::coordinator::Policy::Drop };
    let held = cutover.hold("chat-1", hold).unwrap();
    assert_eq!(test.control.view("chat-1").unwrap().gate, "drop");
    assert!(cutover.abort());
    assert!(cutover.flip("chat-1", held, "fra").is_err());
    cutover.resume("chat-1", held).unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_way_back_does_not_end_with_the_holds_deadline() {
    let test = TestControl::new();
    use migrate::coordinator::Cutover as _;
    let journal = Arc::new(Journal::at("/nowhere".as_ref()));
    let (cutover, _orders) = MigrationCutover::new(test.control.clone(), journal, "m-1".into(), false);
    let hold = HoldRequest { deadline: Duration::from_secs(5), policy: migrate::coordinator::Policy::Hold };
    cutover.stage("chat-1", "fra").unwrap();
    cutover.flip("chat-1", cutover.hold("chat-1", hold).unwrap(), "fra").unwrap();
    tokio::time::sleep(Duration::from_millis(10)).await;
    let held = cutover.hold("chat-1", hold).unwrap();
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert!(matches!(test.control.state("chat-1"), Ok(State::Expired { .. })));
    cutover.flip("chat-1", held, "ams").unwrap();
    assert_eq!(test.control.sites_of("chat-1").unwrap().0.as_deref(), Some("ams"));
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
    assert_eq!(migration.view().state, MigrationState::RolledBack);
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
        self.script.seen.lock().unwrap().insert(site.into(), Leftover { id: "m-old".into(), role });
    }

    /// What a former daemon wrote down of a migration from `ams` to `fra`.
    fn written(&self, step: Step) {
        let (id, backend) = ("m-old".to_owned(), "chat-1".to_owned());
        let (from, to) = ("ams".to_owned(), "fra".to_owned());
        let entry = Entry { id, backend, from, to, started_at_unix_us: 1, step, report: None };
        self.migrations.journal.begin(&entry).unwrap();
    }

    fn left(&self) -> Left {
        self.script.recovered.lock().unwrap()[0].1
    }

    async fn recovered(&self) -> Vec<MigrationView> {
        self.migrations.recover().unwrap();
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
    assert_eq!(test.left(), Left::Before { generation: 41 });
}

#[tokio::test]
async fn the_journal_and_the_gate_say_where_a_migration_was_left() {
    let (ams, fra) = (Slot::A, Slot::B);
    for (step, gate, slot, left) in [
        (Step::Begun, Gate::Hold, ams, Left::Before { generation: 41 }),
        (Step::Begun, Gate::Drop, ams, Left::Before { generation: 41 }),
        (Step::Begun, Gate::Forward, ams, Left::Before { generation: 41 }),
        (Step::Begun, Gate::Replay, fra, Left::After { confirmed: false }),
        (Step::Confirming, Gate::Forward, fra, Left::After { confirmed: true }),
        (Step::Returning, Gate::Hold, fra, Left::Returning { at_target: true, generation: 41 }),
        (Step::Returning, Gate::Forward, ams, Left::Returning { at_target: false, generation: 41 }),
    ] {
        let test = after_restart(GateWord::new(gate, slot, 41));
        test.written(step);
        assert_eq!(test.recovered().await.len(), 1);
        assert_eq!(test.left(), left, "{step:?} {gate:?}");
    }
}

#[tokio::test]
async fn tables_younger_than_a_confirmed_flip_are_flipped_again() {
    let test = after_restart(GateWord::new(Gate::Forward, Slot::A, 2));
    test.written(Step::Confirming);
    assert_eq!(test.recovered().await[0].state, MigrationState::Committed);
    assert_eq!(test.left(), Left::After { confirmed: true });
    assert_eq!(test.gate(), open_at("fra"));
}

#[tokio::test(start_paused = true)]
async fn where_tables_may_be_younger_than_a_flip_its_lease_ends_first() {
    let test = after_restart(GateWord::new(Gate::Forward, Slot::A, 2));
    test.written(Step::Begun);
    let began = tokio::time::Instant::now();
    test.migrations.recover().unwrap();
    test.migrations.tasks.close();
    test.migrations.tasks.wait().await;
    assert!(began.elapsed() >= Duration::from_secs(12), "{:?}", began.elapsed());
    assert_eq!(test.migrations.all()[0].view().state, MigrationState::RolledBack);
}

#[tokio::test]
async fn what_cannot_be_taken_up_is_shown_and_stays_written() {
    let test = after_restart(GateWord::new(Gate::Hold, Slot::A, 41));
    let entry = Entry {
        id: "m-old".into(),
        backend: "gone".into(),
        from: "ams".into(),
        to: "fra".into(),
        started_at_unix_us: 1,
        step: Step::Begun,
        report: None,
    };
    test.migrations.journal.begin(&entry).unwrap();
    let views = test.recovered().await;
    assert_eq!(views[0].state, MigrationState::InDoubt);
    assert!(views[0].doubt.as_ref().unwrap().contains("gone"), "{views:?}");
    assert_eq!(test.migrations.journal.entries().unwrap(), [entry]);
    assert!(matches!(test.migrations.abort("m-old"), Err(MigrationError::NotAbortable { .. })));
}

#[tokio::test]
async fn the_ended_are_remembered_by_the_next_daemon() {
    let test = Test::new(Play::Commit);
    let view = ended(test.start("chat-1", "fra").unwrap()).await;
    test.migrations.stop(Duration::from_secs(5)).await;
    let Test { control, script, migrations, folder } = test;
    drop(migrations);
    let journal = Journal::at(&folder.path().join("journal.redb"));
    let next = Test::with(control, script, journal, folder);
    assert_eq!(next.recovered().await, [view]);
    assert!(next.script.recovered.lock().unwrap().is_empty());
    let id = next.migrations.all()[0].id.clone();
    assert!(matches!(next.migrations.abort(&id), Err(MigrationError::NotAbortable { .. })));
}

#[tokio::test]
async fn nothing_begins_that_cannot_be_written_down() {
    let (control, folder) = (TestControl::new(), tempfile::tempdir().unwrap());
    let journal = Journal::at(&folder.path().join("a-file/journal.redb"));
    std::fs::write(folder.path().join("a-file"), "").unwrap();
    let test = Test::with(control, Script::new(Play::Commit), journal, folder);
    assert!(matches!(test.start("chat-1", "fra"), Err(MigrationError::Journal(_))));
    assert!(test.migrations.all().is_empty() && test.script.specs.lock().unwrap().is_empty());
    assert!(test.control.datapath.stored().is_empty());
}

#[tokio::test]
async fn an_operator_says_how_one_in_doubt_ends() {
    let test = Test::new(Play::Doubt);
    let migration = test.start("chat-1", "fra").unwrap();
    let mut told = Box::pin(migration.clone().follow());
    while !matches!(told.next().await.unwrap(), Told::Doubt(doubt) if doubt == "no answer") {}
    let view = migration.view();
    assert_eq!((view.state, view.doubt.as_deref()), (MigrationState::InDoubt, Some("no answer")));
    assert!(test.migrations.is_under_way("chat-1"));
    let refused = test.migrations.resolve(&migration.id, Verdict::RolledBack).await.err().unwrap();
    assert!(refused.to_string().contains("it may serve"), "{refused}");
    test.migrations.resolve(&migration.id, Verdict::Committed).await.unwrap();
    let view = ended(migration.clone()).await;
    assert_eq!((view.state, view.doubt), (MigrationState::Committed, None));
    let late = test.migrations.resolve(&migration.id, Verdict::Committed).await.err().unwrap();
    assert!(late.to_string().contains("it has ended"), "{late}");
}

#[tokio::test]
async fn a_closed_gate_without_a_migration_is_left_to_its_holder() {
    let test = after_restart(GateWord::new(Gate::Hold, Slot::A, 41));
    assert!(test.recovered().await.is_empty());
    assert_eq!(test.gate().0, "hold");
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
        assert_eq!(test.left(), Left::After { confirmed: true }, "the safe side");
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
