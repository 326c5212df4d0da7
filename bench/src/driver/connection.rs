//! One client's socket: bytes that could not be sent yet, and the decoder of what it receives.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use socket2::Socket;

use crate::protocol::{Decoder, ReplyError};

/// A client's connection. Its socket does not block.
pub(super) struct Connection {
    socket: Option<Socket>,
    decoder: Box<dyn Decoder>,
    /// Messages that the kernel has not taken as a whole, oldest first.
    unsent: VecDeque<Unsent>,
}

struct Unsent {
    sequence: u64,
    bytes: Vec<u8>,
    written: usize,
}

/// What reading brought.
#[derive(Debug)]
pub(super) enum Received {
    /// The decoder took what there was.
    Bytes,
    /// Nothing to read after all.
    Nothing,
    /// The other end closed the connection.
    Closed,
}

/// Why a connection failed.
#[derive(Debug)]
pub(super) enum Failure {
    Io(io::Error),
    Reply(ReplyError),
}

impl Connection {
    pub(super) fn new(socket: Socket, decoder: Box<dyn Decoder>) -> Self {
        Self { socket: Some(socket), decoder, unsent: VecDeque::new() }
    }

    /// The socket, while the connection is up.
    pub(super) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    pub(super) fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Queues a message behind what is unsent. Nothing is sent by this.
    pub(super) fn queue(&mut self, sequence: u64, bytes: &[u8]) {
        if self.socket.is_some() {
            self.unsent.push_back(Unsent { sequence, bytes: bytes.to_vec(), written: 0 });
        }
    }

    /// Sends as much as the kernel takes; returns the sequence numbers that are sent as a whole by now
    /// through `sent`.
    pub(super) fn flush(&mut self, mut sent: impl FnMut(u64)) -> io::Result<()> {
        let Some(socket) = &mut self.socket else { return Ok(()) };
        while let Some(message) = self.unsent.front_mut() {
            match socket.write(&message.bytes[message.written..]) {
                Ok(bytes) => message.written += bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            if message.written == message.bytes.len() {
                sent(message.sequence);
                self.unsent.pop_front();
            }
        }
        Ok(())
    }

    /// Drops the oldest unsent message: its datagram could not be sent.
    pub(super) fn skip_unsent(&mut self) {
        self.unsent.pop_front();
    }

    /// Reads once and decodes what came.
    pub(super) fn receive(&mut self, buffer: &mut [u8], replies: &mut Vec<u64>) -> Result<Received, Failure> {
        let Some(socket) = &mut self.socket else { return Ok(Received::Nothing) };
        match socket.read(buffer) {
            Ok(0) => Ok(Received::Closed),
            Ok(bytes) => {
                self.decoder.feed(&buffer[..bytes], replies).map_err(Failure::Reply)?;
                Ok(Received::Bytes)
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                Ok(Received::Nothing)
            }
            Err(error) => Err(Failure::Io(error)),
        }
    }

    /// Closes the socket; what is unsent stays unsent.
    pub(super) fn close(&mut self) {
        self.socket = None;
        self.unsent.clear();
    }
}
