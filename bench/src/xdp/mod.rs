//! `cargo xtask bench xdp`: nanoseconds that the XDP program spends on a packet, through `BPF_PROG_TEST_RUN`.
//!
//! ```text
//!   wrapper (lb-ebpf/src/bin/bench_wrapper.rs): the packet anew, of the next client
//!      | tail call
//!   program under test, or a floor: XDP_TX alone, minimal IPIP encapsulation
//! ```
//!
//! * [`case`] says what is measured: which packets of how many flows, in which mode.
//! * [`packets`] makes them, byte by byte as the wrapper does.
//! * [`fixture`] loads the program and fills its tables: the one file that knows their records.
//! * [`handshake`] opens flows by sending real packets through the program.
//! * [`wrapper`] runs a case's packets.
//! * [`run`] puts these together: groups of cases, in interleaved rounds.
//! * [`report`] is what comes out.
//!
//! Tables are pinned by the program's object, and so this needs a BPF file system: [`private_bpffs`] mounts one that
//! nobody else sees and that goes with the process.

pub mod case;
mod fixture;
mod handshake;
mod packets;
pub mod report;
pub mod run;
mod wrapper;

use std::path::Path;

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// Where the program's tables are pinned, each load in a folder of its own.
const PINS: &str = "/sys/fs/bpf";

/// Gives the calling thread, and those that it starts from then on, a BPF file system of their own.
pub fn private_bpffs() -> Result<()> {
    let root = "loading XDP programs needs root";
    unshare(CloneFlags::CLONE_NEWNS).context(root)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .context("cannot make the mounts private")?;
    mount(Some("bpf"), Path::new(PINS), Some("bpf"), MsFlags::empty(), None::<&str>)
        .with_context(|| format!("cannot mount a BPF file system at {PINS}"))
}
