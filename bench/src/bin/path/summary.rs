//! What is shown at the end: a table for each setting of the links, the comparisons, and the picture.

use std::fmt::Write as _;

use bench::path::goals::Comparison;
use bench::path::report::{Links, Metric, PathReport, Row, Subject};
use bench::plot::{Axis, Chart, Group, svg};
use bench::table::{Table, number};

/// More than this share of the processors used by others is worth a warning.
const NOISE: f64 = 0.05;

/// The report for a terminal.
pub fn text(report: &PathReport) -> String {
    let setting = &report.setting;
    let mut out = format!(
        "\nmedians of {} rounds of {} s each; kernel {}, {}\n",
        setting.rounds, setting.seconds, setting.kernel, setting.processors
    );
    if setting.others_busy > NOISE {
        _ = writeln!(
            out,
            "BEWARE: the machine was not quiet: others used {:.0} % of it before a round, so the figures may be off",
            setting.others_busy * 100.0
        );
    }
    setting.everywhere.iter().for_each(|line| _ = writeln!(out, "  {line}"));
    for links in [Links::Same, Links::Best] {
        let systems = systems(report, links);
        if !systems.is_empty() {
            _ = write!(out, "\n{} links\n{}", links.name(), figures(report, links, &systems));
        }
    }
    for (what, why) in &report.skipped {
        _ = writeln!(out, "\nskipped {what}: {why}");
    }
    if !report.comparisons.is_empty() {
        out += "\nDrover's best way beside the others (`best links`: each with the links that suit it)\n";
        out += &comparisons(&report.comparisons);
        let met = report.comparisons.iter().filter(|one| one.met).count();
        _ = writeln!(out, "\n{met} of {} goals are met", report.comparisons.len());
    }
    out
}

/// Systems as columns, subjects as rows, latencies below the rates that they belong to.
fn figures(report: &PathReport, links: Links, systems: &[&str]) -> Table {
    let mut table = Table::new();
    table.row(std::iter::once("").chain(systems.iter().copied()));
    for subject in subjects(report) {
        let rows: Vec<_> = systems.iter().map(|system| row(report, links, system, subject)).collect();
        let mut line = |label: String, cell: &dyn Fn(&Row) -> Option<String>| {
            let cells: Vec<_> =
                rows.iter().map(|row| row.and_then(cell).unwrap_or_else(|| "-".to_owned())).collect();
            if cells.iter().any(|cell| cell != "-") {
                table.row(std::iter::once(label).chain(cells));
            }
        };
        line(subject.label(), &|row| Some(number(row.median)));
        line("    p50, us".to_owned(), &|row| row.p50_us.map(number));
        line("    p99, us".to_owned(), &|row| row.p99_us.map(number));
        line("    loss, %".to_owned(), &|row| row.loss.map(|loss| number(loss * 100.0)));
    }
    table
}

fn comparisons(comparisons: &[Comparison]) -> String {
    let mut table = Table::new();
    table.row(["", "links", "Drover", "beside", "ratio", "goal", ""]);
    for one in comparisons {
        table.row([
            one.subject.label(),
            one.links.name().to_owned(),
            format!("{} {}", one.drover, number(one.value)),
            format!("{} {}", one.peer, number(one.peer_value)),
            format!("{:.2}", one.ratio),
            format!("{:.1}", one.goal),
            if one.met { "met" } else { "not met" }.to_owned(),
        ]);
    }
    table.to_string()
}

/// One chart for each metric and setting of the links.
pub fn plot(report: &PathReport) -> String {
    let metrics = [
        Metric::RequestsPerS,
        Metric::NewConnectionsPerS,
        Metric::TcpGbitPerS,
        Metric::UdpPacketsPerS,
        Metric::CpuSPerMillionRequests,
        Metric::CpuSPerGb,
    ];
    let mut charts = Vec::new();
    for metric in metrics {
        for links in [Links::Same, Links::Best] {
            charts.extend(chart(report, metric, links));
        }
    }
    svg(&charts)
}

fn chart(report: &PathReport, metric: Metric, links: Links) -> Option<Chart> {
    let systems = systems(report, links);
    let groups: Vec<_> = subjects(report)
        .into_iter()
        .filter(|subject| subject.metric == metric)
        .map(|subject| Group {
            label: subject.label(),
            values: systems
                .iter()
                .map(|system| row(report, links, system, subject).map(|row| row.median))
                .collect(),
        })
        .filter(|group| group.values.iter().any(Option::is_some))
        .collect();
    (!groups.is_empty()).then(|| Chart {
        title: format!("{}, {} links", Subject::of(metric).label(), links.name()),
        unit: metric.name().replace('_', " "),
        // Rates at 1 and at 1,000 connections are powers of ten apart.
        axis: if metric == Metric::RequestsPerS { Axis::Logarithmic } else { Axis::Linear },
        series: systems.iter().map(|&system| system.to_owned()).collect(),
        groups,
        references: Vec::new(),
    })
}

fn row<'a>(report: &'a PathReport, links: Links, system: &str, subject: Subject) -> Option<&'a Row> {
    report.rows.iter().find(|row| row.links == links && row.system == system && row.subject == subject)
}

/// Systems that have figures with these links, in the order of the measurement.
fn systems(report: &PathReport, links: Links) -> Vec<&str> {
    let mut systems: Vec<&str> = Vec::new();
    for row in report.rows.iter().filter(|row| row.links == links) {
        if !systems.contains(&row.system.as_str()) {
            systems.push(&row.system);
        }
    }
    systems
}

fn subjects(report: &PathReport) -> Vec<Subject> {
    let mut subjects: Vec<_> = report.rows.iter().map(|row| row.subject).collect();
    subjects.sort();
    subjects.dedup();
    subjects
}
