//! One HTTP/2 connection to a site agent, opened before it is needed and reused, so that a request in the
//! freeze window costs one frame and no handshake.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{Method, Request, Response, StatusCode, Uri};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

use crate::protocol::{AgentEvent, Problem};
use crate::system::{self, Connection, Spawner};
use crate::tls::{self, Credentials, TlsError};

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

/// A site and how its agent is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentAt {
    /// The site's name in the load balancer.
    pub site: String,
    /// The agent's address: `https://host:port` with [`Self::tls`], `http://host:port` without.
    pub url: String,
    /// Who we are to the agent, read again for each connection. The agent has to be that of [`Self::site`].
    pub tls: Option<tls::Files>,
}

/// Why an agent did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Not a URL of an agent.
    #[error("{0:?} is not an agent's address: write https://HOST:PORT (http:// where there is no TLS)")]
    Url(String),
    /// The address asks for TLS and nobody has said with which certificate.
    #[error("{0} asks for TLS: set section [tls], or write http:// if the agent has none")]
    NoTls(String),
    /// The address asks for a cleartext connection although there are certificates.
    #[error("{0} asks for a connection without TLS, and there is a section [tls]: write https://")]
    NoHttps(String),
    /// The own certificate.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// No connection.
    #[error("no connection to the agent at {url}: is it running there?")]
    Connect {
        /// The agent.
        url: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// One end does not take the other's certificate.
    #[error("no TLS with the agent at {url}")]
    Handshake {
        /// The agent.
        url: String,
        /// Why, in plain words.
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
    tls: Option<(Arc<ClientConfig>, ServerName<'static>)>,
    sender: Mutex<Option<http2::SendRequest<Body>>>,
}

impl AgentClient {
    /// For the agent of one site; connects with the first request or [`Self::connect`].
    pub fn new(at: &AgentAt) -> Result<Self, ClientError> {
        let url = at.url.trim_end_matches('/').to_owned();
        let bad = || ClientError::Url(at.url.clone());
        let uri: Uri = url.parse().map_err(|_| bad())?;
        let authority = uri.authority().filter(|authority| authority.port().is_some()).ok_or_else(bad)?;
        let tls = match (uri.scheme_str(), &at.tls) {
            (Some("http"), None) => None,
            (Some("https"), Some(files)) => {
                let host = authority.host().trim_start_matches('[').trim_end_matches(']');
                let name = ServerName::try_from(host.to_owned()).map_err(|_| bad())?;
                Some((Arc::new(Credentials::read(files)?.client_config(&at.site)?), name))
            }
            (Some("https"), None) => return Err(ClientError::NoTls(url)),
            (Some("http"), Some(_)) => return Err(ClientError::NoHttps(url)),
            _ => return Err(bad()),
        };
        Ok(Self { authority: authority.to_string(), url, tls, sender: Mutex::new(None) })
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
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let request = Request::builder()
            .method(method)
            .uri(format!("{scheme}://{}{path}", self.authority))
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
        let sender = tokio::time::timeout(CONNECT_LIMIT, async {
            match (system::connect(&self.authority).await.map_err(refused)?, self.tls.clone()) {
                (Connection::Simulated(stream), _) => self.speak(stream).await,
                (Connection::Tcp(stream), None) => self.speak(stream).await,
                (Connection::Tcp(stream), Some((config, name))) => {
                    let stream = tls::dial(stream, config, name).await;
                    self.speak(
                        stream.map_err(|source| ClientError::Handshake { url: self.url.clone(), source })?,
                    )
                    .await
                }
            }
        });
        let sender = sender
            .await
            .map_err(|_| ClientError::Silent { url: self.url.clone(), limit: CONNECT_LIMIT })??;
        *self.sender.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender.clone());
        Ok(sender)
    }

    /// Begins HTTP/2 on a connection.
    async fn speak<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
        &self,
        stream: S,
    ) -> Result<http2::SendRequest<Body>, ClientError> {
        let (sender, connection) = http2::Builder::new(Spawner)
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
        system::spawn(connection);
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

    fn plain(url: &str) -> AgentAt {
        AgentAt { site: "ams".into(), url: url.into(), tls: None }
    }

    #[test]
    fn only_plain_agent_addresses_are_taken() {
        for bad in ["", "10.2.1.1:7401", "ftp://10.2.1.1:7401", "http://10.2.1.1", "http:///x"] {
            assert!(matches!(AgentClient::new(&plain(bad)), Err(ClientError::Url(_))), "{bad:?}");
        }
        for good in ["http://10.2.1.1:7401", "http://[fd00::1]:7401/", "http://site-a:7401"] {
            assert!(AgentClient::new(&plain(good)).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn tls_is_asked_for_in_the_address_and_in_the_section_or_in_neither() {
        let error = AgentClient::new(&plain("https://10.2.1.1:7401")).unwrap_err();
        assert!(matches!(error, ClientError::NoTls(_)), "{error}");
        let files = tls::Files { ca: "/x".into(), certificate: "/x".into(), key: "/x".into() };
        let at = AgentAt { tls: Some(files.clone()), ..plain("http://10.2.1.1:7401") };
        assert!(matches!(AgentClient::new(&at), Err(ClientError::NoHttps(_))));
        let at = AgentAt { tls: Some(files), ..plain("https://10.2.1.1:7401") };
        assert!(matches!(AgentClient::new(&at), Err(ClientError::Tls(_))));
    }

    #[tokio::test]
    async fn an_agent_that_is_not_there_is_named() {
        let agent = AgentClient::new(&plain("http://127.0.0.1:9")).unwrap();
        let error = agent.connect().await.unwrap_err();
        assert!(chain(&error).contains("http://127.0.0.1:9"), "{error}");
        assert!(chain(&error).to_lowercase().contains("refused"), "{}", chain(&error));
    }
}
