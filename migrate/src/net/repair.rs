//! Taking the connections of stopped processes off the wire without a word: no FIN, no RST, nothing that
//! stays behind in the kernel and blocks a later restore of the same connection.

use nix::sys::socket::{setsockopt, sockopt::TcpRepair};

use crate::workload::processes;

/// Puts every TCP socket of these processes into repair mode, in which the kernel closes them silently.
/// Gives how many there were.
pub fn disconnect(pids: &[i32]) -> usize {
    pids.iter()
        .flat_map(|pid| processes::sockets(*pid))
        // Other kinds of sockets refuse, and need nothing.
        .filter(|socket| setsockopt(socket, TcpRepair, &1).is_ok())
        .count()
}
