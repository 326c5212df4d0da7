//! `lb top`: what is carried right now, by service and backend.

use std::collections::BTreeMap;
use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use clap::Args;
use http::Method;

use super::text::{rate, table};
use super::{AdminArgs, ClientError};
use crate::admin::{MemberView, TrafficReport};
use crate::client::AdminClient;
use crate::health::CheckState;

/// Cursor to the top left corner; what is below is cleared once the new text is there.
const HOME: &str = "\x1b[H";
const CLEAR: &str = "\x1b[2J";
const CLEAR_LINE: &str = "\x1b[K";
const CLEAR_BELOW: &str = "\x1b[J";

#[derive(Debug, Args)]
pub(super) struct TopArgs {
    #[command(flatten)]
    admin: AdminArgs,
    /// Show the rates over one interval, then end.
    #[arg(long)]
    once: bool,
    /// Seconds from one look to the next.
    #[arg(long, value_name = "S", default_value_t = 1.0, value_parser = interval)]
    interval: f64,
}

fn interval(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("{text:?} is not a number of seconds"))?;
    if (0.05..=3600.0).contains(&seconds) { Ok(seconds) } else { Err("not within 0.05 and 3600".to_owned()) }
}

pub(super) async fn show(args: &TopArgs) -> Result<(), ClientError> {
    let client = AdminClient::new(&args.admin.admin)?;
    let read = async || client.json::<TrafficReport>(Method::GET, "/v1/traffic", None::<&()>).await;
    let in_place = !args.once && std::io::stdout().is_terminal();
    let mut before = read().await?;
    let mut is_first = true;
    loop {
        tokio::time::sleep(Duration::from_secs_f64(args.interval)).await;
        let after = read().await?;
        let text = render(&before, &after);
        let text = match (in_place, is_first) {
            (true, _) => {
                let lines = text.replace('\n', &format!("{CLEAR_LINE}\n"));
                format!("{}{HOME}{lines}{CLEAR_BELOW}", if is_first { CLEAR } else { "" })
            }
            (false, true) => text,
            (false, false) => format!("\n{text}"),
        };
        // A reader that has seen enough (`| head`) is no failure.
        if std::io::stdout().write_all(text.as_bytes()).and_then(|()| std::io::stdout().flush()).is_err()
            || args.once
        {
            return Ok(());
        }
        (before, is_first) = (after, false);
    }
}

/// What came within an interval, per second.
#[derive(Clone, Copy, Default)]
struct Rates {
    packets_in: f64,
    packets_out: f64,
    bits_in: f64,
    bits_out: f64,
    new_flows: f64,
    resets: f64,
}

impl Rates {
    fn between(before: Option<&MemberView>, after: &MemberView, seconds: f64) -> Self {
        let per_second = |counter: fn(&MemberView) -> u64| {
            counter(after).saturating_sub(before.map_or(0, counter)) as f64 / seconds
        };
        Self {
            packets_in: per_second(|member| member.traffic.to_backend_packets),
            packets_out: per_second(|member| member.traffic.to_clients_packets),
            bits_in: 8.0 * per_second(|member| member.traffic.to_backend_bytes),
            bits_out: 8.0 * per_second(|member| member.traffic.to_clients_bytes),
            new_flows: per_second(|member| member.new_flows),
            resets: per_second(|member| member.resets),
        }
    }

    fn add(&mut self, other: Self) {
        self.packets_in += other.packets_in;
        self.packets_out += other.packets_out;
        self.bits_in += other.bits_in;
        self.bits_out += other.bits_out;
        self.new_flows += other.new_flows;
        self.resets += other.resets;
    }

    fn cells(self) -> [String; 6] {
        [self.packets_in, self.packets_out, self.bits_in, self.bits_out, self.new_flows, self.resets]
            .map(rate)
    }
}

/// A service's rates, and those of each of its backends.
type ServiceRates<'a> = (Rates, Vec<(&'a MemberView, Rates)>);

/// The rates between two looks as tables.
pub(super) fn render(before: &TrafficReport, after: &TrafficReport) -> String {
    let seconds = after.clock_us.saturating_sub(before.clock_us).max(1) as f64 / 1e6;
    let known: BTreeMap<_, _> =
        before.members.iter().map(|member| ((&member.service, &member.backend), member)).collect();
    let mut services: BTreeMap<&str, ServiceRates<'_>> = BTreeMap::new();
    for member in &after.members {
        let former = known.get(&(&member.service, &member.backend)).copied();
        let rates = Rates::between(former, member, seconds);
        let (sum, members) = services.entry(&member.service).or_default();
        sum.add(rates);
        members.push((member, rates));
    }
    let mut rows = Vec::new();
    for (service, (sum, members)) in services {
        rows.push(row([service, "", "", "", "", ""], sum));
        for (member, rates) in members {
            let backend = after.backends.get(&member.backend);
            let location = backend.and_then(|backend| backend.location.as_deref()).unwrap_or("unknown");
            let gate = backend.map_or("unknown", |backend| &backend.gate);
            let held = backend.map_or(0, |backend| backend.hold.held_packets).to_string();
            rows.push(row(["", &member.backend, location, gate, health(member, gate), &held], rates));
        }
    }
    let headings = [
        "SERVICE",
        "BACKEND",
        "LOCATION",
        "GATE",
        "HEALTH",
        "HELD",
        "PKT/S IN",
        "PKT/S OUT",
        "BIT/S IN",
        "BIT/S OUT",
        "NEW/S",
        "RST/S",
    ];
    summary(before, after, seconds) + "\n" + &table(&headings, &rows)
}

fn row(words: [&str; 6], rates: Rates) -> Vec<String> {
    words.map(str::to_owned).into_iter().chain(rates.cells()).collect()
}

/// What a service's check says of a backend. One that is held is not checked: frozen is not down.
fn health(member: &MemberView, gate: &str) -> &'static str {
    match (gate, member.check) {
        ("forward" | "unknown", Some(CheckState::Up)) => "up",
        ("forward" | "unknown", Some(CheckState::Down)) => "DOWN",
        ("forward" | "unknown", Some(CheckState::Untried)) => "unknown",
        ("forward" | "unknown", None) => "-",
        _ => "held",
    }
}

/// Flows, and what packets were dropped for.
fn summary(before: &TrafficReport, after: &TrafficReport, seconds: f64) -> String {
    let of = |standing: &str| -> u64 {
        let tables = after.flow_tables.tables.iter().filter(|table| table.standing == standing);
        tables.map(|table| table.flows).sum()
    };
    let reasons = after.reasons.iter().map(|(label, count)| {
        let former = before.reasons.get(label).copied().unwrap_or(0);
        (label, count.saturating_sub(former) as f64 / seconds)
    });
    let mut reasons: Vec<_> = reasons.filter(|(_, per_second)| *per_second > 0.0).collect();
    reasons.sort_by(|a, b| b.1.total_cmp(&a.1));
    let reasons: Vec<_> =
        reasons.iter().map(|(label, per_second)| format!("{label} {}", rate(*per_second))).collect();
    let reasons = if reasons.is_empty() { "nothing".to_owned() } else { reasons.join(", ") };
    format!("flows: {} established, {} new\npackets/s: {reasons}\n", of("established"), of("newcomers"))
}
