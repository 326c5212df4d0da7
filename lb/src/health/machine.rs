//! The health of one backend in one service as a state machine: input and now in, commands out. No I/O, no
//! clock, and chance only from a seed.
//!
//! ```text
//!           success                      `fall` failures in a row
//! Untried ----------> Up { failures } ----------------------------> Down { successes }
//!    |                      ^                                            |   ^
//!    |                      +--------------------------------------------+   |
//!    |                              `rise` successes in a row                |
//!    +-----------------------------------------------------------------------+
//!                                      failure
//! ```
//!
//! A backend that nobody has tried counts as up, so that a start makes no hole in the traffic; its first result
//! decides. A backend that is held or moves is not down: while it is, nothing is probed, and a probe that was
//! under way says nothing.

use std::time::{Duration, Instant};

/// When to probe, and how many results in a row change the verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// From one probe's start to the next one's; each is moved by up to a tenth, so that many do not fall together.
    pub interval: Duration,
    /// Successes in a row that bring a backend back, at least one.
    pub rise: u32,
    /// Failures in a row that take it out, at least one.
    pub fall: u32,
    /// Whether there is a probe at all. Without one, windows of resets decide alone.
    pub probes: bool,
    /// How many resets are too many; `None`: resets say nothing.
    pub resets: Option<ResetLimit>,
}

/// More resets from the backend than these within the window count as a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResetLimit {
    /// Resets that are still all right.
    pub most: u64,
    /// Within this time.
    pub window: Duration,
}

/// What is known of the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing yet; counts as up.
    Untried,
    /// It takes new flows.
    Up {
        /// Failures since the last success.
        failures: u32,
    },
    /// It takes none.
    Down {
        /// Successes since the last failure.
        successes: u32,
    },
}

impl Verdict {
    /// Whether new flows go to the backend.
    pub fn is_up(self) -> bool {
        !matches!(self, Self::Down { .. })
    }
}

/// What the machine is about to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Activity {
    /// The next probe starts then.
    Waiting { until: Instant },
    /// A probe that started then is under way.
    Probing { since: Instant },
    /// The gate is closed or the backend moves.
    Suspended,
    /// There is no probe; resets decide alone.
    Watching,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// Time has passed.
    Tick,
    /// The probe found the backend well.
    Success,
    /// The probe found that the backend does not do its work.
    Failure,
    /// The probe could not be made, for a reason that is not the backend's. Says nothing about it.
    NotProbed,
    /// The gate is closed, or the backend moves.
    Suspend,
    /// The gate is open again and nothing moves.
    Resume,
    /// Resets that the backend has sent so far, without those that answered our own probes.
    Resets(u64),
}

/// What is to be done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Commands {
    /// Start a probe; its result comes back as an input.
    pub probe: bool,
    /// The backend is up (or down) from now on.
    pub turned: Option<bool>,
}

/// One window of counted resets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Window {
    since: Instant,
    /// The count at its start.
    base: u64,
    /// It has counted as a failure already.
    exceeded: bool,
}

/// The health of one backend in one service.
#[derive(Clone, Debug)]
pub struct Machine {
    pace: Pace,
    verdict: Verdict,
    activity: Activity,
    window: Option<Window>,
    /// Failures ever.
    failures: u64,
    chance: u64,
}

impl Machine {
    /// Nothing is known. The first probe comes within the first interval, by the seed's chance.
    pub fn new(pace: Pace, seed: u64, now: Instant) -> Self {
        let mut machine = Self {
            pace,
            verdict: Verdict::Untried,
            activity: Activity::Watching,
            window: None,
            failures: 0,
            chance: seed,
        };
        if pace.probes {
            let until = now + machine.part_of(pace.interval);
            machine.activity = Activity::Waiting { until };
        }
        machine
    }

    /// What is known of the backend.
    pub fn verdict(&self) -> Verdict {
        self.verdict
    }

    /// Failures ever, of probes and of windows.
    pub fn failures(&self) -> u64 {
        self.failures
    }

    /// Whether it is not looked at because its gate is closed or it moves.
    pub fn is_suspended(&self) -> bool {
        self.activity == Activity::Suspended
    }

    /// When [`Input::Tick`] will lead to a probe; `None` while one is under way, or none will come.
    pub fn next_probe(&self) -> Option<Instant> {
        match self.activity {
            Activity::Waiting { until } => Some(until),
            Activity::Probing { .. } | Activity::Suspended | Activity::Watching => None,
        }
    }

    /// Takes another pace, as after a change of the configuration. What is known stays.
    pub fn set_pace(&mut self, pace: Pace, now: Instant) {
        self.pace = pace;
        self.window = None;
        self.activity = match self.activity {
            Activity::Suspended => Activity::Suspended,
            Activity::Probing { since } if pace.probes => Activity::Probing { since },
            _ if pace.probes => Activity::Waiting { until: now + self.part_of(pace.interval) },
            _ => Activity::Watching,
        };
    }

    /// Decides.
    pub fn on(&mut self, input: Input, now: Instant) -> Commands {
        match (input, self.activity) {
            (Input::Tick, Activity::Waiting { until }) if until <= now => self.probe(now),
            (Input::Tick, _) => Commands::default(),

            (Input::Success, Activity::Probing { since }) => {
                self.wait(since, now);
                Commands { probe: false, turned: self.succeeded() }
            }
            (Input::Failure, Activity::Probing { since }) => {
                self.wait(since, now);
                Commands { probe: false, turned: self.failed() }
            }
            (Input::NotProbed, Activity::Probing { since }) => {
                self.wait(since, now);
                Commands::default()
            }
            // Of a probe that a suspension overtook.
            (Input::Success | Input::Failure | Input::NotProbed, _) => Commands::default(),

            (Input::Suspend, _) => {
                self.activity = Activity::Suspended;
                self.window = None;
                self.verdict = match self.verdict {
                    Verdict::Untried => Verdict::Untried,
                    Verdict::Up { .. } => Verdict::Up { failures: 0 },
                    Verdict::Down { .. } => Verdict::Down { successes: 0 },
                };
                Commands::default()
            }
            (Input::Resume, Activity::Suspended) => {
                // A whole interval's grace: a restored server has a backlog to answer.
                self.activity = if self.pace.probes {
                    Activity::Waiting { until: now + self.moved(self.pace.interval) }
                } else {
                    Activity::Watching
                };
                Commands::default()
            }
            (Input::Resume, _) => Commands::default(),

            (Input::Resets(_), Activity::Suspended) => Commands::default(),
            (Input::Resets(total), _) => self.count(total, now),
        }
    }

    fn probe(&mut self, now: Instant) -> Commands {
        self.activity = Activity::Probing { since: now };
        Commands { probe: true, turned: None }
    }

    /// After a probe that started at `since`. One that took longer than the interval is followed at once.
    fn wait(&mut self, since: Instant, now: Instant) {
        let until = since + self.moved(self.pace.interval);
        self.activity = Activity::Waiting { until: until.max(now) };
    }

    fn succeeded(&mut self) -> Option<bool> {
        match self.verdict {
            Verdict::Untried | Verdict::Up { .. } => self.verdict = Verdict::Up { failures: 0 },
            Verdict::Down { successes } if successes + 1 >= self.pace.rise => {
                self.verdict = Verdict::Up { failures: 0 };
                return Some(true);
            }
            Verdict::Down { successes } => self.verdict = Verdict::Down { successes: successes + 1 },
        }
        None
    }

    fn failed(&mut self) -> Option<bool> {
        self.failures += 1;
        match self.verdict {
            Verdict::Up { failures } if failures + 1 < self.pace.fall => {
                self.verdict = Verdict::Up { failures: failures + 1 };
                None
            }
            Verdict::Untried | Verdict::Up { .. } => {
                self.verdict = Verdict::Down { successes: 0 };
                Some(false)
            }
            Verdict::Down { .. } => {
                self.verdict = Verdict::Down { successes: 0 };
                None
            }
        }
    }

    fn count(&mut self, total: u64, now: Instant) -> Commands {
        let Some(limit) = self.pace.resets else { return Commands::default() };
        let Some(window) = self.window else {
            self.window = Some(Window { since: now, base: total, exceeded: false });
            return Commands::default();
        };
        let too_many = total.saturating_sub(window.base) > limit.most;
        let over = now.saturating_duration_since(window.since) >= limit.window;
        if over {
            self.window = Some(Window { since: now, base: total, exceeded: false });
        } else if too_many && !window.exceeded {
            self.window = Some(Window { exceeded: true, ..window });
        }
        if too_many && !window.exceeded {
            let turned = self.failed();
            return match self.activity {
                // The probe will tell; what comes of it need not be waited for.
                Activity::Waiting { .. } => Commands { turned, ..self.probe(now) },
                _ => Commands { probe: false, turned },
            };
        }
        // Nobody else would ever bring it back.
        let quiet = over && !too_many && self.activity == Activity::Watching;
        Commands { probe: false, turned: if quiet { self.succeeded() } else { None } }
    }

    /// A time that is off by up to a tenth, either way.
    fn moved(&mut self, time: Duration) -> Duration {
        time - time / 10 + self.part_of(time / 5)
    }

    /// Any part of a time, by chance.
    fn part_of(&mut self, time: Duration) -> Duration {
        // SplitMix64: a seed is enough, and the same one gives the same times.
        self.chance = self.chance.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.chance;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^= bits >> 31;
        time.mul_f64((bits >> 11) as f64 / (1_u64 << 53) as f64)
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
