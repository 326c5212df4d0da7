//! The checked window over a frame in kernel memory.

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::xdp_md;
use aya_ebpf::programs::XdpContext;
use lb_core::Packet;

/// A frame of the hook's context.
pub struct Frame {
    context: *mut xdp_md,
    data: usize,
    end: usize,
}

impl Frame {
    #[inline(always)]
    pub fn new(context: &XdpContext) -> Self {
        Self { context: context.as_ptr().cast(), data: context.data(), end: context.data_end() }
    }

    /// Interface that the frame came in on.
    #[inline(always)]
    pub fn interface(&self) -> u32 {
        // SAFETY: the context is valid for the whole run of the program.
        unsafe { (*self.context).ingress_ifindex }
    }

    /// The frame's length, read again from the context. The compiler knows bounds of [`Packet::length`] from
    /// earlier windows and leaves out checks that the verifier, which does not, insists on.
    #[inline(always)]
    pub fn length_for_helper(&self) -> usize {
        // SAFETY: the context is valid for the whole run of the program.
        unsafe {
            let end = (&raw const (*self.context).data_end).read_volatile() as usize;
            end - (&raw const (*self.context).data).read_volatile() as usize
        }
    }

    /// The hook's context, for helpers.
    #[inline(always)]
    pub fn context(&self) -> *mut xdp_md {
        self.context
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
        self.end - self.data
    }
}
