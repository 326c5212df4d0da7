//! A client's side of a handshake, up to the other end's word.

use std::io::{self, Read};
use std::sync::Arc;

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::words::{plain_io, plain_words};

/// What is encrypted in one go, as much as one HTTP/2 frame of images carries.
const WRITE_BYTES: usize = 1 << 20;

/// Shows the own certificate, looks at the other's, and waits until the other end takes ours.
///
/// In TLS 1.3 a client is done before the server has seen its certificate (RFC 8446 section 2); a refusal would be
/// found by the first request, broken off without a reason. The agent's HTTP/2 settings, which come unasked, are its
/// yes.
pub(crate) async fn dial(
    tcp: TcpStream,
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
) -> io::Result<TlsStream<TcpStream>> {
    let connector = TlsConnector::from(config);
    let connecting = connector.connect_with(name, tcp, |tls| tls.set_buffer_limit(Some(WRITE_BYTES)));
    let mut stream = connecting.await.map_err(plain_io)?;
    let (tcp, tls) = stream.get_mut();
    loop {
        let told = tls.process_new_packets().map_err(|error| io::Error::other(plain_words(&error)))?;
        if told.plaintext_bytes_to_read() > 0 {
            return Ok(stream);
        }
        tcp.readable().await?;
        match tls.read_tls(&mut WhatIsThere(tcp)) {
            Ok(0) => {
                let problem = "it ended the connection instead of taking our certificate: its log says why";
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, problem));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// Reads without waiting.
struct WhatIsThere<'a>(&'a TcpStream);

impl Read for WhatIsThere<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.try_read(buffer)
    }
}
