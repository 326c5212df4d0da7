//! What the admin API shows of a backend.

use tokio::time::Instant;

use lb_core::Gate;
use serde::{Deserialize, Serialize};

use super::{Control, ControlError, Entry, State, Table};
use crate::datapath::{HoldStats, Traffic};
use crate::health::CheckView;

/// A backend as the admin API shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendView {
    /// Name.
    pub name: String,
    /// What its sockets are bound to.
    pub address: std::net::SocketAddr,
    /// The site where it runs; `null` for one that the configuration no longer has.
    pub location: Option<String>,
    /// `forward`, `hold_new`, `hold`, `drop` or `replay`.
    pub gate: String,
    /// `forward`, `holding_new`, `holding`, `expired` or `replaying`.
    pub state: String,
    /// Grows with each change of the gate or the location.
    pub generation: u32,
    /// Milliseconds until the hold gives up; `null` where nothing is held.
    pub deadline_in_ms: Option<u64>,
    /// Whether it gets no new flows by somebody's wish.
    pub drained: bool,
    /// Whether it gets no new flows because its health checks fail.
    pub down: bool,
    /// What the current or last hold has kept and lost.
    pub hold: HoldView,
    /// What was carried.
    pub traffic: TrafficView,
    /// What its health checks have found out.
    pub checks: Vec<CheckView>,
}

/// What one hold has kept and lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldView {
    /// Packets put into the queue.
    pub held_packets: u64,
    /// Their bytes.
    pub held_bytes: u64,
    /// Packets sent from the queue.
    pub replayed_packets: u64,
    /// Packets dropped: by overflow, age, the `drop` gate, or a full capture ring.
    pub dropped_packets: u64,
}

impl From<HoldStats> for HoldView {
    fn from(stats: HoldStats) -> Self {
        let HoldStats { held_packets, held_bytes, replayed_packets, dropped_packets } = stats;
        Self { held_packets, held_bytes, replayed_packets, dropped_packets }
    }
}

/// Packets and bytes of a backend, both directions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrafficView {
    /// Packets from clients.
    pub to_backend_packets: u64,
    /// Bytes of those, with link headers.
    pub to_backend_bytes: u64,
    /// Packets from the backend.
    pub to_clients_packets: u64,
    /// Bytes of those, with link headers.
    pub to_clients_bytes: u64,
}

impl From<Traffic> for TrafficView {
    fn from(traffic: Traffic) -> Self {
        let Traffic { to_backend_packets, to_backend_bytes, to_clients_packets, to_clients_bytes, .. } =
            traffic;
        Self { to_backend_packets, to_backend_bytes, to_clients_packets, to_clients_bytes }
    }
}

/// A gate's name in the admin API.
pub(crate) fn gate_label(gate: Gate) -> &'static str {
    match gate {
        Gate::Drop => "drop",
        Gate::Forward => "forward",
        Gate::Hold => "hold",
        Gate::HoldNew => "hold_new",
        Gate::Replay => "replay",
    }
}

impl Control {
    /// One backend as it is now.
    pub fn view(&self, backend: &str) -> Result<BackendView, ControlError> {
        Ok(self.view_of(&self.table(), &*self.entry(backend)?))
    }

    /// All backends as they are now, by name.
    pub fn views(&self) -> Vec<BackendView> {
        let table = self.table();
        table.entries.values().map(|entry| self.view_of(&table, entry)).collect()
    }

    fn view_of(&self, table: &Table, entry: &Entry) -> BackendView {
        let standing = self.standing(&entry.name).ok();
        let (word, state, location) = {
            let machine = entry.machine();
            (machine.word(), machine.state(), machine.location())
        };
        let deadline_in_ms = match state {
            State::HoldingNew { deadline } | State::Holding { deadline, .. } => {
                let left = deadline.saturating_duration_since(Instant::now());
                Some(u64::try_from(left.as_millis()).unwrap_or(u64::MAX))
            }
            State::Forward | State::Expired { .. } | State::Replaying => None,
        };
        BackendView {
            name: entry.name.clone(),
            address: entry.address,
            location: table.site_name(location),
            gate: gate_label(word.gate()).to_owned(),
            state: state.label().to_owned(),
            generation: word.generation(),
            deadline_in_ms,
            drained: standing.is_some_and(|standing| standing.is_drained()),
            down: standing.is_some_and(|standing| !standing.is_up()),
            hold: self.datapath.hold_stats(entry.number).into(),
            traffic: self.datapath.traffic(entry.number).into(),
            checks: Vec::new(),
        }
    }
}
