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

/// Stops all processes around a holder's workload (a CRIU that restores it too) and puts their TCP
/// sockets into repair mode, in which the kernel closes them silently. The caller kills them then.
pub async fn disconnect(holder_pid: i32) {
    // First of all they are stopped: a restore that goes on would end the repair mode again.
    let pids = stop(|| processes::around(holder_pid)).await;
    let sockets = set_repair(&pids, true);
    tracing::debug!(processes = pids.len(), sockets, "taken off the wire");
}

/// Stops the workload of a holder, all of it.
pub async fn suspend(holder_pid: i32) {
    stop(|| processes::kept_by(holder_pid)).await;
}

/// Sends a signal to all processes of a holder's workload at this moment.
pub fn signal(holder_pid: i32, signal: Signal) {
    signal_each(&processes::kept_by(holder_pid), signal);
}

/// Stops processes, and those that are born meanwhile; all of them.
async fn stop(list: impl Fn() -> Vec<i32>) -> Vec<i32> {
    let until = Instant::now() + STOP_LIMIT;
    let mut pids = list();
    loop {
        signal_each(&pids, Signal::SIGSTOP);
        let now = list();
        if now == pids && !pids.iter().any(|pid| runs(*pid)) || Instant::now() >= until {
            return pids;
        }
        pids = now;
        tokio::time::sleep(PAUSE).await;
    }
}

fn signal_each(pids: &[i32], signal: Signal) {
    for pid in pids {
        // One that has ended needs none.
        let _ = kill(Pid::from_raw(*pid), signal);
    }
}

/// Ends the repair mode in which a CRIU that is gone left the sockets of a holder's workload.
pub fn reconnect(holder_pid: i32) {
    let pids = processes::kept_by(holder_pid);
    let sockets = set_repair(&pids, false);
    tracing::debug!(processes = pids.len(), sockets, "back on the wire");
}

/// How many sockets took it; other kinds than TCP refuse, and need nothing.
fn set_repair(pids: &[i32], on: bool) -> usize {
    let sockets = pids.iter().flat_map(|pid| processes::sockets(*pid));
    sockets.filter(|socket| setsockopt(socket, TcpRepair, &u32::from(on)).is_ok()).count()
}

fn runs(pid: i32) -> bool {
    Process::read(pid).is_some_and(|process| !matches!(process.state, 'T' | 't' | 'Z' | 'X'))
}
