//! Clients that open one connection after the other, say something over each, and close it.

use std::io;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::place::{LIMIT, Place};

/// Clients at work.
pub struct Connectors {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Seen>>,
}

/// What a client has seen.
#[derive(Default)]
struct Seen {
    /// How long each connection that was served took to be opened.
    opened: Vec<Duration>,
    failed: Vec<String>,
}

impl Connectors {
    /// Starts so many clients, with a pause after each connection. `talk` fails unless it is answered as it should be.
    pub fn start(
        place: &Place,
        clients: usize,
        pause: Duration,
        talk: impl Fn(&mut TcpStream) -> io::Result<()> + Clone + Send + 'static,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let start = |_| {
            let (namespace, service) = (place.stack.lab().client().clone(), place.service);
            let (stop, talk) = (stop.clone(), talk.clone());
            std::thread::spawn(move || {
                // The thread opens sockets and nothing else.
                namespace.enter().unwrap();
                let mut seen = Seen::default();
                while !stop.load(Relaxed) {
                    let began = Instant::now();
                    let stream = TcpStream::connect_timeout(&service, LIMIT);
                    let took = began.elapsed();
                    let served = stream.and_then(|mut stream| {
                        stream.set_read_timeout(Some(LIMIT))?;
                        talk(&mut stream)
                    });
                    match served {
                        Ok(()) => seen.opened.push(took),
                        Err(error) => seen.failed.push(error.to_string()),
                    }
                    std::thread::sleep(pause);
                }
                seen
            })
        };
        let clients = (0..clients).map(start).collect();
        Self { stop, clients }
    }

    /// Ends the clients: more than `least` connections, and every one was accepted and answered.
    pub fn all_were_served(self, least: usize) {
        self.stop.store(true, Relaxed);
        let mut all = Seen::default();
        for client in self.clients {
            let seen = client.join().unwrap();
            all.opened.extend(seen.opened);
            all.failed.extend(seen.failed);
        }
        all.opened.sort();
        let slowest = all.opened.last().copied().unwrap_or_default();
        let sent_again = all.opened.iter().filter(|took| **took >= Duration::from_secs(1)).count();
        println!(
            "{} connections, {} failed; the slowest took {slowest:?} to be opened, {sent_again} a second or more",
            all.opened.len(),
            all.failed.len()
        );
        assert_eq!(all.failed, Vec::<String>::new());
        assert!(all.opened.len() > least, "{}", all.opened.len());
    }
}
