//! Migrations from a seed: the load balancer's migrations with their journal, the coordinator and the agents as they
//! are, over a simulated clock, network, and host with CRIU, all of which break at random.
//!
//! ```text
//! Migrations, Control, coordinator::drive      (real)      agent::{server, session, source, target} x 2
//!        |                |                                        |                 |
//!  MemoryDatapath   AgentClient -- HTTP/2 over `wire` -- hyper, axum          `host`, `criu`
//!        |                                                                           |
//!        '------------------------------ `world`: what is true, and the rules -------'
//! ```
//!
//! * [`world`]: the copies, what clients hear, the rules that may never be broken.
//! * [`party`]: the load balancer and the agents, each of which can be killed.
//! * [`wire`]: connections; [`host`], [`criu`]: what agents find at their sites.
//!
//! What is not simulated: TLS, the datapath, memory that comes after the restore, containers, a machine that is switched
//! off.

mod criu;
mod host;
mod party;
#[path = "../../../tests/differential/random.rs"]
mod random;
mod wire;
mod world;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::Method;
use migrate::client::AgentClient;
use migrate::protocol::{Part, Role};
use migrate::system;
use tokio::task::JoinSet;
use tokio::time::Instant;

use self::party::{BALANCER, NAMES, Parties};
use self::wire::{LATENESS, Network, PARTIES, link_of};
use self::world::{BACKEND, Broken, SITES, World};
use super::{MigrationState, Migrations, Verdict, Wish};
use crate::control::Policy;

/// How many seeds are played, unless `DROVER_SEEDS` says otherwise.
const SEEDS: u64 = 10_000;
/// How long everything may take to be well again once nothing breaks any more.
const SETTLE_LIMIT: Duration = Duration::from_secs(900);

/// What came of one seed.
#[derive(Debug, Default, PartialEq, Eq)]
struct Played {
    /// The rule that was broken, if one was.
    violation: Option<String>,
    trace: Vec<String>,
    /// How often, by kind.
    faults: BTreeMap<&'static str, u64>,
    /// How often, by the migration's end.
    ends: BTreeMap<&'static str, u64>,
}

/// What is written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trace {
    Nothing,
    /// What happens in the world.
    World,
    /// What the programs log, besides.
    Logs,
}

fn play(seed: u64, broken: Broken, trace: Trace) -> Played {
    let folder =
        tempfile::tempdir_in(if std::path::Path::new("/dev/shm").exists() { "/dev/shm" } else { "." });
    let folder = folder.expect("a folder");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let runtime = runtime.expect("a runtime");
    let (world, ends) = runtime.block_on(async {
        let world = World::new(seed, broken, folder.path().to_owned(), trace != Trace::Nothing);
        let ends = logged(&world, trace, live(&world)).await;
        (world, ends)
    });
    drop(runtime);
    let faults = world.lock().faults.clone();
    Played { violation: world.violation(), trace: world.take_trace(), faults, ends }
}

/// One seed's life: an operator who moves the server while things break, then quiet, then one last move.
async fn live(world: &Arc<World>) -> BTreeMap<&'static str, u64> {
    let network = Network::new(world.clone());
    let parties = Parties::new(world.clone(), network.clone());
    for party in [1, 2, BALANCER] {
        parties.start(party);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let failing = world.lock().random.pick(&[0, 0, 60, 15]);
    world.lock().failing = failing;
    let mut mending = JoinSet::new();
    tokio::select! {
        biased;
        () = operate(world, &parties) => {}
        () = break_things(world, &network, &parties, &mut mending) => {}
    }
    world.calm();
    while mending.join_next().await.is_some() {}
    world.note(format_args!("nothing breaks any more"));
    tidy(world, &parties).await;
    settle(world, &parties).await;
    let before = count(&parties);
    if world.violation().is_none() {
        move_it(world, &parties).await;
        settle(world, &parties).await;
        let committed = |ends: &BTreeMap<_, _>| ends.get("committed").copied().unwrap_or(0);
        let ends = count(&parties);
        if committed(&ends) != committed(&before) + 1 {
            world.violate(format_args!("a migration of which nothing was broken was not committed"));
        }
        return ends;
    }
    before
}

/// Migrations, there and back, of which some are called off.
async fn operate(world: &Arc<World>, parties: &Arc<Parties>) {
    for _ in 0..1 + world.below(3) {
        for _ in 0..world.below(5) {
            world.break_in(world.below(200));
        }
        let id = move_it(world, parties).await;
        if world.below(6) == 0 {
            world.pause(0, 400).await;
            if let Some(migrations) = parties.migrations()
                && let Some(id) = id
                && migrations.abort(&id).is_ok()
            {
                world.fault("abort by an operator", format_args!("an operator calls {id} off"));
            }
        }
        world.pause(100, 4000).await;
    }
}

/// Begins to move the server to where it is not; the migration's id.
async fn move_it(world: &Arc<World>, parties: &Arc<Parties>) -> Option<String> {
    for _ in 0..100 {
        if let (Some((location, _)), Some(balancer), Some(migrations)) =
            (world.gate(), parties.life(BALANCER), parties.migrations())
        {
            let (backend, to) = (BACKEND.to_owned(), SITES[1 - location].to_owned());
            let wish = Wish { backend, to, policy: Policy::Hold, deadline: None };
            let started = system::inside(balancer, async { migrations.start(&wish) }).await;
            match started {
                Ok(migration) => {
                    world.note(format_args!("{} begins, to {}", migration.id, migration.to));
                    return Some(migration.id.clone());
                }
                Err(error) => world.note(format_args!("not begun: {error}")),
            }
            resolve(world, parties, &migrations).await;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    None
}

/// An operator who has waited long says now and then that the source's copy counts. On the way back the same word says
/// that it runs, which is said only by who sees it, and nothing in its agent that would stop it: its agent may not have
/// heard of the way back yet, and still take a `freeze` that was long on its way.
async fn resolve(world: &Arc<World>, parties: &Parties, migrations: &Migrations) {
    for migration in migrations.all() {
        let view = migration.view();
        if view.state != MigrationState::InDoubt || view.report.is_some() || world.below(20) > 0 {
            continue;
        }
        let source = SITES.iter().position(|site| *site == view.from).expect("it is one of them");
        let goes_back = view.phases.last().is_some_and(|phase| phase.name == "rollback");
        if goes_back && (!world.runs_at(source) || parties.has_part(source + 1)) {
            continue;
        }
        match migrations.resolve(&view.id, Verdict::RolledBack).await {
            Ok(_) => {
                world.fault("resolved by an operator", format_args!("{} is to go back", view.id));
                if !goes_back {
                    world.give_up_newest();
                }
            }
            Err(error) => world.note(format_args!("not resolved: {error}")),
        }
    }
}

/// Breaks something whenever the world says that it is time.
async fn break_things(
    world: &Arc<World>,
    network: &Arc<Network>,
    parties: &Arc<Parties>,
    mending: &mut JoinSet<()>,
) {
    loop {
        world.due.notified().await;
        if let Some(target) = world.take_aim() {
            // As it comes to doubts: the target cannot be asked, and may lose its agent besides.
            let time = world.between(1_000, 60_000);
            world.fault(
                "link cut at the flip",
                format_args!("{} from the load balancer, {time:?}", SITES[target]),
            );
            network.cut(link_of(BALANCER, target + 1), time);
            mending.spawn(tokio::time::sleep(time + LATENESS));
            if world.below(2) == 0 {
                world.break_in(world.below(6));
            }
            continue;
        }
        let long = world.below(8) == 0;
        match world.below(10) {
            which @ 0..=4 => {
                let party = [BALANCER, 1, 2, 1, 2][which as usize];
                if !parties.is_alive(party) {
                    continue;
                }
                world.fault(
                    ["daemon killed", "agent killed", "agent killed"][party],
                    format_args!("{}", NAMES[party]),
                );
                parties.kill(party);
                let (parties, after) =
                    (parties.clone(), world.between(20, if long { 30_000 } else { 2_000 }));
                mending.spawn(async move {
                    tokio::time::sleep(after).await;
                    parties.start(party);
                });
            }
            which @ 5..=6 => {
                let site = which as usize - 5;
                if world.kill_criu(site) > 0 {
                    world.fault("CRIU killed", format_args!("CRIU at {}", SITES[site]));
                }
            }
            which => {
                let link = world.below(PARTIES as u64) as usize;
                let time = world.between(20, if long { 40_000 } else { 4_000 });
                let kind = match which {
                    7 => {
                        network.cut(link, time);
                        "link cut"
                    }
                    8 => {
                        network.slow(link, time);
                        "link slow"
                    }
                    _ => {
                        network.reset(link);
                        "connections broken"
                    }
                };
                world.fault(kind, format_args!("{kind}: all but {}, {time:?}", NAMES[link]));
                mending.spawn(tokio::time::sleep(time + LATENESS));
            }
        }
    }
}

/// An operator reads the reports, and removes what a source could not be told to remove, as they say.
async fn tidy(world: &Arc<World>, parties: &Arc<Parties>) {
    let ended = async {
        while parties.migrations().is_none_or(|migrations| migrations.running() > 0) {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    };
    if tokio::time::timeout(SETTLE_LIMIT, ended).await.is_err() {
        return world.violate(format_args!("in the end a migration does not end"));
    }
    let (Some(balancer), Some(migrations)) = (parties.life(BALANCER), parties.migrations()) else { return };
    for migration in migrations.all() {
        let view = migration.view();
        let reason = view.report.and_then(|report| report.reason).unwrap_or_default();
        let (site, role, verb) = match view.state {
            MigrationState::Committed if reason.contains("remove it there") => {
                (&view.from, Role::Source, "release")
            }
            MigrationState::RolledBack if reason.contains("may hold a suspended copy") => {
                (&view.to, Role::Target, "abort")
            }
            _ => continue,
        };
        world.fault("copy left to an operator", format_args!("{}: {verb} by hand at {site}", view.id));
        let agent = migrations.config.get().agent_at(site).expect("it has one");
        let part = Part { role, workload: BACKEND.to_owned() };
        let path = format!("/v1/migrations/{}/{verb}", view.id);
        let tell = async |path: String| {
            let client = AgentClient::new(&agent)?;
            client
                .json::<_, serde_json::Value>(Method::POST, &path, Some(&part), Duration::from_secs(5))
                .await
        };
        // Its agent may be starting at this moment.
        tokio::time::sleep(Duration::from_secs(10)).await;
        let mut told = system::inside(balancer.clone(), tell(path)).await;
        let location = world.gate().map_or(0, |(location, _)| location);
        if role == Role::Target && *site != SITES[location] && world.has_copy(1 - location) {
            // An agent that was restarted knows nothing of the migration, but has the copy.
            told = system::inside(balancer.clone(), tell(format!("/v1/workloads/{BACKEND}/stop"))).await;
        }
        if let Err(error) = told {
            world.violate(format_args!("what was left at {site} could not be removed by hand: {error}"));
        }
    }
}

/// Waits until everything is well, or has had time enough for it.
async fn settle(world: &Arc<World>, parties: &Arc<Parties>) {
    let until = Instant::now() + SETTLE_LIMIT;
    loop {
        tokio::time::sleep(Duration::from_millis(500)).await;
        world.look();
        let running = parties.migrations().map_or(1, |migrations| migrations.running());
        let wrong = match (running, parties.is_migrating()) {
            (0, false) => world.remains(),
            (0, true) => Some("an agent has a part in a migration that is over".to_owned()),
            _ => Some("a migration does not end".to_owned()),
        };
        match wrong {
            None => return,
            _ if world.violation().is_some() => return,
            Some(wrong) if Instant::now() >= until => {
                return world.violate(format_args!("in the end {wrong}"));
            }
            Some(_) => {}
        }
    }
}

/// How the migrations ended that the load balancer remembers.
fn count(parties: &Parties) -> BTreeMap<&'static str, u64> {
    let mut ends = BTreeMap::new();
    for migration in parties.migrations().iter().flat_map(|migrations| migrations.all()) {
        let end = match migration.view().state {
            MigrationState::Running => "running",
            MigrationState::Committed => "committed",
            MigrationState::RolledBack => "rolled back",
            MigrationState::InDoubt => "in doubt",
        };
        *ends.entry(end).or_default() += 1;
    }
    ends
}

/// Lets what the programs log into the trace.
async fn logged<T>(world: &Arc<World>, trace: Trace, work: impl Future<Output = T>) -> T {
    use tracing::instrument::WithSubscriber as _;
    if trace != Trace::Logs {
        return work.await;
    }
    let world = world.clone();
    let filter = tracing_subscriber::EnvFilter::new("off,migrate=debug,lb=debug");
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .without_time()
        .with_ansi(false)
        .with_writer(move || Lines(world.clone()))
        .finish();
    let guard = tracing::subscriber::set_default(log);
    let done = work.with_current_subscriber().await;
    drop(guard);
    done
}

/// Takes whole lines.
struct Lines(Arc<World>);

impl std::io::Write for Lines {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        self.0.note(format_args!("  {}", String::from_utf8_lossy(line).trim_end()));
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A number from the environment.
fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

#[test]
fn whatever_breaks_every_migration_ends_well() {
    if let Some(seed) = number("DROVER_SEED") {
        let played = play(seed, Broken::Nothing, Trace::Logs);
        println!("{}", played.trace.join("\n"));
        assert_eq!(played.violation, None, "seed {seed}");
        return;
    }
    let seeds = number("DROVER_SEEDS").unwrap_or(SEEDS);
    let (next, total) = (AtomicU64::new(0), Mutex::new(Played::default()));
    let failed = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Relaxed);
                    if seed >= seeds {
                        return;
                    }
                    let played = play(seed, Broken::Nothing, Trace::Nothing);
                    let mut total = total.lock().unwrap();
                    for (kind, times) in played.faults {
                        *total.faults.entry(kind).or_default() += times;
                    }
                    for (end, times) in played.ends {
                        *total.ends.entry(end).or_default() += times;
                    }
                    drop(total);
                    failed.lock().unwrap().extend(played.violation.map(|violation| (seed, violation)));
                }
            });
        }
    });
    let total = total.into_inner().unwrap();
    println!("{seeds} seeds\nmigrations: {:?}\nfaults: {:?}", total.ends, total.faults);
    let failed = failed.into_inner().unwrap();
    for (seed, violation) in failed.iter().take(40) {
        println!("seed {seed}: {violation}");
    }
    let Some((seed, violation)) = failed.first_key_value() else { return };
    panic!(
        "{} of {seeds} seeds failed, the first with: {violation}. To see how:\n\
         DROVER_SEED={seed} cargo nextest run -p lb --no-capture whatever_breaks_every_migration_ends_well",
        failed.len()
    );
}

#[test]
fn a_seed_is_replayed_exactly() {
    for seed in 0..20 {
        let (first, second) =
            (play(seed, Broken::Nothing, Trace::World), play(seed, Broken::Nothing, Trace::World));
        assert!(first.trace.len() > 20, "seed {seed}: {:#?}", first.trace);
        for (one, other) in first.trace.iter().zip(&second.trace) {
            assert_eq!(one, other, "seed {seed}");
        }
        assert_eq!(first, second, "seed {seed}");
    }
}

#[test]
fn a_broken_rule_is_found() {
    for broken in [Broken::Fence, Broken::Mark, Broken::Muting, Broken::Lease] {
        let found = (0..400).find_map(|seed| Some((seed, play(seed, broken, Trace::Nothing).violation?)));
        println!("{broken:?}: {found:?}");
        assert!(found.is_some(), "{broken:?} was not found");
    }
}
