//! Lets the driver's thread run ahead of what it measures.
//!
//! On a busy machine the thread would otherwise wait for a processor, and report that wait as the service's
//! latency. It needs a few percent of one processor, and the kernel's limit for real-time threads stands.

#![expect(unsafe_code, reason = "neither std nor nix sets a thread's scheduling policy")]

/// Real-time round-robin scheduling at the lowest priority, for the calling thread, where that is permitted.
/// Where it is not, latencies are what they are.
pub(super) fn ahead_of_others() {
    let parameters = nix::libc::sched_param { sched_priority: 1 };
    let policy = nix::libc::SCHED_RR | nix::libc::SCHED_RESET_ON_FORK;
    // SAFETY: the call reads `parameters`, which lives on this frame, and changes nothing but the policy of
    // the calling thread (0).
    let _ = unsafe { nix::libc::sched_setscheduler(0, policy, &raw const parameters) };
}
