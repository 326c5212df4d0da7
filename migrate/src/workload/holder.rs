//! Making a holder (a pid and mount namespace with a tiny pid 1) and killing it with all that is in it.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::str::FromStr;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::processes::{self, Process, start_ticks, wait_end};
use super::watcher;
use crate::memory::guard::send_descriptor;

/// The first pid of a workload's own: far above what CRIU and its helpers use in a fresh namespace, so that
/// the dumped pids are free at the target.
pub const FIRST_WORKLOAD_PID: u32 = 5000;
/// A holder needs a few mounts and two processes.
const START_LIMIT: Duration = Duration::from_secs(10);
/// The kernel kills what is in the namespace before pid 1 is gone.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// What a holder is told so that it outlives its agent.
pub const KEEP: u8 = b'k';
/// What it is told so that it outlives its agent, but stops the workload then.
pub const LEASE: u8 = b'l';
/// Comes with its end of a guard of the workload's memory.
pub const GUARD: u8 = b'g';

/// Why a holder could not be had.
#[derive(Debug, thiserror::Error)]
pub enum HolderError {
    /// It did not start.
    #[error("the workload's namespaces could not be made: {0}. The agent needs root (CAP_SYS_ADMIN)")]
    Start(String),
    /// The system refused.
    #[error("the workload's namespaces could not be made")]
    Io(#[from] io::Error),
    /// Text that names no holder.
    #[error("{0:?} is not a holder: PID:TICKS is meant")]
    Text(String),
}

/// A holder's identity: its pid 1 as this host counts (of podman's containers: the container's monitor), and when it
/// started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct HolderPid {
    /// As this host counts.
    pub pid: i32,
    /// Clock ticks since boot, so that a pid that was given out again is no mistake.
    pub start_ticks: u64,
}

impl HolderPid {
    /// Of a process that runs now.
    pub fn of(pid: i32) -> Option<Self> {
        Some(Self { pid, start_ticks: start_ticks(pid)? })
    }

    /// True while it is this very process and not waiting to be reaped.
    pub fn is_alive(&self) -> bool {
        start_ticks(self.pid) == Some(self.start_ticks)
            && Process::read(self.pid).is_some_and(|process| process.is_alive())
    }

    /// Whether the workload still waits for some of its memory, which pid 1 guards meanwhile.
    pub fn lacks_memory(&self) -> bool {
        if !processes::is_monitor(self.pid) {
            return holds_memory(self.pid);
        }
        let watches = [watcher::NAME.to_owned(), self.to_string()];
        let is_watcher = |pid: &i32| watches.iter().all(|word| processes::arguments(*pid).contains(word));
        processes::all().filter(is_watcher).any(holds_memory)
    }

    /// CRIU's cache of what it has found out about this kernel, inside the holder.
    pub fn kernel_cache(&self) -> PathBuf {
        super::init::kernel_cache_of(self.pid)
    }

    /// Kills it and with it everything inside; returns when it is gone.
    pub async fn kill(self) -> bool {
        if !self.is_alive() {
            return true;
        }
        if processes::is_monitor(self.pid) {
            // It tells podman of the end, and then ends itself.
            for pid in processes::around(self.pid) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        } else if kill(Pid::from_raw(self.pid), Signal::SIGKILL).is_err() {
            return true;
        }
        wait_end(self.pid, KILL_LIMIT).await
    }
}

impl fmt::Display for HolderPid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.pid, self.start_ticks)
    }
}

impl FromStr for HolderPid {
    type Err = HolderError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (pid, ticks) = text.split_once(':')?;
            Some(Self { pid: pid.parse().ok()?, start_ticks: ticks.parse().ok()? })
        };
        parse().ok_or_else(|| HolderError::Text(text.to_owned()))
    }
}

fn holds_memory(pid: i32) -> bool {
    let Ok(descriptors) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    let links = descriptors.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
    links.into_iter().any(|link| link.as_os_str() == "anon_inode:[userfaultfd]")
}

/// A child that was started with pipes has them.
fn no_pipe() -> io::Error {
    io::ErrorKind::BrokenPipe.into()
}

/// A holder that dies with this agent unless it is told to stay.
#[derive(Debug)]
pub struct Holder {
    pid: HolderPid,
    keep: UnixStream,
}

impl Holder {
    /// Makes one. For a workload that is started here, `first_pid` is where its pids begin; for one that is
    /// restored the pids come with it. `kernel_cache` is where [`crate::criu::kernel_cache::keep`] puts CRIU's.
    pub async fn start(first_pid: Option<u32>, kernel_cache: &Path) -> Result<Self, HolderError> {
        let mut command = tokio::process::Command::new("/proc/self/exe");
        let (keep, theirs) = std::os::unix::net::UnixStream::pair()?;
        keep.set_nonblocking(true)?;
        let keep = UnixStream::from_std(keep)?;
        command.arg("holder").stdin(OwnedFd::from(theirs)).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.arg("--kernel-cache").arg(kernel_cache);
        if let Some(first_pid) = first_pid {
            command.args(["--first-pid", &first_pid.to_string()]);
        }
        let mut child = command.spawn()?;
        // It has its own copy of the other end, which has to be the only one.
        drop(command);
        let mut stdout = child.stdout.take().ok_or_else(no_pipe)?;
        let mut stderr = child.stderr.take().ok_or_else(no_pipe)?;
        // Both ends are closed by pid 1 when it is ready, and by their deaths otherwise.
        let (mut said, mut complaint) = (String::new(), String::new());
        let talk = async {
            stdout.read_to_string(&mut said).await?;
            stderr.read_to_string(&mut complaint).await?;
            child.wait().await
        };
        let ended = tokio::time::timeout(START_LIMIT, talk)
            .await
            .map_err(|_| HolderError::Start(format!("not ready within {START_LIMIT:?}")))??;
        let pid = said.lines().next().and_then(|line| line.parse::<i32>().ok());
        match pid.and_then(HolderPid::of) {
            Some(pid) if ended.success() && said.lines().nth(1) == Some("ready") => Ok(Self { pid, keep }),
            _ => Err(HolderError::Start(complaint.trim().to_owned())),
        }
    }

    /// Has a container that its monitor keeps watched as pid 1 of ours would.
    pub fn watch(monitor: HolderPid) -> Result<Self, HolderError> {
        let (keep, theirs) = std::os::unix::net::UnixStream::pair()?;
        keep.set_nonblocking(true)?;
        let mut command = tokio::process::Command::new("/proc/self/exe");
        command.args([watcher::NAME, "--monitor", &monitor.to_string()]).stdin(OwnedFd::from(theirs));
        // A signal for the agent's terminal is not for it.
        let mut watcher = command.stdout(Stdio::null()).stderr(Stdio::null()).process_group(0).spawn()?;
        tokio::spawn(async move { watcher.wait().await });
        Ok(Self { pid: monitor, keep: UnixStream::from_std(keep)? })
    }

    /// Its identity.
    pub fn pid(&self) -> HolderPid {
        self.pid
    }

    /// From here on the agent's death does not kill the workload, but stops it.
    pub async fn lease(&mut self) -> Result<(), HolderError> {
        Ok(self.keep.write_all(&[LEASE]).await?)
    }

    /// Has it guard the workload's memory.
    pub fn guard(&self, end: &OwnedFd) -> Result<(), HolderError> {
        Ok(send_descriptor(self.keep.as_raw_fd(), GUARD, end.as_fd())?)
    }

    /// Lets it outlive this agent.
    pub async fn keep(mut self) -> Result<HolderPid, HolderError> {
        self.keep.write_all(&[KEEP]).await?;
        Ok(self.pid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_is_more_than_a_pid() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let me = HolderPid { pid, start_ticks: start_ticks(pid).unwrap() };
        assert!(me.is_alive());
        assert!(!HolderPid { start_ticks: me.start_ticks + 1, ..me }.is_alive());
        assert_eq!(me.to_string().parse::<HolderPid>().unwrap(), me);
        assert!("12".parse::<HolderPid>().is_err());
    }
}
