//! What the daemon and the kernel program share in memory: gate words, hold counters, and the links to sites.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, SeqCst};
use std::sync::{Mutex, RwLock};
use std::time::Instant;

use aya::maps::MapData;
use lb_core::record::{Backend, HoldCounters, Location, Sites};
use lb_core::{GateWord, Slot};

use super::mapped::MappedArray;
use crate::datapath::{BackendNumber, BackendState, SiteNumber};

/// Safe from any thread; each call is a load or a store or a short lock.
pub struct SharedTables {
    backends: MappedArray<Backend>,
    holds: MappedArray<HoldCounters>,
    /// Locations of the sites by number, as the kernel program has them.
    locations: RwLock<HashMap<SiteNumber, Location>>,
    /// When the last word of a backend was stored.
    stored: Mutex<HashMap<BackendNumber, Instant>>,
}

impl SharedTables {
    /// Maps the backends' and the hold counters' map.
    pub fn new(backends: &MapData, holds: &MapData) -> io::Result<Self> {
        Ok(Self {
            backends: MappedArray::whole(backends)?,
            holds: MappedArray::whole(holds)?,
            locations: RwLock::default(),
            stored: Mutex::default(),
        })
    }

    fn backend(&self, backend: BackendNumber) -> &Backend {
        self.backends.get(backend.0).expect("backend numbers are given out below the table's size")
    }

    fn hold(&self, backend: BackendNumber) -> &HoldCounters {
        self.holds.get(backend.0).expect("backend numbers are given out below the table's size")
    }

    /// A copy of the backend's record, for whoever writes records.
    pub fn record(&self, backend: BackendNumber) -> Backend {
        let Backend { word, sites, address, port, reserved, incarnation } = self.backend(backend);
        let both = [Slot::A, Slot::B].map(|slot| sites.at(slot));
        let sites = Sites::default();
        sites.store(both);
        let word = AtomicU64::new(word.load(Acquire));
        let (address, port, reserved, incarnation) = (*address, *port, *reserved, *incarnation);
        Backend { word, sites, address, port, reserved, incarnation }
    }

    /// The backend's gate word.
    pub fn word(&self, backend: BackendNumber) -> GateWord {
        GateWord::from_bits(self.backend(backend).word.load(Acquire))
    }

    /// The one store.
    pub fn store(&self, backend: BackendNumber, word: GateWord) {
        // Noted before: whoever sees the word finds its time.
        let now = Instant::now();
        self.stored.lock().expect("nothing panics under it").insert(backend, now);
        self.backend(backend).word.store(word.bits(), SeqCst);
    }

    /// When the backend's word was last stored by this process.
    pub fn stored_at(&self, backend: BackendNumber) -> Option<Instant> {
        self.stored.lock().expect("nothing panics under it").get(&backend).copied()
    }

    /// Gate word and sites.
    pub fn state(&self, backend: BackendNumber) -> BackendState {
        let record = self.backend(backend);
        let sites = [Slot::A, Slot::B].map(|slot| SiteNumber(record.sites.at(slot)));
        BackendState { word: self.word(backend), sites }
    }

    /// Writes a site into a slot that is not the active one.
    pub fn stage(&self, backend: BackendNumber, slot: Slot, site: SiteNumber) {
        let mut sites = self.state(backend).sites.map(|site| site.0);
        sites[slot as usize] = site.0;
        self.backend(backend).sites.store(sites);
    }

    /// The location of the site in a slot of a backend, where it is known.
    pub fn location(&self, backend: BackendNumber, slot: Slot) -> Option<Location> {
        let site = SiteNumber(self.backend(backend).sites.at(slot));
        self.locations.read().expect("nothing panics under it").get(&site).copied()
    }

    /// Remembers a site's location.
    pub fn set_location(&self, site: SiteNumber, location: Location) {
        self.locations.write().expect("nothing panics under it").insert(site, location);
    }

    /// Counts packets as captured that the kernel program captured as one.
    pub fn capture(&self, backend: BackendNumber, packets: u64) {
        self.hold(backend).captured.fetch_add(packets, SeqCst);
    }

    /// Packets captured and settled, since the tables were made. Settled is read first: it never overtakes.
    pub fn hold_counts(&self, backend: BackendNumber) -> (u64, u64) {
        let hold = self.hold(backend);
        let settled = hold.settled.load(Acquire);
        (hold.captured.load(Acquire), settled)
    }

    /// Packets that the kernel program refused to hold, since the tables were made.
    pub fn refused(&self, backend: BackendNumber) -> u64 {
        self.hold(backend).refused.load(Relaxed)
    }

    /// Counts captured packets as sent or given up. After their sending has returned, never before.
    pub fn settle(&self, backend: BackendNumber, packets: u64) {
        self.hold(backend).settled.fetch_add(packets, SeqCst);
    }
}
