//! The benchmark of cutovers runs and reports what its documentation says; no times are looked at. That the flows are
//! established, and that every held packet arrives at the new site in order, is what the program itself checks.

use std::process::Command;

use serde_json::Value;

#[test]
fn a_quick_run_flips_and_replays() {
    let folder = tempfile::tempdir().expect("a folder for the report");
    let report = folder.path().join("report.json");
    let run = Command::new(env!("CARGO_BIN_EXE_cutover"))
        .args(["--quick", "--report"])
        .arg(&report)
        .output()
        .expect("the benchmark starts");
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));

    let report: Value =
        serde_json::from_str(&std::fs::read_to_string(report).expect("a report")).expect("JSON");
    let cases = report["cases"].as_array().expect("cases");
    assert_eq!(cases.iter().map(|case| case["flows"].as_u64()).collect::<Vec<_>>(), [Some(1), Some(1024)]);
    for case in cases {
        for figure in ["flip_us_p50", "first_replay_us_p50", "replay_per_s"] {
            assert!(case[figure].as_f64() > Some(0.0), "{figure}: {case}");
        }
    }
}
