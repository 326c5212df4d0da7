//! What the kernel programs say for debugging, in the daemon's log under the target `ebpf`.
//!
//! `RUST_LOG=info,ebpf=debug` turns it on. The level is a constant of the loaded program: while it is off, the
//! verifier leaves nothing of it in the program, and there is no thread here.

use std::thread;
use std::time::Duration;

use aya::Ebpf;
use aya_log::EbpfLogger;
use log::{Level, Log, Metadata, Record};

use super::program::kernel;
use crate::datapath::DatapathError;

/// The programs' constant that bounds what they say.
pub const LEVEL: &str = "AYA_LOG_LEVEL";

const OFF: u8 = 0;
/// How often the programs' ring is looked at.
const POLL: Duration = Duration::from_millis(20);

/// The level that the programs are loaded with.
pub fn level() -> u8 {
    if is_on() { Level::Debug as u8 } else { OFF }
}

fn is_on() -> bool {
    tracing::enabled!(target: "ebpf", tracing::Level::DEBUG)
}

/// Starts to forward what loaded programs say, if they were loaded to say anything. The thread ends with the process.
pub fn forward(ebpf: &mut Ebpf) -> Result<(), DatapathError> {
    if !is_on() {
        return Ok(());
    }
    const READING: &str = "reading what the kernel programs say (RUST_LOG: ebpf=debug)";
    let mut logger = EbpfLogger::init_with_logger(ebpf, Forwarder).map_err(kernel(READING))?;
    let reading = move || {
        loop {
            logger.flush();
            thread::sleep(POLL);
        }
    };
    thread::Builder::new().name("ebpf-log".into()).spawn(reading).map_err(kernel(READING))?;
    tracing::info!("the kernel programs log each packet that they refuse; that is slow");
    Ok(())
}

/// aya-log speaks to `log`, the daemon to `tracing`.
struct Forwarder;

impl Log for Forwarder {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let text = record.args();
        match record.level() {
            Level::Error => tracing::error!(target: "ebpf", "{text}"),
            Level::Warn => tracing::warn!(target: "ebpf", "{text}"),
            Level::Info => tracing::info!(target: "ebpf", "{text}"),
            Level::Debug | Level::Trace => tracing::debug!(target: "ebpf", "{text}"),
        }
    }

    fn flush(&self) {}
}
