//! A network namespace: starting programs and running closures inside it.
//!
//! Only the network namespace is entered, never a mount namespace of its own (as `ip netns exec` would make), since
//! CRIU cannot dump processes out of such a one.

#![expect(unsafe_code, reason = "a child enters the namespace between fork and exec")]

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use nix::sched::{CloneFlags, setns};

use crate::error::LabError;
use crate::lab_id::NAMESPACES;

/// A named network namespace. A copy is another handle on the same one.
#[derive(Clone, Debug)]
pub struct Namespace {
    name: String,
    file: Arc<File>,
}

impl Namespace {
    /// Opens the namespace that iproute2 knows under `name`.
    pub(crate) fn open(name: String) -> Result<Namespace, LabError> {
        let path = format!("{NAMESPACES}/{name}");
        let file = File::open(&path).map_err(LabError::io(format!("open the network namespace {path}")))?;
        Ok(Namespace { name, file: Arc::new(file) })
    }

    /// The name under which iproute2 knows it (`ip -n NAME ...`).
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for it, for programs that take one (`nsenter --net=PATH`).
    pub fn path(&self) -> PathBuf {
        PathBuf::from(NAMESPACES).join(&self.name)
    }

    /// A command that starts inside the namespace. It outlives neither the lab nor, with
    /// [`Process::spawn`](crate::process::Process::spawn), this process.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        let file = self.file.clone();
        let enter = move || Ok(setns(&*file, CloneFlags::CLONE_NEWNET)?);
        // SAFETY: between fork and exec the closure makes one system call; it allocates nothing and takes no lock.
        unsafe { command.pre_exec(enter) };
        command
    }

    /// Moves the calling thread into the namespace for the rest of its life: for threads whose owner knows that they
    /// do nothing else, such as a runtime's workers (`on_thread_start`). Otherwise use [`Namespace::run`].
    pub fn enter(&self) -> Result<(), LabError> {
        setns(&*self.file, CloneFlags::CLONE_NEWNET)
            .map_err(|errno| LabError::io(format!("enter the network namespace {}", self.name))(errno.into()))
    }

    /// Runs `work` on a fresh thread inside the namespace and waits for it: sockets that it makes live there, also
    /// after it returned them. A panic in `work` goes on in the caller.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let entered = std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    self.enter().expect("a namespace whose file is open can be entered by root");
                    work()
                })
                .join()
        });
        entered.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}
