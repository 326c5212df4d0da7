//! A TUN device: packets that a namespace sends into it are read here, and what is written here it receives.

#![expect(unsafe_code, reason = "TUN devices are set up by ioctls that no crate of ours wraps")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;

use crate::error::LabError;
use crate::namespace::Namespace;

/// Where TUN devices come from.
const CLONE: &str = "/dev/net/tun";

/// A TUN device in a namespace. It vanishes with its file, however the process ends.
#[derive(Debug)]
pub(super) struct Device {
    file: File,
}

impl Device {
    /// Makes the device `name` in `namespace`; it is down.
    pub(super) fn new(namespace: &Namespace, name: &str) -> Result<Device, LabError> {
        let what =
            format!("make the TUN device {name} in the namespace {} (is {CLONE} there?)", namespace.name());
        // The file belongs to the namespace in which it was opened.
        namespace.run(|| open(name)).map(|file| Device { file }).map_err(LabError::io(what))
    }

    /// Whether the namespace hands over segments of up to 64 KiB, to be cut by whoever sends them on a wire, or frames.
    /// Checksums are left to be filled in either way: nothing damages packets between here and the other device.
    pub(super) fn take_large_segments(&self, large: bool) -> Result<(), LabError> {
        use libc::{TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6, TUN_F_USO4, TUN_F_USO6};
        let tcp = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
        if !large {
            return self.offload(TUN_F_CSUM);
        }
        // Kernels before 6.2 do not know UDP's.
        self.offload(tcp | TUN_F_USO4 | TUN_F_USO6).or_else(|_| self.offload(tcp))
    }

    fn offload(&self, features: libc::c_uint) -> Result<(), LabError> {
        // SAFETY: TUNSETOFFLOAD takes a number, no pointer.
        let result =
            unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(features)) };
        Errno::result(result)
            .map(drop)
            .map_err(|errno| LabError::io("set the offloads of a TUN device")(errno.into()))
    }

    /// Reads one packet with its `virtio_net_hdr`; `None` if there is none now.
    pub(super) fn read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match nix::unistd::read(&self.file, buffer) {
            Ok(length) => Ok(Some(length)),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Writes one packet with its `virtio_net_hdr`.
    pub(super) fn write(&self, packet: &[u8]) -> io::Result<()> {
        nix::unistd::write(&self.file, packet).map(drop).map_err(io::Error::from)
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn open(name: &str) -> io::Result<File> {
    let flags = libc::O_NONBLOCK | libc::O_CLOEXEC;
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(CLONE)?;
    let mut ifr_name = [0; libc::IFNAMSIZ];
    // The last byte stays zero.
    if name.len() >= ifr_name.len() {
        return Err(Errno::ENAMETOOLONG.into());
    }
    for (to, from) in ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let kind = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL;
    // The upper bit is a flag, not a sign.
    let ifr_flags = kind as libc::c_short;
    let request = libc::ifreq { ifr_name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: ifr_flags } };
    // SAFETY: TUNSETIFF reads and writes a `struct ifreq`, which `request` is and outlives the call.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw const request) })?;
    Ok(file)
}
