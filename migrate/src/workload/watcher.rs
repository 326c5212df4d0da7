//! What pid 1 does for a workload that has one of ours, for a container that its own monitor keeps: the hidden subcommand
//! `watcher`. It is there while a copy is not confirmed yet or lacks memory, and ends then.

use std::os::fd::AsFd;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::holder::HolderPid;
use super::keeper::{Keeper, Todo};
use super::{processes, sys};
use crate::net::repair;

/// As the subcommand is called.
pub const NAME: &str = "watcher";

/// Watches the container below `monitor`.
pub fn run(monitor: HolderPid) -> Result<()> {
    sys::close_on_exec_from(3).context("close_range")?;
    let ended = sys::pidfd_open(monitor.pid).context("watch the container's monitor")?;
    ensure!(monitor.is_alive(), "the container's monitor is gone");
    let mut keeper = Keeper::new()?;
    while monitor.is_alive() && !keeper.is_done() {
        match keeper.wait(ended.as_fd())? {
            Todo::Nothing => {}
            Todo::Stop => repair::signal(monitor.pid, Signal::SIGSTOP),
            // What is held of its memory is held until none of its tasks is left.
            Todo::Kill | Todo::Abandon => {
                kill_all(monitor);
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Kills everything in the container, and waits until it is gone.
fn kill_all(monitor: HolderPid) {
    let tasks = processes::kept_by(monitor.pid);
    let ends: Vec<_> = tasks.iter().filter_map(|pid| sys::pidfd_open(*pid).ok()).collect();
    repair::signal(monitor.pid, Signal::SIGKILL);
    for end in ends {
        let mut wait = [nix::poll::PollFd::new(end.as_fd(), nix::poll::PollFlags::POLLIN)];
        while nix::poll::poll(&mut wait, nix::poll::PollTimeout::NONE) == Err(nix::errno::Errno::EINTR) {}
    }
}
