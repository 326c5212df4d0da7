//! A CRIU that dumps and restores a number: it asks at its hooks, takes random times, fails at random, and can be killed
//! at any moment, when the kernel lets go of what it held.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use migrate::agent::host::Criu;
use migrate::criu::rpc::{Features, Kind};
use migrate::criu::swrk::{Ended, Hook, Said, SwrkError};
use migrate::workload::holder::HolderPid;
use tokio::time::Instant;

use super::host::SimulatedHost;
use super::world::Life;

/// What it dumps: the copy's version.
const IMAGE: &str = "state.img";

/// What it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Idle,
    /// Until then; then it asks at a hook.
    Working(Instant, Hook),
    Asking(Hook),
    /// Until then; then it has ended, well or not.
    Ending(Instant, bool),
    Over,
}

pub(super) struct SimulatedCriu {
    host: SimulatedHost,
    kind: Kind,
    holder: HolderPid,
    images: PathBuf,
    life: Arc<Life>,
    stage: Stage,
}

impl SimulatedCriu {
    pub(super) fn start(host: SimulatedHost, kind: Kind, holder: HolderPid, images: &Path) -> Self {
        let life = Arc::new(Life::default());
        host.world.lock().places[host.site].crius.push(life.clone());
        Self { host, kind, holder, images: images.to_owned(), life, stage: Stage::Idle }
    }

    fn is_killed(&self) -> bool {
        *self.life.killed.lock().unwrap()
    }

    fn work(&mut self, least_ms: u64, most_ms: u64, hook: Hook) {
        self.stage = Stage::Working(Instant::now() + self.host.world.between(least_ms, most_ms), hook);
    }

    fn wind_up(&mut self, well: bool) {
        self.stage = Stage::Ending(Instant::now() + self.host.world.between(1, 10), well);
    }

    fn change(&self, what: &str, act: impl FnOnce(&mut super::world::Copy)) {
        self.host.world.change(self.host.site, self.holder, what, act);
    }

    /// What the kernel does when CRIU is gone.
    fn let_go(&mut self) {
        match (self.kind, self.stage) {
            (_, Stage::Over | Stage::Idle) => {}
            (Kind::Restore, Stage::Working(_, Hook::PostResume)) => {
                self.change("let go by a CRIU that was killed", |copy| copy.frozen = false);
            }
            (Kind::Restore, Stage::Asking(Hook::PreResume)) => {
                if self.host.world.below(2) == 0 {
                    self.change("runs without its CRIU", |copy| {
                        copy.frozen = false;
                        copy.escaped = true;
                    });
                } else {
                    self.host.world.end_tasks(self.host.site, self.holder, "dies with its CRIU");
                }
            }
            (Kind::Restore, _) => {}
            // The sockets stay as they are.
            _ => self.change("let go by a CRIU that was killed", |copy| copy.frozen = false),
        }
        self.stage = Stage::Over;
    }

    /// What it has come to; the end if it failed.
    fn arrive(&mut self, hook: Hook) -> Said {
        let world = self.host.world.clone();
        let failed = |in_flight| {
            let reason = "simulated".to_owned();
            Said::Ended(Ended::Failed { reason, in_flight, was_killed: false })
        };
        match (self.kind, hook) {
            (Kind::Dump, Hook::QueryExtFiles) => self.change("frozen", |copy| {
                copy.frozen = true;
                copy.in_repair = true;
            }),
            (Kind::Dump, Hook::PostDump) => {
                if world.fails("dump") {
                    self.stage = Stage::Over;
                    let in_flight = world.below(2) == 0;
                    self.change("let go after a failed dump", thaw);
                    return failed(in_flight);
                }
                let version = world.with(self.host.site, self.holder, |copy| copy.version).unwrap_or(0);
                std::fs::write(self.images.join(IMAGE), version.to_le_bytes()).unwrap();
                world.note(format_args!("dumped state {version}"));
            }
            (Kind::Restore, Hook::PreResume) => {
                let read = std::fs::read(self.images.join(IMAGE)).ok();
                let version = read.and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes);
                if world.fails("restore") {
                    self.stage = Stage::Over;
                    return failed(false);
                }
                let version = version.expect("the images were complete");
                self.change(&format!("restored state {version}"), |copy| {
                    copy.has_tasks = true;
                    copy.over.send_replace(false);
                    copy.frozen = true;
                    copy.version = version;
                });
            }
            (Kind::Restore, Hook::PostResume) => self.change("let run", |copy| copy.frozen = false),
            _ => {}
        }
        self.stage = Stage::Asking(hook);
        Said::Hook(hook)
    }

    fn finish(&mut self, well: bool) -> Said {
        self.stage = Stage::Over;
        match (self.kind, well) {
            (Kind::Dump, true) => self.host.world.end_tasks(self.host.site, self.holder, "killed by CRIU"),
            (Kind::Dump, false) => self.change("let go by CRIU", thaw),
            _ => {}
        }
        match well {
            true => Said::Ended(Ended::Well),
            false => {
                let reason = "a hook has said no".to_owned();
                Said::Ended(Ended::Failed { reason, in_flight: false, was_killed: false })
            }
        }
    }
}

fn thaw(copy: &mut super::world::Copy) {
    copy.frozen = false;
    copy.in_repair = false;
}

impl Criu for SimulatedCriu {
    fn warm(&mut self) -> BoxFuture<'_, Result<Features, SwrkError>> {
        async {
            self.host.world.pause(1, 10).await;
            Ok(Features::default())
        }
        .boxed()
    }

    fn dump<'a>(&'a mut self, _: i32, _: Option<&'a str>) -> BoxFuture<'a, Result<(), SwrkError>> {
        self.work(1, 10, Hook::PreDump);
        async { Ok(()) }.boxed()
    }

    fn restore(&mut self, _: bool) -> BoxFuture<'_, Result<(), SwrkError>> {
        async { Ok(()) }.boxed()
    }

    fn take_images(&mut self) -> Result<(), SwrkError> {
        self.work(5, 100, Hook::PreResume);
        Ok(())
    }

    fn next(&mut self) -> BoxFuture<'_, Said> {
        async {
            loop {
                let wake_at = match self.stage {
                    Stage::Working(until, _) | Stage::Ending(until, _) => Some(until),
                    Stage::Idle | Stage::Asking(_) | Stage::Over => None,
                };
                if self.is_killed() {
                    self.let_go();
                    let reason = "CRIU was killed".to_owned();
                    return Said::Ended(Ended::Failed { reason, in_flight: false, was_killed: true });
                }
                let ready = async {
                    match wake_at {
                        Some(at) => tokio::time::sleep_until(at).await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    biased;
                    () = self.life.kill.notified() => {}
                    () = ready => match self.stage {
                        Stage::Working(_, hook) => return self.arrive(hook),
                        Stage::Ending(_, well) => return self.finish(well),
                        _ => {}
                    },
                }
            }
        }
        .boxed()
    }

    fn answer(&mut self, yes: bool) -> BoxFuture<'_, Result<(), SwrkError>> {
        match (self.stage, yes) {
            (Stage::Asking(_), false) => self.wind_up(false),
            (Stage::Asking(Hook::PreDump), true) => self.work(1, 10, Hook::QueryExtFiles),
            (Stage::Asking(Hook::QueryExtFiles), true) => self.work(5, 60, Hook::PostDump),
            (Stage::Asking(Hook::PreResume), true) => self.work(0, 5, Hook::PostResume),
            (Stage::Asking(_), true) => self.wind_up(true),
            _ => {}
        }
        async { Ok(()) }.boxed()
    }

    fn end(mut self: Box<Self>) -> BoxFuture<'static, ()> {
        async move {
            self.host.world.pause(0, 3).await;
            if self.stage == Stage::Over {
                return;
            }
            self.let_go();
        }
        .boxed()
    }
}

impl Drop for SimulatedCriu {
    /// It finds its agent gone. What it had not restored yet goes with it.
    fn drop(&mut self) {
        let (host, holder) = (self.host.clone(), self.holder);
        let is_killed = self.is_killed();
        match (self.kind, self.stage) {
            (_, Stage::Idle | Stage::Over) => {}
            _ if is_killed => self.let_go(),
            // It goes on to its next question, and undoes what it did.
            (Kind::Dump, _) => {
                let world = host.world.clone();
                let (after, site) = (world.between(1, 60), host.site);
                tokio::spawn(async move {
                    tokio::time::sleep(after).await;
                    world.change(site, holder, "let go by a CRIU without an agent", thaw);
                });
            }
            // Its holder is told by the same death: who is quicker?
            (_, Stage::Asking(Hook::PreResume)) => {
                if host.world.below(2) == 0 {
                    host.world.end_tasks(host.site, holder, "dropped by a CRIU without an agent");
                }
            }
            (_, Stage::Working(_, Hook::PostResume)) => {
                if host.world.below(2) == 0 {
                    self.change("let run by a CRIU without an agent", |copy| copy.frozen = false);
                }
            }
            _ => {}
        }
    }
}
