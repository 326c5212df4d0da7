//! The checked window over a frame in kernel memory, at either hook.

use aya_ebpf::programs::{TcContext, XdpContext};
use lb_core::Packet;
use lb_core::decapsulate::HEADERS;

/// A frame, or as much of it as lies in one piece.
pub struct Frame {
    data: usize,
    end: usize,
    length: usize,
}

impl Frame {
    #[inline(always)]
    pub fn of_xdp(context: &XdpContext) -> Self {
        let (data, end) = (context.data(), context.data_end());
        Self { data, end, length: end - data }
    }

    /// Sees to it that the headers lie in one piece, whatever else does not.
    #[inline(always)]
    pub fn of_tc(context: &mut TcContext) -> Self {
        let length = context.len() as usize;
        let wanted = if length < HEADERS { length } else { HEADERS };
        if context.data() + wanted > context.data_end() {
            // Where it fails the windows do, too, and the frame counts as truncated.
            let _ = context.pull_data(wanted as u32);
        }
        Self { data: context.data(), end: context.data_end(), length }
    }
}

impl Packet for Frame {
    #[inline(always)]
    fn window<const N: usize>(&mut self, offset: usize) -> Option<&mut [u8; N]> {
        let start = self.data + offset;
        if start + N > self.end {
            return None;
        }
        // SAFETY: `start..start + N` lies within the frame, as the verifier also checks; the borrow of `self`
        // keeps a second window from being open at the same time.
        Some(unsafe { &mut *(start as *mut [u8; N]) })
    }

    #[inline(always)]
    fn length(&self) -> usize {
        self.length
    }
    /// Nothing is put before a packet here.
    #[inline(always)]
    fn insert<const N: usize>(&mut self) -> Option<()> {
        None
    }

    /// What is behind a packet stays there.
    #[inline(always)]
    fn truncate(&mut self, _length: usize) -> Option<()> {
        None
    }
}
