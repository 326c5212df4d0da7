//! Removes labs: one's own on drop, and those whose creator is gone.
//!
//! Everything here may run twice at once for the same lab, from two processes that sweep: what is gone already is fine.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use nix::unistd::Pid;

use crate::error::LabError;
use crate::lab_id::{BPFFS, LabId, NAMESPACES, SCRATCH};
use crate::{podman, wait_for};

/// Where control groups are.
const CGROUPS: &str = "/sys/fs/cgroup";
/// How long killed processes may take to be gone; a process deep in a system call needs its time.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// Mounts the BPF file system where it is not.
pub(crate) fn mount_bpffs() -> Result<(), LabError> {
    let mounted = || statfs(BPFFS).is_ok_and(|found| found.filesystem_type() == BPF_FS_MAGIC);
    if mounted() {
        return Ok(());
    }
    mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), None::<&str>)
        .map_err(|errno| LabError::io(format!("mount the BPF file system at {BPFFS}"))(errno.into()))
}

/// Removes what labs left whose creator is gone: processes in their namespaces, namespaces, pins, scratch folders.
pub fn sweep() -> Result<(), LabError> {
    let mut seen = HashSet::new();
    for folder in [Path::new(NAMESPACES), Path::new(BPFFS), &SCRATCH] {
        for name in names(folder)? {
            if let Some(id) = LabId::from_name(&name)
                && !id.has_creator()
            {
                seen.insert(id);
            }
        }
    }
    seen.iter().for_each(remove);
    Ok(())
}

/// Removes one lab. What cannot be removed is said on standard error and left to the next sweep.
pub(crate) fn remove(id: &LabId) {
    let complain = |what: &Path, error: &dyn std::fmt::Display| {
        eprintln!("lab {id}: cannot remove {}: {error}", what.display());
    };
    let namespaces: Vec<PathBuf> = match names(Path::new(NAMESPACES)) {
        Ok(names) => names
            .into_iter()
            .filter(|name| LabId::from_name(name).as_ref() == Some(id))
            .map(|name| Path::new(NAMESPACES).join(name))
            .collect(),
        Err(error) => return complain(Path::new(NAMESPACES), &error),
    };
    let inodes: HashSet<u64> =
        namespaces.iter().filter_map(|path| Some(fs::metadata(path).ok()?.ino())).collect();
    if wait_for(KILL_LIMIT, || kill_all(&inodes).is_empty().then_some(())).is_none() {
        eprintln!("lab {id}: processes {:?} do not die", kill_all(&inodes));
    }

    // Pins first: with them the programs go, and the interfaces are quiet while the namespaces are taken down.
    let pins = id.pin_path();
    if let Err(error) = absent_is_fine(fs::remove_dir_all(&pins)) {
        complain(&pins, &error);
    }
    for path in namespaces {
        unmount(&path);
        if let Err(error) = absent_is_fine(fs::remove_file(&path)) {
            complain(&path, &error);
        }
    }
    remove_cgroups(id);
    let dir = id.dir();
    podman::remove_records(&dir);
    mounts_below(&dir).iter().for_each(|path| unmount(path));
    if let Err(error) = absent_is_fine(fs::remove_dir_all(&dir)) {
        complain(&dir, &error);
    }
}

/// Removes the control groups of a lab's containers, of either version.
fn remove_cgroups(id: &LabId) {
    let roots =
        names(Path::new(CGROUPS)).unwrap_or_default().into_iter().map(|name| Path::new(CGROUPS).join(name));
    for root in roots.chain([CGROUPS.into()]) {
        let groups = names(&root).unwrap_or_default().into_iter();
        for group in groups.filter(|name| LabId::from_name(name).as_ref() == Some(id)) {
            let group = root.join(group);
            // Tasks that were killed leave it a moment later.
            if wait_for(KILL_LIMIT, || absent_is_fine(remove_group(&group)).ok()).is_none() {
                eprintln!("lab {id}: the control group {} stays", group.display());
            }
        }
    }
}

/// Removes a control group and those below it.
fn remove_group(group: &Path) -> io::Result<()> {
    for entry in fs::read_dir(group)?.flatten() {
        if entry.file_type()?.is_dir() {
            remove_group(&entry.path())?;
        }
    }
    fs::remove_dir(group)
}

/// Kills the processes that live in one of the network namespaces and returns those that were still there.
fn kill_all(namespaces: &HashSet<u64>) -> Vec<Pid> {
    let found = residents(namespaces);
    for pid in &found {
        let _ = kill(*pid, Signal::SIGKILL);
    }
    found
}

/// Processes of this machine whose network namespace is one of `namespaces`; never the calling one, which may have a
/// thread inside.
fn residents(namespaces: &HashSet<u64>) -> Vec<Pid> {
    if namespaces.is_empty() {
        return Vec::new();
    }
    let own = std::process::id();
    let numbers = names(Path::new("/proc")).unwrap_or_default();
    let pids = numbers.iter().filter_map(|name| name.parse::<u32>().ok()).filter(|pid| *pid != own);
    pids.filter(|pid| {
        fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|found| namespaces.contains(&found.ino()))
    })
    .map(|pid| Pid::from_raw(pid.cast_signed()))
    .collect()
}

/// Mount points below `dir`, the innermost first.
fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    let mut below: Vec<_> = points.filter(|point| point.starts_with(dir)).collect();
    below.sort_by_key(|point| std::cmp::Reverse(point.components().count()));
    below
}

/// Takes down every mount on `path`: iproute2 can stack a second one on a namespace's file.
fn unmount(path: &Path) {
    while umount2(path, MntFlags::MNT_DETACH) == Ok(()) {}
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The names in a folder; none where the folder does not exist.
fn names(folder: &Path) -> Result<Vec<String>, LabError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => return Ok(Vec::new()),
        Err(error) => return Err(LabError::io(format!("list {}", folder.display()))(error)),
    };
    Ok(entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
}
