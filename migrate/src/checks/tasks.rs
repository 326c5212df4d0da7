//! Goes over the tasks of a workload: what would keep CRIU from dumping them, and what they need of a site.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs;

use super::hashes::Hashes;
use super::problem::{Problem, Task};
use super::unix::UnixSockets;
use super::{descriptors, mappings};
use crate::protocol::manifest::{FileKind, NeededFile, NeededSocket};
use crate::workload::processes;

/// Namespaces that CRIU dumps for the root alone (`CLONE_SUBNS` of its `namespaces.c` has the others).
const ROOT_ONLY: [&str; 5] = ["ipc", "pid", "time", "user", "uts"];

/// linux/capability.h.
const CAP_SYS_RESOURCE: u32 = 24;

/// A task's unix socket.
#[derive(Debug)]
pub struct UnixEnd {
    /// Who.
    pub task: Task,
    /// Its number.
    pub fd: i32,
    /// What the kernel knows it by.
    pub inode: u32,
}

/// What was found.
#[derive(Debug, Default)]
pub struct Found {
    /// What is wrong.
    pub problems: Vec<Problem>,
    /// Files, by their paths.
    pub files: BTreeMap<String, NeededFile>,
    /// Addresses.
    pub sockets: BTreeSet<NeededSocket>,
    /// Unix sockets, which can be judged only when all are known.
    pub unix: Vec<UnixEnd>,
    /// What the tasks hold and images carry.
    pub memory_bytes: u64,
}

impl Found {
    /// Whether a file's content is known already.
    pub fn has_content(&self, path: &str) -> bool {
        matches!(
            self.files.get(path),
            Some(NeededFile { kind: FileKind::Regular { blake3: Some(_), .. }, .. })
        )
    }

    /// Adds a file; of two uses of one file, what must not differ for either of them counts.
    pub fn needs_file(&mut self, path: &str, kind: FileKind) {
        // A process's own files go with it.
        if path.starts_with("/proc/") {
            return;
        }
        // Sizes there say nothing.
        let kind = match kind {
            FileKind::Regular { .. } if path.starts_with("/sys/") => {
                FileKind::Regular { bytes: None, blake3: None }
            }
            kind => kind,
        };
        let known = self
            .files
            .entry(path.to_owned())
            .or_insert_with(|| NeededFile { path: path.to_owned(), kind: kind.clone() });
        if let (
            FileKind::Regular { bytes: known_bytes, blake3: known_hash },
            FileKind::Regular { bytes, blake3 },
        ) = (&mut known.kind, kind)
        {
            // Who writes to it may change its size until the dump.
            *known_bytes = known_bytes.and(bytes);
            *known_hash = known_hash.take().or(blake3);
        }
    }

    fn look_at_unix_sockets(&mut self) {
        if self.unix.is_empty() {
            return;
        }
        let all = match UnixSockets::here() {
            Ok(all) => all,
            Err(error) => {
                // CRIU will say it later, if it is so.
                tracing::warn!(%error, "it cannot be seen whom unix sockets are connected to");
                return;
            }
        };
        let inside: HashSet<u32> = self.unix.iter().map(|end| end.inode).collect();
        for end in self.unix.drain(..) {
            if let Some(peer) = all.outside_peer(end.inode, &inside) {
                self.problems.push(Problem::UnixSocket { task: end.task, fd: end.fd, peer });
            }
        }
    }
}

/// Looks at the tasks below `holder`, of which those of the tree of `root` are dumped. Blocks the thread for some
/// milliseconds.
pub fn look(holder: i32, root: i32, hashes: &Hashes) -> Found {
    let mut found = Found::default();
    let mut tree = vec![root];
    tree.extend(processes::descendants(root));
    // Nobody is the parent of who entered a container later, unless it was within a holder of ours.
    let is_monitors = processes::is_monitor(holder) && !processes::is_monitor(root);
    let inside = if is_monitors { processes::in_namespace_of(root) } else { processes::descendants(holder) };
    for pid in inside {
        if !tree.contains(&pid)
            && let Some((task, _)) = read(pid)
        {
            found.problems.push(Problem::Orphan { task });
        }
    }
    let own = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let own = Status(&own);
    let mut shared_bytes = 0;
    for pid in tree {
        let Some((task, status)) = read(pid) else { continue };
        let status = Status(&status);
        match i32::try_from(status.number("TracerPid")) {
            Ok(0) | Err(_) => {}
            Ok(tracer) => found.problems.push(Problem::Traced { task: task.clone(), tracer }),
        }
        look_at_user(&task, &status, &own, &mut found);
        look_at_namespaces(&task, root, &mut found);
        descriptors::look(&task, &mut found);
        mappings::look(&task, hashes, &mut found);
        for place in ["cwd", "root"] {
            look_at_folder(&task, place, &mut found);
        }
        // CRIU writes a page that two processes still share twice, but shared memory once.
        found.memory_bytes += 1024 * (status.number("RssAnon") + status.number("VmSwap"));
        shared_bytes = shared_bytes.max(1024 * status.number("RssShmem"));
    }
    found.memory_bytes += shared_bytes;
    found.look_at_unix_sockets();
    found
}

/// A task that lives, and its status.
fn read(pid: i32) -> Option<(Task, String)> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let status = Status(&text);
    let name = status.text("Name").unwrap_or_default().to_owned();
    (!status.is_zombie()).then_some((Task { pid, name }, text))
}

/// prlimit(2): the limits of a process are told to one of all the same users and groups, or to who has the capability.
fn look_at_user(task: &Task, status: &Status<'_>, own: &Status<'_>, found: &mut Found) {
    let capabilities = own.text("CapEff").and_then(|digits| u64::from_str_radix(digits, 16).ok());
    let may_all = capabilities.is_some_and(|bits| bits & (1 << CAP_SYS_RESOURCE) != 0);
    // Real, effective and saved.
    let all =
        |name: &str| status.text(name).unwrap_or_default().split_whitespace().take(3).collect::<Vec<_>>();
    let is_own = |name: &str| {
        let ours = own.text(name).and_then(|ids| ids.split_whitespace().next()).unwrap_or_default();
        all(name).iter().all(|id| *id == ours)
    };
    let is_told = may_all || is_own("Uid") && is_own("Gid");
    if !is_told {
        let id = |name: &str| all(name).first().map_or_else(String::new, ToString::to_string);
        found.problems.push(Problem::OtherUser { task: task.clone(), uid: id("Uid"), gid: id("Gid") });
    }
}

fn look_at_namespaces(task: &Task, root: i32, found: &mut Found) {
    for kind in ROOT_ONLY {
        let of = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok();
        let (own, roots) = (of(task.pid), of(root));
        if own.is_some() && roots.is_some() && own != roots {
            found.problems.push(Problem::Namespace { task: task.clone(), kind });
        }
    }
}

fn look_at_folder(task: &Task, place: &str, found: &mut Found) {
    let path = fs::read_link(format!("/proc/{}/{place}", task.pid)).ok();
    if let Some(path) = path.as_deref().and_then(|path| path.to_str())
        && path.starts_with('/')
        && !path.ends_with(descriptors::DELETED)
    {
        found.needs_file(path, FileKind::Folder);
    }
}

/// `/proc/PID/status`.
struct Status<'a>(&'a str);

impl Status<'_> {
    fn text(&self, name: &str) -> Option<&str> {
        self.0.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim()))
    }

    /// A number, in the unit that stands behind it; 0 if there is none.
    fn number(&self, name: &str) -> u64 {
        self.text(name).and_then(|text| text.split_whitespace().next()?.parse().ok()).unwrap_or(0)
    }

    fn is_zombie(&self) -> bool {
        self.text("State").is_some_and(|state| state.starts_with(['Z', 'X']))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, OwnedFd};
    use std::process::{Child, Command};

    use super::*;

    fn me() -> i32 {
        std::process::id().cast_signed()
    }

    /// Starts `sleep`; it sleeps, with its name and its libraries, when this returns.
    fn spawn(command: &mut Command) -> Child {
        let child = command.spawn().unwrap();
        let stat = format!("/proc/{}/stat", child.id());
        while !fs::read_to_string(&stat).unwrap().contains("(sleep) S ") {
            std::thread::yield_now();
        }
        child
    }

    fn said(found: &Found) -> String {
        found.problems.iter().map(|problem| format!("{problem}\n")).collect()
    }

    #[test]
    fn a_plain_process_has_no_problems_and_needs_its_program() {
        let mut child = spawn(Command::new("sleep").arg("60").current_dir("/usr"));
        let pid = child.id().cast_signed();
        let found = look(pid, pid, &Hashes::default());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found.files["/usr"].kind, FileKind::Folder);
        assert!(found.files.keys().any(|path| path.ends_with("/sleep") && found.has_content(path)));
        assert_eq!(said(&found), "");
        assert!(found.memory_bytes > 0 && found.memory_bytes < 64 << 20, "{}", found.memory_bytes);
    }

    #[test]
    fn a_unix_connection_is_judged_with_both_ends_known() {
        let (one, other) = std::os::unix::net::UnixStream::pair().unwrap();
        let fd = format!("(descriptor {})", one.as_raw_fd());
        let found = look(me(), me(), &Hashes::default());
        assert!(found.unix.is_empty() && !said(&found).contains(&fd), "{}", said(&found));
        // The other end goes to a child, and a child's child is not in the child's tree.
        let mut child = spawn(Command::new("sleep").arg("60").stdin(OwnedFd::from(other)));
        let found = look(me(), child.id().cast_signed(), &Hashes::default());
        child.kill().unwrap();
        child.wait().unwrap();
        let text = said(&found);
        assert!(text.contains("\"sleep\"") && text.contains("holds a unix socket (descriptor 0)"), "{text}");
    }

    #[test]
    fn a_task_that_is_traced_is_named() {
        use nix::sys::ptrace;
        use nix::unistd::Pid;
        let mut child = spawn(Command::new("sleep").arg("60"));
        let pid = child.id().cast_signed();
        ptrace::seize(Pid::from_raw(pid), ptrace::Options::empty()).unwrap();
        let text = said(&look(pid, pid, &Hashes::default()));
        child.kill().unwrap();
        child.wait().unwrap();
        let named = format!("\"sleep\" (pid {pid}) is traced by pid ");
        assert!(text.contains(&named), "{text}");
    }

    #[test]
    fn a_task_that_left_the_tree_is_named() {
        let (mut root, mut orphan) =
            (spawn(Command::new("sleep").arg("60")), spawn(Command::new("sleep").arg("60")));
        let found = look(me(), root.id().cast_signed(), &Hashes::default());
        for child in [&mut root, &mut orphan] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        let text = said(&found);
        let named =
            format!("\"sleep\" (pid {}) does not descend from the workload's first process", orphan.id());
        assert!(text.contains(&named), "{text}");
    }

    #[test]
    fn a_task_in_another_namespace_is_named() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let mut child = Command::new("unshare").args(["--ipc", "sleep", "60"]).spawn().unwrap();
        let pid = child.id().cast_signed();
        let until = std::time::Instant::now() + std::time::Duration::from_secs(5);
        let text = loop {
            let text = said(&look(me(), me(), &Hashes::default()));
            if text.contains("another ipc namespace") || std::time::Instant::now() > until {
                break text;
            }
        };
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(text.contains(&format!("(pid {pid}) is in another ipc namespace")), "{text}");
    }

    #[test]
    fn another_users_task_takes_a_capability() {
        let task = Task { pid: 7, name: "redis".into() };
        let status =
            |uid: &str, capabilities: &str| format!("Uid:\t{uid}\nGid:\t0 0 0 0\nCapEff:\t{capabilities}\n");
        let (all, not_this) = ("000001ffffffffff", "000001fffeffffff");
        for (uid, capabilities, refused) in [
            ("0 0 0 0", not_this, false),
            ("999 999 999 999", all, false),
            ("999 999 999 999", not_this, true),
            ("0 999 0 0", not_this, true),
        ] {
            let mut found = Found::default();
            look_at_user(
                &task,
                &Status(&status(uid, all)),
                &Status(&status("0 0 0 0", capabilities)),
                &mut found,
            );
            assert_eq!(said(&found).contains("CAP_SYS_RESOURCE"), refused, "{uid} {capabilities}");
        }
    }

    #[test]
    fn of_two_uses_the_stricter_content_and_the_laxer_size_count() {
        let mut found = Found::default();
        let regular =
            |bytes, hash: Option<&str>| FileKind::Regular { bytes, blake3: hash.map(str::to_owned) };
        found.needs_file("/bin/x", regular(Some(1), None));
        found.needs_file("/bin/x", regular(Some(1), Some("aa")));
        assert_eq!(found.files["/bin/x"].kind, regular(Some(1), Some("aa")));
        found.needs_file("/srv/db", regular(Some(1), None));
        found.needs_file("/srv/db", regular(None, None));
        assert_eq!(found.files["/srv/db"].kind, regular(None, None));
        found.needs_file("/proc/7/stat", regular(Some(0), None));
        assert_eq!(found.files.len(), 2);
    }
}
