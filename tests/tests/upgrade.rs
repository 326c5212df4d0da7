//! Daemons take turns under load: stopped, killed, at another hook, and with tables that the next one does not know.

#![expect(clippy::unwrap_used, reason = "a test states what it expects by unwrapping")]

mod steady;

use std::net::UdpSocket;
use std::time::Duration;

use aya::maps::{Array, Map, MapData};
use lab::{Site, wait_for};
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

/// At `third`, a site whose next hop is there only once [`third_site`] says so.
const AT_THIRD: &str = "\
[[sites]]\nname = \"third\"\nnext_hop = \"10.2.2.9\"\n\
[[backends]]\nname = \"late\"\naddress = \"10.1.0.3:7000\"\nsite = \"third\"\n\
[[services]]\nname = \"late\"\naddress = \"10.0.0.100:7003\"\nprotocol = \"udp\"\nbackends = [\"late\"]\n";

fn third_site(bench: &Bench, add_or_del: &str) {
    let mut command = bench.lab.site(Site::B).command("ip");
    let status = command.args(["addr", add_or_del, "10.2.2.9/32", "dev", "eth0"]).status().unwrap();
    assert!(status.success());
    let mut command = bench.lab.lb().command("ip");
    assert!(command.args(["neigh", "flush", "to", "10.2.2.9"]).status().unwrap().success());
}

fn count(bench: &Bench, reason: &str) -> u64 {
    let text = String::from_utf8(bench.admin("GET", "/metrics", "").body).unwrap();
    let line = text.lines().find(|line| line.contains(&format!("reason=\"{reason}\""))).unwrap();
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[test]
fn a_site_that_cannot_be_reached_is_waited_for_and_keeps_nobody_from_the_others() {
    let text = UNDER_LOAD.to_owned() + AT_THIRD;
    let mut bench = Bench::start("auto", &text);
    let load = Load::start(&bench.lab);
    let server = bench.lab.site(Site::B).run(|| UdpSocket::bind("10.1.0.3:7000")).unwrap();
    std::thread::spawn(move || {
        let mut datagram = [0; 64];
        while let Ok((length, from)) = server.recv_from(&mut datagram) {
            let _ = server.send_to(&datagram[..length], from);
        }
    });
    let client = bench.lab.client().run(|| UdpSocket::bind("0.0.0.0:0")).unwrap();
    client.connect("10.0.0.100:7003").unwrap();
    client.set_read_timeout(Some(BETWEEN)).unwrap();
    let is_answered = || client.send(b"there?").and_then(|_| client.recv(&mut [0; 64])).is_ok();
    let before = count(&bench, "no_route");
    assert!(!is_answered());
    assert!(count(&bench, "no_route") > before);
    assert!(bench.daemon.log_tail(100).contains("the site cannot be reached"));
    // A reload says what is wrong with a site that it brings, and the one that is there already does not matter.
    let weighed =
        text.replace("name = \"late\"\naddress = \"10.1", "name = \"late\"\nweight = 7\naddress = \"10.1");
    bench.configure("auto", &weighed);
    assert_eq!(bench.admin("POST", "/v1/reload", "{}").status, 200);
    bench.configure("auto", &text.replace("10.2.2.9", "10.2.2.8"));
    let refused = bench.admin("POST", "/v1/reload", "{}");
    assert_eq!((refused.status, &refused.json()["type"]), (409, &Value::from("urn:drover:unreachable-site")));

    third_site(&bench, "add");
    wait_for(LIMIT, || is_answered().then_some(())).expect("the site is found");
    // Once it was found, a daemon that starts while it does not answer goes on as the former one.
    bench.configure("auto", &text);
    stop(&mut bench);
    third_site(&bench, "del");
    start_again(&mut bench);
    assert!(is_answered());
    load.must_be_whole();
}
