//! Atomic addition. `core` offers none on this target, though the machine has the instruction.

use core::arch::asm;
use core::sync::atomic::AtomicU64;

/// Adds one, seen by every CPU and by user space.
#[inline(always)]
pub fn increment(counter: &AtomicU64) {
    // SAFETY: the reference is valid and aligned for eight bytes, and the instruction writes nothing else.
    unsafe {
        asm!("lock *(u64 *)({counter} + 0) += {one}", counter = in(reg) counter.as_ptr(), one = in(reg) 1_u64)
    };
}
