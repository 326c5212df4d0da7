//! The command line.

use std::net::SocketAddr;
use std::time::Duration;

use bench::moves::case::{Case, Wish};
use bench::program::Output;
use clap::{Parser, Subcommand};

use crate::systems::System;

/// Measures what clients feel while a server with memory and connections is moved between two sites of a lab: by Drover,
/// by a script around CRIU as people write it today, and by runc.
///
/// `drover-pre` sends all memory before or while the server is frozen, `drover-post` most of it once it runs at the other
/// site.
///
/// The systems take turns at each case. Each moves the same server there and back, over the same link between the sites
/// (emulated where it has a delay or a rate), under the same clients.
#[derive(Debug, Parser)]
#[command(
    name = "moves",
    bin_name = "cargo xtask bench migrate",
    version,
    args_conflicts_with_subcommands = true
)]
pub struct Args {
    #[command(flatten)]
    pub output: Output,
    /// Measures these cases instead of the usual ones; may be given several times.
    ///
    /// AXIS is system (drover-pre, drover-post, script, runc), size (resident MB), connections, dirty (percent of the pages rewritten each
    /// second), delay (ms, one way) or rate (Mb/s, or unlimited). VALUE may be several with / between them, or * for 10,
    /// 100 and 1000 MB, 1, 1000 and 5000 connections, 0, 5 and 20 percent, 0 and 40 ms, unlimited, 1000 and 100 Mb/s. What
    /// is left out is 10 MB, 1 connection, 0 percent, 0 ms, unlimited.
    #[arg(long = "case", value_name = "AXIS=VALUE,...", value_parser = wish)]
    pub wishes: Vec<Wish>,
    /// How often each system moves the server in each case (default: 5; from 1000 MB on 3).
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub moves: Option<u32>,
    /// After so many minutes no further move begins, and cases that were not reached are named; 0: without end.
    #[arg(long, value_name = "N", default_value_t = 15)]
    pub minutes: u64,
    /// Two small cases with two moves each: shows that everything works.
    #[arg(long, conflicts_with = "wishes")]
    pub quick: bool,
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// What else the program does.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// The server that is moved; started by the benchmark itself.
    #[command(hide = true)]
    Serve {
        #[arg(long)]
        listen: SocketAddr,
        #[arg(long)]
        resident_mb: u32,
        #[arg(long)]
        dirty_pct: f64,
    },
}

/// From this size on a move takes seconds.
const LARGE_MB: u32 = 1000;
const MOVES: u32 = 5;
const MOVES_OF_LARGE: u32 = 3;
const MOVES_OF_QUICK: u32 = 2;

impl Args {
    /// The cases in order, each with its systems.
    pub fn cases(&self) -> Vec<(Case, Vec<System>)> {
        let all = || System::ALL.to_vec();
        if self.quick {
            return Case::quick_set().into_iter().map(|case| (case, all())).collect();
        }
        if self.wishes.is_empty() {
            return Case::default_set().into_iter().map(|case| (case, all())).collect();
        }
        let mut cases: Vec<(Case, Vec<System>)> = Vec::new();
        for wish in &self.wishes {
            let named = |system: &System| {
                wish.systems.is_empty() || wish.systems.iter().any(|name| name == system.name())
            };
            for case in &wish.cases {
                let systems = System::ALL.into_iter().filter(named);
                match cases.iter_mut().find(|(found, _)| found == case) {
                    Some((_, known)) => {
                        let new: Vec<_> = systems.filter(|system| !known.contains(system)).collect();
                        known.extend(new);
                    }
                    None => cases.push((*case, systems.collect())),
                }
            }
        }
        cases
    }

    /// Moves of each system in a case.
    pub fn moves(&self, case: &Case) -> u32 {
        self.moves.unwrap_or(match case.resident_mb {
            _ if self.quick => MOVES_OF_QUICK,
            LARGE_MB.. => MOVES_OF_LARGE,
            _ => MOVES,
        })
    }

    /// How long moves may begin.
    pub fn limit(&self) -> Duration {
        if self.minutes == 0 { Duration::MAX } else { Duration::from_secs(self.minutes.saturating_mul(60)) }
    }
}

fn wish(text: &str) -> Result<Wish, String> {
    let wish: Wish = text.parse()?;
    match wish.systems.iter().find(|name| System::find(name).is_none()) {
        Some(unknown) => Err(format!(
            "there is no system {unknown:?}: expected {}",
            System::ALL.map(System::name).join(", ")
        )),
        None => Ok(wish),
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
    fn wishes_for_the_same_case_are_one_case() {
        let args = Args::parse_from([
            "moves",
            "--case",
            "system=drover-post",
            "--case",
            "system=runc/drover-pre,size=10/100",
        ]);
        let cases = args.cases();
        let told: Vec<_> = cases.iter().map(|(case, systems)| (case.resident_mb, systems.len())).collect();
        assert_eq!(told, [(10, 3), (100, 2)]);
        assert_eq!(args.limit(), Duration::from_secs(900));
    }

    #[test]
    fn a_large_server_moves_less_often_unless_told_otherwise() {
        let moves = |words: &[&str], resident_mb| {
            let args = Args::parse_from(["moves"].iter().chain(words));
            args.moves(&Case { resident_mb, ..bench::moves::case::SMALL })
        };
        assert_eq!((moves(&[], 10), moves(&[], 1000)), (5, 3));
        assert_eq!((moves(&["--moves", "9"], 1000), moves(&["--quick"], 10)), (9, 2));
    }

    #[test]
    fn nonsense_is_refused() {
        for words in [
            &["--case", "system=vmotion"][..],
            &["--case", "size=0"],
            &["--moves", "0"],
            &["--quick", "--case", "size=1"],
        ] {
            assert!(Args::try_parse_from(["moves"].iter().chain(words)).is_err(), "{words:?}");
        }
    }
}
