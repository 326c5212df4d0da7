//! Clients and servers, each a process of its own: `path worker ...`.

use std::time::Duration;

use anyhow::Context;
use bench::path::connections::Connections;
use bench::path::datagrams::{Receiver, Send};
use bench::path::requests::Requests;
use bench::server::{Flip, Server};
use serde::Serialize;

use crate::args::{Client, Work};

/// How long a receiver waits for the next datagram, or for the first.
const SILENCE: Duration = Duration::from_secs(3);

/// Does it, and prints what came of it.
pub fn run(work: &Work) -> anyhow::Result<()> {
    match work {
        Work::Serve { listen } => Ok(Server::bind(*listen, Flip)?.run()?),
        Work::Requests { client, connections } => {
            let Client { target, sources, .. } = client;
            let (warm_up, duration) = times(client);
            let connections = *connections;
            say(&Requests { target: *target, sources: sources.clone(), connections, warm_up, duration }
                .run()?)
        }
        Work::Connections { client, in_flight } => {
            let Client { target, sources, .. } = client;
            let (warm_up, duration) = times(client);
            let in_flight = *in_flight;
            say(&Connections { target: *target, sources: sources.clone(), in_flight, warm_up, duration }
                .run()?)
        }
        Work::Send { client, flows, bytes } => {
            let Client { target, sources, .. } = client;
            let (flows, bytes, duration) = (*flows, *bytes, times(client).1);
            say(&Send { target: *target, sources: sources.clone(), flows, bytes, duration }.run()?)
        }
        Work::Receive { listen } => {
            let receiver = Receiver::bind(*listen)?;
            say(&receiver.run(SILENCE)?)
        }
    }
}

fn times(client: &Client) -> (Duration, Duration) {
    (Duration::from_millis(client.warm_up_ms), Duration::from_millis(client.duration_ms))
}

fn say(result: &impl Serialize) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string(result).context("cannot write the result as JSON")?);
    Ok(())
}
