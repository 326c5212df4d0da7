//! The command line.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use bench::program::Output;
use clap::{Parser, Subcommand, ValueEnum};

use crate::systems::System;

/// Measures what carries packets between a client and a server: plain routing, nftables, haproxy, nginx and Drover, in
/// turn in network namespaces of this machine.
#[derive(Debug, Parser)]
#[command(
    name = "path",
    bin_name = "cargo xtask bench path",
    version,
    args_conflicts_with_subcommands = true
)]
pub struct Args {
    #[command(flatten)]
    pub output: Output,
    /// What to measure; default: all.
    #[arg(long, value_name = "A,B,...", value_delimiter = ',', value_parser = System::parse)]
    pub systems: Vec<System>,
    /// Which figures; default: all.
    #[arg(long, value_enum, value_name = "A,B,...", value_delimiter = ',')]
    pub metrics: Vec<Measurement>,
    /// How the links are set: as Drover's XDP program needs them, as each system does best; default: both.
    #[arg(long, value_enum, value_name = "A,B", value_delimiter = ',')]
    pub links: Vec<LinksChoice>,
    /// How many connections ask at once.
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', default_values_t = [1, 32, 1000],
          value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub connections: Vec<u32>,
    /// How often all are measured, in turn; figures are medians (default: 3).
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: Option<u32>,
    /// How long each measurement takes (default: 1).
    #[arg(long, value_name = "S", value_parser = seconds)]
    pub seconds: Option<f64>,
    /// One round of short measurements, in a minute or so.
    #[arg(long)]
    pub quick: bool,
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// One thing to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Measurement {
    /// Requests on connections that stay.
    Requests,
    /// New connections.
    Connections,
    /// Throughput of one TCP connection, each way.
    Tcp,
    /// UDP datagrams.
    Udp,
}

/// Value of `--links`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LinksChoice {
    /// As Drover's XDP program needs them on veth.
    Same,
    /// As each system does best.
    Best,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Started by the benchmark itself: one client or server.
    #[command(subcommand, hide = true)]
    Worker(Work),
}

/// What one worker does. It prints what came of it as one line of JSON.
#[derive(Debug, Subcommand)]
pub enum Work {
    /// Sends back what it receives, with every bit flipped, until it is killed.
    Serve {
        #[arg(long)]
        listen: SocketAddr,
    },
    /// Requests one after the other on each connection.
    Requests {
        #[command(flatten)]
        client: Client,
        #[arg(long)]
        connections: u32,
    },
    /// Connections with one request each.
    Connections {
        #[command(flatten)]
        client: Client,
        #[arg(long)]
        in_flight: u32,
    },
    /// Numbered datagrams.
    Send {
        #[command(flatten)]
        client: Client,
        #[arg(long)]
        flows: u32,
        #[arg(long)]
        bytes: usize,
    },
    /// Counts datagrams.
    Receive {
        #[arg(long)]
        listen: SocketAddr,
    },
}

/// What all clients know.
#[derive(Debug, clap::Args)]
pub struct Client {
    #[arg(long)]
    pub target: SocketAddr,
    #[arg(long, value_delimiter = ',')]
    pub sources: Vec<IpAddr>,
    #[arg(long)]
    pub warm_up_ms: u64,
    #[arg(long)]
    pub duration_ms: u64,
}

/// What `--quick` stands for.
const QUICK: (u32, f64) = (1, 0.3);
const DEFAULT: (u32, f64) = (3, 1.0);

impl Args {
    /// Rounds, given or by default.
    pub fn rounds(&self) -> u32 {
        self.rounds.unwrap_or(if self.quick { QUICK.0 } else { DEFAULT.0 })
    }

    /// Length of a measurement, given or by default.
    pub fn duration(&self) -> Duration {
        Duration::from_secs_f64(self.seconds.unwrap_or(if self.quick { QUICK.1 } else { DEFAULT.1 }))
    }

    /// Whether this is to be measured.
    pub fn wants(&self, measurement: Measurement) -> bool {
        self.metrics.is_empty() || self.metrics.contains(&measurement)
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.05..=600.0).contains(&seconds) => Ok(seconds),
        _ => Err("expected seconds: at least 0.05, at most 600".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn lists_are_read_and_nonsense_is_refused() {
        let args =
            Args::parse_from(["path", "--systems", "routing,nft-dnat", "--metrics", "tcp,udp", "--quick"]);
        assert_eq!(args.systems.len(), 2);
        assert!(args.wants(Measurement::Udp) && !args.wants(Measurement::Requests));
        assert_eq!((args.rounds(), args.duration()), (1, Duration::from_millis(300)));
        for words in [["--systems", "ipvs"], ["--seconds", "0"], ["--rounds", "0"], ["--connections", "0"]] {
            assert!(Args::try_parse_from(["path"].iter().chain(&words)).is_err(), "{words:?}");
        }
    }
}
