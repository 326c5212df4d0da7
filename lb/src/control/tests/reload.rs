//! Drains, health and other plans.

use super::*;
use crate::datapath::{BackendPlan, ServicePlan};

fn plan() -> Plan {
    Config::parse(CONFIG, "test.toml").unwrap().plan
}

fn replan(test: &TestControl, plan: &Plan) -> Result<(), ControlError> {
    test.control.replan(plan, test.control.hold_defaults(), |_| false)
}

async fn weights(test: &TestControl, expected: &[u32]) {
    let start = Instant::now();
    while test.datapath.weights("chat") != expected {
        assert!(start.elapsed() < PATIENCE, "{:?} instead of {expected:?}", test.datapath.weights("chat"));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_drain_is_done_when_it_returns_and_outlives_the_daemon() {
    let test = TestControl::new();
    test.control.set_drained("chat-1", true).unwrap();
    assert_eq!(test.datapath.weights("chat"), [0, 100_000]);
    assert!(test.control.view("chat-1").unwrap().drained && !test.control.view("chat-2").unwrap().drained);
    assert!(matches!(test.control.set_drained("x", true), Err(ControlError::UnknownBackend(_))));

    let hold = test.control.hold_defaults();
    let next = Control::start(test.datapath.clone(), &plan(), hold).unwrap();
    assert_eq!(test.datapath.weights("chat"), [0, 100_000]);
    next.set_drained("chat-1", false).unwrap();
    assert_eq!(test.datapath.weights("chat"), [100_000, 100_000]);
    assert!(!next.view("chat-1").unwrap().drained);
}

#[tokio::test]
async fn a_drain_by_the_file_is_ended_by_the_file() {
    let test = TestControl::new();
    let mut drained = plan();
    drained.backends[0].drain = true;
    replan(&test, &drained).unwrap();
    assert_eq!(test.datapath.weights("chat"), [0, 100_000]);
    assert!(matches!(test.control.set_drained("chat-1", false), Err(ControlError::DrainedByFile(_))));
    replan(&test, &plan()).unwrap();
    assert_eq!(test.datapath.weights("chat"), [100_000, 100_000]);
}

#[tokio::test]
async fn a_backend_that_is_down_gets_nothing_until_it_is_back() {
    let test = TestControl::new();
    test.control.set_health("chat-2", false).unwrap();
    weights(&test, &[100_000, 0]).await;
    assert!(test.control.view("chat-2").unwrap().down);
    test.control.set_health("chat-1", false).unwrap();
    weights(&test, &[100_000, 100_000]).await;
    test.control.set_health("chat-2", true).unwrap();
    weights(&test, &[0, 100_000]).await;
    assert!(matches!(test.control.set_health("x", true), Err(ControlError::UnknownBackend(_))));
}

#[tokio::test]
async fn a_backend_that_comes_back_starts_slowly() {
    let test = TestControl::new();
    let mut slow = plan();
    slow.services[0].slow_start = Duration::from_secs(1);
    replan(&test, &slow).unwrap();
    test.control.set_health("chat-2", false).unwrap();
    weights(&test, &[100_000, 0]).await;
    test.control.set_health("chat-2", true).unwrap();
    weights(&test, &[100_000, 100_000]).await;
    let course: Vec<u32> = test
        .datapath
        .calls()
        .into_iter()
        .filter_map(|call| match call {
            Call::Weigh(_, weights) => Some(weights[1]),
            _ => None,
        })
        .collect();
    assert!(course.iter().any(|weight| (10_000..100_000).contains(weight)), "{course:?}");
    assert!(course.len() <= 8, "a few times a second: {course:?}");
}

#[tokio::test]
async fn another_plan_adds_and_removes_without_disturbing_a_hold() {
    let test = TestControl::new();
    let held = test.control.hold("chat-1", Policy::Hold, None).unwrap();
    let mut other = plan();
    other.backends.remove(1);
    other.backends.push(BackendPlan::new("chat-3", "10.1.0.3:6379".parse().unwrap(), "fra"));
    other.services[0] = ServicePlan {
        backends: vec!["chat-1".into(), "chat-3".into()],
        weights: vec![100, 100],
        ..other.services[0].clone()
    };
    let before = test.datapath.calls();
    replan(&test, &other).unwrap();
    assert_eq!(test.datapath.calls(), before, "no gate is touched");
    let names: Vec<String> = test.control.views().into_iter().map(|view| view.name).collect();
    assert_eq!(names, ["chat-1", "chat-3"]);
    assert!(matches!(test.control.hold("chat-2", Policy::Hold, None), Err(ControlError::UnknownBackend(_))));
    let resumed = test.control.resume("chat-1", held).unwrap();
    assert!(test.control.replay_ended("chat-1", resumed, PATIENCE).await.is_some());
    let changes = Changes::between(&plan(), &other);
    assert_eq!(changes.added, ["backend chat-3"]);
    assert_eq!(changes.removed, ["backend chat-2"]);
    assert_eq!(changes.changed, ["service chat"]);
    assert!(Changes::between(&other, &other).is_empty());
}

#[tokio::test]
async fn what_is_in_use_is_not_taken_away_and_nothing_else_is_done() {
    let test = TestControl::new();
    let held = test.control.hold("chat-1", Policy::Hold, None).unwrap();
    let mut without = plan();
    without.backends.remove(0);
    without.services[0].backends.remove(0);
    without.services[0].weights.remove(0);
    let mut moved = plan();
    moved.backends[0].address = "10.1.0.9:6379".parse().unwrap();
    for refused in [&without, &moved] {
        let error = replan(&test, refused).unwrap_err();
        assert!(matches!(error, ControlError::InUse { state: "holding", .. }), "{error}");
        assert_eq!(test.datapath.weights("chat"), [100_000, 100_000]);
        assert_eq!(test.control.views().len(), 2);
    }
    let resumed = test.control.resume("chat-1", held).unwrap();
    assert!(test.control.replay_ended("chat-1", resumed, PATIENCE).await.is_some());
    let moving = test.control.replan(&without, test.control.hold_defaults(), |name| name == "chat-1");
    assert!(matches!(moving, Err(ControlError::InUse { state: "in a migration", .. })));

    // A site where a backend runs that stays, and a site that cannot be reached.
    let mut homeless = plan();
    homeless.sites.retain(|site| site.name != "ams");
    assert!(matches!(replan(&test, &homeless), Err(ControlError::SiteInUse { .. })));
    test.datapath.make_unreachable("fra");
    assert!(matches!(replan(&test, &moved), Err(ControlError::Datapath(_))));
    // Refused, so the backend can still be held.
    test.control.hold("chat-1", Policy::Hold, None).unwrap();
}
