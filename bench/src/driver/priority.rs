//! Lets the driver's thread run ahead of what it measures.
//!
//! On a busy machine the thread would otherwise wait for a processor, and report that wait as the service's
//! latency. It stays an ordinary thread: a real-time one is woken where it last ran, so that it would interrupt
//! a server there at each reply while another processor is idle.

#![expect(unsafe_code, reason = "neither std nor nix sets a thread's nice value")]

/// The highest priority that an ordinary thread can have.
const NICE: nix::libc::c_int = -20;

/// Raises the calling thread's priority where that is permitted. Where it is not, latencies are what they are.
pub(crate) fn ahead_of_others() {
    // SAFETY: plain numbers; 0 means the calling thread, and nothing but its nice value changes.
    let _ = unsafe { nix::libc::setpriority(nix::libc::PRIO_PROCESS, 0, NICE) };
}
