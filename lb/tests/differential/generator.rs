//! What happens in a round: packets of clients and servers that converse, of those that only pretend to, of routers in
//! between, damaged ones, and what the daemon changes meanwhile.
//!
//! ```text
//!   session:  SYN -> SYN-ACK -> ACK -> data, both ways -> FIN -> FIN -> ACK -> SYN of the next connection
//!             with true sequence numbers nine times in ten, and lies else
//!   of any:   fragments (in and out of order), ICMP errors quoting it from both ends and from routers,
//!             repetitions, damage of a few bytes, another length
//!   beside:   echo, options, extension headers, other protocols, gates that change, sites that move
//! ```
//!
//! How the server sees a session is learned from what the data path made of the client's packets, so that answers are
//! answers. All of it follows from the round's seed and the core's verdicts.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};

use lb_core::Action;

use crate::random::Random;
use crate::wire::{self, Extra, ICMP4, ICMP6, Ip, LinkAddresses, TCP, UDP};
use crate::world::{
    BACKENDS, BackendState, FIRST_PORT, Hook, PORTS, World, address, draw_backend, virtual_address,
};

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 0x10;
const LINK: usize = 14;
/// Sessions that go on at the same time; a new one takes the oldest's place.
const SESSIONS: usize = 48;
/// Packets remembered to be repeated.
const REMEMBERED: usize = 64;

/// A step of a round.
#[derive(Clone, Debug)]
pub enum Event {
    /// A frame arrives.
    Packet(Vec<u8>),
    /// The daemon changes a backend's record.
    Backend(u32, BackendState),
    /// Everything captured for a backend has been sent.
    Settle(u32),
}

/// How the server sees its client.
#[derive(Clone, Copy)]
struct Peer {
    server: SocketAddr,
    client: SocketAddr,
    link: LinkAddresses,
}

/// A conversation of a client with a service.
struct Session {
    protocol: u8,
    client: SocketAddr,
    service: SocketAddr,
    link: LinkAddresses,
    client_next: u32,
    server_next: u32,
    peer: Option<Peer>,
    stage: Stage,
    /// The last packets as they left the load balancer towards server and client.
    sent_on: [Vec<u8>; 2],
}

#[derive(Clone, Copy, PartialEq)]
enum Stage {
    Opened,
    Answered,
    Open,
    Closing,
    Over,
}

/// Who sent the last packet of which session.
type Origin = (usize, bool);

/// Draws the events of a round.
pub struct Generator {
    random: Random,
    v6: bool,
    /// The kernel tests programs with no shorter frames.
    shortest: usize,
    sessions: Vec<Session>,
    oldest: usize,
    waiting: VecDeque<Vec<u8>>,
    remembered: Vec<Vec<u8>>,
    origin: Option<Origin>,
}

impl Generator {
    pub fn new(random: Random, world: &World) -> Self {
        let v6 = world.v6;
        // At the tc hook it wants a whole IP header, at both a link header and a byte.
        let shortest = match world.hook {
            Hook::Xdp => LINK + 1,
            Hook::Tc => LINK + if v6 { 40 } else { 20 },
        };
        Self {
            random,
            v6,
            shortest,
            sessions: Vec::new(),
            oldest: 0,
            waiting: VecDeque::new(),
            remembered: Vec::new(),
            origin: None,
        }
    }

    pub fn next(&mut self) -> Event {
        self.origin = None;
        if !self.waiting.is_empty() && self.random.one_in(2) {
            return Event::Packet(self.waiting.pop_front().unwrap());
        }
        let frame = match self.random.below(1000) {
            0..160 => self.open(),
            160..700 => self.step(),
            700..760 => self.stranger(),
            760..850 => self.icmp(),
            850..920 => self.fragments(),
            920..990 => self.repeat(),
            990..996 => {
                let number = self.random.below(BACKENDS.into()) as u32;
                return Event::Backend(number, draw_backend(&mut self.random, number));
            }
            _ => return Event::Settle(self.random.below(BACKENDS.into()) as u32),
        };
        let frame = self.damage(frame);
        if self.remembered.len() < REMEMBERED {
            self.remembered.push(frame.clone());
        } else {
            let at = self.random.below(REMEMBERED as u64) as usize;
            self.remembered[at].clone_from(&frame);
        }
        Event::Packet(frame)
    }

    /// Learns from what became of the last packet.
    pub fn learn(&mut self, before: &[u8], after: &[u8], action: Action) {
        let Some((number, from_client)) = self.origin else { return };
        let translated = matches!(action, Action::Transmit { .. } | Action::Capture { .. });
        // Neither tunnelled nor answered by the load balancer itself.
        let protocol_at = if self.v6 { 20 } else { 23 };
        if !translated || before.len() != after.len() || before[protocol_at] != after[protocol_at] {
            return;
        }
        let session = &mut self.sessions[number];
        session.sent_on[usize::from(!from_client)] = after.to_vec();
        if from_client && let Some((client, server)) = ends(after, self.v6) {
            let mut link = [0; 12];
            link[..6].copy_from_slice(&after[6..12]);
            link[6..].copy_from_slice(&after[..6]);
            session.peer = Some(Peer { server, client, link });
        }
    }

    fn payload(&mut self) -> Vec<u8> {
        let most = if self.random.one_in(20) { 2600 } else { 300 };
        let length = self.random.below(most);
        (0..length).map(|n| n as u8).collect()
    }

    fn ip(&mut self, link: LinkAddresses, source: IpAddr, destination: IpAddr, protocol: u8) -> Ip {
        let ttl = if self.random.one_in(30) { self.random.below(3) as u8 } else { 64 };
        Ip {
            link,
            source,
            destination,
            ttl,
            class: self.random.next() as u8,
            id: self.random.next() as u32,
            may_fragment: self.random.one_in(2),
            extra: if self.random.one_in(40) {
                let kind = self.random.pick(&[0, 43, 60, 51, 135]);
                Extra::Options { words: 1 + self.random.below(9) as u8, kind }
            } else {
                Extra::None
            },
            protocol,
        }
    }

    fn client(&mut self) -> SocketAddr {
        let host = (self.random.below(4) << 8 | self.random.below(20)) as u16;
        SocketAddr::new(address(self.v6, 7, host), 1000 + self.random.below(2000) as u16)
    }

    fn link(&mut self) -> LinkAddresses {
        [2, 0, 0, 0, 1, 1, 2, 0, 0, 0, 0, self.random.below(4) as u8]
    }

    /// A new session's first packet.
    fn open(&mut self) -> Vec<u8> {
        let session = Session {
            protocol: self.random.pick(&[TCP, TCP, TCP, UDP, UDP]),
            client: self.client(),
            service: SocketAddr::new(
                virtual_address(self.v6),
                FIRST_PORT + self.random.below(u64::from(PORTS) + 1) as u16,
            ),
            link: self.link(),
            client_next: self.random.next() as u32,
            server_next: self.random.next() as u32,
            peer: None,
            stage: Stage::Opened,
            sent_on: [Vec::new(), Vec::new()],
        };
        let number = if self.sessions.len() < SESSIONS {
            self.sessions.push(session);
            self.sessions.len() - 1
        } else {
            self.oldest = (self.oldest + 1) % SESSIONS;
            self.sessions[self.oldest] = session;
            self.oldest
        };
        self.syn(number)
    }

    fn syn(&mut self, number: usize) -> Vec<u8> {
        let session = &mut self.sessions[number];
        session.stage = Stage::Opened;
        let sequence = session.client_next;
        session.client_next = sequence.wrapping_add(1);
        self.segment(number, true, SYN, sequence, 0, Vec::new())
    }

    /// A packet of a session: of TCP, or a datagram where the session is one of UDP.
    fn segment(
        &mut self,
        number: usize,
        from_client: bool,
        flags: u8,
        sequence: u32,
        acknowledgement: u32,
        payload: Vec<u8>,
    ) -> Vec<u8> {
        self.origin = Some((number, from_client));
        let with_checksum = !self.random.one_in(4);
        let (link, source, destination, protocol) = self.way(number, from_client);
        let ends = (source, destination);
        let ip = self.ip(link, source.ip(), destination.ip(), protocol);
        let body = if protocol == UDP {
            wire::udp(ends, with_checksum, &payload)
        } else {
            wire::tcp(ends, sequence, acknowledgement, flags, &payload)
        };
        ip.build(&body)
    }

    /// Between whom a session's packet goes.
    fn way(&mut self, number: usize, from_client: bool) -> (LinkAddresses, SocketAddr, SocketAddr, u8) {
        let session = &self.sessions[number];
        if from_client {
            return (session.link, session.client, session.service, session.protocol);
        }
        let wrong_site = self.random.one_in(15).then(|| self.random.below(6) as u8);
        let session = &self.sessions[number];
        let Peer { server, client, mut link } = session.peer.unwrap_or(Peer {
            server: session.service,
            client: session.client,
            link: session.link,
        });
        if let Some(site) = wrong_site {
            link[11] = 0xa0 + site;
        }
        (link, server, client, session.protocol)
    }

    /// The next packet of a session, or a lie.
    fn step(&mut self) -> Vec<u8> {
        if self.sessions.is_empty() {
            return self.open();
        }
        let number = self.random.below(self.sessions.len() as u64) as usize;
        let payload = self.payload();
        let session = &self.sessions[number];
        let (client_next, server_next) = (session.client_next, session.server_next);
        if self.random.one_in(10) {
            let from_client = self.random.one_in(2);
            let flags = self.random.next() as u8;
            let off = self.random.pick(&[0, 1, 0xffff_ffff, 65_535, 65_536, self.random_number()]);
            let (sequence, acknowledgement) =
                if from_client { (client_next, server_next) } else { (server_next, client_next) };
            return self.segment(
                number,
                from_client,
                flags,
                sequence,
                acknowledgement.wrapping_add(off),
                payload,
            );
        }
        let has_peer = session.peer.is_some();
        match session.stage {
            Stage::Opened if has_peer && !self.random.one_in(4) => {
                self.sessions[number].stage = Stage::Answered;
                self.sessions[number].server_next = server_next.wrapping_add(1);
                self.segment(number, false, SYN | ACK, server_next, client_next, Vec::new())
            }
            Stage::Opened => self.segment(number, true, SYN, client_next.wrapping_sub(1), 0, Vec::new()),
            Stage::Answered => {
                self.sessions[number].stage = Stage::Open;
                self.segment(number, true, ACK, client_next, server_next, Vec::new())
            }
            Stage::Open | Stage::Closing => self.converse(number, payload),
            Stage::Over => self.syn(number),
        }
    }

    fn random_number(&self) -> u32 {
        // Drawn from what the generator has seen, since `pick` borrows it.
        self.sessions.iter().fold(7, |sum, session| sum ^ session.client_next.rotate_left(9))
    }

    /// Data, or the connection's end.
    fn converse(&mut self, number: usize, payload: Vec<u8>) -> Vec<u8> {
        let from_client = self.random.one_in(2);
        let ends = match self.random.below(20) {
            0 => RST,
            1..4 => FIN,
            _ => 0,
        };
        let session = &mut self.sessions[number];
        let (own, other) = if from_client {
            (&mut session.client_next, session.server_next)
        } else {
            (&mut session.server_next, session.client_next)
        };
        let sequence = *own;
        *own = own.wrapping_add(payload.len() as u32 + u32::from(ends == FIN));
        session.stage = match (session.stage, ends) {
            (_, RST) | (Stage::Closing, FIN) => Stage::Over,
            (_, FIN) => Stage::Closing,
            (stage, _) => stage,
        };
        self.segment(number, from_client, ACK | ends, sequence, other, payload)
    }

    /// A packet of nobody in particular.
    fn stranger(&mut self) -> Vec<u8> {
        let (source, link) = (self.client(), self.link());
        let host = if self.random.one_in(5) { 2 } else { 1 };
        let port = FIRST_PORT + self.random.below(12) as u16;
        let destination = SocketAddr::new(address(self.v6, 200, host), port);
        let payload = self.payload();
        let ends = (source, destination);
        let (protocol, body) = match self.random.below(4) {
            0 => (UDP, wire::udp(ends, true, &payload)),
            1 => (self.random.next() as u8, payload),
            _ => {
                let (sequence, flags) = (self.random.next() as u32, self.random.next() as u8);
                (TCP, wire::tcp(ends, sequence, sequence ^ 77, flags, &payload))
            }
        };
        self.ip(link, source.ip(), destination.ip(), protocol).build(&body)
    }

    /// Echo, or an error about a session's packet from its far end, a router, or somebody who makes it up.
    fn icmp(&mut self) -> Vec<u8> {
        let (protocol, kinds): (_, &[[u8; 2]]) = if self.v6 {
            (ICMP6, &[[1, 0], [1, 4], [2, 0], [3, 0], [4, 1], [128, 0], [128, 0], [129, 0], [135, 0]])
        } else {
            (ICMP4, &[[3, 0], [3, 1], [3, 3], [3, 4], [11, 0], [12, 0], [8, 0], [8, 0], [0, 0]])
        };
        let kind = self.random.pick(kinds);
        let rest = self.random.next() as u32;
        let about = self.sessions.get(self.random.below(SESSIONS as u64) as usize);
        let towards_client = self.random.one_in(2);
        let quoted = about.map_or(&[][..], |session| {
            session.sent_on[usize::from(!towards_client)].get(LINK..).unwrap_or(&[])
        });
        let addresses = if self.v6 { (8, 24) } else { (12, 16) };
        if matches!(kind[0], 8 | 128) || quoted.len() < 40 {
            let (source, link, body) = (self.client(), self.link(), self.payload());
            let host = if self.random.one_in(5) { 2 } else { 1 };
            let destination = address(self.v6, 200, host);
            let body = wire::icmp(source.ip(), destination, kind, rest, &body);
            return self.ip(link, source.ip(), destination, protocol).build(&body);
        }
        let read = |at: usize| -> IpAddr {
            if self.v6 {
                <[u8; 16]>::try_from(&quoted[at..at + 16]).unwrap().into()
            } else {
                <[u8; 4]>::try_from(&quoted[at..at + 4]).unwrap().into()
            }
        };
        let (sender, receiver) = (read(addresses.0), read(addresses.1));
        let session = about.unwrap();
        let link = match (towards_client, session.peer) {
            (true, Some(peer)) => peer.link,
            _ => session.link,
        };
        let quoted = quoted.to_vec();
        let source = if self.random.one_in(3) { address(self.v6, 66, 6) } else { receiver };
        let most = if self.random.one_in(4) {
            quoted.len()
        } else {
            quoted.len().min(self.random.pick(&[28, 48, 56, 64, 90]))
        };
        let body = wire::icmp(source, sender, kind, rest, &quoted[..most]);
        self.ip(link, source, sender, protocol).build(&body)
    }

    /// A datagram or segment in two or three parts; the first one comes now or later.
    fn fragments(&mut self) -> Vec<u8> {
        if self.sessions.is_empty() {
            return self.open();
        }
        let number = self.random.below(self.sessions.len() as u64) as usize;
        let from_client = !self.random.one_in(3);
        let (link, source, destination, protocol) = self.way(number, from_client);
        let payload = vec![5; 40 + self.random.below(400) as usize];
        let ends = (source, destination);
        let session = &self.sessions[number];
        let body = if protocol == UDP {
            wire::udp(ends, true, &payload)
        } else {
            let flags = if session.stage == Stage::Opened { SYN } else { ACK };
            wire::tcp(ends, session.client_next, session.server_next, flags, &payload)
        };
        let mut ip = self.ip(link, source.ip(), destination.ip(), protocol);
        let first = if self.random.one_in(6) { 8 } else { 24 };
        let second = first + 8 * (1 + self.random.below(2) as usize);
        let mut parts = Vec::new();
        for (from, to) in [(0, first), (first, second), (second, body.len())] {
            ip.extra = Extra::Fragment { offset: from as u16, more: to < body.len() };
            parts.push(ip.build(&body[from..to]));
        }
        if self.random.one_in(3) {
            parts.rotate_left(1);
        }
        self.waiting.extend(parts.drain(1..));
        parts.remove(0)
    }

    fn repeat(&mut self) -> Vec<u8> {
        if self.remembered.is_empty() {
            return self.open();
        }
        let at = self.random.below(self.remembered.len() as u64) as usize;
        self.remembered[at].clone()
    }

    fn damage(&mut self, mut frame: Vec<u8>) -> Vec<u8> {
        if self.random.one_in(12) {
            self.origin = None;
            for _ in 0..=self.random.below(3) {
                let at = self.random.below(frame.len().min(110) as u64) as usize;
                // The EtherType is left alone, since the other family's tables are not compared in this round.
                if !(12..14).contains(&at) {
                    frame[at] = self.random.next() as u8;
                }
            }
        }
        if self.random.one_in(25) {
            self.origin = None;
            let length = self.shortest + self.random.below(frame.len() as u64) as usize;
            frame.resize(length, 0xee);
        }
        if self.random.one_in(200) {
            self.origin = None;
            frame[12..14].copy_from_slice(&self.random.pick(&[[8, 6], [0x81, 0], [0, 0]]));
        }
        frame
    }
}

/// Sender and receiver of a packet without options.
fn ends(frame: &[u8], v6: bool) -> Option<(SocketAddr, SocketAddr)> {
    let (source, width, ports) = if v6 { (22, 16, 54) } else { (26, 4, 34) };
    let protocol = if v6 { frame[20] } else { frame[23] };
    if frame.len() < ports + 8 || ![TCP, UDP].contains(&protocol) || !v6 && frame[14] != 0x45 {
        return None;
    }
    let port = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
    let ip = |at: usize| -> Option<IpAddr> {
        let bytes = &frame[at..at + width];
        if v6 {
            Some(<[u8; 16]>::try_from(bytes).ok()?.into())
        } else {
            Some(<[u8; 4]>::try_from(bytes).ok()?.into())
        }
    };
    Some(((ip(source)?, port(ports)).into(), (ip(source + width)?, port(ports + 2)).into()))
}
