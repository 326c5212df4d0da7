//! The hold's thread: takes captured frames from the ring into the queues and sends them at replay.
//!
//! One thread for all backends. It sleeps while every gate is open, and while one is closed it polls the ring
//! (waking it for each packet would cost more than the copy). Nothing tells it what to do: the gate words
//! that the kernel program reads are what it reads too. Not even a flip wakes it: that would be a system call, and
//! on a busy machine a turn of this thread, before the one who flips goes on.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use aya::maps::{MapData, RingBuf};
use lb_core::record::CaptureHead;
use lb_core::{Gate, GateWord, Mode};
use nix::sys::prctl::set_timerslack;
use tokio::sync::mpsc::UnboundedSender;

use super::records::from_bytes;
use super::sender::{BATCH, LONG_BATCH, Sender};
use super::shared::SharedTables;
use crate::datapath::merged::wire_frames;
use crate::datapath::queues::HoldQueues;
use crate::datapath::{BackendNumber, Event, HoldLimits, HoldStats};

/// How often the ring is looked at while a gate is closed: a twentieth of a millisecond is little beside a
/// freeze, and the ring has room for 30 ms at the fastest rate measured.
const POLL: Duration = Duration::from_micros(50);

/// Captured must equal settled for this long before the gate may open: longer than a packet can be inside the
/// kernel program between reading the gate and counting its capture.
const QUIET: Duration = Duration::from_micros(200);

/// How long a session lives on after the gate opened, for frames captured at the last moment.
const LINGER: Duration = Duration::from_millis(20);

/// Captured frames that never came out of the ring (a former daemon had taken them) are given up after this.
const LOST: Duration = Duration::from_millis(2);

/// Frames taken from the ring before the queues are looked after again.
const TAKE: usize = 4096;

type Sessions = Arc<Mutex<HashMap<BackendNumber, Session>>>;

/// Handle on the thread.
pub struct Pump {
    sessions: Sessions,
    stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    waker: Thread,
}

impl Pump {
    /// Starts the thread.
    pub fn start(
        ring: RingBuf<MapData>,
        tables: Arc<SharedTables>,
        events: UnboundedSender<Event>,
    ) -> std::io::Result<Self> {
        let sessions = Arc::new(Mutex::new(HashMap::new()));
        let stopping = Arc::new(AtomicBool::new(false));
        let worker = Worker {
            ring,
            tables,
            events,
            sessions: sessions.clone(),
            senders: HashMap::new(),
            stopping: stopping.clone(),
        };
        let thread = thread::Builder::new().name("hold".into()).spawn(move || worker.run())?;
        let waker = thread.thread().clone();
        Ok(Self { sessions, stopping, thread: Some(thread), waker })
    }

    /// Makes a queue ready for a backend whose gate is about to close (or was found closed).
    pub fn begin(&self, backend: BackendNumber, limits: HoldLimits, refused: u64) {
        lock(&self.sessions).insert(backend, Session::new(limits, refused));
        self.waker.unpark();
    }

    /// What the backend's current or last hold has kept and lost; `refused` is the kernel's count.
    pub fn stats(&self, backend: BackendNumber, refused: u64) -> HoldStats {
        lock(&self.sessions).get(&backend).map_or_else(HoldStats::default, |session| session.stats(refused))
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.stopping.store(true, Release);
        self.waker.unpark();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One hold of one backend, from before its gate closes until shortly after it opened again.
struct Session {
    queue: HoldQueues,
    /// The kernel's count of packets not captured, when the hold began.
    refused_before: u64,
    replayed: u64,
    /// Sent or given up; not yet added to the table's counter.
    unsettled: u64,
    lost: u64,
    stage: Stage,
}

enum Stage {
    /// The gate is about to close.
    Armed { since: Instant },
    /// The gate is closed.
    Holding,
    Replaying {
        since: Instant,
        first_sent: bool,
        /// Since when nothing was left to send and the counters did not move.
        quiet_since: Option<Quiet>,
        reported: bool,
    },
    /// The gate is open again.
    Over { since: Instant },
    /// Kept for its statistics only.
    Past,
}

#[derive(Clone, Copy)]
struct Quiet {
    captured: u64,
    since: Instant,
}

impl Session {
    fn new(limits: HoldLimits, refused_before: u64) -> Self {
        Self {
            queue: HoldQueues::new(limits),
            refused_before,
            replayed: 0,
            unsettled: 0,
            lost: 0,
            stage: Stage::Armed { since: Instant::now() },
        }
    }

    fn stats(&self, refused: u64) -> HoldStats {
        let counts = self.queue.counts();
        HoldStats {
            held_packets: counts.held_packets,
            held_bytes: counts.held_bytes,
            replayed_packets: self.replayed,
            dropped_packets: counts.overflow + counts.aged + self.lost + (refused - self.refused_before),
        }
    }

    fn is_past(&self) -> bool {
        matches!(self.stage, Stage::Past)
    }
}

struct Worker {
    ring: RingBuf<MapData>,
    tables: Arc<SharedTables>,
    events: UnboundedSender<Event>,
    sessions: Sessions,
    senders: HashMap<u32, Sender>,
    stopping: Arc<AtomicBool>,
}

impl Worker {
    fn run(mut self) {
        // The default slack of 50 us would double the poll's period.
        let _ = set_timerslack(1);
        // How many frames waited when the processor was last given up in a replay.
        let mut yielded_at = usize::MAX;
        while !self.stopping.load(Acquire) {
            let sessions = self.sessions.clone();
            let mut sessions = lock(&sessions);
            let idle = sessions.values().all(Session::is_past);
            let taken = if idle { 0 } else { self.take(&mut sessions) };
            let mut sent = 0;
            for (backend, session) in sessions.iter_mut() {
                sent += self.serve(*backend, session);
            }
            let waiting: usize = sessions.values().map(|session| session.queue.len()).sum();
            drop(sessions);
            if idle {
                thread::park();
            } else if sent > 0 {
                // A replay must not keep the restored server from its processor; yet on a busy machine each time
                // may cost milliseconds, so that it has to have come a good part further since the last one.
                if waiting < yielded_at / 4 * 3 {
                    yielded_at = waiting;
                    thread::yield_now();
                }
            } else {
                yielded_at = usize::MAX;
                if taken == 0 {
                    thread::park_timeout(POLL);
                }
            }
        }
    }

    /// Takes frames out of the ring into their queues.
    fn take(&mut self, sessions: &mut HashMap<BackendNumber, Session>) -> usize {
        let now = Instant::now();
        let mut taken = 0;
        while taken < TAKE {
            let Some(item) = self.ring.next() else { break };
            taken += 1;
            let Some(Captured { backend, mode, segment, frame }) = captured(&item) else { continue };
            match sessions.get_mut(&backend) {
                Some(session) if !session.is_past() => {
                    let frames = wire_frames(frame, segment);
                    // Each is sent and settled by itself, so each has to count as captured.
                    let more = frames.count() as u64 - 1;
                    if more > 0 {
                        self.tables.capture(backend, more);
                    }
                    for frame in frames.iter() {
                        let before = session.queue.len() as u64;
                        session.queue.push(now, frame, mode);
                        // What did not make the queue longer was dropped: the frame itself or older ones.
                        session.unsettled += before + 1 - session.queue.len() as u64;
                    }
                }
                // Captured for a hold that nobody remembers.
                _ => self.tables.settle(backend, 1),
            }
        }
        taken
    }

    /// Looks at the backend's gate and does what it asks for; how many frames were sent.
    fn serve(&mut self, backend: BackendNumber, session: &mut Session) -> usize {
        if session.is_past() {
            return 0;
        }
        let now = Instant::now();
        let before = session.queue.len() as u64;
        session.queue.expire(now);
        session.unsettled += before - session.queue.len() as u64;
        let word = self.tables.word(backend);
        let sent = match word.gate() {
            Gate::HoldNew | Gate::Hold | Gate::Drop => {
                session.stage = Stage::Holding;
                0
            }
            Gate::Replay => self.replay(backend, session, word, now),
            Gate::Forward => self.finish(backend, session, word, now),
        };
        if session.unsettled > 0 {
            self.tables.settle(backend, session.unsettled);
            session.unsettled = 0;
        }
        sent
    }

    fn replay(
        &mut self,
        backend: BackendNumber,
        session: &mut Session,
        word: GateWord,
        now: Instant,
    ) -> usize {
        let Stage::Replaying { since, first_sent, .. } = session.stage else {
            let since = self.tables.stored_at(backend).unwrap_or(now);
            session.stage = Stage::Replaying { since, first_sent: false, quiet_since: None, reported: false };
            return self.replay(backend, session, word, now);
        };
        // One frame alone first: the sooner it leaves, the sooner somebody is served.
        let most = if first_sent { batch(session.queue.len()) } else { 1 };
        let sent = self.send(backend, session, word, most);
        if sent > 0 && !first_sent {
            let _ = self.events.send(Event::ReplayStarted { backend, after: since.elapsed() });
        }
        let Stage::Replaying { first_sent, quiet_since, reported, .. } = &mut session.stage else {
            return sent;
        };
        *first_sent |= sent > 0;
        if !session.queue.is_empty() || sent > 0 {
            *quiet_since = None;
            return sent;
        }
        let (captured, settled) = self.tables.hold_counts(backend);
        let quiet = match *quiet_since {
            Some(quiet) if quiet.captured == captured => quiet,
            _ => *quiet_since.insert(Quiet { captured, since: now }),
        };
        let quiet_for = now - quiet.since;
        if captured == settled + session.unsettled {
            if quiet_for >= QUIET && !*reported {
                *reported = true;
                let stats = session.stats(self.tables.refused(backend));
                let _ = self.events.send(Event::Replayed { backend, stats });
            }
        } else if quiet_for >= LOST {
            // Nothing is in the ring and nothing is queued, so nobody has these frames any more.
            let lost = captured - settled - session.unsettled;
            session.lost += lost;
            session.unsettled += lost;
        }
        sent
    }

    /// The gate is open: sends what was captured at the last moment, then lets the session rest.
    fn finish(
        &mut self,
        backend: BackendNumber,
        session: &mut Session,
        word: GateWord,
        now: Instant,
    ) -> usize {
        match session.stage {
            // The store follows at once; if it does not, there was no hold after all.
            Stage::Armed { since } if now - since < LINGER => 0,
            Stage::Over { since } if now - since > LINGER && session.queue.is_empty() => {
                session.stage = Stage::Past;
                0
            }
            Stage::Over { .. } => self.send(backend, session, word, BATCH),
            _ => {
                session.stage = Stage::Over { since: now };
                self.send(backend, session, word, BATCH)
            }
        }
    }

    /// Sends the queue's first frames to the backend's location; how many went.
    fn send(&mut self, backend: BackendNumber, session: &mut Session, word: GateWord, most: usize) -> usize {
        if session.queue.is_empty() {
            return 0;
        }
        let Some(location) = self.tables.location(backend, word.slot()) else { return 0 };
        let Some(sender) = self.sender(location.link.interface) else { return 0 };
        // What has no way there (no tunnel any more) becomes an empty frame, which the kernel refuses: lost, and counted.
        let frames = session.queue.first(most).map(|held| held.addressed(&location).unwrap_or_default());
        let sent = match sender.send(frames) {
            Ok(sent) => sent,
            Err(error) if passes_by_itself(&error) => 0,
            Err(error) => {
                tracing::warn!(backend = backend.0, %error, "a held packet could not be sent; dropping it");
                session.lost += 1;
                session.queue.sent(1);
                session.unsettled += 1;
                return 0;
            }
        };
        session.queue.sent(sent);
        session.replayed += sent as u64;
        session.unsettled += sent as u64;
        sent
    }

    fn sender(&mut self, interface: u32) -> Option<&Sender> {
        match self.senders.entry(interface) {
            Entry::Occupied(entry) => Some(entry.into_mut()),
            Entry::Vacant(entry) => match Sender::new(interface) {
                Ok(sender) => Some(entry.insert(sender)),
                Err(error) => {
                    tracing::warn!(interface, %error, "cannot open a packet socket for replay");
                    None
                }
            },
        }
    }
}

/// Frames to send at once while so many wait: a small part of them, so that the processor is given up on the way.
fn batch(waiting: usize) -> usize {
    (waiting / 16).clamp(BATCH, LONG_BATCH)
}

/// An item of the capture ring.
struct Captured<'r> {
    backend: BackendNumber,
    mode: Mode,
    segment: usize,
    frame: &'r [u8],
}

fn captured(item: &[u8]) -> Option<Captured<'_>> {
    let (head, rest) = item.split_first_chunk()?;
    let CaptureHead { backend, length, mode, segment } =
        from_bytes::<{ size_of::<CaptureHead>() }, CaptureHead>(head);
    Some(Captured {
        backend: BackendNumber(backend),
        mode: Mode::from_bits(mode),
        segment: segment as usize,
        frame: rest.get(..length as usize)?,
    })
}

fn passes_by_itself(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::EAGAIN | libc::EINTR))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("the hold's thread does not panic with the lock")
}
