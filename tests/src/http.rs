//! A small blocking HTTP/1.1 client: one request on one connection, for asking our processes inside a namespace.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use rustls::{ClientConfig, ClientConnection, StreamOwned};
use serde_json::Value;

use crate::error::LabError;
use crate::namespace::Namespace;

/// How long to wait for a connection and for each part of the answer.
const LIMIT: Duration = Duration::from_secs(10);

/// An HTTP answer.
#[derive(Clone, Debug)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// Header names in lower case, with their values.
    pub headers: Vec<(String, String)>,
    /// The body, out of its transfer encoding.
    pub body: Vec<u8>,
}

impl Response {
    /// The value of a header, by its name in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    /// The body as JSON; null where there is none, a string where it is not JSON.
    pub fn json(&self) -> Value {
        if self.body.is_empty() {
            return Value::Null;
        }
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&self.body).into_owned()))
    }
}

/// Whom to ask.
#[derive(Clone, Debug)]
pub struct Server {
    /// Where.
    pub address: SocketAddr,
    /// How, if not in cleartext.
    pub tls: Option<Arc<ClientConfig>>,
}

/// Sends one request from inside `namespace` and reads the whole answer. A body is announced as `content_type`.
pub fn request(
    namespace: &Namespace,
    address: SocketAddr,
    method: &str,
    path: &str,
    content_type: &str,
    body: &[u8],
) -> Result<Response, LabError> {
    request_to(namespace, &Server { address, tls: None }, method, path, content_type, body)
}

/// [`request`] to a server that may speak TLS.
pub fn request_to(
    namespace: &Namespace,
    server: &Server,
    method: &str,
    path: &str,
    content_type: &str,
    body: &[u8],
) -> Result<Response, LabError> {
    let mut head = format!("{method} {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n", server.address);
    if !body.is_empty() {
        head += &format!("content-type: {content_type}\r\n");
    }
    head += &format!("content-length: {}\r\n\r\n", body.len());
    namespace.run(|| connect_and_exchange(server, &head, body)).map_err(|error| {
        let scheme = if server.tls.is_some() { "https" } else { "http" };
        LabError::Http { url: format!("{scheme}://{}{path}", server.address), problem: error.to_string() }
    })
}

fn connect_and_exchange(server: &Server, head: &str, body: &[u8]) -> std::io::Result<Response> {
    let stream = TcpStream::connect_timeout(&server.address, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    let Some(config) = &server.tls else { return exchange(stream, head, body) };
    let name = server.address.ip().into();
    let tls = ClientConnection::new(config.clone(), name).map_err(std::io::Error::other)?;
    exchange(StreamOwned::new(tls, stream), head, body)
}

fn exchange(mut stream: impl Read + Write, head: &str, body: &[u8]) -> std::io::Result<Response> {
    stream.write_all(head.as_bytes())?;
    // A server may answer and close before it has read all of a body that it refuses.
    let sent = stream.write_all(body);
    match read_response(&mut BufReader::new(stream)) {
        Ok(response) => Ok(response),
        Err(error) => Err(sent.err().unwrap_or(error)),
    }
}

fn read_response(reader: &mut impl BufRead) -> std::io::Result<Response> {
    let malformed = |what: &str| std::io::Error::other(format!("malformed answer: {what}"));
    let status_line = read_line(reader)?;
    let status = status_line
        .strip_prefix("HTTP/1.")
        .and_then(|rest| rest.split(' ').nth(1)?.parse().ok())
        .ok_or_else(|| malformed(&status_line))?;
    let mut headers = Vec::new();
    loop {
        let line = read_line(reader)?;
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(':').ok_or_else(|| malformed(&line))?;
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let mut response = Response { status, headers, body: Vec::new() };
    if response.header("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked")) {
        loop {
            let line = read_line(reader)?;
            let digits = line.split(';').next().unwrap_or_default().trim();
            let length = u64::from_str_radix(digits, 16).map_err(|_| malformed(&line))?;
            // RFC 9112 section 7.1: a chunk, the last (empty) one too, ends with an empty line; no trailers are asked for.
            reader.by_ref().take(length).read_to_end(&mut response.body)?;
            read_line(reader)?;
            if length == 0 {
                break;
            }
        }
    } else if let Some(length) = response.header("content-length") {
        let length: usize = length.parse().map_err(|_| malformed("content-length"))?;
        response.body.resize(length, 0);
        reader.read_exact(&mut response.body)?;
    } else {
        reader.read_to_end(&mut response.body)?;
    }
    Ok(response)
}

fn read_line(reader: &mut impl BufRead) -> std::io::Result<String> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> std::io::Result<Response> {
        read_response(&mut text.as_bytes())
    }

    #[test]
    fn bodies_by_length_by_chunks_and_to_the_end() {
        for text in [
            "HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n{\"a\":1}trailing",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n{\"a\r\n4;x=y\r\n\":1}\r\n0\r\n\r\n",
            "HTTP/1.0 200 OK\r\n\r\n{\"a\":1}",
        ] {
            let response = read(text).unwrap();
            assert_eq!((response.status, response.json()), (200, serde_json::json!({"a": 1})), "{text}");
        }
    }

    #[test]
    fn a_cut_or_strange_answer_is_an_error() {
        for text in
            ["", "SSH-2.0-x\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", "HTTP/1.1 200 OK\r\n"]
        {
            assert!(read(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_body_that_is_not_json_is_shown_as_text() {
        let response = read("HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\noops").unwrap();
        assert_eq!((response.status, response.json()), (404, Value::String("oops".into())));
    }
}
