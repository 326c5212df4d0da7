//! The load balancer's admin API, as far as a drill needs it: start a migration and follow its events.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use bench::report::{Coordinated, Phase};
use lab::{Namespace, address};
use serde::Deserialize;

use bench::interrupt::{Interrupt, NOTICED_WITHIN};

/// A finished migration, as `GET /v1/migrations/{id}` and the last event have it.
#[derive(Clone, Debug, Deserialize)]
pub struct Finished {
    /// Where the backend was.
    pub from: String,
    /// Where it was to go.
    pub to: String,
    #[serde(default)]
    phases: Vec<Phase>,
    report: Coordinated,
}

impl Finished {
    /// The report; its phases are those of the migration where the report has none of its own.
    pub fn coordinated(self) -> Coordinated {
        let mut report = self.report;
        if report.phases.is_empty() {
            report.phases = self.phases;
        }
        report
    }
}

/// Follows a migration's events to its end. `on_phase` is called when a phase has ended.
pub fn follow(
    lb: &Namespace,
    id: &str,
    limit: Duration,
    interrupt: &Interrupt,
    mut on_phase: impl FnMut(&Phase),
) -> anyhow::Result<Finished> {
    let server: SocketAddr = address::ADMIN.parse().context("the admin API's address")?;
    let stream = lb.run(|| TcpStream::connect_timeout(&server, Duration::from_secs(5)));
    let mut stream = stream.with_context(|| format!("cannot reach the admin API at {server}"))?;
    stream.set_read_timeout(Some(NOTICED_WITHIN))?;
    // HTTP/1.0 has no chunks: the events are all that comes, until the connection closes.
    let request = format!("GET /v1/migrations/{id}/events HTTP/1.0\r\naccept: text/event-stream\r\n\r\n");
    stream.write_all(request.as_bytes()).context("cannot ask for the migration's events")?;

    let mut lines = Lines { reader: BufReader::new(stream), partial: Vec::new() };
    let end = Instant::now() + limit;
    let mut parser = Events::default();
    loop {
        interrupt.check()?;
        ensure!(Instant::now() < end, "the migration has not ended within {limit:?}");
        let Some(line) = lines.next().context("the events of the migration broke off")? else { continue };
        match parser.line(&line)? {
            Some(Event::Phase(phase)) if phase.end_ms.is_some() => on_phase(&phase),
            Some(Event::Finished(finished)) => return Ok(*finished),
            Some(Event::Phase(_)) | None => {}
        }
    }
}

/// Lines of a stream whose reads time out.
struct Lines<R> {
    reader: BufReader<R>,
    partial: Vec<u8>,
}

impl<R: Read> Lines<R> {
    /// The next line, or nothing when none has arrived yet.
    fn next(&mut self) -> std::io::Result<Option<String>> {
        match self.reader.read_until(b'\n', &mut self.partial) {
            Ok(_) if self.partial.ends_with(b"\n") => {
                let line = String::from_utf8_lossy(&self.partial).trim_end().to_owned();
                self.partial.clear();
                Ok(Some(line))
            }
            Ok(_) => Err(std::io::ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// What the load balancer tells about a migration.
#[derive(Debug)]
enum Event {
    Phase(Phase),
    Finished(Box<Finished>),
}

/// Reads a response with server-sent events, line by line.
#[derive(Debug, Default)]
struct Events {
    status_seen: bool,
    in_body: bool,
    name: String,
    data: String,
}

impl Events {
    fn line(&mut self, line: &str) -> anyhow::Result<Option<Event>> {
        if !self.status_seen {
            ensure!(line.split(' ').nth(1) == Some("200"), "the admin API answered: {line}");
            self.status_seen = true;
        } else if !self.in_body {
            self.in_body = line.is_empty();
        } else if line.is_empty() {
            let (name, data) = (std::mem::take(&mut self.name), std::mem::take(&mut self.data));
            return event(&name, &data);
        } else if let Some(name) = line.strip_prefix("event:") {
            self.name = name.trim_start().to_owned();
        } else if let Some(data) = line.strip_prefix("data:") {
            self.data += data.trim_start();
        }
        Ok(None)
    }
}

fn event(name: &str, data: &str) -> anyhow::Result<Option<Event>> {
    let unreadable = || format!("unreadable event `{name}` of the migration: {data}");
    match name {
        "phase" => Ok(Some(Event::Phase(serde_json::from_str(data).with_context(unreadable)?))),
        "finished" => Ok(Some(Event::Finished(serde_json::from_str(data).with_context(unreadable)?))),
        "error" => bail!("the load balancer reports: {data}"),
        // Comments keep the connection alive; further events may come with later versions.
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(text: &str) -> anyhow::Result<Vec<Event>> {
        let mut parser = Events::default();
        let events = text.lines().map(|line| parser.line(line)).collect::<anyhow::Result<Vec<_>>>()?;
        Ok(events.into_iter().flatten().collect())
    }

    #[test]
    fn phases_and_the_end_are_read() {
        let events = feed(concat!(
            "HTTP/1.0 200 OK\r\ncontent-type: text/event-stream\r\n\r\n",
            ": keep-alive\n\n",
            "event: phase\ndata: {\"name\":\"hold\",\"start_ms\":1.5}\n\n",
            "event: phase\ndata: {\"name\":\"hold\",\"start_ms\":1.5,\"end_ms\":2.5}\n\n",
            "event: finished\ndata: {\"id\":\"m-1\",\"from\":\"ams\",\"to\":\"fra\",\"state\":\"committed\",\n",
            "data: \"phases\":[{\"name\":\"hold\",\"start_ms\":1.5,\"end_ms\":2.5}],\n",
            "data: \"report\":{\"outcome\":\"committed\",\"freeze_ms\":9.5}}\n\n",
        ))
        .unwrap();
        let [Event::Phase(begun), Event::Phase(ended), Event::Finished(finished)] = &events[..] else {
            panic!("{events:?}");
        };
        assert_eq!((begun.end_ms, ended.end_ms), (None, Some(2.5)));
        let coordinated = finished.clone().coordinated();
        assert_eq!((coordinated.freeze_ms, coordinated.phases.len()), (9.5, 1));
    }

    #[test]
    fn refusals_and_damaged_events_are_errors() {
        assert!(feed("HTTP/1.0 404 Not Found\r\n\r\n").is_err());
        assert!(feed("HTTP/1.0 200 OK\r\n\r\nevent: finished\ndata: {}\n\n").is_err());
    }

    #[test]
    fn a_line_that_arrives_in_parts_is_one_line() {
        struct Parts(Vec<std::io::Result<&'static [u8]>>);
        impl Read for Parts {
            fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
                let part = if self.0.is_empty() { &b""[..] } else { self.0.remove(0)? };
                buffer[..part.len()].copy_from_slice(part);
                Ok(part.len())
            }
        }
        let late = || Err(std::io::ErrorKind::WouldBlock.into());
        let parts = Parts(vec![Ok(b"event: ph"), late(), Ok(b"ase\nda")]);
        let mut lines = Lines { reader: BufReader::new(parts), partial: Vec::new() };
        assert_eq!(lines.next().unwrap(), None);
        assert_eq!(lines.next().unwrap().as_deref(), Some("event: phase"));
        assert!(lines.next().is_err());
    }
}
