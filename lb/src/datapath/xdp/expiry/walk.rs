//! Looks at every entry of the flow tables and deletes what is over.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Acquire};
use std::thread;
use std::time::{Duration, Instant};

use lb_core::decide::TCP;
use lb_core::flow::State;
use lb_core::{Direction, Flow, FlowKey, Mode};

use super::verdict::{
    Cause, Half, Halves, Limits, Standing, Subject, Ticks, Transport, Verdict, idle, is_fresh, verdict,
};
use crate::datapath::observe::{FlowTable, FlowTables};
use crate::datapath::xdp::flows::{FlowMap, FlowMaps, half, partner};
use crate::datapath::xdp::ticks::TickClock;

/// Entries read with one system call: a third of a millisecond.
const CHUNK: usize = 1024;
/// What looking up a flow costs beside passing over an entry.
const LOOK_UP_COST: usize = 8;
/// Whether an entry has lost its partner takes a look-up, so each pass asks it of one entry in so many.
const TURNS: u32 = 16;

/// Spreads work over time.
pub(super) struct Pace {
    per_second: f64,
    stopping: Arc<AtomicBool>,
}

impl Pace {
    pub(super) fn new(per_second: f64, stopping: Arc<AtomicBool>) -> Self {
        Self { per_second, stopping }
    }

    /// Waits as long as so much work may take; false when the thread is to end.
    fn spend(&self, work: usize) -> bool {
        self.pause(Duration::from_secs_f64(work as f64 / self.per_second));
        !self.stopping.load(Acquire)
    }

    /// Waits, or until the thread is to end.
    pub(super) fn pause(&self, time: Duration) {
        let end = Instant::now() + time;
        while !self.stopping.load(Acquire) {
            match end.checked_duration_since(Instant::now()) {
                Some(left) if !left.is_zero() => thread::park_timeout(left),
                _ => return,
            }
        }
    }
}

/// Walks the flow tables.
pub(super) struct Walker {
    maps: Arc<FlowMaps>,
    clock: Arc<TickClock>,
    /// The backends' incarnations when the pass began, by number.
    incarnations: Vec<u32>,
    /// Which entries this pass looks up the partners of.
    turn: u32,
    removed: BTreeMap<Cause, u64>,
    counts: [Count; 4],
}

/// What a table had.
#[derive(Clone, Copy, Default)]
struct Count {
    tcp: u64,
    other: u64,
    entries: u64,
}

/// What one pass goes by.
struct Rules<'a> {
    limits: &'a Limits,
    now: Ticks,
}

/// A flow that goes: its entry towards the backend, and the one towards the client, where they are there.
type Doomed<const W: usize> = (Option<FlowKey<W>>, Option<FlowKey<W>>);

impl Walker {
    pub(super) fn new(maps: Arc<FlowMaps>, clock: Arc<TickClock>) -> Self {
        let removed = Cause::ALL.into_iter().map(|cause| (cause, 0)).collect();
        Self { maps, clock, incarnations: Vec::new(), turn: 0, removed, counts: Default::default() }
    }

    /// Looks at every entry once; false when the thread is to end.
    pub(super) fn pass(&mut self, limits: &Limits, pace: &Pace) -> io::Result<bool> {
        self.turn = (self.turn + 1) % TURNS;
        self.read_incarnations()?;
        let maps = self.maps.clone();
        let mut rules = Rules { limits, now: Ticks(0) };
        let rules = &mut rules;
        Ok(self.walk(0, &maps.v4.established, Standing::Established, rules, pace)?
            && self.walk(1, &maps.v4.newcomers, Standing::Newcomer, rules, pace)?
            && self.walk(2, &maps.v6.established, Standing::Established, rules, pace)?
            && self.walk(3, &maps.v6.newcomers, Standing::Newcomer, rules, pace)?)
    }

    fn read_incarnations(&mut self) -> io::Result<()> {
        self.incarnations.clear();
        let mut chunks = self.maps.backends.chunks(CHUNK);
        while let Some(chunk) = chunks.next_chunk()? {
            self.incarnations.extend(chunk.map(|(_, backend)| backend.incarnation));
        }
        Ok(())
    }

    fn walk<const W: usize>(
        &mut self,
        table: usize,
        map: &FlowMap<W>,
        standing: Standing,
        rules: &mut Rules<'_>,
        pace: &Pace,
    ) -> io::Result<bool> {
        let mut count = Count::default();
        let mut chunks = map.chunks(CHUNK);
        loop {
            rules.now = Ticks(self.clock.now()?);
            let Some(chunk) = chunks.next_chunk()? else { break };
            let mut work = chunk.len();
            let mut doomed: BTreeMap<Doomed<W>, Cause> = BTreeMap::new();
            for (key, flow) in chunk {
                count.entries += 1;
                if flow.kind.direction() == Direction::ToBackend {
                    let transport = transport(key);
                    *if transport == Transport::Tcp { &mut count.tcp } else { &mut count.other } += 1;
                }
                if self.is_suspect(key, flow, standing, rules) {
                    work += LOOK_UP_COST;
                    doomed.extend(self.judge(map, key, standing, rules)?);
                }
            }
            self.delete(map, doomed)?;
            if !pace.spend(work) {
                return Ok(false);
            }
        }
        self.counts[table] = count;
        Ok(true)
    }

    /// Whether the flow of an entry has to be looked at as a whole.
    fn is_suspect<const W: usize>(
        &self,
        key: &FlowKey<W>,
        flow: &Flow<W>,
        standing: Standing,
        rules: &Rules<'_>,
    ) -> bool {
        let half = half(flow);
        let is_void = self.incarnations.get(flow.backend as usize) != Some(&flow.incarnation);
        let may_be_orphan = turn(key) == self.turn && idle(half.seen, rules.now) >= rules.limits.orphan;
        is_void || may_be_orphan || !is_fresh(transport(key), standing, &half, rules.now, rules.limits)
    }

    /// Reads the flow of an entry again, both entries and its backend, and decides.
    fn judge<const W: usize>(
        &self,
        map: &FlowMap<W>,
        key: &FlowKey<W>,
        standing: Standing,
        rules: &Rules<'_>,
    ) -> io::Result<Option<(Doomed<W>, Cause)>> {
        let Some(flow) = map.get(key)? else { return Ok(None) };
        let backend = self.maps.backends.get(&flow.backend)?;
        let void = backend.is_none_or(|backend| backend.incarnation != flow.incarnation);
        let is_forward = flow.kind.direction() == Direction::ToBackend;
        // What the daemon made (a health check's) may have one entry only.
        let is_one_way = flow.kind.mode() == Mode::Dsr || flow.state().has(State::PINNED);
        let other = partner(map, key, &flow)?;
        let (halves, entries) = match &other {
            Some((other, found)) => both((key, half(&flow)), (other, half(found)), is_forward),
            None if is_one_way => (Halves::OneWay(half(&flow)), single(key, is_forward)),
            None => (Halves::Orphan(half(&flow)), single(key, is_forward)),
        };
        let subject = Subject { transport: transport(key), standing, halves, void };
        // The look at the clock is older than the entries: what has come since counts as now.
        Ok(match verdict(&subject, rules.now, rules.limits) {
            Verdict::Remove(cause) => Some((entries, cause)),
            Verdict::Keep => None,
        })
    }

    fn delete<const W: usize>(
        &mut self,
        map: &FlowMap<W>,
        doomed: BTreeMap<Doomed<W>, Cause>,
    ) -> io::Result<()> {
        let forwards: Vec<_> = doomed.keys().filter_map(|(forward, _)| *forward).collect();
        let replies: Vec<_> = doomed.keys().filter_map(|(_, reply)| *reply).collect();
        map.delete(&forwards)?;
        map.delete(&replies)?;
        for cause in doomed.into_values() {
            *self.removed.entry(cause).or_default() += 1;
        }
        Ok(())
    }

    /// What the last whole pass found, which took so long.
    pub(super) fn report(&self, pass: Duration) -> FlowTables {
        let FlowMaps { v4, v6, .. } = &*self.maps;
        let most = [v4.established.most(), v4.newcomers.most(), v6.established.most(), v6.newcomers.most()];
        let names =
            [("ipv4", "established"), ("ipv4", "newcomers"), ("ipv6", "established"), ("ipv6", "newcomers")];
        let tables =
            names.into_iter().zip(most).zip(self.counts).map(|(((family, standing), most), count)| {
                FlowTable {
                    family,
                    standing,
                    tcp_flows: count.tcp,
                    other_flows: count.other,
                    entries: count.entries,
                    most: most.into(),
                }
            });
        let removed = self.removed.iter().map(|(cause, count)| (cause.label(), *count)).collect();
        FlowTables { tables: tables.collect(), removed, pass: Some(pass) }
    }
}

fn both<const W: usize>(
    this: (&FlowKey<W>, Half),
    other: (&FlowKey<W>, Half),
    is_forward: bool,
) -> (Halves, Doomed<W>) {
    let (forward, reply) = if is_forward { (this, other) } else { (other, this) };
    (Halves::Both { forward: forward.1, reply: reply.1 }, (Some(*forward.0), Some(*reply.0)))
}

fn single<const W: usize>(key: &FlowKey<W>, is_forward: bool) -> Doomed<W> {
    if is_forward { (Some(*key), None) } else { (None, Some(*key)) }
}

/// In which pass of so many an entry's partner is looked up.
fn turn<const W: usize>(key: &FlowKey<W>) -> u32 {
    let [a, b, c, d] = key.ports.to_ne_bytes();
    u32::from(a ^ b ^ c ^ d) % TURNS
}

fn transport<const W: usize>(key: &FlowKey<W>) -> Transport {
    if key.protocol == u32::from(TCP) { Transport::Tcp } else { Transport::Other }
}

#[cfg(test)]
#[path = "walk_tests.rs"]
mod with_root;
