//! The source's surroundings: CRIU and the silence rules.

use crate::roles::source;

/// CRIU at the source, and what the rules are about to be.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct SourceWorld {
    pub(super) state: Option<source::State>,
    pub(super) criu: Criu,
    pub(super) fenced: bool,
    pub(super) draining: bool,
    pub(super) rules: Vec<bool>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Criu {
    Waiting,
    Dumping,
    Frozen,
    Dumped,
    /// It lets go of tasks that it had not frozen.
    Leaving,
    Undoing,
    Killing,
    Gone,
    Killed,
}

impl SourceWorld {
    pub(super) fn runs(&self) -> bool {
        match self.criu {
            Criu::Waiting | Criu::Dumping | Criu::Leaving => true,
            Criu::Gone => !self.fenced,
            Criu::Frozen | Criu::Dumped | Criu::Undoing | Criu::Killing | Criu::Killed => false,
        }
    }

    /// It runs, and its part is over or has not begun.
    pub(super) fn is_over(&self) -> bool {
        use source::{End, State};
        self.runs() && matches!(self.state, None | Some(State::Ended(End::Resumed { .. })))
    }

    /// What may happen next of its own accord.
    pub(super) fn possible(&self, faults: bool) -> Vec<source::Event> {
        use source::Event;
        let mut events = Vec::new();
        let ended = |failed: bool| Event::CriuEnded {
            at_unix_us: 0,
            failed: failed.then(|| "x".to_owned()),
            in_flight: false,
        };
        if self.draining {
            events.push(Event::Drained);
            events.extend(faults.then(|| Event::DrainFailed("x".to_owned())));
        }
        match self.rules.first() {
            Some(true) => {
                events.push(Event::Silenced);
                events.extend(faults.then(|| Event::SilenceFailed("x".to_owned())));
            }
            Some(false) => events.push(Event::Lifted),
            None => {}
        }
        match self.criu {
            Criu::Dumping => events.push(Event::HookFrozen { at_unix_us: 0 }),
            Criu::Frozen => {
                events.push(Event::HookPostDump { image_bytes: 0 });
                events.extend(faults.then(|| ended(true)));
            }
            Criu::Leaving | Criu::Undoing | Criu::Killing => events.push(ended(false)),
            Criu::Waiting | Criu::Dumped | Criu::Gone | Criu::Killed => {}
        }
        events
    }

    pub(super) fn happened(&mut self, event: &source::Event) {
        use source::Event;
        match event {
            Event::Drained | Event::DrainFailed(_) => self.draining = false,
            Event::Silenced | Event::SilenceFailed(_) | Event::Lifted => drop(self.rules.remove(0)),
            Event::HookFrozen { .. } => self.criu = Criu::Frozen,
            Event::HookPostDump { .. } => self.criu = Criu::Dumped,
            Event::CriuEnded { .. } => {
                self.criu = if self.criu == Criu::Killing { Criu::Killed } else { Criu::Gone };
            }
            _ => {}
        }
    }
}
