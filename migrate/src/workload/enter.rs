//! Starting something inside a holder's namespaces: the hidden subcommands `enter` and `launch`.
//!
//! The agent is multi-threaded and stays outside; `enter` is a small process that joins the namespaces and
//! starts the program there. A process that joined a pid namespace keeps it from going away, so it ends with
//! CRIU, and for a workload at once.
#![expect(unsafe_code, reason = "pre_exec is the only way to run setsid between fork and exec")]

use std::fs::File;
use std::os::fd::RawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{FcntlArg, fcntl};
use nix::sched::{CloneFlags, setns};

use super::holder::HolderPid;
use super::user::Identity;
use super::{cgroup, sys};

/// Where CRIU finds its socket: far from the descriptors it opens first.
pub const SOCKET_FD: RawFd = 100;
/// Where CRIU finds the images folder.
pub const IMAGES_FD: RawFd = 101;
/// The images folder as CRIU sees it.
pub const IMAGES_FOLDER: &str = "/proc/self/fd/101";

/// What is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// CRIU; stdin is its socket and stdout the images folder.
    Criu,
    /// A container runtime.
    Runtime,
    /// A workload.
    Workload {
        /// Its working directory.
        dir: PathBuf,
        /// Where its output goes; nowhere if `None`.
        log: Option<PathBuf>,
        /// As whom it runs; as the agent if `None`.
        user: Option<Identity>,
    },
}

/// A call of this program that starts a container runtime inside the holder's namespaces; the runtime's program and
/// arguments are to be added.
pub fn runtime(holder: HolderPid) -> tokio::process::Command {
    let mut command = tokio::process::Command::new("/proc/self/exe");
    command.args(["enter", "--holder", &holder.to_string(), "runtime", "--"]);
    command
}

/// Joins the holder's namespaces and a control group, by its folders, and starts the program. Gives the exit code for
/// this process.
pub fn run(holder: HolderPid, cgroups: &[PathBuf], what: &What, argv: &[String]) -> Result<u8> {
    // What CRIU restores is where CRIU is.
    cgroups.iter().try_for_each(|folder| cgroup::join(folder))?;
    join(holder)?;
    match what {
        What::Criu => {
            let (program, args) = argv.split_first().context("no program")?;
            let mut command = Command::new(program);
            command.args(args).stdin(Stdio::null());
            let socket = fcntl(std::io::stdin(), FcntlArg::F_DUPFD(SOCKET_FD)).context("CRIU's socket")?;
            let images = fcntl(std::io::stdout(), FcntlArg::F_DUPFD(IMAGES_FD)).context("images folder")?;
            ensure!((socket, images) == (SOCKET_FD, IMAGES_FD), "descriptor {SOCKET_FD} is taken");
            command.args(["swrk", &SOCKET_FD.to_string()]).stdout(Stdio::null());
            let mut child = command.spawn().with_context(|| format!("start {program}"))?;
            // Our own copies would keep the agent from seeing CRIU's end.
            let null = File::open("/dev/null")?;
            nix::unistd::dup2_stdin(&null)?;
            nix::unistd::close(socket)?;
            let status = child.wait()?;
            Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
        }
        What::Runtime => {
            let (program, args) = argv.split_first().context("no program")?;
            let status = Command::new(program).args(args).status();
            let status = status.with_context(|| format!("start {program}"))?;
            Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
        }
        What::Workload { dir, log, user } => {
            // One step more: the workload's parent has to be inside, so that pid 1 inherits it from there.
            let mut launch = Command::new("/proc/self/exe");
            launch.arg("launch").arg("--dir").arg(dir);
            if let Some(log) = log {
                launch.arg("--log").arg(log);
            }
            if let Some(user) = user {
                launch.arg("--user").arg(user.to_string());
            }
            let status = launch.arg("--").args(argv).stdin(Stdio::null()).status().context("launch")?;
            Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
        }
    }
}

/// The subcommand `launch`: starts a workload, already inside the namespaces, and leaves it to pid 1.
pub fn launch(dir: &Path, log: Option<&Path>, user: Option<Identity>, argv: &[String]) -> Result<()> {
    let (program, args) = argv.split_first().context("no program")?;
    let output = || -> Result<Stdio> { log.map_or_else(|| Ok(Stdio::null()), open_log) };
    let mut command = Command::new(program);
    command.args(args).current_dir(dir).stdin(Stdio::null()).stdout(output()?).stderr(output()?);
    let isolate = move || {
        // CRIU dumps whole sessions, and what comes from outside cannot be restored elsewhere.
        nix::unistd::setsid()?;
        sys::close_on_exec_from(3)?;
        Ok(user.as_ref().map_or(Ok(()), Identity::take_on)?)
    };
    // SAFETY: all of it are plain system calls, safe between fork and exec.
    unsafe { command.pre_exec(isolate) };
    command.spawn().with_context(|| format!("start {program}"))?;
    Ok(())
}

fn open_log(path: &Path) -> Result<Stdio> {
    let file = File::options().append(true).create(true).open(path);
    Ok(file.with_context(|| format!("open the workload's log {}", path.display()))?.into())
}

fn join(holder: HolderPid) -> Result<()> {
    let open = |kind: &str| {
        let path = format!("/proc/{}/ns/{kind}", holder.pid);
        File::open(&path).with_context(|| format!("open {path}"))
    };
    // All are opened before any is joined: another mount namespace has another /proc.
    let (pids, mounts) = (open("pid")?, open("mnt")?);
    if !holder.is_alive() {
        bail!("holder {holder} is gone");
    }
    setns(&mounts, CloneFlags::CLONE_NEWNS).context("join the mount namespace")?;
    setns(&pids, CloneFlags::CLONE_NEWPID).context("join the pid namespace")?;
    Ok(())
}
