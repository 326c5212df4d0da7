//! Ctrl-C and SIGTERM: noted on a thread, and looked for wherever a drill waits.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};

/// Someone asked the drill to end. Unwinding to `main` drops, and so stops, everything.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// Whether someone asked the drill to end.
#[derive(Clone, Debug)]
pub struct Interrupt(Arc<AtomicBool>);

/// How soon an interrupt is noticed.
pub const NOTICED_WITHIN: Duration = Duration::from_millis(50);

impl Interrupt {
    /// From now on signals are noted instead of ending the process; a second one ends it at once.
    pub fn watch() -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        let (mut interrupt, mut terminate) = {
            let _entered = runtime.enter();
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
        };
        let noted = Arc::new(AtomicBool::new(false));
        let noting = Arc::clone(&noted);
        std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
            runtime.block_on(async {
                loop {
                    tokio::select! {
                        _ = interrupt.recv() => {}
                        _ = terminate.recv() => {}
                    }
                    if noting.swap(true, Ordering::Relaxed) {
                        std::process::exit(130);
                    }
                }
            });
        })?;
        Ok(Self(noted))
    }

    /// An error if someone asked.
    pub fn check(&self) -> Result<(), Interrupted> {
        if self.0.load(Ordering::Relaxed) { Err(Interrupted) } else { Ok(()) }
    }

    /// Sleeps, unless someone asks.
    pub fn sleep(&self, duration: Duration) -> Result<(), Interrupted> {
        let end = Instant::now() + duration;
        loop {
            self.check()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(NOTICED_WITHIN));
        }
    }
}
