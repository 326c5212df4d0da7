//! Requests one after the other on each of N connections: how many a second, and how long each took.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Socket, Type};

use super::exchange::{self, Partial};
use super::latencies::Latencies;
use super::processors::Busy;
use super::{LoadError, source};
use crate::clock::monotonic_ns;

/// How long a connection may take to come up.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// How long to wait for any answer at all.
const SILENCE_LIMIT: Duration = Duration::from_secs(5);

/// What to do.
#[derive(Clone, Debug)]
pub struct Requests {
    /// Whom to ask.
    pub target: SocketAddr,
    /// Addresses to ask from, in turn; none: the kernel chooses.
    pub sources: Vec<IpAddr>,
    /// How many connections ask.
    pub connections: u32,
    /// Asked before anything is counted.
    pub warm_up: Duration,
    /// Asked and counted.
    pub duration: Duration,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RequestsResult {
    /// Answered requests.
    pub requests: u64,
    /// Within this time.
    pub seconds: f64,
    /// From a request's sending to its answer's reading, the half that was faster.
    pub p50_us: f64,
    /// The 99 percent that were faster.
    pub p99_us: f64,
    /// The slowest.
    pub max_us: f64,
    /// Connections that were lost on the way.
    pub lost_connections: u64,
    /// What all processors together worked meanwhile, in seconds of one.
    pub busy_s: f64,
}

struct Connection {
    stream: TcpStream,
    partial: Partial,
    number: u64,
    sent_ns: u64,
}

/// The counted part of a run.
struct Counted {
    latencies: Latencies,
    wrong: u64,
    lost: u64,
}

impl Requests {
    /// Connects, asks, and says what came of it.
    pub fn run(&self) -> Result<RequestsResult, LoadError> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(LoadError::io("make an epoll"))?;
        let mut connections = Vec::with_capacity(self.connections as usize);
        for number in 0..self.connections {
            let stream = self.connect(number as usize)?;
            epoll
                .add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, u64::from(number)))
                .map_err(LoadError::io("watch a connection"))?;
            connections.push(Some(Connection { stream, partial: Partial::default(), number: 0, sent_ns: 0 }));
        }
        let mut counted = Counted { latencies: Latencies::default(), wrong: 0, lost: 0 };
        for (number, place) in connections.iter_mut().enumerate() {
            ask(place, number as u32, monotonic_ns(), &mut counted);
        }
        let warm_up = monotonic_ns() + self.warm_up.as_nanos() as u64;
        self.ask_until(warm_up, &epoll, &mut connections, &mut counted)?;
        let warm = counted.latencies.count();
        counted.latencies = Latencies::default();

        let (busy, start) = (Busy::now()?, monotonic_ns());
        self.ask_until(start + self.duration.as_nanos() as u64, &epoll, &mut connections, &mut counted)?;
        let (end, busy_s) = (monotonic_ns(), Busy::now()?.seconds_since(busy));
        if counted.wrong > 0 {
            return Err(LoadError::Wrong { target: self.target, wrong: counted.wrong });
        }
        if warm + counted.latencies.count() == 0 {
            return Err(self.silence());
        }
        let us = |ns: u64| ns as f64 / 1e3;
        let latencies = &counted.latencies;
        Ok(RequestsResult {
            requests: latencies.count(),
            seconds: (end - start) as f64 / 1e9,
            p50_us: us(latencies.quantile_ns(0.5)),
            p99_us: us(latencies.quantile_ns(0.99)),
            max_us: us(latencies.max_ns()),
            lost_connections: counted.lost,
            busy_s,
        })
    }

    fn connect(&self, number: usize) -> Result<TcpStream, LoadError> {
        let connect = || {
            let socket = Socket::new(Domain::for_address(self.target), Type::STREAM.cloexec(), None)?;
            if let Some(from) = source(&self.sources, number) {
                socket.bind(&from.into())?;
            }
            socket.connect_timeout(&self.target.into(), CONNECT_LIMIT)?;
            socket.set_tcp_nodelay(true)?;
            socket.set_nonblocking(true)?;
            Ok::<_, io::Error>(socket.into())
        };
        connect().map_err(LoadError::io(format!("connect to {}", self.target)))
    }

    fn ask_until(
        &self,
        end_ns: u64,
        epoll: &Epoll,
        connections: &mut [Option<Connection>],
        counted: &mut Counted,
    ) -> Result<(), LoadError> {
        let mut events = vec![EpollEvent::empty(); 256];
        loop {
            let count = match epoll.wait(&mut events, EpollTimeout::from(20u8)) {
                Err(Errno::EINTR) => 0,
                other => other.map_err(LoadError::io("wait for answers"))?,
            };
            for event in &events[..count] {
                let number = event.data() as u32;
                take(&mut connections[number as usize], number, counted);
            }
            if monotonic_ns() >= end_ns {
                return Ok(());
            }
            if connections.iter().all(Option::is_none) {
                return Err(self.silence());
            }
        }
    }

    fn silence(&self) -> LoadError {
        LoadError::Silence {
            target: self.target,
            ms: (self.warm_up + self.duration).min(SILENCE_LIMIT).as_millis(),
        }
    }
}

/// Reads what is there of an answer; once it is whole, asks again.
fn take(place: &mut Option<Connection>, index: u32, counted: &mut Counted) {
    let Some(connection) = place else { return };
    match connection.stream.read(connection.partial.rest()) {
        Ok(count @ 1..) => {
            if let Some(answer) = connection.partial.received(count) {
                let now_ns = monotonic_ns();
                counted.wrong += u64::from(!exchange::is_answer(answer, index, connection.number));
                counted.latencies.record(now_ns - connection.sent_ns);
                connection.number += 1;
                ask(place, index, now_ns, counted);
            }
        }
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
        Ok(0) | Err(_) => lose(place, counted),
    }
}

fn ask(place: &mut Option<Connection>, index: u32, now_ns: u64, counted: &mut Counted) {
    let Some(connection) = place else { return };
    connection.sent_ns = now_ns;
    // Nothing else is under way on this connection: the request fits the send buffer.
    if connection.stream.write_all(&exchange::request(index, connection.number)).is_err() {
        lose(place, counted);
    }
}

fn lose(place: &mut Option<Connection>, counted: &mut Counted) {
    *place = None;
    counted.lost += 1;
}
