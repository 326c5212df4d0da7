//! What is shown at the end: figures, Drover and runc beside the script, goals.

use std::fmt::Write as _;

use bench::moves::report::Report;
use bench::table::{Table, number};

/// The report for a terminal.
pub fn text(report: &Report) -> String {
    let setting = &report.setting;
    let mut out = format!(
        "\nat most {} moves of each system in each case; kernel {}, {}\n",
        setting.moves, setting.kernel, setting.processors
    );
    setting.everywhere.iter().for_each(|line| _ = writeln!(out, "  {line}"));
    _ = write!(
        out,
        "\np50 over moves, and p99, which is the longest where there are less than 100\n{}",
        report.table()
    );
    _ = write!(out, "\nWhere the time goes\n{}", report.phases());
    for row in report.cases.iter().filter(|row| !row.failures.is_empty()) {
        row.failures
            .iter()
            .for_each(|why| _ = writeln!(out, "\n{}, {}: {why}", row.case.label(), row.system));
    }
    if !report.comparisons.is_empty() {
        _ = write!(
            out,
            "\nHow many times as much the script has (above 1: less than the script)\n{}",
            comparisons(report)
        );
    }
    if !report.goals.is_empty() {
        let met = report.goals.iter().filter(|goal| goal.met).count();
        _ = write!(out, "\nGoals\n{}\n{met} of {} goals are met\n", goals(report), report.goals.len());
    }
    for (what, why) in &report.skipped {
        _ = writeln!(out, "\nskipped {what}: {why}");
    }
    out
}

fn comparisons(report: &Report) -> Table {
    let mut table = Table::new();
    table.row(["", "system", "freeze", "stall", "sent", "total"]);
    for one in &report.comparisons {
        let ratios = [one.freeze_ratio, one.stall_ratio, one.bytes_ratio, one.total_ratio];
        let cells = ratios.map(|ratio| format!("{ratio:.2}"));
        table.row([one.case.label(), one.system.clone()].into_iter().chain(cells));
    }
    table
}

fn goals(report: &Report) -> Table {
    let mut table = Table::new();
    table.row(["", "system", "measured", "goal", ""]);
    for goal in &report.goals {
        table.row([
            goal.goal.clone(),
            goal.system.clone(),
            number(goal.value),
            number(goal.bound),
            if goal.met { "met" } else { "not met" }.to_owned(),
        ]);
    }
    table
}
