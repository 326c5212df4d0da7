//! The command line: `lb run`, `lb status`, `lb flows`, `lb top`, `lb capture`, `lb reload`, `lb drain`,
//! `lb migrate`, `lb migrations`, `lb migration`.
//!
//! What lives here: arguments, what is shown, exit codes. The daemon is `run`, the requests are `client`.

mod capture;
mod drain;
mod flows;
mod migrate;
mod migrations;
mod reload;
mod status;
mod text;
mod top;

pub(crate) use text::chain;

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use tracing_subscriber::EnvFilter;

use crate::client::{AdminClient, ClientError};
use crate::config::{LoadError, MAX_DEADLINE_MS};
use crate::control::Policy;
use crate::run::{self, RunError};

/// Drover's load balancer: keeps clients connected while the server behind it moves to another site.
#[derive(Debug, Parser)]
#[command(name = "lb", version, about)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the load balancer.
    ///
    /// Attaches to the interfaces, takes over what a former run left pinned, and serves the admin API. SIGTERM
    /// and SIGINT stop it; packets keep flowing without it. RUST_LOG sets what is logged (default: info).
    Run(RunArgs),
    /// Show hooks, backends and migrations of a running load balancer.
    Status(StatusArgs),
    /// Have a running load balancer read its configuration again and apply what differs.
    ///
    /// Connections stay. Nothing is applied unless all of it can be; so does SIGHUP, which answers in the log.
    Reload(ReloadArgs),
    /// Give a backend no new connections; those that it has stay.
    ///
    /// It stays so over reloads and restarts, until `lb undrain`.
    Drain(DrainArgs),
    /// Give a drained backend new connections again.
    Undrain(DrainArgs),
    /// Show the connections that are carried.
    Flows(flows::FlowsArgs),
    /// Show what is carried right now, by service and backend.
    Top(top::TopArgs),
    /// Capture packets at the load balancer's verdict, with the reason as each packet's comment (pcap-ng).
    ///
    /// To watch live: lb capture -w - | wireshark -k -i -
    Capture(capture::CaptureArgs),
    /// Move a backend to another site and watch it go.
    ///
    /// Exit code: 0 the backend runs at the new site, 1 it was rolled back and runs where it was, 2 nothing was
    /// started (wrong arguments, refused, or the load balancer cannot be reached), 3 the outcome is in doubt.
    Migrate(MigrateArgs),
    /// Show the migrations that are under way and those that have ended.
    Migrations(migrations::MigrationsArgs),
    /// Show one migration, call it off, or say how one in doubt ends.
    Migration(migrations::MigrationArgs),
}

#[derive(Debug, Args)]
struct RunArgs {
    /// The configuration (TOML).
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

#[derive(Debug, Args)]
struct AdminArgs {
    /// The load balancer's admin API.
    #[arg(long, value_name = "URL", env = "DROVER_ADMIN", default_value = "http://127.0.0.1:7400")]
    admin: String,
}

#[derive(Debug, Args)]
struct StatusArgs {
    #[command(flatten)]
    admin: AdminArgs,
    /// Print what the API answered, as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct ReloadArgs {
    #[command(flatten)]
    admin: AdminArgs,
    /// Only say what would change.
    #[arg(long)]
    check: bool,
}

#[derive(Debug, Args)]
struct DrainArgs {
    /// The backend.
    backend: String,
    #[command(flatten)]
    admin: AdminArgs,
}

#[derive(Debug, Args)]
struct MigrateArgs {
    /// The backend that is to move.
    backend: String,
    /// The site where it is to go.
    #[arg(long, value_name = "SITE")]
    to: String,
    #[command(flatten)]
    admin: AdminArgs,
    /// What happens to clients' packets meanwhile: kept and sent on, or dropped (TCP sends them again).
    #[arg(long, value_enum, default_value_t = PolicyArg::Hold)]
    policy: PolicyArg,
    /// How long packets may be held before the migration is rolled back [default: the load balancer's].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=MAX_DEADLINE_MS))]
    deadline_ms: Option<u64>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum PolicyArg {
    Hold,
    Drop,
}

impl From<PolicyArg> for Policy {
    fn from(policy: PolicyArg) -> Self {
        match policy {
            PolicyArg::Hold => Self::Hold,
            PolicyArg::Drop => Self::Drop,
        }
    }
}

/// Exit code of a command that was told something wrong or cannot reach the load balancer.
const NOT_DONE: u8 = 2;

/// Does what the arguments say.
pub fn main(cli: Cli) -> ExitCode {
    let quiet = !matches!(cli.command, Command::Run(_));
    let level = if quiet { "warn" } else { "info" };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&error, 1),
    };
    let code = runtime.block_on(async {
        match cli.command {
            Command::Run(args) => match run::run(&args.config).await {
                Ok(()) => ExitCode::SUCCESS,
                Err(RunError::Config(LoadError::Invalid(errors))) => {
                    eprintln!("error: the configuration cannot be used\n{errors}");
                    ExitCode::from(NOT_DONE)
                }
                Err(error @ RunError::Config(_)) => failed(&error, NOT_DONE),
                Err(error) => failed(&error, 1),
            },
            Command::Status(args) => {
                let show = async {
                    let client = AdminClient::new(&args.admin.admin)?;
                    status::show(&client, args.json).await
                };
                show.await.map_or_else(|error| failed(&error, NOT_DONE), |()| ExitCode::SUCCESS)
            }
            Command::Reload(args) => done(reload::command(&args).await),
            Command::Drain(args) => done(drain::command(&args, true).await),
            Command::Undrain(args) => done(drain::command(&args, false).await),
            Command::Flows(args) => done(flows::show(&args).await),
            Command::Top(args) => done(top::show(&args).await),
            Command::Capture(args) => capture::command(args).await,
            Command::Migrate(args) => migrate::command(args).await,
            Command::Migrations(args) => done(migrations::list(&args).await),
            Command::Migration(args) => done(migrations::one(&args).await),
        }
    });
    // Threads that wait for something must not keep the process.
    runtime.shutdown_background();
    code
}

/// The exit code of a request.
fn done(result: Result<(), ClientError>) -> ExitCode {
    result.map_or_else(|error| failed(&error, NOT_DONE), |()| ExitCode::SUCCESS)
}

/// Says what went wrong, with what is behind it.
fn failed(error: &dyn std::error::Error, code: u8) -> ExitCode {
    eprintln!("error: {}", text::chain(error));
    ExitCode::from(code)
}

#[cfg(test)]
mod tests;
