//! `lb capture`.

use std::io::{self, ErrorKind, IsTerminal as _, Write};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

use super::{AdminArgs, ClientError, NOT_DONE, failed};
use crate::client::{AdminClient, query};

#[derive(Debug, Args)]
pub(super) struct CaptureArgs {
    #[command(flatten)]
    admin: AdminArgs,
    /// Where to write the capture; `-`: standard output.
    #[arg(short, long, value_name = "FILE")]
    write: PathBuf,
    /// Only packets of this reason (as in the metric drover_packets_total); may be given several times.
    #[arg(long, value_name = "LABEL")]
    reason: Vec<String>,
    /// One packet in so many.
    #[arg(long, value_name = "N", default_value = "1")]
    one_in: NonZeroU32,
    /// End after so many packets.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// End after so many seconds.
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(1..))]
    seconds: Option<u64>,
}

/// Why there is no capture.
#[derive(Debug, thiserror::Error)]
pub(super) enum CaptureError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("{}: cannot be written", .path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "a capture is no text for a terminal; pipe it (lb capture -w - | wireshark -k -i -) or write it to a file"
    )]
    Terminal,
}

pub(super) async fn command(args: CaptureArgs) -> ExitCode {
    match capture(&args).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error, NOT_DONE),
    }
}

async fn capture(args: &CaptureArgs) -> Result<(), CaptureError> {
    let to_file = args.write != Path::new("-");
    if !to_file && io::stdout().is_terminal() {
        return Err(CaptureError::Terminal);
    }
    let client = AdminClient::new(&args.admin.admin)?;
    let reasons = (!args.reason.is_empty()).then(|| args.reason.join(","));
    let (one_in, count) = (args.one_in.to_string(), args.count.map(|count| count.to_string()));
    let seconds = args.seconds.map(|seconds| seconds.to_string());
    let path = query(
        "/v1/capture",
        &[
            ("reason", reasons.as_deref()),
            ("one_in", Some(&one_in)),
            ("count", count.as_deref()),
            ("seconds", seconds.as_deref()),
        ],
    );
    let mut pieces = client.pieces(&path).await?;
    let failure = |source| CaptureError::Write { path: args.write.clone(), source };
    // Only now: a refused capture leaves no empty file, and no old one emptied.
    let mut out: Box<dyn Write> = if to_file {
        Box::new(std::fs::File::create(&args.write).map_err(failure)?)
    } else {
        Box::new(io::stdout())
    };
    let mut bytes = 0;
    loop {
        let piece = tokio::select! {
            piece = pieces.next() => piece?,
            _ = tokio::signal::ctrl_c() => None,
        };
        let Some(piece) = piece else { break };
        match out.write_all(&piece).and_then(|()| out.flush()) {
            Ok(()) => bytes += piece.len() as u64,
            // Whoever read it has seen enough.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(()),
            Err(error) => return Err(failure(error)),
        }
    }
    if to_file {
        eprintln!("{} written to {}", super::text::bytes(bytes), args.write.display());
    }
    Ok(())
}
