//! A process of a lab: started with a log, killed when its handle is dropped or when this process ends.

#![expect(unsafe_code, reason = "a child asks, between fork and exec, to be killed with its parent")]

use std::fs::File;
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{LazyLock, Mutex, mpsc};
use std::time::Duration;

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getppid};

use crate::error::LabError;
use crate::wait_for;

/// A running (or ended) child process with its log.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with no input and its output appended to `NAME.log` in `dir`.
    pub fn spawn(name: &str, dir: &Path, mut command: Command) -> Result<Process, LabError> {
        let log = dir.join(format!("{name}.log"));
        let open = || File::options().create(true).append(true).open(&log);
        let (output, errors) = open()
            .and_then(|file| Ok((file.try_clone()?, file)))
            .map_err(LabError::io(format!("open the log {}", log.display())))?;
        command.stdin(Stdio::null()).stdout(output).stderr(errors);
        let shown = command.get_program().to_string_lossy().into_owned();
        let child = spawn_bound(command).map_err(LabError::io(format!("start {shown}")))?;
        Ok(Process { name: name.to_owned(), child, log })
    }

    /// Process number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where its output goes.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The last `lines` lines of its log.
    pub fn log_tail(&self, lines: usize) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let all: Vec<_> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(&mut self) {
        // Only fails where the process is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// SIGTERM, and waits for it to end; after `limit` it is killed and the status says so (by signal 9).
    pub fn stop(&mut self, limit: Duration) -> ExitStatus {
        if self.ended().is_none() {
            let _ = kill(Pid::from_raw(self.pid().cast_signed()), Signal::SIGTERM);
        }
        wait_for(limit, || self.ended()).unwrap_or_else(|| {
            self.kill();
            ExitStatus::from_raw(Signal::SIGKILL as i32)
        })
    }

    /// An error that shows the end of the log.
    pub fn not_ready(&mut self, problem: &str) -> LabError {
        let problem = match self.ended() {
            Some(status) => format!("ended ({status})"),
            None => problem.to_owned(),
        };
        LabError::NotReady {
            name: self.name.clone(),
            problem,
            log: self.log.clone(),
            tail: self.log_tail(40),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Starts a child that the kernel kills when this process ends, however it ends.
fn spawn_bound(mut command: Command) -> io::Result<Child> {
    type Request = (Command, mpsc::SyncSender<io::Result<Child>>);
    // The kernel's "parent" is the thread that forked, not the process: children of a thread that ends (a test's, a
    // runtime's idle worker) would die with it. So all are started by one thread that stays.
    static SPAWNER: LazyLock<Mutex<mpsc::Sender<Request>>> = LazyLock::new(|| {
        let (requests, incoming) = mpsc::channel::<Request>();
        std::thread::spawn(move || {
            for (mut command, reply) in incoming {
                let _ = reply.send(command.spawn());
            }
        });
        Mutex::new(requests)
    });

    let parent = Pid::from_raw(std::process::id().cast_signed());
    let bind = move || {
        set_pdeathsig(Signal::SIGKILL)?;
        // The parent may have ended before the request was in place.
        if getppid() == parent { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
    };
    // SAFETY: between fork and exec the closure makes two system calls; it allocates nothing (an `io::Error` of a plain
    // kind or of an errno does not) and takes no lock.
    unsafe { command.pre_exec(bind) };

    let (reply, answer) = mpsc::sync_channel(1);
    let sent = SPAWNER.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).send((command, reply));
    sent.expect("the spawner never ends");
    answer.recv().expect("the spawner answers every request")
}
