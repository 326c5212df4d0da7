//! A tiny TCP server for trying migrations: it answers each line with the number of lines so far on that
//! connection, so that a client sees every lost, doubled or forgotten one.
//!
//!     counter ADDRESS [--unix PATH] [--unix-in-flight PATH] [--open PATH] [--write PATH] [--fill-mib N]
//!
//! `--unix` connects to a socket outside (which cannot be moved), `--unix-in-flight` puts such a connection into a
//! message that nobody has read yet (where only CRIU sees it), `--open` keeps a file open (which has to be there at the
//! target), `--write` one that it may write to, `--fill-mib` holds so much memory.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

fn main() -> std::io::Result<()> {
    let mut args = std::env::args().skip(1);
    let address = args.next().ok_or(std::io::ErrorKind::InvalidInput)?;
    // First of all: clients may come while memory is filled.
    let listener = TcpListener::bind(address)?;
    let (mut unix, mut file, mut memory) = (Vec::new(), None, Vec::new());
    while let (Some(option), Some(value)) = (args.next(), args.next()) {
        match option.as_str() {
            "--unix" => unix.push(UnixStream::connect(value)?),
            "--unix-in-flight" => unix.extend(send_away(&UnixStream::connect(value)?)?),
            "--open" => file = Some(std::fs::File::open(value)?),
            "--write" => file = Some(std::fs::File::options().read(true).write(true).open(value)?),
            // Of different content, so that no page is like another.
            "--fill-mib" => memory = (0..value.parse::<u64>().unwrap_or(0) << 17).collect(),
            _ => return Err(std::io::ErrorKind::InvalidInput.into()),
        }
    }
    for stream in listener.incoming() {
        let mut stream = stream?;
        std::thread::spawn(move || {
            let Ok(reading) = stream.try_clone() else { return };
            let _ = stream.set_nodelay(true);
            for (count, line) in BufReader::new(reading).lines().enumerate() {
                if line.is_err() || stream.write_all(format!("{}\n", count + 1).as_bytes()).is_err() {
                    return;
                }
            }
        });
    }
    drop((unix, file, memory));
    Ok(())
}

/// Sends a connection from one end of a pair to the other, where nobody takes it out.
fn send_away(connection: &UnixStream) -> std::io::Result<[UnixStream; 2]> {
    let (from, to) = UnixStream::pair()?;
    let descriptors = [connection.as_raw_fd()];
    let message = [ControlMessage::ScmRights(&descriptors)];
    sendmsg::<()>(from.as_raw_fd(), &[std::io::IoSlice::new(b"x")], &message, MsgFlags::empty(), None)?;
    Ok([from, to])
}
