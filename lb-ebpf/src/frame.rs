//! The checked window over a packet in kernel memory, for both hooks.

use aya_ebpf::bindings::{
    __sk_buff, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6, BPF_F_ADJ_ROOM_NO_CSUM_RESET,
    BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC, xdp_md,
};
use aya_ebpf::helpers::{
    bpf_l4_csum_replace, bpf_skb_adjust_room, bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_pull_data,
    bpf_xdp_adjust_head, bpf_xdp_adjust_tail, bpf_xdp_load_bytes,
};
use lb_core::checksum::fold;
use lb_core::{Packet, Reason};

use crate::sample;

/// Bytes that have to lie in one piece: link header, the larger IP header, a fragment header, and a TCP header with
/// its options.
const HEADERS: u32 = 14 + 40 + 8 + 60;

/// What the two hooks' packets have in common beside [`Packet`].
pub trait Frame: Packet + Sized {
    /// The hook's context.
    type Context;

    /// The packet of a context.
    fn of(context: *mut Self::Context) -> Self;

    /// Interface that the packet came in on.
    fn interface(&self) -> u32;

    /// The packet's length, read again from the context. The compiler knows bounds of [`Packet::length`] from
    /// earlier windows and leaves out checks that the verifier, which does not, insists on.
    fn length_for_helper(&self) -> usize;

    /// Copies the first `length` bytes out; whether that was done.
    ///
    /// # Safety
    /// `to` is valid for that many bytes.
    unsafe fn copy(&self, to: *mut u8, length: u32) -> bool;
}

/// A frame at the XDP hook.
pub struct XdpFrame {
    context: *mut xdp_md,
    data: usize,
    end: usize,
}

impl XdpFrame {
    #[inline(always)]
    fn refresh(&mut self) {
        *self = Self::of(self.context);
    }
}

impl Frame for XdpFrame {
    type Context = xdp_md;

    #[inline(always)]
    fn of(context: *mut xdp_md) -> Self {
        // Volatile, or the compiler has a function's caller read them, as numbers to the verifier.
        // SAFETY: the context is valid for the whole run of the program.
        let (data, end) = unsafe {
            ((&raw const (*context).data).read_volatile(), (&raw const (*context).data_end).read_volatile())
        };
        Self { context, data: data as usize, end: end as usize }
    }

    #[inline(always)]
    fn interface(&self) -> u32 {
        // SAFETY: the context is valid for the whole run of the program.
        unsafe { (*self.context).ingress_ifindex }
    }

    #[inline(always)]
    fn length_for_helper(&self) -> usize {
        // SAFETY: the context is valid for the whole run of the program.
        unsafe {
            let end = (&raw const (*self.context).data_end).read_volatile() as usize;
            end - (&raw const (*self.context).data).read_volatile() as usize
        }
    }

    #[inline(always)]
    unsafe fn copy(&self, to: *mut u8, length: u32) -> bool {
        // SAFETY: as the caller promises.
        unsafe { bpf_xdp_load_bytes(self.context, 0, to.cast(), length) == 0 }
    }
}

impl Packet for XdpFrame {
    #[inline(always)]
    fn window<const N: usize>(&mut self, offset: usize) -> Option<&mut [u8; N]> {
        window(self.data, self.end, offset)
    }

    #[inline(always)]
    fn length(&self) -> usize {
        self.end - self.data
    }

    #[inline(always)]
    fn insert<const N: usize>(&mut self) -> Option<()> {
        // SAFETY: a helper on the program's own context.
        let grown = unsafe { bpf_xdp_adjust_head(self.context, -(N as i32)) };
        self.refresh();
        (grown == 0).then_some(())
    }

    #[inline(always)]
    fn truncate(&mut self, length: usize) -> Option<()> {
        // SAFETY: a helper on the program's own context.
        let cut = unsafe { bpf_xdp_adjust_tail(self.context, length as i32 - self.length() as i32) };
        self.refresh();
        (cut == 0).then_some(())
    }

    #[inline(always)]
    fn sample(&mut self, every: u32, reason: Reason) {
        sample::xdp(self.context, every, reason as u32);
    }
}

/// A packet at the tc hook.
pub struct SkbFrame {
    context: *mut __sk_buff,
    data: usize,
    end: usize,
}

impl SkbFrame {
    #[inline(always)]
    fn refresh(&mut self) {
        *self = Self::of(self.context);
    }

    /// Makes the headers lie in one piece, where the packet is long enough to have them.
    #[inline(always)]
    pub fn pull_headers(&mut self) {
        // SAFETY: the context is valid for the whole run of the program.
        let length = unsafe { (*self.context).len };
        let wanted = if length < HEADERS { length } else { HEADERS };
        if self.end - self.data < wanted as usize {
            // SAFETY: a helper on the program's own context. Where it fails the windows do.
            unsafe { bpf_skb_pull_data(self.context, wanted) };
            self.refresh();
        }
    }
}

impl Frame for SkbFrame {
    type Context = __sk_buff;

    #[inline(always)]
    fn of(context: *mut __sk_buff) -> Self {
        // Volatile, or the compiler has a function's caller read them, as numbers to the verifier.
        // SAFETY: the context is valid for the whole run of the program.
        let (data, end) = unsafe {
            ((&raw const (*context).data).read_volatile(), (&raw const (*context).data_end).read_volatile())
        };
        Self { context, data: data as usize, end: end as usize }
    }

    #[inline(always)]
    fn interface(&self) -> u32 {
        // SAFETY: the context is valid for the whole run of the program.
        unsafe { (*self.context).ifindex }
    }

    #[inline(always)]
    fn length_for_helper(&self) -> usize {
        // SAFETY: the context is valid for the whole run of the program.
        unsafe { (&raw const (*self.context).len).read_volatile() as usize }
    }

    #[inline(always)]
    unsafe fn copy(&self, to: *mut u8, length: u32) -> bool {
        // SAFETY: as the caller promises.
        unsafe { bpf_skb_load_bytes(self.context.cast(), 0, to.cast(), length) == 0 }
    }
}

impl Packet for SkbFrame {
    const PARTIAL_CHECKSUMS: bool = true;

    #[inline(always)]
    fn window<const N: usize>(&mut self, offset: usize) -> Option<&mut [u8; N]> {
        window(self.data, self.end, offset)
    }

    #[inline(always)]
    fn length(&self) -> usize {
        // SAFETY: the context is valid for the whole run of the program.
        unsafe { (*self.context).len as usize }
    }

    #[inline(always)]
    fn segment(&self) -> usize {
        // SAFETY: the context is valid for the whole run of the program.
        unsafe { (*self.context).gso_size as usize }
    }

    #[inline(always)]
    fn insert<const N: usize>(&mut self) -> Option<()> {
        let outer = if N == 20 { BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 } else { BPF_F_ADJ_ROOM_ENCAP_L3_IPV6 };
        let flags = (outer | BPF_F_ADJ_ROOM_NO_CSUM_RESET) as u64;
        // SAFETY: a helper on the program's own context.
        let grown = unsafe { bpf_skb_adjust_room(self.context, N as i32, BPF_ADJ_ROOM_MAC, flags) };
        self.refresh();
        (grown == 0).then_some(())
    }

    #[inline(always)]
    fn truncate(&mut self, length: usize) -> Option<()> {
        // SAFETY: a helper on the program's own context.
        let cut = unsafe { bpf_skb_change_tail(self.context, length as u32, 0) };
        self.refresh();
        (cut == 0).then_some(())
    }

    #[inline(always)]
    fn mend_transport_checksum(&mut self, at: usize, addresses: u16, all: u16, udp: bool) -> Option<()> {
        let mangled = if udp { BPF_F_MARK_MANGLED_0 as u64 } else { 0 };
        let ports = fold(all as u64 + !addresses as u64);
        // A partial checksum covers the addresses only, as a pseudo header; the kernel knows which kind it is.
        // SAFETY: helpers on the program's own context.
        let mended = unsafe {
            bpf_l4_csum_replace(
                self.context,
                at as u32,
                0,
                addresses as u64,
                mangled | BPF_F_PSEUDO_HDR as u64,
            ) | bpf_l4_csum_replace(self.context, at as u32, 0, ports as u64, mangled)
        };
        self.refresh();
        (mended == 0).then_some(())
    }

    #[inline(always)]
    fn sample(&mut self, every: u32, reason: Reason) {
        sample::skb(self.context, every, reason as u32);
    }
}

#[inline(always)]
fn window<'f, const N: usize>(data: usize, end: usize, offset: usize) -> Option<&'f mut [u8; N]> {
    let start = data + offset;
    if start + N > end {
        return None;
    }
    // SAFETY: `start..start + N` lies within the packet, as the verifier also checks; the borrow of the frame keeps
    // a second window from being open at the same time.
    Some(unsafe { &mut *(start as *mut [u8; N]) })
}
