//! The benchmark of the XDP program runs and reports what its documentation says; no times are looked at. That every
//! packet took the way of its case is what the program itself checks with the counters.

use std::process::Command;

use serde_json::Value;

#[test]
fn a_quick_run_reports_every_kind_of_case() {
    let folder = tempfile::tempdir().expect("a folder for the report");
    let (report, plot) = (folder.path().join("report.json"), folder.path().join("plot.svg"));
    let run = Command::new(env!("CARGO_BIN_EXE_xdp"))
        .args(["--quick", "--rounds", "2", "--report"])
        .arg(&report)
        .arg("--plot")
        .arg(&plot)
        .output()
        .expect("the benchmark starts");
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));

    let text = std::fs::read_to_string(report).expect("a report");
    let report: Value = serde_json::from_str(&text).expect("JSON");
    for floor in ["xdp_tx_ns", "ipip_ns"] {
        assert!(report["floors"][floor].as_f64() > Some(0.0), "{floor}: {text}");
    }
    let cases = report["cases"].as_array().expect("cases");
    for (mode, family) in
        ["nat", "transparent", "dsr"].into_iter().flat_map(|mode| [(mode, "v4"), (mode, "v6")])
    {
        for (protocol, kind, flows) in [
            ("tcp", "hit", 1),
            ("tcp", "hit", 1024),
            ("tcp", "miss", 1024),
            ("tcp", "syn", 1024),
            ("udp", "hit", 1024),
            ("udp", "miss", 1024),
        ] {
            let is_it = |case: &&Value| {
                (&case["mode"], &case["family"], &case["protocol"], &case["case"], &case["flows"])
                    == (&mode.into(), &family.into(), &protocol.into(), &kind.into(), &flows.into())
            };
            let case = cases
                .iter()
                .find(is_it)
                .unwrap_or_else(|| panic!("{mode} {family} {protocol} {kind}: {text}"));
            let (min, median) = (case["ns_min"].as_f64(), case["ns_median"].as_f64());
            assert!(min > Some(0.0) && min <= median && case["ratio"].as_f64() > Some(0.0), "{case}");
        }
    }
    for feature in ["sampling", "path_mtu", "flow_limits"] {
        let features = report["features"].as_array().expect("features");
        assert!(features.iter().any(|row| row["feature"] == feature && row["ns_cost"].is_number()), "{text}");
    }
    assert!(std::fs::read_to_string(plot).expect("a plot").starts_with("<svg"));
}
