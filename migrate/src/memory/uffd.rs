//! userfaultfd(2): what a task lacks and what it does to its memory, and filling its pages.
#![expect(unsafe_code, reason = "system calls that neither `std` nor `nix` wraps; each says why it is sound")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

use self::abi::{
    UffdioCopy, UffdioRange, UffdioZeropage, uffdio_copy, uffdio_unregister, uffdio_wake, uffdio_zeropage,
};
use super::space::Range;

/// `struct uffd_msg`.
const MESSAGE_BYTES: usize = 32;

/// linux/userfaultfd.h.
mod abi {
    const UFFDIO: u8 = 0xaa;

    #[repr(C)]
    #[derive(Debug)]
    pub struct UffdioRange {
        pub start: u64,
        pub len: u64,
    }

    #[repr(C)]
    #[derive(Debug)]
    pub struct UffdioCopy {
        pub dst: u64,
        pub src: u64,
        pub len: u64,
        pub mode: u64,
        pub copy: i64,
    }

    #[repr(C)]
    #[derive(Debug)]
    pub struct UffdioZeropage {
        pub range: UffdioRange,
        pub mode: u64,
        pub zeropage: i64,
    }

    nix::ioctl_read!(uffdio_unregister, UFFDIO, 0x01, UffdioRange);
    nix::ioctl_read!(uffdio_wake, UFFDIO, 0x02, UffdioRange);
    nix::ioctl_readwrite!(uffdio_copy, UFFDIO, 0x03, UffdioCopy);
    nix::ioctl_readwrite!(uffdio_zeropage, UFFDIO, 0x04, UffdioZeropage);
}

/// What a task did.
#[derive(Debug)]
pub enum Said {
    /// It waits for the page of this address.
    Fault(u64),
    /// It has a child with the same memory.
    Fork(OwnedFd),
    /// It has moved memory.
    Remap {
        /// From here.
        from: u64,
        /// To here.
        to: u64,
        /// So many bytes.
        len: u64,
    },
    /// It has given up what these addresses hold, and reads zeros there.
    Remove(Range),
    /// It has unmapped them.
    Unmap(Range),
}

/// What came of filling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filled {
    /// So many bytes from the start, and nothing is in the way of the next.
    Bytes(u64),
    /// The first page is there already.
    Present,
    /// Nothing is mapped there (yet).
    Unmapped,
    /// What the task has just done to its memory has to be heard first.
    Busy,
    /// The task is gone.
    Gone,
}

/// A task's userfaultfd, not blocking.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

impl Uffd {
    /// Takes a descriptor over.
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// What it is.
    pub fn fd(&self) -> &OwnedFd {
        &self.0
    }

    /// The next that the task did; `None` if there is nothing new.
    pub fn next(&self) -> io::Result<Option<Said>> {
        let mut message = [0; MESSAGE_BYTES];
        match nix::unistd::read(&self.0, &mut message) {
            Ok(MESSAGE_BYTES) => parse(&message).map(Some),
            Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Puts content where nothing is, and lets who waits for it go on.
    pub fn copy(&self, to: u64, content: &[u8]) -> io::Result<Filled> {
        let mut copy =
            UffdioCopy { dst: to, src: content.as_ptr() as u64, len: content.len() as u64, mode: 0, copy: 0 };
        // SAFETY: the kernel reads `content`, which is borrowed for the call, and writes `copy` only.
        let done = unsafe { uffdio_copy(self.0.as_raw_fd(), &raw mut copy) };
        filled(done, copy.copy, copy.len)
    }

    /// Puts a page of zeros where nothing is.
    pub fn zero(&self, range: &Range) -> io::Result<Filled> {
        let range = UffdioRange { start: range.start, len: range.end - range.start };
        let len = range.len;
        let mut zero = UffdioZeropage { range, mode: 0, zeropage: 0 };
        // SAFETY: the kernel writes `zero` only.
        let done = unsafe { uffdio_zeropage(self.0.as_raw_fd(), &raw mut zero) };
        filled(done, zero.zeropage, len)
    }

    /// Lets who waits for these addresses try again.
    pub fn wake(&self, range: &Range) -> io::Result<()> {
        let mut range = UffdioRange { start: range.start, len: range.end - range.start };
        // SAFETY: the kernel only reads `range`.
        gone_is_fine(unsafe { uffdio_wake(self.0.as_raw_fd(), &raw mut range) })
    }

    /// Stops looking after these addresses.
    pub fn unregister(&self, range: &Range) -> io::Result<()> {
        let mut range = UffdioRange { start: range.start, len: range.end - range.start };
        // SAFETY: the kernel only reads `range`.
        gone_is_fine(unsafe { uffdio_unregister(self.0.as_raw_fd(), &raw mut range) })
    }
}

fn gone_is_fine(done: nix::Result<libc::c_int>) -> io::Result<()> {
    match done {
        // Of a task that is gone.
        Ok(_) | Err(Errno::ENOMEM | Errno::ESRCH) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn filled(done: nix::Result<libc::c_int>, bytes: i64, len: u64) -> io::Result<Filled> {
    match (done, u64::try_from(bytes)) {
        (Ok(_), _) => Ok(Filled::Bytes(len)),
        // It was stopped in the middle: the next attempt says why.
        (Err(_), Ok(bytes)) if bytes > 0 => Ok(Filled::Bytes(bytes)),
        (Err(Errno::EEXIST), _) => Ok(Filled::Present),
        (Err(Errno::ENOENT), _) => Ok(Filled::Unmapped),
        (Err(Errno::EAGAIN), _) => Ok(Filled::Busy),
        (Err(Errno::ESRCH), _) => Ok(Filled::Gone),
        (Err(errno), _) => Err(errno.into()),
    }
}

fn parse(message: &[u8; MESSAGE_BYTES]) -> io::Result<Said> {
    let word = |place: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&message[8 + 8 * place..16 + 8 * place]);
        u64::from_ne_bytes(bytes)
    };
    Ok(match message[0] {
        0x12 => Said::Fault(word(1)),
        0x13 => {
            let number = RawFd::try_from(word(0) & u64::from(u32::MAX)).map_err(io::Error::other)?;
            // SAFETY: the kernel has just made this descriptor for us and nobody else knows of it.
            Said::Fork(unsafe { OwnedFd::from_raw_fd(number) })
        }
        0x14 => Said::Remap { from: word(0), to: word(1), len: word(2) },
        0x15 => Said::Remove(word(0)..word(1)),
        0x16 => Said::Unmap(word(0)..word(1)),
        other => return Err(io::Error::other(format!("userfaultfd said something unknown: {other:#x}"))),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says_is_understood() {
        let message = |event: u8, words: [u64; 3]| {
            let mut message = [0; MESSAGE_BYTES];
            message[0] = event;
            for (place, word) in words.into_iter().enumerate() {
                message[8 + 8 * place..16 + 8 * place].copy_from_slice(&word.to_ne_bytes());
            }
            parse(&message)
        };
        assert!(matches!(message(0x12, [1, 0x7000, 0]), Ok(Said::Fault(0x7000))));
        assert!(matches!(
            message(0x14, [0x1000, 0x2000, 0x3000]),
            Ok(Said::Remap { from: 0x1000, to: 0x2000, len: 0x3000 })
        ));
        assert!(
            matches!(message(0x15, [0x1000, 0x2000, 0]), Ok(Said::Remove(range)) if range == (0x1000..0x2000))
        );
        assert!(
            matches!(message(0x16, [0x1000, 0x2000, 0]), Ok(Said::Unmap(range)) if range == (0x1000..0x2000))
        );
        assert!(message(0x17, [0; 3]).is_err());
    }

    #[test]
    fn what_came_of_filling_is_told_apart() {
        let failed = |errno, bytes| filled(Err(errno), bytes, 8192).unwrap();
        assert_eq!(filled(Ok(0), 8192, 8192).unwrap(), Filled::Bytes(8192));
        assert_eq!(failed(Errno::EEXIST, 4096), Filled::Bytes(4096));
        assert_eq!(failed(Errno::EEXIST, -17), Filled::Present);
        assert_eq!(failed(Errno::ENOENT, 0), Filled::Unmapped);
        assert_eq!(failed(Errno::EAGAIN, -11), Filled::Busy);
        assert_eq!(failed(Errno::ESRCH, 0), Filled::Gone);
        assert!(filled(Err(Errno::EINVAL), 0, 8192).is_err());
    }
}
