//! System calls that neither `std` nor `nix` wraps. Nothing else of this crate needs `unsafe` but
//! [`super::enter`]'s `pre_exec`.
#![expect(unsafe_code, reason = "thin wrappers of system calls; each says why it is sound")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use tokio::io::unix::AsyncFd;

/// Lets the runtime wait for a descriptor.
pub fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` that the `AsyncFd` owns names the same open file until it is dropped with it.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

/// A descriptor that becomes readable when the process ends.
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes two integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    owned(fd)
}

/// A duplicate of another process's descriptor.
pub fn pidfd_getfd(pidfd: BorrowedFd<'_>, fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: takes three integers and touches no memory of ours; `pidfd` is open for the call.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) };
    owned(fd)
}

/// Marks every descriptor from `first` on to be closed by the next `exec`. Safe between fork and exec.
pub fn close_on_exec_from(first: RawFd) -> io::Result<()> {
    // SAFETY: takes three integers and touches no memory of ours; no descriptor is closed now.
    let done =
        unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Sends a few bytes with descriptors.
pub fn send_with_fds(socket: RawFd, bytes: &[u8], fds: &[RawFd]) -> io::Result<()> {
    let (words, rights) = ([io::IoSlice::new(bytes)], [ControlMessage::ScmRights(fds)]);
    Ok(sendmsg::<()>(socket, &words, &rights, MsgFlags::MSG_NOSIGNAL, None).map(drop)?)
}

/// Receives a few bytes and the descriptors that were sent with them.
pub fn receive_fds(socket: RawFd) -> io::Result<Vec<OwnedFd>> {
    let mut bytes = [0; 16];
    let mut room = nix::cmsg_space!([RawFd; 4]);
    let mut words = [io::IoSliceMut::new(&mut bytes)];
    let message = recvmsg::<()>(socket, &mut words, Some(&mut room), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = part {
            // SAFETY: the kernel has just made these descriptors for us and nobody else knows of them.
            fds.extend(received.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok(fds)
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    let Ok(fd) = RawFd::try_from(fd) else { return Err(io::ErrorKind::InvalidData.into()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
