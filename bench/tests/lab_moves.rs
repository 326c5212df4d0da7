//! The benchmark of migrations in a lab: servers are moved by every system that is here, clients are answered all the
//! while and lose nothing, and the report has the shape that it is known for. Nothing here looks at how long anything
//! takes.

use std::process::Command;

use serde_json::Value;

#[test]
fn lab_moves_quickly_by_every_system_and_nothing_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let (report, plot) = (dir.path().join("moves.json"), dir.path().join("moves.svg"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_moves"));
    let output =
        command.arg("--quick").arg("--report").arg(&report).arg("--plot").arg(&plot).output().unwrap();
    let (printed, errors) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{printed}\n{errors}");
    let json: Value = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();

    // What is not installed, or does not start on this machine, is not measured and is named.
    let skipped: Vec<&String> = json["skipped"].as_object().unwrap().keys().collect();
    let systems: Vec<&str> = ["drover-pre", "drover-post", "script", "runc"]
        .into_iter()
        .filter(|name| !skipped.iter().any(|what| what.ends_with(name)))
        .collect();
    assert!(systems.contains(&"drover-pre") && systems.contains(&"drover-post"), "{json:#}");
    let cases = json["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 2 * systems.len(), "{json:#}");
    for case in cases {
        assert!(systems.contains(&case["system"].as_str().unwrap()), "{case:#}");
        assert_eq!((&case["committed"], &case["failed"]), (&2.into(), &0.into()), "{case:#}");
        for nothing in ["lost", "resets", "wrong_pages"] {
            assert_eq!(case[nothing], 0, "{nothing}: {case:#}");
        }
        // Requests went on before, between and after the moves, and the memory crossed the link.
        assert!(case["answered"].as_u64() > Some(100), "{case:#}");
        let memory = case["resident_mb"].as_u64().unwrap() << 20;
        assert!(case["bytes"].as_u64() > Some(memory), "{case:#}");
        let figure = |name: &str, part: &str| case[name][part].as_f64().unwrap();
        for part in ["p50", "p99"] {
            assert!(figure("freeze_ms", part) > 0.0 && figure("added_stall_ms", part) >= 0.0, "{case:#}");
            assert!(figure("stall_ms", part) > 0.0, "{case:#}");
        }
        assert!(case["total_ms"].as_f64() >= Some(figure("freeze_ms", "p50") / 2.0), "{case:#}");
    }
    for (field, values) in [("connections", [1, 50]), ("dirty_pct", [0, 20]), ("delay_ms", [0, 2])] {
        for value in values {
            assert!(cases.iter().any(|case| case[field].as_f64() == Some(value.into())), "{field} {value}");
        }
    }
    if systems.contains(&"script") {
        assert!(
            json["comparisons"].as_array().unwrap().iter().any(|one| one["system"] == "drover-post"),
            "{json:#}"
        );
    }
    assert!(printed.contains("goals are met") && printed.contains("10 MB"), "{printed}");
    assert!(std::fs::read_to_string(plot).unwrap().contains("drover"));
}

#[test]
fn lab_moves_measures_the_case_that_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let report = dir.path().join("moves.json");
    let mut command = Command::new(env!("CARGO_BIN_EXE_moves"));
    command.args([
        "--case",
        "system=drover-post,size=16,connections=3,dirty=5,rate=500",
        "--moves",
        "1",
        "--report",
    ]);
    let output = command.arg(&report).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let json: Value = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
    let cases = json["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 1, "{json:#}");
    for (field, value) in
        [("resident_mb", 16), ("connections", 3), ("dirty_pct", 5), ("rate_mbit", 500), ("committed", 1)]
    {
        assert_eq!(cases[0][field].as_f64(), Some(value.into()), "{field}");
    }
}
