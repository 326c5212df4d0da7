//! A site as a host of its own: beside its network it has processes and mounts of its own, as two machines have.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail};
use lab::process::Process;
use lab::{Lab, Site, wait_for};
use migrate::workload::processes;

/// How long it may take to be there.
const READY_LIMIT: Duration = Duration::from_secs(10);
/// The first process of the host. It collects what others leave, since it ignores their ends (which dash would not let
/// it). CRIU keeps what it has found out about the kernel below
/// `/run`, but only where that is in memory, as it is on most machines.
const INIT: &str = "trap '' CHLD; mount -t tmpfs tmpfs /run; echo ready; exec sleep infinity";

/// A host. It ends with its lab.
pub struct Host {
    _unshare: Process,
    /// Its first process, as this machine counts.
    pid: i32,
    processors: String,
    files: PathBuf,
}

impl Host {
    /// Makes one out of a site; its processes are to stay on `processors`.
    pub fn new(lab: &Lab, site: Site, processors: &str) -> anyhow::Result<Host> {
        let files = lab.dir().join(site.name());
        std::fs::create_dir_all(&files).with_context(|| format!("cannot make {}", files.display()))?;
        let mut command = lab.site(site).command("taskset");
        command.args(["--cpu-list", processors, "unshare", "--mount", "--pid", "--fork", "--kill-child"]);
        command.args(["--mount-proc", "bash", "-ec", INIT]);
        let mut unshare = Process::spawn(&format!("host-{}", site.name()), lab.dir(), command)?;
        let first = || {
            let pid = processes::children(unshare.pid().cast_signed()).first().copied()?;
            unshare.log_tail(1).contains("ready").then_some(pid)
        };
        match wait_for(READY_LIMIT, first) {
            Some(pid) => Ok(Host { _unshare: unshare, pid, processors: processors.to_owned(), files }),
            None => Err(unshare.not_ready("makes no namespaces").into()),
        }
    }

    /// Its first process, as this machine counts.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Where it keeps files; in memory.
    pub fn files(&self) -> &Path {
        &self.files
    }

    /// Runs a shell's command there; returns what it printed.
    pub fn run(&self, path: &str, line: &str) -> anyhow::Result<String> {
        let mut command = Command::new("taskset");
        command.args(["--cpu-list", &self.processors, "nsenter", "--target", &self.pid.to_string()]);
        command.args(["--net", "--mount", "--pid", "--", "bash", "-ec", line]).env("PATH", path);
        let output = command.output().context("cannot start taskset")?;
        if !output.status.success() {
            bail!("`{line}` failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}
