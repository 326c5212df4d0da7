//! Taking the connections of a workload that is to be killed off the wire without a word: no FIN, no RST,
//! nothing that stays behind in the kernel and blocks a later restore of the same connection.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{setsockopt, sockopt::TcpRepair};
use nix::unistd::Pid;

use crate::workload::processes::{self, Process};

/// A signal stops a process at once, unless it sleeps in the kernel.
const STOP_LIMIT: Duration = Duration::from_millis(500);
/// Between two looks.
const PAUSE: Duration = Duration::from_micros(200);

/// Stops all processes of a holder's pid namespace (a CRIU that restores in it too) and puts their TCP
/// sockets into repair mode, in which the kernel closes them silently. The caller kills them then.
pub async fn disconnect(holder_pid: i32) {
    let pids = processes::in_namespace_of(holder_pid);
    // First of all they are stopped: a restore that goes on would end the repair mode again.
    for pid in &pids {
        // One that has ended is as good as stopped.
        let _ = kill(Pid::from_raw(*pid), Signal::SIGSTOP);
    }
    let until = Instant::now() + STOP_LIMIT;
    while pids.iter().any(|pid| runs(*pid)) && Instant::now() < until {
        tokio::time::sleep(PAUSE).await;
    }
    let sockets = pids
        .iter()
        .flat_map(|pid| processes::sockets(*pid))
        // Other kinds of sockets refuse, and need nothing.
        .filter(|socket| setsockopt(socket, TcpRepair, &1).is_ok())
        .count();
    tracing::debug!(processes = pids.len(), sockets, "taken off the wire");
}

fn runs(pid: i32) -> bool {
    Process::read(pid).is_some_and(|process| !matches!(process.state, 'T' | 't' | 'Z' | 'X'))
}
