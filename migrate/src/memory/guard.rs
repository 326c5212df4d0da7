//! Who keeps a workload's memory from turning to zeros. When the last holder of a userfaultfd goes away, the kernel
//! gives zeros for pages that have not come. So the workload's pid 1 holds each of them too, and if who brings the pages
//! dies before its work is done, it kills the workload before it lets go.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::restorer::receive_descriptor;

/// Comes with a userfaultfd.
const HOLD: u8 = b'u';
/// Everything is there.
const DONE: u8 = b'd';

/// Sends one byte and a descriptor.
pub fn send_descriptor(socket: RawFd, word: u8, descriptor: BorrowedFd<'_>) -> io::Result<()> {
    let descriptors = [descriptor.as_raw_fd()];
    let control = [ControlMessage::ScmRights(&descriptors)];
    sendmsg::<()>(socket, &[IoSlice::new(&[word])], &control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// The end of who brings the pages.
#[derive(Debug)]
pub struct Bringer<'a>(pub BorrowedFd<'a>);

impl Bringer<'_> {
    /// Has a userfaultfd held.
    pub fn hold(&self, uffd: &OwnedFd) -> io::Result<()> {
        send_descriptor(self.0.as_raw_fd(), HOLD, uffd.as_fd())
    }

    /// Says that every page is there.
    pub fn done(&self) -> io::Result<()> {
        sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(&[DONE])], &[], MsgFlags::MSG_NOSIGNAL, None)?;
        Ok(())
    }
}

/// Pid 1's end.
#[derive(Debug)]
pub struct Guard {
    socket: OwnedFd,
    held: Vec<OwnedFd>,
}

/// What pid 1 has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Todo {
    /// Listen on.
    Nothing,
    /// Forget this guard: every page is there, or there was none to wait for.
    LetGo,
    /// Kill the workload, and only then let go.
    Kill,
}

impl Guard {
    /// With nothing to hold yet.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, held: Vec::new() }
    }

    /// Hears what has come.
    pub fn hear(&mut self) -> Todo {
        let mut word = [0];
        match receive_descriptor(self.socket.as_raw_fd(), &mut word, MsgFlags::MSG_DONTWAIT) {
            Ok((1, Some(uffd))) if word[0] == HOLD => {
                self.held.push(uffd);
                Todo::Nothing
            }
            Ok((1, None)) if word[0] == DONE => Todo::LetGo,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                Todo::Nothing
            }
            _ if self.held.is_empty() => Todo::LetGo,
            _ => Todo::Kill,
        }
    }
}

impl AsFd for Guard {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn who_dies_at_work_takes_the_workload_along() {
        let null: OwnedFd = File::open("/dev/null").unwrap().into();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut guard = Guard::new(theirs.into());
        assert_eq!(guard.hear(), Todo::Nothing);
        Bringer(ours.as_fd()).hold(&null).unwrap();
        assert_eq!((guard.hear(), guard.held.len()), (Todo::Nothing, 1));
        drop(ours);
        assert_eq!(guard.hear(), Todo::Kill);
    }

    #[test]
    fn who_is_done_or_never_began_does_not() {
        let null: OwnedFd = File::open("/dev/null").unwrap().into();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut guard = Guard::new(theirs.into());
        Bringer(ours.as_fd()).hold(&null).unwrap();
        Bringer(ours.as_fd()).done().unwrap();
        drop(ours);
        assert_eq!(guard.hear(), Todo::Nothing);
        assert_eq!(guard.hear(), Todo::LetGo);
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(ours);
        assert_eq!(Guard::new(theirs.into()).hear(), Todo::LetGo);
    }
}
