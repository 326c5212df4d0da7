//! A link between two namespaces that takes its time: delay, jitter, rate, queue, loss, cuts.
//!
//! ```text
//!   namespace a                        this process                        namespace b
//!   TUN device  --read-->  queue -> transmitter -> line  --write-->        TUN device
//!               <--write--     line <- transmitter <- queue  <--read--
//! ```
//!
//! Two threads, one for each way, sleep until a packet comes or is due, and go before all ordinary ones. The queue
//! (`queue.rs`) is pure; packets that nothing holds up are passed on without a copy. Kernels without netem can do
//! without it this way, and settings change without a packet lost.
//!
//! **Large segments.** Where nothing depends on single frames (no loss, and no rate below 1 Gb/s) a namespace hands over
//! segments of up to 64 KiB, which pass as one and arrive as one, when their last frame would. Rate, queue and counters
//! take them for the frames that they would be cut into. Otherwise the kernel cuts them before they are read.
//!
//! The devices carry IP, without link addresses and their resolution: a loss hits what was sent and nothing else. They
//! vanish with this process, however it ends.

mod carrier;
mod device;
mod priority;
mod queue;
mod size;
mod spec;

use std::sync::Arc;

pub use spec::{Counters, QueueLimit, Spec, Way, WaySpec};

use crate::error::LabError;
use crate::namespace::Namespace;
use crate::topology::ip_batch;
use carrier::Carrier;
use device::Device;
use queue::Queue;

/// Packets that a device keeps for its thread while that does not get a processor. The device drops what is more
/// without this module's knowledge.
const DEVICE_PACKETS: u32 = 8192;
/// The slowest rate, in bits per second, at which a segment of 64 KiB may pass as one: it takes half a millisecond.
const LARGE_SEGMENTS_BITS_PER_S: u64 = 1_000_000_000;

/// A link between two namespaces. Ends, devices included, when it is dropped.
#[derive(Debug)]
pub struct Link {
    /// One for each [`Way`].
    carriers: [Carrier; 2],
    /// The first namespace's and the second's.
    devices: [Arc<Device>; 2],
}

impl Link {
    /// Makes an interface called `name` (15 bytes at most) in each of two namespaces, up and without addresses, and
    /// joins them.
    pub fn new(a: &Namespace, b: &Namespace, name: &str, spec: &Spec) -> Result<Link, LabError> {
        let device = |namespace| Device::new(namespace, name).map(Arc::new);
        let devices = [device(a)?, device(b)?];
        let [at_a, at_b] = devices.each_ref();
        let start = |way, from: &Arc<Device>, to: &Arc<Device>| {
            Carrier::start(name, from.clone(), to.clone(), Queue::new(*spec.way(way)))
        };
        let carriers = [start(Way::AToB, at_a, at_b)?, start(Way::BToA, at_b, at_a)?];
        let link = Link { carriers, devices };
        link.choose_segments(spec)?;
        for namespace in [a, b] {
            // Without an address of its own making the device sends nothing by itself.
            let lines = [
                format!("link set {name} addrgenmode none"),
                format!("link set {name} txqueuelen {DEVICE_PACKETS} up"),
            ];
            ip_batch(namespace, &lines)?;
        }
        Ok(link)
    }

    /// Changes how the link behaves. What is on the line arrives as it would have; what waits for the transmitter is
    /// sent at the new rate.
    pub fn set(&self, spec: &Spec) -> Result<(), LabError> {
        self.choose_segments(spec)?;
        for (way, carrier) in Way::ALL.into_iter().zip(&self.carriers) {
            carrier.with(|queue, now| queue.set(now, *spec.way(way)));
        }
        Ok(())
    }

    /// Cuts the link both ways: when this returns nothing passes any more, and what was under way is lost.
    pub fn cut(&self) {
        self.carriers.iter().for_each(|carrier| carrier.with(|queue, _| queue.cut()));
    }

    /// Ends a cut.
    pub fn heal(&self) {
        self.carriers.iter().for_each(|carrier| carrier.with(|queue, _| queue.heal()));
    }

    /// What happened so far to frames that went one way.
    pub fn counters(&self, way: Way) -> Counters {
        self.carriers[way as usize].with(|queue, _| queue.counters())
    }

    fn choose_segments(&self, spec: &Spec) -> Result<(), LabError> {
        for (way, from) in Way::ALL.into_iter().zip(&self.devices) {
            let WaySpec { rate_bits_per_s, loss, .. } = spec.way(way);
            let is_fast = rate_bits_per_s.is_none_or(|rate| rate.get() >= LARGE_SEGMENTS_BITS_PER_S);
            from.take_large_segments(is_fast && *loss <= 0.0)?;
        }
        Ok(())
    }
}
