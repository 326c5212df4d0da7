//! Asks a server what it counted, over a connection of its own.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::protocol::redis::{Integers, Redis};
use crate::protocol::{Decoder, ReplyError};

/// How long to wait for the connection and for each part of the answer.
const LIMIT: Duration = Duration::from_secs(10);

/// Clients asked about at once, so that neither side's buffers fill up.
const QUESTIONS_AT_ONCE: usize = 256;

/// The server's count could not be read.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The connection failed.
    #[error("cannot read the counts of the server at {target}: is it still running and reachable?")]
    Io {
        /// Which server.
        target: SocketAddr,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The answer is none.
    #[error("the server's count of the messages is no number")]
    Reply(#[from] ReplyError),
}

/// How many messages of each client a redis server has counted. Connects in the calling thread's network
/// namespace.
pub fn redis_counts(target: SocketAddr, redis: &Redis, clients: u32) -> Result<Vec<u64>, VerifyError> {
    let failed = |source| VerifyError::Io { target, source };
    let mut stream = connect(target).map_err(failed)?;
    let mut decoder = Integers::default();
    let mut counts = Vec::with_capacity(clients as usize);
    let mut buffer = [0; 4096];
    let clients: Vec<u32> = (0..clients).collect();
    for chunk in clients.chunks(QUESTIONS_AT_ONCE) {
        let mut questions = Vec::new();
        for &client in chunk {
            redis.encode_count(client, &mut questions);
        }
        stream.write_all(&questions).map_err(failed)?;
        let expected = counts.len() + chunk.len();
        while counts.len() < expected {
            match stream.read(&mut buffer).map_err(failed)? {
                0 => return Err(failed(io::ErrorKind::UnexpectedEof.into())),
                bytes => decoder.feed(&buffer[..bytes], &mut counts)?,
            }
        }
    }
    Ok(counts)
}

fn connect(target: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&target, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    Ok(stream)
}
