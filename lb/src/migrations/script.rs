//! A coordinator that plays what a test wrote, with the real gate and no agents.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use migrate::coordinator::{
    AgentAt, Cutover, Decision, Left, Orders, Outcome, PhaseTime, Progress, Report, Resolution, Spec, Verdict,
};
use tokio::sync::Notify;
use tokio::sync::mpsc::UnboundedSender;

use super::{Coordinator, Leftover};

/// What happens in a migration.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Play {
    /// All goes well.
    Commit,
    /// The source refuses before anything is held.
    FailPrepare,
    /// The restore fails.
    FailRestore,
    /// Holds until it is aborted.
    UntilAbort,
    /// Flips, then waits for [`Script::go`].
    FlipAndWait,
    /// Flips, and then the target does not answer.
    Doubt,
    /// The coordinator has a bug.
    Panic,
}

pub(crate) struct Script {
    play: Play,
    pub(crate) go: Arc<Notify>,
    pub(crate) specs: Mutex<Vec<Spec>>,
    /// What was recovered, and where it was left.
    pub(crate) recovered: Mutex<Vec<(Spec, Left)>>,
    /// What agents answer, by site; nothing where there is no entry.
    pub(crate) seen: Mutex<HashMap<String, Leftover>>,
}

impl Script {
    pub(crate) fn new(play: Play) -> Arc<Self> {
        Arc::new(Self {
            play,
            go: Arc::default(),
            specs: Mutex::default(),
            recovered: Mutex::default(),
            seen: Mutex::default(),
        })
    }
}

struct Stage {
    spec: Spec,
    cutover: Arc<dyn Cutover>,
    progress: UnboundedSender<Progress>,
    phases: Vec<PhaseTime>,
}

impl Stage {
    fn phase(&mut self, name: &'static str) {
        let start_ms = self.phases.len() as f64;
        let end_ms = start_ms + 1.0;
        let _ = self.progress.send(Progress::Phase { name, start_ms, end_ms: None });
        let _ = self.progress.send(Progress::Phase { name, start_ms, end_ms: Some(end_ms) });
        self.phases.push(PhaseTime { name, start_ms, end_ms });
    }

    fn end(self, outcome: Outcome, reason: Option<&str>) -> Report {
        Report {
            outcome,
            reason: reason.map(str::to_owned),
            phases: self.phases,
            freeze_ms: 9.5,
            flip_us: 12.0,
            frozen_at_unix_us: Some(1),
            running_at_unix_us: Some(9501),
            image_bytes: 1000,
            sent_bytes: 1100,
            exposed_ms: 0.0,
        }
    }
}

async fn play(play: Play, mut stage: Stage, mut orders: Orders, go: Arc<Notify>) -> Report {
    let (backend, to) = (stage.spec.backend.clone(), stage.spec.target.site.clone());
    stage.phase("prepare");
    if let Err(refused) = stage.cutover.stage(&backend, &to) {
        return stage.end(Outcome::RolledBack, Some(&refused.0));
    }
    if matches!(play, Play::FailPrepare) {
        return stage.end(Outcome::RolledBack, Some("the source cannot be dumped"));
    }
    stage.phase("hold");
    let held = match stage.cutover.hold(&backend, stage.spec.hold) {
        Ok(generation) => generation,
        Err(refused) => return stage.end(Outcome::RolledBack, Some(&refused.0)),
    };
    let failure = match play {
        Play::Panic => panic!("a bug in the script"),
        Play::FailRestore => Some("the restore failed".to_owned()),
        Play::UntilAbort => {
            orders.abort.cancelled().await;
            Some("aborted".to_owned())
        }
        Play::Commit | Play::FlipAndWait | Play::Doubt | Play::FailPrepare => {
            stage.phase("flip");
            stage.cutover.flip(&backend, held, &to).err().map(|refused| refused.0)
        }
    };
    if let Some(reason) = failure {
        stage.phase("rollback");
        stage.cutover.resume(&backend, held).unwrap();
        return stage.end(Outcome::RolledBack, Some(&reason));
    }
    if matches!(play, Play::FlipAndWait) {
        go.notified().await;
    }
    if matches!(play, Play::Doubt) {
        let _ = stage.progress.send(Progress::Doubt(Some("no answer".to_owned())));
        while let Some(Resolution { verdict, answer }) = orders.verdicts.recv().await {
            if verdict == Verdict::RolledBack {
                let _ = answer.send(Err("it may serve".to_owned()));
                continue;
            }
            stage.cutover.record(Decision::Confirm).unwrap();
            let _ = answer.send(Ok(()));
            return stage.end(Outcome::Committed, Some("an operator said so"));
        }
    }
    stage.phase("release");
    stage.end(Outcome::Committed, None)
}

impl Coordinator for Script {
    fn run(
        &self,
        spec: Spec,
        cutover: Arc<dyn Cutover>,
        orders: Orders,
        progress: UnboundedSender<Progress>,
    ) -> BoxFuture<'static, Report> {
        self.specs.lock().unwrap().push(spec.clone());
        let stage = Stage { spec, cutover, progress, phases: Vec::new() };
        play(self.play, stage, orders, self.go.clone()).boxed()
    }

    fn recover(
        &self,
        spec: Spec,
        left: Left,
        cutover: Arc<dyn Cutover>,
        _: Orders,
        progress: UnboundedSender<Progress>,
    ) -> BoxFuture<'static, Report> {
        self.recovered.lock().unwrap().push((spec.clone(), left));
        let stage = Stage { spec, cutover, progress, phases: Vec::new() };
        async move {
            let Left::Before { generation } = left else {
                return stage.end(Outcome::Committed, None);
            };
            match stage.cutover.resume(&stage.spec.backend, generation) {
                Ok(_) => stage.end(Outcome::RolledBack, Some("the load balancer was restarted")),
                Err(refused) => stage.end(Outcome::InDoubt, Some(&refused.0)),
            }
        }
        .boxed()
    }

    fn survey(&self, agent: AgentAt, _: String) -> BoxFuture<'static, Result<Option<Leftover>, String>> {
        let seen = self.seen.lock().unwrap().get(&agent.site).cloned();
        std::future::ready(Ok(seen)).boxed()
    }
}
