//! The commands against the API over a datapath in memory.

use std::sync::{Arc, Mutex};

use clap::CommandFactory as _;

use super::*;
use crate::admin::tests::{Play, Server};
use crate::datapath::HoldStats;
use crate::migrations::{MigrationState, MigrationView};

#[derive(Clone, Default)]
struct Paper(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Paper {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Paper {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

fn migrate_args(arguments: &[&str]) -> MigrateArgs {
    let cli = Cli::try_parse_from([&["lb", "migrate"], arguments].concat()).unwrap();
    match cli.command {
        Command::Migrate(args) => args,
        other => panic!("{other:?}"),
    }
}

/// Runs `lb migrate`; what it shows and its exit code.
async fn migrate(play: Play, stats: HoldStats) -> (String, ExitCode) {
    let server = Server::new(play).await;
    server.control.datapath.set_stats(stats);
    let args = migrate_args(&["chat-1", "--to", "fra", "--admin", server.client.url()]);
    let id = super::migrate::start(&server.client, &args).await.unwrap();
    let paper = Paper::default();
    let mut screen = super::migrate::Screen::to(paper.clone());
    let view = super::migrate::watch(&server.client, &id, &mut screen).await.unwrap();
    (paper.text().replace(&id, "m-1"), super::migrate::exit_code(view.state))
}

#[tokio::test]
async fn a_migration_that_commits_is_shown_phase_by_phase() {
    let stats = HoldStats { held_packets: 32, held_bytes: 4096, replayed_packets: 32, dropped_packets: 0 };
    let (text, code) = migrate(Play::Commit, stats).await;
    assert_eq!(
        text,
        "chat-1: ams -> fra (m-1)\n\
         \x20 prepare        1.00 ms\n\
         \x20 hold           1.00 ms\n\
         \x20 flip           1.00 ms\n\
         \x20 release        1.00 ms\n\
         committed in 4.0 ms: chat-1 runs at fra\n\
         \x20 frozen for 9.5 ms, 1000 B of images, 1.1 KiB sent\n\
         \x20 32 packets held (4.0 KiB), 32 replayed, 0 dropped\n\
         \x20 flip 12 us, first held packet sent after 40 us\n"
    );
    assert_eq!(code, ExitCode::SUCCESS);
}

#[tokio::test]
async fn a_migration_that_is_rolled_back_says_why() {
    let (text, code) = migrate(Play::FailRestore, HoldStats::default()).await;
    assert!(
        text.contains("rolled back in 3.0 ms: chat-1 runs at ams as before\n  reason: the restore failed\n"),
        "{text}"
    );
    assert_eq!(code, ExitCode::from(1));
    let (text, code) = migrate(Play::Panic, HoldStats::default()).await;
    assert!(text.contains("IN DOUBT") && text.contains("by hand"), "{text}");
    assert_eq!(code, ExitCode::from(3));
}

#[tokio::test]
async fn a_refusal_is_said_plainly() {
    let server = Server::new(Play::Commit).await;
    let args = migrate_args(&["chat-1", "--to", "ams", "--admin", server.client.url()]);
    let error = super::migrate::start(&server.client, &args).await.unwrap_err();
    assert_eq!(text::chain(&error), "backend \"chat-1\" runs at site \"ams\" already");
    assert_eq!(super::migrate::command(args).await, ExitCode::from(2));
    let nobody = migrate_args(&["chat-1", "--to", "ams", "--admin", "http://127.0.0.1:1"]);
    assert_eq!(super::migrate::command(nobody).await, ExitCode::from(2));
    let no_address = migrate_args(&["chat-1", "--to", "ams", "--admin", "here"]);
    assert_eq!(super::migrate::command(no_address).await, ExitCode::from(2));
}

#[tokio::test]
async fn status_is_a_table() {
    let server = Server::new(Play::FailRestore).await;
    let started = serde_json::json!({"backend": "chat-1", "to": "fra"});
    let id = server.post("/v1/migrations", started).await.json()["id"].clone();
    server.finished(&id).await;
    server.post("/v1/backends/chat-2/hold", serde_json::json!({"policy": "drop"})).await;
    let status = server.client.json(http::Method::GET, "/v1/status", None::<&()>).await.unwrap();
    let text = status::render(&status).replace(id.as_str().unwrap(), "m-1");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], format!("Drover {}, 1 service, on mem0 (memory)", env!("CARGO_PKG_VERSION")));
    assert!(lines[2].starts_with("BACKEND  ADDRESS        LOCATION  GATE"), "{text}");
    assert!(lines[3].starts_with("chat-1   10.1.0.1:6379  ams       forward"), "{text}");
    assert!(lines[4].contains("bare      drop (") && lines[4].contains("ms left)"), "{text}");
    assert!(lines[7].starts_with("m-1  chat-1   ams   fra  rolled back  9.5 ms     0  the"), "{text}");
    assert!(lines[7].ends_with("the restore failed"), "{text}");
}

#[tokio::test]
async fn migrations_are_a_table_and_one_in_doubt_says_what_to_do() {
    let server = Server::new(Play::Doubt).await;
    assert_eq!(migrations::render(&[]), "no migrations yet\n");
    let started = serde_json::json!({"backend": "chat-1", "to": "fra"});
    let id = server.post("/v1/migrations", started).await.json()["id"].as_str().unwrap().to_owned();
    let path = format!("/v1/migrations/{id}");
    let view: MigrationView = loop {
        let view: MigrationView = server.client.json(http::Method::GET, &path, None::<&()>).await.unwrap();
        if view.state == MigrationState::InDoubt {
            break view;
        }
    };
    let text = migrations::detail(&view).replace(&id, "m-1");
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with("MIGRATION") && lines[0].contains("BEGAN"), "{text}");
    assert!(lines[1].contains("fra  IN DOUBT, still trying") && lines[1].ends_with("no answer"), "{text}");
    assert!(text.contains("PHASE") && text.contains("prepare"), "{text}");
    assert!(text.contains("at fra:  lb migration m-1 resolve --as committed"), "{text}");
    assert!(text.contains("at ams:  lb migration m-1 resolve --as rolled-back"), "{text}");
    let url = server.client.url();
    for (verdict, code) in [("rolled-back", 2), ("committed", 0)] {
        let cli = Cli::try_parse_from(["lb", "migration", &id, "--admin", url, "resolve", "--as", verdict]);
        let Command::Migration(args) = cli.unwrap().command else { panic!("another command") };
        assert_eq!(done(migrations::one(&args).await), ExitCode::from(code), "{verdict}");
    }
    server.finished(&id.into()).await;
}

#[test]
fn arguments() {
    Cli::command().debug_assert();
    let args = migrate_args(&["chat-1", "--to", "fra", "--policy", "drop", "--deadline-ms", "700"]);
    assert_eq!((args.backend.as_str(), args.to.as_str(), args.deadline_ms), ("chat-1", "fra", Some(700)));
    assert!(matches!(args.policy, PolicyArg::Drop));
    for wrong in [
        &["lb", "migrate", "chat-1"][..],
        &["lb", "migrate", "chat-1", "--to", "fra", "--policy", "maybe"],
        &["lb", "migrate", "chat-1", "--to", "fra", "--deadline-ms", "0"],
        &["lb", "migration"],
        &["lb", "migration", "m-1", "resolve"],
        &["lb", "migration", "m-1", "resolve", "--as", "lost"],
        &["lb", "run"],
        &["lb", "walk"],
    ] {
        assert!(Cli::try_parse_from(wrong).is_err(), "{wrong:?}");
    }
}

#[test]
fn flows_are_a_table_that_says_when_it_is_cut() {
    let flow = |client: &str| crate::admin::FlowView {
        protocol: "tcp".into(),
        client: client.parse().unwrap(),
        service: Some("chat".into()),
        service_address: "10.0.0.100:6379".parse().unwrap(),
        backend: Some("chat-1".into()),
        location: None,
        source: "10.9.0.1:4000".parse().unwrap(),
        mode: "nat".into(),
        state: "half_closed".into(),
        idle_ms: 1500,
    };
    let flows = vec![flow("198.51.100.7:2"), flow("198.51.100.7:1")];
    let text = super::flows::render(&crate::admin::FlowsView { flows, is_cut: true, limit: 2 });
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with("PROTOCOL  CLIENT          SERVICE  BACKEND  LOCATION"), "{text}");
    assert!(lines[1].starts_with("tcp       198.51.100.7:1  chat     chat-1   unknown"), "{text}");
    assert!(lines[1].contains("half closed") && lines[1].ends_with("1.5 s"), "{text}");
    assert!(lines[3].starts_with("There are more than these 2: narrow it down"), "{text}");
}

#[tokio::test]
async fn top_shows_what_came_between_two_looks() {
    let server = Server::new(Play::Commit).await;
    let look = async || -> crate::admin::TrafficReport {
        server.client.json(http::Method::GET, "/v1/traffic", None::<&()>).await.unwrap()
    };
    let before = look().await;
    let mut after = before.clone();
    after.clock_us += 2_000_000;
    after.members[0].traffic.to_backend_packets += 3_000;
    after.members[0].traffic.to_clients_bytes += 2_500_000;
    after.members[0].new_flows += 50;
    *after.reasons.get_mut("no_flow").unwrap() += 10;
    let text = super::top::render(&before, &after);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "flows: 7 established, 0 new");
    assert_eq!(lines[1], "packets/s: no_flow 5.0");
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(words(lines[4]), ["chat", "1.50k", "0", "0", "10.0M", "25", "0"]);
    assert_eq!(words(lines[5])[..5], ["chat-1", "ams", "forward", "up", "0"]);
    assert_eq!(words(lines[5])[5..], ["1.50k", "0", "0", "10.0M", "25", "0"]);
    assert_eq!(words(lines[6])[..4], ["chat-2", "bare", "forward", "-"]);

    after.members[0].check = Some(crate::health::CheckState::Down);
    let health = |after: &crate::admin::TrafficReport| {
        let text = super::top::render(&before, after);
        words(text.lines().nth(5).unwrap())[3].clone()
    };
    assert_eq!(health(&after), "DOWN");
    after.backends.get_mut("chat-1").unwrap().gate = "hold".to_owned();
    assert_eq!(health(&after), "held", "frozen is not down");
}
