//! What the XDP datapath shows of its inside, and what it does so that there is something to show.

use std::num::NonZeroU32;
use std::path::Path;
use std::sync::Arc;

use aya::maps::{Map, MapData, PerCpuArray, RingBuf};
use tokio::sync::mpsc::Receiver;

use super::XdpDatapath;
use super::expiry::Expiry;
use super::flows::FlowMaps;
use super::program::{self, kernel};
use super::samples::Sampler;
use super::settings::SettingsTable;
use super::ticks::TickClock;
use crate::capture::stream::Sample;
use crate::config::FlowTimes;
use crate::datapath::DatapathError;
use crate::datapath::observe::{FlowFilter, FlowList, FlowTables, Member, Observe};

/// The threads and tables of everything here.
pub struct Observer {
    maps: Arc<FlowMaps>,
    clock: Arc<TickClock>,
    expiry: Expiry,
    sampler: Sampler,
}

impl Observer {
    /// Opens the tables pinned below `pins` once more, and starts to end flows.
    pub fn start(pins: &Path) -> Result<Self, DatapathError> {
        let open = |name: &str| open(pins, name);
        let maps = Arc::new(FlowMaps::open(open)?);
        let clock =
            TickClock::new().map_err(kernel("loading the program that reads the kernel's tick count"))?;
        let clock = Arc::new(clock);
        let expiry = Expiry::start(maps.clone(), clock.clone(), FlowTimes::default())
            .map_err(kernel("starting the thread that ends flows"))?;
        let settings =
            SettingsTable::new(&open("SETTINGS")?).map_err(kernel("mapping the settings into memory"))?;
        let ring = RingBuf::try_from(Map::RingBuf(open("SAMPLES")?)).map_err(kernel("table SAMPLES"))?;
        let refused = PerCpuArray::try_from(Map::PerCpuArray(open("SAMPLES_LOST")?))
            .map_err(kernel("table SAMPLES_LOST"))?;
        let sampler = Sampler::new(ring, refused, move |one_in| settings.set_sample(one_in));
        Ok(Self { maps, clock, expiry, sampler })
    }
}

fn open(pins: &Path, name: &str) -> Result<MapData, DatapathError> {
    MapData::from_pin(program::map_pin(pins, name)).map_err(kernel(format!("opening table {name}")))
}

impl Observe for XdpDatapath {
    fn set_flow_times(&self, times: FlowTimes) {
        self.observer.expiry.set_times(times);
    }

    fn flows(&self, filter: &FlowFilter) -> Result<FlowList, DatapathError> {
        let Observer { maps, clock, .. } = &self.observer;
        maps.list(clock, filter).map_err(kernel("reading the flow tables"))
    }

    fn flow_tables(&self) -> FlowTables {
        self.observer.expiry.report()
    }

    fn members(&self) -> Vec<Member> {
        self.read_members()
    }

    fn sample(&self, one_in: NonZeroU32) -> Receiver<Sample> {
        self.observer.sampler.listen(one_in)
    }

    fn lost_samples(&self) -> u64 {
        self.observer.sampler.lost()
    }
}
