//! What pid 1 of a workload and a container's watcher hear: their agent, until it has told them to stay without it, and
//! who brings the workload's memory.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::MsgFlags;

use super::holder::{GUARD, KEEP, LEASE};
use crate::memory::guard::{self, Guard};
use crate::memory::restorer::receive_descriptor;

/// What is to be done with the workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Todo {
    /// Listen on.
    Nothing,
    /// Stop it: nobody has confirmed this copy, and nobody is left who would end its lease.
    Stop,
    /// Kill it, and only then let go of what is held: its memory will not come.
    Kill,
    /// Kill it: the agent is gone without having said `go`.
    Abandon,
}

/// Listens; the agent is at the other end of stdin.
#[derive(Debug)]
pub struct Keeper {
    null: File,
    kept: bool,
    leased: bool,
    guard: Option<Guard>,
}

impl Keeper {
    /// Of a workload that dies with its agent.
    pub fn new() -> Result<Self> {
        let null = File::options().read(true).write(true).open("/dev/null").context("/dev/null")?;
        Ok(Self { null, kept: false, leased: false, guard: None })
    }

    /// Nobody is left to be listened to.
    pub fn is_done(&self) -> bool {
        self.kept && self.guard.is_none()
    }

    /// Waits until somebody has said something, or `other` is readable.
    pub fn wait(&mut self, other: BorrowedFd<'_>) -> Result<Todo> {
        let agent = std::io::stdin();
        // The places stay the same where there is no agent to be listened to.
        let agent_fd = if self.kept { other } else { agent.as_fd() };
        let fds = [Some(other), Some(agent_fd), self.guard.as_ref().map(AsFd::as_fd)];
        let mut wait: Vec<_> =
            fds.into_iter().flatten().map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut wait, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("poll"),
        }
        let is_ready = |place: usize| wait.get(place).is_some_and(|fd| fd.any() == Some(true));
        let (heard, guarded) = (!self.kept && is_ready(1), is_ready(2));
        if guarded && let Some(guard) = &mut self.guard {
            match guard.hear() {
                guard::Todo::Nothing => {}
                guard::Todo::LetGo => self.guard = None,
                guard::Todo::Kill => return Ok(Todo::Kill),
            }
        }
        if heard { self.hear(agent.as_raw_fd()) } else { Ok(Todo::Nothing) }
    }

    fn hear(&mut self, agent: std::os::fd::RawFd) -> Result<Todo> {
        let mut word = [0];
        match receive_descriptor(agent, &mut word, MsgFlags::empty()) {
            Ok((1, Some(end))) if word[0] == GUARD => self.guard = Some(Guard::new(end)),
            Ok((1, _)) if word[0] == LEASE => self.leased = true,
            Ok((said, _)) if said == 1 && word[0] == KEEP || said == 0 && self.leased => {
                nix::unistd::dup2_stdin(&self.null).context("close stdin")?;
                self.kept = true;
                return Ok(if said == 0 { Todo::Stop } else { Todo::Nothing });
            }
            _ => return Ok(Todo::Abandon),
        }
        Ok(Todo::Nothing)
    }
}
