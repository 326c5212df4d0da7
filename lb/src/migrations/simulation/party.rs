//! The load balancer and the agents as processes that can be killed: all of their tasks vanish in one moment, and what
//! they have written down stays for the next one.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use migrate::agent::config::{Config as AgentConfig, Kind, Memory, Process as Program, Transport, Workload};
use migrate::agent::server;
use migrate::agent::site::Site;
use migrate::protocol::Protocol;
use migrate::system::{self, Process, Stream};
use tokio::sync::mpsc::unbounded_channel;
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;

use super::host::SimulatedHost;
use super::wire::{Network, PARTIES};
use super::world::{BACKEND, Broken, SITES, World};
use crate::config::{Config, Current};
use crate::control::Control;
use crate::datapath::{BackendNumber, Datapath as _};
use crate::memory::MemoryDatapath;
use crate::migrations::{Agents, Journal, Migrations};
use crate::testing::CONFIG;

/// The load balancer; an agent's number is its site's, and one more.
pub(super) const BALANCER: usize = 0;
pub(super) const NAMES: [&str; PARTIES] = ["lb", "ams", "fra"];
/// Some time in 2033.
const EPOCH_US: i64 = 2_000_000_000_000_000;

/// Where each is reached; the load balancer is not.
fn party_at(authority: &str) -> Option<usize> {
    ["10.2.1.1:7401", "10.2.2.1:7401"].iter().position(|known| *known == authority).map(|site| site + 1)
}

/// A process that lives.
struct Life {
    party: usize,
    network: Arc<Network>,
    began: tokio::time::Instant,
    /// How far its clock is from the truth.
    skew_us: i64,
    tasks: Mutex<Vec<AbortHandle>>,
}

impl Process for Life {
    fn own(&self, task: AbortHandle) {
        let mut tasks = self.tasks.lock().unwrap();
        if tasks.len() % 64 == 63 {
            tasks.retain(|task| !task.is_finished());
        }
        tasks.push(task);
    }

    fn connect(&self, authority: &str) -> BoxFuture<'static, io::Result<Box<dyn Stream>>> {
        let (network, from, to) = (self.network.clone(), self.party, party_at(authority));
        async move {
            let to = to.ok_or(io::ErrorKind::HostUnreachable)?;
            Ok(Box::new(network.connect(from, to).await?) as Box<dyn Stream>)
        }
        .boxed()
    }

    fn now_unix_us(&self) -> i64 {
        EPOCH_US + self.skew_us + i64::try_from(self.began.elapsed().as_micros()).unwrap_or(i64::MAX)
    }
}

/// All of them.
pub(super) struct Parties {
    world: Arc<World>,
    network: Arc<Network>,
    began: tokio::time::Instant,
    lives: Mutex<[Option<Arc<Life>>; PARTIES]>,
    migrations: Mutex<Option<Arc<Migrations>>>,
    datapath: Mutex<Option<Arc<MemoryDatapath>>>,
    sites: Mutex<BTreeMap<usize, Arc<Site>>>,
}

impl Parties {
    pub(super) fn new(world: Arc<World>, network: Arc<Network>) -> Arc<Self> {
        Arc::new(Self {
            world,
            network,
            began: tokio::time::Instant::now(),
            lives: Mutex::default(),
            migrations: Mutex::default(),
            datapath: Mutex::default(),
            sites: Mutex::default(),
        })
    }

    /// The load balancer's migrations, while it is there.
    pub(super) fn migrations(&self) -> Option<Arc<Migrations>> {
        self.migrations.lock().unwrap().clone()
    }

    /// What something has to run inside of that is done by a party.
    pub(super) fn life(&self, party: usize) -> Option<Arc<dyn Process>> {
        let life = self.lives.lock().unwrap()[party].clone()?;
        Some(life)
    }

    /// Whether any agent has a part in a migration that has not ended.
    pub(super) fn is_migrating(&self) -> bool {
        [1, 2].into_iter().any(|party| self.has_part(party))
    }

    /// Whether this agent has.
    pub(super) fn has_part(&self, party: usize) -> bool {
        let site = self.sites.lock().unwrap().get(&party).cloned();
        site.is_some_and(|site| site.list().iter().any(|workload| workload.migration.is_some()))
    }

    pub(super) fn is_alive(&self, party: usize) -> bool {
        self.lives.lock().unwrap()[party].is_some()
    }

    /// `kill -9`.
    pub(super) fn kill(&self, party: usize) {
        self.world.note(format_args!("{} is killed", NAMES[party]));
        self.network.set_door(party, None);
        let Some(life) = self.lives.lock().unwrap()[party].take() else { return };
        for task in life.tasks.lock().unwrap().drain(..) {
            task.abort();
        }
        if party == BALANCER {
            self.migrations.lock().unwrap().take();
        } else {
            self.sites.lock().unwrap().remove(&party);
            if self.world.broken == Broken::Mark {
                let _ = std::fs::remove_file(self.state_of(party).join(format!("workloads/{BACKEND}.left")));
            }
        }
    }

    /// Starts a party anew; what it finds is what the former one left.
    pub(super) fn start(self: &Arc<Self>, party: usize) {
        self.world.note(format_args!("{} is started", NAMES[party]));
        // A minute to either side; a load balancer's migrations have their ids from its clock.
        let skew_us = match party {
            BALANCER => 0,
            _ => i64::try_from(self.world.below(120_000_000)).unwrap_or(0) - 60_000_000,
        };
        let life = Arc::new(Life {
            party,
            network: self.network.clone(),
            began: self.began,
            skew_us,
            tasks: Mutex::default(),
        });
        self.lives.lock().unwrap()[party] = Some(life.clone());
        let this = self.clone();
        let work = system::inside(life.clone(), async move {
            match party {
                BALANCER => this.balance(),
                _ => this.serve(party).await,
            }
        });
        life.own(tokio::spawn(work).abort_handle());
    }

    /// The load balancer, over the tables that the former one has left.
    fn balance(&self) {
        let config = Arc::new(Config::parse(CONFIG, "simulation.toml").expect("it is a good one"));
        let (sender, events) = unbounded_channel();
        let new = MemoryDatapath::new(sender);
        if let Some(old) = &*self.datapath.lock().unwrap() {
            let state = old.state(BackendNumber(0));
            new.pin(&config.plan, BACKEND, state.word, state.sites.map(|site| site.0));
        }
        let datapath = Arc::new(new);
        let control = Control::start(datapath.clone(), &config.plan, config.hold).expect("it is known");
        let control = Arc::new(control);
        *self.datapath.lock().unwrap() = Some(datapath.clone());
        self.world.set_datapath(datapath);
        let driven = control.clone();
        system::spawn(async move { driven.drive(events, CancellationToken::new()).await });
        let journal = Journal::at(&self.world.folder.join("journal.redb"));
        let migrations = Arc::new(Migrations::new(control, Current::new(config), Arc::new(Agents), journal));
        if let Err(error) = migrations.recover() {
            self.world.violate(format_args!("the journal cannot be read: {error}"));
        }
        *self.migrations.lock().unwrap() = Some(migrations);
    }

    fn state_of(&self, party: usize) -> PathBuf {
        self.world.folder.join(NAMES[party])
    }

    /// A site's agent.
    async fn serve(self: Arc<Self>, party: usize) {
        let state = self.state_of(party);
        let images = state.join("images");
        let _ = std::fs::remove_dir_all(&images);
        std::fs::create_dir_all(&images).expect("the folder is ours");
        let program = Program {
            command: vec!["server".to_owned()],
            dir: "/".into(),
            log: None,
            user: None,
            env: BTreeMap::new(),
        };
        let workload = Workload {
            name: BACKEND.to_owned(),
            address: "10.1.0.1:6379".parse().expect("an address"),
            protocol: Protocol::Tcp,
            kind: Kind::Process(program),
            // At one site, whose agent must not start it again while it is elsewhere.
            start: party == 1,
            memory: Memory::Pre,
            cgroup: None,
        };
        let config = AgentConfig {
            site: SITES[party - 1].to_owned(),
            listen: "0.0.0.0:7401".parse().expect("an address"),
            transport: Transport::Plain,
            state_dir: state,
            criu: None,
            runc: "runc".into(),
            podman: vec!["podman".to_owned()],
            spare_memory_bytes: 0,
            decapsulator: None,
            workloads: vec![workload],
        };
        let host = SimulatedHost { world: self.world.clone(), site: party - 1 };
        let site = match Site::open_on(Arc::new(host), config, images).await {
            Ok(site) => site,
            Err(error) => {
                self.world.violate(format_args!("the agent of {} does not start: {error}", NAMES[party]));
                return;
            }
        };
        let (door, mut callers) = unbounded_channel();
        self.network.set_door(party, Some(door));
        self.sites.lock().unwrap().insert(party, site.clone());
        while let Some(caller) = callers.recv().await {
            system::spawn(server::answer(site.clone(), Box::new(caller)));
        }
    }
}
