//! Where connections come in: the handshake, and who calls.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::config::{Config, Transport};
use crate::tls::{Credentials, Identity, TlsError, plain_io};

/// How long a caller has for the handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// What is encrypted in one go; see [`crate::client`].
const WRITE_BYTES: usize = 1 << 20;

/// Who calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    /// Nobody was asked: there is no TLS.
    Anyone,
    /// As its certificate says.
    Known(Identity),
}

/// Lets callers in.
#[derive(Clone)]
pub enum Door {
    /// Whoever comes.
    Open,
    /// Whoever has a certificate of the CA.
    Guarded(Arc<ServerConfig>),
}

/// A caller who was let in.
pub(crate) enum Entered {
    /// In cleartext.
    Plain(TcpStream),
    /// With TLS.
    Tls {
        /// The connection.
        stream: Box<TlsStream<TcpStream>>,
        /// From the certificate.
        caller: Identity,
        /// Agreed in the handshake (RFC 7301), so that nobody waits for the first bytes.
        is_http2: bool,
    },
}

impl Door {
    /// As configured. The agent's own certificate has to be that of its site.
    pub fn of(config: &Config) -> Result<Self, TlsError> {
        match &config.transport {
            Transport::Plain => Ok(Self::Open),
            Transport::Tls(files) => {
                let credentials = Credentials::of_agent(files, &config.site)?;
                Ok(Self::Guarded(Arc::new(credentials.server_config()?)))
            }
        }
    }

    /// Waits for the caller's certificate; the error is in plain words.
    pub(crate) async fn let_in(&self, stream: TcpStream) -> io::Result<Entered> {
        let Self::Guarded(config) = self else { return Ok(Entered::Plain(stream)) };
        let acceptor = TlsAcceptor::from(config.clone());
        let handshake = acceptor.accept_with(stream, |tls| tls.set_buffer_limit(Some(WRITE_BYTES)));
        let stream = match tokio::time::timeout(HANDSHAKE_LIMIT, handshake).await {
            Ok(done) => done.map_err(plain_io)?,
            Err(_) => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "it does not finish its handshake"));
            }
        };
        let (_, tls) = stream.get_ref();
        let shown = tls.peer_certificates().and_then(<[_]>::first);
        let caller = shown.map(Identity::of).transpose().map_err(io::Error::other)?;
        let caller = caller.ok_or_else(|| io::Error::other("it shows no certificate"))?;
        let is_http2 = tls.alpn_protocol() == Some(b"h2");
        Ok(Entered::Tls { stream: Box::new(stream), caller, is_http2 })
    }
}
