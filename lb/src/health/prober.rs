//! One probe: what is asked of a backend and what its answer is worth.
//!
//! Here are plain sockets; that their packets take the data path's way is the business of whoever runs this in
//! the probes' namespace. Every connection ends with a reset: nothing of a probe is repeated after it, when its
//! ports may belong to another one.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, header};
use http_body_util::Empty;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpSocket, TcpStream, UdpSocket};

use crate::config::Probe;

/// The largest datagram that is read.
const DATAGRAM: usize = 65_535;
/// How much of an answer is shown.
const SHOWN: usize = 32;

/// What a probe has found out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// The backend does its work.
    Well,
    /// It does not.
    Unwell(Ailment),
    /// The probe could not be made, for a reason that is not the backend's.
    Unknown(String),
}

/// What is wrong with a backend.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Ailment {
    /// A reset, or an ICMP error, in answer to a connection's first packet.
    #[error("refused")]
    Refused,
    /// Nothing came.
    #[error("no answer within {0:?}")]
    Silent(Duration),
    /// It broke off, or its host is not reachable.
    #[error("{0}")]
    Broken(String),
    /// The status is none of those expected.
    #[error("status {found} instead of {expected}")]
    Status {
        /// What came.
        found: u16,
        /// What is good.
        expected: String,
    },
    /// The datagram is not the one expected.
    #[error("answered {0}")]
    Answer(String),
}

/// Asks. `from` is the probe's own address and port, `to` the service's, `backend` the backend's own.
pub async fn probe(
    probe: &Probe,
    from: SocketAddr,
    to: SocketAddr,
    backend: SocketAddr,
    timeout: Duration,
) -> Finding {
    // A wrong datagram may be followed by the right one; at the end of patience it is what is to be told.
    let mut wrong = None;
    let asked = async {
        match probe {
            Probe::Tcp => connect(from, to).await.map(drop),
            Probe::Http { path, host, status } => {
                let stream = connect(from, to).await?;
                let host = host.clone().unwrap_or_else(|| backend.to_string());
                http_status(stream, path, &host, status).await
            }
            Probe::Udp { send, expect } => datagram(from, to, send, expect, &mut wrong).await,
        }
    };
    match tokio::time::timeout(timeout, asked).await {
        Ok(Ok(())) => Finding::Well,
        Ok(Err(finding)) => finding,
        Err(_) => Finding::Unwell(wrong.unwrap_or(Ailment::Silent(timeout))),
    }
}

fn unknown(doing: &str) -> impl FnOnce(io::Error) -> Finding {
    move |error| Finding::Unknown(format!("{doing}: {error}"))
}

fn unwell(error: io::Error) -> Finding {
    Finding::Unwell(match error.kind() {
        ErrorKind::ConnectionRefused => Ailment::Refused,
        _ => Ailment::Broken(error.to_string()),
    })
}

async fn connect(from: SocketAddr, to: SocketAddr) -> Result<TcpStream, Finding> {
    let socket = if to.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
    let socket = socket.map_err(unknown("making a socket"))?;
    socket.set_reuseaddr(true).map_err(unknown("sharing a port with what is left of a connection"))?;
    socket.set_zero_linger().map_err(unknown("ending connections with a reset"))?;
    socket.bind(from).map_err(|error| Finding::Unknown(format!("binding to {from}: {error}")))?;
    socket.connect(to).await.map_err(unwell)
}

async fn http_status(
    stream: TcpStream,
    path: &str,
    host: &str,
    expected: &RangeInclusive<u16>,
) -> Result<(), Finding> {
    let request = Request::get(path)
        .header(header::HOST, host)
        .header(header::USER_AGENT, concat!("drover-check/", env!("CARGO_PKG_VERSION")))
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| Finding::Unknown(format!("the request cannot be written: {error}")))?;
    let broken = |error: hyper::Error| Finding::Unwell(Ailment::Broken(plain(&error)));
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
    let mut answer = pin!(sender.send_request(request));
    let answer = tokio::select! {
        biased;
        answer = &mut answer => answer,
        // A connection may end with its answer already given.
        _ = connection => answer.await,
    };
    let found = answer.map_err(broken)?.status().as_u16();
    if expected.contains(&found) {
        return Ok(());
    }
    let expected = match (expected.start(), expected.end()) {
        (from, to) if from == to => from.to_string(),
        (from, to) => format!("{from} to {to}"),
    };
    Err(Finding::Unwell(Ailment::Status { found, expected }))
}

/// The error and what it came from, since hyper's own words say only where it was.
fn plain(error: &hyper::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

async fn datagram(
    from: SocketAddr,
    to: SocketAddr,
    send: &[u8],
    expect: &[u8],
    wrong: &mut Option<Ailment>,
) -> Result<(), Finding> {
    let socket = UdpSocket::bind(from)
        .await
        .map_err(|error| Finding::Unknown(format!("binding to {from}: {error}")))?;
    socket.connect(to).await.map_err(unknown("addressing the service"))?;
    socket.send(send).await.map_err(unwell)?;
    let mut buffer = vec![0; DATAGRAM];
    loop {
        let length = socket.recv(&mut buffer).await.map_err(unwell)?;
        let answer = &buffer[..length];
        if answer.starts_with(expect) {
            return Ok(());
        }
        let shown = &answer[..length.min(SHOWN)];
        *wrong = Some(Ailment::Answer(format!("\"{}\"", shown.escape_ascii())));
    }
}

#[cfg(test)]
#[path = "prober_tests.rs"]
mod tests;
