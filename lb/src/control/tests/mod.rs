//! Control over a datapath in memory.

use lb_core::{Gate, GateWord, Slot};

use super::*;
use crate::config::Config;
use crate::memory::{Call, MemoryDatapath};
use crate::testing::{CONFIG, TestControl};

mod reload;

const PATIENCE: Duration = Duration::from_secs(5);

fn gates(datapath: &MemoryDatapath) -> Vec<(Gate, Slot, u32)> {
    datapath.stored().iter().map(|word| (word.gate(), word.slot(), word.generation())).collect()
}

#[tokio::test]
async fn a_cutover_from_hold_to_forward() {
    let test = TestControl::new();
    test.datapath.set_stats(HoldStats { held_packets: 7, replayed_packets: 7, ..HoldStats::default() });
    let control = &test.control;
    control.stage("chat-1", "fra").unwrap();
    let held = control.hold("chat-1", Policy::Hold, None).unwrap();
    let flipped = control.flip("chat-1", held, "fra").unwrap();
    let replay = control.replay_ended("chat-1", flipped, PATIENCE).await.unwrap();
    assert_eq!(replay.generation, flipped);
    assert_eq!(replay.first_after, Some(Duration::from_micros(40)));
    assert_eq!(replay.ended.unwrap().replayed_packets, 7);
    assert_eq!(
        gates(&test.datapath),
        [(Gate::Hold, Slot::A, 2), (Gate::Replay, Slot::B, 3), (Gate::Forward, Slot::B, 4)]
    );
    assert_eq!(control.view("chat-1").unwrap().location.as_deref(), Some("fra"));
    let begin = test.datapath.calls().iter().position(|call| matches!(call, Call::BeginHold(..)));
    let close = test.datapath.calls().iter().position(|call| matches!(call, Call::Store(..)));
    assert!(begin < close, "the queue is ready before the gate closes");
}

#[tokio::test]
async fn a_replay_of_nothing_has_no_first_packet() {
    let test = TestControl::new();
    let held = test.control.hold("chat-1", Policy::Hold, None).unwrap();
    let resumed = test.control.resume("chat-1", held).unwrap();
    let replay = test.control.replay_ended("chat-1", resumed, PATIENCE).await.unwrap();
    assert_eq!(replay.first_after, None);
    assert_eq!(test.control.view("chat-1").unwrap().location.as_deref(), Some("ams"));
}

#[tokio::test]
async fn a_deadline_closes_the_gate_and_only_a_word_from_outside_opens_it() {
    let test = TestControl::new();
    let held = test.control.hold("chat-1", Policy::Hold, Some(Duration::from_millis(30))).unwrap();
    let expired = |control: &Control| matches!(control.state("chat-1").unwrap(), State::Expired { .. });
    let start = Instant::now();
    while !expired(&test.control) && start.elapsed() < PATIENCE {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(expired(&test.control) && start.elapsed() >= Duration::from_millis(29));
    assert_eq!(gates(&test.datapath).last(), Some(&(Gate::Drop, Slot::A, 3)));
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(expired(&test.control), "it stays closed");
    test.control.stage("chat-1", "fra").unwrap();
    let late = test.control.flip("chat-1", held, "fra").unwrap_err();
    assert!(matches!(late, ControlError::Refused { refusal: Refusal::DeadlinePassed { current: 3 }, .. }));
    let resumed = test.control.resume("chat-1", held).unwrap();
    assert!(test.control.replay_ended("chat-1", resumed, PATIENCE).await.is_some());
    assert_eq!(gates(&test.datapath).last(), Some(&(Gate::Forward, Slot::A, 5)));
}

#[tokio::test]
async fn unknown_names_and_unreachable_sites_change_nothing() {
    let test = TestControl::new();
    test.datapath.make_unreachable("fra");
    let control = &test.control;
    assert!(matches!(control.hold("x", Policy::Hold, None), Err(ControlError::UnknownBackend(_))));
    assert!(matches!(control.resume("x", 1), Err(ControlError::UnknownBackend(_))));
    assert!(matches!(control.stage("x", "fra"), Err(ControlError::UnknownBackend(_))));
    assert!(matches!(control.stage("chat-1", "x"), Err(ControlError::UnknownSite(_))));
    assert!(matches!(control.stage("chat-1", "ams"), Err(ControlError::Refused { .. })));
    assert!(matches!(control.stage("chat-1", "fra"), Err(ControlError::Datapath(_))));
    assert!(test.datapath.calls().is_empty());

    let held = control.hold("chat-1", Policy::Hold, None).unwrap();
    let calls = test.datapath.calls();
    assert!(matches!(control.flip("chat-1", held, "x"), Err(ControlError::UnknownSite(_))));
    assert!(matches!(control.flip("chat-1", held, "fra"), Err(ControlError::Refused { .. })));
    assert!(matches!(control.flip("chat-1", held - 1, "fra"), Err(ControlError::Refused { .. })));
    assert_eq!(test.datapath.calls(), calls);
}

#[tokio::test]
async fn a_flip_needs_staging() {
    let test = TestControl::new();
    let held = test.control.hold("chat-1", Policy::Drop, None).unwrap();
    let refused = test.control.flip("chat-1", held, "fra").unwrap_err();
    assert!(matches!(refused, ControlError::Refused { refusal: Refusal::NotStaged, .. }));
    test.control.stage("chat-1", "fra").unwrap();
    test.control.flip("chat-1", held, "fra").unwrap();
    assert_eq!(test.control.view("chat-1").unwrap().location.as_deref(), Some("fra"));
}

#[tokio::test]
async fn while_a_site_is_being_staged_nothing_flips_and_nothing_else_waits() {
    let test = TestControl::new();
    test.control.stage("chat-1", "fra").unwrap();
    let held = test.control.hold("chat-1", Policy::Hold, None).unwrap();
    let network = test.datapath.slow_network();
    let staging = std::thread::spawn({
        let control = test.control.clone();
        move || control.stage("chat-1", "bare")
    });
    network.waiting.recv().unwrap();
    assert!(matches!(test.control.flip("chat-1", held, "fra"), Err(ControlError::Staging(_))));
    assert_eq!(test.control.view("chat-1").unwrap().gate, "hold");
    network.answer.send(()).unwrap();
    staging.join().unwrap().unwrap();
    test.control.flip("chat-1", held, "bare").unwrap();
    assert_eq!(test.control.view("chat-1").unwrap().location.as_deref(), Some("bare"));
}

/// A daemon that finds tables of a former one.
async fn restart(word: GateWord) -> TestControl {
    TestControl::over(move |events| {
        let datapath = MemoryDatapath::new(events);
        let plan = Config::parse(CONFIG, "test.toml").unwrap().plan;
        datapath.pin(&plan, "chat-1", word, [0, 1]);
        datapath
    })
}

#[tokio::test]
async fn a_restart_keeps_a_forwarding_backend_where_it_moved_to() {
    let test = restart(GateWord::new(Gate::Forward, Slot::B, 41)).await;
    let view = test.control.view("chat-1").unwrap();
    assert_eq!((view.location.as_deref(), view.generation), (Some("fra"), 41));
    assert!(test.datapath.calls().is_empty());
}

#[tokio::test]
async fn a_restart_takes_over_a_hold_with_its_generation() {
    let test = restart(GateWord::new(Gate::Hold, Slot::A, 41)).await;
    assert_eq!(test.control.state("chat-1").unwrap().label(), "holding");
    assert!(matches!(test.datapath.calls()[..], [Call::BeginHold(..)]));
    let left = test.control.view("chat-1").unwrap().deadline_in_ms.unwrap();
    assert!((4000..=5000).contains(&left), "{left}");
    let flipped = test.control.flip("chat-1", 41, "fra").unwrap();
    assert!(test.control.replay_ended("chat-1", flipped, PATIENCE).await.is_some());
}

#[tokio::test]
async fn a_restart_ends_a_replay() {
    let test = restart(GateWord::new(Gate::Replay, Slot::B, 41)).await;
    let replay = test.control.replay_ended("chat-1", 41, PATIENCE).await.unwrap();
    assert_eq!(replay.generation, 41);
    assert_eq!(test.control.state("chat-1").unwrap(), State::Forward);
    assert_eq!(test.control.view("chat-1").unwrap().location.as_deref(), Some("fra"));
}

#[tokio::test]
async fn ends_of_replays_are_waited_for() {
    let test = TestControl::over(MemoryDatapath::without_replays);
    let held = test.control.hold("chat-1", Policy::Hold, None).unwrap();
    assert!(test.control.replays_ended(Duration::ZERO).await, "a hold is no replay");
    test.control.resume("chat-1", held).unwrap();
    assert!(!test.control.replays_ended(Duration::from_millis(20)).await);
    assert!(test.control.replay_ended("chat-1", held + 1, Duration::from_millis(20)).await.is_none());
    assert!(matches!(test.control.hold("chat-1", Policy::Hold, None), Err(ControlError::Refused { .. })));
    test.datapath.finish_replay(test.datapath.backend("chat-1").unwrap());
    assert!(test.control.replays_ended(PATIENCE).await);
}
