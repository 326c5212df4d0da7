//! One HTTP/2 connection to a site agent, opened before it is needed and reused, so that a request in the
//! freeze window costs one frame and no handshake.

use std::convert::Infallible;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http::{Method, Request, Response, StatusCode, Uri};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;

use crate::protocol::{AgentEvent, Problem};

/// How long an agent may take to accept a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// A peer that is silent for this long is gone: the host may have died without a word.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_millis(500);
/// See [`KEEP_ALIVE_INTERVAL`].
const KEEP_ALIVE_LIMIT: Duration = Duration::from_secs(2);
/// Frames of this size keep large images from being cut into 16 KiB pieces.
const MAX_FRAME_BYTES: u32 = 1 << 20;

/// What requests carry.
pub type Body = UnsyncBoxBody<Bytes, Infallible>;

/// Why an agent did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Not a URL of an agent.
    #[error("{0:?} is not an agent's address: write http://HOST:PORT")]
    Url(String),
    /// No connection.
    #[error("no connection to the agent at {url}: is it running there?")]
    Connect {
        /// The agent.
        url: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The connection or the request broke.
    #[error("the connection to the agent at {url} broke")]
    Http {
        /// The agent.
        url: String,
        /// Why.
        #[source]
        source: hyper::Error,
    },
    /// No answer in time.
    #[error("the agent at {url} did not answer within {limit:?}")]
    Silent {
        /// The agent.
        url: String,
        /// How long it had.
        limit: Duration,
    },
    /// The agent said no.
    #[error("{detail}")]
    Refused {
        /// The HTTP status.
        status: StatusCode,
        /// Why, in the agent's words.
        detail: String,
    },
    /// The agent's answer makes no sense.
    #[error("the agent at {url} answered with something else than expected: is it of this version?")]
    Answer {
        /// The agent.
        url: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

/// Renders an error with its causes on one line, for messages that travel as text.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text += ": ";
            text += &cause_text;
        }
        next = cause.source();
    }
    text
}

/// A connection to one agent.
#[derive(Debug)]
pub struct AgentClient {
    url: String,
    authority: String,
    sender: Mutex<Option<http2::SendRequest<Body>>>,
}

impl AgentClient {
    /// For the agent at `http://host:port`; connects with the first request or [`Self::connect`].
    pub fn new(url: &str) -> Result<Self, ClientError> {
        let bad = || ClientError::Url(url.to_owned());
        let uri: Uri = url.parse().map_err(|_| bad())?;
        let authority = uri.authority().ok_or_else(bad)?;
        if uri.scheme_str() != Some("http") || authority.port().is_none() {
            return Err(bad());
        }
        Ok(Self {
            url: url.trim_end_matches('/').to_owned(),
            authority: authority.to_string(),
            sender: Mutex::new(None),
        })
    }

    /// Opens the connection unless it is open.
    pub async fn connect(&self) -> Result<(), ClientError> {
        self.sender().await.map(drop)
    }

    /// A request with a JSON body and a JSON answer.
    pub async fn json<Q: Serialize + Sync, A: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&Q>,
        limit: Duration,
    ) -> Result<A, ClientError> {
        let silent = ClientError::Silent { url: self.url.clone(), limit };
        let answer = async {
            let response = self.send(method, path, json_body(body)).await?;
            self.collect(response).await
        };
        let bytes = tokio::time::timeout(limit, answer).await.map_err(|_| silent)??;
        let bytes = if bytes.is_empty() { Bytes::from_static(b"null") } else { bytes };
        serde_json::from_slice(&bytes).map_err(|source| ClientError::Answer { url: self.url.clone(), source })
    }

    /// Sends a request and gives the response's head; the status may be anything.
    pub async fn send(
        &self,
        method: Method,
        path: &str,
        body: Body,
    ) -> Result<Response<Incoming>, ClientError> {
        let mut sender = self.sender().await?;
        let request = Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", self.authority))
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(body)
            .map_err(|_| ClientError::Url(format!("{}{path}", self.url)))?;
        sender.send_request(request).await.map_err(|source| self.broke(source))
    }

    /// Follows a migration's events until `each` says that it has enough, or the stream ends.
    ///
    /// `opened` is called once the agent has begun to answer; `each` gets the moment of arrival too. The
    /// stream ending by itself is an error.
    pub async fn events(
        &self,
        id: &str,
        opened: impl FnOnce(),
        mut each: impl FnMut(AgentEvent, Instant) -> std::ops::ControlFlow<()>,
    ) -> Result<(), ClientError> {
        let body = Empty::new().boxed_unsync();
        let response = self.send(Method::GET, &format!("/v1/migrations/{id}/events"), body).await?;
        let mut body = self.accept(response).await?;
        opened();
        let mut buffer = BytesMut::new();
        while let Some(frame) = body.frame().await {
            let arrived = Instant::now();
            let Ok(data) = frame.map_err(|source| self.broke(source))?.into_data() else { continue };
            buffer.extend_from_slice(&data);
            while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
                let line = buffer.split_to(end + 1);
                let event = serde_json::from_slice(&line)
                    .map_err(|source| ClientError::Answer { url: self.url.clone(), source })?;
                if each(event, arrived).is_break() {
                    return Ok(());
                }
            }
        }
        Err(ClientError::Connect {
            url: self.url.clone(),
            source: std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "the agent ended its events"),
        })
    }

    /// Turns a refusal into an error.
    pub async fn accept(&self, response: Response<Incoming>) -> Result<Incoming, ClientError> {
        let status = response.status();
        if status.is_success() {
            return Ok(response.into_body());
        }
        let body = response.into_body().collect().await.map_err(|source| self.broke(source))?.to_bytes();
        let detail = match serde_json::from_slice::<Problem>(&body) {
            Ok(problem) => problem.detail,
            Err(_) => format!("the agent at {} answered {status}", self.url),
        };
        Err(ClientError::Refused { status, detail })
    }

    async fn collect(&self, response: Response<Incoming>) -> Result<Bytes, ClientError> {
        let body = self.accept(response).await?;
        Ok(body.collect().await.map_err(|source| self.broke(source))?.to_bytes())
    }

    fn broke(&self, source: hyper::Error) -> ClientError {
        ClientError::Http { url: self.url.clone(), source }
    }

    async fn sender(&self) -> Result<http2::SendRequest<Body>, ClientError> {
        let open = self.sender.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(sender) = open.filter(|sender| !sender.is_closed()) {
            return Ok(sender);
        }
        let refused = |source| ClientError::Connect { url: self.url.clone(), source };
        let stream = tokio::time::timeout(CONNECT_LIMIT, TcpStream::connect(&self.authority))
            .await
            .map_err(|_| ClientError::Silent { url: self.url.clone(), limit: CONNECT_LIMIT })?
            .map_err(refused)?;
        stream.set_nodelay(true).map_err(refused)?;
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .max_frame_size(MAX_FRAME_BYTES)
            .max_send_buf_size(8 << 20)
            .keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_LIMIT)
            .keep_alive_while_idle(true)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|source| self.broke(source))?;
        // It ends with the connection; what broke is seen by the requests on it.
        tokio::spawn(connection);
        *self.sender.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender.clone());
        Ok(sender)
    }
}

/// A request body from a value; nothing for `None`.
fn json_body<Q: Serialize>(body: Option<&Q>) -> Body {
    match body {
        None => Empty::new().boxed_unsync(),
        Some(body) => {
            let json = serde_json::to_vec(body).expect("the protocol's types have only string keys");
            Full::new(Bytes::from(json)).boxed_unsync()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_agent_addresses_are_taken() {
        for bad in ["", "10.2.1.1:7401", "https://10.2.1.1:7401", "http://10.2.1.1", "http:///x"] {
            assert!(matches!(AgentClient::new(bad), Err(ClientError::Url(_))), "{bad:?}");
        }
        for good in ["http://10.2.1.1:7401", "http://[fd00::1]:7401/", "http://site-a:7401"] {
            assert!(AgentClient::new(good).is_ok(), "{good:?}");
        }
    }

    #[tokio::test]
    async fn an_agent_that_is_not_there_is_named() {
        let agent = AgentClient::new("http://127.0.0.1:9").unwrap();
        let error = agent.connect().await.unwrap_err();
        assert!(chain(&error).contains("http://127.0.0.1:9"), "{error}");
        assert!(chain(&error).to_lowercase().contains("refused"), "{}", chain(&error));
    }
}
