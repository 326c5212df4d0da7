//! What an agent does to the host that it runs on, as the site and the roles' drivers see it: [`super::linux`], or a
//! simulation. Files are not among it: records and images are kept in folders everywhere.

use std::fmt::Debug;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use nix::sys::signal::Signal;
use tokio::time::Instant;

use super::config::Workload;
use super::readiness::ReadinessError;
use super::site::SiteError;
use super::target::PrepareError;
use crate::criu::rpc::{Features, Kind};
use crate::criu::swrk::{Said, Swrk, SwrkError};
use crate::net::drain::{DrainError, Queues};
use crate::net::silence::{Silence, SilenceError};
use crate::protocol::manifest::Manifest;
use crate::workload::container::ContainerError;
use crate::workload::holder::{Holder, HolderError, HolderPid};
use crate::workload::processes::Process;

/// Rules that wait for the backend's address: in force once this was awaited.
pub type Armed = Pin<Box<dyn Future<Output = Result<(), SilenceError>> + Send + Sync>>;
/// Is told how the queues were drained.
pub type Drained = Box<dyn FnOnce(Result<(), DrainError>) + Send>;

/// Empty namespaces for a workload, and a CRIU in them that waits to be told to restore.
pub type Restoring = (Box<dyn Held>, Box<dyn Criu>);

/// A host.
pub trait Host: Debug + Send + Sync + 'static {
    /// Fails unless CRIU works here.
    fn check_criu(&self) -> BoxFuture<'_, Result<(), ReadinessError>>;
    /// Looks at a workload's tasks: what they need of a site, unless something keeps them here.
    fn may_leave<'a>(
        &'a self,
        workload: &'a Workload,
        holder: HolderPid,
        root: &'a Process,
    ) -> BoxFuture<'a, Result<Manifest, ReadinessError>>;
    /// Compares what a workload needs with what is here.
    fn may_enter<'a>(
        &'a self,
        workload: &'a Workload,
        manifest: Manifest,
    ) -> BoxFuture<'a, Result<(), ReadinessError>>;
    /// Fails unless the host holds the workload's address.
    fn check_address(&self, workload: &Workload) -> Result<(), SiteError>;
    /// Gets ready for a container that is to run here from now on, and fails where it could not.
    fn make_room<'a>(&'a self, workload: &'a Workload) -> BoxFuture<'a, Result<(), ContainerError>>;
    /// Removes what a workload that is not here any more has left.
    fn remove_remains<'a>(&'a self, workload: &'a Workload) -> BoxFuture<'a, ()>;

    /// Starts a workload, and sees that it does not end at once.
    fn start<'a>(&'a self, workload: &'a Workload) -> BoxFuture<'a, Result<Box<dyn Held>, SiteError>>;
    /// What keeps a workload that somebody else has started here, if anything does.
    fn find_running<'a>(&'a self, workload: &'a Workload) -> BoxFuture<'a, Option<HolderPid>>;
    /// Makes a holder for a workload that is restored, with CRIU in it.
    fn start_restore<'a>(
        &'a self,
        workload: &'a Workload,
        images: &'a Path,
    ) -> BoxFuture<'a, Result<Restoring, PrepareError>>;
    /// Starts CRIU for a dump or a restore; it waits to be told to begin.
    fn start_criu<'a>(
        &'a self,
        workload: &'a Workload,
        kind: Kind,
        holder: HolderPid,
        cgroups: &'a [PathBuf],
        images: &'a Path,
    ) -> BoxFuture<'a, Result<Box<dyn Criu>, SwrkError>>;
    /// The silence of a workload's address.
    fn silence(&self, workload: &Workload) -> Arc<dyn Silencing>;

    /// True while a holder is this very process and not waiting to be reaped.
    fn is_alive(&self, holder: HolderPid) -> bool;
    /// The root of a holder's workload.
    fn root_of(&self, holder: HolderPid) -> Option<Process>;
    /// Waits for the end of a holder's workload; `None` if there is none.
    fn wait_end(&self, holder: HolderPid) -> Option<BoxFuture<'static, ()>>;
    /// Ends CRIU and the like where a former agent's death has stopped them with the workload; how many.
    fn end_helpers(&self, holder: HolderPid) -> BoxFuture<'_, usize>;
    /// Kills a holder and all that is in it; false if it does not go.
    fn kill(&self, holder: HolderPid) -> BoxFuture<'_, bool>;
    /// Sends a signal to all processes of a holder's workload at this moment.
    fn signal(&self, holder: HolderPid, signal: Signal);
    /// Stops a holder's workload, all of it.
    fn suspend(&self, holder: HolderPid) -> BoxFuture<'_, ()>;
    /// Stops all processes of a holder and takes their connections off the wire.
    fn disconnect(&self, holder: HolderPid) -> BoxFuture<'_, ()>;
    /// Puts the connections of a holder's workload back on the wire.
    fn reconnect(&self, holder: HolderPid);
    /// Where something may wait for a holder's workload that is in no checkpoint.
    fn queues(&self, holder: HolderPid) -> Queues;
    /// Waits until then, as exactly as can be.
    fn wait_until(&self, then: Instant) -> BoxFuture<'static, ()>;
    /// Waits for `settle` and until nothing waits in these queues, or else in those that the workload has by then.
    fn drain(&self, holder: HolderPid, queues: Option<Queues>, settle: Duration, done: Drained);
}

/// A holder that dies with this agent unless it is told to stay.
pub trait Held: Send + Sync {
    /// Its identity.
    fn pid(&self) -> HolderPid;
    /// From here on the agent's death does not kill the workload, but stops it.
    fn lease(&mut self) -> BoxFuture<'_, Result<(), HolderError>>;
    /// Has it guard the workload's memory.
    fn guard(&self, end: &OwnedFd) -> Result<(), HolderError>;
    /// Lets it outlive this agent.
    fn keep(self: Box<Self>) -> BoxFuture<'static, Result<HolderPid, HolderError>>;
}

impl Held for Holder {
    fn pid(&self) -> HolderPid {
        self.pid()
    }

    fn lease(&mut self) -> BoxFuture<'_, Result<(), HolderError>> {
        self.lease().boxed()
    }

    fn guard(&self, end: &OwnedFd) -> Result<(), HolderError> {
        self.guard(end)
    }

    fn keep(self: Box<Self>) -> BoxFuture<'static, Result<HolderPid, HolderError>> {
        (*self).keep().boxed()
    }
}

/// One CRIU; see [`Swrk`]. What it dumps or restores does not need it once it has ended.
pub trait Criu: Send + Sync {
    /// Its cache of them, as this host finds it.
    fn kernel_cache(&self, holder: HolderPid) -> PathBuf {
        holder.kernel_cache()
    }
    /// Makes it look at the kernel's features.
    fn warm(&mut self) -> BoxFuture<'_, Result<Features, SwrkError>>;
    /// Begins to dump the tree of `pid`.
    fn dump<'a>(&'a mut self, pid: i32, parent: Option<&'a str>) -> BoxFuture<'a, Result<(), SwrkError>>;
    /// Begins to restore, as far as that goes without images.
    fn restore(&mut self, is_lazy: bool) -> BoxFuture<'_, Result<(), SwrkError>>;
    /// Goes on with a restore: the images are there.
    fn take_images(&mut self) -> Result<(), SwrkError>;
    /// Waits for what it says next. May be dropped and called again.
    fn next(&mut self) -> BoxFuture<'_, Said>;
    /// Answers its question.
    fn answer(&mut self, yes: bool) -> BoxFuture<'_, Result<(), SwrkError>>;
    /// Waits until it is gone.
    fn end(self: Box<Self>) -> BoxFuture<'static, ()>;
}

impl Criu for Swrk {
    fn kernel_cache(&self, holder: HolderPid) -> PathBuf {
        self.kernel_cache(holder)
    }

    fn warm(&mut self) -> BoxFuture<'_, Result<Features, SwrkError>> {
        self.warm().boxed()
    }

    fn dump<'a>(&'a mut self, pid: i32, parent: Option<&'a str>) -> BoxFuture<'a, Result<(), SwrkError>> {
        self.dump(pid, parent).boxed()
    }

    fn restore(&mut self, is_lazy: bool) -> BoxFuture<'_, Result<(), SwrkError>> {
        self.restore(is_lazy).boxed()
    }

    fn take_images(&mut self) -> Result<(), SwrkError> {
        self.take_images()
    }

    fn next(&mut self) -> BoxFuture<'_, Said> {
        self.next().boxed()
    }

    fn answer(&mut self, yes: bool) -> BoxFuture<'_, Result<(), SwrkError>> {
        self.answer(yes).boxed()
    }

    fn end(self: Box<Self>) -> BoxFuture<'static, ()> {
        (*self).end().boxed()
    }
}

/// The silence of one backend; see [`Silence`].
pub trait Silencing: Send + Sync {
    /// Puts rules in place that do nothing yet; in force, they hold for at most `timeout`.
    fn arm(&self, timeout: Duration) -> BoxFuture<'_, Result<Armed, SilenceError>>;
    /// Likewise for what leaves from the address, until that is lifted.
    fn arm_muting(&self) -> BoxFuture<'_, Result<Armed, SilenceError>>;
    /// Removes them now; it is no error if there are none.
    fn lift(&self) -> BoxFuture<'_, Result<(), SilenceError>>;
    /// Removes what a former agent or CRIU's own lock left for this backend.
    fn sweep(&self) -> BoxFuture<'_, Result<(), SilenceError>>;
}

impl Silencing for Silence {
    fn arm(&self, timeout: Duration) -> BoxFuture<'_, Result<Armed, SilenceError>> {
        async move { Ok(Box::pin(self.arm(timeout).await?.fire()) as Armed) }.boxed()
    }

    fn arm_muting(&self) -> BoxFuture<'_, Result<Armed, SilenceError>> {
        async { Ok(Box::pin(self.arm_muting().await?.fire()) as Armed) }.boxed()
    }

    fn lift(&self) -> BoxFuture<'_, Result<(), SilenceError>> {
        self.lift().boxed()
    }

    fn sweep(&self) -> BoxFuture<'_, Result<(), SilenceError>> {
        self.sweep().boxed()
    }
}
