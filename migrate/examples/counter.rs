//! A tiny TCP server for trying migrations: it answers each line with the number of lines so far on that
//! connection, so that a client sees every lost, doubled or forgotten one.
//!
//!     counter ADDRESS [--unix PATH] [--open PATH] [--fill-mib N]
//!
//! `--unix` connects to a socket outside (which cannot be moved), `--open` keeps a file open (which has to be
//! there at the target), `--fill-mib` holds so much memory.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;

fn main() -> std::io::Result<()> {
    let mut args = std::env::args().skip(1);
    let address = args.next().ok_or(std::io::ErrorKind::InvalidInput)?;
    // First of all: clients may come while memory is filled.
    let listener = TcpListener::bind(address)?;
    let (mut unix, mut file, mut memory) = (None, None, Vec::new());
    while let (Some(option), Some(value)) = (args.next(), args.next()) {
        match option.as_str() {
            "--unix" => unix = Some(std::os::unix::net::UnixStream::connect(value)?),
            "--open" => file = Some(std::fs::File::open(value)?),
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
