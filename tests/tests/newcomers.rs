//! Clients that connect while their server moves: none of them gets a reset, and none is forgotten.

#![expect(clippy::unwrap_used, reason = "a test states what it expects by unwrapping")]

mod connectors;
mod place;

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use connectors::Connectors;
use lab::Site;
use lab::stack::{HoldOptions, Workload};
use lab::wait_for;
use place::{LIMIT, Place};
use serde_json::Value;

const PORT: u16 = 6379;
const MOVES: usize = 10;
/// Clients that open one connection after the other, and what each of them waits in between: several hundred a second.
const CLIENTS: usize = 8;
const PAUSE: Duration = Duration::from_millis(8);
/// Longer than the second after which a kernel says its SYN-ACK again.
const LONG_HANDSHAKES_MS: u64 = 3_000;

/// A server that takes connections and answers.
fn server(hold: HoldOptions) -> Place {
    Place::start("redis-1", PORT, hold, |_, _| Workload::redis(1).command)
}

fn ping(stream: &mut TcpStream) -> io::Result<()> {
    stream.write_all(b"PING\r\n")?;
    let mut answer = [0; 7];
    stream.read_exact(&mut answer)?;
    if &answer == b"+PONG\r\n" { Ok(()) } else { Err(io::Error::other(format!("{answer:?}"))) }
}

#[test]
fn a_server_that_moves_under_hundreds_of_new_connections_a_second_takes_them_all() {
    let place = server(HoldOptions::default());
    let clients = Connectors::start(&place, CLIENTS, PAUSE, ping);
    place.moves(MOVES);
    clients.all_were_served(1000);
}

#[test]
fn a_handshake_that_is_under_way_ends_before_everything_is_held() {
    let place = server(HoldOptions { handshakes_ms: Some(LONG_HANDSHAKES_MS), ..HoldOptions::default() });
    let client = place.stack.lab().client();
    let nft = |rules: &str| {
        let output = client.command("nft").arg(rules).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    // The client does not hear the server yet: its connection is half open there.
    nft(&format!(
        "add table ip deaf; add chain ip deaf in {{ type filter hook input priority 0; }}; \
         add rule ip deaf in tcp sport {PORT} tcp flags & (syn | ack) == (syn | ack) drop"
    ));
    std::thread::scope(|scope| {
        let connecting = scope.spawn(|| place.dial());
        std::thread::sleep(Duration::from_millis(100));
        let id = place.stack.start_migration(place.name, Site::B, &Value::Null).unwrap();
        let holding = wait_for(LIMIT, || {
            let (_, backend) = place.stack.admin("GET", "/v1/backends/redis-1", None).unwrap();
            (backend["gate"] == "hold_new").then_some(())
        });
        assert!(holding.is_some(), "new connections are held first");
        // The next one has to wait, and gets through afterwards.
        nft("delete table ip deaf");
        let next = scope.spawn(|| place.dial());
        let mut stream = connecting.join().unwrap().unwrap();
        ping(&mut stream).unwrap();
        assert!(!next.is_finished(), "its SYN is held");
        let migration = place.stack.finished_migration(&id, LIMIT).unwrap();
        assert_eq!(migration["state"], "committed", "{migration:#}");
        ping(&mut stream).unwrap();
        ping(&mut next.join().unwrap().unwrap()).unwrap();
    });
}
