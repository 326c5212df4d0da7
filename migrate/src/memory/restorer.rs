//! What a restoring CRIU says to who brings the pages (its `uffd.c`): each task's pid and userfaultfd, and that the
//! restore is finished.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use tokio::io::Interest;
use tokio::net::UnixStream;

/// Where CRIU looks for the listener, in its working folder.
pub const SOCKET: &str = "lazy-pages.socket";
/// CRIU's last word.
const FINISHED: u32 = 0x5253_5446;

/// What CRIU says.
#[derive(Debug)]
pub enum Said {
    /// A task, as its own namespace counts, and its userfaultfd.
    Task(i32, OwnedFd),
    /// All mappings are there.
    Finished,
    /// It is gone.
    Ended,
}

/// The connection from CRIU.
#[derive(Debug)]
pub struct Restorer {
    stream: UnixStream,
    /// Whose descriptor comes next.
    task: Option<i32>,
}

impl Restorer {
    /// Takes a connection over.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, task: None }
    }

    /// Waits for what comes next. May be dropped and called again.
    pub async fn next(&mut self) -> io::Result<Said> {
        loop {
            let mut word = [0; 4];
            let wanted = if self.task.is_some() { 1 } else { 4 };
            let (len, descriptor) = self
                .stream
                .async_io(Interest::READABLE, || receive(&self.stream, &mut word[..wanted]))
                .await?;
            match (self.task, descriptor) {
                _ if len == 0 => return Ok(Said::Ended),
                (Some(pid), Some(descriptor)) => {
                    self.task = None;
                    return Ok(Said::Task(pid, descriptor));
                }
                (None, None) if len == 4 && u32::from_ne_bytes(word) == FINISHED => {
                    return Ok(Said::Finished);
                }
                // A negative number is a dead task's, which has no memory.
                (None, None) if len == 4 => {
                    let pid = i32::from_ne_bytes(word);
                    self.task = (pid > 0).then_some(pid);
                }
                _ => return Err(io::Error::other("CRIU says something unknown to who brings the pages")),
            }
        }
    }
}

fn receive(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    receive_descriptor(stream.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT)
}

/// Receives bytes and the descriptor that comes with them, if one does.
#[expect(unsafe_code, reason = "a descriptor that came through a socket is a number at first")]
pub fn receive_descriptor(
    socket: std::os::fd::RawFd,
    buffer: &mut [u8],
    flags: MsgFlags,
) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut control = nix::cmsg_space!([std::os::fd::RawFd; 1]);
    let mut parts = [IoSliceMut::new(buffer)];
    let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket, &mut parts, Some(&mut control), flags)?;
    let mut descriptor = None;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = control {
            for number in numbers {
                // SAFETY: the kernel has just made it for this process and nobody else knows of it.
                descriptor = Some(unsafe { OwnedFd::from_raw_fd(number) });
            }
        }
    }
    Ok((message.bytes, descriptor))
}
