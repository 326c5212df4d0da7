//! The API as it is meant to be used.

use super::*;

#[tokio::test]
async fn hold_flip_and_look() {
    let server = Server::new(Play::Commit).await;
    let held = server.post("/v1/backends/chat-1/hold", hold()).await;
    assert_eq!((held.status, held.json()), (200, json!({"generation": 2})));
    let backend = server.get("/v1/backends/chat-1").await.json();
    assert_eq!(
        (&backend["gate"], &backend["state"], &backend["location"]),
        (&json!("hold"), &json!("holding"), &json!("ams"))
    );
    assert!((1..=5000).contains(&backend["deadline_in_ms"].as_u64().unwrap()));
    let flipped = server.post("/v1/backends/chat-1/flip", json!({"generation": 2, "to": "fra"})).await;
    assert_eq!((flipped.status, flipped.json()), (200, json!({"generation": 3})));
    assert!(server.control.control.replays_ended(std::time::Duration::from_secs(5)).await);
    let backend = server.get("/v1/backends/chat-1").await.json();
    assert_eq!((&backend["gate"], &backend["location"]), (&json!("forward"), &json!("fra")));
    assert_eq!(backend["generation"], 4);
}

#[tokio::test]
async fn hold_and_resume_with_defaults() {
    let server = Server::new(Play::Commit).await;
    assert_eq!(server.post("/v1/backends/chat-1/hold", json!({})).await.status, 200);
    let resumed = server.post("/v1/backends/chat-1/resume", json!({"generation": 2})).await;
    assert_eq!((resumed.status, resumed.json()), (200, json!({"generation": 3})));
    let drop = server.post("/v1/backends/chat-2/hold", json!({"policy": "drop"})).await;
    assert_eq!(drop.status, 200);
    assert_eq!(server.get("/v1/backends/chat-2").await.json()["gate"], "drop");
}

#[tokio::test]
async fn a_migration_is_started_followed_and_reported() {
    let server = Server::new(Play::Commit).await;
    let started =
        server.post("/v1/migrations", json!({"backend": "chat-1", "to": "fra", "deadline_ms": 700})).await;
    assert_eq!(started.status, 202);
    let id = started.json()["id"].clone();
    let path = format!("/v1/migrations/{}", id.as_str().unwrap());
    assert_eq!(started.header("location"), path);
    let finished = server.finished(&id).await;
    assert_eq!(
        (&finished["state"], &finished["from"], &finished["to"]),
        (&json!("committed"), &json!("ams"), &json!("fra"))
    );
    assert_eq!(finished["report"]["outcome"], "committed");
    assert_eq!(finished, server.get(&path).await.json());
    assert_eq!(server.finished(&id).await, finished, "a late follower gets the past");
    assert_eq!(server.get("/v1/migrations").await.json(), json!([finished]));
    assert_eq!(server.get("/v1/status").await.json()["migrations"], json!([finished]));
    let specs = server.script.specs.lock().unwrap();
    assert_eq!(specs[0].hold.deadline, std::time::Duration::from_millis(700));
}

#[tokio::test]
async fn events_begin_with_the_first_phase() {
    let server = Server::new(Play::Commit).await;
    let id =
        server.post("/v1/migrations", json!({"backend": "chat-1", "to": "fra"})).await.json()["id"].clone();
    let mut events =
        server.client.events(&format!("/v1/migrations/{}/events", id.as_str().unwrap())).await.unwrap();
    let mut told = Vec::new();
    while let Some(event) = events.next().await.unwrap() {
        told.push((event.name, serde_json::from_str::<Value>(&event.data).unwrap()));
    }
    assert_eq!(told[0], ("phase".into(), json!({"name": "prepare", "start_ms": 0.0, "end_ms": null})));
    assert_eq!(told[1], ("phase".into(), json!({"name": "prepare", "start_ms": 0.0, "end_ms": 1.0})));
    assert_eq!(told.last().unwrap().0, "finished");
    assert_eq!(told.len(), 9);
}

#[tokio::test]
async fn a_migration_is_aborted() {
    let server = Server::new(Play::UntilAbort).await;
    let id =
        server.post("/v1/migrations", json!({"backend": "chat-1", "to": "fra"})).await.json()["id"].clone();
    let path = format!("/v1/migrations/{}", id.as_str().unwrap());
    let aborted = server.send(Method::DELETE, &path, "").await;
    assert_eq!((aborted.status, &aborted.json()["id"]), (202, &id));
    assert_eq!(server.finished(&id).await["state"], "rolled_back");
    assert_eq!(server.send(Method::DELETE, &path, "").await.status, 409);
}

#[tokio::test]
async fn metrics_count_by_reason_and_backend() {
    let server = Server::new(Play::Commit).await;
    let id =
        server.post("/v1/migrations", json!({"backend": "chat-1", "to": "fra"})).await.json()["id"].clone();
    server.finished(&id).await;
    let metrics = server.get("/metrics").await;
    assert!(metrics.header("content-type").starts_with("text/plain; version=0.0.4"));
    for line in [
        "drover_packets_total{reason=\"to_client\",class=\"forward\"} 1",
        "drover_packets_total{reason=\"stale_site\",class=\"drop\"} ",
        "drover_backend_gate{backend=\"chat-1\",gate=\"forward\"} 1",
        "drover_backend_gate{backend=\"chat-1\",gate=\"hold\"} 0",
        "drover_backend_location{backend=\"chat-1\",site=\"fra\"} 1",
        "drover_backend_generation{backend=\"chat-1\"} 4",
        "drover_backend_packets_total{backend=\"chat-1\",direction=\"to_backend\"} 3",
        "drover_backend_bytes_total{backend=\"chat-2\",direction=\"to_clients\"} 200",
        "drover_hold_packets{backend=\"chat-1\",what=\"held\"} 0",
        "drover_member_packets_total{service=\"chat\",backend=\"chat-1\",direction=\"to_backend\"} 3",
        "drover_member_bytes_total{service=\"chat\",backend=\"chat-2\",direction=\"to_clients\"} 200",
        "drover_member_flows_opened_total{service=\"chat\",backend=\"chat-1\"} 4",
        "drover_member_resets_total{service=\"chat\",backend=\"chat-2\"} 1",
        "drover_flows{family=\"ipv4\",standing=\"established\",protocol=\"tcp\"} 5",
        "drover_flow_entries{family=\"ipv4\",standing=\"established\"} 14",
        "drover_flow_entries_limit{family=\"ipv4\",standing=\"established\"} 1000",
        "drover_flows_removed_total{cause=\"idle\"} 3",
        "drover_flow_pass_seconds 0.02",
        "drover_samples_lost_total 6",
        "drover_migrations_total{outcome=\"committed\"} 1",
        "drover_migrations_running 0",
    ] {
        assert!(metrics.text.lines().any(|found| found.starts_with(line)), "{line} in {}", metrics.text);
    }
    // Each sample's name is described before it, and every value is a number.
    let mut described = "";
    for line in metrics.text.lines() {
        match line.strip_prefix("# TYPE ") {
            Some(rest) => described = rest.split(' ').next().unwrap(),
            None if line.starts_with('#') => {}
            None => {
                assert_eq!(line.split(['{', ' ']).next(), Some(described));
                line.rsplit(' ').next().unwrap().parse::<f64>().unwrap();
            }
        }
    }
}

#[tokio::test]
async fn health_and_a_client_of_http_1_0() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let server = Server::new(Play::Commit).await;
    assert_eq!(server.get("/healthz").await.text, "ok\n");
    let id =
        server.post("/v1/migrations", json!({"backend": "chat-1", "to": "fra"})).await.json()["id"].clone();
    let mut stream = tokio::net::TcpStream::connect(server.address).await.unwrap();
    let request = format!("GET /v1/migrations/{}/events HTTP/1.0\r\n\r\n", id.as_str().unwrap());
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert!(text.starts_with("HTTP/1.0 200"), "{text}");
    assert!(text.trim_end().lines().last().unwrap().starts_with("data: {\"id\""), "{text}");
}

#[tokio::test]
async fn stopping_ends_open_streams() {
    let server = Server::new(Play::UntilAbort).await;
    let id =
        server.post("/v1/migrations", json!({"backend": "chat-1", "to": "fra"})).await.json()["id"].clone();
    let mut events =
        server.client.events(&format!("/v1/migrations/{}/events", id.as_str().unwrap())).await.unwrap();
    assert_eq!(events.next().await.unwrap().unwrap().name, "phase");
    server.stop.cancel();
    let end = async { while events.next().await.is_ok_and(|event| event.is_some()) {} };
    tokio::time::timeout(std::time::Duration::from_secs(5), end).await.unwrap();
}
