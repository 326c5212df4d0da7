//! A site's host as its agent finds it: processes, silence rules, and a CRIU that takes its time ([`super::criu`]).

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use migrate::agent::config::Workload;
use migrate::agent::host::{Armed, Criu, Drained, Held, Host, Restoring, Silencing};
use migrate::agent::readiness::ReadinessError;
use migrate::agent::site::SiteError;
use migrate::agent::target::PrepareError;
use migrate::criu::rpc::Kind;
use migrate::criu::swrk::SwrkError;
use migrate::net::drain::{DrainError, Queues};
use migrate::net::silence::SilenceError;
use migrate::protocol::manifest::{Manifest, Processor};
use migrate::system;
use migrate::workload::container::ContainerError;
use migrate::workload::holder::{HolderError, HolderPid};
use migrate::workload::processes::Process;
use nix::sys::signal::Signal;
use tokio::time::Instant;

use super::criu::SimulatedCriu;
use super::world::{Broken, Copy, Keep, World};

/// One site's host.
#[derive(Clone, Debug)]
pub(super) struct SimulatedHost {
    pub(super) world: Arc<World>,
    pub(super) site: usize,
}

impl SimulatedHost {
    fn change(&self, holder: HolderPid, what: &str, act: impl FnOnce(&mut Copy)) {
        self.world.change(self.site, holder, what, act);
    }

    fn held(&self, holder: HolderPid) -> Box<dyn Held> {
        Box::new(SimulatedHolder { host: self.clone(), holder })
    }
}

impl Host for SimulatedHost {
    fn check_criu(&self) -> BoxFuture<'_, Result<(), ReadinessError>> {
        async { Ok(()) }.boxed()
    }

    fn may_leave<'a>(
        &'a self,
        _: &'a Workload,
        _: HolderPid,
        _: &'a Process,
    ) -> BoxFuture<'a, Result<Manifest, ReadinessError>> {
        async {
            self.world.pause(1, 30).await;
            Ok(Manifest {
                memory_bytes: 1 << 20,
                later: false,
                files: Vec::new(),
                sockets: Vec::new(),
                processor: Processor { instructions: Vec::new(), criu_image: None },
                is_container: false,
                image: None,
            })
        }
        .boxed()
    }

    fn may_enter<'a>(&'a self, _: &'a Workload, _: Manifest) -> BoxFuture<'a, Result<(), ReadinessError>> {
        async {
            self.world.pause(1, 30).await;
            match self.world.fails("check at the target") {
                true => Err(ReadinessError::Broken("simulated".to_owned())),
                false => Ok(()),
            }
        }
        .boxed()
    }

    fn check_address(&self, _: &Workload) -> Result<(), SiteError> {
        Ok(())
    }

    fn make_room<'a>(&'a self, _: &'a Workload) -> BoxFuture<'a, Result<(), ContainerError>> {
        async { Ok(()) }.boxed()
    }

    fn remove_remains<'a>(&'a self, _: &'a Workload) -> BoxFuture<'a, ()> {
        async {}.boxed()
    }

    fn start<'a>(&'a self, _: &'a Workload) -> BoxFuture<'a, Result<Box<dyn Held>, SiteError>> {
        async {
            self.world.pause(20, 60).await;
            Ok(self.held(self.world.make(self.site, true)))
        }
        .boxed()
    }

    fn find_running<'a>(&'a self, _: &'a Workload) -> BoxFuture<'a, Option<HolderPid>> {
        async { None }.boxed()
    }

    fn start_restore<'a>(
        &'a self,
        workload: &'a Workload,
        images: &'a Path,
    ) -> BoxFuture<'a, Result<Restoring, PrepareError>> {
        async move {
            self.world.pause(2, 20).await;
            if self.world.fails("namespaces") {
                return Err(HolderError::Start("simulated".to_owned()).into());
            }
            let holder = self.held(self.world.make(self.site, false));
            let criu = self.start_criu(workload, Kind::Restore, holder.pid(), &[], images).await?;
            Ok((holder, criu))
        }
        .boxed()
    }

    fn start_criu<'a>(
        &'a self,
        _: &'a Workload,
        kind: Kind,
        holder: HolderPid,
        _: &'a [PathBuf],
        images: &'a Path,
    ) -> BoxFuture<'a, Result<Box<dyn Criu>, SwrkError>> {
        async move {
            self.world.pause(1, 20).await;
            if self.world.fails("start of CRIU") {
                return Err(SwrkError::Failed("simulated".to_owned()));
            }
            let criu = SimulatedCriu::start(self.clone(), kind, holder, images);
            Ok(Box::new(criu) as Box<dyn Criu>)
        }
        .boxed()
    }

    fn silence(&self, _: &Workload) -> Arc<dyn Silencing> {
        Arc::new(SimulatedSilence(self.clone()))
    }

    fn is_alive(&self, holder: HolderPid) -> bool {
        self.world.with(self.site, holder, |copy| copy.holder == holder).unwrap_or(false)
    }

    fn root_of(&self, holder: HolderPid) -> Option<Process> {
        let process = |copy: &mut Copy| {
            copy.has_tasks.then(|| Process {
                pid: holder.pid + 1,
                inner_pid: 5000,
                depth: 2,
                state: if copy.stopped { 'T' } else { 'S' },
                tracer: i32::from(copy.frozen),
                rss_bytes: 1 << 20,
            })
        };
        self.world.with(self.site, holder, process).flatten()
    }

    fn wait_end(&self, holder: HolderPid) -> Option<BoxFuture<'static, ()>> {
        self.root_of(holder)?;
        let mut over = self.world.with(self.site, holder, |copy| copy.over.subscribe())?;
        Some(async move { drop(over.wait_for(|over| *over).await) }.boxed())
    }

    fn end_helpers(&self, holder: HolderPid) -> BoxFuture<'_, usize> {
        async move {
            let is_stuck = |copy: &mut Copy| copy.stopped && copy.frozen;
            if !self.world.with(self.site, holder, is_stuck).unwrap_or(false) {
                return 0;
            }
            self.world.pause(1, 3).await;
            self.change(holder, "a stopped CRIU is ended", |copy| copy.frozen = false);
            1
        }
        .boxed()
    }

    fn kill(&self, holder: HolderPid) -> BoxFuture<'_, bool> {
        async move {
            self.world.pause(1, 10).await;
            self.world.remove(self.site, holder, "the holder is killed");
            true
        }
        .boxed()
    }

    fn signal(&self, holder: HolderPid, signal: Signal) {
        match signal {
            Signal::SIGSTOP if self.world.broken == Broken::Fence => {}
            Signal::SIGSTOP => self.change(holder, "SIGSTOP", |copy| copy.stopped = true),
            Signal::SIGCONT => self.change(holder, "SIGCONT", |copy| copy.stopped = false),
            _ => self.world.end_tasks(self.site, holder, "SIGKILL"),
        }
    }

    fn suspend(&self, holder: HolderPid) -> BoxFuture<'_, ()> {
        async move { self.change(holder, "suspended", |copy| copy.stopped = true) }.boxed()
    }

    fn disconnect(&self, holder: HolderPid) -> BoxFuture<'_, ()> {
        async move {
            self.change(holder, "taken off the wire", |copy| {
                copy.stopped = true;
                copy.in_repair = true;
            });
        }
        .boxed()
    }

    fn reconnect(&self, holder: HolderPid) {
        self.change(holder, "back on the wire", |copy| copy.in_repair = false);
    }

    fn queues(&self, _: HolderPid) -> Queues {
        Queues::of(&[])
    }

    fn wait_until(&self, then: Instant) -> BoxFuture<'static, ()> {
        tokio::time::sleep_until(then).boxed()
    }

    fn drain(&self, _: HolderPid, _: Option<Queues>, settle: Duration, done: Drained) {
        let world = self.world.clone();
        system::spawn(async move {
            tokio::time::sleep(settle).await;
            world.pause(0, 5).await;
            done(match world.fails("draining") {
                true => Err(DrainError::Full { sockets: 1 }),
                false => Ok(()),
            });
        });
    }
}

/// The agent's end of a holder.
struct SimulatedHolder {
    host: SimulatedHost,
    holder: HolderPid,
}

impl Held for SimulatedHolder {
    fn pid(&self) -> HolderPid {
        self.holder
    }

    fn lease(&mut self) -> BoxFuture<'_, Result<(), HolderError>> {
        async {
            let keep = match self.host.world.broken {
                Broken::Lease => Keep::Stays,
                _ => Keep::Stops,
            };
            self.host.change(self.holder, "leased", |copy| copy.keep = keep);
            Ok(())
        }
        .boxed()
    }

    fn guard(&self, _: &OwnedFd) -> Result<(), HolderError> {
        Ok(())
    }

    fn keep(self: Box<Self>) -> BoxFuture<'static, Result<HolderPid, HolderError>> {
        async move {
            self.host.change(self.holder, "kept", |copy| copy.keep = Keep::Stays);
            Ok(self.holder)
        }
        .boxed()
    }
}

impl Drop for SimulatedHolder {
    /// The holder finds its agent gone.
    fn drop(&mut self) {
        let (host, holder) = (&self.host, self.holder);
        match host.world.with(host.site, holder, |copy| copy.keep) {
            None | Some(Keep::Stays) => {}
            Some(Keep::Stops) => {
                host.change(holder, "stopped by its pid 1", |copy| {
                    copy.stopped = true;
                    // Nobody is left whose end it could find.
                    copy.keep = Keep::Stays;
                });
            }
            Some(Keep::Dies) => host.world.remove(host.site, holder, "its pid 1 ends"),
        }
    }
}

/// The silence of the backend's address at one site.
struct SimulatedSilence(SimulatedHost);

impl SimulatedSilence {
    async fn armed(&self, limit: Option<Duration>) -> Result<Armed, SilenceError> {
        let SimulatedHost { world, site } = self.0.clone();
        world.pause(1, 10).await;
        if world.fails("silence rules") {
            return Err(SilenceError::Silent);
        }
        Ok(Box::pin(async move {
            world.pause(0, 2).await;
            if world.fails("silencing") {
                return Err(SilenceError::Silent);
            }
            if limit.is_some() || world.broken != Broken::Muting {
                world.set_quiet(site, Some(limit));
            }
            Ok(())
        }))
    }

    async fn removed(&self) -> Result<(), SilenceError> {
        self.0.world.pause(0, 5).await;
        self.0.world.set_quiet(self.0.site, None);
        Ok(())
    }
}

impl Silencing for SimulatedSilence {
    fn arm(&self, timeout: Duration) -> BoxFuture<'_, Result<Armed, SilenceError>> {
        self.armed(Some(timeout)).boxed()
    }

    fn arm_muting(&self) -> BoxFuture<'_, Result<Armed, SilenceError>> {
        self.armed(None).boxed()
    }

    fn lift(&self) -> BoxFuture<'_, Result<(), SilenceError>> {
        self.removed().boxed()
    }

    fn sweep(&self) -> BoxFuture<'_, Result<(), SilenceError>> {
        self.removed().boxed()
    }
}
