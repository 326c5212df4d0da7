//! The kernel programs against the same code on the host: every packet goes through both, and verdict, bytes, captures,
//! samples, counters and flows must be equal.
//!
//! Rounds follow each other, each with tables, family and hook drawn from a seed of its own; a difference is shown with
//! its round's seed and the fewest events that bring it about. `cargo xtask fuzz differential` runs more of them:
//! `DROVER_DIFFERENTIAL_SEED`, `_CASES` and `_SECONDS` say where to begin and when to stop.
//!
//! Needs root: the programs are loaded and run with `BPF_PROG_TEST_RUN`.
#![expect(clippy::unwrap_used, reason = "fixtures state what they expect by unwrapping")]

mod generator;
mod kernel;
mod random;
mod round;
mod wire;
mod world;

use std::time::{Duration, Instant};

use lb_core::{Reason, V4, V6};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use self::kernel::Kernel;
use self::random::Random;
use self::world::World;

/// Events in a round: few enough for the tables of newcomers and fragments, which push out in the kernel alone.
const ROUND: u64 = 5000;
/// Without being told otherwise.
const CASES: u64 = 300_000;
const SEED: u64 = 0x5eed_0000;
/// From so many cases on every reason must have been seen.
const ENOUGH: u64 = 250_000;
/// What no packets bring about here: tables that are full.
const UNSEEN: [Reason; 1] = [Reason::NoRoom];

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(format!("DROVER_DIFFERENTIAL_{name}")).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("DROVER_DIFFERENTIAL_{name} is no number: {text}")))
}

/// Budgets of new flows are per CPU, so the process stays on one.
fn stay_on_this_cpu() {
    let all = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let mut usable = (0..CpuSet::count()).filter(|&cpu| all.is_set(cpu).unwrap()).cycle();
    let cpu = usable.nth(number("CPU").unwrap_or(0) as usize).unwrap();
    let mut one = CpuSet::new();
    one.set(cpu).unwrap();
    sched_setaffinity(Pid::from_raw(0), &one).unwrap();
}

#[test]
fn lab_kernel_and_host_decide_alike() {
    stay_on_this_cpu();
    let seed = number("SEED").unwrap_or(SEED);
    let cases = number("CASES").unwrap_or(CASES);
    let time = number("SECONDS").map(Duration::from_secs);
    let (mut kernel, mut four, mut six) = Kernel::load();
    let mut reasons = vec![0; Reason::ALL.len()];
    let mut flows = [0; 2];
    let started = Instant::now();
    let (mut done, mut round_seed) = (0, seed);
    while done < cases && time.is_none_or(|time| started.elapsed() < time) {
        let mut random = Random::new(round_seed);
        let world = World::draw(&mut random);
        let events = ROUND.min(cases - done);
        let outcome = if world.v6 {
            round::run(&mut kernel, &mut six, V6, random, &world, events as usize)
        } else {
            round::run(&mut kernel, &mut four, V4, random, &world, events as usize)
        };
        let passed = outcome.unwrap_or_else(|text| {
            panic!("kernel and host differ; again with `cargo xtask fuzz differential --seed {round_seed} --cases {events}`:\n{text}")
        });
        reasons.iter_mut().zip(passed.reasons).for_each(|(sum, one)| *sum += one);
        flows.iter_mut().zip(passed.flows).for_each(|(sum, one)| *sum += one);
        done += events;
        round_seed += 1;
    }
    println!("{done} events from seed {seed} in {:.1?}, flows compared: {flows:?}", started.elapsed());
    for (reason, count) in Reason::ALL.iter().zip(&reasons) {
        println!("{:18} {count}", reason.label());
        let unseen = done >= ENOUGH && *count == 0 && !UNSEEN.contains(reason);
        assert!(!unseen, "no packet ended with {reason:?}: the generator has to be mended");
    }
    assert!(flows.iter().all(|&count| done < ENOUGH || count > 1000), "too few flows to compare: {flows:?}");
}
