//! One system, one measurement: samples for the report's rows.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use bench::interrupt::Interrupt;
use bench::path::connections::ConnectionsResult;
use bench::path::datagrams::{Received, Sent};
use bench::path::report::{Direction, Metric, Sample, Subject};
use bench::path::requests::{Requests, RequestsResult};
use serde_json::Value;

use crate::place::{IPERF_PORT, PORT, Place, own_program};
use crate::systems::{Running, System};

/// New connections that are under way at any time.
pub const IN_FLIGHT: u32 = 16;
/// Flows that send datagrams in turn.
pub const FLOWS: u32 = 16;
/// Payload of a datagram.
pub const DATAGRAM_BYTES: usize = 64;
/// Before each measurement: caches, routes and connection tables fill.
const WARM_UP: Duration = Duration::from_millis(100);
/// How long a system may take until it carries packets; most of Drover's start is the verifier's.
const READY_LIMIT: Duration = Duration::from_secs(20);

/// One thing to measure, of one system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Requests on so many connections.
    Requests(u32),
    /// New connections.
    Connections,
    /// One TCP connection's throughput.
    Tcp(Direction),
    /// UDP datagrams.
    Udp,
}

/// What a step found: values with the rows that they belong to.
pub type Found = Vec<(Subject, Sample)>;

/// Measures in one place, with one system running.
pub struct Measuring<'a> {
    /// The place.
    pub place: &'a mut Place,
    /// The system.
    pub system: System,
    /// How long each measurement takes.
    pub duration: Duration,
    /// Ctrl-C.
    pub interrupt: &'a Interrupt,
    /// The program of iperf3.
    pub iperf: Option<PathBuf>,
}

impl Measuring<'_> {
    /// Waits until requests are answered.
    pub fn wait_until_ready(&self, running: &mut Running) -> anyhow::Result<()> {
        let ask = Requests {
            target: self.system.target(PORT),
            sources: Vec::new(),
            connections: 1,
            warm_up: Duration::ZERO,
            duration: Duration::from_millis(1),
        };
        let end = std::time::Instant::now() + READY_LIMIT;
        loop {
            match self.place.lab().client().run(|| ask.run()) {
                Ok(_) => return running.verify(self.place),
                Err(error) if std::time::Instant::now() > end => {
                    return Err(error).with_context(|| {
                        format!("{} carried nothing within {READY_LIMIT:?}", self.system.name())
                    });
                }
                Err(_) => {
                    running.check()?;
                    self.interrupt.sleep(Duration::from_millis(20))?;
                }
            }
        }
    }

    /// Does one step.
    pub fn run(&mut self, step: Step) -> anyhow::Result<Found> {
        match step {
            Step::Requests(connections) => self.requests(connections),
            Step::Connections => self.connections(),
            Step::Tcp(direction) => self.tcp(direction),
            Step::Udp => self.udp(),
        }
    }

    fn requests(&mut self, connections: u32) -> anyhow::Result<Found> {
        let count = connections.to_string();
        let found: RequestsResult = self.client("requests", &["--connections", &count])?;
        let rate = found.requests as f64 / found.seconds;
        let subject = |metric| Subject { connections: Some(connections), ..Subject::of(metric) };
        let sample =
            Sample { value: rate, p50_us: Some(found.p50_us), p99_us: Some(found.p99_us), loss: None };
        let cost = Sample { value: found.busy_s / found.requests as f64 * 1e6, ..Sample::default() };
        Ok(vec![(subject(Metric::RequestsPerS), sample), (subject(Metric::CpuSPerMillionRequests), cost)])
    }

    fn connections(&mut self) -> anyhow::Result<Found> {
        let in_flight = IN_FLIGHT.to_string();
        let found: ConnectionsResult = self.client("connections", &["--in-flight", &in_flight])?;
        let value = found.connections as f64 / found.seconds;
        let sample = Sample { value, p50_us: Some(found.p50_us), p99_us: Some(found.p99_us), loss: None };
        Ok(vec![(Subject::of(Metric::NewConnectionsPerS), sample)])
    }

    fn udp(&mut self) -> anyhow::Result<Found> {
        let listen = format!("0.0.0.0:{PORT}");
        let receiver = self.place.receiver(&["worker", "receive", "--listen", &listen])?;
        // Its socket has to be there before the first datagram; nothing can tell from outside.
        self.interrupt.sleep(Duration::from_millis(50))?;
        let (flows, bytes) = (FLOWS.to_string(), DATAGRAM_BYTES.to_string());
        let sent: Sent = self.client("send", &["--flows", &flows, "--bytes", &bytes])?;
        let (received, _): (Received, f64) = receiver.finish(self.duration, self.interrupt)?;
        let value = received.datagrams as f64 / sent.seconds;
        let loss = Some(1.0 - received.datagrams as f64 / sent.datagrams.max(1) as f64);
        Ok(vec![(Subject::of(Metric::UdpPacketsPerS), Sample { value, loss, ..Sample::default() })])
    }

    fn tcp(&mut self, direction: Direction) -> anyhow::Result<Found> {
        let iperf = self.iperf.clone().context("iperf3 is not installed (package iperf3)")?;
        // It knows whole seconds only.
        let seconds = self.duration.as_secs_f64().ceil().max(1.0);
        let target = self.system.target(IPERF_PORT);
        let (address, port, time) = (target.ip().to_string(), target.port().to_string(), seconds.to_string());
        let mut words = vec!["--client", &address, "--port", &port, "--time", &time, "--json"];
        if direction == Direction::Down {
            words.push("--reverse");
        }
        let worker = self.place.client(&iperf, &words)?;
        let (found, busy_s): (Value, f64) =
            worker.finish(Duration::from_secs_f64(seconds), self.interrupt)?;
        let received = &found["end"]["sum_received"];
        let number = |name: &str| {
            received[name].as_f64().filter(|value| *value > 0.0).with_context(|| {
                format!("iperf3 says nothing of {name} received: {}", found["error"].as_str().unwrap_or("?"))
            })
        };
        let subject = |metric| Subject { direction: Some(direction), ..Subject::of(metric) };
        let sample = |value| Sample { value, ..Sample::default() };
        Ok(vec![
            (subject(Metric::TcpGbitPerS), sample(number("bits_per_second")? / 1e9)),
            (subject(Metric::CpuSPerGb), sample(busy_s / (number("bytes")? / 1e9))),
        ])
    }

    /// Runs one of our own clients with the words that all of them know.
    fn client<T: serde::de::DeserializeOwned>(&mut self, what: &str, more: &[&str]) -> anyhow::Result<T> {
        let sources: Vec<_> = self.place.sources().iter().map(ToString::to_string).collect();
        let (target, sources) = (self.system.target(PORT).to_string(), sources.join(","));
        let (warm_up, duration) = (WARM_UP.as_millis().to_string(), self.duration.as_millis().to_string());
        let mut words = vec!["worker", what, "--target", &target, "--sources", &sources];
        words.extend(["--warm-up-ms", &warm_up, "--duration-ms", &duration]);
        words.extend(more);
        let program = own_program().context("cannot find this program's own path")?;
        let worker = self.place.client(Path::new(&program), &words)?;
        Ok(worker.finish(WARM_UP + self.duration, self.interrupt)?.0)
    }
}
