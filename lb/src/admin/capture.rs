//! `GET /v1/capture`: packets at their verdict, as a pcap-ng stream for as long as somebody reads it.

use std::collections::HashSet;
use std::convert::Infallible;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use http::{StatusCode, header};
use lb_core::Reason;
use nix::time::{ClockId, clock_gettime};
use serde::Deserialize;
use tokio::sync::mpsc::Receiver;

use super::Admin;
use super::extract::Parameters;
use super::problem::Problem;
use crate::capture::stream::{Hook, Interface, Sample};
use crate::capture::{MEDIA_TYPE, Recorder};

/// Samples that go out as one piece of the stream.
const PIECE: usize = 256;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CaptureQuery {
    /// Labels, separated by commas.
    reason: Option<String>,
    one_in: Option<NonZeroU32>,
    count: Option<u64>,
    seconds: Option<u64>,
}

pub(super) async fn capture(
    State(admin): State<Arc<Admin>>,
    Parameters(query): Parameters<CaptureQuery>,
) -> Result<Response, Problem> {
    let reasons = query.reason.as_deref().map(reasons).transpose()?;
    let samples = admin.control.datapath().sample(query.one_in.unwrap_or(NonZeroU32::MIN));
    let (recorder, head) = Recorder::new(monotonic_epoch());
    let in_tc = admin.control.datapath().hooks().into_iter().filter(|hook| hook.mode.starts_with("tc"));
    let recording = Recording {
        samples,
        recorder,
        reasons,
        in_tc: in_tc.map(|hook| hook.interface).collect(),
        left: query.count.unwrap_or(u64::MAX),
    };
    let begin = stream::once(async { Ok::<_, Infallible>(Bytes::from(head)) });
    // An open stream would keep the server from stopping.
    let stop = admin.stop.clone();
    let seconds = query.seconds.map(Duration::from_secs);
    let end = async move {
        let time = async {
            match seconds {
                Some(seconds) => tokio::time::sleep(seconds).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = time => {}
        }
    };
    let body = Body::from_stream(begin.chain(recording.pieces()).take_until(Box::pin(end)));
    Ok(([(header::CONTENT_TYPE, MEDIA_TYPE)], body).into_response())
}

/// The reasons of these labels.
fn reasons(labels: &str) -> Result<HashSet<Reason>, Problem> {
    let find = |label: &str| {
        Reason::ALL.iter().find(|reason| reason.label() == label).copied().ok_or_else(|| {
            let known: Vec<_> = Reason::ALL.iter().map(|reason| reason.label()).collect();
            let detail = format!("there is no reason {label:?}; there are {}", known.join(", "));
            Problem::new(StatusCode::BAD_REQUEST, "unknown-reason", detail)
        })
    };
    labels.split(',').map(find).collect()
}

/// What the monotonic clock's zero is, in nanoseconds since 1970.
fn monotonic_epoch() -> u64 {
    let now = |clock| clock_gettime(clock).map_or(Duration::ZERO, Duration::from);
    let epoch = now(ClockId::CLOCK_REALTIME).saturating_sub(now(ClockId::CLOCK_MONOTONIC));
    u64::try_from(epoch.as_nanos()).unwrap_or(u64::MAX)
}

/// A capture under way. Dropping it ends the sampling for it.
struct Recording {
    samples: Receiver<Sample>,
    recorder: Recorder,
    /// `None`: all.
    reasons: Option<HashSet<Reason>>,
    /// Interfaces whose packets are taken in traffic control.
    in_tc: HashSet<String>,
    /// Packets until the end.
    left: u64,
}

impl Recording {
    fn pieces(self) -> impl Stream<Item = Result<Bytes, Infallible>> {
        stream::unfold(self, |mut recording| async move {
            let piece = recording.piece().await?;
            Some((Ok(piece), recording))
        })
    }

    /// The next packets; `None` at the end.
    async fn piece(&mut self) -> Option<Bytes> {
        let mut out = Vec::new();
        while out.is_empty() && self.left > 0 {
            let first = self.samples.recv().await?;
            self.record(&first, &mut out);
            for _ in 1..PIECE {
                let Ok(more) = self.samples.try_recv() else { break };
                self.record(&more, &mut out);
            }
        }
        (!out.is_empty()).then(|| out.into())
    }

    fn record(&mut self, sample: &Sample, out: &mut Vec<u8>) {
        let is_wanted = match (&self.reasons, sample.reason) {
            (None, _) => true,
            (Some(wanted), Some(reason)) => wanted.contains(&reason),
            (Some(_), None) => false,
        };
        if is_wanted && self.left > 0 {
            self.left -= 1;
            let in_tc = &self.in_tc;
            self.recorder.record(sample, |number| interface(in_tc, number), out);
        }
    }
}

fn interface(in_tc: &HashSet<String>, number: u32) -> Option<Interface> {
    let name = nix::net::if_::if_indextoname(number).ok()?.into_string().ok()?;
    let hook = if in_tc.contains(&name) { Hook::Tc } else { Hook::Xdp };
    Some(Interface { name, hook })
}
