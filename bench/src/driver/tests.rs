//! The driver against servers that do what servers should not.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::protocol::{Decoder, ReplyError};
use crate::tally::Faults;

/// Messages of a fixed size, numbered at their beginning; replies are the numbers, eight bytes each.
struct Numbers {
    transport: Transport,
    message_bytes: usize,
}

impl Protocol for Numbers {
    fn transport(&self) -> Transport {
        self.transport
    }

    fn encode(&self, _client: u32, sequence: u64, out: &mut Vec<u8>) {
        out.extend_from_slice(&sequence.to_be_bytes());
        out.resize(self.message_bytes, 0);
    }

    fn decoder(&self, _client: u32) -> Box<dyn Decoder> {
        Box::new(NumberDecoder(Vec::new()))
    }
}

struct NumberDecoder(Vec<u8>);

impl Decoder for NumberDecoder {
    fn feed(&mut self, bytes: &[u8], replies: &mut Vec<u64>) -> Result<(), ReplyError> {
        self.0.extend_from_slice(bytes);
        let whole = self.0.len() / 8 * 8;
        for number in self.0.drain(..whole).as_slice().chunks(8) {
            let number = u64::from_be_bytes(number.try_into().unwrap());
            if number == u64::MAX {
                return Err(ReplyError::Refused("no".into()));
            }
            replies.push(number);
        }
        Ok(())
    }
}

const MESSAGE_BYTES: usize = 32;

fn load(target: SocketAddr, clients: u32, rate_per_s: f64) -> Load {
    let second = Duration::from_secs(1);
    Load { target, source: Source::Any, clients, rate_per_s, connect_timeout: second, drain: second }
}

/// Two clients talk for a moment to a server that treats each connection like this: it is given the stream
/// and reads numbers from it.
fn tcp_run(message_bytes: usize, serve: fn(TcpStream, usize)) -> Timeline {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let target = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.unwrap();
            stream.set_nodelay(true).unwrap();
            std::thread::spawn(move || serve(stream, message_bytes));
        }
    });
    let protocol = Arc::new(Numbers { transport: Transport::Tcp, message_bytes });
    talk(load(target, 2, 200.0), protocol)
}

fn udp_run(serve: fn(&UdpSocket, u64, SocketAddr)) -> Timeline {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let target = socket.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut datagram = [0; MESSAGE_BYTES];
        while let Ok((_, from)) = socket.recv_from(&mut datagram) {
            serve(&socket, u64::from_be_bytes(datagram[..8].try_into().unwrap()), from);
        }
    });
    let protocol = Arc::new(Numbers { transport: Transport::Udp, message_bytes: MESSAGE_BYTES });
    talk(load(target, 2, 200.0), protocol)
}

fn talk(load: Load, protocol: Arc<dyn Protocol>) -> Timeline {
    let running = connect(load, protocol).unwrap().start().unwrap();
    std::thread::sleep(Duration::from_millis(600));
    assert!(!running.has_failed());
    running.stop().unwrap()
}

fn next_number(stream: &mut TcpStream, message_bytes: usize) -> Option<u64> {
    let mut message = vec![0; message_bytes];
    stream.read_exact(&mut message).ok()?;
    Some(u64::from_be_bytes(message[..8].try_into().unwrap()))
}

#[test]
fn replies_in_pieces_and_in_bursts_are_all_found() {
    let timeline = tcp_run(MESSAGE_BYTES, |mut stream, size| {
        while let Some(number) = next_number(&mut stream, size) {
            for byte in number.to_be_bytes() {
                stream.write_all(&[byte]).unwrap();
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    });
    assert_eq!(timeline.faults, Faults::default());
    assert!(timeline.messages.len() >= 100);
    for message in &timeline.messages {
        assert!(message.due_ns <= message.sent_ns.unwrap() && message.sent_ns <= message.answered_ns);
    }
}

#[test]
fn messages_that_the_kernel_takes_in_parts_arrive_whole_and_in_order() {
    // 4 MiB a message: more than the socket's buffers.
    let timeline = tcp_run(4 << 20, |mut stream, size| {
        while let Some(number) = next_number(&mut stream, size) {
            stream.write_all(&number.to_be_bytes()).unwrap();
        }
    });
    assert!(timeline.answered() > 4);
    let Faults { duplicated, reordered, resets, unreadable, .. } = timeline.faults;
    assert_eq!([duplicated, reordered, resets, unreadable], [0; 4]);
}

#[test]
fn a_stalled_server_does_not_slow_the_schedule_and_latency_counts_from_when_it_was_due() {
    let timeline = tcp_run(MESSAGE_BYTES, |mut stream, size| {
        while let Some(number) = next_number(&mut stream, size) {
            if number == 20 {
                std::thread::sleep(Duration::from_millis(250));
            }
            stream.write_all(&number.to_be_bytes()).unwrap();
        }
    });
    assert_eq!(timeline.faults, Faults::default());
    let late = |at_least_ms: u64| {
        timeline
            .messages
            .iter()
            .filter(|message| message.latency_ns().unwrap() >= at_least_ms * 1_000_000)
            .count()
    };
    // A message each 10 ms and client: those due in the first half of the stall waited more than half of it.
    assert!(late(125) >= 20 && late(240) >= 2, "{} {}", late(125), late(240));
    for pair in timeline.messages.windows(2) {
        let gap_ns = pair[1].due_ns - pair[0].due_ns;
        assert!((4_999_999..=5_000_001).contains(&gap_ns), "{gap_ns}");
    }
}

#[test]
fn resets_and_closed_connections_count_and_what_was_due_after_them_is_lost() {
    let reset = tcp_run(MESSAGE_BYTES, |mut stream, size| {
        while let Some(number) = next_number(&mut stream, size) {
            if number == 10 {
                socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
                return;
            }
            stream.write_all(&number.to_be_bytes()).unwrap();
        }
    });
    let closed = tcp_run(MESSAGE_BYTES, |mut stream, size| {
        for _ in 0..9 {
            let number = next_number(&mut stream, size).unwrap();
            stream.write_all(&number.to_be_bytes()).unwrap();
        }
    });
    for timeline in [reset, closed] {
        assert_eq!(timeline.faults.resets, 2);
        assert_eq!(timeline.answered(), 18);
        assert_eq!(timeline.faults.lost, timeline.messages.len() as u64 - 18);
        assert_eq!(timeline.errors.len(), 2);
    }
}

#[test]
fn a_tcp_server_that_answers_twice_or_with_an_error_is_found_out() {
    let twice = tcp_run(MESSAGE_BYTES, |mut stream, size| {
        while let Some(number) = next_number(&mut stream, size) {
            stream.write_all(&number.to_be_bytes()).unwrap();
            if number == 5 {
                stream.write_all(&number.to_be_bytes()).unwrap();
            }
        }
    });
    assert_eq!(twice.faults, Faults { duplicated: 2, ..Faults::default() });
    let refused = tcp_run(MESSAGE_BYTES, |mut stream, size| {
        next_number(&mut stream, size);
        stream.write_all(&u64::MAX.to_be_bytes()).unwrap();
        std::thread::sleep(Duration::from_secs(5));
    });
    assert_eq!(refused.faults.unreadable, 2);
    assert_eq!(refused.answered(), 0);
}

#[test]
fn datagrams_lost_doubled_and_swapped_are_told_apart() {
    let answer = |socket: &UdpSocket, number: u64, to: SocketAddr| {
        socket.send_to(&number.to_be_bytes(), to).unwrap();
    };
    let honest = udp_run(answer);
    assert_eq!(honest.faults, Faults::default());
    let timeline = udp_run(|socket, number, from| {
        let send = |number: u64| socket.send_to(&number.to_be_bytes(), from).unwrap();
        match number {
            3 => 0,
            7 => send(7) + send(7),
            10 => 0,
            11 => send(11) + send(10),
            _ => send(number),
        };
    });
    assert_eq!(timeline.faults, Faults { lost: 2, duplicated: 2, reordered: 2, ..Faults::default() });
}

#[test]
fn an_icmp_error_is_counted_and_the_client_goes_on() {
    let listener = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let target = listener.local_addr().unwrap();
    let protocol = Arc::new(Numbers { transport: Transport::Udp, message_bytes: MESSAGE_BYTES });
    let clients = connect(load(target, 1, 50.0), protocol).unwrap();
    drop(listener);
    let running = clients.start().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let timeline = running.stop().unwrap();
    assert!(timeline.faults.resets >= 5, "{:?}", timeline.faults);
    assert_eq!(timeline.faults.lost, timeline.messages.len() as u64);
    assert!(timeline.messages.iter().all(|message| message.sent_ns.is_some()));
}

#[test]
fn a_server_that_never_answers_holds_nobody_up() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let target = listener.local_addr().unwrap();
    let protocol = Arc::new(Numbers { transport: Transport::Tcp, message_bytes: MESSAGE_BYTES });
    let short = Load { drain: Duration::from_millis(200), ..load(target, 3, 1000.0) };
    let running = connect(short, protocol).unwrap().start().unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let stopped = Instant::now();
    let timeline = running.stop().unwrap();
    assert!((180..1000).contains(&stopped.elapsed().as_millis()), "{:?}", stopped.elapsed());
    assert!(timeline.messages.len() > 50);
    assert_eq!(timeline.faults.lost, timeline.messages.len() as u64);
}

#[test]
fn a_closed_port_and_a_senseless_load_are_errors_that_say_so() {
    let target = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
    let protocol = || Arc::new(Numbers { transport: Transport::Tcp, message_bytes: MESSAGE_BYTES });
    let error = connect(load(target, 1, 1.0), protocol()).err().unwrap();
    assert!(matches!(error, DriverError::Connect { client: 0, .. }), "{error}");
    for (clients, rate_per_s) in [(0, 1.0), (1, 0.0), (1, f64::NAN), (1, 1e7)] {
        let error = connect(load(target, clients, rate_per_s), protocol()).err().unwrap();
        assert!(matches!(error, DriverError::Load { .. }), "{error}");
    }
}
