//! The priority of the threads that carry packets.

#![expect(unsafe_code, reason = "no crate of ours wraps the call that sets a thread's scheduling")]

/// Lets the calling thread run before all ordinary ones, as a wire does not wait for a processor either. Best effort:
/// without it packets come late where other work takes the processors.
pub(super) fn go_first() {
    let lowest = libc::sched_param { sched_priority: 1 };
    // SAFETY: the call reads one `struct sched_param`, which outlives it; 0 is the calling thread.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const lowest) };
}
