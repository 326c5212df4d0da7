//! A workload that is an OCI bundle (config.json and a root file system) and runs in a container of runc's.
//!
//! runc itself runs inside of the workload's holder, so the container's init process is a child of the holder's pid 1:
//! what keeps, stops, finds and kills a process does the same for a container. runc's records of its containers are in
//! a folder of the agent's own.

use std::ffi::OsString;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::podman::PodmanError;
use super::processes::{self, Process};

/// The bundle's description of its container.
const CONFIG: &str = "config.json";
/// runc's record of a container.
const STATE: &str = "state.json";
/// The agent's own network namespace.
const OWN_NETWORK: &str = "/proc/self/ns/net";
/// statfs(2): a ramfs or tmpfs as the root file system, out of which pivot_root(2) does not lead.
const IN_MEMORY: [nix::sys::statfs::FsType; 2] =
    [nix::sys::statfs::TMPFS_MAGIC, nix::sys::statfs::FsType(RAMFS_MAGIC as _)];
/// linux/magic.h.
const RAMFS_MAGIC: u32 = 0x8584_58f6;

/// Why a bundle cannot be a workload.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// No runc.
    #[error("{} is not here: install runc, or name it in the agent's `runc`", .0.display())]
    NoRuntime(PathBuf),
    /// No bundle, or none with a config.json.
    #[error("{} cannot be read: an OCI bundle (config.json and a root file system) has to be at every site", .0.display())]
    Read(PathBuf, #[source] io::Error),
    /// It is not what the OCI's runtime specification says.
    #[error("{} is no OCI configuration", .0.display())]
    Json(PathBuf, #[source] serde_json::Error),
    /// No root file system.
    #[error("the bundle's root file system {} is not a folder", .0.display())]
    NoRoot(PathBuf),
    /// What podman knows of it.
    #[error(transparent)]
    Podman(#[from] PodmanError),
    /// Somebody else's container, most likely.
    #[error(
        "the container's control group {group:?} is taken by pid {pid}: stop what runs there, or set another `container` \
         (or `linux.cgroupsPath` in the bundle)"
    )]
    Taken {
        /// The group.
        group: String,
        /// Who is in it.
        pid: i32,
    },
    /// Something in it that cannot be moved.
    #[error("{}: {key}: {problem}", .file.display())]
    Value {
        /// The config.json.
        file: PathBuf,
        /// Which of its keys.
        key: &'static str,
        /// What is wrong and what would be right.
        problem: &'static str,
    },
}

/// A container as it is configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    /// The bundle's folder.
    pub bundle: PathBuf,
    /// What runc calls it.
    pub name: String,
}

/// The parts of config.json that count here (the OCI's runtime specification 1.0).
#[derive(Debug, Deserialize)]
struct Config {
    process: Option<Program>,
    root: Root,
    linux: Option<Linux>,
}

#[derive(Debug, Deserialize)]
struct Program {
    #[serde(default)]
    terminal: bool,
}

#[derive(Debug, Deserialize)]
struct Root {
    path: PathBuf,
}

#[derive(Debug, Default, Deserialize)]
struct Linux {
    #[serde(rename = "cgroupsPath")]
    cgroup: Option<String>,
    #[serde(default)]
    namespaces: Vec<Namespace>,
}

#[derive(Debug, Deserialize)]
struct Namespace {
    #[serde(rename = "type")]
    kind: String,
    path: Option<PathBuf>,
}

impl Container {
    fn file(&self) -> PathBuf {
        self.bundle.join(CONFIG)
    }

    fn config(&self) -> Result<Config, ContainerError> {
        let file = self.file();
        let text = std::fs::read(&file).map_err(|error| ContainerError::Read(file.clone(), error))?;
        serde_json::from_slice(&text).map_err(|error| ContainerError::Json(file, error))
    }

    /// Fails where there is somebody in the container's control group, which is a new one's alone.
    pub fn look_for_others(&self) -> Result<(), ContainerError> {
        let configured = self.config()?.linux.and_then(|linux| linux.cgroup);
        let group = configured.unwrap_or_else(|| format!("/{}", self.name));
        match processes::all().find(|pid| is_in_group(*pid, &group)) {
            Some(pid) => Err(ContainerError::Taken { group, pid }),
            None => Ok(()),
        }
    }

    /// Looks whether the bundle is here and can be moved; gives its root file system's folder.
    pub fn look(&self) -> Result<PathBuf, ContainerError> {
        let file = self.file();
        let config = self.config()?;
        let wrong = |key, problem| Err(ContainerError::Value { file: file.clone(), key, problem });
        let Some(process) = config.process else {
            return wrong("process", "the program to run is missing");
        };
        if process.terminal {
            return wrong("process.terminal", "a terminal cannot be moved: set it to false");
        }
        let namespaces = config.linux.unwrap_or_default().namespaces;
        let of = |kind: &str| namespaces.iter().find(|namespace| namespace.kind == kind);
        for (kind, problem) in [
            ("pid", "the container needs a new pid namespace, since its pids have to be free at the target"),
            ("mount", "the container needs a new mount namespace, with its own root file system"),
        ] {
            if of(kind).is_none_or(|namespace| namespace.path.is_some()) {
                return wrong("linux.namespaces", problem);
            }
        }
        if let Some(network) = of("network")
            && !network.path.as_deref().is_some_and(is_own_network)
        {
            return wrong(
                "linux.namespaces",
                "the container has to be in the agent's network namespace, which holds the workload's address: take \
                 the entry \"network\" away, or give it the path of that namespace (podman: --network host, or ns:PATH)",
            );
        }
        let root = self.bundle.join(config.root.path);
        if root.is_dir() { Ok(root) } else { Err(ContainerError::NoRoot(root)) }
    }
}

/// cgroups(7): a line is `NUMBER:CONTROLLERS:PATH`. runc puts a group below its own.
fn is_in_group(pid: i32, group: &str) -> bool {
    let lines = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let mut paths = lines.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    paths.any(|path| Path::new(path).ends_with(group.trim_start_matches('/')))
        && Process::read(pid).is_some_and(|process| process.is_alive())
}

fn is_own_network(path: &Path) -> bool {
    let identity = |path: &Path| std::fs::metadata(path).map(|is| (is.dev(), is.ino())).ok();
    identity(path).is_some() && identity(path) == identity(Path::new(OWN_NETWORK))
}

/// runc: the program and the folder of its records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Runtime {
    /// The program.
    program: PathBuf,
    /// Where its log and our copies of its records are, and the `criu` that it is to find.
    folder: PathBuf,
    /// Where it keeps what it knows of its containers.
    containers: PathBuf,
}

impl Runtime {
    /// With its records in `folder`.
    pub fn new(program: &Path, folder: PathBuf) -> Self {
        Self { program: program.to_owned(), containers: folder.join("containers"), folder }
    }

    /// One that somebody else runs too, with their records in `containers`.
    pub fn of_others(program: &Path, containers: PathBuf, folder: PathBuf) -> Self {
        Self { program: program.to_owned(), folder, containers }
    }

    /// Fails where there is no such program.
    pub fn look(&self) -> Result<(), ContainerError> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let is_here = if self.program.components().count() > 1 {
            self.program.is_file()
        } else {
            std::env::split_paths(&path).any(|folder| folder.join(&self.program).is_file())
        };
        if is_here { Ok(()) } else { Err(ContainerError::NoRuntime(self.program.clone())) }
    }

    /// Its log and our copies of its records are here.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where the `criu` is that it is to find first.
    pub fn programs(&self) -> PathBuf {
        self.folder.join("bin")
    }

    /// Runs a bundle in a new container.
    pub fn run(&self, container: &Container) -> Vec<OsString> {
        let mut words = self.words(container, &["run", "--detach"]);
        words.extend(no_pivot());
        words.extend([OsString::from("--bundle"), container.bundle.clone().into()]);
        words.push((&container.name).into());
        words
    }

    /// Writes a container's images to a folder.
    pub fn checkpoint(&self, container: &Container, images: &Path) -> Vec<OsString> {
        let mut words = self.words(container, &["checkpoint", "--tcp-established", "--file-locks"]);
        words.extend(images_at(images));
        words.push((&container.name).into());
        words
    }

    /// Makes a container of them again.
    pub fn restore(&self, container: &Container, images: &Path) -> Vec<OsString> {
        let mut words = self.words(container, &["restore", "--detach", "--tcp-established", "--file-locks"]);
        words.extend(no_pivot());
        words.extend(images_at(images));
        words.extend([OsString::from("--bundle"), container.bundle.clone().into()]);
        words.push((&container.name).into());
        words
    }

    /// Kills what is left of a container and forgets it.
    pub fn delete(&self, container: &Container) -> Vec<OsString> {
        let mut words = self.words(container, &["delete", "--force"]);
        words.push((&container.name).into());
        words
    }

    /// What runc knows of a container: its own record, and our copy of it. A runc that finds CRIU or the agent gone in the
    /// last moments of a restore forgets the container, which lives.
    pub fn record(&self, container: &Container) -> Record {
        Record {
            own: self.containers.join(&container.name).join(STATE),
            copy: self.folder.join(format!("{}.{STATE}", container.name)),
        }
    }

    /// Why the last command for a container failed, in runc's words.
    pub fn complaint(&self, container: &Container) -> Option<String> {
        complaint_in(&std::fs::read_to_string(self.log(container)).ok()?)
    }

    /// Forgets what former commands said.
    pub fn forget_complaints(&self, container: &Container) {
        // One that is not there is forgotten.
        let _ = std::fs::remove_file(self.log(container));
    }

    fn log(&self, container: &Container) -> PathBuf {
        self.folder.join(format!("{}.log", container.name))
    }

    fn words(&self, container: &Container, command: &[&str]) -> Vec<OsString> {
        let mut words = vec![self.program.clone().into(), "--root".into()];
        words.push((&self.containers).into());
        words.extend(["--log".into(), self.log(container).into(), "--log-format".into(), "json".into()]);
        words.extend(command.iter().map(OsString::from));
        words
    }
}

/// See [`Runtime::record`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    own: PathBuf,
    copy: PathBuf,
}

impl Record {
    /// Takes the copy.
    pub fn save(&self) -> io::Result<()> {
        std::fs::copy(&self.own, &self.copy).map(drop)
    }

    /// Gives runc its record back, if it has none.
    pub fn give_back(&self) -> io::Result<()> {
        if self.own.exists() || !self.copy.exists() {
            return Ok(());
        }
        self.own.parent().map_or(Ok(()), std::fs::create_dir_all)?;
        std::fs::copy(&self.copy, &self.own).map(drop)
    }

    /// Removes the copy.
    pub fn remove(&self) {
        // One that is not there is removed.
        let _ = std::fs::remove_file(&self.copy);
    }
}

fn images_at(images: &Path) -> [OsString; 4] {
    ["--image-path".into(), images.into(), "--work-path".into(), images.into()]
}

/// pivot_root(2) does not work where the root file system is the kernel's first one.
fn no_pivot() -> Option<OsString> {
    let kind = nix::sys::statfs::statfs("/").ok()?.filesystem_type();
    IN_MEMORY.contains(&kind).then(|| "--no-pivot".into())
}

/// The last error of a log in JSON.
fn complaint_in(log: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct Line {
        level: String,
        msg: String,
    }
    let lines = log.lines().rev().filter_map(|line| serde_json::from_str::<Line>(line).ok());
    lines.into_iter().find(|line| line.level == "error").map(|line| line.msg)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"ociVersion": "1.0.2", "process": {"terminal": false, "args": ["/server"]},
        "root": {"path": "rootfs"},
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}]}}"#;

    #[test]
    fn a_bundle_that_cannot_be_moved_is_refused_with_its_reason() {
        let folder = tempfile::tempdir().unwrap();
        let container = Container { bundle: folder.path().to_owned(), name: "chat".into() };
        let look = || container.look().map_err(|error| crate::client::chain(&error));
        let file = folder.path().join(CONFIG);
        let text = look().unwrap_err();
        assert!(text.contains("config.json cannot be read: an OCI bundle"), "{text}");
        std::fs::write(&file, GOOD).unwrap();
        assert!(look().unwrap_err().contains("rootfs is not a folder"));
        std::fs::create_dir(folder.path().join("rootfs")).unwrap();
        assert_eq!(look().unwrap(), folder.path().join("rootfs"));
        let own = format!("{{\"type\": \"network\", \"path\": \"{OWN_NETWORK}\"}}, {{\"type\": \"pid\"}}");
        for (from, to, why) in [
            ("false", "true", Some("process.terminal: a terminal cannot")),
            ("\"process\"", "\"other\"", Some("process: the program to run")),
            ("{\"type\": \"pid\"}, ", "", Some("a new pid namespace")),
            ("{\"type\": \"pid\"}", "{\"type\": \"pid\", \"path\": \"/x\"}", Some("a new pid namespace")),
            (", {\"type\": \"mount\"}", "", Some("a new mount namespace")),
            (
                "{\"type\": \"pid\"}",
                "{\"type\": \"network\"}, {\"type\": \"pid\"}",
                Some("network namespace"),
            ),
            ("{\"type\": \"pid\"}", &own, None),
            ("{\"oci", "{oci", Some("config.json is no OCI configuration: ")),
        ] {
            std::fs::write(&file, GOOD.replace(from, to)).unwrap();
            match (look(), why) {
                (Ok(_), None) => {}
                (Err(text), Some(why)) => assert!(text.contains(why), "{text}"),
                (found, _) => panic!("{to}: {found:?}"),
            }
        }
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let runtime = |program: &str| Runtime::new(Path::new(program), PathBuf::from("/nowhere"));
        for absent in ["/nonexistent/runc", "runc-that-nobody-has"] {
            let text = runtime(absent).look().unwrap_err().to_string();
            assert!(text.starts_with(&format!("{absent} is not here: install runc")), "{text}");
        }
        runtime("sh").look().unwrap();
        runtime("/bin/sh").look().unwrap();
    }

    #[test]
    fn runc_gets_its_record_back_once_it_has_lost_it() {
        let folder = tempfile::tempdir().unwrap();
        let container = Container { bundle: "/srv".into(), name: "chat".into() };
        let record = Runtime::new(Path::new("runc"), folder.path().to_owned()).record(&container);
        record.give_back().unwrap();
        assert!(!record.own.exists() && record.save().is_err());
        let own = record.own.parent().unwrap();
        for content in ["one", "two"] {
            std::fs::create_dir_all(own).unwrap();
            std::fs::write(&record.own, content).unwrap();
            record.save().unwrap();
            std::fs::remove_dir_all(own).unwrap();
            record.give_back().unwrap();
            assert_eq!(std::fs::read_to_string(&record.own).unwrap(), content);
        }
        std::fs::write(&record.own, "three").unwrap();
        record.give_back().unwrap();
        assert_eq!(std::fs::read_to_string(&record.own).unwrap(), "three");
        record.remove();
        std::fs::remove_dir_all(own).unwrap();
        record.give_back().unwrap();
        assert!(!record.own.exists());
    }

    #[test]
    fn the_last_error_is_the_complaint() {
        let log = "{\"level\":\"warning\",\"msg\":\"x\",\"time\":\"t\"}\n{\"level\":\"error\",\"msg\":\"first\"}\n\
                   {\"level\":\"error\",\"msg\":\"last\"}\nnonsense\n";
        assert_eq!(complaint_in(log).as_deref(), Some("last"));
        assert_eq!(complaint_in(""), None);
    }
}
