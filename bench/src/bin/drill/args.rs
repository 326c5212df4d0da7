//! The command line.

use std::path::PathBuf;

use bench::scenario::Scenario;
use clap::{Parser, ValueEnum};

/// Moves a live server between two sites of a lab, there and back, while clients keep it busy, and reports
/// what they saw.
#[derive(Debug, Parser)]
#[command(name = "drill", version)]
pub struct Args {
    /// Which server moves.
    #[arg(long, value_enum, default_value_t = ScenarioName::Redis)]
    pub scenario: ScenarioName,
    /// How many clients there are (default: redis 200, openarena 16).
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub clients: Option<u32>,
    /// Messages a second, all clients together (default: redis 2000, openarena 8).
    #[arg(long, value_name = "MSG_PER_S", value_parser = rate)]
    pub rate: Option<f64>,
    /// How many times it moves.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    pub migrations: u32,
    /// What the load balancer does with packets while nobody can take them.
    #[arg(long, value_enum, default_value_t = Policy::Hold)]
    pub policy: Policy,
    /// How the load balancer carries packets.
    #[arg(long, value_enum, default_value_t = Datapath::Xdp)]
    pub datapath: Datapath,
    /// Writes the drill report here, as JSON.
    #[arg(long, value_name = "FILE.json")]
    pub report: Option<PathBuf>,
    /// No lab, no load balancer, no migration: clients talk straight to a server on loopback. Shows what the
    /// measuring itself costs.
    #[arg(long)]
    pub direct: bool,
    /// How long clients talk with --direct.
    #[arg(long, value_name = "N", default_value_t = 5, requires = "direct",
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub seconds: u64,
}

/// Value of `--scenario`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ScenarioName {
    /// A redis server and TCP clients that count.
    Redis,
    /// An OpenArena game server and UDP clients that query it.
    #[value(name = "openarena")]
    OpenArena,
}

/// Value of `--policy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Policy {
    /// Keeps them and sends them on.
    Hold,
    /// Drops them; TCP sends again.
    Drop,
}

/// Value of `--datapath`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Datapath {
    /// In the kernel, before its network stack.
    Xdp,
    /// In user space; not available yet.
    Proxy,
}

impl Args {
    /// The server that moves.
    pub fn scenario(&self) -> Scenario {
        match self.scenario {
            ScenarioName::Redis => Scenario::Redis,
            ScenarioName::OpenArena => Scenario::OpenArena,
        }
    }

    /// Clients, given or by default.
    pub fn clients(&self) -> u32 {
        self.clients.unwrap_or_else(|| self.scenario().default_clients())
    }

    /// Messages a second, given or by default.
    pub fn rate_per_s(&self) -> f64 {
        self.rate.unwrap_or_else(|| self.scenario().default_rate_per_s())
    }
}

impl Policy {
    /// As the admin API and the report have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hold => "hold",
            Self::Drop => "drop",
        }
    }
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(rate) if rate > 0.0 && rate <= 1e6 => Ok(rate),
        _ => Err("expected messages a second: more than 0, at most 1000000".to_owned()),
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
    fn defaults_follow_the_scenario() {
        let redis = Args::parse_from(["drill"]);
        assert_eq!((redis.clients(), redis.rate_per_s(), redis.migrations), (200, 2000.0, 2));
        assert_eq!((redis.policy, redis.datapath), (Policy::Hold, Datapath::Xdp));
        let game = Args::parse_from(["drill", "--scenario", "openarena", "--clients", "3"]);
        assert_eq!((game.clients(), game.rate_per_s()), (3, 8.0));
    }

    #[test]
    fn nonsense_is_refused() {
        for words in [
            &["--rate", "0"][..],
            &["--rate", "NaN"],
            &["--rate", "1e7"],
            &["--clients", "0"],
            &["--policy", "pray"],
            &["--seconds", "3"],
        ] {
            let line = ["drill"].iter().chain(words);
            assert!(Args::try_parse_from(line).is_err(), "{words:?}");
        }
    }
}
