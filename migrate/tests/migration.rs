//! Whole migrations with real processes, real CRIU and real agents between two network namespaces.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{At, Client, Lab, Options, possible};
use migrate::coordinator::Outcome;

const DEADLINE: Duration = Duration::from_secs(5);

#[test]
fn there_and_back() {
    if !possible() {
        return;
    }
    let lab = Arc::new(Lab::new(Options::default()));
    let client = Client::start(&lab);
    let mut from = At::A;
    for round in 0..6 {
        let report = lab.migrate(lab.spec(&format!("m-{round}"), from, DEADLINE), |_| ());
        println!("{}", serde_json::to_string(&report).unwrap());
        assert_eq!(report.outcome, Outcome::Committed, "{:?}", report.reason);
        client.wait(20);
        from = from.other();
    }
    client.finish().unwrap();
}
