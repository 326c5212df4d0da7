//! Holds, flips and replays, with more and more flows in the tables.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use lb::datapath::{Datapath, Event};
use lb_core::Gate;

use super::report::{CaseReport, Report};
use super::subject::{LIMITS, Subject};

/// How much is measured.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Flows in the tables, a case each; powers of two.
    pub flows: Vec<u32>,
    /// Flips of each case.
    pub flips: u32,
    /// Packets that are held and replayed at once.
    pub held: u32,
    /// Such replays of each case; the median counts.
    pub replays: u32,
}

impl Settings {
    /// For figures that can be quoted.
    pub fn full() -> Self {
        Self { flows: vec![1, 1 << 10, 1 << 17, 1 << 20], flips: 300, held: 100_000, replays: 7 }
    }

    /// For a look whether everything works.
    pub fn quick() -> Self {
        Self { flows: vec![1, 1 << 10], flips: 10, held: 5_000, replays: 1 }
    }
}

/// Packets of light traffic between two flips.
const LIGHT: u32 = 8;

/// Measures everything; `watch` is told what is under way.
pub fn run(settings: &Settings, mut watch: impl FnMut(String)) -> Result<Report> {
    let mut cases = Vec::new();
    for &flows in &settings.flows {
        watch(format!("{flows} flows: establishing"));
        let mut subject = Subject::start(flows)?;
        subject.establish(flows)?;
        let (mut flips, mut firsts, mut rates) = (Vec::new(), Vec::new(), Vec::new());
        for flip in 1..=settings.flips {
            watch(format!("{flows} flows: flip {flip} of {}", settings.flips));
            let (stored, first) = cycle(&mut subject, flows, LIGHT)?;
            flips.push(stored.as_secs_f64() * 1e6);
            firsts.push(first.as_secs_f64() * 1e6);
        }
        for replay in 1..=settings.replays {
            watch(format!("{flows} flows: replay {replay} of {}", settings.replays));
            rates.push(replay_rate(&mut subject, flows, settings.held)?);
        }
        cases.push(CaseReport::new(flows, median(flips), median(firsts), median(rates)));
    }
    Ok(Report { flips: settings.flips, held: settings.held, cases })
}

/// Holds, sends, flips to the other site and waits for the end of the replay: how long the store took, and how long
/// after it the first held packet left.
fn cycle(subject: &mut Subject, flows: u32, packets: u32) -> Result<(Duration, Duration)> {
    let (datapath, backend) = (&subject.datapath, subject.backend);
    let state = datapath.state(backend);
    let other = subject.sites.into_iter().find(|site| *site != state.location());
    datapath.stage(backend, other.unwrap_or(subject.sites[0]))?;
    datapath.begin_hold(backend, LIMITS);
    let held = state.word.with_gate(Gate::Hold);
    datapath.store(backend, held);
    subject.send(packets, flows, 0, 1)?;
    let before = Instant::now();
    subject.datapath.store(backend, held.flipped(Gate::Replay));
    let stored = before.elapsed();
    let first = subject.wait("the first replayed packet", |event| match event {
        Event::ReplayStarted { after, .. } => Some(*after),
        _ => None,
    })?;
    subject.wait("the end of the replay", |event| matches!(event, Event::Replayed { .. }).then_some(()))?;
    let open = subject.datapath.state(backend).word.with_gate(Gate::Forward);
    subject.datapath.store(backend, open);
    Ok((stored, first))
}

/// Packets per second of a replay, as they arrive; every one that was held, in order.
fn replay_rate(subject: &mut Subject, flows: u32, packets: u32) -> Result<f64> {
    for end in &mut subject.ends {
        end.reset()?;
    }
    cycle(subject, flows, packets)?;
    let stats = subject.datapath.hold_stats(subject.backend);
    let target =
        subject.sites.iter().position(|site| *site == subject.datapath.state(subject.backend).location());
    let arrivals = subject.ends[target.unwrap_or(0)].arrivals()?;
    ensure!(stats.dropped_packets == 0, "{} held packets were dropped", stats.dropped_packets);
    ensure!(
        arrivals.count == u64::from(packets) && stats.replayed_packets == u64::from(packets),
        "{packets} packets were sent into the hold, {} were replayed and {} arrived",
        stats.replayed_packets,
        arrivals.count
    );
    ensure!(arrivals.disordered == 0, "{} packets arrived out of order", arrivals.disordered);
    Ok((arrivals.count - 1) as f64 / arrivals.took.as_secs_f64())
}

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied().unwrap_or(0.0)
}
