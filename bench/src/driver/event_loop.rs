//! The driver's thread: an epoll loop over the clients' sockets, a timer for the schedule, and a wake-up.
//!
//! The timer is a timerfd with absolute times: precise to the nanosecond and without drift, whereas epoll's
//! own timeout counts milliseconds.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::prctl::set_timerslack;
use nix::sys::time::{TimeSpec, TimeValLike};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::connection::{Connection, Failure, Received};
use super::priority::ahead_of_others;
use super::{DriverError, Load, Shared};
use crate::clock::{monotonic_ns, unix_ns};
use crate::protocol::{Protocol, Transport};
use crate::tally::Tally;
use crate::timeline::Timeline;

/// Sockets handled per wake-up. All of them get the time of the wake-up, so this also bounds by how much a
/// reply can look earlier than the moment it was read.
const EVENTS_PER_WAKE: usize = 64;

/// Larger than any reply and most bursts of replies.
const READ_BYTES: usize = 16 * 1024;

/// Error texts that are kept; the rest is only counted.
const ERRORS_KEPT: usize = 20;

/// Between the start of the thread and the first message.
const LEAD_NS: u64 = 5_000_000;

const TIMER: u64 = u64::MAX;
const WAKE: u64 = u64::MAX - 1;

pub(super) struct EventLoop {
    load: Load,
    protocol: Arc<dyn Protocol>,
    connections: Vec<Connection>,
    /// Whether epoll reports a client's socket as writable too.
    watches_writable: Vec<bool>,
    shared: Arc<Shared>,
    epoll: Epoll,
    timer: TimerFd,
    tally: Tally,
    errors: Vec<String>,
    start_ns: u64,
    encoded: Vec<u8>,
    replies: Vec<u64>,
}

fn failed(what: &'static str) -> impl Fn(nix::Error) -> DriverError {
    move |error| DriverError::EventLoop { what, source: error.into() }
}

impl EventLoop {
    pub(super) fn new(
        load: Load,
        protocol: Arc<dyn Protocol>,
        connections: Vec<Connection>,
        shared: Arc<Shared>,
    ) -> Result<Self, DriverError> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed("epoll_create1"))?;
        let timer =
            TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)
                .map_err(failed("timerfd_create"))?;
        epoll.add(&timer, EpollEvent::new(EpollFlags::EPOLLIN, TIMER)).map_err(failed("epoll_ctl"))?;
        epoll.add(&shared.wake, EpollEvent::new(EpollFlags::EPOLLIN, WAKE)).map_err(failed("epoll_ctl"))?;
        for (client, connection) in connections.iter().enumerate() {
            if let Some(socket) = connection.descriptor() {
                epoll
                    .add(socket, EpollEvent::new(EpollFlags::EPOLLIN, client as u64))
                    .map_err(failed("epoll_ctl"))?;
            }
        }
        Ok(Self {
            watches_writable: vec![false; connections.len()],
            tally: Tally::new(load.clients),
            load,
            protocol,
            connections,
            shared,
            epoll,
            timer,
            errors: Vec::new(),
            start_ns: 0,
            encoded: Vec::new(),
            replies: Vec::new(),
        })
    }

    pub(super) fn run(mut self) -> Result<Timeline, DriverError> {
        set_timerslack(1).map_err(failed("prctl"))?;
        ahead_of_others();
        let mut events = [EpollEvent::empty(); EVENTS_PER_WAKE];
        let mut buffer = vec![0; READ_BYTES];
        self.start_ns = monotonic_ns() + LEAD_NS;
        let start_unix_ns = unix_ns() + LEAD_NS as i64;
        let mut drained_at_ns = None;
        let mut wake_at_ns = 0;
        loop {
            let now_ns = monotonic_ns();
            if drained_at_ns.is_none() {
                if self.shared.stop.load(Ordering::Acquire) {
                    drained_at_ns = Some(now_ns + self.load.drain.as_nanos() as u64);
                } else {
                    self.send_due(now_ns)?;
                }
            }
            self.publish();
            let wait_until_ns = match drained_at_ns {
                Some(at_ns) if now_ns >= at_ns || self.nothing_awaited() => break,
                Some(at_ns) => at_ns,
                None => self.due_ns(self.tally.due_count()),
            };
            if wait_until_ns != wake_at_ns {
                wake_at_ns = wait_until_ns;
                let at = Expiration::OneShot(TimeSpec::nanoseconds(wait_until_ns as i64));
                self.timer
                    .set(at, TimerSetTimeFlags::TFD_TIMER_ABSTIME)
                    .map_err(failed("timerfd_settime"))?;
            }
            let ready = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Err(nix::Error::EINTR) => 0,
                other => other.map_err(failed("epoll_wait"))?,
            };
            let woken_ns = monotonic_ns();
            for event in &events[..ready] {
                match event.data() {
                    TIMER => drop(self.timer.wait()),
                    WAKE => drop(self.shared.wake.read()),
                    client => self.ready(client as u32, event.events(), woken_ns, &mut buffer)?,
                }
            }
        }
        self.publish();
        let end_ns = monotonic_ns().saturating_sub(self.start_ns);
        let (messages, faults) = self.tally.finish();
        Ok(Timeline {
            clients: self.load.clients,
            start_unix_ns,
            end_ns,
            messages,
            faults,
            errors: self.errors,
        })
    }

    /// When message number `position` is due: computed, never summed up, so that errors do not add up.
    fn due_ns(&self, position: u64) -> u64 {
        self.start_ns + (position as f64 * 1e9 / self.load.rate_per_s) as u64
    }

    fn nothing_awaited(&self) -> bool {
        self.tally.answered_count() == self.tally.due_count()
            || self.connections.iter().all(|connection| connection.descriptor().is_none())
    }

    fn publish(&self) {
        self.shared.progress.due.store(self.tally.due_count(), Ordering::Relaxed);
        self.shared.progress.answered.store(self.tally.answered_count(), Ordering::Relaxed);
    }

    fn send_due(&mut self, now_ns: u64) -> Result<(), DriverError> {
        loop {
            let due_ns = self.due_ns(self.tally.due_count());
            if due_ns > now_ns {
                return Ok(());
            }
            let (client, sequence) = self.tally.due(due_ns - self.start_ns);
            self.encoded.clear();
            self.protocol.encode(client, sequence, &mut self.encoded);
            self.connections[client as usize].queue(sequence, &self.encoded);
            self.flush(client)?;
        }
    }

    fn flush(&mut self, client: u32) -> Result<(), DriverError> {
        if let Err(first) = self.try_flush(client) {
            self.broken(client, &first);
            // An error on a UDP socket reports the ICMP answer to an earlier datagram and clears it; the one at
            // hand has not been sent yet.
            if self.try_flush(client).is_err() {
                self.connections[client as usize].skip_unsent();
            }
        }
        self.watch(client)
    }

    fn try_flush(&mut self, client: u32) -> io::Result<()> {
        let (tally, start_ns) = (&mut self.tally, self.start_ns);
        self.connections[client as usize]
            .flush(|sequence| tally.sent(client, sequence, monotonic_ns().saturating_sub(start_ns)))
    }

    /// Asks epoll for writability exactly while something is unsent.
    fn watch(&mut self, client: u32) -> Result<(), DriverError> {
        let index = client as usize;
        let wanted = self.connections[index].has_unsent();
        let Some(socket) = self.connections[index].descriptor() else { return Ok(()) };
        if wanted == self.watches_writable[index] {
            return Ok(());
        }
        let mut flags = EpollFlags::EPOLLIN;
        flags.set(EpollFlags::EPOLLOUT, wanted);
        self.epoll
            .modify(socket, &mut EpollEvent::new(flags, u64::from(client)))
            .map_err(failed("epoll_ctl"))?;
        self.watches_writable[index] = wanted;
        Ok(())
    }

    fn ready(
        &mut self,
        client: u32,
        flags: EpollFlags,
        woken_ns: u64,
        buffer: &mut [u8],
    ) -> Result<(), DriverError> {
        if flags.contains(EpollFlags::EPOLLOUT) {
            self.flush(client)?;
        }
        if flags.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP) {
            self.receive(client, woken_ns, buffer);
        }
        Ok(())
    }

    fn receive(&mut self, client: u32, woken_ns: u64, buffer: &mut [u8]) {
        self.replies.clear();
        let received = self.connections[client as usize].receive(buffer, &mut self.replies);
        let at_ns = woken_ns.saturating_sub(self.start_ns);
        for &sequence in &self.replies {
            self.tally.reply(client, sequence, at_ns);
        }
        match received {
            Ok(Received::Bytes | Received::Nothing) => {}
            Ok(Received::Closed) => match self.protocol.transport() {
                Transport::Tcp => self.broken(client, &io::Error::from(io::ErrorKind::UnexpectedEof)),
                Transport::Udp => self.unreadable(client, "an empty datagram"),
            },
            Err(Failure::Io(error)) => self.broken(client, &error),
            Err(Failure::Reply(error)) => {
                self.unreadable(client, &error.to_string());
                if self.protocol.transport() == Transport::Tcp {
                    self.connections[client as usize].close();
                }
            }
        }
    }

    /// A TCP connection is gone and stays gone: a real user would have been kicked, and what was still to be
    /// sent on it counts as lost. A UDP socket only reports that an ICMP error came.
    fn broken(&mut self, client: u32, error: &io::Error) {
        self.tally.reset();
        self.note(format!("client {client}: {error}"));
        if self.protocol.transport() == Transport::Tcp {
            self.connections[client as usize].close();
        }
    }

    fn unreadable(&mut self, client: u32, error: &str) {
        self.tally.unreadable();
        self.note(format!("client {client}: {error}"));
    }

    fn note(&mut self, error: String) {
        if self.errors.len() < ERRORS_KEPT {
            self.errors.push(error);
        }
    }
}
