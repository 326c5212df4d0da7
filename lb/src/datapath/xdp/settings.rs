//! Bounds and switches that the kernel program reads with every packet that they concern.

use std::io;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;

use aya::maps::MapData;
use lb_core::record::Settings;

use super::mapped::MappedArray;

/// [`Settings`] as both sides share them.
#[derive(Debug, Default)]
#[repr(C)]
pub(super) struct SharedSettings {
    window: AtomicU32,
    new_flows_per_cpu: AtomicU32,
    new_flows_per_prefix: AtomicU32,
    sample: AtomicU32,
}

const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<SharedSettings>() == size_of::<Settings>());
    assert!(offset_of!(SharedSettings, window) == offset_of!(Settings, window));
    assert!(offset_of!(SharedSettings, new_flows_per_cpu) == offset_of!(Settings, new_flows_per_cpu));
    assert!(offset_of!(SharedSettings, new_flows_per_prefix) == offset_of!(Settings, new_flows_per_prefix));
    assert!(offset_of!(SharedSettings, sample) == offset_of!(Settings, sample));
};

/// The record in this process's memory; changes hold from the next packet on.
pub struct SettingsTable(MappedArray<SharedSettings>);

impl SettingsTable {
    /// Maps the settings' map.
    pub fn new(map: &MapData) -> io::Result<Self> {
        MappedArray::whole(map).map(Self)
    }

    fn record(&self) -> &SharedSettings {
        self.0.get(0).expect("the map has one element")
    }

    /// Copies one packet in so many to the samples; 0: none.
    pub fn set_sample(&self, one_in: u32) {
        self.record().sample.store(one_in, Relaxed);
    }

    /// Admits so many new flows in a window of `window` jiffies (0: any number).
    pub fn set_bounds(&self, window: u32, per_cpu: u32, per_prefix: u32) {
        let record = self.record();
        // While they change nothing is bounded: the numbers belong to one window.
        record.window.store(0, Relaxed);
        record.new_flows_per_cpu.store(per_cpu, Relaxed);
        record.new_flows_per_prefix.store(per_prefix, Relaxed);
        record.window.store(window, Relaxed);
    }
}
