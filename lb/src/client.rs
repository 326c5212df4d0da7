//! The command line's side of the admin API: requests over hyper, events as they come.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{Method, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;

use crate::admin::Problem;

/// The load balancer is on this machine or near.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);
/// No answer of the API takes longer; events are no answers.
const ANSWER_PATIENCE: Duration = Duration::from_secs(30);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address is not one.
    #[error("{0:?} is not an address of the admin API; write for example http://127.0.0.1:7400")]
    Url(String),
    /// Nobody there.
    #[error("cannot reach the load balancer at {url} (is `lb run` running, and is this its admin address?)")]
    Unreachable {
        /// The address.
        url: String,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// The connection broke.
    #[error("the connection to the load balancer at {url} broke off")]
    Broken {
        /// The address.
        url: String,
        /// What happened.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Nothing came.
    #[error("the load balancer at {url} does not answer")]
    Silent {
        /// The address.
        url: String,
    },
    /// The API said no.
    #[error("{}", .0.detail)]
    Problem(Problem),
    /// Not an answer of this API.
    #[error("unexpected answer ({status}) from {url}: is this the load balancer's admin API?")]
    Answer {
        /// The address.
        url: String,
        /// The HTTP status.
        status: StatusCode,
    },
}

/// A load balancer's admin API.
#[derive(Clone, Debug)]
pub struct AdminClient {
    url: String,
    authority: String,
}

impl AdminClient {
    /// For `http://HOST:PORT`. Connects with each request.
    pub fn new(url: &str) -> Result<Self, ClientError> {
        let bad = || ClientError::Url(url.to_owned());
        let uri: Uri = url.parse().map_err(|_| bad())?;
        let authority = uri.authority().ok_or_else(bad)?;
        if uri.scheme_str() != Some("http") || !matches!(uri.path(), "" | "/") || authority.host().is_empty()
        {
            return Err(bad());
        }
        let port = authority.port_u16().unwrap_or(80);
        let authority = format!("{}:{port}", authority.host());
        Ok(Self { url: url.trim_end_matches('/').to_owned(), authority })
    }

    /// The API's address.
    pub fn url(&self) -> &str {
        &self.url
    }

    fn broken(&self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ClientError {
        ClientError::Broken { url: self.url.clone(), source: source.into() }
    }

    /// Sends a request; the answer may have any status.
    pub async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Response<Incoming>, ClientError> {
        let url = || self.url.clone();
        let connect = tokio::time::timeout(CONNECT_PATIENCE, TcpStream::connect(&self.authority));
        let stream = connect.await.map_err(|_| ClientError::Silent { url: url() })?;
        let stream = stream.map_err(|source| ClientError::Unreachable { url: url(), source })?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| self.broken(e))?;
        // It ends with the answer's body; what goes wrong, the sender or the body says.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, &self.authority)
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|error| self.broken(error))?;
        let answer = tokio::time::timeout(ANSWER_PATIENCE, sender.send_request(request)).await;
        answer.map_err(|_| ClientError::Silent { url: url() })?.map_err(|error| self.broken(error))
    }

    /// A request whose answer is JSON; one that the API refused is [`ClientError::Problem`].
    pub async fn json<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&(impl Serialize + Sync)>,
    ) -> Result<T, ClientError> {
        let body = body.map(|body| serde_json::to_vec(body).expect("requests have only string keys"));
        let response = self.send(method, path, body.unwrap_or_default().into()).await?;
        let status = response.status();
        let bytes = self.accept(response).await?.collect().await.map_err(|error| self.broken(error))?;
        serde_json::from_slice(&bytes.to_bytes())
            .map_err(|_| ClientError::Answer { url: self.url.clone(), status })
    }

    /// The body of a success, or the problem that the body is.
    async fn accept(&self, response: Response<Incoming>) -> Result<Incoming, ClientError> {
        let status = response.status();
        if status.is_success() {
            return Ok(response.into_body());
        }
        let bytes = response.into_body().collect().await.map_err(|error| self.broken(error))?.to_bytes();
        Err(match serde_json::from_slice(&bytes) {
            Ok(problem) => ClientError::Problem(problem),
            Err(_) => ClientError::Answer { url: self.url.clone(), status },
        })
    }

    /// Opens a stream of bytes.
    pub async fn pieces(&self, path: &str) -> Result<Pieces, ClientError> {
        let response = self.send(Method::GET, path, Bytes::new()).await?;
        Ok(Pieces { client: self.clone(), body: self.accept(response).await? })
    }

    /// Opens a stream of server-sent events.
    pub async fn events(&self, path: &str) -> Result<Events, ClientError> {
        let response = self.send(Method::GET, path, Bytes::new()).await?;
        let body = self.accept(response).await?;
        Ok(Events { client: self.clone(), body, unread: BytesMut::new() })
    }
}

/// A path with the parameters that are there.
pub fn query(path: &str, parameters: &[(&str, Option<&str>)]) -> String {
    let mut text = path.to_owned();
    for (name, value) in parameters {
        let Some(value) = value else { continue };
        text += if text.len() == path.len() { "?" } else { "&" };
        text += name;
        text.push('=');
        for byte in value.bytes() {
            match byte {
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b':' | b'/' | b',' => {
                    text.push(byte.into());
                }
                _ => text += &format!("%{byte:02X}"),
            }
        }
    }
    text
}

/// A stream of bytes as they come.
pub struct Pieces {
    client: AdminClient,
    body: Incoming,
}

impl Pieces {
    /// The next bytes; `None` when the stream has ended.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        while let Some(frame) = self.body.frame().await {
            let frame = frame.map_err(|error| self.client.broken(error))?;
            if let Ok(data) = frame.into_data() {
                return Ok(Some(data));
            }
        }
        Ok(None)
    }
}

/// A server-sent event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerEvent {
    /// Its name.
    pub name: String,
    /// Its data.
    pub data: String,
}

/// Server-sent events as they come.
pub struct Events {
    client: AdminClient,
    body: Incoming,
    unread: BytesMut,
}

impl Events {
    /// The next event; `None` when the stream has ended.
    pub async fn next(&mut self) -> Result<Option<ServerEvent>, ClientError> {
        loop {
            while let Some(block) = take_block(&mut self.unread) {
                if let Some(event) = parse_block(&block) {
                    return Ok(Some(event));
                }
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(frame) => {
                    let frame = frame.map_err(|error| self.client.broken(error))?;
                    if let Some(data) = frame.data_ref() {
                        self.unread.extend_from_slice(data);
                    }
                }
            }
        }
    }
}

/// What stands before the next empty line.
fn take_block(unread: &mut BytesMut) -> Option<String> {
    let end = unread.windows(2).position(|pair| pair == b"\n\n")?;
    let block = unread.split_to(end + 2);
    Some(String::from_utf8_lossy(&block).into_owned())
}

fn parse_block(block: &str) -> Option<ServerEvent> {
    let (mut name, mut data) = (String::new(), String::new());
    for line in block.lines() {
        if let Some(value) = line.strip_prefix("event:") {
            name = value.trim_start().to_owned();
        } else if let Some(value) = line.strip_prefix("data:") {
            data += value.trim_start();
        }
    }
    (!data.is_empty()).then_some(ServerEvent { name, data })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for url in ["http://127.0.0.1:7400", "http://[::1]:7400/", "http://lb.example"] {
            assert!(AdminClient::new(url).is_ok(), "{url}");
        }
        for url in ["", "127.0.0.1:7400", "https://127.0.0.1:7400", "http://127.0.0.1:7400/v1", "http://"] {
            assert!(AdminClient::new(url).is_err(), "{url}");
        }
    }

    #[test]
    fn parameters_are_escaped() {
        let all = [("client", Some("2001:db8::/32")), ("service", None), ("backend", Some("a b&c=d%"))];
        assert_eq!(query("/v1/flows", &all), "/v1/flows?client=2001:db8::/32&backend=a%20b%26c%3Dd%25");
        assert_eq!(query("/v1/flows", &[("service", None)]), "/v1/flows");
    }

    #[test]
    fn events_come_apart_whatever_their_pieces() {
        let text = b": hello\n\nevent: phase\ndata: {\"a\":1}\n\nevent:finished\ndata:{}\n\n";
        let mut unread = BytesMut::new();
        let mut events = Vec::new();
        for byte in text {
            unread.extend_from_slice(&[*byte]);
            while let Some(block) = take_block(&mut unread) {
                events.extend(parse_block(&block));
            }
        }
        let event = |name: &str, data: &str| ServerEvent { name: name.into(), data: data.into() };
        assert_eq!(events, [event("phase", "{\"a\":1}"), event("finished", "{}")]);
    }

    #[tokio::test]
    async fn nobody_there_is_said_plainly() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let client = AdminClient::new(&format!("http://{free}")).unwrap();
        let error = client.json::<Problem>(Method::GET, "/v1/status", None::<&()>).await.unwrap_err();
        assert!(
            error.to_string().starts_with("cannot reach the load balancer at http://127.0.0.1:"),
            "{error}"
        );
    }
}
