//! The server that is moved. It keeps a count for each connection, so that a client finds out at its next request whether
//! a byte of either way, or the server's memory, was lost.
//!
//! It runs at least every millisecond while it works, and notes the longest time in which it did not. The wall clock
//! tells that also over a checkpoint, since CRIU lets no monotonic clock see one; so the freeze is measured in the same
//! way whoever moves the server.

use std::net::SocketAddr;
use std::time::Duration;

use nix::sys::epoll::EpollTimeout;

use super::exchange::{Answer, Ask, BYTES, Request};
use super::memory::Memory;
use crate::clock::unix_ns;
use crate::driver::{self, DriverError};
use crate::path::LoadError;
use crate::path::exchange::Partial;
use crate::server::{Answers, Server};

/// How long it waits for requests before it looks after its memory, in milliseconds.
const TURN_MS: u8 = 1;
/// Connections that it can have.
const CONNECTIONS: u32 = 10_000;

/// Why the server ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Too few open files.
    #[error(transparent)]
    Limits(#[from] DriverError),
    /// The network.
    #[error(transparent)]
    Load(#[from] LoadError),
}

/// Fills its memory, then listens at `address` and answers until it is killed.
pub fn serve(address: SocketAddr, resident_mb: u32, dirty_pct: f64) -> Result<(), ServeError> {
    driver::allow_open_files(CONNECTIONS)?;
    let workload = Workload::new(Memory::new(resident_mb, dirty_pct));
    let mut server = Server::bind(address, workload)?;
    loop {
        let resting = matches!(server.answers().activity, Activity::Resting);
        server.turn(if resting { EpollTimeout::NONE } else { EpollTimeout::from(TURN_MS) })?;
        server.answers().tick(unix_ns());
    }
}

/// What the server keeps in its memory.
pub struct Workload {
    memory: Memory,
    activity: Activity,
    answers: Vec<u8>,
}

/// What it does besides answering.
enum Activity {
    /// Nothing, so that it disturbs nobody's measurement.
    Resting,
    /// Rewriting pages.
    Working { ran_at_ns: i64, longest_gap_ns: u64, rewritten_pages: u64 },
}

/// What is kept of a connection.
#[derive(Default)]
pub struct Connection {
    partial: Partial,
    counted: u64,
}

impl Workload {
    /// With nothing to do yet.
    pub fn new(memory: Memory) -> Workload {
        Workload { memory, activity: Activity::Resting, answers: Vec::new() }
    }

    /// It runs now.
    fn tick(&mut self, now_ns: i64) {
        let Activity::Working { ran_at_ns, longest_gap_ns, rewritten_pages } = &mut self.activity else {
            return;
        };
        // A wall clock may be set back.
        let gap_ns = u64::try_from(now_ns - *ran_at_ns).unwrap_or(0);
        *ran_at_ns = now_ns;
        *longest_gap_ns = gap_ns.max(*longest_gap_ns);
        *rewritten_pages += self.memory.rewrite(Duration::from_nanos(gap_ns));
    }

    fn answer_to(&mut self, to: Request, counted: u64) -> Answer {
        let now_ns = unix_ns();
        self.tick(now_ns);
        let mut answer = Answer { to, counted, longest_gap_ns: 0, rewritten_pages: 0, wrong_pages: 0 };
        match to.ask {
            Ask::Count => {}
            Ask::Work => {
                self.activity =
                    Activity::Working { ran_at_ns: now_ns, longest_gap_ns: 0, rewritten_pages: 0 };
            }
            Ask::Rest => {
                let before = std::mem::replace(&mut self.activity, Activity::Resting);
                if let Activity::Working { longest_gap_ns, rewritten_pages, .. } = before {
                    answer = Answer { longest_gap_ns, rewritten_pages, ..answer };
                }
            }
            Ask::Check => answer.wrong_pages = self.memory.wrong_pages(),
        }
        answer
    }
}

impl Answers for Workload {
    type Connection = Connection;

    fn answer<'a>(&'a mut self, connection: &mut Connection, received: &'a mut [u8]) -> &'a [u8] {
        self.answers.clear();
        let mut rest: &[u8] = received;
        while !rest.is_empty() {
            let place = connection.partial.rest();
            let count = place.len().min(rest.len());
            place[..count].copy_from_slice(&rest[..count]);
            rest = &rest[count..];
            let Some(request) = connection.partial.received(count) else { break };
            // What is no request gets no answer, which its sender notices.
            let Some(request) = Request::read(request) else { continue };
            connection.counted += u64::from(request.ask == Ask::Count);
            let answer: [u8; BYTES] = self.answer_to(request, connection.counted).bytes();
            self.answers.extend_from_slice(&answer);
        }
        &self.answers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(workload: &mut Workload, connection: &mut Connection, ask: Ask, number: u64) -> Answer {
        let mut bytes = Request { ask, number }.bytes();
        let answer = workload.answer(connection, &mut bytes);
        Answer::read(answer.try_into().unwrap()).unwrap()
    }

    #[test]
    fn each_connection_is_counted_by_itself_however_its_bytes_come() {
        let mut workload = Workload::new(Memory::new(0, 0.0));
        let (mut one, mut other) = (Connection::default(), Connection::default());
        assert_eq!(ask(&mut workload, &mut one, Ask::Count, 1).counted, 1);
        assert_eq!(ask(&mut workload, &mut other, Ask::Count, 1).counted, 1);
        let mut two = [2, 3].map(|number| Request { ask: Ask::Count, number }.bytes()).concat();
        let (left, right) = two.split_at_mut(70);
        assert_eq!(workload.answer(&mut one, left).len(), BYTES);
        let answer = Answer::read(workload.answer(&mut one, right).try_into().unwrap()).unwrap();
        assert_eq!((answer.to.number, answer.counted), (3, 3));
    }

    #[test]
    fn the_longest_time_without_running_is_told_once() {
        let mut workload = Workload::new(Memory::new(1, 100.0));
        let mut connection = Connection::default();
        ask(&mut workload, &mut connection, Ask::Work, 1);
        let Activity::Working { ran_at_ns, .. } = workload.activity else { panic!("it works") };
        workload.tick(ran_at_ns + 1_000_000);
        workload.tick(ran_at_ns + 51_000_000);
        workload.tick(ran_at_ns + 52_000_000);
        let answer = ask(&mut workload, &mut connection, Ask::Rest, 2);
        assert_eq!((answer.longest_gap_ns, answer.wrong_pages), (50_000_000, 0));
        assert!(answer.rewritten_pages > 0 && answer.counted == 0);
        assert_eq!(ask(&mut workload, &mut connection, Ask::Rest, 3).longest_gap_ns, 0);
        assert_eq!(ask(&mut workload, &mut connection, Ask::Check, 4).wrong_pages, 0);
    }
}
