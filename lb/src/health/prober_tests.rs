//! Probes of real servers: well ones, and every way of being unwell.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::*;

const PATIENCE: Duration = Duration::from_millis(300);
const LOOPBACKS: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

async fn ask(what: &Probe, server: SocketAddr) -> Finding {
    probe(what, SocketAddr::new(server.ip(), 0), server, server, PATIENCE).await
}

fn unwell_with(finding: Finding) -> String {
    match finding {
        Finding::Unwell(ailment) => ailment.to_string(),
        other => panic!("{other:?}"),
    }
}

/// Answers every connection with the same bytes once a request has come, then closes it. Returns what was asked.
async fn answering(ip: IpAddr, answer: &'static str) -> (SocketAddr, JoinHandle<String>) {
    let listener = TcpListener::bind((ip, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let task = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut asked = Vec::new();
        while !asked.ends_with(b"\r\n\r\n") {
            asked.push(stream.read_u8().await.unwrap());
        }
        stream.write_all(answer.as_bytes()).await.unwrap();
        String::from_utf8(asked).unwrap()
    });
    (address, task)
}

fn http(status: RangeInclusive<u16>) -> Probe {
    Probe::Http { path: "/health?deep=1".to_owned(), host: None, status }
}

#[tokio::test]
async fn a_server_that_takes_connections() {
    for ip in LOOPBACKS {
        let listener = TcpListener::bind((ip, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        assert_eq!(ask(&Probe::Tcp, address).await, Finding::Well);
        // The server sees that nobody wants it any more.
        let (mut stream, _) = listener.accept().await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap_err().kind(), ErrorKind::ConnectionReset);
        drop(listener);
        assert_eq!(ask(&Probe::Tcp, address).await, Finding::Unwell(Ailment::Refused), "{ip}");
    }
}

#[tokio::test]
async fn statuses() {
    for (range, status, expected) in [
        (200..=399, "204 No Content", None),
        (200..=200, "200 OK", None),
        (200..=399, "503 Service Unavailable", Some("status 503 instead of 200 to 399")),
        (200..=200, "301 Moved", Some("status 301 instead of 200")),
    ] {
        let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n").leak();
        let (address, asked) = answering(LOOPBACKS[0], answer).await;
        let found = ask(&http(range), address).await;
        match expected {
            None => assert_eq!(found, Finding::Well, "{status}"),
            Some(text) => assert_eq!(unwell_with(found), text),
        }
        let asked = asked.await.unwrap().to_lowercase();
        assert!(asked.starts_with("get /health?deep=1 http/1.1\r\n"), "{asked}");
        assert!(asked.contains(&format!("\r\nhost: {address}\r\n")), "{asked}");
    }
    let (address, asked) = answering(LOOPBACKS[1], "HTTP/1.1 200 OK\r\n\r\n").await;
    let named =
        Probe::Http { path: "/".to_owned(), host: Some("chat.example".to_owned()), status: 200..=399 };
    assert_eq!(ask(&named, address).await, Finding::Well);
    assert!(asked.await.unwrap().to_lowercase().contains("\r\nhost: chat.example\r\n"));
}

#[tokio::test]
async fn what_is_no_answer_to_a_request() {
    for (answer, expected) in [
        ("", "connection closed before message completed"),
        ("SSH-2.0-nothing\r\n", "invalid HTTP"),
        ("HTTP/1.1 200", "connection closed before message completed"),
    ] {
        let (address, _) = answering(LOOPBACKS[0], answer).await;
        let told = unwell_with(ask(&http(200..=399), address).await);
        assert!(told.contains(expected), "{answer:?}: {told}");
    }
    // One that listens and never answers.
    let listener = TcpListener::bind((LOOPBACKS[0], 0)).await.unwrap();
    let found = ask(&http(200..=399), listener.local_addr().unwrap()).await;
    assert_eq!(found, Finding::Unwell(Ailment::Silent(PATIENCE)));
}

/// Answers the first datagram with each of these.
async fn echoing(ip: IpAddr, answers: &'static [&'static [u8]]) -> (SocketAddr, JoinHandle<Vec<u8>>) {
    let socket = UdpSocket::bind((ip, 0)).await.unwrap();
    let address = socket.local_addr().unwrap();
    let task = tokio::spawn(async move {
        let mut buffer = [0; 100];
        let (length, from) = socket.recv_from(&mut buffer).await.unwrap();
        for answer in answers {
            socket.send_to(answer, from).await.unwrap();
        }
        buffer[..length].to_vec()
    });
    (address, task)
}

/// What a server answers, what is expected, and what is wrong with it.
type Case = (&'static [&'static [u8]], &'static [u8], Option<&'static str>);

const CASES: [Case; 6] = [
    (&[b"\xff\xff\xff\xffstatusResponse\n..."], b"\xff\xff\xff\xffstatus", None),
    (&[b"late", b"pong"], b"pong", None),
    (&[b"anything"], b"", None),
    (&[b""], b"", None),
    (&[b"no\x00"], b"pong", Some("answered \"no\\x00\"")),
    (&[], b"pong", Some("no answer within 300ms")),
];

#[tokio::test]
async fn datagrams() {
    let status = b"\xff\xff\xff\xffgetstatus\n".to_vec();
    let udp = |expect: &[u8]| Probe::Udp { send: status.clone(), expect: expect.to_vec() };
    for ip in LOOPBACKS {
        for (answers, expect, expected) in CASES {
            let (address, asked) = echoing(ip, answers).await;
            let found = ask(&udp(expect), address).await;
            match expected {
                None => assert_eq!(found, Finding::Well, "{answers:?}"),
                Some(text) => assert_eq!(unwell_with(found), text, "{answers:?}"),
            }
            assert_eq!(asked.await.unwrap(), status);
        }
        let nobody = UdpSocket::bind((ip, 0)).await.unwrap().local_addr().unwrap();
        assert_eq!(ask(&udp(b""), nobody).await, Finding::Unwell(Ailment::Refused));
    }
}

#[tokio::test]
async fn what_is_wrong_here_is_not_held_against_the_backend() {
    let elsewhere: SocketAddr = "192.0.2.1:1100".parse().unwrap();
    let listener = TcpListener::bind((LOOPBACKS[0], 0)).await.unwrap();
    let to = listener.local_addr().unwrap();
    for what in [Probe::Tcp, http(200..=399), Probe::Udp { send: vec![], expect: vec![] }] {
        let found = probe(&what, elsewhere, to, to, PATIENCE).await;
        assert!(matches!(&found, Finding::Unknown(why) if why.contains("192.0.2.1:1100")), "{found:?}");
    }
}

#[tokio::test]
async fn a_port_serves_probe_after_probe() {
    let listener = TcpListener::bind((LOOPBACKS[0], 0)).await.unwrap();
    let to = listener.local_addr().unwrap();
    // Below the range that the kernel gives to others.
    let from = SocketAddr::new(LOOPBACKS[0], 1999);
    for _ in 0..20 {
        assert_eq!(probe(&Probe::Tcp, from, to, to, PATIENCE).await, Finding::Well);
    }
}
