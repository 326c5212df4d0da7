//! The path benchmark in a lab, for a moment: what it measures is answered by the server, and its report has the shape
//! that it is known for. Nothing here looks at how fast anything is.

#![expect(clippy::unwrap_used, reason = "a test states what it expects by unwrapping")]

use std::process::Command;

use bench::path::report::{Direction, Links, Metric, PathReport, Subject};
use serde_json::Value;

/// Runs the benchmark; the report as it is on disk, and what was printed.
fn run(words: &[&str]) -> (Value, String) {
    let dir = tempfile::tempdir().unwrap();
    let (report, plot) = (dir.path().join("path.json"), dir.path().join("path.svg"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_path"));
    command.args(["--rounds", "1", "--seconds", "0.1"]).args(words);
    let output = command.arg("--report").arg(&report).arg("--plot").arg(&plot).output().unwrap();
    let (printed, errors) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{printed}\n{errors}");
    assert!(std::fs::read_to_string(plot).unwrap().contains("drover-xdp-nat"));
    (serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap(), printed.into_owned())
}

#[test]
fn lab_path_measures_routing_and_drover_and_reports_both() {
    let words = ["--systems", "routing,drover-xdp-nat", "--links", "same", "--connections", "1,8"];
    let metrics = ["--metrics", "requests,connections,udp"];
    let (json, printed) = run(&[&words[..], &metrics[..]].concat());
    assert!(printed.contains("requests/s, 8 connections"), "{printed}");

    // The documented shape, read without our own types.
    let row = |system: &str| {
        let rows = json["rows"].as_array().unwrap().iter();
        let mut wanted = rows.filter(|row| {
            row["system"] == system && row["metric"] == "requests_per_s" && row["connections"] == 8
        });
        wanted.next().unwrap_or_else(|| panic!("no row of {system} in {json:#}")).clone()
    };
    for system in ["routing", "drover-xdp-nat"] {
        let row = row(system);
        // The client counts an answer only if it is what our server makes of that request on that connection.
        assert!(row["median"].as_f64().unwrap() > 0.0 && row["p99_us"].as_f64().unwrap() > 0.0, "{row}");
        assert_eq!(row["links"], "same");
    }

    let report: PathReport = serde_json::from_value(json).unwrap();
    assert_eq!(report.skipped.into_iter().collect::<Vec<_>>(), []);
    let on = |connections| Subject { connections: Some(connections), ..Subject::of(Metric::RequestsPerS) };
    for system in ["routing", "drover-xdp-nat"] {
        for subject in
            [on(1), on(8), Subject::of(Metric::NewConnectionsPerS), Subject::of(Metric::UdpPacketsPerS)]
        {
            let found = report.rows.iter().find(|row| row.system == system && row.subject == subject);
            let row = found.unwrap_or_else(|| panic!("{system} has no {subject:?}"));
            assert!(row.median > 0.0 && row.links == Links::Same, "{row:?}");
            assert_eq!(row.rounds.len(), 1);
        }
    }
    assert!(report.comparisons.is_empty(), "neither nftables nor a proxy was measured");
}

#[test]
fn lab_path_measures_every_mode_of_drover() {
    let modes = ["drover-xdp-nat", "drover-xdp-transparent", "drover-xdp-dsr"];
    let systems = modes.join(",");
    let words = ["--systems", &systems, "--links", "same", "--connections", "2", "--metrics", "requests,udp"];
    let report: PathReport = serde_json::from_value(run(&words).0).unwrap();
    assert_eq!(report.skipped.into_iter().collect::<Vec<_>>(), []);
    for mode in modes {
        let metrics = report.rows.iter().filter(|row| row.system == mode && row.median > 0.0);
        let metrics: Vec<_> = metrics.map(|row| row.subject.metric).collect();
        assert_eq!(
            metrics,
            [Metric::RequestsPerS, Metric::UdpPacketsPerS, Metric::CpuSPerMillionRequests],
            "{mode}"
        );
    }
}

#[test]
fn lab_path_measures_nftables_with_the_links_that_suit_it() {
    let words = ["--systems", "nft-dnat,drover-xdp-nat", "--connections", "4", "--metrics", "requests"];
    let (json, printed) = run(&words);
    let report: PathReport = serde_json::from_value(json).unwrap();
    let links: Vec<_> = report
        .rows
        .iter()
        .filter(|row| row.system == "nft-dnat" && row.subject.metric == Metric::RequestsPerS)
        .map(|row| row.links)
        .collect();
    assert_eq!(links, [Links::Same, Links::Best]);
    // A comparison for both settings of the links, for the rate and for its cost, and each is told.
    assert_eq!(report.comparisons.len(), 4);
    assert!(report.comparisons.iter().all(|one| one.peer == "nft-dnat" && one.drover == "drover-xdp-nat"));
    assert!(printed.contains("goals are met"), "{printed}");
}

#[test]
fn lab_path_measures_throughput_each_way_where_iperf3_is() {
    if Command::new("iperf3").arg("--version").output().is_err() {
        eprintln!("skipped: iperf3 is not installed (`cargo xtask setup --bench` installs it)");
        return;
    }
    let (json, _) = run(&["--systems", "drover-xdp-nat", "--metrics", "tcp"]);
    let report: PathReport = serde_json::from_value(json).unwrap();
    for direction in [Direction::Up, Direction::Down] {
        for metric in [Metric::TcpGbitPerS, Metric::CpuSPerGb] {
            let subject = Subject { direction: Some(direction), ..Subject::of(metric) };
            assert!(report.rows.iter().any(|row| row.subject == subject && row.median > 0.0), "{subject:?}");
        }
    }
}
