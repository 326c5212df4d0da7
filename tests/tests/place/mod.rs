//! A stack with one server of other make that moves there and back.

use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use lab::stack::{HoldOptions, Mode, Protocol, Runner, Stack, StackOptions, Workload};
use lab::{Lab, Site, address, wait_for};
use serde_json::Value;

pub const LIMIT: Duration = Duration::from_secs(30);
/// Between two moves.
const PAUSE: Duration = Duration::from_millis(150);

/// A stack with one server.
pub struct Place {
    pub stack: Stack,
    pub name: &'static str,
    pub service: SocketAddr,
}

impl Place {
    /// With the server that the command starts in the lab's folder at this address. `hold`: what is not said for all.
    pub fn start(
        name: &'static str,
        port: u16,
        hold: HoldOptions,
        command: impl FnOnce(&Path, SocketAddr) -> Vec<String>,
    ) -> Self {
        let lab = Lab::new().unwrap();
        let address = SocketAddr::new(address::backend4(1).into(), port);
        let service = SocketAddr::new(address::VIRTUAL4.into(), port);
        let workload = Workload {
            name: name.to_owned(),
            address,
            protocol: Protocol::Tcp,
            command: command(lab.dir(), address),
            dir: None,
            site: Site::A,
            service,
            mode: Mode::Nat,
            memory: lab::stack::Memory::Auto,
            runner: Runner::Agent,
        };
        let hold = HoldOptions { deadline_ms: Some(15_000), max_age_ms: Some(20_000), ..hold };
        let options = StackOptions { workloads: vec![workload], hold, ..StackOptions::default() };
        let stack = Stack::start(lab, options).unwrap();
        let place = Self { stack, name, service };
        wait_for(LIMIT, || place.dial().ok()).expect("the server takes connections");
        place
    }

    /// A client's connection.
    pub fn dial(&self) -> std::io::Result<TcpStream> {
        let stream = self.stack.lab().client().run(|| TcpStream::connect_timeout(&self.service, LIMIT))?;
        stream.set_read_timeout(Some(LIMIT))?;
        Ok(stream)
    }

    /// Moves there and back so many times, each time committed.
    pub fn moves(&self, times: usize) {
        for number in 0..times {
            let to = if number % 2 == 0 { Site::B } else { Site::A };
            let id = self.stack.start_migration(self.name, to, &Value::Null).unwrap();
            let migration = self.stack.finished_migration(&id, LIMIT).unwrap();
            assert_eq!(migration["state"], "committed", "move {number}: {migration:#}");
            std::thread::sleep(PAUSE);
        }
    }
}
