//! Shares of new flows, event by event.

use super::*;
use crate::datapath::{BackendPlan, Protocol};

const TEN_S: Duration = Duration::from_secs(10);

fn plan(weights: &[u32]) -> Plan {
    let name = |n: usize| format!("b{n}");
    let backends = weights.iter().enumerate().map(|(n, weight)| BackendPlan {
        weight: *weight,
        ..BackendPlan::new(name(n), "10.1.0.1:1".parse().unwrap(), "ams")
    });
    let names: Vec<String> = (0..weights.len()).map(name).collect();
    let address = "10.0.0.1:1".parse().unwrap();
    let slow =
        ServicePlan { slow_start: TEN_S, ..ServicePlan::new("slow", address, Protocol::Tcp, names.clone()) };
    let closed = ServicePlan {
        all_down: AllDown::Closed,
        ..ServicePlan::new("closed", address, Protocol::Udp, names)
    };
    Plan { sites: Vec::new(), backends: backends.collect(), services: vec![slow, closed] }
}

fn weights(shares: &Shares, service: &str, now: Instant) -> Vec<u32> {
    shares.weighed(service, now).unwrap().weights
}

#[test]
fn drained_and_down_backends_get_nothing() {
    let now = Instant::now();
    let mut shares = Shares::new(&plan(&[100, 7, 1]), &["b2".to_owned(), "gone".to_owned()]);
    assert_eq!(weights(&shares, "slow", now), [100_000, 7000, 0]);
    assert!(shares.set_health("b1", false, now));
    assert!(!shares.set_health("b1", false, now), "no news");
    assert!(!shares.set_health("nobody", false, now));
    assert_eq!(weights(&shares, "slow", now), [100_000, 0, 0]);
    assert!(shares.set_drained("b0", true, now) && !shares.set_drained("b0", true, now));
    assert!(shares.set_drained("b2", false, now));
    let later = now + TEN_S;
    assert_eq!(weights(&shares, "slow", later), [0, 0, 1000]);
    assert_eq!(shares.services_of("b1"), ["slow", "closed"]);
    assert!(shares.growing(later).contains("slow"));
}

#[test]
fn when_all_are_down_the_service_fails_as_it_says() {
    let now = Instant::now();
    let mut shares = Shares::new(&plan(&[100, 50, 10]), &["b2".to_owned()]);
    shares.set_health("b0", false, now);
    shares.set_health("b1", false, now);
    // The drained one stays out: it counts neither as up nor as a way out.
    assert_eq!(weights(&shares, "slow", now), [100_000, 50_000, 0]);
    assert_eq!(weights(&shares, "closed", now), [0, 0, 0]);
    shares.set_health("b1", true, now);
    assert_eq!(weights(&shares, "closed", now), [0, 50_000, 0]);
    assert_eq!(weights(&shares, "slow", now), [0, 5000, 0]);
}

#[test]
fn a_share_grows_from_a_tenth_to_all_in_steps() {
    let start = Instant::now();
    let mut shares = Shares::new(&plan(&[100, 100]), &[]);
    assert_eq!(weights(&shares, "slow", start), [100_000, 100_000], "a restart starts nothing slowly");
    assert!(shares.growing(start).is_empty());
    shares.set_health("b1", false, start);
    shares.set_health("b1", true, start);
    let at = |ms: u64| weights(&shares, "slow", start + Duration::from_millis(ms))[1];
    let course: Vec<u32> = (0..=10_500).map(at).collect();
    assert_eq!((course[0], course[5000], course[9999], course[10_000]), (10_000, 55_000, 95_000, 100_000));
    assert!(course.is_sorted());
    let steps = course.windows(2).filter(|pair| pair[0] != pair[1]).count();
    assert_eq!(steps, 18, "rings are computed for few steps");
    assert_eq!(weights(&shares, "closed", start), [100_000, 100_000], "another service, at once");
    assert_eq!(Vec::from_iter(shares.growing(start + TEN_S / 2)), ["slow"]);
    assert_eq!(Vec::from_iter(shares.growing(start + TEN_S)), ["slow"], "once more for the last step");
    assert!(shares.growing(start + TEN_S).is_empty());
}

#[test]
fn another_plan_keeps_standings_and_starts_the_new_slowly() {
    let now = Instant::now();
    let mut shares = Shares::new(&plan(&[100]), &["b0".to_owned()]);
    shares = shares.replanned(&plan(&[30, 40]), now);
    assert_eq!(weights(&shares, "slow", now), [0, 4000]);
    shares.set_drained("b0", false, now - TEN_S);
    assert_eq!(weights(&shares, "slow", now), [30_000, 4000]);
    let mut drained = plan(&[30, 40]);
    drained.backends[0].drain = true;
    shares = shares.replanned(&drained, now);
    assert!(shares.standing("b0").unwrap().is_drained_by_file());
    assert_eq!(weights(&shares, "slow", now), [0, 4000]);
    shares = shares.replanned(&plan(&[30]), now);
    assert_eq!(shares.standing("b1"), None);
    assert!(shares.growing(now).len() <= 1);
}

#[test]
fn what_is_told_while_another_plan_is_written_is_not_forgotten() {
    let now = Instant::now();
    let mut shares = Shares::new(&plan(&[10, 20]), &["b1".to_owned()]);
    let mut next = shares.replanned(&plan(&[30, 40, 50]), now - TEN_S);
    shares.set_health("b0", false, now);
    shares.set_drained("b1", false, now);
    next.catch_up(&shares);
    // Of the new plan the weights, of the news the rest: down, just back, and started long ago.
    assert_eq!(weights(&next, "slow", now), [0, 4000, 50_000]);
    assert_eq!(Vec::from_iter(next.growing(now)), ["slow"]);
}
