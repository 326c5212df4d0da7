//! What `/proc` says of processes: identity, state, children.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use super::sys;

/// The parts of `/proc/PID/status` and `stat` that are used here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// As this host counts.
    pub pid: i32,
    /// As its own, innermost pid namespace counts.
    pub inner_pid: i32,
    /// In how many pid namespaces it has a pid, as far as this host sees.
    pub depth: usize,
    /// `R`, `S`, `Z`, ...
    pub state: char,
    /// Who traces it; 0 for nobody.
    pub tracer: i32,
    /// Resident memory.
    pub rss_bytes: u64,
}

impl Process {
    /// Reads `/proc`; `None` if there is no such process.
    pub fn read(pid: i32) -> Option<Self> {
        parse_status(pid, &std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?)
    }

    /// True unless it only waits to be reaped.
    pub fn is_alive(&self) -> bool {
        !matches!(self.state, 'Z' | 'X')
    }
}

/// When a process was started, in clock ticks since boot; with the pid it is an identity.
pub fn start_ticks(pid: i32) -> Option<u64> {
    parse_start_ticks(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// All processes of this host.
pub fn all() -> impl Iterator<Item = i32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

/// The children of a process, as this host counts.
pub fn children(pid: i32) -> Vec<i32> {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    tasks
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("children")).ok())
        .flat_map(|line| line.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect()
}

/// All descendants of a process, parents before children.
pub fn descendants(pid: i32) -> Vec<i32> {
    let mut all = children(pid);
    let mut next = 0;
    while let Some(pid) = all.get(next) {
        let more = children(*pid);
        all.extend(more);
        next += 1;
    }
    all
}

/// Whether a holder is not one of ours but a container's monitor, which runs beside everything else of this host.
pub fn is_monitor(holder: i32) -> bool {
    Process::read(holder).is_some_and(|process| process.inner_pid != 1)
}

/// The tasks of a holder's workload. Of those below a monitor they are the ones in the container; the monitor's own
/// helpers are none.
pub fn kept_by(holder: i32) -> Vec<i32> {
    let mut below = descendants(holder);
    if let Some(monitor) = Process::read(holder).filter(|process| process.inner_pid != 1) {
        below.retain(|pid| Process::read(*pid).is_some_and(|process| process.depth > monitor.depth));
    }
    below
}

/// A holder's workload and whoever restores or dumps it from within.
pub fn around(holder: i32) -> Vec<i32> {
    if !is_monitor(holder) {
        return in_namespace_of(holder);
    }
    // Neither runc nor podman, which write down what has become of the container.
    let runtimes = children(holder).into_iter().filter(|pid| name(*pid).as_deref() == Some("runc"));
    let mut all = kept_by(holder);
    for pid in runtimes.flat_map(descendants) {
        if !all.contains(&pid) {
            all.push(pid);
        }
    }
    all
}

/// The program's name as the kernel has it.
pub fn name(pid: i32) -> Option<String> {
    Some(std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?.trim_end().to_owned())
}

/// A program's arguments; none of a process that has ended.
pub fn arguments(pid: i32) -> Vec<String> {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words = line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned());
    words.collect()
}

/// The process that started this one, and whoever started that, as far as this host sees.
pub fn ancestors(pid: i32) -> impl Iterator<Item = i32> {
    let parent = |pid: &i32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()?;
        (parent > 0).then_some(parent)
    };
    std::iter::successors(parent(&pid), parent)
}

/// A process and its descendants: the host's pid by that in their own namespaces.
pub fn tree(root: i32) -> BTreeMap<i32, i32> {
    let tasks = std::iter::once(root).chain(descendants(root)).filter_map(Process::read);
    tasks.map(|task| (task.inner_pid, task.pid)).collect()
}

/// All processes of the pid namespace that this process is pid 1 of, whoever their parents are, and all in namespaces
/// below it.
pub fn in_namespace_of(pid: i32) -> Vec<i32> {
    let namespace = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let Some(wanted) = namespace(pid) else { return Vec::new() };
    let inside: Vec<i32> =
        all().filter(|other| *other != pid && namespace(*other).as_ref() == Some(&wanted)).collect();
    // The first process of a namespace below has its parent in here.
    let mut with_those_below = inside.clone();
    for pid in inside.into_iter().chain([pid]).flat_map(descendants) {
        if !with_those_below.contains(&pid) {
            with_those_below.push(pid);
        }
    }
    with_those_below
}

/// Waits until a process has ended; false if it has not within `limit`.
pub async fn wait_end(pid: i32, limit: Duration) -> bool {
    match sys::pidfd_open(pid) {
        Ok(pidfd) => tokio::time::timeout(limit, wait_pidfd(pidfd)).await.is_ok(),
        Err(_) => true,
    }
}

/// Waits until the process behind a pidfd has ended.
pub async fn wait_pidfd(pidfd: OwnedFd) {
    if let Ok(pidfd) = sys::register(pidfd) {
        // An error here would mean that the runtime is going down.
        let _ = pidfd.readable().await;
    }
}

/// Every socket that a process holds, as a duplicate of ours. A process that ends meanwhile has none.
pub fn sockets(pid: i32) -> Vec<OwnedFd> {
    let Ok(pidfd) = sys::pidfd_open(pid) else { return Vec::new() };
    let Ok(fds) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    fds.filter_map(|entry| {
        let entry = entry.ok()?;
        let link = std::fs::read_link(entry.path()).ok()?;
        if !link.to_str()?.starts_with("socket:") {
            return None;
        }
        sys::pidfd_getfd(pidfd.as_fd(), entry.file_name().to_str()?.parse().ok()?).ok()
    })
    .collect()
}

fn parse_status(pid: i32, status: &str) -> Option<Process> {
    let field =
        |name: &str| status.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim()));
    let inner_pids = field("NSpid").unwrap_or_default();
    let inner = inner_pids.split_whitespace().last().and_then(|pid| pid.parse().ok());
    let rss_kib = field("VmRSS").and_then(|size| size.split_whitespace().next()?.parse::<u64>().ok());
    Some(Process {
        pid,
        inner_pid: inner.unwrap_or(pid),
        depth: inner_pids.split_whitespace().count().max(1),
        state: field("State")?.chars().next()?,
        tracer: field("TracerPid")?.parse().ok()?,
        rss_bytes: rss_kib.unwrap_or(0) * 1024,
    })
}

fn parse_start_ticks(stat: &str) -> Option<u64> {
    // The name may hold spaces and brackets; the fields after its last bracket are plain. Start time is
    // field 22 of proc(5), the 20th after the name.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_is_read() {
        let status = "Name:\tredis server\nState:\tt (tracing stop)\nPid:\t77\nTracerPid:\t12\nNSpid:\t77\t5001\nVmRSS:\t    2048 kB\n";
        let process = parse_status(77, status).unwrap();
        assert_eq!((process.pid, process.inner_pid, process.state, process.tracer), (77, 5001, 't', 12));
        assert_eq!((process.depth, process.rss_bytes), (2, 2 << 20));
        assert!(process.is_alive());
        assert!(!parse_status(1, "State:\tZ (zombie)\nTracerPid:\t0\n").unwrap().is_alive());
    }

    #[test]
    fn a_name_with_brackets_does_not_shift_the_start_time() {
        let stat = "77 (a) b) (c)) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20";
        assert_eq!(parse_start_ticks(stat), Some(4242));
    }

    #[test]
    fn this_process_is_found_by_its_parents_eyes() {
        let me = i32::try_from(std::process::id()).unwrap();
        assert!(Process::read(me).unwrap().is_alive());
        assert!(start_ticks(me).unwrap() > 0);
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        assert!(descendants(me).contains(&pid));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(Process::read(pid), None);
    }

    #[test]
    fn sockets_of_another_process_can_be_had() {
        let me = i32::try_from(std::process::id()).unwrap();
        let before = sockets(me).len();
        let _socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(sockets(me).len() > before);
    }
}
