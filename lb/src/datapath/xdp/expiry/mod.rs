//! Ends flows that are over: nothing else removes an established flow.
//!
//! A thread of low priority looks at every entry of the flow tables in turn, a bounded number a second. `verdict`
//! decides, `walk` reads and deletes. A flow that seems to be over is read again before it goes, and its entry towards
//! the client goes last: that one reserves the flow's port, which is free when nothing uses it any more.
//!
//! Not here: newcomers' places, which the kernel gives to newer ones by itself; their ends are only cleaner this way.

pub mod verdict;
mod walk;

use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use self::verdict::Limits;
use self::walk::{Pace, Walker};
use super::flows::FlowMaps;
use super::priority;
use super::ticks::TickClock;
use crate::config::FlowTimes;
use crate::datapath::observe::FlowTables;

/// Entries looked at in a second, on average: a million flows (two entries each) take 20 s, and one per cent or two
/// of a processor.
const ENTRIES_PER_SECOND: f64 = 100_000.0;
/// Time from the beginning of one pass to that of the next, at least.
const PASS_EVERY: Duration = Duration::from_millis(500);
/// After a pass that failed.
const FAILURE_PAUSE: Duration = Duration::from_secs(5);

/// Handle on the thread.
pub struct Expiry {
    times: Arc<Mutex<FlowTimes>>,
    report: Arc<Mutex<FlowTables>>,
    stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Expiry {
    /// Starts the thread.
    pub fn start(maps: Arc<FlowMaps>, clock: Arc<TickClock>, times: FlowTimes) -> io::Result<Self> {
        let times = Arc::new(Mutex::new(times));
        let report = Arc::new(Mutex::new(FlowTables::default()));
        let stopping = Arc::new(AtomicBool::new(false));
        let worker = Worker {
            walker: Walker::new(maps, clock.clone()),
            clock,
            times: times.clone(),
            report: report.clone(),
            pace: Pace::new(ENTRIES_PER_SECOND, stopping.clone()),
            stopping: stopping.clone(),
        };
        let thread = thread::Builder::new().name("expiry".into()).spawn(move || worker.run())?;
        Ok(Self { times, report, stopping, thread: Some(thread) })
    }

    /// Changes how long flows may be idle, from the next pass on.
    pub fn set_times(&self, times: FlowTimes) {
        *self.times.lock().unwrap_or_else(PoisonError::into_inner) = times;
    }

    /// What the last whole pass found.
    pub fn report(&self) -> FlowTables {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Expiry {
    fn drop(&mut self) {
        self.stopping.store(true, Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

struct Worker {
    walker: Walker,
    clock: Arc<TickClock>,
    times: Arc<Mutex<FlowTimes>>,
    report: Arc<Mutex<FlowTables>>,
    pace: Pace,
    stopping: Arc<AtomicBool>,
}

impl Worker {
    fn run(mut self) {
        priority::behind_others();
        while !self.stopping.load(Acquire) {
            let begun = Instant::now();
            let times = *self.times.lock().unwrap_or_else(PoisonError::into_inner);
            let limits = Limits::new(&times, self.clock.tick());
            let pause = match self.walker.pass(&limits, &self.pace) {
                Ok(true) => {
                    let report = self.walker.report(begun.elapsed());
                    *self.report.lock().unwrap_or_else(PoisonError::into_inner) = report;
                    PASS_EVERY.saturating_sub(begun.elapsed())
                }
                Ok(false) => return,
                Err(error) => {
                    tracing::error!(%error, "the flow tables cannot be walked; flows that are over stay");
                    FAILURE_PAUSE
                }
            };
            self.pace.pause(pause);
        }
    }
}
