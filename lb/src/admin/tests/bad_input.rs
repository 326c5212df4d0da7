//! Every mistake has its own clear error, and changes nothing.

use super::*;

/// One request, refused as expected with nothing changed by it.
async fn refused(server: &Server, request: (Method, &str, &str), status: u16, kind: &str, detail: &str) {
    let (method, path, body) = request;
    let what = format!("{method} {path} {}", &body[..body.len().min(80)]);
    let before = server.everything().await;
    let answer = server.send(method, path, body.to_owned()).await;
    assert_eq!(answer.status, status, "{what}: {}", answer.text);
    assert_eq!(answer.header("content-type"), "application/problem+json", "{what}");
    let problem: Problem = serde_json::from_str(&answer.text).unwrap();
    assert_eq!(problem.status, status, "{what}");
    assert_eq!(problem.kind, format!("urn:drover:{kind}"), "{what}: {}", problem.detail);
    assert!(problem.detail.contains(detail), "{what}: {:?} lacks {detail:?}", problem.detail);
    assert!(!problem.title.is_empty());
    assert_eq!(server.everything().await, before, "{what}: refused, and yet something changed");
}

const HOLD: &str = "/v1/backends/chat-1/hold";
const FLIP: &str = "/v1/backends/chat-1/flip";
const RESUME: &str = "/v1/backends/chat-1/resume";
const MIGRATIONS: &str = "/v1/migrations";

#[tokio::test]
async fn bodies() {
    let server = Server::new(Play::Commit).await;
    for path in [HOLD, FLIP, RESUME, MIGRATIONS] {
        let post = |body| (Method::POST, path, body);
        refused(&server, post(""), 400, "not-json", "the body is empty").await;
        refused(&server, post("hold"), 400, "not-json", "at line 1 column").await;
        refused(&server, post("{\"generation\": 8,\n]"), 400, "not-json", "at line 2 column 1").await;
        refused(&server, post("{\"generation\": 8"), 400, "not-json", "EOF").await;
        refused(&server, post("{} {}"), 400, "not-json", "trailing").await;
        refused(&server, post("[8, \"fra\"]"), 400, "wrong-field", "an array").await;
        refused(&server, post("7"), 400, "wrong-field", "invalid type: integer `7`").await;
        refused(&server, post("{\"colour\": 1}"), 400, "wrong-field", "unknown field `colour`, expected")
            .await;
    }
    refused(
        &server,
        (Method::POST, HOLD, r#"{"policy": "maybe"}"#),
        400,
        "wrong-field",
        "unknown variant `maybe`",
    )
    .await;
    for (body, detail) in [
        (r#"{"deadline_ms": 0}"#, "deadline_ms: 0 is outside of 1 to 600000"),
        (r#"{"deadline_ms": 600001}"#, "deadline_ms: 600001 is outside of 1 to 600000"),
        (r#"{"deadline_ms": -1}"#, "invalid value: integer `-1`"),
        (r#"{"deadline_ms": "5 s"}"#, "invalid type: string"),
        (r#"{"deadline_ms": 1, "deadline_ms": 2}"#, "duplicate field"),
    ] {
        refused(&server, (Method::POST, HOLD, body), 400, "wrong-field", detail).await;
    }
    for (body, detail) in [
        (r#"{"to": "fra"}"#, "missing field `generation`"),
        (r#"{"generation": 1}"#, "missing field `to`"),
        (r#"{"generation": 4294967296, "to": "fra"}"#, "invalid value"),
        (r#"{"generation": 1.5, "to": "fra"}"#, "invalid type: floating point"),
    ] {
        refused(&server, (Method::POST, FLIP, body), 400, "wrong-field", detail).await;
    }
    let body = r#"{"backend": "chat-1", "to": "fra", "deadline_ms": 0}"#;
    refused(&server, (Method::POST, MIGRATIONS, body), 400, "wrong-field", "deadline_ms: 0").await;
}

#[tokio::test]
async fn a_body_of_10_mb() {
    let server = Server::new(Play::Commit).await;
    let body = format!("{{\"policy\": \"{}\"}}", "x".repeat(10_000_000));
    for path in [HOLD, FLIP, RESUME, MIGRATIONS] {
        refused(&server, (Method::POST, path, &body), 413, "body-too-large", "more than 64 KiB").await;
    }
}

#[tokio::test]
async fn a_body_of_10_mb_without_a_declared_length() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let server = Server::new(Play::Commit).await;
    let before = server.everything().await;
    let mut stream = tokio::net::TcpStream::connect(server.address).await.unwrap();
    let head = format!(
        "POST {HOLD} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let chunk = format!("{:x}\r\n{}\r\n", 1_000_000, " ".repeat(1_000_000));
    for _ in 0..10 {
        stream.write_all(chunk.as_bytes()).await.unwrap();
    }
    stream.write_all(b"0\r\n\r\n").await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert!(text.starts_with("HTTP/1.1 413") && text.contains("urn:drover:body-too-large"), "{text}");
    assert_eq!(server.everything().await, before);
}

#[tokio::test]
async fn routes_and_methods() {
    let server = Server::new(Play::Commit).await;
    for path in ["/v2/status", "/v1", "/v1/backends/chat-1/hold/now", "/v1/backends/"] {
        refused(&server, (Method::GET, path, ""), 404, "unknown-route", path).await;
    }
    for (method, path) in [
        (Method::GET, HOLD),
        (Method::PUT, FLIP),
        (Method::DELETE, RESUME),
        (Method::POST, "/v1/status"),
        (Method::PATCH, MIGRATIONS),
        (Method::POST, "/v1/migrations/m-1/events"),
    ] {
        refused(&server, (method, path, "{}"), 405, "wrong-method", path).await;
    }
    assert_eq!(server.get(HOLD).await.header("allow"), "POST");
    refused(&server, (Method::GET, "/v1/backends/%ff", ""), 400, "bad-path", "UTF-8").await;
}

#[tokio::test]
async fn names() {
    let server = Server::new(Play::Commit).await;
    let generation = r#"{"generation": 1, "to": "fra"}"#;
    let resume = r#"{"generation": 1}"#;
    for (path, body) in [
        ("/v1/backends/nobody/hold", "{}"),
        ("/v1/backends/nobody/flip", generation),
        ("/v1/backends/nobody/resume", resume),
    ] {
        refused(&server, (Method::POST, path, body), 404, "unknown-backend", "no backend \"nobody\"").await;
    }
    refused(&server, (Method::GET, "/v1/backends/nobody", ""), 404, "unknown-backend", "\"nobody\"").await;
    refused(&server, (Method::GET, "/v1/migrations/m-1", ""), 404, "unknown-migration", "\"m-1\"").await;
    refused(&server, (Method::GET, "/v1/migrations/m-1/events", ""), 404, "unknown-migration", "\"m-1\"")
        .await;
    refused(&server, (Method::DELETE, "/v1/migrations/m-1", ""), 404, "unknown-migration", "\"m-1\"").await;
    for (body, status, kind, detail) in [
        (r#"{"backend": "nobody", "to": "fra"}"#, 404, "unknown-backend", "\"nobody\""),
        (r#"{"backend": "chat-1", "to": "nowhere"}"#, 404, "unknown-site", "\"nowhere\""),
        (r#"{"backend": "chat-1", "to": "ams"}"#, 409, "same-location", "runs at site \"ams\" already"),
        (r#"{"backend": "chat-1", "to": "bare"}"#, 409, "no-agent", "set agent = "),
        (r#"{"backend": "chat-2", "to": "fra"}"#, 409, "no-agent", "site \"bare\" has no agent"),
    ] {
        refused(&server, (Method::POST, MIGRATIONS, body), status, kind, detail).await;
    }
}

#[tokio::test]
async fn gates() {
    let server = Server::new(Play::Commit).await;
    let flip = |generation: u32, to: &str| json!({"generation": generation, "to": to}).to_string();
    refused(&server, (Method::POST, FLIP, &flip(1, "fra")), 409, "not-held", "hold it first").await;
    refused(&server, (Method::POST, RESUME, r#"{"generation": 1}"#), 409, "not-held", "hold it first").await;

    assert_eq!(server.post(HOLD, hold()).await.status, 200);
    refused(&server, (Method::POST, HOLD, "{}"), 409, "already-held", "holding already").await;
    refused(&server, (Method::POST, FLIP, &flip(1, "fra")), 409, "stale-generation", "generation 2").await;
    refused(&server, (Method::POST, FLIP, &flip(3, "fra")), 409, "stale-generation", "generation 2").await;
    refused(&server, (Method::POST, RESUME, r#"{"generation": 1}"#), 409, "stale-generation", "generation 2")
        .await;
    refused(&server, (Method::POST, FLIP, &flip(2, "nowhere")), 404, "unknown-site", "\"nowhere\"").await;
    refused(&server, (Method::POST, FLIP, &flip(2, "ams")), 409, "same-location", "resume it instead").await;
    server.control.datapath.make_unreachable("fra");
    refused(&server, (Method::POST, FLIP, &flip(2, "fra")), 409, "unreachable-site", "no route").await;
    let migration = r#"{"backend": "chat-1", "to": "fra"}"#;
    refused(&server, (Method::POST, MIGRATIONS, migration), 409, "not-forward", "holding").await;
    assert_eq!(server.post(RESUME, json!({"generation": 2})).await.status, 200);
}

#[tokio::test]
async fn a_migration_under_way_keeps_others_out() {
    let server = Server::new(Play::UntilAbort).await;
    let started = server.post(MIGRATIONS, json!({"backend": "chat-1", "to": "fra"})).await;
    let id = started.json()["id"].as_str().unwrap().to_owned();
    // The script holds and then waits.
    while server.get("/v1/backends/chat-1").await.json()["gate"] != "hold" {}
    let migration = r#"{"backend": "chat-1", "to": "fra"}"#;
    let flip = r#"{"generation": 2, "to": "fra"}"#;
    for (path, body) in
        [(MIGRATIONS, migration), (HOLD, "{}"), (FLIP, flip), (RESUME, r#"{"generation": 2}"#)]
    {
        refused(&server, (Method::POST, path, body), 409, "migration-under-way", &id).await;
    }
}

#[tokio::test]
async fn web_pages() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let server = Server::new(Play::Commit).await;
    let before = server.everything().await;
    for header in ["host: evil.example", "host: localhost\r\norigin: http://evil.example"] {
        let mut stream = tokio::net::TcpStream::connect(server.address).await.unwrap();
        let request =
            format!("POST {HOLD} HTTP/1.1\r\n{header}\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{{}}");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        assert!(text.starts_with("HTTP/1.1 403") && text.contains("urn:drover:foreign-origin"), "{text}");
    }
    assert_eq!(server.everything().await, before);
}
