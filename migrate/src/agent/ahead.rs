//! The source's part of memory that goes ahead of the images: a thread of its own, since it takes as long as the link
//! takes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::images::{ImagesError, Upload};
use crate::memory::ahead::{Ahead, Extent, LEAST_BYTES, Way, goes_on};
use crate::protocol::frames::PIECE_BYTES;
use crate::workload::processes;

/// How often it is told that bytes flow.
const NEWS_PERIOD: Duration = Duration::from_secs(1);

/// How often the queue to the connection is looked at in the end.
const QUEUE_PAUSE: Duration = Duration::from_millis(2);

/// What is told of it.
#[derive(Debug)]
pub enum News {
    /// So many bytes of memory have gone so far.
    Flows(u64),
    /// It is over: the way of the images, and what went there.
    Over(Result<(Upload, Ahead), ImagesError>),
}

/// Memory that is being copied; stops when it is dropped.
#[derive(Debug)]
pub struct Copying {
    stop: Arc<AtomicBool>,
    news: mpsc::UnboundedReceiver<News>,
}

impl Drop for Copying {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Copying {
    /// Begins to copy the memory of the workload whose root this is.
    pub fn start(root: i32, upload: Upload) -> Self {
        let (news, inbox) = mpsc::unbounded_channel();
        let stop = Arc::new(AtomicBool::new(false));
        let run = Run { root, upload, stop: stop.clone(), news, sent_bytes: 0, told: Instant::now() };
        tokio::task::spawn_blocking(move || run.run());
        Self { stop, news: inbox }
    }

    /// Has it end soon: what has not gone goes in the freeze.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// What happens next. May be dropped and called again.
    pub async fn next(&mut self) -> News {
        let broken = || News::Over(Err(ImagesError::Upload("the copying of memory broke off".to_owned())));
        self.news.recv().await.unwrap_or_else(broken)
    }
}

struct Run {
    root: i32,
    upload: Upload,
    stop: Arc<AtomicBool>,
    /// Who is told may have gone away; then nobody wants the rest either.
    news: mpsc::UnboundedSender<News>,
    sent_bytes: u64,
    told: Instant,
}

/// Why a round ended early.
enum Early {
    Stopped,
    Failed(ImagesError),
}

impl Run {
    fn run(mut self) {
        let copied = self.rounds();
        let Self { upload, news, .. } = self;
        let _ = news.send(News::Over(copied.map(|ahead| (upload, ahead))));
    }

    fn rounds(&mut self) -> Result<Ahead, ImagesError> {
        let mut ahead = Ahead::of(&processes::tree(self.root));
        let all = ahead.bytes();
        if all < LEAST_BYTES {
            return Ok(Ahead::default());
        }
        for (name, list) in ahead.lists() {
            for (number, part) in list.chunks(PIECE_BYTES).enumerate() {
                let extent = ((number * PIECE_BYTES) as u64, part.len() as u32);
                self.upload.send_piece(&name, &[extent], part)?;
            }
        }
        let (mut round, mut before) = (0, u64::MAX);
        loop {
            // A task that has ended since may have left its pid to somebody else.
            let sent = match ahead.round(&processes::tree(self.root), self) {
                Ok(sent) => sent,
                Err(Early::Stopped) => return Ok(ahead),
                Err(Early::Failed(error)) => return Err(error),
            };
            round += 1;
            tracing::debug!(round, sent, all, "memory went ahead");
            if !goes_on(round, sent, before, all) {
                break;
            }
            before = sent;
        }
        // What waits here would go in the freeze.
        let mut waiting = self.upload.waiting();
        while waiting > 0 && !self.stop.load(Ordering::Relaxed) {
            std::thread::sleep(QUEUE_PAUSE);
            let now = self.upload.waiting();
            if now < waiting && self.goes_on().is_err() {
                break;
            }
            waiting = now;
        }
        Ok(ahead)
    }
}

impl Way for Run {
    type End = Early;

    fn goes_on(&mut self) -> Result<(), Early> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(Early::Stopped);
        }
        if self.told.elapsed() >= NEWS_PERIOD {
            self.told = Instant::now();
            let _ = self.news.send(News::Flows(self.sent_bytes));
        }
        Ok(())
    }

    fn send(&mut self, name: &str, extents: &[Extent], data: &[u8]) -> Result<(), Early> {
        self.goes_on()?;
        self.upload.send_piece(name, extents, data).map_err(Early::Failed)?;
        self.sent_bytes += data.len() as u64;
        Ok(())
    }
}

/// What happens next, or nothing where nothing is copied.
pub async fn next(copying: &mut Option<Copying>) -> News {
    match copying {
        Some(copying) => copying.next().await,
        None => std::future::pending().await,
    }
}
