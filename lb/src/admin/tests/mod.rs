//! The API over a real connection, with a datapath in memory and a scripted coordinator.

mod bad_input;
mod description;
mod reload;
mod seeing;
mod use_;

use bytes::Bytes;
use http::Response;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::DropGuard;

use super::*;
use crate::client::AdminClient;
use crate::migrations::{Journal, Script};
use crate::reload::Reloader;
use crate::testing::TestControl;

pub(crate) use crate::migrations::Play;

pub(crate) struct Server {
    pub(crate) client: AdminClient,
    pub(crate) address: std::net::SocketAddr,
    pub(crate) control: TestControl,
    pub(crate) script: Arc<Script>,
    pub(crate) stop: CancellationToken,
    /// Where the configuration file is.
    pub(crate) dir: tempfile::TempDir,
    _stop: DropGuard,
}

pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: http::HeaderMap,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|_| panic!("not JSON: {}", self.text))
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

impl Server {
    pub(crate) async fn new(play: Play) -> Self {
        let control = TestControl::new();
        let script = Script::new(play);
        let stop = CancellationToken::new();
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::at(&dir.path().join("journal.redb"));
        let (gates, current) = (control.control.clone(), control.config.clone());
        let migrations = Arc::new(Migrations::new(gates, current, script.clone(), journal));
        let file = dir.path().join("lb.toml");
        std::fs::write(&file, crate::testing::CONFIG).unwrap();
        let (config, gates) = (control.config.clone(), control.control.clone());
        let reloader = Reloader::new(Some(file), config.clone(), gates.clone(), migrations.clone());
        let admin = Arc::new(Admin {
            config,
            control: gates,
            health: Board::of_one("chat-1", "chat", "refused"),
            migrations,
            reloader: Arc::new(reloader),
            stop: stop.clone(),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, router(admin), stop.clone()));
        let client = AdminClient::new(&format!("http://{address}")).unwrap();
        Self { client, address, control, script, stop: stop.clone(), dir, _stop: stop.drop_guard() }
    }

    pub(crate) async fn send(&self, method: Method, path: &str, body: impl Into<Bytes>) -> Answer {
        answer(self.client.send(method, path, body.into()).await.unwrap()).await
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(Method::GET, path, "").await
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> Answer {
        self.send(Method::POST, path, body.to_string()).await
    }

    /// Everything that a refused request must not change.
    pub(crate) async fn everything(&self) -> (Value, Vec<crate::memory::Call>) {
        let mut status = self.get("/v1/status").await.json();
        for backend in status["backends"].as_array_mut().unwrap() {
            // Time passes.
            backend["deadline_in_ms"] = Value::Null;
        }
        (status, self.control.datapath.calls())
    }

    /// Follows a migration to its end.
    pub(crate) async fn finished(&self, id: &Value) -> Value {
        let path = format!("/v1/migrations/{}/events", id.as_str().unwrap());
        let mut events = self.client.events(&path).await.unwrap();
        while let Some(event) = events.next().await.unwrap() {
            if event.name == "finished" {
                return serde_json::from_str(&event.data).unwrap();
            }
        }
        panic!("the events ended without an end");
    }
}

async fn answer(response: Response<Incoming>) -> Answer {
    let (parts, body) = response.into_parts();
    let bytes = body.collect().await.unwrap().to_bytes();
    let text = String::from_utf8(bytes.to_vec()).unwrap();
    Answer { status: parts.status.as_u16(), headers: parts.headers, text }
}

pub(crate) fn hold() -> Value {
    json!({"policy": "hold", "deadline_ms": 5000})
}
