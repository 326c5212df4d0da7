//! The thread that carries packets one way: out of a device, through the queue, into the other device.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::prctl::set_timerslack;
use nix::sys::time::TimeSpec;

use super::device::Device;
use super::priority::go_first;
use super::queue::{Offer, Queue, Size};
use super::size::{PREFIX_BYTES, size};
use crate::error::LabError;

/// Packets that are read before those that are due are looked at again.
const BATCH: usize = 32;
/// The largest packet of a TUN device.
const PACKET_BYTES: usize = PREFIX_BYTES + 65_536;

/// What the kernel takes as a timeout; waking too early does no harm.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// One way of a link, at work. Ends with its handle.
#[derive(Debug)]
pub(super) struct Carrier {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue<Vec<u8>>>,
    start: Instant,
    /// Wakes the thread for new settings and for its end.
    wake: EventFd,
    ends: AtomicBool,
}

impl Carrier {
    /// Starts a thread that reads from one device and writes to the other what comes out of `queue`.
    pub(super) fn start(
        name: &str,
        from: Arc<Device>,
        to: Arc<Device>,
        queue: Queue<Vec<u8>>,
    ) -> Result<Carrier, LabError> {
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
            .map_err(|errno| LabError::io("make an eventfd")(errno.into()))?;
        let (queue, ends) = (Mutex::new(queue), AtomicBool::new(false));
        let shared = Arc::new(Shared { queue, start: Instant::now(), wake, ends });
        let of_thread = shared.clone();
        let thread = std::thread::Builder::new()
            .name(format!("link-{name}"))
            .spawn(move || carry(&of_thread, &from, &to))
            .map_err(LabError::io("start a link's thread"))?;
        Ok(Carrier { shared, thread: Some(thread) })
    }

    /// Works on the queue, now.
    pub(super) fn with<T>(&self, work: impl FnOnce(&mut Queue<Vec<u8>>, Duration) -> T) -> T {
        let result = {
            let mut queue = self.shared.lock();
            work(&mut queue, self.shared.start.elapsed())
        };
        self.shared.wake();
        result
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::Release);
        self.shared.wake();
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed; a drop has nobody to tell.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue<Vec<u8>>> {
        self.queue.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn wake(&self) {
        // Only fails where the counter is full: then it is awake.
        let _ = self.wake.write(1);
    }
}

/// Carries until told to end, or until a device is gone.
fn carry(shared: &Shared, from: &Device, to: &Device) {
    // By default the kernel adds up to 50 us to each wait. Best effort.
    let _ = set_timerslack(1);
    go_first();
    let mut buffer = vec![0; PACKET_BYTES];
    while !shared.ends.load(Ordering::Acquire) {
        let (next, more) = {
            let mut queue = shared.lock();
            deliver(shared, &mut queue, to);
            let Ok(more) = accept(shared, &mut queue, from, to, &mut buffer) else { return };
            deliver(shared, &mut queue, to);
            (queue.next(), more)
        };
        if !more && wait(shared, from, next).is_err() {
            return;
        }
    }
}

/// Reads a batch; says whether there may be more.
fn accept(
    shared: &Shared,
    queue: &mut Queue<Vec<u8>>,
    from: &Device,
    to: &Device,
    buffer: &mut [u8],
) -> std::io::Result<bool> {
    for _ in 0..BATCH {
        let Some(length) = from.read(buffer)? else { return Ok(false) };
        let packet = &buffer[..length];
        let Some(size) = size(packet) else { continue };
        if queue.offer(shared.start.elapsed(), size, || packet.to_vec()) == Offer::Passes {
            pass(queue, to, packet, size);
        }
    }
    Ok(true)
}

/// Writes what is due.
fn deliver(shared: &Shared, queue: &mut Queue<Vec<u8>>, to: &Device) {
    while let Some((packet, size)) = queue.take(shared.start.elapsed()) {
        pass(queue, to, &packet, size);
    }
}

fn pass(queue: &mut Queue<Vec<u8>>, to: &Device, packet: &[u8], size: Size) {
    if to.write(packet).is_err() {
        queue.refused(size);
    }
}

/// Sleeps until a packet comes, until `next`, or until woken.
fn wait(shared: &Shared, from: &Device, next: Option<Duration>) -> nix::Result<()> {
    let timeout =
        next.map(|next| TimeSpec::from(next.saturating_sub(shared.start.elapsed()).min(LONGEST_WAIT)));
    let mut files =
        [PollFd::new(from.as_fd(), PollFlags::POLLIN), PollFd::new(shared.wake.as_fd(), PollFlags::POLLIN)];
    match ppoll(&mut files, timeout, None) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => return Err(errno),
    }
    if files[1].any().unwrap_or(false) {
        let _ = shared.wake.read();
    }
    Ok(())
}
