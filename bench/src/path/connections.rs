//! New connections: connect, one request, its answer, close; some of them under way at any time.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{setsockopt, sockopt};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Socket, Type};

use super::exchange::{self, Partial};
use super::latencies::Latencies;
use super::processors::Busy;
use super::{LoadError, source};
use crate::clock::monotonic_ns;

/// What to do.
#[derive(Clone, Debug)]
pub struct Connections {
    /// Where to connect.
    pub target: SocketAddr,
    /// Addresses to connect from, in turn. Each has some 64,000 ports.
    pub sources: Vec<IpAddr>,
    /// How many are under way at any time.
    pub in_flight: u32,
    /// Done before anything is counted.
    pub warm_up: Duration,
    /// Done and counted.
    pub duration: Duration,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ConnectionsResult {
    /// Connections that were made, answered and closed.
    pub connections: u64,
    /// Connections that were refused or reset.
    pub failed: u64,
    /// Within this time.
    pub seconds: f64,
    /// From the begin of connecting to the answer's reading, the half that was faster.
    pub p50_us: f64,
    /// The 99 percent that were faster.
    pub p99_us: f64,
    /// What all processors together worked meanwhile, in seconds of one.
    pub busy_s: f64,
}

struct Attempt {
    stream: TcpStream,
    partial: Partial,
    asked: bool,
    number: u64,
    begun_ns: u64,
}

/// What became of an attempt when its socket had something to say.
enum Progress {
    UnderWay,
    Answered,
    Failed,
    Wrong,
}

struct Run<'a> {
    what: &'a Connections,
    epoll: Epoll,
    attempts: Vec<Attempt>,
    begun: u64,
    latencies: Latencies,
    failed: u64,
    wrong: u64,
}

impl Connections {
    /// Connects and closes, and says how often.
    pub fn run(&self) -> Result<ConnectionsResult, LoadError> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(LoadError::io("make an epoll"))?;
        let (attempts, latencies) = (Vec::new(), Latencies::default());
        let mut run = Run { what: self, epoll, attempts, begun: 0, latencies, failed: 0, wrong: 0 };
        for place in 0..self.in_flight as usize {
            let attempt = run.begin(place)?;
            run.attempts.push(attempt);
        }
        run.until(monotonic_ns() + self.warm_up.as_nanos() as u64)?;
        let warm = std::mem::take(&mut run.latencies).count();
        run.failed = 0;

        let (busy, start) = (Busy::now()?, monotonic_ns());
        run.until(start + self.duration.as_nanos() as u64)?;
        let (end, busy_s) = (monotonic_ns(), Busy::now()?.seconds_since(busy));
        if run.wrong > 0 {
            return Err(LoadError::Wrong { target: self.target, wrong: run.wrong });
        }
        if warm + run.latencies.count() == 0 {
            let ms = (self.warm_up + self.duration).as_millis();
            return Err(LoadError::Silence { target: self.target, ms });
        }
        Ok(ConnectionsResult {
            connections: run.latencies.count(),
            failed: run.failed,
            seconds: (end - start) as f64 / 1e9,
            p50_us: run.latencies.quantile_ns(0.5) as f64 / 1e3,
            p99_us: run.latencies.quantile_ns(0.99) as f64 / 1e3,
            busy_s,
        })
    }
}

impl Run<'_> {
    fn begin(&mut self, place: usize) -> Result<Attempt, LoadError> {
        let number = self.begun;
        self.begun += 1;
        let begun_ns = monotonic_ns();
        let stream = connect(self.what.target, source(&self.what.sources, number as usize))
            .map_err(LoadError::io(format!("begin a connection to {}", self.what.target)))?;
        // Edges: "writable" comes once, as the connection is up; then "readable".
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
        self.epoll
            .add(&stream, EpollEvent::new(flags, place as u64))
            .map_err(LoadError::io("watch a connection"))?;
        Ok(Attempt { stream, partial: Partial::default(), asked: false, number, begun_ns })
    }

    fn until(&mut self, end_ns: u64) -> Result<(), LoadError> {
        let mut events = vec![EpollEvent::empty(); 256];
        while monotonic_ns() < end_ns {
            let count = match self.epoll.wait(&mut events, EpollTimeout::from(20u8)) {
                Err(Errno::EINTR) => 0,
                other => other.map_err(LoadError::io("wait for connections"))?,
            };
            for event in &events[..count] {
                let place = event.data() as usize;
                match self.attempts[place].go_on() {
                    Progress::UnderWay => continue,
                    Progress::Answered => {
                        self.latencies.record(monotonic_ns() - self.attempts[place].begun_ns);
                    }
                    Progress::Failed => self.failed += 1,
                    Progress::Wrong => self.wrong += 1,
                }
                // The old one is closed as it is replaced.
                self.attempts[place] = self.begin(place)?;
            }
        }
        Ok(())
    }
}

impl Attempt {
    fn go_on(&mut self) -> Progress {
        if !self.asked {
            return match self.stream.write_all(&exchange::request(0, self.number)) {
                Ok(()) => {
                    self.asked = true;
                    Progress::UnderWay
                }
                Err(error) if is_not_ready(&error) => Progress::UnderWay,
                Err(_) => Progress::Failed,
            };
        }
        match self.stream.read(self.partial.rest()) {
            Ok(0) => Progress::Failed,
            Ok(count) => match self.partial.received(count) {
                Some(answer) if exchange::is_answer(answer, 0, self.number) => Progress::Answered,
                Some(_) => Progress::Wrong,
                None => Progress::UnderWay,
            },
            Err(error) if is_not_ready(&error) => Progress::UnderWay,
            Err(_) => Progress::Failed,
        }
    }
}

/// A socket that is not connected yet, or has nothing to read.
fn is_not_ready(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted | io::ErrorKind::NotConnected
    )
}

fn connect(target: SocketAddr, from: Option<SocketAddr>) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(target), Type::STREAM.nonblocking().cloexec(), None)?;
    if let Some(from) = from {
        // The port is chosen at connect, when the kernel knows which are free towards this target.
        setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
        socket.bind(&from.into())?;
    }
    socket.set_tcp_nodelay(true)?;
    match socket.connect(&target.into()) {
        Err(error) if error.raw_os_error() != Some(Errno::EINPROGRESS as i32) => Err(error),
        _ => Ok(socket.into()),
    }
}
