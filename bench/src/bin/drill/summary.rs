//! What is shown at the end of a drill.

use bench::picture::{self, Scene, Span};
use bench::report::{DrillReport, Migration, Outcome};
use bench::stall::Percentiles;
use bench::table::{Table, bytes, number};
use bench::timeline::Timeline;

/// Migrations that get a picture each; of more only the worst one gets one.
const PICTURES: usize = 2;

/// Width where the terminal does not say.
const DEFAULT_WIDTH: usize = 80;

/// Message latency around each migration, or around the one with the longest stall.
pub fn pictures(report: &DrillReport, timeline: &Timeline, migrations: &[Migration]) -> String {
    let mut chosen: Vec<usize> = (0..migrations.len()).collect();
    if chosen.len() > PICTURES {
        let stall = |index: &usize| report.migrations[*index].stall_ms.max;
        chosen.sort_by(|left, right| stall(right).total_cmp(&stall(left)));
        chosen.truncate(1);
    }
    let width = terminal_width();
    chosen.into_iter().map(|index| picture(index, timeline, &migrations[index], width)).collect()
}

fn picture(index: usize, timeline: &Timeline, migration: &Migration, width: usize) -> String {
    let span = |phase: &bench::report::Phase| Span {
        name: phase.name.clone(),
        from_ns: migration.at_ns(timeline, phase.start_ms),
        to_ns: migration.at_ns(timeline, phase.end_ms.unwrap_or(phase.start_ms)),
    };
    let phases: Vec<Span> = migration.coordinated.phases.iter().map(span).collect();
    let freeze = migration.window(timeline).freeze;
    let title = format!(
        "\nMigration {}, {} to {}: worst latency of the messages by when they were due\n\n",
        index + 1,
        migration.from,
        migration.to
    );
    title + &picture::draw(&Scene { timeline, phases: &phases, freeze, width })
}

/// Columns of the terminal, where the shell says.
fn terminal_width() -> usize {
    std::env::var("COLUMNS").ok().and_then(|text| text.parse().ok()).unwrap_or(DEFAULT_WIDTH)
}

/// The numbers.
pub fn tables(report: &DrillReport) -> String {
    let mut counts = Table::new();
    counts.row(["messages", "sent", "received", "lost", "duplicated", "reordered", "resets"]).row([
        String::new(),
        report.sent.to_string(),
        report.received.to_string(),
        report.lost.to_string(),
        report.duplicated.to_string(),
        report.reordered.to_string(),
        report.resets.to_string(),
    ]);
    let mut times = Table::new();
    times.row(["milliseconds", "p50", "p99", "max"]).row(percentiles("message latency", report.latency_ms));
    if !report.migrations.is_empty() {
        times
            .row(percentiles("stall of a client", report.stall_ms))
            .row(percentiles("added stall (stall - freeze)", report.added_stall_ms))
            .row(percentiles("waited besides the freeze", report.beside_freeze_ms));
    }
    let mut text = format!("{counts}\n{times}");
    if !report.migrations.is_empty() {
        text += &format!(
            "  stalls are over {} clients (counted per migration) with a message in a freeze window\n\n{}",
            report.stalled_clients,
            migrations(report)
        );
    }
    if report.unreadable > 0 {
        text += &format!("\n  {} replies could not be read\n", report.unreadable);
    }
    if let Some(verification) = report.verification {
        text += &format!(
            "\n  the server's own count: {} answered messages forgotten, {} executed twice\n",
            verification.forgotten, verification.extra
        );
    }
    for error in &report.errors {
        text += &format!("  {error}\n");
    }
    text
}

fn percentiles(name: &str, values: Percentiles) -> [String; 4] {
    [name.to_owned(), number(values.p50), number(values.p99), number(values.max)]
}

fn migrations(report: &DrillReport) -> Table {
    let mut table = Table::new();
    table.row(["migration", "outcome", "freeze ms", "flip us", "1st replay us", "held", "dropped", "image"]);
    for (index, migration) in report.migrations.iter().enumerate() {
        let coordinated = &migration.coordinated;
        table.row([
            format!("{} {} to {}", index + 1, migration.from, migration.to),
            outcome(coordinated.outcome).to_owned(),
            number(coordinated.freeze_ms),
            number(coordinated.flip_us),
            coordinated.first_replay_us.map_or("-".to_owned(), number),
            coordinated.held_packets.to_string(),
            coordinated.dropped_packets.to_string(),
            bytes(coordinated.image_bytes),
        ]);
    }
    table
}

fn outcome(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::NotMigrated => "not migrated",
        Outcome::Committed => "committed",
        Outcome::RolledBack => "rolled back",
        Outcome::InDoubt => "in doubt",
    }
}

/// One sentence.
pub fn verdict(report: &DrillReport, well: bool) -> String {
    let moves = report.migrations.len();
    match (well, moves) {
        (true, 0) => "all messages were answered, once and in order.".to_owned(),
        (true, _) => format!(
            "the server moved {moves} times; every message was answered, once and in order, and no connection broke."
        ),
        (false, _) => format!(
            "NOT GOOD: {} lost, {} duplicated, {} reordered, {} resets, outcome {}.",
            report.lost,
            report.duplicated,
            report.reordered,
            report.resets,
            outcome(report.outcome)
        ),
    }
}
