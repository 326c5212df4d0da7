//! What is true in a simulation, whatever the programs believe: the copies of the server at both sites, what clients
//! hear, and the rules that may never be broken.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use lb_core::Gate;
use migrate::workload::holder::HolderPid;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::random::Random;
use crate::datapath::{BackendNumber, Datapath as _};
use crate::memory::MemoryDatapath;

/// Above every pid that a kernel gives, so that what still looks into `/proc` finds nothing.
const FIRST_PID: i32 = 10_000_000;
/// The one backend.
pub(super) const BACKEND: &str = "chat-1";
/// The sites, as the load balancer numbers them.
pub(super) const SITES: [&str; 2] = ["ams", "fra"];

/// A rule that is broken, to see the simulation find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Broken {
    Nothing,
    /// A source is not stopped before its images leave.
    Fence,
    /// The mark of having left is lost when the agent dies.
    Mark,
    /// A restored copy can be heard before it may run.
    Muting,
    /// A copy that is not confirmed goes on when its agent dies.
    Lease,
}

/// Who outlives an agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keep {
    Dies,
    Stops,
    Stays,
}

/// What there is in one holder.
pub(super) struct Copy {
    pub(super) holder: HolderPid,
    pub(super) keep: Keep,
    /// There are tasks.
    pub(super) has_tasks: bool,
    /// The state that they keep in memory: how often a client was answered.
    pub(super) version: u64,
    /// By a signal.
    pub(super) stopped: bool,
    /// By CRIU.
    pub(super) frozen: bool,
    /// Its connections say nothing.
    pub(super) in_repair: bool,
    /// It got away from a CRIU that was killed before the copy might run.
    pub(super) escaped: bool,
    pub(super) over: watch::Sender<bool>,
}

impl Copy {
    pub(super) fn runs(&self) -> bool {
        self.has_tasks && !self.stopped && !self.frozen
    }

    fn end_tasks(&mut self) {
        self.has_tasks = false;
        self.over.send_replace(true);
    }
}

/// A CRIU that can be killed.
#[derive(Default)]
pub(super) struct Life {
    pub(super) killed: Mutex<bool>,
    pub(super) kill: Notify,
}

/// One site's host.
#[derive(Default)]
pub(super) struct Place {
    pub(super) copies: BTreeMap<i32, Copy>,
    pub(super) crius: Vec<Arc<Life>>,
    /// Nothing is heard from the address, until then if there is an end.
    quiet: Option<Option<Instant>>,
}

impl Place {
    pub(super) fn is_quiet(&self) -> bool {
        self.quiet.is_some_and(|until| until.is_none_or(|until| Instant::now() < until))
    }
}

pub(super) struct Inner {
    pub(super) random: Random,
    pub(super) places: [Place; 2],
    /// One in so many of what may fail fails; never, for 0.
    pub(super) failing: u64,
    next_pid: i32,
    /// The newest state that a client knows of.
    served: u64,
    datapath: Option<Arc<MemoryDatapath>>,
    steps: u64,
    /// Steps at which something is to break.
    breaking: BTreeSet<u64>,
    /// Where the gate led last.
    location: usize,
    /// Whether a flip may be answered with something aimed at it.
    aiming: bool,
    /// The target of a flip, of which that is due.
    aim: Option<usize>,
    trace: Option<Vec<String>>,
    violation: Option<String>,
    pub(super) faults: BTreeMap<&'static str, u64>,
}

/// The world of one seed.
pub(super) struct World {
    inner: Mutex<Inner>,
    pub(super) broken: Broken,
    /// For what is written to disks.
    pub(super) folder: PathBuf,
    /// A step at which something is to break has come.
    pub(super) due: Notify,
    began: Instant,
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("World")
    }
}

impl World {
    pub(super) fn new(seed: u64, broken: Broken, folder: PathBuf, traced: bool) -> Arc<Self> {
        let inner = Inner {
            random: Random::new(seed),
            places: Default::default(),
            failing: 0,
            next_pid: FIRST_PID,
            served: 0,
            datapath: None,
            steps: 0,
            breaking: BTreeSet::new(),
            location: 0,
            aiming: true,
            aim: None,
            trace: traced.then(Vec::new),
            violation: None,
            faults: BTreeMap::new(),
        };
        let (inner, due) = (Mutex::new(inner), Notify::new());
        Arc::new(Self { inner, broken, folder, due, began: Instant::now() })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    /// A random number below a bound.
    pub(super) fn below(&self, bound: u64) -> u64 {
        self.lock().random.below(bound)
    }

    /// A random time.
    pub(super) fn between(&self, least_ms: u64, most_ms: u64) -> Duration {
        Duration::from_millis(least_ms + self.below(most_ms - least_ms + 1))
    }

    /// Waits for a random time.
    pub(super) async fn pause(&self, least_ms: u64, most_ms: u64) {
        tokio::time::sleep(self.between(least_ms, most_ms)).await;
    }

    /// Whether what may fail fails now.
    pub(super) fn fails(&self, what: &'static str) -> bool {
        let mut inner = self.lock();
        let failing = inner.failing;
        let fails = failing > 0 && inner.random.one_in(failing);
        drop(inner);
        if fails {
            self.fault(what, format_args!("{what}"));
        }
        fails
    }

    /// Something was broken.
    pub(super) fn fault(&self, kind: &'static str, detail: std::fmt::Arguments<'_>) {
        *self.lock().faults.entry(kind).or_default() += 1;
        self.note(format_args!("FAULT {detail}"));
    }

    /// A line of the trace.
    pub(super) fn note(&self, text: std::fmt::Arguments<'_>) {
        let at = self.began.elapsed();
        if let Some(trace) = &mut self.lock().trace {
            trace.push(format!("{:10.3} {text}", at.as_secs_f64()));
        }
    }

    pub(super) fn take_trace(&self) -> Vec<String> {
        self.lock().trace.take().unwrap_or_default()
    }

    /// A rule was broken; the first one counts.
    pub(super) fn violate(&self, rule: std::fmt::Arguments<'_>) {
        self.note(format_args!("VIOLATION {rule}"));
        self.lock().violation.get_or_insert_with(|| rule.to_string());
    }

    pub(super) fn violation(&self) -> Option<String> {
        self.lock().violation.clone()
    }

    pub(super) fn set_datapath(&self, datapath: Arc<MemoryDatapath>) {
        self.lock().datapath = Some(datapath);
    }

    /// Nothing breaks any more.
    pub(super) fn calm(&self) {
        let mut inner = self.lock();
        inner.failing = 0;
        inner.aiming = false;
        inner.breaking.clear();
    }

    /// Something breaks so many steps from now.
    pub(super) fn break_in(&self, steps: u64) {
        let mut inner = self.lock();
        let at = inner.steps + 1 + steps;
        inner.breaking.insert(at);
    }

    /// Something has happened somewhere: time to break something, and to look at the rules.
    pub(super) fn step(&self) {
        let due = {
            let mut inner = self.lock();
            inner.steps += 1;
            let now = inner.steps;
            inner.breaking.remove(&now)
        };
        if due {
            self.due.notify_one();
        }
        self.look();
    }

    /// Where the gate leads, and whether it is open.
    pub(super) fn gate(&self) -> Option<(usize, bool)> {
        let datapath = self.lock().datapath.clone()?;
        let state = datapath.state(BackendNumber(0));
        let location = state.sites[state.word.slot() as usize].0 as usize;
        Some((location, matches!(state.word.gate(), Gate::Forward | Gate::HoldNew | Gate::Replay)))
    }

    /// Whether there is any copy at a site.
    pub(super) fn has_copy(&self, site: usize) -> bool {
        self.lock().places[site].copies.values().any(|copy| copy.has_tasks)
    }

    /// Whether a copy runs at a site.
    pub(super) fn runs_at(&self, site: usize) -> bool {
        self.lock().places[site].copies.values().any(|copy| copy.runs() && !copy.escaped)
    }

    /// An operator has decided for an older state.
    pub(super) fn give_up_newest(&self) {
        self.lock().served = 0;
    }

    /// The target of a flip at which something is to be aimed.
    pub(super) fn take_aim(&self) -> Option<usize> {
        self.lock().aim.take()
    }

    /// Clients ask whoever they reach, and the rules are looked at.
    pub(super) fn look(&self) {
        let gate = self.gate();
        let mut broken = None;
        let mut inner = self.lock();
        if let Some((location, _)) = gate
            && location != inner.location
        {
            inner.location = location;
            if inner.aiming && inner.random.one_in(8) {
                inner.aim = Some(location);
                self.due.notify_one();
            }
        }
        let Inner { places, served, .. } = &mut *inner;
        let live = |place: &Place| place.copies.values().filter(|copy| copy.runs() && !copy.escaped).count();
        if places.iter().map(live).sum::<usize>() > 1 {
            broken = Some("two copies run".to_owned());
        }
        for (place, name) in places.iter().zip(SITES) {
            if place.copies.values().any(|copy| copy.escaped && copy.runs()) && !place.is_quiet() {
                broken = Some(format!("a copy at {name} can be heard before it may run"));
            }
        }
        if let Some((location, true)) = gate {
            let place = &mut places[location];
            let heard = !place.is_quiet();
            for copy in place.copies.values_mut().filter(|copy| heard && copy.runs() && !copy.in_repair) {
                if copy.version < *served {
                    broken = Some(format!(
                        "a copy at {} answers with state {} after a client has seen {served}",
                        SITES[location], copy.version
                    ));
                }
                copy.version += 1;
                *served = copy.version;
            }
        }
        drop(inner);
        if let Some(rule) = broken {
            self.violate(format_args!("{rule}"));
        }
    }

    /// Makes a holder, with a workload that is new or without one.
    pub(super) fn make(&self, site: usize, has_tasks: bool) -> HolderPid {
        let mut inner = self.lock();
        let pid = inner.next_pid;
        // The next one is its root's.
        inner.next_pid += 2;
        let holder = HolderPid { pid, start_ticks: u64::from(pid.unsigned_abs()) };
        let copy = Copy {
            holder,
            keep: Keep::Dies,
            has_tasks,
            version: 0,
            stopped: false,
            frozen: false,
            in_repair: false,
            escaped: false,
            over: watch::Sender::new(!has_tasks),
        };
        inner.places[site].copies.insert(pid, copy);
        drop(inner);
        self.note(format_args!("{}: holder {pid} is made, tasks: {has_tasks}", SITES[site]));
        self.step();
        holder
    }

    /// Looks at or changes what is in a holder; `None` if it is gone.
    pub(super) fn with<T>(
        &self,
        site: usize,
        holder: HolderPid,
        act: impl FnOnce(&mut Copy) -> T,
    ) -> Option<T> {
        self.lock().places[site].copies.get_mut(&holder.pid).map(act)
    }

    /// Likewise, as something that happens.
    pub(super) fn change(&self, site: usize, holder: HolderPid, what: &str, act: impl FnOnce(&mut Copy)) {
        if self.with(site, holder, act).is_some() {
            self.note(format_args!("{}: {what} ({})", SITES[site], holder.pid));
            self.step();
        }
    }

    /// The tasks of a holder die: their kernel ends their connections.
    pub(super) fn end_tasks(&self, site: usize, holder: HolderPid, what: &str) {
        let gate = self.gate();
        let mut inner = self.lock();
        let place = &mut inner.places[site];
        let quiet = place.is_quiet();
        let Some(copy) = place.copies.get_mut(&holder.pid).filter(|copy| copy.has_tasks) else { return };
        let is_heard = !quiet && !copy.in_repair && gate == Some((site, true));
        copy.end_tasks();
        drop(inner);
        self.note(format_args!("{}: {what} ({})", SITES[site], holder.pid));
        if is_heard {
            self.violate(format_args!("clients hear the end of their connections from {}", SITES[site]));
        }
        self.step();
    }

    /// A holder goes, with all that is in it.
    pub(super) fn remove(&self, site: usize, holder: HolderPid, what: &str) {
        self.end_tasks(site, holder, what);
        self.lock().places[site].copies.remove(&holder.pid);
        self.step();
    }

    /// Nothing is heard from a site's address any more, or (`None`) all again.
    pub(super) fn set_quiet(&self, site: usize, quiet: Option<Option<Duration>>) {
        let until = quiet.map(|limit| limit.map(|limit| Instant::now() + limit));
        self.lock().places[site].quiet = until;
        self.note(format_args!("{}: silence {quiet:?}", SITES[site]));
        self.step();
    }

    /// Kills all CRIUs of a site; how many.
    pub(super) fn kill_criu(&self, site: usize) -> usize {
        let mut crius = std::mem::take(&mut self.lock().places[site].crius);
        // Of those that are over there is only this one.
        crius.retain(|life| Arc::strong_count(life) > 1);
        for life in &crius {
            *life.killed.lock().unwrap() = true;
            life.kill.notify_one();
        }
        crius.len()
    }

    /// What is wrong now that nothing happens any more.
    pub(super) fn remains(&self) -> Option<String> {
        let Some((location, is_open)) = self.gate() else { return Some("there is no gate".to_owned()) };
        let inner = self.lock();
        if !is_open {
            return Some("the gate is not open".to_owned());
        }
        let count: usize = inner.places.iter().map(|place| place.copies.len()).sum();
        if count != 1 {
            return Some(format!("there are {count} copies"));
        }
        let place = &inner.places[location];
        let Some(copy) = place.copies.values().next() else {
            return Some("the gate does not lead to the copy".to_owned());
        };
        if !copy.runs() || copy.in_repair || copy.keep != Keep::Stays || place.is_quiet() {
            return Some(format!(
                "the copy is not well: tasks {}, stopped {}, frozen {}, in repair {}, {:?}, quiet {}",
                copy.has_tasks,
                copy.stopped,
                copy.frozen,
                copy.in_repair,
                copy.keep,
                place.is_quiet()
            ));
        }
        (copy.version != inner.served).then(|| "the newest state is lost".to_owned())
    }
}
