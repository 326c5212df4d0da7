//! Reloads and drains over HTTP.

use super::*;
use crate::testing::CONFIG;

impl Server {
    fn write(&self, text: &str) {
        std::fs::write(self.dir.path().join("lb.toml"), text).unwrap();
    }

    async fn reload(&self, check: bool) -> (u16, Value) {
        let answer = self.post("/v1/reload", json!({"check": check})).await;
        (answer.status, answer.json())
    }
}

#[tokio::test]
async fn a_changed_file_is_checked_and_then_applied() {
    let server = Server::new(Play::Commit).await;
    let (status, report) = server.reload(false).await;
    assert_eq!((status, &report["added"], &report["changed"]), (200, &json!([]), &json!([])), "{report}");
    let text = CONFIG.replace("\"chat-2\"]", "\"chat-2\", \"chat-3\"]")
        + "\n[hold]\ndeadline_ms = 77\n[[backends]]\nname = \"chat-3\"\naddress = \"10.1.0.3:6379\"\nsite = \"ams\"\n";
    server.write(&text);
    for (check, count) in [(true, 2), (false, 3)] {
        let (status, report) = server.reload(check).await;
        assert_eq!((status, &report["applied"]), (200, &json!(!check)), "{report}");
        assert_eq!(report["added"], json!(["backend chat-3"]));
        assert_eq!(report["changed"], json!(["service chat"]));
        assert_eq!(report["sections"], json!(["hold"]));
        assert_eq!(server.get("/v1/backends").await.json().as_array().unwrap().len(), count);
    }
    assert_eq!(server.control.datapath.weights("chat"), [100_000; 3]);
    let services = server.get("/v1/services").await.json();
    assert_eq!(services[0]["backends"], json!(["chat-1", "chat-2", "chat-3"]));
    assert_eq!(server.control.control.hold_defaults().deadline.as_millis(), 77);
}

#[tokio::test]
async fn a_file_with_a_mistake_or_a_change_that_takes_a_restart_changes_nothing() {
    let server = Server::new(Play::Commit).await;
    let before = server.everything().await;
    for (text, kind, detail) in [
        (
            CONFIG.replace("site = \"bare\"", "site = \"x\""),
            "invalid-configuration",
            "there is no site \"x\"",
        ),
        (CONFIG.replace("mem0", "mem1"), "needs-restart", "datapath.interfaces cannot change"),
        (format!("{CONFIG}\n[limits]\nflows = 2000\n"), "needs-restart", "limits cannot change"),
        (CONFIG.replace("10.9.0.0/24", "10.8.0.0/24"), "needs-restart", "datapath.nat_source4"),
    ] {
        server.write(&text);
        let (status, problem) = server.reload(false).await;
        assert_eq!((status, &problem["type"]), (409, &json!(format!("urn:drover:{kind}"))), "{problem}");
        assert!(problem["detail"].as_str().unwrap().contains(detail), "{problem}");
        assert_eq!(server.everything().await, before);
    }
    std::fs::remove_file(server.dir.path().join("lb.toml")).unwrap();
    let (status, problem) = server.reload(false).await;
    assert_eq!((status, &problem["type"]), (409, &json!("urn:drover:unreadable-configuration")), "{problem}");
}

#[tokio::test]
async fn a_drained_backend_says_so() {
    let server = Server::new(Play::Commit).await;
    let drained = server.post("/v1/backends/chat-1/drain", json!({})).await;
    assert_eq!((drained.status, &drained.json()["drained"]), (200, &json!(true)));
    assert_eq!(server.control.datapath.weights("chat"), [0, 100_000]);
    let drained = server.post("/v1/backends/chat-1/undrain", json!({})).await;
    assert_eq!((drained.status, &drained.json()["drained"]), (200, &json!(false)));
    assert_eq!(server.post("/v1/backends/x/drain", json!({})).await.status, 404);
}
