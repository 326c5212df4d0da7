//! When each phase of a migration began and ended. Book-keeping only; nothing is decided by it.

use std::time::Duration;

use super::PhaseTime;

/// The phases of a migration that goes well, in order. One that does not ends with `rollback`.
pub const PHASES: [&str; 10] =
    ["prepare", "hold_new", "hold", "drain", "freeze", "transfer", "restore", "flip", "confirm", "release"];

/// The phases so far, in order, without gaps.
#[derive(Clone, Debug, Default)]
pub struct Phases {
    list: Vec<PhaseTime>,
    /// The last one has no end yet.
    open: bool,
}

impl Phases {
    /// Their times; the end of an open one is not known yet.
    pub fn list(&self) -> &[PhaseTime] {
        &self.list
    }

    /// True while the last one has no end.
    pub fn last_is_open(&self) -> bool {
        self.open
    }

    /// Ends the open phase and begins the next; phases whose report was overtaken get no length.
    pub(super) fn enter(&mut self, name: &'static str, now: Duration) {
        self.close(now);
        if let (Some(last), Some(next)) = (self.last_place(), place(name)) {
            for skipped in &PHASES[last + 1..next.max(last + 1)] {
                self.list.push(PhaseTime::new(skipped, now, now));
            }
        }
        self.list.push(PhaseTime::new(name, now, now));
        self.open = true;
    }

    /// Likewise, unless reports overtook each other and a later one has begun already.
    pub(super) fn enter_later(&mut self, name: &'static str, now: Duration) {
        if place(name) > self.last_place() {
            self.enter(name, now);
        }
    }

    /// Ends the open phase.
    pub(super) fn close(&mut self, now: Duration) {
        if let (true, Some(last)) = (self.open, self.list.last_mut()) {
            last.end_ms = now.as_secs_f64() * 1e3;
        }
        self.open = false;
    }

    fn last_place(&self) -> Option<usize> {
        self.list.last().and_then(|phase| place(phase.name))
    }
}

fn place(name: &str) -> Option<usize> {
    PHASES.iter().position(|phase| *phase == name)
}
