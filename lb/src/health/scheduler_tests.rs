//! The scheduler in a world of the tests' own, by a clock that runs as fast as it likes.

use std::sync::{Mutex, MutexGuard};

use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::time::sleep;

use super::*;
use crate::datapath::Mode;
use crate::health::view::CheckState;

/// What a test decides and what it sees.
#[derive(Default)]
struct Inner {
    sick: HashSet<String>,
    broken: HashSet<String>,
    closed: HashSet<String>,
    generations: HashMap<String, u32>,
    resets: u64,
    answer_after: Duration,
    under_way: usize,
    most_under_way: usize,
    probes: HashMap<String, Vec<Instant>>,
    turns: Vec<(String, bool)>,
}

#[derive(Clone, Default)]
struct TestWorld(Arc<Mutex<Inner>>);

impl TestWorld {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap()
    }

    fn turns(&self) -> Vec<(String, bool)> {
        std::mem::take(&mut self.inner().turns)
    }

    fn probes(&self, backend: &str) -> usize {
        self.inner().probes.get(backend).map_or(0, Vec::len)
    }
}

impl World for TestWorld {
    fn standing(&self, backend: &str) -> Standing {
        let inner = self.inner();
        let generation = inner.generations.get(backend).copied().unwrap_or_default();
        Standing { open: !inner.closed.contains(backend), generation }
    }

    fn resets(&self) -> HashMap<String, u64> {
        let resets = self.inner().resets;
        ["chat-1", "chat-2"].map(|backend| (backend.to_owned(), resets)).into()
    }

    fn turned(&self, backend: &str, up: bool) {
        self.inner().turns.push((backend.to_owned(), up));
    }

    fn probe(&self, plan: &Target) -> BoxFuture<'static, Finding> {
        let (world, backend) = (self.clone(), plan.backend.clone());
        // Named by backend and, where a test tells them apart, by service.
        let service = format!("{}/{}", plan.backend, plan.service);
        let after = {
            let mut inner = self.inner();
            inner.under_way += 1;
            inner.most_under_way = inner.most_under_way.max(inner.under_way);
            inner.probes.entry(backend.clone()).or_default().push(now());
            inner.answer_after
        };
        Box::pin(async move {
            sleep(after).await;
            let mut inner = world.inner();
            inner.under_way -= 1;
            if inner.sick.contains(&backend) || inner.sick.contains(&service) {
                Finding::Unwell(Ailment::Refused)
            } else if inner.broken.contains(&backend) {
                Finding::Unknown("no socket".to_owned())
            } else {
                Finding::Well
            }
        })
    }
}

fn plan(backend: &str, service: &str) -> Target {
    let check = Check {
        probe: Some(Probe::Tcp),
        interval: Duration::from_secs(2),
        timeout: Duration::from_secs(1),
        rise: 2,
        fall: 3,
        resets_per_second: None,
    };
    Target {
        backend: backend.to_owned(),
        service: service.to_owned(),
        check,
        to: "192.0.2.1:80".parse().unwrap(),
        mode: Mode::Nat,
        address: "198.51.100.1:80".parse().unwrap(),
    }
}

/// A scheduler at work on these.
fn start(plans: Vec<Target>) -> (TestWorld, Board, UnboundedSender<Vec<Target>>) {
    let (world, board) = (TestWorld::default(), Board::default());
    let (orders, inbox) = unbounded_channel();
    orders.send(plans).unwrap();
    tokio::spawn(Scheduler::new(Arc::new(world.clone()), board.clone()).run(inbox));
    (world, board, orders)
}

const TENTH: Duration = Duration::from_millis(100);

/// How long it takes until there are turns, and which.
async fn next_turns(world: &TestWorld) -> (Duration, Vec<(String, bool)>) {
    let start = now();
    for _ in 0..1000 {
        let turns = world.turns();
        if !turns.is_empty() {
            return (now() - start, turns);
        }
        sleep(TENTH).await;
    }
    panic!("nothing has turned in 100 s");
}

fn turn(backend: &str, up: bool) -> Vec<(String, bool)> {
    vec![(backend.to_owned(), up)]
}

#[tokio::test(start_paused = true)]
async fn a_backend_is_down_after_fall_failures_and_up_after_rise_successes() {
    let (world, board, _orders) = start(vec![plan("chat-1", "chat"), plan("chat-2", "chat")]);
    sleep(Duration::from_secs(10)).await;
    assert_eq!(world.turns(), []);
    assert_eq!(board.of("chat-1")[0].state, CheckState::Up);

    world.inner().sick.insert("chat-1".to_owned());
    let (after, turns) = next_turns(&world).await;
    assert_eq!(turns, turn("chat-1", false));
    // Two whole intervals and a begun one.
    assert!((36..=68).contains(&(after.as_millis() / 100)), "{after:?}");
    let view = board.of("chat-1").remove(0);
    assert_eq!((view.state, view.last_error.as_deref()), (CheckState::Down, Some("refused")));
    assert!(view.failures == 3 && view.probes > 3, "{view:?}");

    world.inner().sick.clear();
    let (after, turns) = next_turns(&world).await;
    assert_eq!(turns, turn("chat-1", true));
    assert!(after < Duration::from_millis(4600), "{after:?}");
    assert_eq!(board.of("chat-2")[0].failures, 0);
}

#[tokio::test(start_paused = true)]
async fn the_first_result_decides() {
    let (world, _board, _orders) = start(vec![plan("chat-1", "chat")]);
    world.inner().sick.insert("chat-1".to_owned());
    let (after, turns) = next_turns(&world).await;
    assert_eq!(turns, turn("chat-1", false));
    assert!(after <= Duration::from_millis(2100), "{after:?}");
}

#[tokio::test(start_paused = true)]
async fn a_held_backend_is_not_down() {
    let (world, board, _orders) = start(vec![plan("chat-1", "chat")]);
    sleep(Duration::from_secs(5)).await;
    {
        let mut inner = world.inner();
        inner.closed.insert("chat-1".to_owned());
        inner.sick.insert("chat-1".to_owned());
        inner.generations.insert("chat-1".to_owned(), 8);
    }
    sleep(Duration::from_secs(2)).await;
    let probes = world.probes("chat-1");
    sleep(Duration::from_secs(60)).await;
    assert_eq!(world.turns(), []);
    assert_eq!(world.probes("chat-1"), probes, "nobody asks a backend that is held");
    assert!(board.of("chat-1")[0].suspended);
    assert_eq!(board.of("chat-1")[0].state, CheckState::Up);
    {
        let mut inner = world.inner();
        inner.closed.clear();
        inner.sick.clear();
    }
    sleep(Duration::from_secs(10)).await;
    assert!(world.probes("chat-1") > probes && !board.of("chat-1")[0].suspended);
    assert_eq!(world.turns(), []);
}

#[tokio::test(start_paused = true)]
async fn a_probe_during_which_the_gate_changed_says_nothing() {
    let (world, _board, _orders) = start(vec![plan("chat-1", "chat")]);
    sleep(Duration::from_secs(5)).await;
    world.inner().sick.insert("chat-1".to_owned());
    world.inner().answer_after = Duration::from_millis(900);
    // A cutover in the middle of every probe: it begins and ends between two looks.
    for generation in 1..40 {
        let before = world.probes("chat-1");
        while world.probes("chat-1") == before {
            sleep(TENTH).await;
        }
        world.inner().generations.insert("chat-1".to_owned(), generation);
    }
    assert_eq!(world.turns(), []);
    let (_, turns) = next_turns(&world).await;
    assert_eq!(turns, turn("chat-1", false));
}

#[tokio::test(start_paused = true)]
async fn what_is_broken_here_takes_no_backend_out() {
    let (world, board, _orders) = start(vec![plan("chat-1", "chat")]);
    world.inner().broken.insert("chat-1".to_owned());
    sleep(Duration::from_secs(60)).await;
    assert_eq!(world.turns(), []);
    let view = board.of("chat-1").remove(0);
    assert_eq!((view.state, view.probes, view.failures), (CheckState::Untried, 0, 0));
    assert_eq!(view.last_error.as_deref(), Some("the check cannot be made: no socket"));
}

#[tokio::test(start_paused = true)]
async fn a_backend_is_up_while_none_of_its_checks_finds_it_down() {
    let (world, board, orders) = start(vec![plan("dns-1", "dns-tcp"), plan("dns-1", "dns-udp")]);
    sleep(Duration::from_secs(5)).await;
    world.inner().sick.insert("dns-1/dns-udp".to_owned());
    assert_eq!(next_turns(&world).await.1, turn("dns-1", false));
    world.inner().sick.insert("dns-1/dns-tcp".to_owned());
    sleep(Duration::from_secs(20)).await;
    assert_eq!(world.turns(), [], "it is down already");
    world.inner().sick.remove("dns-1/dns-udp");
    sleep(Duration::from_secs(20)).await;
    assert_eq!(world.turns(), []);
    // A check that is taken out of the configuration takes its verdict with it.
    orders.send(vec![plan("dns-1", "dns-udp")]).unwrap();
    assert_eq!(next_turns(&world).await.1, turn("dns-1", true));
    assert_eq!(board.of("dns-1").len(), 1);
}

#[tokio::test(start_paused = true)]
async fn another_configuration_keeps_what_is_known() {
    let (world, board, orders) = start(vec![plan("chat-1", "chat")]);
    world.inner().sick.insert("chat-1".to_owned());
    next_turns(&world).await;
    let mut slower = plan("chat-1", "chat");
    slower.check.interval = Duration::from_secs(20);
    orders.send(vec![slower, plan("chat-2", "chat")]).unwrap();
    sleep(Duration::from_secs(100)).await;
    assert_eq!(world.turns(), []);
    assert_eq!(board.of("chat-1")[0].state, CheckState::Down);
    let probes = world.probes("chat-1");
    assert!((4..=8).contains(&probes), "{probes}");
    assert!(world.probes("chat-2") > 40);
    orders.send(vec![]).unwrap();
    sleep(TENTH).await;
    assert_eq!(world.turns(), turn("chat-1", true));
    assert_eq!(board.of("chat-1"), []);
}

#[tokio::test(start_paused = true)]
async fn too_many_resets_are_a_failure_and_those_that_answer_probes_are_not() {
    let mut only_resets = plan("chat-1", "chat");
    only_resets.check.probe = None;
    only_resets.check.resets_per_second = Some(5);
    let (world, board, _orders) = start(vec![only_resets]);
    sleep(Duration::from_secs(10)).await;
    assert_eq!(world.turns(), []);
    assert_eq!(board.of("chat-1")[0].kind, "resets");
    for _ in 0..10 {
        world.inner().resets += 20;
        sleep(Duration::from_secs(1)).await;
    }
    assert_eq!(world.turns(), turn("chat-1", false));
    assert_eq!(board.of("chat-1")[0].last_error.as_deref(), Some("too many resets"));
    assert_eq!(next_turns(&world).await.1, turn("chat-1", true));

    // A probe a tenth of a second, each refused, is more than five resets a second: none of them is a client's.
    let mut both = plan("chat-2", "chat");
    both.check.interval = TENTH;
    both.check.fall = 1000;
    both.check.resets_per_second = Some(5);
    let (world, board, _orders) = start(vec![both]);
    sleep(Duration::from_secs(1)).await;
    world.inner().sick.insert("chat-2".to_owned());
    for _ in 0..200 {
        let before = world.probes("chat-2");
        sleep(TENTH).await;
        let refused = world.probes("chat-2") - before;
        world.inner().resets += refused as u64;
    }
    let view = board.of("chat-2").remove(0);
    assert!(view.failures > 150, "{view:?}");
    assert_eq!(view.last_error.as_deref(), Some("refused"));
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_backends_are_probed_in_turn() {
    let plans = (0..10_000).map(|i| {
        let mut plan = plan(&format!("b-{i}"), "s");
        plan.check.interval = Duration::from_secs(10);
        plan
    });
    let (world, _board, _orders) = start(plans.collect());
    world.inner().answer_after = Duration::from_millis(100);
    sleep(Duration::from_secs(60)).await;
    let inner = world.inner();
    assert!(inner.most_under_way <= MOST, "{}", inner.most_under_way);
    let counts: Vec<usize> = (0..10_000).map(|i| inner.probes[&format!("b-{i}")].len()).collect();
    let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
    assert!(*least >= 5 && *most <= 7, "each once in ten seconds: {least} to {most} in a minute");
}
