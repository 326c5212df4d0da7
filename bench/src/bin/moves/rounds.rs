//! All cases, one after the other. In each the systems stand side by side and move their servers in turn: what disturbs
//! the machine for a while disturbs all of them. Who is not at its turn rests.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bench::interrupt::Interrupt;
use bench::machine;
use bench::moves::case::Case;
use bench::moves::goals;
use bench::moves::report::{CaseReport, Report, Setting};
use indicatif::{ProgressBar, ProgressStyle};
use lab::processors;

use crate::args::Args;
use crate::measure::{GoesOn, Measured};
use crate::systems::System;

/// What goes on over all cases.
struct Rounds<'a> {
    args: &'a Args,
    interrupt: &'a Interrupt,
    start: Instant,
    rows: Vec<CaseReport>,
    skipped: BTreeMap<String, String>,
    bar: ProgressBar,
}

/// Measures everything that was asked for.
pub fn run(args: &Args, interrupt: &Interrupt) -> anyhow::Result<Report> {
    let mut cases = args.cases();
    let mut skipped = BTreeMap::new();
    for system in System::ALL {
        if let Some(why) =
            system.missing().filter(|_| cases.iter().any(|(_, systems)| systems.contains(&system)))
        {
            eprintln!("skipped {}: {why}", system.name());
            skipped.insert(system.name().to_owned(), why);
            cases.iter_mut().for_each(|(_, systems)| systems.retain(|other| *other != system));
        }
    }
    let setting = setting(args, &cases);
    if let Some((network, _)) = processors::halves() {
        processors::stay_on(&network);
    }
    let total = cases.iter().map(|(case, systems)| args.moves(case) as usize * systems.len()).sum::<usize>();
    let bar = ProgressBar::new(total as u64);
    let style = ProgressStyle::with_template("  {bar:30} {pos}/{len} moves  {msg}  ({elapsed})");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.enable_steady_tick(Duration::from_millis(500));
    let mut rounds = Rounds { args, interrupt, start: Instant::now(), rows: Vec::new(), skipped, bar };
    for (case, systems) in &cases {
        rounds.measure(case, systems)?;
    }
    rounds.bar.finish_and_clear();
    let Rounds { rows, skipped, .. } = rounds;
    Ok(Report {
        setting,
        comparisons: goals::compare(&rows),
        goals: goals::judge(&rows),
        cases: rows,
        skipped,
    })
}

impl Rounds<'_> {
    fn is_over(&self) -> bool {
        self.start.elapsed() >= self.args.limit()
    }

    /// One case. What cannot be set up is said and left out; only an interrupt ends the run.
    fn measure(&mut self, case: &Case, systems: &[System]) -> anyhow::Result<()> {
        if self.is_over() {
            self.skip(case.label(), format!("{} minutes had passed (--minutes)", self.args.minutes));
            return Ok(());
        }
        let position = self.bar.position();
        let mut places = Vec::new();
        for system in systems {
            self.interrupt.check()?;
            self.bar.set_message(format!("{}: starting {}", case.label(), system.name()));
            match Measured::new(*system, case) {
                Ok(place) => places.push((*system, Some(place))),
                Err(error) => self.skip(format!("{}, {}", case.label(), system.name()), format!("{error:#}")),
            }
        }
        let moves = self.args.moves(case);
        for number in 0..moves as usize {
            // Each round begins with another one, so that nobody always follows the same.
            for turn in 0..places.len() {
                let index = (turn + number) % places.len();
                let (system, place) = &mut places[index];
                self.bar.set_message(format!("{}: {} moves", case.label(), system.name()));
                if number == 0 || !self.is_over() {
                    self.move_once(case, *system, place)?;
                }
                self.bar.inc(1);
            }
        }
        for (system, place) in places {
            if let Some(place) = place {
                self.finish(case, system, place)?;
            }
        }
        self.bar.set_position(position + u64::from(moves) * systems.len() as u64);
        Ok(())
    }

    /// One move, after which the place may be done with.
    fn move_once(&mut self, case: &Case, system: System, place: &mut Option<Measured>) -> anyhow::Result<()> {
        let Some(measured) = place else { return Ok(()) };
        if measured.move_once(self.interrupt)? == GoesOn::No
            && let Some(measured) = place.take()
        {
            self.finish(case, system, measured)?;
        }
        Ok(())
    }

    fn finish(&mut self, case: &Case, system: System, measured: Measured) -> anyhow::Result<()> {
        let outcome = measured.finish(self.interrupt)?;
        let row = CaseReport::new(system.name(), *case, outcome);
        let said = format!(
            "{}, {}: freeze {} ms, stall {} ms, {} moves, {} failed, {} lost, {} resets",
            case.label(),
            row.system,
            row.freeze_ms.p50,
            row.stall_ms.p50,
            row.committed,
            row.failed,
            row.lost,
            row.resets
        );
        self.bar.suspend(|| eprintln!("{said}"));
        self.rows.push(row);
        Ok(())
    }

    fn skip(&mut self, what: String, why: String) {
        self.bar.suspend(|| eprintln!("skipped {what}: {why}"));
        self.skipped.insert(what, why);
    }
}

fn setting(args: &Args, cases: &[(Case, Vec<System>)]) -> Setting {
    let measured = |system: &System| cases.iter().any(|(_, systems)| systems.contains(system));
    let systems = System::ALL.into_iter().filter(measured);
    let everywhere = [
        "the server answers requests of 64 bytes and counts them for each connection; its memory is full of random words",
        "up to four probes ask every millisecond, all other connections together 500 times a second",
        "freeze: the longest time in which the server did not run, as it says itself; stall: a probe's longest gap",
        "sent: bytes that the server's site sent to the other; delay and rate are emulated, without both it is a veth pair",
        "images are kept in memory; client, load balancer and link have one half of the processors, the sites the other",
    ];
    Setting {
        moves: cases.iter().map(|(case, _)| args.moves(case)).max().unwrap_or_default(),
        kernel: machine::kernel(),
        processors: machine::processors(),
        everywhere: everywhere.map(str::to_owned).to_vec(),
        systems: systems.map(|system| (system.name().to_owned(), system.describe())).collect(),
    }
}
