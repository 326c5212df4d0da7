//! What the kernel has to offer.

use std::process::Command;

use anyhow::{Result, bail};

use super::{State, missing};
use crate::shell;

const BPFFS: &str = "/sys/fs/bpf";

/// The file system that keeps maps and programs alive; systemd mounts it, small systems may not.
pub(super) fn provide_bpffs() -> State {
    if is_mounted() {
        return State::Found(BPFFS.to_owned());
    }
    match mount() {
        Ok(()) => State::Installed(format!("mounted at {BPFFS}")),
        Err(error) => missing(&error),
    }
}

fn is_mounted() -> bool {
    let table = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut mounts = table.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    mounts.any(|fields| fields.get(1..3) == Some(&[BPFFS, "bpf"]))
}

fn mount() -> Result<()> {
    if !shell::is_root() {
        bail!("only root can mount it at {BPFFS}");
    }
    shell::run_quiet(Command::new("mount").args(["-t", "bpf", "bpf", BPFFS])).map(drop)
}
