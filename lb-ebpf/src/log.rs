//! What the programs say for debugging, through aya-log.
//!
//! The loader sets the level before the kernel sees the program, as a constant: what it disables, the verifier takes
//! out, and nothing of it is left on any packet's way.

use aya_log_ebpf::debug;

use crate::frame::Frame;

/// A packet that is not forwarded, with its reason's number.
#[inline(always)]
pub fn refused(frame: &impl Frame, reason: u32) {
    let interface = frame.interface();
    debug!(frame, "packet refused: reason {}, interface {}", reason, interface);
}
