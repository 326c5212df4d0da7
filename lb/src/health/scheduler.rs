//! When which probe is made, and who hears of the results: one task for all checks.
//!
//! Due probes wait in the order of their times and at most [`MOST`] are under way, so that ten thousand backends
//! cost no more at once than two hundred. What a probe is and where its result goes stands behind [`World`].

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use super::machine::{Commands, Input, Machine, Pace, ResetLimit};
use super::prober::{Ailment, Finding};
use super::target::{Key, Target};
use super::view::{Board, CheckView};
use crate::config::{Check, Probe};

/// Probes under way at the same time.
pub(super) const MOST: usize = 256;
/// How often gates and resets are looked at.
const LOOK: Duration = Duration::from_secs(1);
/// Windows in which resets are counted are not shorter.
const SHORTEST_WINDOW: Duration = Duration::from_secs(1);

/// Whether a backend may be judged by a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Standing {
    /// Its gate is `forward` and no migration of it is under way.
    pub(super) open: bool,
    /// Of its gate word: a probe during which it changed says nothing.
    pub(super) generation: u32,
}

/// What the scheduler has around it.
pub(super) trait World: Send + Sync + 'static {
    /// Whether the backend may be judged now.
    fn standing(&self, backend: &str) -> Standing;
    /// Resets that each backend has sent to clients so far.
    fn resets(&self) -> HashMap<String, u64>;
    /// The backend is up (or down) from now on.
    fn turned(&self, backend: &str, up: bool);
    /// Asks.
    fn probe(&self, target: &Target) -> BoxFuture<'static, Finding>;
}

struct Entry {
    target: Target,
    machine: Machine,
    /// Resets that answered our own probes.
    own_resets: u64,
}

struct Ended {
    key: Key,
    generation: u32,
    finding: Finding,
    took: Duration,
}

/// All checks.
pub(super) struct Scheduler<W> {
    world: Arc<W>,
    board: Board,
    entries: BTreeMap<Key, Entry>,
    due: BTreeSet<(Instant, Key)>,
    running: JoinSet<Ended>,
    /// Backends that were reported as down.
    down: HashSet<Arc<str>>,
}

impl<W: World> Scheduler<W> {
    pub(super) fn new(world: Arc<W>, board: Board) -> Self {
        Self {
            world,
            board,
            entries: BTreeMap::new(),
            due: BTreeSet::new(),
            running: JoinSet::new(),
            down: HashSet::new(),
        }
    }

    /// Checks what it is told to until nobody can tell it anything any more.
    pub(super) async fn run(mut self, mut orders: UnboundedReceiver<Vec<Target>>) {
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let next = self.due.first().filter(|_| self.running.len() < MOST).map(|(at, _)| *at);
            let due = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                order = orders.recv() => match order {
                    Some(targets) => self.apply(targets),
                    None => return,
                },
                Some(ended) = self.running.join_next() => match ended {
                    Ok(ended) => self.ended(ended),
                    Err(error) => tracing::error!(%error, "a health check broke"),
                },
                _ = look.tick() => self.look(),
                () = due => self.start(),
            }
        }
    }

    /// Checks these from now on, and nothing else. What is known of those that stay is kept.
    fn apply(&mut self, targets: Vec<Target>) {
        let now = now();
        let mut former = std::mem::take(&mut self.entries);
        self.due.clear();
        for target in targets {
            let key = target.key();
            let entry = match former.remove(&key) {
                Some(mut entry) => {
                    if entry.target.check != target.check {
                        entry.machine.set_pace(pace(&target.check), now);
                    }
                    Entry { target, ..entry }
                }
                None => {
                    self.board.views().insert(key.clone(), CheckView::new(&target));
                    let machine = Machine::new(pace(&target.check), seed(&key), now);
                    Entry { target, machine, own_resets: 0 }
                }
            };
            self.entries.insert(key.clone(), entry);
            self.queue(&key);
        }
        for key in former.keys() {
            self.board.views().remove(key);
            self.tell(&key.backend);
        }
    }

    /// Puts a check's next probe into the queue.
    fn queue(&mut self, key: &Key) {
        if let Some(at) = self.entries.get(key).and_then(|entry| entry.machine.next_probe()) {
            self.due.insert((at, key.clone()));
        }
    }

    /// Starts the probes that are due, as far as there is room.
    fn start(&mut self) {
        let now = now();
        while self.running.len() < MOST
            && let Some((at, _)) = self.due.first()
            && *at <= now
            && let Some((_, key)) = self.due.pop_first()
        {
            let open = self.world.standing(&key.backend).open;
            self.input(&key, if open { Input::Tick } else { Input::Suspend }, now);
        }
    }

    /// Looks at gates and resets.
    fn look(&mut self) {
        let now = now();
        let keys: Vec<Key> = self.entries.keys().cloned().collect();
        let matter = self.entries.values().any(|entry| entry.target.check.resets_per_second.is_some());
        let resets = if matter { self.world.resets() } else { HashMap::new() };
        for key in keys {
            let entry = &self.entries[&key];
            let open = self.world.standing(&key.backend).open;
            match (open, entry.machine.is_suspended()) {
                (true, true) => self.input(&key, Input::Resume, now),
                (false, false) => self.input(&key, Input::Suspend, now),
                (true, false) | (false, true) => {}
            }
            let entry = &self.entries[&key];
            if entry.target.check.resets_per_second.is_some() {
                let all = resets.get(&*key.backend).copied().unwrap_or_default();
                self.input(&key, Input::Resets(all.saturating_sub(entry.own_resets)), now);
            }
        }
    }

    /// Takes a probe's result.
    fn ended(&mut self, ended: Ended) {
        let Ended { key, generation, finding, took } = ended;
        let Some(entry) = self.entries.get_mut(&key) else { return };
        let standing = self.world.standing(&key.backend);
        if !standing.open {
            return self.input(&key, Input::Suspend, now());
        }
        if standing.generation != generation {
            return self.input(&key, Input::NotProbed, now());
        }
        if finding == Finding::Unwell(Ailment::Refused)
            && !matches!(entry.target.check.probe, Some(Probe::Udp { .. }))
        {
            entry.own_resets += 1;
        }
        let input = self.write_down(&key, finding, took);
        self.input(&key, input, now());
    }

    fn write_down(&self, key: &Key, finding: Finding, took: Duration) -> Input {
        let mut views = self.board.views();
        let Some(view) = views.get_mut(key) else { return Input::NotProbed };
        match finding {
            Finding::Well => {
                view.probes += 1;
                view.answered(took);
                Input::Success
            }
            Finding::Unwell(ailment) => {
                view.probes += 1;
                view.failed(ailment.to_string());
                Input::Failure
            }
            Finding::Unknown(why) => {
                tracing::warn!(backend = %key.backend, service = %key.service, why, "a health check cannot be made");
                view.error(format!("the check cannot be made: {why}"));
                Input::NotProbed
            }
        }
    }

    /// Lets a machine decide and does what it says.
    fn input(&mut self, key: &Key, input: Input, now: Instant) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        if let Some(at) = entry.machine.next_probe() {
            self.due.remove(&(at, key.clone()));
        }
        let failures = entry.machine.failures();
        let Commands { probe, turned } = entry.machine.on(input, now);
        let (verdict, suspended) = (entry.machine.verdict(), entry.machine.is_suspended());
        if let Some(view) = self.board.views().get_mut(key) {
            if matches!(input, Input::Resets(_)) && entry.machine.failures() > failures {
                view.failed("too many resets".to_owned());
            }
            view.turn(verdict);
            view.suspended = suspended;
        }
        if probe {
            self.probe(key);
        }
        self.queue(key);
        if turned.is_some() {
            self.tell(&key.backend);
        }
    }

    fn probe(&mut self, key: &Key) {
        let generation = self.world.standing(&key.backend).generation;
        let probe = self.world.probe(&self.entries[key].target);
        let key = key.clone();
        self.running.spawn(async move {
            let start = tokio::time::Instant::now();
            let finding = probe.await;
            Ended { key, generation, finding, took: start.elapsed() }
        });
    }

    /// Reports a backend where all its checks together say something else than before.
    fn tell(&mut self, backend: &Arc<str>) {
        let from = Key { backend: backend.clone(), service: "".into() };
        let own = || self.entries.range(from.clone()..).take_while(|(key, _)| key.backend == *backend);
        let sick = own().find(|(_, entry)| !entry.machine.verdict().is_up());
        match sick {
            Some((key, _)) => {
                if self.down.insert(backend.clone()) {
                    let error = self.board.views().get(key).and_then(|view| view.last_error.clone());
                    let why = error.unwrap_or_default();
                    tracing::warn!(%backend, service = %key.service, why, "backend is down");
                    self.world.turned(backend, false);
                }
            }
            None => {
                if self.down.remove(backend) {
                    tracing::info!(%backend, "backend is up");
                    self.world.turned(backend, true);
                }
            }
        }
    }
}

/// The runtime's clock, which tests may stop.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

fn pace(check: &Check) -> Pace {
    let window = check.interval.max(SHORTEST_WINDOW);
    Pace {
        interval: check.interval,
        rise: check.rise,
        fall: check.fall,
        probes: check.probe.is_some(),
        resets: check
            .resets_per_second
            .map(|rate| ResetLimit { most: (f64::from(rate) * window.as_secs_f64()) as u64, window }),
    }
}

/// Another one for each check and each start: restarted daemons do not probe in step.
fn seed(key: &Key) -> u64 {
    use std::hash::BuildHasher as _;
    std::hash::RandomState::new().hash_one(key)
}

#[cfg(test)]
#[path = "scheduler_tests.rs"]
mod tests;
