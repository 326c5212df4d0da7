//! A task's open files: which of them CRIU cannot dump, and what the others need at the target.
//!
//! What CRIU takes is in `dump_one_file` of its `files.c`. A descriptor that goes away while it is looked at is none.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};

use super::problem::{Problem, Task};
use super::sockets::{self, Kind};
use super::tasks::{Found, UnixEnd};
use crate::criu::swrk::GHOST_LIMIT_BYTES;
use crate::protocol::manifest::FileKind;
use crate::workload::sys;

/// What stands behind a path that is gone.
pub const DELETED: &str = " (deleted)";
/// Files without a path that CRIU dumps.
const ANONYMOUS: [&str; 8] =
    ["[eventfd]", "[eventpoll]", "inotify", "[fanotify]", "[signalfd]", "[timerfd]", "[pidfd]", "bpf-map"];
/// Namespace files, by their kinds.
const NAMESPACES: [&str; 8] = ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"];

/// Device numbers of linux/major.h and linux/miscdevice.h.
const MEMORY_MAJOR: u64 = 1;
const TTY_MAJORS: [u64; 2] = [4, 5];
const PTY_MAJORS: std::ops::RangeInclusive<u64> = 128..=143;
const MISC_MAJOR: u64 = 10;
const MISC_MINORS_DUMPED: [u64; 2] = [200, 235];

/// One descriptor of a task.
struct Descriptor<'a> {
    task: &'a Task,
    fd: i32,
    /// `/proc/PID/fd/N`.
    at: PathBuf,
    /// What that leads to, in the kernel's words.
    link: String,
}

/// Looks at all descriptors of a task.
pub fn look(task: &Task, found: &mut Found) {
    let folder = PathBuf::from(format!("/proc/{}/fd", task.pid));
    let Ok(entries) = fs::read_dir(&folder) else { return };
    let pidfd = sys::pidfd_open(task.pid).ok();
    let mounts = mounts(task.pid);
    for entry in entries.flatten() {
        let Some(fd) = entry.file_name().to_str().and_then(|fd| fd.parse().ok()) else { continue };
        let at = entry.path();
        let Ok(link) = fs::read_link(&at) else { continue };
        let descriptor = Descriptor { task, fd, at, link: lossy(link.as_os_str()) };
        // One that ends here is gone.
        let _ = descriptor.look(pidfd.as_ref(), &mounts, found);
    }
}

impl Descriptor<'_> {
    fn look(&self, pidfd: Option<&OwnedFd>, mounts: &HashSet<u64>, found: &mut Found) -> io::Result<()> {
        if let Some(inode) = inside(&self.link, "socket:[") {
            let Some(pidfd) = pidfd else { return Ok(()) };
            return self.look_at_socket(&sys::pidfd_getfd(pidfd.as_fd(), self.fd)?, inode, found);
        }
        if let Some(kind) = undumped_kind(&self.link) {
            self.cannot_be_dumped(format!("an open file of kind {kind:?}"), found);
            return Ok(());
        }
        if let Some((kind, inode)) = self.link.split_once(":[")
            && NAMESPACES.contains(&kind)
        {
            let own = fs::read_link(format!("/proc/{}/ns/{kind}", self.task.pid))?;
            if own.as_os_str() != OsStr::new(&self.link) {
                let inode = inode.trim_end_matches(']');
                self.cannot_be_dumped(format!("{kind} namespace {inode}, which is not its own"), found);
            }
            return Ok(());
        }
        // Pipes and the like have no path.
        if !self.link.starts_with('/') { Ok(()) } else { self.look_at_file(mounts, found) }
    }

    fn look_at_socket(&self, socket: &OwnedFd, inode: &str, found: &mut Found) -> io::Result<()> {
        match sockets::kind_of(socket)? {
            Kind::Unix => {
                let inode = inode.parse().map_err(|_| io::ErrorKind::InvalidData)?;
                found.unix.push(UnixEnd { task: self.task.clone(), fd: self.fd, inode });
            }
            Kind::Bound(needed) => {
                found.sockets.insert(needed);
            }
            Kind::Plain => {}
            Kind::Unknown(what) => self.cannot_be_dumped(what, found),
        }
        Ok(())
    }

    fn look_at_file(&self, mounts: &HashSet<u64>, found: &mut Found) -> io::Result<()> {
        let metadata = fs::metadata(&self.at)?;
        if let Some(what) = undumped_device(&metadata) {
            self.cannot_be_dumped(format!("{what} {:?}", self.link), found);
            return Ok(());
        }
        if metadata.nlink() == 0 || self.link.ends_with(DELETED) {
            let (bytes, limit) = (metadata.blocks() * 512, u64::from(GHOST_LIMIT_BYTES));
            if metadata.is_file() && !self.link.starts_with("/memfd:") && bytes > limit {
                let path = self.link.trim_end_matches(DELETED).to_owned();
                let (mib, limit_mib) = (bytes.div_ceil(1 << 20), limit >> 20);
                found.problems.push(Problem::Deleted {
                    task: self.task.clone(),
                    fd: self.fd,
                    path,
                    mib,
                    limit_mib,
                });
            }
            return Ok(());
        }
        let info = fs::read_to_string(format!("/proc/{}/fdinfo/{}", self.task.pid, self.fd))?;
        if let Some(mount) = field(&info, "mnt_id").and_then(|id| id.parse().ok())
            && !mounts.contains(&mount)
        {
            let (task, path) = (self.task.clone(), self.link.clone());
            found.problems.push(Problem::Mount { task, fd: self.fd, path });
            return Ok(());
        }
        let flags = field(&info, "flags").and_then(|flags| i32::from_str_radix(flags, 8).ok()).unwrap_or(0);
        let is_read_only = flags & libc::O_ACCMODE == libc::O_RDONLY;
        found.needs_file(&self.link, kind_of(&metadata, is_read_only.then_some(metadata.len())));
        Ok(())
    }

    fn cannot_be_dumped(&self, what: String, found: &mut Found) {
        found.problems.push(Problem::Descriptor { task: self.task.clone(), fd: self.fd, what });
    }
}

/// What has to be at the target where this is at the source.
pub fn kind_of(metadata: &Metadata, bytes: Option<u64>) -> FileKind {
    if metadata.is_dir() {
        FileKind::Folder
    } else if metadata.is_file() {
        FileKind::Regular { bytes, blake3: None }
    } else {
        FileKind::Special
    }
}

/// What kind of file without a path this is, if CRIU does not dump it.
fn undumped_kind(link: &str) -> Option<&str> {
    link.strip_prefix("anon_inode:").filter(|kind| !ANONYMOUS.contains(kind))
}

/// A device that CRIU does not dump, in words.
fn undumped_device(metadata: &Metadata) -> Option<&'static str> {
    let kind = metadata.file_type();
    if kind.is_block_device() {
        return Some("the block device");
    }
    let (major, minor) = (major(metadata.rdev()), minor(metadata.rdev()));
    let is_dumped = match major {
        MEMORY_MAJOR => true,
        MISC_MAJOR => MISC_MINORS_DUMPED.contains(&minor),
        major => TTY_MAJORS.contains(&major) || PTY_MAJORS.contains(&major),
    };
    (kind.is_char_device() && !is_dumped).then_some("the device")
}

/// The mounts that a task sees, by number.
fn mounts(pid: i32) -> HashSet<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
    text.lines().filter_map(|line| line.split_whitespace().next()?.parse().ok()).collect()
}

/// What stands between `start` and a bracket.
fn inside<'a>(link: &'a str, start: &str) -> Option<&'a str> {
    link.strip_prefix(start)?.strip_suffix(']')
}

fn field<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    info.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim()))
}

fn lossy(text: &OsStr) -> String {
    Path::new(text).to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_that_can_be_dumped_are_told_from_those_that_cannot() {
        let of = |path: &str| undumped_device(&fs::metadata(path).unwrap());
        for fine in ["/dev/null", "/dev/urandom", "/dev/tty", "/", "/proc/self/exe"] {
            assert_eq!(of(fine), None, "{fine}");
        }
        assert_eq!(of("/dev/fuse"), Some("the device"));
    }

    #[test]
    fn kinds_that_can_be_dumped_are_told_from_those_that_cannot() {
        for fine in
            ["anon_inode:[eventpoll]", "anon_inode:inotify", "anon_inode:bpf-map", "pipe:[7]", "/dev/null"]
        {
            assert_eq!(undumped_kind(fine), None, "{fine}");
        }
        assert_eq!(undumped_kind("anon_inode:[io_uring]"), Some("[io_uring]"));
        assert_eq!(undumped_kind("anon_inode:bpf-prog"), Some("bpf-prog"));
    }

    #[test]
    fn another_namespaces_file_is_named() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let namespace = std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWIPC).unwrap();
            fs::File::open("/proc/thread-self/ns/ipc").unwrap()
        });
        let (_other, _own) = (namespace.join().unwrap(), fs::File::open("/proc/self/ns/ipc").unwrap());
        let text = said_of_me();
        assert_eq!(text.matches("ipc namespace").count(), 1, "{text}");
        assert!(text.contains("which is not its own (descriptor "), "{text}");
    }

    #[test]
    fn a_file_of_another_mount_namespace_is_named() {
        use nix::mount::{MsFlags, mount};
        use nix::sched::CloneFlags;
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_owned();
        let file = std::thread::spawn(move || {
            nix::sched::unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).unwrap();
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
            mount(Some("tmpfs"), &path, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
            fs::File::create(path.join("outside")).unwrap()
        });
        let _file = file.join().unwrap();
        let text = said_of_me();
        assert!(
            text.contains("outside\" (descriptor ") && text.contains("from a mount that is not"),
            "{text}"
        );
    }

    fn said_of_me() -> String {
        let me = Task { pid: std::process::id().cast_signed(), name: "me".into() };
        let mut found = Found::default();
        look(&me, &mut found);
        found.problems.iter().map(|problem| format!("{problem}\n")).collect()
    }

    #[test]
    fn what_a_process_holds_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data");
        let writing = fs::File::create(&path).unwrap();
        let _device = fs::File::open("/dev/fuse").unwrap();
        let _listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let (_one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let me = Task { pid: std::process::id().cast_signed(), name: "me".into() };
        let mut found = Found::default();
        look(&me, &mut found);
        let file = &found.files[path.to_str().unwrap()];
        assert_eq!(file.kind, FileKind::Regular { bytes: None, blake3: None });
        assert!(
            found
                .problems
                .iter()
                .any(|problem| problem.to_string().contains("holds the device \"/dev/fuse\""))
        );
        assert!(found.sockets.iter().any(|socket| socket.is_open));
        assert!(found.unix.len() >= 2);

        drop(writing);
        let _reading = fs::File::open(&path).unwrap();
        let mut found = Found::default();
        look(&me, &mut found);
        let file = &found.files[path.to_str().unwrap()];
        assert_eq!(file.kind, FileKind::Regular { bytes: Some(0), blake3: None });
    }

    #[test]
    fn a_large_file_that_was_deleted_is_named() {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = folder.path().join("large");
        let file = fs::File::create(&path).unwrap();
        nix::fcntl::fallocate(
            &file,
            nix::fcntl::FallocateFlags::empty(),
            0,
            libc::off_t::from(GHOST_LIMIT_BYTES) + 4096,
        )
        .unwrap();
        fs::remove_file(&path).unwrap();
        let text = said_of_me();
        assert!(text.contains("large\" (descriptor ") && text.contains("whose 65 MiB"), "{text}");
    }
}
