//! Whether backends do their work: probes that take the way of clients' packets, and what their results mean.
//!
//! ```text
//!   config -> Health -> scheduler -> machine (one for each check) ---> control: up, down
//!                           |   ^                                 \--> board: what the admin API shows
//!                           v   |
//!      namespace <- prober (through the data path, over a flow written for it beforehand)
//! ```
//!
//! A probe is an ordinary flow: the daemon writes its two entries, which name the backend under test, and connects
//! to the service's address from an interface in front of the data path. So what is tested is all of a client's
//! way: parsing, the flow table, the gate, the rewriting (or the tunnel), the site's link, the server, and the way
//! back.
//!
//! A backend whose gate is closed or that moves is not judged (`scheduler`). What is wrong on our own side is told
//! and not held against any backend. Not here: who gets new flows when some or all backends are down (`control`).

pub mod machine;
pub mod namespace;
mod offloads;
pub mod prober;
mod scheduler;
mod target;
mod view;
mod world;

use std::sync::Arc;
use std::thread;

use tokio::runtime::Handle;
use tokio::sync::mpsc::unbounded_channel;
use tokio::sync::{oneshot, watch};

pub use view::{Board, CheckState, CheckView};

use self::namespace::{Sources, Wire};
use self::scheduler::Scheduler;
use self::target::Target;
use self::world::DaemonWorld;
use crate::cli::chain;
use crate::config::Config;
use crate::control::Control;
use crate::migrations::Migrations;

/// The checks of this daemon. They end when it is dropped.
pub struct Health {
    board: Board,
    _stop: oneshot::Sender<()>,
}

impl Health {
    /// Within the daemon's runtime, starts the thread of the probes, which follows the configuration. It makes nothing until there is something
    /// to check.
    pub fn start(
        control: Arc<Control>,
        migrations: Arc<Migrations>,
        config: watch::Receiver<Arc<Config>>,
    ) -> std::io::Result<Self> {
        let (stop, stopped) = oneshot::channel();
        let board = Board::default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let work = work(control, migrations, board.clone(), config, Handle::current());
        let work = async move {
            tokio::select! {
                () = work => {}
                _ = stopped => {}
            }
        };
        thread::Builder::new().name("probes".into()).spawn(move || runtime.block_on(work))?;
        Ok(Self { board, _stop: stop })
    }

    /// Where the checks write what they find out.
    pub fn board(&self) -> Board {
        self.board.clone()
    }
}

/// All of the thread's life.
async fn work(
    control: Arc<Control>,
    migrations: Arc<Migrations>,
    board: Board,
    mut config: watch::Receiver<Arc<Config>>,
    daemon: Handle,
) {
    if config.wait_for(|config| !config.checks.is_empty()).await.is_err() {
        return;
    }
    let wire = match reach_the_data_path(&control, &daemon).await {
        Ok(wire) => wire,
        Err(error) => {
            tracing::error!(error, "no backend is checked; all count as up");
            return refuse(&board, config, &error).await;
        }
    };
    tracing::info!(interface = %wire.interface, "checking backends");
    let (orders, inbox) = unbounded_channel();
    let follow = async move {
        loop {
            let targets = Target::all(&config.borrow_and_update());
            if orders.send(targets).is_err() || config.changed().await.is_err() {
                return;
            }
        }
    };
    let world = DaemonWorld::new(control, migrations, Sources::default(), wire);
    tokio::join!(follow, Scheduler::new(Arc::new(world), board).run(inbox));
}

/// Moves this thread into the probes' namespace, with the data path at the other end of its wire.
async fn reach_the_data_path(control: &Arc<Control>, daemon: &Handle) -> Result<Wire, String> {
    // Named by the process: whatever else bears such a name is not ours to take.
    let interface = format!("drover-p{}", std::process::id());
    let wire = namespace::enter(&interface, Sources::default()).await.map_err(|error| chain(&error))?;
    // In the daemon's namespace, where this thread is no more. By one of the daemon's threads: a fresh one would
    // begin where the thread is that starts it.
    let control = control.clone();
    let carrying = daemon.spawn(async move { control.datapath().carry_probes(&interface) }).await;
    carrying.map_err(|error| chain(&error))?.map_err(|error| chain(&error))?;
    Ok(wire)
}

/// Where nothing can be checked, says so of every check.
async fn refuse(board: &Board, mut config: watch::Receiver<Arc<Config>>, error: &str) {
    loop {
        let targets = Target::all(&config.borrow_and_update());
        let view = |target: &Target| {
            let mut view = CheckView::new(target);
            view.error(error.to_owned());
            (target.key(), view)
        };
        *board.views() = targets.iter().map(view).collect();
        if config.changed().await.is_err() {
            return;
        }
    }
}
