//! The daemon: puts the parts together, and takes them apart so that packets keep flowing.
//!
//! Nothing is undone at the end: maps and programs stay pinned, a gate stays as it is, and the next daemon
//! takes both over.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio_util::sync::CancellationToken;

use crate::admin::{self, Admin};
use crate::config::{self, Config, Current, LoadError};
use crate::control::{Control, ControlError};
use crate::datapath::xdp::XdpDatapath;
use crate::datapath::{Datapath, DatapathError, Event};
use crate::health::Health;
use crate::migrations::{Agents, Journal, JournalError, Migrations};
use crate::reload::Reloader;

/// How long migrations under way may take to end (most of them by rolling back) when the daemon stops.
const MIGRATIONS_PATIENCE: Duration = Duration::from_secs(10);
/// How long queues may take to be sent.
const REPLAYS_PATIENCE: Duration = Duration::from_secs(2);

/// Why the daemon does not run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] LoadError),
    /// The admin API's address.
    #[error("the admin API cannot listen on {address}; is another load balancer running?")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// The data path.
    #[error("the data path does not start")]
    Datapath(#[source] DatapathError),
    /// The tables.
    #[error("the services, backends and sites cannot be installed")]
    Install(#[source] ControlError),
    /// What a former daemon wrote down of migrations.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The system.
    #[error("the thread of the health checks cannot be started")]
    Health(#[source] std::io::Error),
    /// The system.
    #[error("signals cannot be waited for")]
    Signals(#[source] std::io::Error),
}

/// Runs until SIGTERM or SIGINT.
pub async fn run(file: &Path) -> Result<(), RunError> {
    let config = Arc::new(Config::load(file)?);
    for warning in config.warnings.iter().cloned().chain(config.tls_warning()) {
        tracing::warn!("{warning}");
    }
    let mut signals = Signals::new().map_err(RunError::Signals)?;
    // Before the data path is touched: a second daemon on this machine ends here.
    let address = config.admin.listen;
    let listener = TcpListener::bind(address).await.map_err(|source| RunError::Listen { address, source })?;
    let (events, reports) = unbounded_channel();
    let datapath = open(&config.datapath, events).map_err(RunError::Datapath)?;
    datapath.set_flow_times(config.flows);
    let control = Control::start(datapath, &config.plan, config.hold).map_err(RunError::Install)?;
    let control = Arc::new(control);

    let stop = CancellationToken::new();
    let driver = tokio::spawn({
        let (control, stop) = (control.clone(), stop.clone());
        async move { control.drive(reports, stop).await }
    });
    let sharer = tokio::spawn(control.clone().share(stop.clone()));
    let journal = Journal::at(&config.migrations.journal);
    if !config.agents.is_empty() {
        journal.open()?;
    }
    let config = Current::new(config);
    let migrations = Migrations::new(control.clone(), config.clone(), Arc::new(Agents), journal);
    let migrations = Arc::new(migrations);
    migrations.recover()?;
    let health =
        Health::start(control.clone(), migrations.clone(), config.subscribe()).map_err(RunError::Health)?;
    let file = Some(file.to_owned());
    let reloader = Arc::new(Reloader::new(file, config.clone(), control.clone(), migrations.clone()));
    let admin = Admin {
        config,
        control: control.clone(),
        health: health.board(),
        migrations: migrations.clone(),
        reloader: reloader.clone(),
        stop: stop.clone(),
    };
    let server = tokio::spawn(admin::serve(listener, admin::router(Arc::new(admin)), stop.clone()));
    for hook in control.datapath().hooks() {
        tracing::info!(interface = %hook.interface, mode = %hook.mode, "packets are taken");
    }
    tracing::info!(admin = %address, version = env!("CARGO_PKG_VERSION"), "ready");

    let name = loop {
        match signals.next().await {
            SignalName::Hangup => reload(&reloader).await,
            SignalName::End(name) => break name,
        }
    };
    tracing::info!(signal = name, "stopping; packets keep flowing, a second signal stops at once");
    let graceful = async {
        if !migrations.stop(MIGRATIONS_PATIENCE).await {
            tracing::warn!("a migration is still under way; the next start brings it to an end");
        }
        if !control.replays_ended(REPLAYS_PATIENCE).await {
            tracing::warn!("a queue is still being sent; what is left of it is lost");
        }
        stop.cancel();
        // Neither can fail but by a panic, which was reported where it happened.
        let _ = tokio::join!(server, driver, sharer);
    };
    let stop_at_once = async { while matches!(signals.next().await, SignalName::Hangup) {} };
    tokio::select! {
        () = graceful => tracing::info!("stopped"),
        () = stop_at_once => tracing::warn!("stopped at once"),
    }
    Ok(())
}

/// The way packets are carried. Another one would be chosen here.
fn open(
    config: &config::Datapath,
    events: UnboundedSender<Event>,
) -> Result<Arc<dyn Datapath>, DatapathError> {
    Ok(Arc::new(XdpDatapath::open(config, events)?))
}

/// Reads the configuration again, because a signal said so.
async fn reload(reloader: &Arc<Reloader>) {
    match reloader.reload(false).await {
        Ok(report) => {
            for warning in &report.warnings {
                tracing::warn!("{warning}");
            }
            let changes = &report.changes;
            let (added, removed, changed) =
                (changes.added.len(), changes.removed.len(), changes.changed.len());
            tracing::info!(added, removed, changed, sections = ?report.sections, "reloaded");
        }
        Err(error) => tracing::error!("nothing is reloaded: {}", crate::cli::chain(&error)),
    }
}

/// What the daemon was told by signal.
enum SignalName {
    /// To read its configuration again.
    Hangup,
    /// To end.
    End(&'static str),
}

/// What the daemon listens to.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> SignalName {
        tokio::select! {
            _ = self.terminate.recv() => SignalName::End("SIGTERM"),
            _ = self.interrupt.recv() => SignalName::End("SIGINT"),
            _ = self.hangup.recv() => SignalName::Hangup,
        }
    }
}
