//! All systems in turn, several times: what disturbs the machine for a while disturbs all of them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use bench::interrupt::{Interrupt, Interrupted};
use bench::machine;
use bench::path::goals;
use bench::path::processors::Busy;
use bench::path::report::{Direction, Links, PathReport, Samples, Setting};
use indicatif::{ProgressBar, ProgressStyle};

use crate::args::{Args, LinksChoice, Measurement};
use crate::measure::{self, Measuring, Step};
use crate::place::{self, Offloads, Place, Processors};
use crate::systems::{System, find};

/// How long it is looked what others do on the machine.
const QUIET: Duration = Duration::from_millis(500);

/// A system with its links.
#[derive(Clone, Copy)]
struct Variant {
    system: System,
    links: Links,
    offloads: Offloads,
}

impl Variant {
    fn name(self) -> String {
        format!("{} ({} links)", self.system.name(), self.links.name())
    }
}

/// What goes on over all rounds.
struct Rounds<'a> {
    args: &'a Args,
    interrupt: &'a Interrupt,
    steps: Vec<Step>,
    iperf: Option<PathBuf>,
    samples: Samples,
    skipped: BTreeMap<String, String>,
    bar: ProgressBar,
}

/// Measures everything that was asked for.
pub fn run(args: &Args, interrupt: &Interrupt) -> anyhow::Result<PathReport> {
    let (variants, skipped) = variants(args);
    let steps = steps(args);
    let iperf = args.wants(Measurement::Tcp).then(|| find("iperf3")).flatten();
    let bar = ProgressBar::new((variants.len() * steps.len()) as u64 * u64::from(args.rounds()));
    let style = ProgressStyle::with_template("  {bar:30} {pos}/{len}  {msg}  ({elapsed}, {eta} left)");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let mut rounds = Rounds { args, interrupt, steps, iperf, samples: Samples::default(), skipped, bar };
    for (what, why) in &rounds.skipped {
        println!("skipped {what}: {why}");
    }
    let mut others_busy: f64 = 0.0;
    for round in 0..args.rounds() as usize {
        rounds.bar.set_message("looking whether the machine is quiet");
        others_busy = others_busy.max(busy_share(interrupt)?);
        // Each round begins with another one, so that nobody always follows the same.
        for place in 0..variants.len() {
            let index = (place + round) % variants.len();
            rounds.bar.set_message(format!("round {}: {}", round + 1, variants[index].name()));
            rounds.measure(index, variants[index])?;
        }
    }
    rounds.bar.finish_and_clear();
    let names: Vec<_> =
        variants.iter().map(|variant| (variant.system.name().to_owned(), variant.links)).collect();
    let rows = rounds.samples.rows(&names);
    let comparisons = goals::compare(&rows);
    let setting = Setting { others_busy, ..setting(args, &variants) };
    Ok(PathReport { setting, rows, comparisons, skipped: rounds.skipped })
}

impl Rounds<'_> {
    /// One system in a fresh place. What cannot be started is said and not tried again; only an interrupt ends the run.
    fn measure(&mut self, index: usize, variant: Variant) -> anyhow::Result<()> {
        let before = self.bar.position();
        if self.skipped.contains_key(&variant.name()) {
            self.bar.set_position(before + self.steps.len() as u64);
            return Ok(());
        }
        if let Err(error) = self.measure_steps(index, variant) {
            if error.is::<Interrupted>() {
                return Err(error);
            }
            self.skip(variant.name(), format!("{error:#}"));
        }
        self.bar.set_position(before + self.steps.len() as u64);
        Ok(())
    }

    fn measure_steps(&mut self, index: usize, variant: Variant) -> anyhow::Result<()> {
        self.interrupt.check()?;
        let mut place = Place::new(variant.offloads, self.iperf.as_deref())?;
        let mut running = variant.system.start(&place)?;
        let (system, duration, interrupt) = (variant.system, self.args.duration(), self.interrupt);
        let mut measuring =
            Measuring { place: &mut place, system, duration, interrupt, iperf: self.iperf.clone() };
        measuring.wait_until_ready(&mut running)?;
        for step in self.steps.clone() {
            if step != Step::Udp || system.has_udp() {
                match measuring.run(step) {
                    Ok(found) => {
                        found
                            .into_iter()
                            .for_each(|(subject, sample)| self.samples.add(index, subject, sample));
                    }
                    Err(error) if error.is::<Interrupted>() => return Err(error),
                    Err(error) => self.skip(format!("{} {step:?}", variant.name()), format!("{error:#}")),
                }
            }
            self.bar.inc(1);
        }
        drop(running);
        Ok(())
    }

    fn skip(&mut self, what: String, why: String) {
        self.bar.suspend(|| println!("skipped {what}: {why}"));
        self.skipped.insert(what, why);
    }
}

/// How busy the machine is while nothing is measured, 0 to 1.
fn busy_share(interrupt: &Interrupt) -> anyhow::Result<f64> {
    let (busy, start) = (Busy::now()?, std::time::Instant::now());
    interrupt.sleep(QUIET)?;
    let count = std::thread::available_parallelism().map_or(1, usize::from) as f64;
    Ok(Busy::now()?.seconds_since(busy) / start.elapsed().as_secs_f64() / count)
}

/// What is to be measured, and what of it cannot be.
fn variants(args: &Args) -> (Vec<Variant>, BTreeMap<String, String>) {
    let mut skipped = BTreeMap::new();
    let mut variants = Vec::new();
    let wanted = if args.systems.is_empty() { System::ALL.to_vec() } else { args.systems.clone() };
    for system in wanted {
        if let Some(reason) = system.missing() {
            skipped.insert(system.name().to_owned(), reason);
            continue;
        }
        for (links, choice) in [(Links::Same, LinksChoice::Same), (Links::Best, LinksChoice::Best)] {
            let wanted = args.links.is_empty() || args.links.contains(&choice);
            if let Some(offloads) = system.offloads(links).filter(|_| wanted) {
                variants.push(Variant { system, links, offloads });
            }
        }
    }
    (variants, skipped)
}

fn steps(args: &Args) -> Vec<Step> {
    let requests = args.connections.iter().map(|count| Step::Requests(*count));
    let all = requests
        .map(|step| (Measurement::Requests, step))
        .chain([(Measurement::Connections, Step::Connections)])
        .chain([Direction::Up, Direction::Down].map(|way| (Measurement::Tcp, Step::Tcp(way))))
        .chain([(Measurement::Udp, Step::Udp)]);
    all.filter(|(measurement, _)| args.wants(*measurement)).map(|(_, step)| step).collect()
}

fn setting(args: &Args, variants: &[Variant]) -> Setting {
    let mut everywhere = place::describe();
    everywhere.push(Processors::split().describe());
    everywhere.push(format!(
        "requests and answers of 64 bytes; {} new connections under way at a time; {} UDP flows of {}-byte datagrams",
        measure::IN_FLIGHT,
        measure::FLOWS,
        measure::DATAGRAM_BYTES
    ));
    everywhere.push(format!("same links: {}", Offloads::Off.describe()));
    everywhere.push(format!("best links: {}", Offloads::On.describe()));
    Setting {
        rounds: args.rounds(),
        seconds: args.duration().as_secs_f64(),
        kernel: machine::kernel(),
        processors: machine::processors(),
        others_busy: 0.0,
        everywhere,
        systems: variants.iter().map(|one| (one.system.name().to_owned(), one.system.describe())).collect(),
    }
}
