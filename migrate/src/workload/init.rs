//! Pid 1 of a workload's namespaces: the hidden subcommands `holder` (makes the namespaces) and `init` (is
//! pid 1). It reaps, and it ends, with everything inside, when its agent goes away without having told it
//! to stay.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::keeper::{Keeper, Todo};
use super::sys;

const RUN: &str = "/run";
/// CRIU's cache of the kernel's features.
const KERNEL_CACHE: &str = "/run/criu.kdat";

/// That of a process, as this host finds it.
pub fn kernel_cache_of(pid: i32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/root{KERNEL_CACHE}"))
}

/// The subcommand `holder`: makes the namespaces, starts pid 1 in them and says its pid.
pub fn hold(first_pid: Option<u32>, kernel_cache: Option<&Path>) -> Result<()> {
    // Whatever this agent was started with stays outside.
    sys::close_on_exec_from(3).context("close_range")?;
    unshare(CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS).context("unshare")?;
    let mut command = Command::new("/proc/self/exe");
    command.arg("init");
    if let Some(first_pid) = first_pid {
        command.args(["--first-pid", &first_pid.to_string()]);
    }
    if let Some(kernel_cache) = kernel_cache {
        command.arg("--kernel-cache").arg(kernel_cache);
    }
    // Its pid is said before it can say that it is ready: it waits for the lock on stdout's order by being
    // started with a pipe of our own.
    let mut child = command.stdout(Stdio::piped()).spawn().context("start pid 1")?;
    println!("{}", child.id());
    let mut said = String::new();
    if let Some(stdout) = child.stdout.as_mut() {
        stdout.read_to_string(&mut said).context("hear of pid 1")?;
    }
    print!("{said}");
    anyhow::ensure!(said == "ready\n", "pid 1 did not get ready");
    // Pid 1 goes on without us.
    Ok(())
}

/// The subcommand `init`: sets the namespaces up and is their pid 1.
pub fn run(first_pid: Option<u32>, kernel_cache: Option<&Path>) -> Result<()> {
    anyhow::ensure!(std::process::id() == 1, "`init` is pid 1 of a workload's namespaces, or nothing");
    nix::unistd::setsid().context("setsid")?;
    private_mounts()?;
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), quiet, None::<&str>).context("mount /proc")?;
    if statfs(RUN).context("statfs /run")?.filesystem_type() != TMPFS_MAGIC {
        run_on_tmpfs(kernel_cache).context("mount a tmpfs on /run")?;
    }
    if let Some(first_pid) = first_pid {
        std::fs::write("/proc/sys/kernel/ns_last_pid", first_pid.to_string()).context("ns_last_pid")?;
    }
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGCHLD);
    signals.thread_block().context("block SIGCHLD")?;
    let children =
        SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).context("signalfd")?;
    std::env::set_current_dir("/").context("chdir")?;

    println!("ready");
    std::io::stdout().flush().context("say ready")?;
    // Whoever listens on these would wait for our end.
    let null = File::options().read(true).write(true).open("/dev/null").context("/dev/null")?;
    nix::unistd::dup2_stdout(&null).context("close stdout")?;
    nix::unistd::dup2_stderr(&null).context("close stderr")?;

    let mut keeper = Keeper::new()?;
    loop {
        let todo = keeper.wait(children.as_fd())?;
        while let Ok(Some(_)) = children.read_signal() {}
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            if status == WaitStatus::StillAlive {
                break;
            }
        }
        match todo {
            Todo::Nothing => {}
            Todo::Stop => drop(kill(Pid::from_raw(-1), Signal::SIGSTOP)),
            Todo::Kill => {
                // While the memory is still held: nothing in here may read a zero that is none.
                kill_all();
                return Ok(());
            }
            // With pid 1 goes everything in here.
            Todo::Abandon => return Ok(()),
        }
    }
}

/// Kills everything in the namespace, and waits until it is gone.
fn kill_all() {
    let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
    while waitpid(None, None).is_ok() {}
}

/// Gives this process a `/run` of its own where it is on no tmpfs.
pub fn private_run(kernel_cache: Option<&Path>) -> Result<()> {
    if statfs(RUN).context("statfs /run")?.filesystem_type() == TMPFS_MAGIC {
        return Ok(());
    }
    unshare(CloneFlags::CLONE_NEWNS).context("unshare")?;
    private_mounts()?;
    run_on_tmpfs(kernel_cache).context("mount a tmpfs on /run")
}

/// Lets nothing that is mounted here be seen outside.
fn private_mounts() -> Result<()> {
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .context("make the mounts private")
}

/// Puts a tmpfs on `/run` with everything that was there still in its place. CRIU keeps its cache of the
/// kernel's features only on a tmpfs; without it each dump and restore would take a tenth of a second more.
/// `kernel_cache` is that of another holder, so that CRIU need not look for itself.
fn run_on_tmpfs(kernel_cache: Option<&Path>) -> Result<()> {
    // It may be below /run, which is about to be hidden. The agent may have none yet.
    let kernel_cache = kernel_cache.and_then(|path| std::fs::read(path).ok());
    let before = File::open(RUN)?;
    mount(Some("tmpfs"), RUN, Some("tmpfs"), MsFlags::empty(), Some("mode=755"))?;
    let before = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&before));
    for entry in std::fs::read_dir(&before)? {
        let entry = entry?;
        let place = Path::new(RUN).join(entry.file_name());
        if place.to_string_lossy().starts_with(KERNEL_CACHE) {
            // A CRIU outside that found no tmpfs leaves a part of one, which would be in the way.
            continue;
        }
        let kind = entry.file_type()?;
        if kind.is_symlink() {
            std::os::unix::fs::symlink(std::fs::read_link(entry.path())?, place)?;
            continue;
        }
        if kind.is_dir() {
            std::fs::create_dir(&place)?;
        } else {
            File::create(&place)?;
        }
        let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(Some(&entry.path()), &place, None::<&str>, bind, None::<&str>)
            .with_context(|| format!("keep {}", place.display()))?;
    }
    if let Some(kernel_cache) = kernel_cache {
        std::fs::write(KERNEL_CACHE, kernel_cache)?;
    }
    Ok(())
}
