//! Daemons take turns under load: stopped, killed, at another hook, and with tables that the next one does not know.

#![expect(clippy::unwrap_used, reason = "a test states what it expects by unwrapping")]

mod steady;

use std::time::Duration;

use aya::maps::{Array, Map, MapData};
use lab::wait_for;
use lb_core::record::LAYOUT_VERSION;
use serde_json::Value;

use steady::{Bench, LIMIT, Load, UNDER_LOAD, spawn};

const BETWEEN: Duration = Duration::from_millis(300);

/// Starts the daemon after it has ended.
fn start_again(bench: &mut Bench) {
    assert!(bench.daemon.ended().is_some());
    bench.daemon = spawn(&bench.lab);
    bench.wait_ready();
}

fn stop(bench: &mut Bench) {
    let ended = bench.daemon.stop(LIMIT);
    assert!(ended.success(), "{ended}");
}

/// How packets are taken, and that nothing else is attached.
fn must_be_taken_by(bench: &Bench, mode: &str) {
    let status = bench.admin("GET", "/v1/status", "").json();
    let modes: Vec<_> = status["hooks"].as_array().unwrap().iter().map(|hook| hook["mode"].clone()).collect();
    assert_eq!(modes, vec![Value::from(mode); 3]);
    let pins = std::fs::read_dir(bench.lab.pin_path()).unwrap();
    let names = pins.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let links: Vec<_> = names.filter(|name| name.starts_with("link-")).collect();
    assert_eq!(links.len(), 3, "{links:?}");
}

#[test]
fn the_next_daemon_takes_over_without_losing_a_packet() {
    for hook in ["tc", "xdp"] {
        let mut bench = Bench::start(hook, UNDER_LOAD);
        let load = Load::start(&bench.lab);
        for _ in 0..2 {
            std::thread::sleep(BETWEEN);
            stop(&mut bench);
            std::thread::sleep(BETWEEN);
            start_again(&mut bench);
            std::thread::sleep(BETWEEN);
            bench.daemon.kill();
            std::thread::sleep(BETWEEN);
            start_again(&mut bench);
        }
        std::thread::sleep(BETWEEN);
        let [first, second] = load.reached();
        assert!(first > 100 && second == 0, "{first} and {second}");
        load.must_be_whole();
    }
}

#[test]
fn packets_are_taken_at_another_hook_without_losing_one() {
    let mut bench = Bench::start("tc", UNDER_LOAD);
    must_be_taken_by(&bench, "tc (tcx)");
    let load = Load::start(&bench.lab);
    for _ in 0..3 {
        for (hook, mode) in [("xdp", "xdp native"), ("tc", "tc (tcx)")] {
            std::thread::sleep(BETWEEN);
            stop(&mut bench);
            bench.configure(hook, UNDER_LOAD);
            start_again(&mut bench);
            must_be_taken_by(&bench, mode);
        }
    }
    std::thread::sleep(BETWEEN);
    load.must_be_whole();
}

#[test]
fn tables_of_another_layout_are_refused_and_go_on_carrying() {
    let mut bench = Bench::start("auto", UNDER_LOAD);
    let load = Load::start(&bench.lab);
    std::thread::sleep(BETWEEN);
    stop(&mut bench);
    let pin = bench.lab.pin_path().join("maps/LAYOUT");
    let mut layout: Array<MapData, u64> = Map::Array(MapData::from_pin(pin).unwrap()).try_into().unwrap();
    layout.set(0, LAYOUT_VERSION + 1, 0).unwrap();

    bench.daemon = spawn(&bench.lab);
    let ended = wait_for(LIMIT, || bench.daemon.ended()).expect("the daemon ends");
    assert!(!ended.success(), "{ended}");
    let said = bench.daemon.log_tail(5);
    let pins = bench.lab.pin_path().display().to_string();
    let expected =
        [format!("layout {}", LAYOUT_VERSION + 1), format!("remove {pins}"), "nothing was touched".into()];
    assert!(expected.iter().all(|words| said.contains(words)), "{said}");
    assert_eq!(layout.get(&0, 0).unwrap(), LAYOUT_VERSION + 1);
    std::thread::sleep(BETWEEN);

    // As the former version left them: that one can go on.
    layout.set(0, LAYOUT_VERSION, 0).unwrap();
    start_again(&mut bench);
    std::thread::sleep(BETWEEN);
    load.must_be_whole();
}
