//! A small picture of message latency around a cutover, for a terminal without colors.
//!
//! ```text
//!  20 ms |              #
//!        |              ##.
//!        |              ####.
//!   0 ms |______________#######______________
//!         ppppppppppppphdffttttrrrrccll
//!                         ======                frozen
//!                               ^               flip
//! ```
//! Each column is a span of time: its bar is the worst latency of the messages that were due in it, the
//! letters below say which phase took most of it.

use crate::timeline::Timeline;

/// A span of time with a name, in the timeline's nanoseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Such as `hold`.
    pub name: String,
    /// Its beginning.
    pub from_ns: i64,
    /// Its end.
    pub to_ns: i64,
}

/// What is drawn.
#[derive(Clone, Debug)]
pub struct Scene<'a> {
    /// Whose messages.
    pub timeline: &'a Timeline,
    /// The migration's phases, in order.
    pub phases: &'a [Span],
    /// The freeze window, if there was one.
    pub freeze: Option<(i64, i64)>,
    /// Width of the terminal in characters; more than 120 are not used.
    pub width: usize,
}

/// Rows of the bars.
const ROWS: usize = 8;

/// Characters left of the bars: a number, ` ms`, and the axis.
const MARGIN: usize = 11;

/// A bar's height in eighths of a row.
const EIGHTHS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// A message that was lost.
const LOST: char = '×';

/// What came of the messages that were due in a column.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Column {
    /// None was due.
    Idle,
    /// The worst latency.
    Worst(u64),
    /// One was never answered.
    Lost,
}

/// The columns' scale.
#[derive(Clone, Copy, Debug)]
struct Axis {
    from_ns: i64,
    step_ns: i64,
    columns: usize,
}

impl Axis {
    /// Shows the migration from its hold to its end, and the time until all is calm again, with some calm
    /// time on both sides. What comes before, which no client that is there notices, is mostly left out.
    fn new(scene: &Scene<'_>) -> Self {
        let columns = scene.width.clamp(MARGIN + 20, 120) - MARGIN - 1;
        let felt = || scene.phases.iter().filter(|phase| !["prepare", "hold_new"].contains(&&*phase.name));
        let first = felt().map(|phase| phase.from_ns).min().unwrap_or_default();
        let last = felt().map(|phase| phase.to_ns).max().unwrap_or(first).max(first);
        // Messages that waited may be answered long after the last phase, as after a dropped packet.
        let waited = scene.timeline.touching(first, last).filter(|message| (message.due_ns as i64) < last);
        let calm = waited.filter_map(|message| message.answered_ns).map(|ns| ns as i64).max().unwrap_or(last);
        let felt_ns = (last.max(calm) - first).max(1_000_000);
        // The part that matters gets 5/8 of the columns: a quarter before, an eighth after.
        let step_ns = round_up((felt_ns * 8 / 5) / columns as i64);
        Self { from_ns: first - step_ns * (columns as i64 / 4), step_ns, columns }
    }

    fn start_of(&self, column: usize) -> i64 {
        self.from_ns + self.step_ns * column as i64
    }

    fn column_of(&self, at_ns: i64) -> Option<usize> {
        let column = usize::try_from((at_ns - self.from_ns).div_euclid(self.step_ns)).ok()?;
        (column < self.columns).then_some(column)
    }
}

/// The next of 1, 2, 5, 10, 20, ... times 100 us.
fn round_up(ns: i64) -> i64 {
    let mut decade = 100_000;
    loop {
        for factor in [1, 2, 5] {
            if decade * factor >= ns {
                return decade * factor;
            }
        }
        decade *= 10;
    }
}

/// Draws; each line ends with a newline and fits into the width.
pub fn draw(scene: &Scene<'_>) -> String {
    let axis = Axis::new(scene);
    let columns = columns(scene.timeline, &axis);
    let top_ns = columns.iter().map(|column| if let Column::Worst(ns) = column { *ns } else { 0 }).max();
    let top_ns = top_ns.unwrap_or_default().max(1_000_000);
    let mut lines = Vec::new();
    for row in (0..ROWS).rev() {
        let label = match row {
            _ if row == ROWS - 1 => milliseconds(top_ns),
            _ if row == ROWS / 2 - 1 => milliseconds(top_ns / 2),
            _ => String::new(),
        };
        let bars: String = columns.iter().map(|column| cell(*column, row, top_ns)).collect();
        lines.push(format!("{label:>9} │{bars}"));
    }
    lines.push(format!("{:>9} └{}", milliseconds(0), "─".repeat(axis.columns)));
    lines.push(format!("{:>9}  {}", "phase", phase_letters(scene.phases, &axis)));
    if let Some((from_ns, to_ns)) = scene.freeze {
        lines.push(format!("{:>9}  {}", "frozen", stretch(from_ns, to_ns, &axis)));
    }
    if let Some(flip) = scene.phases.iter().find(|phase| phase.name == "flip") {
        lines.push(format!("{:>9}  {}", "flip", mark(flip.to_ns, &axis)));
    }
    let zero_ns = axis.start_of(axis.columns / 4);
    lines.push(time_labels(&axis, zero_ns));
    lines.extend(legend(scene.phases, scene.width.clamp(MARGIN + 20, 120)));
    lines.iter().flat_map(|line| [line.trim_end(), "\n"]).collect()
}

fn columns(timeline: &Timeline, axis: &Axis) -> Vec<Column> {
    let mut columns = vec![Column::Idle; axis.columns];
    for message in timeline.touching(axis.from_ns, axis.start_of(axis.columns)) {
        let Some(index) = axis.column_of(message.due_ns as i64) else { continue };
        columns[index] = match (columns[index], message.latency_ns()) {
            (Column::Lost, _) | (_, None) => Column::Lost,
            (Column::Idle, Some(ns)) => Column::Worst(ns),
            (Column::Worst(worst), Some(ns)) => Column::Worst(worst.max(ns)),
        };
    }
    columns
}

fn cell(column: Column, row: usize, top_ns: u64) -> char {
    match column {
        Column::Idle => ' ',
        Column::Lost => LOST,
        Column::Worst(ns) => {
            // Rounded up, so that any message at all leaves a trace.
            let eighths = (ns * (ROWS as u64 * 8)).div_ceil(top_ns).max(1) as usize;
            EIGHTHS[eighths.saturating_sub(row * 8).min(8)]
        }
    }
}

fn milliseconds(ns: u64) -> String {
    format!("{} ms", crate::table::number(ns as f64 / 1e6))
}

/// The letter of a phase: its first, unless another phase has that. `flip`, which is too short for a column,
/// has a line of its own.
fn letter(name: &str) -> char {
    match name {
        "release" => 'l',
        "hold_new" => 'n',
        "rollback" => 'b',
        _ => name.chars().next().unwrap_or('?'),
    }
}

fn phase_letters(phases: &[Span], axis: &Axis) -> String {
    let in_column = |column: usize| {
        let (from_ns, to_ns) = (axis.start_of(column), axis.start_of(column + 1));
        let share = |phase: &&Span| phase.to_ns.min(to_ns) - phase.from_ns.max(from_ns);
        let phases = phases.iter().filter(|phase| phase.name != "flip");
        phases.max_by_key(share).filter(|phase| share(phase) > 0).map_or('·', |phase| letter(&phase.name))
    };
    (0..axis.columns).map(in_column).collect()
}

fn stretch(from_ns: i64, to_ns: i64, axis: &Axis) -> String {
    let inside = |column: &usize| axis.start_of(column + 1) > from_ns && axis.start_of(*column) < to_ns;
    (0..axis.columns).map(|column| if inside(&column) { '━' } else { ' ' }).collect()
}

fn mark(at_ns: i64, axis: &Axis) -> String {
    axis.column_of(at_ns).map_or_else(String::new, |column| format!("{:column$}▲", ""))
}

/// Times relative to the hold, under every twentieth column.
fn time_labels(axis: &Axis, zero_ns: i64) -> String {
    let mut line = format!("{:>9}  ", "time");
    for column in (axis.columns / 4 % 20..axis.columns).step_by(20) {
        let label = format!("{:+} ms", (axis.start_of(column) - zero_ns) as f64 / 1e6);
        let label = if axis.start_of(column) == zero_ns { "0".to_owned() } else { label };
        let at = MARGIN + column;
        if at + label.len() <= MARGIN + axis.columns {
            let used = line.chars().count();
            line += &format!("{:gap$}{label}", "", gap = at.saturating_sub(used));
        }
    }
    line
}

/// Each phase with its letter and length, wrapped to the width.
fn legend(phases: &[Span], width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    let mut line = String::new();
    for phase in phases {
        let length_ms = (phase.to_ns - phase.from_ns) as f64 / 1e6;
        let sign = if phase.name == "flip" { '▲' } else { letter(&phase.name) };
        let entry = format!("  {sign} {} {} ms", phase.name, crate::table::number(length_ms));
        if MARGIN + line.chars().count() + entry.chars().count() > width {
            lines.push(format!("{:9}{line}", ""));
            line.clear();
        }
        line += &entry;
    }
    lines.push(format!("{:9}{line}", ""));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::timeline::constructed::{message, timeline};

    fn span(name: &str, from_ms: f64, to_ms: f64) -> Span {
        Span { name: name.into(), from_ns: (from_ms * 1e6) as i64, to_ns: (to_ms * 1e6) as i64 }
    }

    fn phases() -> Vec<Span> {
        vec![
            span("prepare", 900.0, 1000.0),
            span("hold", 1000.0, 1002.0),
            span("drain", 1002.0, 1004.0),
            span("freeze", 1004.0, 1008.0),
            span("transfer", 1008.0, 1012.0),
            span("restore", 1012.0, 1020.0),
            span("flip", 1020.0, 1020.05),
            span("confirm", 1020.1, 1022.0),
            span("release", 1022.0, 1024.0),
        ]
    }

    /// A message each 0.5 ms; those due in the hold are answered at its end.
    fn cutover(lost_at_ms: Option<f64>) -> Timeline {
        let messages = (0..400u64).map(|n| {
            let due = 900.0 + n as f64 * 0.5;
            let answered = if (1000.0..1020.0).contains(&due) { 1021.0 } else { due + 0.2 };
            message(0, n + 1, due, (lost_at_ms != Some(due)).then_some(answered))
        });
        timeline(1, messages.collect())
    }

    fn picture(timeline: &Timeline, width: usize) -> Vec<String> {
        let freeze = Some((1_004_000_000, 1_020_000_000));
        draw(&Scene { timeline, phases: &phases(), freeze, width }).lines().map(str::to_owned).collect()
    }

    #[test]
    fn it_fits_into_80_columns_and_into_silly_terminals() {
        for (given, at_most) in [(80, 80), (0, 31), (40, 40), (1000, 120)] {
            for line in picture(&cutover(None), given) {
                assert!(line.chars().count() <= at_most, "{given}: {line}");
            }
        }
    }

    #[test]
    fn the_cutover_stands_out_and_the_phases_are_below_it() {
        let lines = picture(&cutover(None), 80);
        assert!(lines[0].starts_with("  21.0 ms │"), "{}", lines[0]);
        let column = |line: &str, sign: char| line.chars().position(|found| found == sign);
        let peak = column(&lines[0], '█');
        let named = |name: &str| lines.iter().find(|line| line.trim_start().starts_with(name)).unwrap();
        assert!(peak.is_some());
        assert_eq!(peak, column(&named("phase")[9..], 'h').map(|at| at + 9));
        for sign in ['h', 'd', 'f', 't', 'r', 'c', 'l'] {
            assert!(named("phase")[9..].contains(sign), "{sign}: {}", named("phase"));
        }
        assert!(named("frozen").contains('━'));
        assert!(named("flip").contains('▲'));
        assert_eq!(peak, column(&named("time")[9..], '0').map(|at| at + 9));
        assert!(!lines.concat().contains(LOST));
    }

    #[test]
    fn a_lost_message_cannot_be_overlooked() {
        let lines = picture(&cutover(Some(1010.0)), 80);
        assert!(lines[..ROWS].iter().all(|line| line.contains(LOST)), "{lines:#?}");
    }

    #[test]
    fn a_run_without_messages_or_phases_draws_too() {
        let empty = timeline(1, vec![]);
        draw(&Scene { timeline: &empty, phases: &[], freeze: None, width: 80 });
    }

    #[test]
    fn steps_are_round() {
        for (ns, step) in [(1, 100_000), (100_001, 200_000), (400_000, 500_000), (3_000_000, 5_000_000)] {
            assert_eq!(round_up(ns), step);
        }
    }
}
