//! Flows, counters and captures over HTTP.

use std::time::Duration;

use lb_core::{Mode, Reason};

use super::*;
use crate::capture::stream::Sample;
use crate::datapath::observe::{FlowRow, FlowState};
use crate::datapath::{BackendNumber, Datapath as _, Protocol};

fn flow(client: &str, backend: u32) -> FlowRow {
    FlowRow {
        protocol: Protocol::Tcp,
        client: client.parse().unwrap(),
        service: "10.0.0.100:6379".parse().unwrap(),
        backend: BackendNumber(backend),
        mode: Mode::Nat,
        source: "10.9.0.1:4000".parse().unwrap(),
        state: FlowState::HalfClosed,
        idle: Duration::from_millis(1500),
    }
}

#[tokio::test]
async fn flows_have_names_and_are_filtered() {
    let server = Server::new(Play::Commit).await;
    let datapath = &server.control.datapath;
    let [first, second] = ["chat-1", "chat-2"].map(|name| datapath.backend(name).unwrap().0);
    datapath.set_flows(vec![
        flow("198.51.100.7:40000", first),
        flow("198.51.100.8:40000", second),
        flow("203.0.113.9:40000", 77),
    ]);
    let all = server.get("/v1/flows").await.json();
    assert_eq!((&all["is_cut"], &all["limit"]), (&json!(false), &json!(1000)));
    let expected = json!({
        "protocol": "tcp", "client": "198.51.100.7:40000", "service": "chat",
        "service_address": "10.0.0.100:6379", "backend": "chat-1", "location": "ams",
        "source": "10.9.0.1:4000", "mode": "nat", "state": "half_closed", "idle_ms": 1500,
    });
    assert_eq!(all["flows"][0], expected);
    let gone = &all["flows"][2];
    assert_eq!((&gone["backend"], &gone["location"]), (&Value::Null, &Value::Null));
    for (query, count, is_cut) in [
        ("client=198.51.100.0/24", 2, false),
        ("client=198.51.100.8", 1, false),
        ("backend=chat-2", 1, false),
        ("service=chat&protocol=tcp", 3, false),
        ("limit=2", 2, true),
    ] {
        let found = server.get(&format!("/v1/flows?{query}")).await.json();
        assert_eq!(found["flows"].as_array().unwrap().len(), count, "{query}");
        assert_eq!(found["is_cut"], is_cut, "{query}");
    }
}

#[tokio::test]
async fn wrong_parameters_are_named() {
    let server = Server::new(Play::Commit).await;
    for (path, status, kind, detail) in [
        ("/v1/flows?client=chat", 400, "wrong-parameter", "\"chat\" is neither an address nor a prefix"),
        ("/v1/flows?backend=nobody", 404, "unknown-backend", "no backend \"nobody\""),
        ("/v1/flows?service=nobody", 404, "unknown-service", "no service \"nobody\""),
        ("/v1/flows?protocol=icmp", 400, "wrong-parameter", "neither tcp nor udp"),
        ("/v1/flows?limit=0", 400, "wrong-parameter", "not within 1..=100000"),
        ("/v1/flows?limit=all", 400, "wrong-parameter", "limit"),
        ("/v1/flows?colour=red", 400, "wrong-parameter", "unknown field `colour`"),
        ("/v1/capture?reason=stale_site,bored", 400, "unknown-reason", "no reason \"bored\"; there are"),
        ("/v1/capture?one_in=0", 400, "wrong-parameter", "one_in"),
        ("/v1/capture?count=x", 400, "wrong-parameter", "count"),
    ] {
        let answer = server.get(path).await;
        let problem: Problem = serde_json::from_str(&answer.text).unwrap();
        assert_eq!((answer.status, problem.kind), (status, format!("urn:drover:{kind}")), "{path}");
        assert!(problem.detail.contains(detail), "{path}: {}", problem.detail);
    }
    assert_eq!(server.control.datapath.captures(), [0; 0]);
}

#[tokio::test]
async fn counters_are_reported_by_member() {
    let server = Server::new(Play::Commit).await;
    let report = server.get("/v1/traffic").await.json();
    let member = &report["members"][0];
    assert_eq!((&member["service"], &member["backend"]), (&json!("chat"), &json!("chat-1")));
    assert_eq!((&member["new_flows"], &member["resets"]), (&json!(4), &json!(1)));
    assert_eq!(member["traffic"]["to_clients_bytes"], 200);
    assert_eq!(report["backends"]["chat-2"]["location"], "bare");
    assert_eq!(report["reasons"]["to_client"], 1);
    assert_eq!(report["flow_tables"]["tables"][0]["flows"], 7);
    assert_eq!(report["flow_tables"]["removed"]["idle"], 3);
}

fn sample(reason: Reason) -> Sample {
    Sample { reason: Some(reason), interface: 1, length: 60, time_ns: 5, bytes: [7; 60].into() }
}

/// Waits until the captures are these.
async fn captures(server: &Server, expected: &[u32]) {
    let reached = async {
        while server.control.datapath.captures() != expected {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), reached).await.expect("the captures are as expected");
}

#[tokio::test]
async fn a_capture_has_the_packets_of_its_reasons_and_ends_after_its_count() {
    let server = Server::new(Play::Commit).await;
    let mut pieces =
        server.client.pieces("/v1/capture?reason=no_flow,stale_site&one_in=3&count=2").await.unwrap();
    captures(&server, &[3]).await;
    for reason in [Reason::ToBackend, Reason::NoFlow, Reason::ToClient, Reason::StaleSite, Reason::NoFlow] {
        server.control.datapath.offer_sample(&sample(reason));
    }
    let mut stream = Vec::new();
    while let Some(piece) = pieces.next().await.unwrap() {
        stream.extend(piece);
    }
    assert_eq!(stream[..4], [0x0a, 0x0d, 0x0d, 0x0a]);
    let text = String::from_utf8_lossy(&stream);
    let found: Vec<bool> = [Reason::NoFlow, Reason::StaleSite, Reason::ToBackend]
        .iter()
        .map(|reason| text.contains(reason.text()))
        .collect();
    assert_eq!(found, [true, true, false]);
    assert!(text.contains("lo"), "interfaces have names");
    captures(&server, &[]).await;
}

#[tokio::test]
async fn sampling_ends_with_its_reader_with_its_time_and_with_the_daemon() {
    let server = Server::new(Play::Commit).await;
    let first = server.client.pieces("/v1/capture").await.unwrap();
    let mut second = server.client.pieces("/v1/capture?one_in=100").await.unwrap();
    captures(&server, &[1, 100]).await;
    // The reader vanishes without a word, and no packet comes that could tell.
    drop(first);
    captures(&server, &[100]).await;
    let mut brief = server.client.pieces("/v1/capture?seconds=1").await.unwrap();
    while brief.next().await.unwrap().is_some() {}
    captures(&server, &[100]).await;
    server.stop.cancel();
    let end = async { while second.next().await.is_ok_and(|piece| piece.is_some()) {} };
    tokio::time::timeout(Duration::from_secs(5), end).await.unwrap();
    captures(&server, &[]).await;
}
