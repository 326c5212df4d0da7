//! The wrapper program: runs a template's packets, each of the next client, through a program.

use std::time::Duration;

use anyhow::{Context, Result};
use aya::maps::{Array, MapData, ProgramArray};
use aya::programs::{ProgramFd, Xdp};
use aya::{Ebpf, TestRun, TestRunOptions, include_bytes_aligned};
use nix::time::{ClockId, clock_gettime};

use super::case::{Family, Protocol};

static OBJECT: &[u8] = include_bytes_aligned!(env!("DROVER_EBPF_OBJECT"));

/// The wrapper's `Template`.
const RESTORED: usize = 80;
const TEMPLATE: usize = RESTORED + 16;

/// A floor program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Floor {
    /// XDP_TX alone.
    Transmit,
    /// Minimal IPIP encapsulation.
    Ipip,
}

impl Floor {
    const ALL: [Floor; 2] = [Floor::Transmit, Floor::Ipip];

    fn program(self) -> &'static str {
        match self {
            Floor::Transmit => "floor_transmit",
            Floor::Ipip => "floor_ipip",
        }
    }
}

/// In which order clients' packets are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// By number.
    InTurn,
    /// None that caches could foresee.
    Shuffled,
}

impl Order {
    /// Factor and step of the congruential generator; its period is full for every power of two (Hull, Dobell, 1962).
    fn generator(self) -> (u32, u32) {
        match self {
            Order::InTurn => (1, 1),
            Order::Shuffled => (1_664_525, 1_013_904_223),
        }
    }
}

/// The loaded wrapper.
pub struct Wrapper {
    ebpf: Ebpf,
    template: Array<MapData, [u8; TEMPLATE]>,
    client: Array<MapData, u32>,
    programs: ProgramArray<MapData>,
}

/// What a run took.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// Processor time of one packet in nanoseconds, wrapper included.
    pub ns: f64,
}

impl Wrapper {
    /// Loads the wrapper and the floors.
    pub fn load() -> Result<Self> {
        let mut ebpf = Ebpf::load(OBJECT).context("cannot load the benchmark's wrapper")?;
        for family in Family::ALL {
            for protocol in Protocol::ALL {
                program(&mut ebpf, wrapper(family, protocol))?.load()?;
            }
        }
        for floor in Floor::ALL {
            program(&mut ebpf, floor.program())?.load()?;
        }
        let template = ebpf.take_map("TEMPLATE").context("the wrapper has no TEMPLATE")?.try_into()?;
        let client = ebpf.take_map("CLIENT").context("the wrapper has no CLIENT")?.try_into()?;
        let programs = ebpf.take_map("PROGRAMS").context("the wrapper has no PROGRAMS")?.try_into()?;
        Ok(Self { ebpf, template, client, programs })
    }

    /// A floor program.
    pub fn floor(&mut self, floor: Floor) -> Result<ProgramFd> {
        Ok(program(&mut self.ebpf, floor.program())?.fd()?.try_clone()?)
    }

    /// From now on packets are the template's (client 0's), of so many clients in that order from the one after `last`,
    /// and go to the program.
    pub fn aim(
        &mut self,
        template: &[u8],
        (clients, order): (u32, Order),
        last: u32,
        target: &ProgramFd,
    ) -> Result<()> {
        let (factor, step) = order.generator();
        let mut bytes = template[..RESTORED].to_vec();
        for number in [template.len() as u32, clients - 1, factor, step] {
            bytes.extend(number.to_ne_bytes());
        }
        let bytes: [u8; TEMPLATE] = bytes.as_slice().try_into()?;
        self.template.set(0, bytes, 0)?;
        self.client.set(0, last, 0)?;
        self.programs.set(0, target, 0)?;
        Ok(())
    }

    /// Runs the next `packets` packets; `template` gives the frame its size.
    pub fn run(&mut self, family: Family, protocol: Protocol, template: &[u8], packets: u32) -> Result<Run> {
        let wrapper: &mut Xdp = program(&mut self.ebpf, wrapper(family, protocol))?;
        let options = TestRunOptions { data_in: Some(template), repeat: packets, ..TestRunOptions::new() };
        // The kernel's own figure is in whole nanoseconds. This thread's processor time leaves out, as that does, what
        // others ran in between.
        let before = processor_time()?;
        wrapper.test_run(options)?;
        let took = processor_time()? - before;
        Ok(Run { ns: took.as_nanos() as f64 / f64::from(packets) })
    }

    /// The packet that the wrapper makes next, as it leaves the program, and its client's number.
    pub fn one(&mut self, family: Family, protocol: Protocol, template: &[u8]) -> Result<(Vec<u8>, u32)> {
        let wrapper: &mut Xdp = program(&mut self.ebpf, wrapper(family, protocol))?;
        let mut out = vec![0; 256];
        let options =
            TestRunOptions { data_in: Some(template), data_out: Some(&mut out), ..TestRunOptions::new() };
        let length = wrapper.test_run(options)?.data_size_out;
        out.truncate(length as usize);
        Ok((out, self.client.get(&0, 0)?))
    }
}

fn processor_time() -> Result<Duration> {
    let now = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).context("cannot read the processor time")?;
    Ok(now.into())
}

fn wrapper(family: Family, protocol: Protocol) -> &'static str {
    match (family, protocol) {
        (Family::V4, Protocol::Tcp) => "wrap_v4_tcp",
        (Family::V4, Protocol::Udp) => "wrap_v4_udp",
        (Family::V6, Protocol::Tcp) => "wrap_v6_tcp",
        (Family::V6, Protocol::Udp) => "wrap_v6_udp",
    }
}

fn program<'e>(ebpf: &'e mut Ebpf, name: &str) -> Result<&'e mut Xdp> {
    let found = ebpf.program_mut(name).with_context(|| format!("the wrapper has no program {name}"))?;
    Ok(found.try_into()?)
}
