//! Who brings the pages: a process of its own beside each workload that was restored without them (the hidden subcommand
//! `pager`). It speaks CRIU's lazy-pages protocol, asks the source for pages that a task waits for and, in their turn,
//! for all others, and ends when every page is there. Neither agent has to live for that.
//!
//! One thread: what userfaultfd says of a task's memory is heard before anything else is put into it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use tokio::io::unix::AsyncFd;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

use super::guard::Bringer;
use super::line::{Brought, Line};
use super::restorer::{Restorer, SOCKET, Said as Criu};
use super::space::{Range, Space};
use super::uffd::{Filled, Said, Uffd};
use super::window::Window;
use super::wire::Question;
use crate::client::{AgentAt, AgentClient};
use crate::coordinator::machine::CATCHING_UP;
use crate::criu::images::{PAGE_BYTES, PagemapEntry, read_pagemap};
use crate::workload::sys;

/// What is asked for ahead in one question.
const AHEAD_PAGES: u32 = 64;
/// What comes with a page that a task waits for: its neighbours are often next.
const FAULT_PAGES: u32 = 8;
/// What is asked for before the tasks run: their stacks and the like. More would take the processor from the restore.
const EARLY_BYTES: u64 = 128 << 10;
/// Before a broken line is opened again.
const PAUSE: Duration = Duration::from_millis(100);

/// What a pager is told.
#[derive(Debug)]
pub struct Options {
    /// The migration.
    pub id: String,
    /// The images folder.
    pub folder: PathBuf,
    /// The agent that has the pages.
    pub source: AgentAt,
}

/// Which line: each has a connection of its own, so that what a task waits for does not queue behind the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    Faults,
    Ahead,
}

/// The subcommand `pager`. `guard` leads to the workload's pid 1. Says `ready` on stdout when CRIU may come.
pub fn run(options: Options, guard: OwnedFd) -> Result<()> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("start tokio")?;
    runtime.block_on(async {
        // A socket's path may have 107 bytes at most, the folder's may be longer.
        std::env::set_current_dir(&options.folder).context("enter the images folder")?;
        let listener = UnixListener::bind(SOCKET).context("listen for CRIU")?;
        let mut pager = Pager::new(&options, guard)?;
        pager.faults.client.connect().await.context("reach the source's agent")?;
        pager.ahead.client.connect().await.context("reach the source's agent")?;
        println!("ready");
        let Some(criu) = pager.wait_for_criu(&listener).await? else { return Ok(()) };
        let done = pager.serve(Restorer::new(criu)).await;
        if let Err(error) = &done {
            tracing::error!(migration = options.id, "the workload's memory is lost: {error:#}");
        }
        done
    })
}

/// A task that was restored without pages. It is looked after until no other lacks any, since what it touches for the
/// first time comes from here too.
struct Task {
    /// As which the source knows its memory.
    pid: i32,
    uffd: Uffd,
    /// Of the same userfaultfd, to be waited for.
    ready: AsyncFd<OwnedFd>,
    space: Space,
}

/// A line and what was asked on it.
struct Asked {
    client: Arc<AgentClient>,
    line: Option<Line>,
    /// When it broke last.
    broke: Option<Instant>,
    open: VecDeque<(Question, Instant)>,
}

impl Asked {
    fn bytes(&self) -> u64 {
        self.open.iter().map(|(question, _)| question.bytes() as u64).sum()
    }

    /// When it is to be opened again; `None` if it is open, or nothing is expected of it.
    fn reopens(&self) -> Option<Instant> {
        let is_missed = self.line.is_none() && !self.open.is_empty();
        is_missed.then(|| self.broke.map_or_else(Instant::now, |broke| broke + PAUSE))
    }
}

struct Pager {
    path: String,
    guard: AsyncFd<OwnedFd>,
    tasks: Vec<Task>,
    /// What is to be asked for ahead, smallest mappings first: stacks and heaps rather than caches.
    ahead_of: VecDeque<(i32, Range)>,
    window: Window,
    faults: Asked,
    ahead: Asked,
    brought: mpsc::UnboundedSender<(Which, Brought)>,
    news: mpsc::UnboundedReceiver<(Which, Brought)>,
    /// What came before CRIU had made all mappings.
    early: Vec<(Question, Bytes)>,
    is_restored: bool,
    /// When everything else is asked for; not before the tasks have caught up with what waited for them.
    all_from: Option<Instant>,
    /// What has been asked for ahead, and may be.
    asked_bytes: u64,
    limit_bytes: u64,
    came_bytes: u64,
    /// What the tasks lacked at the beginning.
    lacked_bytes: u64,
}

/// What there is to react to.
enum Event {
    Criu(io::Result<Criu>),
    Tasks,
    Brought(Which, Brought),
    Reopen(Which),
    All,
    Guard,
}

impl Pager {
    fn new(options: &Options, guard: OwnedFd) -> Result<Self> {
        nix::fcntl::fcntl(&guard, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))?;
        let asked = || -> Result<Asked> {
            let client = Arc::new(AgentClient::new(&options.source)?);
            Ok(Asked { client, line: None, broke: None, open: VecDeque::new() })
        };
        let (brought, news) = mpsc::unbounded_channel();
        Ok(Self {
            path: format!("/v1/migrations/{}/memory", options.id),
            guard: sys::register(guard).context("watch the guard")?,
            tasks: Vec::new(),
            ahead_of: VecDeque::new(),
            window: Window::default(),
            faults: asked()?,
            ahead: asked()?,
            brought,
            news,
            early: Vec::new(),
            is_restored: false,
            all_from: None,
            asked_bytes: 0,
            limit_bytes: EARLY_BYTES,
            came_bytes: 0,
            lacked_bytes: 0,
        })
    }

    /// `None` if the workload is given up before it is restored.
    async fn wait_for_criu(&self, listener: &UnixListener) -> Result<Option<UnixStream>> {
        tokio::select! {
            came = listener.accept() => Ok(Some(came.context("wait for CRIU")?.0)),
            _ = self.guard.readable() => Ok(None),
        }
    }

    async fn serve(&mut self, criu: Restorer) -> Result<()> {
        let mut criu = Some(criu);
        loop {
            if self.is_restored && self.tasks.iter().all(|task| task.space.is_complete()) {
                return self.finish().await;
            }
            self.ask_ahead();
            let event = tokio::select! {
                biased;
                _ = self.guard.readable() => Event::Guard,
                () = readable(&self.tasks) => Event::Tasks,
                said = next(&mut criu) => Event::Criu(said),
                Some((which, brought)) = self.news.recv() => Event::Brought(which, brought),
                () = until(self.faults.reopens()) => Event::Reopen(Which::Faults),
                () = until(self.ahead.reopens()) => Event::Reopen(Which::Ahead),
                () = until(self.all_from) => Event::All,
            };
            match event {
                // Pid 1 says nothing: it is gone, and with it the workload.
                Event::Guard => return Ok(()),
                Event::Tasks => self.hear_all()?,
                Event::Criu(said) => match said.context("hear CRIU")? {
                    Criu::Task(pid, uffd) => self.add(pid, uffd)?,
                    Criu::Finished => {
                        self.is_restored = true;
                        for (question, content) in std::mem::take(&mut self.early) {
                            self.fill(question, &content)?;
                        }
                    }
                    // The tasks run.
                    Criu::Ended if self.is_restored => {
                        criu = None;
                        self.all_from = Some(Instant::now() + CATCHING_UP);
                    }
                    // It has failed, and its tasks are killed.
                    Criu::Ended => return Ok(()),
                },
                Event::Brought(which, Brought::Answer(question, content)) => {
                    self.answered(which, question, &content)?;
                }
                Event::Brought(which, Brought::Broken(reason)) => {
                    tracing::warn!(reason, ?which, "no pages come from the source at the moment");
                    let asked = self.asked(which);
                    (asked.line, asked.broke) = (None, Some(Instant::now()));
                }
                Event::Reopen(which) => self.open(which),
                Event::All => {
                    self.all_from = None;
                    self.limit_bytes = u64::MAX;
                }
            }
        }
    }

    fn asked(&mut self, which: Which) -> &mut Asked {
        match which {
            Which::Faults => &mut self.faults,
            Which::Ahead => &mut self.ahead,
        }
    }

    /// Opens a line, and asks again for what has not come.
    fn open(&mut self, which: Which) {
        let (path, brought) = (self.path.clone(), self.brought.clone());
        let asked = self.asked(which);
        let line = Line::open(asked.client.clone(), path, which, brought);
        for (question, since) in &mut asked.open {
            *since = Instant::now();
            line.ask(*question);
        }
        asked.line = Some(line);
    }

    fn ask(&mut self, which: Which, question: Question) {
        let asked = self.asked(which);
        asked.open.push_back((question, Instant::now()));
        match &asked.line {
            Some(line) => line.ask(question),
            None if asked.broke.is_none() => self.open(which),
            // It is asked when the line is open again.
            None => {}
        }
    }

    fn add(&mut self, pid: i32, uffd: OwnedFd) -> Result<()> {
        let ranges = lazy_ranges(Path::new("."), pid)?;
        let bytes = ranges.iter().map(|range| range.end - range.start).sum::<u64>();
        tracing::debug!(pid, bytes, "lacks");
        self.lacked_bytes += bytes;
        self.ahead_of.extend(ranges.iter().map(|range| (pid, range.clone())));
        self.ahead_of.make_contiguous().sort_by_key(|(_, range)| range.end - range.start);
        self.add_task(pid, uffd, Space::lacking(ranges))
    }

    fn add_task(&mut self, pid: i32, uffd: OwnedFd, space: Space) -> Result<()> {
        Bringer(self.guard.get_ref().as_fd()).hold(&uffd).context("have a userfaultfd held")?;
        let ready = sys::register(uffd.try_clone().context("a userfaultfd")?).context("a userfaultfd")?;
        self.tasks.push(Task { pid, uffd: Uffd::new(uffd), ready, space });
        Ok(())
    }

    fn ask_ahead(&mut self) {
        loop {
            if self.ahead.bytes() >= self.window.bytes() || self.asked_bytes >= self.limit_bytes {
                return;
            }
            let Some((pid, range)) = self.ahead_of.front_mut() else { return };
            let pid = *pid;
            let chunk = range.start..range.end.min(range.start + u64::from(AHEAD_PAGES) * PAGE_BYTES);
            range.start = chunk.end;
            if range.is_empty() {
                self.ahead_of.pop_front();
            }
            // A task that waited for some of it may have it already, or have given it up.
            let mine = self.tasks.iter().filter(|task| task.pid == pid);
            if mine.flat_map(|task| task.space.wanted(&chunk)).next().is_some() {
                let pages = u32::try_from((chunk.end - chunk.start) / PAGE_BYTES).unwrap_or(AHEAD_PAGES);
                self.asked_bytes += chunk.end - chunk.start;
                self.ask(Which::Ahead, Question { pid, address: chunk.start, pages });
            }
        }
    }

    fn answered(&mut self, which: Which, question: Question, content: &Bytes) -> Result<()> {
        let asked = self.asked(which);
        let place = asked.open.iter().position(|(open, _)| *open == question);
        let Some((_, since)) = place.and_then(|place| asked.open.remove(place)) else {
            bail!("the source answers what nobody has asked");
        };
        if which == Which::Ahead {
            self.window.answered(content.len() as u64, since.elapsed());
        }
        self.came_bytes += content.len() as u64;
        self.fill(question, content)?;
        Ok(())
    }

    /// Puts pages wherever they are lacking.
    fn fill(&mut self, question: Question, content: &Bytes) -> Result<()> {
        let origins = question.address..question.address + content.len() as u64;
        let mut number = 0;
        while let Some(task) = self.tasks.get_mut(number) {
            let place = (task.pid == question.pid).then(|| task.space.wanted(&origins).into_iter().next());
            let Some(Some((place, origin))) = place else {
                number += 1;
                continue;
            };
            let from = usize::try_from(origin - question.address)?;
            let len = usize::try_from(place.end - place.start)?;
            let filled = task.uffd.copy(place.start, &content[from..from + len]).context("fill pages")?;
            match filled {
                Filled::Bytes(bytes) => task.space.remove(&(place.start..place.start + bytes)),
                Filled::Present => {
                    let page = place.start..place.start + PAGE_BYTES;
                    task.uffd.wake(&page).context("wake a task")?;
                    task.space.remove(&page);
                }
                Filled::Unmapped if !self.is_restored => {
                    self.early.push((question, content.clone()));
                    return Ok(());
                }
                // What took it away has been heard, or will be.
                Filled::Unmapped => task.space.remove(&(place.start..place.start + PAGE_BYTES)),
                Filled::Busy => self.hear_all()?,
                Filled::Gone => drop(self.tasks.swap_remove(number)),
            }
        }
        Ok(())
    }

    /// Hears everything that has happened to the tasks' memory.
    fn hear_all(&mut self) -> Result<()> {
        let mut number = 0;
        while let Some(task) = self.tasks.get(number) {
            match task.uffd.next().context("hear of a task's memory")? {
                Some(said) => self.heard(number, said)?,
                None => number += 1,
            }
        }
        Ok(())
    }

    fn heard(&mut self, number: usize, said: Said) -> Result<()> {
        let task = &mut self.tasks[number];
        match said {
            Said::Fault(address) => {
                let page = address / PAGE_BYTES * PAGE_BYTES;
                match task.space.origin_of(page, FAULT_PAGES) {
                    Some(origins) => {
                        let pages = u32::try_from((origins.end - origins.start) / PAGE_BYTES)?;
                        let question = Question { pid: task.pid, address: origins.start, pages };
                        let early = self.early.iter().position(|(early, _)| {
                            let end = early.address + early.bytes() as u64;
                            early.pid == question.pid && (early.address..end).contains(&question.address)
                        });
                        match early {
                            Some(place) => {
                                let (early, content) = self.early[place].clone();
                                self.fill_one(number, early, &content, page)?;
                            }
                            None if self.faults.open.iter().any(|(open, _)| *open == question) => {}
                            None => self.ask(Which::Faults, question),
                        }
                    }
                    // It was never there, or was given up, or has come in the meantime.
                    None => {
                        let range = page..page + PAGE_BYTES;
                        if task.uffd.zero(&range).context("fill a page with zeros")? == Filled::Present {
                            task.uffd.wake(&range).context("wake a task")?;
                        }
                    }
                }
            }
            Said::Fork(uffd) => {
                let (pid, space) = (task.pid, task.space.clone());
                self.add_task(pid, uffd, space)?;
            }
            Said::Remap { from, to, len } => task.space.remap(from, to, len),
            Said::Remove(range) => {
                task.uffd.unregister(&range).context("let go of memory")?;
                task.space.remove(&range);
            }
            Said::Unmap(range) => task.space.remove(&range),
        }
        Ok(())
    }

    /// Puts one page, that a task waits for before CRIU is done, from what has come early.
    fn fill_one(&mut self, number: usize, early: Question, content: &Bytes, page: u64) -> Result<()> {
        let task = &mut self.tasks[number];
        let Some(origins) = task.space.origin_of(page, 1) else { return Ok(()) };
        let from = usize::try_from(origins.start - early.address)?;
        let filled =
            task.uffd.copy(page, &content[from..from + PAGE_BYTES as usize]).context("fill a page")?;
        ensure!(!matches!(filled, Filled::Unmapped), "a task waits for a page that is not mapped");
        if filled != Filled::Busy {
            task.space.remove(&(page..page + PAGE_BYTES));
        }
        Ok(())
    }

    /// Every page is there: the workload does without us, and the source may go.
    async fn finish(&mut self) -> Result<()> {
        Bringer(self.guard.get_ref().as_fd()).done().context("let pid 1 let go")?;
        // With the last of them the kernel looks after the memory again.
        self.tasks.clear();
        tracing::info!(came_bytes = self.came_bytes, "all memory is here");
        if self.lacked_bytes == 0 {
            // The source owes nothing, and would not know what is meant.
            return Ok(());
        }
        self.ahead.open.clear();
        self.faults.line = None;
        self.ask(Which::Ahead, Question::DONE);
        if self.ahead.line.is_none() {
            self.open(Which::Ahead);
        }
        loop {
            match self.news.recv().await {
                Some((Which::Ahead, Brought::Answer(Question::DONE, _))) | None => return Ok(()),
                Some((Which::Ahead, Brought::Broken(reason))) => {
                    tracing::warn!(reason, "the source does not hear that all memory is here");
                    tokio::time::sleep(PAUSE).await;
                    self.open(Which::Ahead);
                }
                Some(_) => {}
            }
        }
    }
}

/// The ranges of a task that are to come later.
fn lazy_ranges(folder: &Path, pid: i32) -> Result<Vec<Range>> {
    let name = format!("pagemap-{pid}.img");
    let bytes = std::fs::read(folder.join(&name)).with_context(|| format!("read {name}"))?;
    let (_, entries) = read_pagemap(&name, &bytes)?;
    let lazy = entries.iter().filter(|entry| entry.is(PagemapEntry::LAZY));
    Ok(lazy.map(|entry| entry.vaddr..entry.end()).collect())
}

/// Waits until something happened to a task's memory.
async fn readable(tasks: &[Task]) {
    std::future::poll_fn(|cx| {
        let mut ready = Poll::Pending;
        for task in tasks {
            if let Poll::Ready(Ok(mut guard)) = task.ready.poll_read_ready(cx) {
                // All of it is heard now.
                guard.clear_ready();
                ready = Poll::Ready(());
            }
        }
        ready
    })
    .await;
}

async fn next(criu: &mut Option<Restorer>) -> io::Result<Criu> {
    match criu {
        Some(criu) => criu.next().await,
        None => std::future::pending().await,
    }
}

async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}
