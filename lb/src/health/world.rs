//! The scheduler's world in the daemon: gates and migrations, and probes through the data path.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::{Mutex, mpsc};

use super::namespace::{Sources, Wire};
use super::prober::{self, Finding};
use super::scheduler::{Standing, World};
use super::target::Target;
use crate::control::{Control, State};
use crate::datapath::ProbeFlow;
use crate::migrations::Migrations;

/// Ports of probes, which no client's flow is ever given as its NAT port: a probe keeps its own one on its whole way.
const PORTS: std::ops::Range<u16> = 1024..lb_core::LOWEST_NAT_PORT;
/// How long a flow outlives its probe: its last packet, a reset, has to pass.
const AFTERLIFE: Duration = Duration::from_millis(100);

/// The ports that are free, the longest unused one first.
struct Ports {
    free: Mutex<mpsc::UnboundedReceiver<u16>>,
    give_back: mpsc::UnboundedSender<u16>,
}

impl Ports {
    fn new() -> Self {
        let (give_back, free) = mpsc::unbounded_channel();
        for port in PORTS {
            let _ = give_back.send(port);
        }
        Self { free: Mutex::new(free), give_back }
    }

    /// Waits for a free one.
    async fn take(&self) -> u16 {
        self.free.lock().await.recv().await.expect("the sending end is ours")
    }

    fn give_back(&self, port: u16) {
        let _ = self.give_back.send(port);
    }
}

/// What probes are made with.
struct Probing {
    control: Arc<Control>,
    sources: Sources,
    wire: Wire,
    ports: Ports,
}

impl Probing {
    async fn probe(self: Arc<Self>, target: Target) -> Finding {
        let Some(what) = &target.check.probe else {
            return Finding::Unknown("there is nothing to ask".to_owned());
        };
        let Some(backend) = self.control.datapath().backend(&target.backend) else {
            return Finding::Unknown("the data path does not know the backend".to_owned());
        };
        let port = self.ports.take().await;
        let from = SocketAddr::new(self.sources.like(target.to.ip()), port);
        let flow = ProbeFlow {
            service: target.service.clone(),
            to: target.to,
            mode: target.mode,
            protocol: target.protocol(),
            backend,
            from,
            back: self.wire.back,
        };
        if let Err(error) = self.control.datapath().open_probe(&flow) {
            self.ports.give_back(port);
            return Finding::Unknown(error.to_string());
        }
        let finding = prober::probe(what, from, target.to, target.address, target.check.timeout).await;
        tokio::spawn(async move {
            tokio::time::sleep(AFTERLIFE).await;
            self.control.datapath().close_probe(&flow);
            self.ports.give_back(port);
        });
        finding
    }
}

/// The daemon around the scheduler.
pub(super) struct DaemonWorld {
    migrations: Arc<Migrations>,
    probing: Arc<Probing>,
}

impl DaemonWorld {
    pub(super) fn new(
        control: Arc<Control>,
        migrations: Arc<Migrations>,
        sources: Sources,
        wire: Wire,
    ) -> Self {
        let probing = Arc::new(Probing { control, sources, wire, ports: Ports::new() });
        Self { migrations, probing }
    }
}

impl World for DaemonWorld {
    fn standing(&self, backend: &str) -> Standing {
        let control = &self.probing.control;
        let forwards = control.state(backend).is_ok_and(|state| state == State::Forward);
        Standing {
            open: forwards && !self.migrations.is_under_way(backend),
            generation: control.generation(backend).unwrap_or_default(),
        }
    }

    fn resets(&self) -> HashMap<String, u64> {
        let mut resets = HashMap::new();
        for member in self.probing.control.datapath().members() {
            *resets.entry(member.backend).or_default() += member.resets;
        }
        resets
    }

    fn turned(&self, backend: &str, up: bool) {
        if let Err(error) = self.probing.control.set_health(backend, up) {
            // Of a backend that a reload has just removed.
            tracing::debug!(backend, %error, "nobody wants to know of a backend's health");
        }
    }

    fn probe(&self, target: &Target) -> BoxFuture<'static, Finding> {
        Box::pin(self.probing.clone().probe(target.clone()))
    }
}
