//! Sections `[limits]` and `[flows]`.

use std::time::Duration;

use super::super::error::Collector;
use super::super::limits::{FlowTimes, Limits};
use super::super::raw::{self, Number};
use super::bounded;

/// A day: no table has to remember longer.
const LONGEST_IDLE_S: u64 = 86_400;

pub(super) fn limits(raw: &raw::Limits, errors: &mut Collector) -> Limits {
    let default = Limits::default();
    let mut number = |field: &Number, least: u32, most: u32, default: u32| {
        let number = bounded(field, least.into()..=most.into(), default.into(), errors);
        u32::try_from(number).expect("bounded to 32 bits")
    };
    let flows = number(&raw.flows, 1024, 1 << 26, default.flows);
    let backends = number(&raw.backends, 1, 1 << 20, default.backends);
    Limits {
        flows,
        newcomers: number(&raw.newcomers, 1024, 1 << 26, default.newcomers),
        services: number(&raw.services, 1, 65_536, default.services),
        backends,
        members: number(&raw.members, 1, 1 << 21, backends.saturating_mul(2)),
        sites: number(&raw.sites, 1, 65_536, default.sites),
        new_flows_per_second_per_cpu: number(
            &raw.new_flows_per_second_per_cpu,
            1,
            u32::MAX,
            default.new_flows_per_second_per_cpu,
        ),
        new_flows_per_second_per_prefix: number(
            &raw.new_flows_per_second_per_prefix,
            1,
            u32::MAX,
            default.new_flows_per_second_per_prefix,
        ),
    }
}

pub(super) fn flow_times(raw: &raw::Flows, errors: &mut Collector) -> FlowTimes {
    let default = FlowTimes::default();
    let mut seconds = |field: &Number, default: Duration| {
        Duration::from_secs(bounded(field, 1..=LONGEST_IDLE_S, default.as_secs(), errors))
    };
    FlowTimes {
        tcp_idle: seconds(&raw.tcp_idle_s, default.tcp_idle),
        tcp_half_open: seconds(&raw.tcp_half_open_s, default.tcp_half_open),
        tcp_closing: seconds(&raw.tcp_closing_s, default.tcp_closing),
        udp_idle: seconds(&raw.udp_idle_s, default.udp_idle),
    }
}
