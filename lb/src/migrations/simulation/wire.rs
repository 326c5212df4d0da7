//! The network between the load balancer and the agents: connections whose bytes come late, later while their link is
//! cut, and never when they are broken.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc::UnboundedSender;
use tokio::time::{Instant, Sleep};

use super::world::World;

/// The parties: the load balancer, and each site's agent.
pub(super) const PARTIES: usize = 3;

/// How late something is at most on a link that is slow.
const SLOW_MS: u64 = 900;
/// How long after a cut something is sent again at most.
const RETRY_MS: u64 = 400;
/// After so much nothing comes any more that was sent before.
pub(super) const LATENESS: Duration = Duration::from_millis(SLOW_MS + RETRY_MS);

/// What goes one way.
#[derive(Default)]
struct Way {
    /// With the moment when it arrives.
    under_way: VecDeque<(Instant, Vec<u8>)>,
    last: Option<Instant>,
    /// When the end arrives.
    end: Option<Instant>,
    is_broken: bool,
    reader: Option<Waker>,
}

impl Way {
    fn wake(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }
}

type Shared = Arc<Mutex<Way>>;

/// One end of a connection.
pub(super) struct End {
    network: Arc<Network>,
    link: usize,
    incoming: Shared,
    outgoing: Shared,
    sleep: Pin<Box<Sleep>>,
}

#[derive(Default)]
struct Link {
    cut_until: Option<Instant>,
    slow_until: Option<Instant>,
    ways: Vec<Weak<Mutex<Way>>>,
}

/// The network of one seed.
pub(super) struct Network {
    world: Arc<World>,
    links: Mutex<[Link; PARTIES]>,
    doors: Mutex<[Option<UnboundedSender<End>>; PARTIES]>,
}

/// The link between two parties.
pub(super) fn link_of(one: usize, other: usize) -> usize {
    // Of three: the one that is neither of them gives the number.
    PARTIES - one - other
}

impl Network {
    pub(super) fn new(world: Arc<World>) -> Arc<Self> {
        Arc::new(Self { world, links: Mutex::default(), doors: Mutex::default() })
    }

    /// A party lets others in from now on, or (`None`) is not there.
    pub(super) fn set_door(&self, party: usize, door: Option<UnboundedSender<End>>) {
        self.doors.lock().unwrap()[party] = door;
    }

    /// Nothing passes a link for a while; it comes afterwards.
    pub(super) fn cut(&self, link: usize, time: Duration) {
        self.links.lock().unwrap()[link].cut_until = Some(Instant::now() + time);
    }

    /// Everything on a link is late for a while.
    pub(super) fn slow(&self, link: usize, time: Duration) {
        self.links.lock().unwrap()[link].slow_until = Some(Instant::now() + time);
    }

    /// Breaks the connections on a link.
    pub(super) fn reset(&self, link: usize) {
        let ways = std::mem::take(&mut self.links.lock().unwrap()[link].ways);
        for way in ways.iter().filter_map(Weak::upgrade) {
            let mut way = way.lock().unwrap();
            way.is_broken = true;
            way.wake();
        }
    }

    /// When what is sent now arrives.
    fn arrival(&self, link: usize) -> Instant {
        let now = Instant::now();
        let (cut, slow) = {
            let links = self.links.lock().unwrap();
            (links[link].cut_until, links[link].slow_until)
        };
        let most_ms = if slow.is_some_and(|until| now < until) { SLOW_MS } else { 2 };
        let from = match cut {
            // Sent again when that comes through, and it is not tried all the time.
            Some(until) if now < until => until + self.world.between(0, RETRY_MS),
            _ => now,
        };
        from + self.world.between(0, most_ms)
    }

    /// Opens a connection.
    pub(super) async fn connect(self: Arc<Self>, from: usize, to: usize) -> io::Result<End> {
        let link = link_of(from, to);
        tokio::time::sleep_until(self.arrival(link)).await;
        let door = self.doors.lock().unwrap()[to].clone();
        let door = door.ok_or(io::ErrorKind::ConnectionRefused)?;
        let (one, other) = (Shared::default(), Shared::default());
        {
            let mut links = self.links.lock().unwrap();
            let ways = &mut links[link].ways;
            ways.retain(|way| way.strong_count() > 0);
            ways.extend([Arc::downgrade(&one), Arc::downgrade(&other)]);
        }
        let end = |incoming: &Shared, outgoing: &Shared| End {
            network: self.clone(),
            link,
            incoming: incoming.clone(),
            outgoing: outgoing.clone(),
            sleep: Box::pin(tokio::time::sleep(Duration::ZERO)),
        };
        door.send(end(&one, &other)).map_err(|_| io::ErrorKind::ConnectionRefused)?;
        let opened = end(&other, &one);
        tokio::time::sleep_until(self.arrival(link)).await;
        Ok(opened)
    }
}

impl End {
    fn send(&self, bytes: Option<&[u8]>) -> io::Result<()> {
        let arrival = self.network.arrival(self.link);
        let mut way = self.outgoing.lock().unwrap();
        if way.is_broken || way.end.is_some() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        // In order.
        let arrival = way.last.map_or(arrival, |last| last.max(arrival));
        way.last = Some(arrival);
        match bytes {
            Some(bytes) => way.under_way.push_back((arrival, bytes.to_vec())),
            None => way.end = Some(arrival),
        }
        way.wake();
        Ok(())
    }
}

impl AsyncRead for End {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let incoming = self.incoming.clone();
        let mut way = incoming.lock().unwrap();
        if way.is_broken {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        let now = Instant::now();
        let end = way.end;
        let wake_at = match (way.under_way.front_mut(), end) {
            (Some((at, bytes)), _) if *at <= now => {
                let taken = bytes.len().min(buffer.remaining());
                buffer.put_slice(&bytes[..taken]);
                bytes.drain(..taken);
                if bytes.is_empty() {
                    way.under_way.pop_front();
                }
                return Poll::Ready(Ok(()));
            }
            (Some((at, _)), _) => Some(*at),
            (None, Some(end)) if end <= now => return Poll::Ready(Ok(())),
            (None, end) => end,
        };
        way.reader = Some(context.waker().clone());
        drop(way);
        if let Some(at) = wake_at {
            self.sleep.as_mut().reset(at);
            if self.sleep.as_mut().poll(context).is_ready() {
                context.waker().wake_by_ref();
            }
        }
        Poll::Pending
    }
}

impl AsyncWrite for End {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.send(Some(bytes))?;
        self.network.world.step();
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // One that has ended already has.
        let _ = self.send(None);
        Poll::Ready(Ok(()))
    }
}

impl Drop for End {
    /// A process that is killed closes its connections, too.
    fn drop(&mut self) {
        let _ = self.send(None);
    }
}
