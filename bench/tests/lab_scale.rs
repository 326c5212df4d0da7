//! The benchmark of large configurations runs and says what its documentation promises; no times are looked at. That
//! the tables have what each change brought is what the program itself checks.

use std::process::Command;

#[test]
fn a_quick_run_says_all_of_it() {
    let run =
        Command::new(env!("CARGO_BIN_EXE_scale")).arg("--quick").output().expect("the benchmark starts");
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let said = String::from_utf8_lossy(&run.stdout);
    assert!(said.contains("10 x 10") && said.contains("1 x 100"), "{said}");
    for what in ["first install", "weight changed", "added", "removed", "drained"] {
        let line = said.lines().find(|line| line.contains(what)).unwrap_or_else(|| panic!("{what}: {said}"));
        assert_eq!(line.matches(" ms").count(), 2, "{line}");
    }
    for what in ["an IPv4 flow", "an IPv6 flow", "all tables"] {
        assert!(said.lines().any(|line| line.contains(what) && line.ends_with('B')), "{what}: {said}");
    }
}
