//! The clients in a lab whose middle only routes: the drill's path without the load balancer.

#![expect(clippy::unwrap_used, reason = "a test states what it expects by unwrapping")]

use std::net::SocketAddr;
use std::time::Duration;

use bench::driver::{self, Load, Source};
use bench::probe::wait_until_it_answers;
use bench::report::Verification;
use bench::scenario::{Scenario, redis};
use bench::tally::Faults;
use bench::timeline::Timeline;
use bench::verify::redis_counts;
use lab::process::Process;
use lab::{Lab, Site, address};

/// The clients have ended, the server has not.
struct Run {
    target: SocketAddr,
    timeline: Timeline,
    _server: Process,
}

/// Runs a scenario's server at the first site and its default clients for a while.
fn run(lab: &Lab, scenario: Scenario, duration: Duration) -> Run {
    let target = SocketAddr::from((address::backend4(1), scenario.port()));
    lab.route(target.ip(), Site::A).unwrap();
    let words = scenario.command(target, lab.dir()).unwrap();
    let mut command = lab.site(Site::A).command(&words[0]);
    command.args(&words[1..]).current_dir(lab.dir());
    let server = Process::spawn("server", lab.dir(), command).unwrap();
    let protocol = scenario.protocol();
    lab.client().run(|| wait_until_it_answers(target, protocol.as_ref(), Duration::from_secs(20))).unwrap();
    let load = Load {
        target,
        source: Source::Any,
        clients: scenario.default_clients(),
        rate_per_s: scenario.default_rate_per_s(),
        connect_timeout: Duration::from_secs(5),
        drain: Duration::from_secs(3),
    };
    let clients = lab.client().run(|| driver::connect(load, protocol)).unwrap().start().unwrap();
    std::thread::sleep(duration);
    Run { target, timeline: clients.stop().unwrap(), _server: server }
}

#[test]
fn lab_redis_answers_every_client_and_counts_the_same() {
    let lab = Lab::new().unwrap();
    let Run { target, timeline, _server } = run(&lab, Scenario::Redis, Duration::from_secs(1));
    assert_eq!(timeline.faults, Faults::default(), "{:?}", timeline.errors);
    assert!(timeline.answered() >= 1900);
    let counts = lab.client().run(|| redis_counts(target, &redis(), timeline.clients)).unwrap();
    assert_eq!(Verification::compare(&timeline, &counts), Verification::default());
    assert_eq!(counts.iter().sum::<u64>(), timeline.answered());
}

#[test]
fn lab_the_game_server_answers_from_the_address_that_was_asked() {
    let lab = Lab::new().unwrap();
    // All clients have one address here: fewer messages than the server answers it in a burst.
    let Run { timeline, _server, .. } = run(&lab, Scenario::OpenArena, Duration::from_millis(600));
    assert_eq!(timeline.faults, Faults::default(), "{:?}", timeline.errors);
    assert!(timeline.answered() >= 4);
}
