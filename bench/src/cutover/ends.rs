//! The two ends: what sends clients' datagrams, and what a site does with them.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context, Result};
use aya::maps::{Array, MapData};
use aya::programs::{Xdp, XdpMode};
use aya::{Ebpf, TestRun, TestRunAttrs, TestRunOptions, include_bytes_aligned};
use lab::Namespace;
use lb_core::host::{FrameBuilder, Segment};

static OBJECT: &[u8] = include_bytes_aligned!(env!("DROVER_EBPF_OBJECT"));

/// Port of the backends, known to the site's program.
pub const BACKEND_PORT: u16 = 7000;
/// Port of the service.
pub const SERVICE_PORT: u16 = 7100;

/// Link, IPv4 and UDP header, and a number.
const DATAGRAM: usize = 50;
/// The program's `Injection`.
type Injection = [u8; 80];
/// The program's `Arrivals`.
type ArrivalWords = [u64; 5];

/// Frames that the kernel sends at once, so that the receiver's queue, of 256, never overflows.
const BATCH: u32 = 32;

/// Sends datagrams of many clients out of the client's interface.
pub struct Injector {
    ebpf: Ebpf,
    injection: Array<MapData, Injection>,
    template: Vec<u8>,
    interface: u32,
}

impl Injector {
    /// In the client's namespace, towards the load balancer's hardware address.
    pub fn load(interface: u32, link: ([u8; 6], [u8; 6]), service: Ipv4Addr) -> Result<Self> {
        let mut ebpf = Ebpf::load(OBJECT).context("cannot load the injector")?;
        program(&mut ebpf, "inject")?.load()?;
        let injection = ebpf.take_map("INJECTION").context("the injector has no INJECTION")?.try_into()?;
        let template = FrameBuilder {
            link,
            source: (Ipv4Addr::new(10, 64, 0, 0), 0x4000).into(),
            destination: (service, SERVICE_PORT).into(),
            ttl: 64,
            segment: Segment::Udp { checksum: false },
            payload: vec![0; 8],
        };
        let mut template = template.build().0;
        // The program gives each client's identification the value that keeps this checksum true.
        let replaced = lb_core::checksum::fold(u64::from(!1_u16) + 0xffff);
        let checksum = lb_core::checksum::update(u16::from_be_bytes([template[24], template[25]]), replaced);
        template[24..26].copy_from_slice(&checksum.to_be_bytes());
        Ok(Self { ebpf, injection, template, interface })
    }

    /// Sends so many datagrams of so many clients in turn, beginning with client `first`; numbered from `number` on
    /// unless that is 0. Must run in the client's namespace.
    pub fn send(&mut self, datagrams: u32, clients: u32, first: u64, number: u64) -> Result<()> {
        let mut injection: Injection = [0; 80];
        injection[..DATAGRAM].copy_from_slice(&self.template);
        injection[56..60].copy_from_slice(&self.interface.to_ne_bytes());
        injection[60..64].copy_from_slice(&(clients - 1).to_ne_bytes());
        injection[64..72].copy_from_slice(&first.to_ne_bytes());
        injection[72..].copy_from_slice(&number.to_ne_bytes());
        self.injection.set(0, injection, 0)?;
        let options = TestRunOptions {
            data_in: Some(&self.template),
            repeat: datagrams,
            attrs: TestRunAttrs::new().xdp_live_frames(BATCH),
            ..TestRunOptions::new()
        };
        program(&mut self.ebpf, "inject")?.test_run(options).context("cannot send live frames")?;
        Ok(())
    }
}

/// What came to a site.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrivals {
    /// Numbered datagrams.
    pub count: u64,
    /// Those that came after a later one.
    pub disordered: u64,
    /// From the first to the last.
    pub took: Duration,
}

/// The program at a site's interface.
pub struct SiteEnd {
    arrivals: Array<MapData, ArrivalWords>,
    /// Detaches the program when it goes.
    _ebpf: Ebpf,
}

impl SiteEnd {
    /// Attaches to the site's interface.
    pub fn attach(site: &Namespace) -> Result<Self> {
        let mut ebpf = Ebpf::load(OBJECT).context("cannot load the site's end")?;
        let arrivals = ebpf.take_map("ARRIVALS").context("the site's end has no ARRIVALS")?.try_into()?;
        let program = program(&mut ebpf, "site")?;
        program.load()?;
        site.run(|| program.attach("eth0", XdpMode::Driver)).context("cannot attach the site's end")?;
        Ok(Self { arrivals, _ebpf: ebpf })
    }

    /// What has arrived.
    pub fn arrivals(&self) -> Result<Arrivals> {
        let [count, disordered, _, first_ns, last_ns] = self.arrivals.get(&0, 0)?;
        Ok(Arrivals { count, disordered, took: Duration::from_nanos(last_ns - first_ns) })
    }

    /// Counts from zero.
    pub fn reset(&mut self) -> Result<()> {
        Ok(self.arrivals.set(0, [0; 5], 0)?)
    }
}

fn program<'e>(ebpf: &'e mut Ebpf, name: &str) -> Result<&'e mut Xdp> {
    let found = ebpf.program_mut(name).with_context(|| format!("the object has no program {name}"))?;
    Ok(found.try_into()?)
}
