//! Clients of the server that moves: a closed loop on every connection. A few, the probes, ask again a millisecond after
//! they asked, and their longest gap between two answers is the stall; the others ask seldom, and all of them notice a
//! byte, a count or a connection that was lost.
//!
//! ```text
//! connect(target, n)   opens the connections, in the network namespace of the calling thread; nobody asks yet
//!   -> Clients::work()     all ask, on a thread
//!   -> Clients::watch()    gaps count from now on
//!   -> Clients::settled()  every connection has been answered since
//!   -> Clients::stalls_ms() the longest gap of each probe
//!   -> Clients::rest()     nobody asks
//! ```

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::prctl::set_timerslack;
use nix::sys::time::TimeSpec;
use socket2::Socket;

use super::exchange::{Answer, Ask, Request};
use crate::clock::monotonic_ns;
use crate::driver::{self, DriverError, Source};
use crate::path::LoadError;
use crate::path::exchange::Partial;
use crate::protocol::Transport;

/// Connections whose gaps are looked at.
const PROBES: usize = 4;
/// How long after its last request a probe asks again, unless it still waits for the answer.
const PROBE_PERIOD_NS: u64 = 1_000_000;
/// Requests a second of all other connections together.
const OTHERS_PER_S: u64 = 500;
/// How long opening a batch of connections may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(20);
/// How long the thread sleeps at most, so that it notices what it is told.
const LONGEST_SLEEP: Duration = Duration::from_millis(5);

/// Why clients could not be run.
#[derive(Debug, thiserror::Error)]
pub enum ClientsError {
    /// Connections.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// System calls of the thread.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Asked for something else than to be counted, the server did not say.
    #[error("{target} does not answer {ask:?}, for which it has {limit:?}: is the server gone?")]
    Silent {
        /// Who was asked.
        target: SocketAddr,
        /// What it was asked.
        ask: Ask,
        /// How long it was waited for.
        limit: Duration,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It said something else.
    #[error("{target} answered {ask:?} with what is no answer to it: another server has this port")]
    Wrong {
        /// Who was asked.
        target: SocketAddr,
        /// What it was asked.
        ask: Ask,
    },
}

/// What went wrong on connections, and what did not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests that were answered as they have to be.
    pub answered: u64,
    /// Requests that were not answered, or answered with another number or count than they have to be.
    pub lost: u64,
    /// Connections that the other end has reset or closed.
    pub resets: u64,
}

/// Connected clients and their thread. Dropping them closes the connections.
pub struct Clients {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    ends: AtomicBool,
}

/// Everything that the thread and its owner have in common.
struct State {
    connections: Vec<Option<Connection>>,
    /// When which connection asks next; nobody is in here who waits for an answer.
    due: BinaryHeap<Reverse<(u64, usize)>>,
    works: bool,
    counts: Counts,
}

struct Connection {
    socket: Socket,
    partial: Partial,
    /// Of the last request that was sent.
    number: u64,
    sent_ns: u64,
    waits: bool,
    answered_ns: u64,
    longest_gap_ns: u64,
}

/// Opens `connections` connections to `target`, in the network namespace of the calling thread. Nobody asks yet.
pub fn connect(target: SocketAddr, connections: u32) -> Result<Clients, ClientsError> {
    let sockets = driver::open(target, Source::Any, connections, Transport::Tcp, CONNECT_LIMIT)?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(LoadError::io("make an epoll"))?;
    for (socket, index) in sockets.iter().zip(0..) {
        epoll
            .add(socket, EpollEvent::new(EpollFlags::EPOLLIN, index))
            .map_err(LoadError::io("watch a connection"))?;
    }
    let connections = sockets.into_iter().map(Connection::new).map(Some).collect();
    let state = State { connections, due: BinaryHeap::new(), works: false, counts: Counts::default() };
    let shared = Arc::new(Shared { state: Mutex::new(state), ends: AtomicBool::new(false) });
    let of_thread = shared.clone();
    let thread = std::thread::Builder::new()
        .name("clients".to_owned())
        .spawn(move || of_thread.run(&epoll))
        .map_err(LoadError::io("start a thread"))?;
    Ok(Clients { shared, thread: Some(thread) })
}

/// Asks the server once, on a connection of its own.
pub fn ask(target: SocketAddr, ask: Ask, limit: Duration) -> Result<Answer, ClientsError> {
    let silent = |source| ClientsError::Silent { target, ask, limit, source };
    let request = Request { ask, number: 1 };
    let talk = || {
        let mut stream = std::net::TcpStream::connect_timeout(&target, limit)?;
        stream.set_read_timeout(Some(limit))?;
        stream.write_all(&request.bytes())?;
        let mut bytes = [0; super::exchange::BYTES];
        stream.read_exact(&mut bytes)?;
        Ok(bytes)
    };
    let answer = Answer::read(&talk().map_err(silent)?);
    answer.filter(|answer| answer.to == request).ok_or(ClientsError::Wrong { target, ask })
}

impl Clients {
    /// From now on all ask.
    pub fn work(&self) {
        self.shared.lock().work(monotonic_ns());
    }

    /// Nobody asks any more.
    pub fn rest(&self) {
        let mut state = self.shared.lock();
        state.works = false;
        state.due.clear();
    }

    /// Gaps count from each connection's last answer on.
    pub fn watch(&self) {
        self.shared.lock().watch();
    }

    /// Whether nobody waits for an answer to what was asked before `since` ([`monotonic_ns`]), and every probe has been
    /// answered since then.
    pub fn settled(&self, since_ns: u64) -> bool {
        self.shared.lock().settled(since_ns)
    }

    /// Whether nobody waits for an answer.
    pub fn is_quiet(&self) -> bool {
        self.shared.lock().connections.iter().flatten().all(|connection| !connection.waits)
    }

    /// The longest gap of each probe since [`Clients::watch`], in milliseconds; of a probe that waits, up to now.
    pub fn stalls_ms(&self) -> Vec<f64> {
        self.shared.lock().stalls_ms(monotonic_ns())
    }

    /// What came of all requests so far. One that still waits is not lost yet.
    pub fn counts(&self) -> Counts {
        self.shared.lock().counts
    }

    /// The same at the end: what still waits is lost.
    pub fn finish(self) -> Counts {
        let state = self.shared.lock();
        let waiting = state.connections.iter().flatten().filter(|connection| connection.waits).count();
        Counts { lost: state.counts.lost + waiting as u64, ..state.counts }
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed; a drop has nobody to tell.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn run(&self, epoll: &Epoll) {
        // By default the kernel adds up to 50 us to each sleep. Best effort.
        let _ = set_timerslack(1);
        driver::ahead_of_others();
        let mut events = vec![EpollEvent::empty(); 256];
        while !self.ends.load(Ordering::Acquire) {
            let next = {
                let mut state = self.lock();
                // Errors other than an interruption have been excluded by making the epoll.
                let count = epoll.wait(&mut events, EpollTimeout::ZERO).unwrap_or(0);
                for event in &events[..count] {
                    state.receive(event.data() as usize);
                }
                state.ask_what_is_due(monotonic_ns());
                state.due.peek().map(|Reverse((due_ns, _))| *due_ns)
            };
            let sleep = next.map_or(LONGEST_SLEEP, |due_ns| {
                Duration::from_nanos(due_ns.saturating_sub(monotonic_ns())).min(LONGEST_SLEEP)
            });
            let mut files = [PollFd::new(epoll.0.as_fd(), PollFlags::POLLIN)];
            match ppoll(&mut files, Some(TimeSpec::from(sleep)), None) {
                Ok(_) | Err(Errno::EINTR) => {}
                // Without a sleep it is only busier.
                Err(_) => std::thread::sleep(sleep),
            }
        }
    }
}

impl State {
    fn work(&mut self, now_ns: u64) {
        self.works = true;
        self.due.clear();
        let others = (self.connections.len().saturating_sub(PROBES)).max(1) as u64;
        for (index, place) in self.connections.iter().enumerate() {
            let waits = place.as_ref().is_none_or(|connection| connection.waits);
            if !waits {
                // Spread over their period, so that they do not all come at once.
                let after_ns =
                    if index < PROBES { 0 } else { period_ns(others) / others * (index - PROBES) as u64 };
                self.due.push(Reverse((now_ns + after_ns, index)));
            }
        }
    }

    fn watch(&mut self) {
        self.connections.iter_mut().flatten().for_each(|connection| connection.longest_gap_ns = 0);
    }

    fn settled(&self, since_ns: u64) -> bool {
        let mut all = self.connections.iter().enumerate();
        all.all(|(index, place)| {
            place.as_ref().is_none_or(|connection| {
                let waits_for_old = connection.waits && connection.sent_ns < since_ns;
                !waits_for_old && (index >= PROBES || connection.answered_ns >= since_ns)
            })
        })
    }

    fn stalls_ms(&self, now_ns: u64) -> Vec<f64> {
        let gap = |connection: &Connection| {
            let waiting = if connection.waits { now_ns.saturating_sub(connection.answered_ns) } else { 0 };
            connection.longest_gap_ns.max(waiting) as f64 / 1e6
        };
        self.connections.iter().take(PROBES).flatten().map(gap).collect()
    }

    fn ask_what_is_due(&mut self, now_ns: u64) {
        while let Some(Reverse((due_ns, index))) = self.due.peek().copied() {
            if due_ns > now_ns {
                return;
            }
            self.due.pop();
            let Some(connection) = &mut self.connections[index] else { continue };
            if connection.ask(now_ns).is_err() {
                self.lose(index);
            }
        }
    }

    /// Reads what is there for a connection.
    fn receive(&mut self, index: usize) {
        let Some(connection) = &mut self.connections[index] else { return };
        match connection.socket.read(connection.partial.rest()) {
            Ok(count @ 1..) => {
                let Some(bytes) = connection.partial.received(count) else { return };
                let answer = Answer::read(bytes);
                let is_right = answer.is_some_and(|answer| connection.is_answered_by(&answer));
                let now_ns = monotonic_ns();
                connection.waits = false;
                if connection.answered_ns > 0 {
                    let gap_ns = now_ns - connection.answered_ns;
                    connection.longest_gap_ns = connection.longest_gap_ns.max(gap_ns);
                }
                connection.answered_ns = now_ns;
                let sent_ns = connection.sent_ns;
                self.counts.answered += u64::from(is_right);
                self.counts.lost += u64::from(!is_right);
                self.plan(index, sent_ns, now_ns);
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Ok(0) | Err(_) => self.lose(index),
        }
    }

    fn plan(&mut self, index: usize, sent_ns: u64, now_ns: u64) {
        if self.works {
            let others = self.connections.len().saturating_sub(PROBES) as u64;
            let period_ns = if index < PROBES { PROBE_PERIOD_NS } else { period_ns(others) };
            self.due.push(Reverse(((sent_ns + period_ns).max(now_ns), index)));
        }
    }

    /// The connection is gone, and what was asked on it.
    fn lose(&mut self, index: usize) {
        if let Some(connection) = self.connections[index].take() {
            self.counts.resets += 1;
            self.counts.lost += u64::from(connection.waits);
        }
    }
}

/// How often one of so many connections that are no probes asks.
fn period_ns(others: u64) -> u64 {
    others * 1_000_000_000 / OTHERS_PER_S
}

impl Connection {
    fn new(socket: Socket) -> Connection {
        let partial = Partial::default();
        Connection { socket, partial, number: 0, sent_ns: 0, waits: false, answered_ns: 0, longest_gap_ns: 0 }
    }

    fn ask(&mut self, now_ns: u64) -> io::Result<()> {
        self.number += 1;
        (self.sent_ns, self.waits) = (now_ns, true);
        let request = Request { ask: Ask::Count, number: self.number };
        // Nothing else is under way on this connection: the request fits the send buffer.
        self.socket.write_all(&request.bytes())
    }

    /// Whether the server has counted as many requests as were sent, in its own memory.
    fn is_answered_by(&self, answer: &Answer) -> bool {
        answer.to == Request { ask: Ask::Count, number: self.number } && answer.counted == self.number
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::time::Instant;

    use super::*;
    use crate::moves::memory::Memory;
    use crate::moves::server::Workload;
    use crate::server::Server;

    const LIMIT: Duration = Duration::from_secs(20);

    /// A server on loopback that ends when it is told to.
    struct Serving {
        target: SocketAddr,
        pauses: Arc<AtomicBool>,
        ends: Arc<AtomicBool>,
        thread: Option<JoinHandle<()>>,
    }

    impl Serving {
        fn start() -> Serving {
            let memory = Memory::new(1, 0.0);
            let mut server = Server::bind((Ipv4Addr::LOCALHOST, 0).into(), Workload::new(memory)).unwrap();
            let target = server.address().unwrap();
            let (pauses, ends) = <(Arc<AtomicBool>, Arc<AtomicBool>)>::default();
            let (paused, ended) = (pauses.clone(), ends.clone());
            let thread = std::thread::spawn(move || {
                while !ended.load(Ordering::Acquire) {
                    if paused.load(Ordering::Acquire) {
                        std::thread::sleep(Duration::from_millis(1));
                    } else {
                        server.turn(EpollTimeout::from(1u8)).unwrap();
                    }
                }
            });
            Serving { target, pauses, ends, thread: Some(thread) }
        }

        fn end(&mut self) {
            self.ends.store(true, Ordering::Release);
            if let Some(thread) = self.thread.take() {
                thread.join().unwrap();
            }
        }
    }

    impl Drop for Serving {
        fn drop(&mut self) {
            self.end();
        }
    }

    fn wait_until(mut done: impl FnMut() -> bool) {
        let end = Instant::now() + LIMIT;
        while !done() {
            assert!(Instant::now() < end, "it does not happen within {LIMIT:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_pause_is_every_probe_s_stall_and_loses_nothing() {
        let serving = Serving::start();
        let clients = connect(serving.target, 20).unwrap();
        clients.work();
        wait_until(|| clients.settled(1));
        clients.watch();
        serving.pauses.store(true, Ordering::Release);
        std::thread::sleep(Duration::from_millis(120));
        serving.pauses.store(false, Ordering::Release);
        let since_ns = monotonic_ns();
        wait_until(|| clients.settled(since_ns));
        let stalls = clients.stalls_ms();
        assert!(
            stalls.len() == PROBES && stalls.iter().all(|stall| (110.0..5000.0).contains(stall)),
            "{stalls:?}"
        );
        clients.rest();
        wait_until(|| clients.is_quiet());
        let counts = clients.finish();
        assert!(counts.answered > 20 && (counts.lost, counts.resets) == (0, 0), "{counts:?}");
    }

    #[test]
    fn a_server_that_goes_away_is_a_reset_on_every_connection() {
        let mut serving = Serving::start();
        let clients = connect(serving.target, 6).unwrap();
        clients.work();
        wait_until(|| clients.settled(1));
        serving.end();
        wait_until(|| clients.counts().resets == 6);
    }

    #[test]
    fn a_server_is_asked_for_more_than_counts() {
        let serving = Serving::start();
        for what in [Ask::Work, Ask::Rest, Ask::Check] {
            let answer = ask(serving.target, what, LIMIT).unwrap();
            assert_eq!((answer.to.ask, answer.wrong_pages), (what, 0));
        }
    }
}
