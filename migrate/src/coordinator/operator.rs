//! An operator's line to a migration that runs: call it off, or say how one in doubt ends.

use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::machine::Verdict;

/// An operator's end.
#[derive(Clone, Debug)]
pub struct Operator {
    abort: CancellationToken,
    verdicts: mpsc::UnboundedSender<Resolution>,
}

/// The migration's end.
#[derive(Debug)]
pub struct Orders {
    /// Cancelled when the migration is called off.
    pub abort: CancellationToken,
    /// Words on how it ends.
    pub verdicts: mpsc::UnboundedReceiver<Resolution>,
}

/// A verdict, and who waits to hear whether it is taken.
#[derive(Debug)]
pub struct Resolution {
    /// How it ends.
    pub verdict: Verdict,
    /// Whether that is taken, or why not.
    pub answer: oneshot::Sender<Result<(), String>>,
}

impl Operator {
    /// A line with both its ends. An operator's end that is dropped orders nothing.
    pub fn new() -> (Self, Orders) {
        let abort = CancellationToken::new();
        let (sender, verdicts) = mpsc::unbounded_channel();
        (Self { abort: abort.clone(), verdicts: sender }, Orders { abort, verdicts })
    }

    /// Calls the migration off; honoured before the flip only.
    pub fn abort(&self) {
        self.abort.cancel();
    }

    /// Says how a migration in doubt ends, or learns why that cannot be taken.
    pub async fn resolve(&self, verdict: Verdict) -> Result<(), String> {
        let (answer, answered) = oneshot::channel();
        let over = || "it has ended".to_owned();
        self.verdicts.send(Resolution { verdict, answer }).map_err(|_| over())?;
        answered.await.unwrap_or_else(|_| Err(over()))
    }
}

impl Orders {
    /// From nobody.
    pub fn none() -> Self {
        Operator::new().1
    }
}
