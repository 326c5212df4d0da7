//! Reading CRIU's log: which of its lines say why something failed.

use std::path::Path;

/// As many lines as an operator reads in an error message.
const MAX_LINES: usize = 6;

/// What CRIU's own message says at the end of every failure; not the reason.
const NOISE: [&str; 5] = [
    "Dumping FAILED",
    "Restoring FAILED",
    "RPC client reported script error",
    "One of more action scripts failed",
    "Can't setup RLIMIT_NOFILE",
];

/// The lines of a log that matter: errors first of all, without time stamps and without repetition.
pub fn lines_that_matter(log: &str) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for line in log.lines() {
        let Some((_, error)) = line.split_once("Error (") else { continue };
        let Some((place, message)) = error.split_once("): ") else { continue };
        if NOISE.iter().any(|noise| message.contains(noise)) {
            continue;
        }
        let line = format!("{} ({place})", message.trim());
        if !lines.contains(&line) {
            lines.push(line);
        }
    }
    // The first error is most often the cause; what follows are its consequences.
    lines.truncate(MAX_LINES);
    lines
}

/// Why CRIU failed, in one line: the lines of its log that matter, or what else is known.
pub fn explain(log: &Path, stderr: &Path, message: Option<&str>) -> String {
    let read = |path: &Path| std::fs::read(path).map(|text| String::from_utf8_lossy(&text).into_owned());
    let lines = read(log).map(|log| lines_that_matter(&log)).unwrap_or_default();
    if !lines.is_empty() {
        return format!("CRIU: {}", lines.join("; "));
    }
    let stderr = read(stderr).unwrap_or_default();
    let stderr = stderr.trim();
    match (message, stderr) {
        (Some(message), _) => format!("CRIU: {}", message.trim()),
        (None, "") => "CRIU ended without saying why".to_owned(),
        (None, stderr) => format!("CRIU: {}", stderr.lines().last().unwrap_or(stderr)),
    }
}

/// True if a dump failed because a connection waited in an accept queue, which passes.
pub fn is_in_flight(log: &str) -> bool {
    log.contains("In-flight connection")
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "\
(00.000031) Warn  (criu/kerndat.c:1290): Can't keep kdat cache on non-tempfs
(00.000100) Error (criu/util.c:631): Can't setup RLIMIT_NOFILE for self
(00.004012) Error (criu/sk-unix.c:898): unix: Can't dump half of stream unix connection.
(00.004013) Error (criu/sk-unix.c:898): unix: Can't dump half of stream unix connection.
(00.004050) Error (criu/cr-dump.c:1673): Dump files (pid: 5001) failed with -1
(00.004950) Error (criu/cr-dump.c:2128): Dumping FAILED.
";

    #[test]
    fn the_cause_comes_first_and_noise_not_at_all() {
        assert_eq!(
            lines_that_matter(LOG),
            [
                "unix: Can't dump half of stream unix connection. (criu/sk-unix.c:898)",
                "Dump files (pid: 5001) failed with -1 (criu/cr-dump.c:1673)",
            ]
        );
    }

    #[test]
    fn a_connection_in_flight_is_recognised() {
        assert!(!is_in_flight(LOG));
        assert!(is_in_flight("(00.1) Error (criu/sk-inet.c:208): In-flight connection (l) for 2f\n"));
    }

    #[test]
    fn without_a_log_the_next_best_is_said() {
        let none = Path::new("/nonexistent");
        assert_eq!(explain(none, none, Some("bad request")), "CRIU: bad request");
        assert_eq!(explain(none, none, None), "CRIU ended without saying why");
    }
}
