//! `migrate`: the site agent's program, and the two small helpers that it starts itself as.

mod pki;

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use migrate::agent::config::Config;
use migrate::agent::door::Door;
use migrate::agent::server;
use migrate::agent::site::Site;
use migrate::client::AgentAt;
use migrate::criu::relay;
use migrate::memory::pager;
use migrate::tls::Files;
use migrate::workload::enter::{self, What};
use migrate::workload::holder::HolderPid;
use migrate::workload::init;
use migrate::workload::user::Identity;
use migrate::workload::watcher;

/// Moves running servers between sites, with their connections.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a site's agent: it starts the site's workloads, and moves them when the load balancer asks.
    ///
    /// The agent and its workloads live in the network namespace that it is started in. Workloads outlive the
    /// agent; one that is started again adopts them. It needs root, CRIU (4.2 or newer) and nft. Load balancer
    /// and agents show each other certificates, which `migrate pki` makes.
    ///
    ///     site = "ams"                       # the site's name in the load balancer
    ///     listen = "10.2.1.1:7401"           # reachable by the load balancer and the other sites' agents
    ///     state_dir = "/run/drover/ams"      # optional; images are kept below it in memory
    ///     criu = ["criu"]                    # optional
    ///     runc = "runc"                      # optional: the program that runs containers
    ///     podman = ["podman"]                # optional: and what stands before each of its commands
    ///     spare_memory_mib = 64              # optional: available memory that a migration has to leave
    ///     [tls]                              # insecure = true instead of it: whoever reaches the agent commands it
    ///     ca = "/etc/drover/ca.pem"
    ///     certificate = "/etc/drover/agent-ams.pem"
    ///     key = "/etc/drover/agent-ams.key"
    ///     [decapsulator]                     # optional: for services of mode "dsr", where there is no tunnel device
    ///     interfaces = ["eth0"]              # where the load balancer's packets come in
    ///     endpoints = ["10.2.1.2"]           # `tunnel` of this site in the load balancer
    ///     from = ["10.2.1.254"]              # optional: whose packets are taken
    ///     hook = "auto"                      # or "xdp", "tc"
    ///     [[workloads]]
    ///     name = "chat-1"                    # the backend's name in the load balancer
    ///     address = "10.1.0.1:6379"          # what its sockets are bound to, the same at every site
    ///     protocol = "tcp"
    ///     command = ["redis-server", "--port", "6379", "--bind", "10.1.0.1"]
    ///     dir = "/srv/chat"                  # optional working directory
    ///     log = "/srv/chat/log"              # optional; the same file at every site
    ///     start = true                       # start it here
    ///     user = "redis"                     # optional: a name, UID or UID:GID; by default the agent's, root
    ///     env = { LANG = "C.UTF-8" }         # optional: set besides the agent's own environment
    ///     memory = "auto"                    # optional: "pre" sends all of it in the freeze; "post" fetches most of
    ///                                        # it after the restore; "auto" does that from 4 MiB on
    ///     [workloads.cgroup]                 # optional
    ///     path = "drover/chat-1"             # below the root of the host's hierarchies, of version 1 or 2
    ///     memory_max_mib = 512               # optional
    ///     pids_max = 100                     # optional; threads count too
    ///     [[workloads]]                      # a container of runc's, instead of a program
    ///     name = "chat-2"
    ///     address = "10.1.0.2:6379"
    ///     protocol = "tcp"
    ///     runc = { bundle = "/srv/chat-2" }  # optional: container = "NAME", by default the workload's
    ///     [[workloads]]                      # a container of podman's, created at every site
    ///     name = "chat-3"
    ///     address = "10.1.0.3:6379"
    ///     protocol = "tcp"
    ///     podman = {}                        # optional: container = "NAME", by default the workload's
    #[command(verbatim_doc_comment)]
    Agent {
        /// The agent's configuration.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Make the certificates with which load balancer and agents know each other.
    #[command(subcommand)]
    Pki(pki::Pki),
    /// Make a pid namespace for a workload. The agent does this.
    #[command(hide = true)]
    Holder {
        #[arg(long)]
        first_pid: Option<u32>,
        #[arg(long)]
        kernel_cache: Option<PathBuf>,
    },
    /// Be pid 1 of a workload's namespaces.
    #[command(hide = true)]
    Init {
        #[arg(long)]
        first_pid: Option<u32>,
        #[arg(long)]
        kernel_cache: Option<PathBuf>,
    },
    /// Watch a container that its own monitor keeps.
    #[command(hide = true)]
    Watcher {
        #[arg(long)]
        monitor: HolderPid,
    },
    /// Start something inside a workload's namespaces.
    #[command(hide = true)]
    Enter {
        #[arg(long)]
        holder: HolderPid,
        #[arg(long)]
        cgroup: Vec<PathBuf>,
        #[command(subcommand)]
        what: EnterWhat,
    },
    /// Bring a restored workload's memory from the source.
    #[command(hide = true)]
    Pager {
        #[arg(long)]
        id: String,
        #[arg(long)]
        folder: PathBuf,
        #[arg(long)]
        source_site: String,
        #[arg(long)]
        source_url: String,
        #[arg(long, num_args = 3, value_names = ["CA", "CERTIFICATE", "KEY"])]
        tls: Option<Vec<PathBuf>>,
    },
    /// Start a workload, inside its namespaces.
    #[command(hide = true)]
    Launch {
        #[arg(long)]
        dir: PathBuf,
        #[arg(long)]
        log: Option<PathBuf>,
        #[arg(long)]
        user: Option<Identity>,
        #[arg(last = true)]
        argv: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
enum EnterWhat {
    Runtime {
        #[arg(last = true)]
        argv: Vec<String>,
    },
    Criu {
        #[arg(last = true)]
        argv: Vec<String>,
    },
    Workload {
        #[arg(long)]
        dir: PathBuf,
        #[arg(long)]
        log: Option<PathBuf>,
        #[arg(long)]
        user: Option<Identity>,
        #[arg(last = true)]
        argv: Vec<String>,
    },
}

fn main() -> ExitCode {
    if relay::is_called() {
        let Err(error) = relay::become_criu();
        eprintln!("migrate, in the place of CRIU: {error:#}");
        return ExitCode::FAILURE;
    }
    let done = match Cli::parse().command {
        Command::Agent { config } => agent(&config).map(|()| 0),
        Command::Pki(pki) => pki.run().map(|()| 0),
        Command::Holder { first_pid, kernel_cache } => {
            init::hold(first_pid, kernel_cache.as_deref()).map(|()| 0)
        }
        Command::Init { first_pid, kernel_cache } => {
            init::run(first_pid, kernel_cache.as_deref()).map(|()| 0)
        }
        Command::Watcher { monitor } => watcher::run(monitor).map(|()| 0),
        Command::Pager { id, folder, source_site, source_url, tls } => {
            bring_pages(id, folder, source_site, source_url, tls).map(|()| 0)
        }
        Command::Launch { dir, log, user, argv } => {
            enter::launch(&dir, log.as_deref(), user, &argv).map(|()| 0)
        }
        Command::Enter { holder, cgroup, what } => match what {
            EnterWhat::Runtime { argv } => enter::run(holder, &cgroup, &What::Runtime, &argv),
            EnterWhat::Criu { argv } => enter::run(holder, &cgroup, &What::Criu, &argv),
            EnterWhat::Workload { dir, log, user, argv } => {
                enter::run(holder, &cgroup, &What::Workload { dir, log, user }, &argv)
            }
        },
    };
    match done {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("migrate: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bring_pages(
    id: String,
    folder: PathBuf,
    site: String,
    url: String,
    tls: Option<Vec<PathBuf>>,
) -> Result<()> {
    log_to_stderr();
    let tls = match tls.as_deref() {
        Some([ca, certificate, key]) => {
            Some(Files { ca: ca.clone(), certificate: certificate.clone(), key: key.clone() })
        }
        _ => None,
    };
    let guard = std::io::stdin().as_fd().try_clone_to_owned().context("stdin")?;
    pager::run(pager::Options { id, folder, source: AgentAt { site, url, tls } }, guard)
}

fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
}

fn agent(config: &std::path::Path) -> Result<()> {
    log_to_stderr();
    let config = Config::read(config)?;
    anyhow::ensure!(
        nix::unistd::geteuid().is_root(),
        "the agent makes namespaces, firewall rules and checkpoints: start it as root"
    );
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start tokio")?;
    runtime.block_on(run(config))
}

async fn run(config: Config) -> Result<()> {
    let (site, listen) = (config.site.clone(), config.listen);
    let door = Door::of(&config)?;
    if matches!(door, Door::Open) {
        tracing::warn!("there is no TLS: whoever reaches {listen} commands this agent");
    }
    // Before anything is started: two agents of one site would fight over its workloads.
    let listener = bind(listen).await?;
    let opened = Site::open(config).await.context("open the site")?;
    tracing::info!("agent ready site={site} listen={listen}");
    tokio::select! {
        broke = server::serve(opened, door, listener) => match broke {
            Ok(never) => match never {},
            Err(error) => Err(error).context("accept connections"),
        },
        stopped = stop_signal() => {
            stopped?;
            // What runs goes on; a migration that is under way falls back to its safe side.
            tracing::info!("agent stopped; its workloads go on");
            Ok(())
        }
    }
}

async fn bind(listen: SocketAddr) -> Result<tokio::net::TcpListener> {
    let bound = tokio::net::TcpListener::bind(listen).await;
    bound.with_context(|| format!("listen on {listen}: is the address here, and no other agent running?"))
}

async fn stop_signal() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
