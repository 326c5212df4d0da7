//! A round: both sides get the same tables and the same events; each packet's verdict, bytes, capture and sample must be
//! equal, and at the end counters and flows.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use lb_core::host::{Frame, HostTables};
use lb_core::record::{CAPTURE_LARGE, CaptureHead, HoldCounters, SAMPLE_BYTES};
use lb_core::{Action, Arrival, Family, Packet, Reason, Tables, process};

use crate::generator::{Event, Generator};
use crate::kernel::{FamilyTables, FlowTexts, Kernel, numbers, text};
use crate::random::Random;
use crate::world::{BACKENDS, BackendState, Hook, INTERFACE, World};

/// How long a failing round may be made smaller.
const SHRINKING: Duration = Duration::from_secs(20);

/// A difference between kernel and host.
#[derive(Debug)]
pub struct Difference {
    pub event: usize,
    pub text: String,
}

/// What a round came to.
pub struct Passed {
    /// Packets by reason.
    pub reasons: Vec<u64>,
    /// Flows at its end, established and new.
    pub flows: [usize; 2],
}

/// A frame that keeps the samples taken of it. `PARTIAL`: with the tc hook's way to mend checksums, as the kernel's
/// helper does it to a packet whose checksum is not partial.
struct Traced<const PARTIAL: bool> {
    frame: Frame,
    samples: Vec<(u32, u32, Vec<u8>)>,
}

impl<const PARTIAL: bool> Packet for Traced<PARTIAL> {
    const PARTIAL_CHECKSUMS: bool = PARTIAL;

    fn window<const N: usize>(&mut self, offset: usize) -> Option<&mut [u8; N]> {
        self.frame.window(offset)
    }

    fn length(&self) -> usize {
        self.frame.length()
    }

    fn insert<const N: usize>(&mut self) -> Option<()> {
        self.frame.insert::<N>()
    }

    fn truncate(&mut self, length: usize) -> Option<()> {
        self.frame.truncate(length)
    }

    fn mend_transport_checksum(&mut self, at: usize, addresses: u16, all: u16, udp: bool) -> Option<()> {
        let ports = lb_core::checksum::fold(u64::from(all) + u64::from(!addresses));
        for delta in [addresses, ports] {
            let field = self.frame.window::<2>(at)?;
            let checksum = u16::from_ne_bytes(*field);
            if udp && checksum == 0 {
                continue;
            }
            let mended = lb_core::checksum::update(checksum, delta);
            *field = if udp && mended == 0 { 0xffff } else { mended }.to_ne_bytes();
        }
        Some(())
    }

    fn sample(&mut self, _every: u32, reason: Reason) {
        let bytes = &self.frame.0;
        let kept = bytes[..bytes.len().min(SAMPLE_BYTES)].to_vec();
        self.samples.push((reason as u32, bytes.len() as u32, kept));
    }
}

/// Both sides of a round.
struct Round<'k, const W: usize, const SERVICE: usize, const NAT: usize, const FRAGMENT: usize, F> {
    kernel: &'k mut Kernel,
    tables: &'k mut FamilyTables<W, SERVICE, NAT, FRAGMENT>,
    host: HostTables<W>,
    world: &'k World,
    family: F,
    arrival: Arrival,
    reasons: Vec<u64>,
    traffic: Vec<[u64; 6]>,
}

/// Runs so many events of the round of a seed.
pub fn run<const W: usize, const SERVICE: usize, const NAT: usize, const FRAGMENT: usize, F: Family<W>>(
    kernel: &mut Kernel,
    tables: &mut FamilyTables<W, SERVICE, NAT, FRAGMENT>,
    family: F,
    random: Random,
    world: &World,
    events: usize,
) -> Result<Passed, String> {
    let mut generator = Generator::new(random, world);
    let mut history = Vec::new();
    let outcome = (|| {
        let mut round = Round::begin(kernel, tables, family, world);
        for number in 0..events {
            let event = generator.next();
            history.push(event.clone());
            let done = round.apply(&event).map_err(|text| Difference { event: number, text })?;
            if let (Event::Packet(before), Some((action, after))) = (&event, done) {
                generator.learn(before, &after, action);
            }
        }
        round.end().map_err(|text| Difference { event: events, text })
    })();
    outcome.map_err(|difference| {
        let (events, text) = shrink(kernel, tables, family, world, history, difference.text);
        let lines: Vec<String> = events.iter().map(show).collect();
        format!(
            "{text}\n(first seen at event {}) {} events suffice, {:?}, IPv{}:\n{}",
            difference.event,
            lines.len(),
            world.hook,
            if world.v6 { 6 } else { 4 },
            lines.join("\n")
        )
    })
}

fn show(event: &Event) -> String {
    match event {
        Event::Packet(bytes) => {
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("packet {hex}")
        }
        other => format!("{other:?}"),
    }
}

/// Leaves out what a difference does not need (delta debugging), for a bounded time.
fn shrink<const W: usize, const SERVICE: usize, const NAT: usize, const FRAGMENT: usize, F: Family<W>>(
    kernel: &mut Kernel,
    tables: &mut FamilyTables<W, SERVICE, NAT, FRAGMENT>,
    family: F,
    world: &World,
    mut events: Vec<Event>,
    mut text: String,
) -> (Vec<Event>, String) {
    let deadline = Instant::now() + SHRINKING;
    let mut chunk = events.len().div_ceil(2);
    while chunk > 0 && Instant::now() < deadline {
        let mut at = 0;
        while at < events.len() && Instant::now() < deadline {
            let mut fewer = events.clone();
            fewer.drain(at..(at + chunk).min(events.len()));
            let mut round = Round::begin(kernel, tables, family, world);
            let differs = fewer
                .iter()
                .try_for_each(|event| round.apply(event).map(drop))
                .and_then(|()| round.end().map(drop));
            match differs {
                Err(still) => (events, text) = (fewer, still),
                Ok(()) => at += chunk,
            }
        }
        chunk /= 2;
    }
    (events, text)
}

impl<'k, const W: usize, const SERVICE: usize, const NAT: usize, const FRAGMENT: usize, F: Family<W>>
    Round<'k, W, SERVICE, NAT, FRAGMENT, F>
{
    fn begin(
        kernel: &'k mut Kernel,
        tables: &'k mut FamilyTables<W, SERVICE, NAT, FRAGMENT>,
        family: F,
        world: &'k World,
    ) -> Self {
        let (settings, now) = kernel.reset(world);
        tables.reset(world);
        let mut host = world.host();
        host.settings = settings;
        let (reasons, traffic) = (kernel.reasons(), kernel.traffic());
        let arrival = Arrival { interface: INTERFACE, now };
        Self { kernel, tables, host, world, family, arrival, reasons, traffic }
    }

    /// Lets an event happen to both sides; for a packet, what became of it.
    fn apply(&mut self, event: &Event) -> Result<Option<(Action, Vec<u8>)>, String> {
        match event {
            Event::Packet(bytes) => match self.world.hook {
                Hook::Xdp => self.packet::<false>(bytes).map(Some),
                Hook::Tc => self.packet::<true>(bytes).map(Some),
            },
            Event::Backend(number, state) => {
                self.change(*number, state);
                Ok(None)
            }
            Event::Settle(number) => {
                let hold = &self.host.holds[*number as usize];
                hold.settled.store(hold.captured.load(Relaxed), Relaxed);
                self.kernel.set_hold(*number, hold);
                Ok(None)
            }
        }
    }

    fn change(&mut self, number: u32, state: &BackendState) {
        self.host.backends[number as usize] = self.world.backend(number, state);
        self.kernel.set_backend(self.world, number, state);
    }

    fn packet<const PARTIAL: bool>(&mut self, bytes: &[u8]) -> Result<(Action, Vec<u8>), String> {
        let mut traced = Traced::<PARTIAL> { frame: Frame(bytes.to_vec()), samples: Vec::new() };
        let ours = bytes[12..14] == F::ETHER_TYPE.to_be_bytes();
        let action = if ours {
            process(self.family, &mut traced, &self.host, self.arrival)
        } else {
            self.host.count(Reason::NotIp);
            Action::Pass
        };
        let expected = traced.frame.0;
        let (verdict, after) = self.kernel.run(self.world.hook, bytes);
        if verdict != code(self.world.hook, action) {
            return Err(format!("the kernel says {verdict} where the host says {action:?}"));
        }
        if after != expected {
            return Err(format!(
                "bytes differ after {action:?}:\nkernel {after:02x?}\nhost   {expected:02x?}"
            ));
        }
        self.compare_capture::<PARTIAL>(action, &expected)?;
        for sample in traced.samples {
            let kernels = self.kernel.sampled();
            if kernels.as_ref() != Some(&sample) {
                return Err(format!("samples differ: kernel {kernels:02x?}, host {sample:02x?}"));
            }
        }
        match self.kernel.sampled() {
            Some(sample) => Err(format!("the kernel alone took the sample {sample:02x?}")),
            None => Ok((action, expected)),
        }
    }

    fn compare_capture<const PARTIAL: bool>(
        &mut self,
        action: Action,
        expected: &[u8],
    ) -> Result<(), String> {
        let fits = PARTIAL || expected.len() <= CAPTURE_LARGE - size_of::<CaptureHead>();
        let captured = match action {
            Action::Capture { backend, .. } if fits => {
                self.host.capture(backend);
                Some((backend, expected.to_vec()))
            }
            Action::Capture { backend, .. } => {
                self.host.count(Reason::HoldRefused);
                Tables::<W>::refuse(&self.host, backend);
                None
            }
            _ => None,
        };
        let kernels = self.kernel.captured();
        if kernels == captured {
            Ok(())
        } else {
            Err(format!("captures differ: {kernels:02x?} and {captured:02x?}"))
        }
    }

    /// Compares what has gathered.
    fn end(self) -> Result<Passed, String> {
        let after = self.kernel.reasons();
        let counted: Vec<u64> =
            after.iter().zip(&self.reasons).map(|(after, before)| after - before).collect();
        for (reason, kernels) in Reason::ALL.iter().zip(&counted) {
            let hosts = self.host.counted(*reason);
            if *kernels != hosts {
                return Err(format!(
                    "{reason:?} was counted {kernels} times in the kernel, {hosts} on the host"
                ));
            }
        }
        let traffic = self.kernel.traffic();
        for number in 0..BACKENDS {
            let kernels = self.kernel.hold(number);
            let hosts = &self.host.holds[number as usize];
            if plain(&kernels) != plain(hosts) {
                return Err(format!("holds of backend {number} differ: {kernels:?} and {hosts:?}"));
            }
            let (after, before) = (traffic[number as usize], self.traffic[number as usize]);
            let kernels: [u64; 6] = std::array::from_fn(|i| after[i] - before[i]);
            let hosts = numbers(&self.host.traffic(number));
            if kernels != hosts {
                return Err(format!("traffic of member {number} differs: {kernels:?} and {hosts:?}"));
            }
        }
        let kernels = self.tables.flows();
        let hosts = [self.host.flows(), self.host.newcomers()]
            .map(|all| all.into_iter().map(|(key, flow)| (key, text(flow))).collect::<FlowTexts<W>>());
        for (what, kernels, hosts) in
            [("flows", &kernels[0], &hosts[0]), ("newcomers", &kernels[1], &hosts[1])]
        {
            if kernels != hosts {
                return Err(format!("{what} differ: {}", differences(kernels, hosts)));
            }
        }
        Ok(Passed { reasons: counted, flows: hosts.map(|flows| flows.len()) })
    }
}

fn plain(hold: &HoldCounters) -> [u64; 3] {
    [&hold.captured, &hold.settled, &hold.refused].map(|counter| counter.load(Relaxed))
}

fn differences<const W: usize>(kernels: &FlowTexts<W>, hosts: &FlowTexts<W>) -> String {
    let keys = kernels.keys().chain(hosts.keys());
    let differing = keys.filter(|key| kernels.get(key) != hosts.get(key)).take(5);
    let lines = differing
        .map(|key| format!("\n{key:x?}\n  kernel {:?}\n  host   {:?}", kernels.get(key), hosts.get(key)));
    lines.collect()
}

/// What a hook answers for an action.
fn code(hook: Hook, action: Action) -> i32 {
    match (hook, action) {
        (Hook::Xdp, Action::Drop | Action::Capture { .. }) => 1,
        (Hook::Xdp, Action::Pass) => 2,
        (Hook::Xdp, Action::Transmit { interface: INTERFACE }) => 3,
        (Hook::Xdp, Action::Transmit { .. }) => 4,
        (Hook::Tc, Action::Drop | Action::Capture { .. }) => 2,
        (Hook::Tc, Action::Pass) => -1,
        (Hook::Tc, Action::Transmit { .. }) => 7,
    }
}
