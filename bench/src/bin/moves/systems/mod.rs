//! Who moves the server: how each one's place is set up, and one move.

mod by_hand;
mod drover;
mod host;

use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::time::Duration;

use bench::interrupt::Interrupt;
use bench::moves::case::Case;
use bench::moves::goals::{DROVER_POST, DROVER_PRE, SCRIPT};
use lab::link::{QueueLimit, Spec, WaySpec};
use lab::stack::Memory;
use lab::{Lab, Site, address};

/// The server's port, at its own address and at the virtual one.
const PORT: u16 = 7000;
/// What every system's images may wait in, at least; as a small router has.
const QUEUE_BYTES: u64 = 256 * 1024;

/// Who moves the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum System {
    /// The load balancer and its agents; the memory goes with the images.
    DroverPre,
    /// The same; most of the memory goes after the restore.
    DroverPost,
    /// CRIU, a copy and a route, by a script.
    Script,
    /// `runc checkpoint`, a copy, `runc restore` and a route, by the same script.
    Runc,
}

/// What a move took, as whoever moved the server tells it.
#[derive(Debug)]
pub struct Moved {
    /// From the order to its end.
    pub total: Duration,
    /// Its parts in their order, in milliseconds.
    pub phases_ms: Vec<(String, f64)>,
    /// How long some of the memory was only where the server came from, in milliseconds.
    pub exposed_ms: f64,
}

/// A lab in which a server runs that one system moves.
pub trait Place {
    /// The lab.
    fn lab(&self) -> &Lab;

    /// Where clients connect.
    fn target(&self) -> SocketAddr;

    /// Where the server is.
    fn site(&self) -> Site;

    /// Moves it to the other site.
    fn move_over(&mut self, interrupt: &Interrupt) -> anyhow::Result<Moved>;
}

impl System {
    /// All, in the order of the report.
    pub const ALL: [System; 4] = [System::DroverPre, System::DroverPost, System::Script, System::Runc];

    /// As in the report and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            System::DroverPre => DROVER_PRE,
            System::DroverPost => DROVER_POST,
            System::Script => SCRIPT,
            System::Runc => "runc",
        }
    }

    /// The system of this name.
    pub fn find(name: &str) -> Option<System> {
        Self::ALL.into_iter().find(|system| system.name() == name)
    }

    /// How it moves the server, for the report.
    pub fn describe(self) -> String {
        match self {
            System::DroverPre => drover::describe(Memory::Pre),
            System::DroverPost => drover::describe(Memory::Post),
            System::Script | System::Runc => by_hand::SCRIPT.to_owned(),
        }
    }

    /// Why it cannot be measured here, if so.
    pub fn missing(self) -> Option<String> {
        let programs: &[(&str, &str)] = match self {
            System::DroverPre | System::DroverPost => &[],
            System::Script => &[("nc", "netcat-openbsd")],
            System::Runc => &[("nc", "netcat-openbsd"), ("runc", "runc")],
        };
        let absent = programs.iter().find(|(program, _)| by_hand::find(program).is_none());
        absent.map(|(program, package)| {
            format!("{program} is not installed (package {package}; `cargo xtask setup --bench` installs it)")
        })
    }

    /// Makes a lab with the server in it, at the first site.
    pub fn set_up(self, case: &Case) -> anyhow::Result<Box<dyn Place>> {
        Ok(match self {
            System::DroverPre => Box::new(drover::Placed::new(case, Memory::Pre)?),
            System::DroverPost => Box::new(drover::Placed::new(case, Memory::Post)?),
            System::Script => Box::new(by_hand::ByHand::new(by_hand::Tool::Criu, case)?),
            System::Runc => Box::new(by_hand::ByHand::new(by_hand::Tool::Runc, case)?),
        })
    }
}

/// The server's own address.
fn server_address() -> SocketAddr {
    SocketAddr::from((address::backend4(1), PORT))
}

/// The server's arguments, without its program.
fn server_arguments(case: &Case) -> Vec<String> {
    let (listen, size, dirty) =
        (server_address().to_string(), case.resident_mb.to_string(), case.dirty_pct.to_string());
    ["serve", "--listen", &listen, "--resident-mb", &size, "--dirty-pct", &dirty].map(str::to_owned).to_vec()
}

/// This program, which is also the server's.
fn own_program() -> std::io::Result<PathBuf> {
    std::env::current_exe()
}

/// The link between the sites, with a queue that one connection can fill it with. None where nothing is to be emulated:
/// the lab's own link carries more than one in user space, and takes no processor from those who are measured.
fn link(case: &Case) -> Option<Spec> {
    if case.rate_mbit.is_none() && case.delay_ms == 0 {
        return None;
    }
    let rate_bits_per_s = case.rate_mbit.and_then(|rate| NonZeroU64::new(u64::from(rate) * 1_000_000));
    let delay = Duration::from_millis(case.delay_ms.into());
    let round_trip_bytes =
        rate_bits_per_s.map_or(0, |rate| (rate.get() as f64 / 8.0 * 2.0 * delay.as_secs_f64()) as u64);
    let queue = QueueLimit::Bytes(round_trip_bytes.max(QUEUE_BYTES));
    Some(Spec::symmetric(WaySpec { delay, rate_bits_per_s, queue, ..WaySpec::default() }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bench::moves::case::SMALL;

    #[test]
    fn every_system_is_found_by_its_name() {
        for system in System::ALL {
            assert_eq!(System::find(system.name()), Some(system));
        }
        assert_eq!(System::find("vmotion"), None);
    }

    #[test]
    fn the_link_is_as_the_case_says() {
        assert_eq!(link(&SMALL), None);
        let spec = link(&Case { delay_ms: 40, rate_mbit: Some(100), ..SMALL }).unwrap();
        let way = spec.way(lab::link::Way::BToA);
        assert_eq!(
            (way.delay.as_millis(), way.rate_bits_per_s.map(NonZeroU64::get)),
            (40, Some(100_000_000))
        );
        assert_eq!(way.queue, QueueLimit::Bytes(1_000_000));
    }
}
