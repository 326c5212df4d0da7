//! Lets threads that nobody waits for make way.
#![expect(unsafe_code, reason = "neither std nor nix sets a thread's nice value")]

/// The lowest priority that an ordinary thread can have.
const NICE: libc::c_int = 19;

/// Lowers the calling thread's priority.
pub(super) fn behind_others() {
    // SAFETY: plain numbers; 0 means the calling thread, and nothing but its nice value changes.
    let _ = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
}
