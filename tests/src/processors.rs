//! Which processors stand for which hosts.
//!
//! A lab puts several hosts on one machine. Left alone, the scheduler keeps a client and the server that it waits
//! for on one processor for milliseconds while another is idle, which no two hosts would do to each other. Who
//! measures gives clients and load balancer one half of the processors and the sites the other.

use std::sync::OnceLock;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// The processors of the clients and the load balancer, and those of the sites; none where there is only one. The first
/// answer is kept: whoever is on one half from then on sees no other processors.
pub fn halves() -> Option<(Vec<usize>, Vec<usize>)> {
    static HALVES: OnceLock<Option<(Vec<usize>, Vec<usize>)>> = OnceLock::new();
    HALVES
        .get_or_init(|| {
            let allowed = sched_getaffinity(Pid::from_raw(0)).ok()?;
            let all: Vec<usize> =
                (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap_or(false)).collect();
            let (network, sites) = all.split_at(all.len() / 2);
            (!network.is_empty()).then(|| (network.to_vec(), sites.to_vec()))
        })
        .clone()
}

/// Keeps the calling thread, and what it starts from now on, on these processors. Best effort.
pub fn stay_on(cpus: &[usize]) {
    let mut set = CpuSet::new();
    for cpu in cpus {
        // A number that came out of a set fits into one.
        let _ = set.set(*cpu);
    }
    let _ = sched_setaffinity(Pid::from_raw(0), &set);
}

/// The list as `taskset --cpu-list` takes it.
pub fn list(cpus: &[usize]) -> String {
    cpus.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_on_one_half_still_knows_of_the_other() {
        let Some((network, sites)) = halves() else { return };
        stay_on(&network);
        assert_eq!(halves(), Some((network, sites)));
    }
}
