//! What a datapath shows of its inside: flows, tables, samples of packets.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::str::FromStr;
use std::time::Duration;

use lb_core::Mode;
use tokio::sync::mpsc::Receiver;

use super::{BackendNumber, DatapathError, Protocol, Traffic};
use crate::capture::stream::Sample;
use crate::config::FlowTimes;

/// The part of a datapath that is for looking at. Calls that walk tables block for up to seconds.
pub trait Observe: Send + Sync + 'static {
    /// Changes how long flows may be idle.
    fn set_flow_times(&self, times: FlowTimes);

    /// The flows that a filter lets through. Walks whole tables: not for a thread that others wait for.
    fn flows(&self, filter: &FlowFilter) -> Result<FlowList, DatapathError>;

    /// How full the flow tables are, and what became of flows.
    fn flow_tables(&self) -> FlowTables;

    /// What was carried for each backend of each service, since the tables were made.
    fn members(&self) -> Vec<Member>;

    /// Copies of packets at their verdict, one in so many, until the receiver is dropped.
    fn sample(&self, one_in: NonZeroU32) -> Receiver<Sample>;

    /// Samples that nobody got since the daemon started: the ring was full, or a listener too slow.
    fn lost_samples(&self) -> u64;
}

/// A backend as one service uses it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The service's name.
    pub service: String,
    /// The backend's name.
    pub backend: String,
    /// Packets and bytes.
    pub traffic: Traffic,
    /// New flows.
    pub opened: u64,
    /// TCP resets from the backend.
    pub resets: u64,
}

/// A network of clients, such as `198.51.100.0/24` or a single address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    length: u8,
}

impl Network {
    /// Whether the address is in it.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address) {
            (IpAddr::V4(network), IpAddr::V4(address)) => {
                let different = u32::from(network) ^ u32::from(address);
                different.checked_shr(32 - u32::from(self.length)).unwrap_or(0) == 0
            }
            (IpAddr::V6(network), IpAddr::V6(address)) => {
                let different = u128::from(network) ^ u128::from(address);
                different.checked_shr(128 - u32::from(self.length)).unwrap_or(0) == 0
            }
            _ => false,
        }
    }
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is neither an address nor a prefix such as 198.51.100.0/24");
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let bits = if address.is_ipv4() { 32 } else { 128 };
        let length = match length {
            None => bits,
            Some(length) => length.parse().ok().filter(|length| *length <= bits).ok_or_else(wrong)?,
        };
        Ok(Self { address, length })
    }
}

/// Which flows are wanted: those that everything given holds for.
#[derive(Clone, Debug)]
pub struct FlowFilter {
    /// Clients of this network.
    pub client: Option<Network>,
    /// To this virtual address over this protocol.
    pub service: Option<(SocketAddr, Protocol)>,
    /// Of this backend.
    pub backend: Option<BackendNumber>,
    /// Over this protocol.
    pub protocol: Option<Protocol>,
    /// At most so many.
    pub limit: usize,
}

/// Flows, in no order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowList {
    /// The flows.
    pub flows: Vec<FlowRow>,
    /// There are more than the limit.
    pub is_cut: bool,
}

/// A flow as its entries show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowRow {
    /// Transport protocol.
    pub protocol: Protocol,
    /// The client's address and port.
    pub client: SocketAddr,
    /// The virtual address and port that it sends to.
    pub service: SocketAddr,
    /// The backend that it stays with.
    pub backend: BackendNumber,
    /// What is done to its packets.
    pub mode: Mode,
    /// The source that the backend sees.
    pub source: SocketAddr,
    /// How far it has come.
    pub state: FlowState,
    /// Since when nothing came.
    pub idle: Duration,
}

/// How far a flow has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FlowState {
    /// The client has not confirmed an answer.
    New,
    /// Packets went both ways.
    Established,
    /// One end has finished sending.
    HalfClosed,
    /// Both have.
    Closed,
    /// One end has reset it.
    Reset,
}

impl FlowState {
    /// Its name in the admin API.
    pub fn label(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Established => "established",
            Self::HalfClosed => "half_closed",
            Self::Closed => "closed",
            Self::Reset => "reset",
        }
    }
}

/// How full the flow tables are, and what became of flows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowTables {
    /// Each table.
    pub tables: Vec<FlowTable>,
    /// Flows removed since the daemon started, by cause.
    pub removed: Vec<(&'static str, u64)>,
    /// How long the last look at every entry took; `None` before the first one has ended.
    pub pass: Option<Duration>,
}

/// One of the flow tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowTable {
    /// `ipv4` or `ipv6`.
    pub family: &'static str,
    /// `established` or `newcomers`.
    pub standing: &'static str,
    /// TCP flows when it was last looked at.
    pub tcp_flows: u64,
    /// Flows of other protocols then.
    pub other_flows: u64,
    /// Entries then; most flows have two.
    pub entries: u64,
    /// Entries that it has room for.
    pub most: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks() {
        let network = |text: &str| text.parse::<Network>().unwrap();
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        for (text, inside, outside) in [
            ("198.51.100.0/24", "198.51.100.255", "198.51.101.0"),
            ("198.51.100.7/24", "198.51.100.1", "198.51.99.255"),
            ("198.51.100.7", "198.51.100.7", "198.51.100.6"),
            ("198.51.100.7/32", "198.51.100.7", "198.51.100.6"),
            ("0.0.0.0/0", "203.0.113.1", "2001:db8::1"),
            ("2001:db8::/32", "2001:db8:ffff::1", "2001:db9::"),
            ("2001:db8::1", "2001:db8::1", "2001:db8::2"),
            ("::/0", "2001:db8::1", "203.0.113.1"),
        ] {
            assert!(network(text).contains(ip(inside)), "{text} {inside}");
            assert!(!network(text).contains(ip(outside)), "{text} {outside}");
        }
        for wrong in ["", "198.51.100.0/33", "198.51.100/24", "::/129", "a/1", "::/", "1.2.3.4/-1"] {
            assert!(wrong.parse::<Network>().is_err(), "{wrong}");
        }
    }
}
