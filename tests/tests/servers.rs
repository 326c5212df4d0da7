//! Servers of other make move there and back, twenty moves in a row, under clients of their own kind: nothing lost,
//! nothing twice, no connection broken.

#![expect(clippy::unwrap_used, reason = "a test states what it expects by unwrapping")]

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use lab::stack::{HoldOptions, Mode, Protocol, Stack, StackOptions, Workload};
use lab::{Lab, Site, address, wait_for};
use serde_json::Value;

const MOVES: usize = 20;
const LIMIT: Duration = Duration::from_secs(30);
/// Between two moves.
const PAUSE: Duration = Duration::from_millis(150);

/// A stack with one server.
struct Place {
    stack: Stack,
    name: &'static str,
    service: SocketAddr,
}

impl Place {
    fn start(name: &'static str, port: u16, command: impl FnOnce(&Path, SocketAddr) -> Vec<String>) -> Self {
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
            is_container: false,
        };
        let hold =
            HoldOptions { deadline_ms: Some(15_000), max_age_ms: Some(20_000), ..HoldOptions::default() };
        let options = StackOptions { workloads: vec![workload], hold, ..StackOptions::default() };
        let stack = Stack::start(lab, options).unwrap();
        let place = Self { stack, name, service };
        wait_for(LIMIT, || place.dial().ok()).expect("the server takes connections");
        place
    }

    fn dial(&self) -> std::io::Result<TcpStream> {
        let stream = self.stack.lab().client().run(|| TcpStream::connect_timeout(&self.service, LIMIT))?;
        stream.set_read_timeout(Some(LIMIT))?;
        Ok(stream)
    }

    /// Moves there and back, each time committed.
    fn moves(&self) {
        for number in 0..MOVES {
            let to = if number % 2 == 0 { Site::B } else { Site::A };
            let id = self.stack.start_migration(self.name, to, &Value::Null).unwrap();
            let migration = self.stack.finished_migration(&id, LIMIT).unwrap();
            assert_eq!(migration["state"], "committed", "move {number}: {migration:#}");
            std::thread::sleep(PAUSE);
        }
    }

    /// Addresses of the clients that are connected.
    fn clients(&self) -> Vec<String> {
        let path = format!("/v1/flows?backend={}", self.name);
        let (_, answer) = self.stack.admin("GET", &path, None).unwrap();
        let established = answer["flows"].as_array().unwrap().iter();
        let established = established.filter(|flow| flow["state"] == "established");
        let mut clients: Vec<String> =
            established.map(|flow| flow["client"].as_str().unwrap().to_owned()).collect();
        clients.sort();
        clients
    }
}

/// Ends a client when a test is over, however it ends.
struct Client(Child);

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn mosquitto_moves_and_every_message_of_qos_1_arrives_once_and_in_order() {
    let place = Place::start("broker", 1883, |dir, address| {
        let config = dir.join("mosquitto.conf");
        let (ip, port) = (address.ip(), address.port());
        // Another user's limits take a capability that a restore may not have.
        let text = format!("listener {port} {ip}\nallow_anonymous true\nuser root\npersistence false\n");
        std::fs::write(&config, text).unwrap();
        ["mosquitto", "-c", config.to_str().unwrap()].map(str::to_owned).to_vec()
    });
    let client = |program: &str, arguments: &[&str]| {
        let mut command = place.stack.lab().client().command(program);
        let (host, port) = (place.service.ip().to_string(), place.service.port().to_string());
        command.args(["-h", &host, "-p", &port, "-t", "numbers", "-q", "1"]).args(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        Client(command.spawn().unwrap())
    };
    let mut subscriber = client("mosquitto_sub", &["-i", "subscriber", "-c"]);
    wait_for(LIMIT, || (place.clients().len() == 1).then_some(())).expect("the subscriber is connected");
    let mut publisher = client("mosquitto_pub", &["-i", "publisher", "-l"]);
    wait_for(LIMIT, || (place.clients().len() == 2).then_some(())).expect("the publisher is connected");
    let before = place.clients();

    let (stop, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut numbers = publisher.0.stdin.take().unwrap();
    let mut heard = BufReader::new(subscriber.0.stdout.take().unwrap()).lines();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Relaxed) {
                writeln!(numbers, "{}", sent.fetch_add(1, Relaxed)).unwrap();
                std::thread::sleep(Duration::from_millis(2));
            }
            writeln!(numbers, "end").unwrap();
        });
        // Whatever fails, the other thread must end.
        let moved = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| place.moves()));
        stop.store(true, Relaxed);
        moved.unwrap();
    });
    let mut next = 0;
    let end = heard.find_map(|line| {
        let line = line.unwrap();
        if line == "end" {
            return Some(());
        }
        assert_eq!(line, next.to_string(), "each once and in order");
        next += 1;
        None
    });
    assert!(end.is_some(), "the subscriber ended after {next} messages");
    assert_eq!(next, sent.load(Relaxed));
    assert!(next > 500, "{next}");
    assert_eq!(place.clients(), before, "over the same connections");
}

#[test]
fn nginx_moves_with_four_workers_in_the_middle_of_a_download() {
    const BYTES: usize = 24 << 20;
    let mut content = vec![0; BYTES];
    File::open("/dev/urandom").unwrap().read_exact(&mut content).unwrap();
    let place = Place::start("web", 8080, |dir, address| {
        let (config, files) = (dir.join("nginx.conf"), dir.join("files"));
        std::fs::create_dir(&files).unwrap();
        std::fs::write(files.join("large"), &content).unwrap();
        std::fs::write(files.join("small"), "small").unwrap();
        let text = format!(
            "user root;\nworker_processes 4;\ndaemon off;\npid {dir}/nginx.pid;\nerror_log {dir}/nginx.log;\n\
             events {{ worker_connections 256; }}\n\
             http {{ access_log off; server {{ listen {address}; root {dir}/files; keepalive_requests 100000;\n\
             location /large {{ limit_rate 1m; }} }} }}\n",
            dir = dir.display()
        );
        std::fs::write(&config, text).unwrap();
        let prefix = dir.to_str().unwrap();
        ["nginx", "-p", prefix, "-c", config.to_str().unwrap()].map(str::to_owned).to_vec()
    });
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let download = scope.spawn(|| {
            let mut stream = BufReader::new(place.dial().unwrap());
            stream.get_mut().write_all(b"GET /large HTTP/1.1\r\nHost: web\r\n\r\n").unwrap();
            assert_eq!(body_length(&mut stream), BYTES);
            let mut got = vec![0; BYTES];
            stream.read_exact(&mut got).unwrap();
            got
        });
        let small = scope.spawn(|| {
            let mut stream = BufReader::new(place.dial().unwrap());
            let mut answers = 0;
            while !stop.load(Relaxed) {
                stream.get_mut().write_all(b"GET /small HTTP/1.1\r\nHost: web\r\n\r\n").unwrap();
                assert_eq!(body_length(&mut stream), 5);
                let mut got = [0; 5];
                stream.read_exact(&mut got).unwrap();
                assert_eq!(&got, b"small");
                answers += 1;
                std::thread::sleep(Duration::from_millis(2));
            }
            answers
        });
        let moved = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| place.moves()));
        let lasted = !download.is_finished();
        stop.store(true, Relaxed);
        moved.unwrap();
        assert!(lasted, "the download lasts longer than the moves");
        assert!(small.join().unwrap() > 500);
        assert!(download.join().unwrap() == content, "the file arrived as it is");
    });
}

/// Reads an answer's head; says how long its body is.
fn body_length(stream: &mut impl BufRead) -> usize {
    let (mut length, mut line) = (None, String::new());
    loop {
        line.clear();
        assert!(stream.read_line(&mut line).unwrap() > 0, "the connection was closed");
        if line.starts_with("HTTP/") {
            assert!(line.contains(" 200 "), "{line}");
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = Some(value.trim().parse().unwrap());
        }
        if line == "\r\n" {
            return length.expect("the answer says its length");
        }
    }
}
