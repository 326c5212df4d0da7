//! One system in one case: a server, clients on all of its connections, and moves there and back.

use std::time::{Duration, Instant};

use anyhow::bail;
use bench::clock::monotonic_ns;
use bench::interrupt::Interrupt;
use bench::moves::case::Case;
use bench::moves::clients::{self, Clients};
use bench::moves::exchange::{Answer, Ask};
use bench::moves::report::{Move, Outcome};

use crate::systems::{Moved, Place, System};

/// Before each move: pages are rewritten, and all connections are at work.
const CALM: Duration = Duration::from_millis(300);
/// How long answers may stay out after a move: TCP's pauses between two attempts grow with how long it had to wait.
const SETTLE_LIMIT: Duration = Duration::from_secs(30);
/// How often it is looked whether they are there.
const LOOK: Duration = Duration::from_millis(5);
/// How long the server may take to answer a question; it looks at all of its memory for one of them.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// Whether a server can be moved again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GoesOn {
    /// It answers.
    Yes,
    /// It does not.
    No,
}

/// A system at work on a case. Between two moves it rests.
pub struct Measured {
    // The clients go before the lab that they are in.
    clients: Clients,
    outcome: Outcome,
    place: Box<dyn Place>,
}

impl Measured {
    /// Makes the place and connects the clients.
    pub fn new(system: System, case: &Case) -> anyhow::Result<Measured> {
        let place = system.set_up(case)?;
        let (target, connections) = (place.target(), case.connections);
        let clients = place.lab().client().run(|| clients::connect(target, connections))?;
        Ok(Measured { clients, outcome: Outcome::default(), place })
    }

    /// Moves the server once. Whether it can be moved again: after a failure it may be gone.
    pub fn move_once(&mut self, interrupt: &Interrupt) -> anyhow::Result<GoesOn> {
        let moved = self.watched_move(interrupt);
        // A failure may only be that somebody wants the end.
        interrupt.check()?;
        let goes_on = match moved {
            Ok(moved) => {
                self.outcome.moves.push(moved);
                GoesOn::Yes
            }
            Err(error) => {
                self.outcome.failures.push(format!("{error:#}"));
                let answers = self.settle(interrupt).and_then(|()| self.ask(Ask::Rest));
                if answers.is_ok() { GoesOn::Yes } else { GoesOn::No }
            }
        };
        self.clients.rest();
        Ok(goes_on)
    }

    fn watched_move(&mut self, interrupt: &Interrupt) -> anyhow::Result<Move> {
        self.clients.work();
        self.ask(Ask::Work)?;
        interrupt.sleep(CALM)?;
        self.settle(interrupt)?;
        self.clients.watch();
        let (from, counts) = (self.place.site(), self.clients.counts());
        let before = self.place.lab().sent_between(from)?;
        let moved = self.place.move_over(interrupt)?;
        let bytes = self.place.lab().sent_between(from)? - before;
        self.settle(interrupt)?;
        let stalls_ms = self.clients.stalls_ms();
        let now = self.clients.counts();
        if (now.lost, now.resets) != (counts.lost, counts.resets) {
            let (lost, broke) = (now.lost - counts.lost, now.resets - counts.resets);
            bail!("the server moved, but {broke} connections broke and {lost} requests were lost");
        }
        let freeze_ms = self.ask(Ask::Rest)?.longest_gap_ns as f64 / 1e6;
        let Moved { total, phases_ms, exposed_ms } = moved;
        let total_ms = total.as_secs_f64() * 1e3;
        Ok(Move { freeze_ms, stalls_ms, bytes, total_ms, phases_ms, exposed_ms })
    }

    /// The end: whatever still waits for an answer is lost, and the memory has to be as it was written.
    pub fn finish(mut self, interrupt: &Interrupt) -> anyhow::Result<Outcome> {
        // After a failure there may be nobody left to wait for.
        let patience = if self.outcome.failures.is_empty() { SETTLE_LIMIT } else { Duration::ZERO };
        let end = Instant::now() + patience;
        while !self.clients.is_quiet() && Instant::now() < end {
            interrupt.sleep(LOOK)?;
        }
        match self.ask(Ask::Check) {
            Ok(answer) => self.outcome.wrong_pages = answer.wrong_pages,
            // A server that is gone has been told of already.
            Err(error) if self.outcome.failures.is_empty() => {
                self.outcome.failures.push(format!("{error:#}"))
            }
            Err(_) => {}
        }
        self.outcome.counts = self.clients.finish();
        Ok(self.outcome)
    }

    /// Waits until every connection that waited has been answered, and every probe anew.
    fn settle(&self, interrupt: &Interrupt) -> anyhow::Result<()> {
        let (since_ns, end) = (monotonic_ns(), Instant::now() + SETTLE_LIMIT);
        while !self.clients.settled(since_ns) {
            if Instant::now() > end {
                bail!("connections are not answered within {SETTLE_LIMIT:?}: {:?}", self.clients.counts());
            }
            interrupt.sleep(LOOK)?;
        }
        Ok(())
    }

    fn ask(&self, what: Ask) -> anyhow::Result<Answer> {
        let target = self.place.target();
        Ok(self.place.lab().client().run(|| clients::ask(target, what, ANSWER_LIMIT))?)
    }
}
