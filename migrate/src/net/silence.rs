//! Silence for a backend's address: at the source around the freeze in both directions, at the target until it may run
//! in the one towards clients.
//!
//! A packet that still reaches a frozen source would be acknowledged by its kernel and lost with it, and one
//! that reaches a killed source would be answered with a reset. So two nftables rules, ahead of everything
//! else, drop what comes for the address and what leaves from it. (CRIU's own lock does the same per
//! connection, which costs more than the dump of the sockets.)
//!
//! A restored copy's connections are live before it may run. Should it be killed then, by the death of its CRIU for
//! instance, its kernel would end them all with resets, or, worse, the copy might run and answer; nobody must hear
//! either. What comes for it is let through: it waits in the sockets for the copy to run. The one answer that leaves is a
//! SYN-ACK, which only a kernel with a listener gives: a client whose SYN was held would have to wait a second for the
//! next one.
//!
//! One table per backend. At the source the address is an element of a set with a timeout, so that the rules end by
//! themselves if the agent dies: its CRIU then lets the source run, and it must be heard again.
//!
//! `nft` takes milliseconds of a processor, so it puts the rules in place before the freeze ([`Armed`]), with an empty
//! set. What is left to do then is one message to the kernel.

use std::fmt::Write as _;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use super::netfilter;
use crate::protocol::Protocol;

/// Prefix of our tables.
const PREFIX: &str = "drover_";
/// The set of what is silent.
const SET: &str = "silent";
/// Prefix of the tables that CRIU leaves behind where it locks by itself.
const CRIU_PREFIX: &str = "CRIU-";
/// `nft` answers in milliseconds.
const NFT_LIMIT: Duration = Duration::from_secs(5);

/// Why the rules are not as wanted.
#[derive(Debug, thiserror::Error)]
pub enum SilenceError {
    /// No `nft`.
    #[error("`nft` could not be started: install nftables")]
    Start(#[source] io::Error),
    /// It failed.
    #[error("`nft` refused the rules: {0}")]
    Refused(String),
    /// The kernel refused to put them in force, or to remove them.
    #[error("the kernel refused to change the silence rules")]
    Netlink(#[source] io::Error),
    /// It hangs.
    #[error("`nft` did not answer within {NFT_LIMIT:?}")]
    Silent,
}

/// What is silenced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Everything from and to the IP address: the backend has it for itself.
    Address,
    /// Only the backend's port and protocol: others share its IP address.
    AddressAndPort,
}

/// What is kept from passing.
#[derive(Clone, Copy, Debug)]
enum Direction {
    /// What comes for the backend and what leaves from it.
    Both,
    /// What leaves from it.
    Out,
}

/// The silence of one backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Silence {
    table: String,
    address: SocketAddr,
    protocol: Protocol,
    scope: Scope,
}

impl Silence {
    /// For the backend `name`.
    pub fn new(name: &str, address: SocketAddr, protocol: Protocol, scope: Scope) -> Self {
        // nft's identifiers are narrower than our names; the hex keeps different names different.
        let mut table = PREFIX.to_owned();
        for byte in name.bytes() {
            if byte.is_ascii_alphanumeric() {
                table.push(char::from(byte));
            } else {
                // Writing to a string cannot fail.
                let _ = write!(table, "_{byte:02x}");
            }
        }
        Self { table, address, protocol, scope }
    }

    /// Puts rules in place that do nothing yet; fired, they hold for at most `timeout`.
    pub async fn arm(&self, timeout: Duration) -> Result<Armed, SilenceError> {
        self.arm_for(Direction::Both, Some(timeout)).await
    }

    /// Likewise for what leaves from the address, until that is lifted.
    pub async fn arm_muting(&self) -> Result<Armed, SilenceError> {
        self.arm_for(Direction::Out, None).await
    }

    async fn arm_for(&self, direction: Direction, timeout: Option<Duration>) -> Result<Armed, SilenceError> {
        nft_with(&["-f", "-"], &self.rules(direction)).await?;
        // Rounded up: a silence that ends too early is worse than one that ends late.
        let timeout_ms = timeout.map(|timeout| u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX) + 1);
        Ok(Armed { table: self.table.clone(), key: self.key(), timeout_ms })
    }

    /// What the set has of the backend: each part is padded to 4 bytes.
    fn key(&self) -> Vec<u8> {
        let mut key = match self.address.ip() {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        if self.scope == Scope::AddressAndPort {
            let protocol = match self.protocol {
                Protocol::Tcp => libc::IPPROTO_TCP,
                Protocol::Udp => libc::IPPROTO_UDP,
            };
            key.extend([protocol.to_le_bytes()[0], 0, 0, 0]);
            key.extend(self.address.port().to_be_bytes());
            key.extend([0, 0]);
        }
        key
    }

    /// Removes them now; it is no error if there are none.
    pub async fn lift(&self) -> Result<(), SilenceError> {
        let table = self.table.clone();
        answered(move || netfilter::delete_inet_table(&table)).await
    }

    fn rules(&self, direction: Direction) -> String {
        let table = &self.table;
        let (family, kind) = match self.address.ip() {
            IpAddr::V4(_) => ("ip", "ipv4_addr"),
            IpAddr::V6(_) => ("ip6", "ipv6_addr"),
        };
        let (kind, to, from) = match self.scope {
            Scope::Address => (kind.to_owned(), format!("{family} daddr"), format!("{family} saddr")),
            Scope::AddressAndPort => (
                format!("{kind} . inet_proto . inet_service"),
                format!("{family} daddr . meta l4proto . th dport"),
                format!("{family} saddr . meta l4proto . th sport"),
            ),
        };
        let greeting = match direction {
            Direction::Both => "",
            Direction::Out => "tcp flags & (syn | rst | ack) == (syn | ack) accept; ",
        };
        let chain_in = match direction {
            Direction::Both => {
                format!("chain in {{ type filter hook prerouting priority -400; {to} @{SET} drop; }}\n")
            }
            Direction::Out => String::new(),
        };
        // Ahead of connection tracking (-200) and of everything that other software puts at -300. A table
        // that was there before is not deleted here, since that waits for every processor: `sweep` was.
        format!(
            "table inet {table} {{\n\
             set {SET} {{ type {kind}; flags timeout; }}\n\
             {chain_in}\
             chain out {{ type filter hook output priority -400; {greeting}{from} @{SET} drop; }}\n\
             }}\n"
        )
    }

    /// Removes what a former agent or CRIU's own lock left for this backend.
    pub async fn sweep(&self) -> Result<(), SilenceError> {
        for (family, table) in tables(&nft(&["list", "tables"]).await?) {
            if (family.as_str(), table.as_str()) == ("inet", self.table.as_str()) {
                self.lift().await?;
            } else if table.starts_with(CRIU_PREFIX) {
                // Others may use CRIU here too: only what locks this very address is ours to remove.
                let listing = nft(&["list", "table", &family, &table]).await.unwrap_or_default();
                if mentions(&listing, self.address.ip()) {
                    nft(&["delete", "table", &family, &table]).await?;
                }
            }
        }
        Ok(())
    }
}

/// Rules that wait for the backend's address. Dropped without having been fired, they stay until they are lifted.
#[derive(Debug)]
pub struct Armed {
    table: String,
    key: Vec<u8>,
    timeout_ms: Option<u64>,
}

impl Armed {
    /// Names the address to them: on success they are in force.
    pub async fn fire(self) -> Result<(), SilenceError> {
        answered(move || netfilter::add_to_inet_set(&self.table, SET, &self.key, self.timeout_ms)).await
    }
}

/// Makes a request on a thread that may wait, and gives the answer before what is to be closed is closed.
async fn answered(
    request: impl FnOnce() -> io::Result<OwnedFd> + Send + 'static,
) -> Result<(), SilenceError> {
    let (done, answer) = tokio::sync::oneshot::channel();
    tokio::task::spawn_blocking(move || {
        let (result, to_close) = match request() {
            Ok(socket) => (Ok(()), Some(socket)),
            Err(error) => (Err(SilenceError::Netlink(error)), None),
        };
        // Whoever asked may have gone.
        let _ = done.send(result);
        drop(to_close);
    });
    answer.await.unwrap_or_else(|_| Err(SilenceError::Netlink(io::ErrorKind::Interrupted.into())))
}

async fn nft(args: &[&str]) -> Result<String, SilenceError> {
    nft_with(args, "").await
}

async fn nft_with(args: &[&str], input: &str) -> Result<String, SilenceError> {
    let work = async {
        let mut child = Command::new("nft")
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            // If it has ended already, its exit code and its words say more than a broken pipe.
            let _ = stdin.write_all(input.as_bytes()).await;
        }
        child.wait_with_output().await
    };
    let output = tokio::time::timeout(NFT_LIMIT, work)
        .await
        .map_err(|_| SilenceError::Silent)?
        .map_err(SilenceError::Start)?;
    finished(&output)
}

fn finished(output: &std::process::Output) -> Result<String, SilenceError> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    let first = complaint.lines().next().unwrap_or("it did not say why");
    Err(SilenceError::Refused(first.to_owned()))
}

/// The tables of `nft list tables`, as family and name.
fn tables(listing: &str) -> Vec<(String, String)> {
    listing
        .lines()
        .filter_map(|line| {
            let (family, name) = line.strip_prefix("table ")?.split_once(' ')?;
            Some((family.to_owned(), name.trim().to_owned()))
        })
        .collect()
}

/// True if a listing names this very address (and not one that only begins likewise).
fn mentions(listing: &str, ip: IpAddr) -> bool {
    listing
        .split(|c: char| !(c.is_ascii_alphanumeric() || c == '.' || c == ':'))
        .any(|word| word.trim_matches('.').parse() == Ok(ip))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_say_what_is_dropped() {
        let v4 = Silence::new("chat-1", "10.1.0.1:6379".parse().unwrap(), Protocol::Tcp, Scope::Address);
        let rules = v4.rules(Direction::Both);
        assert!(rules.contains("table inet drover_chat_2d1 {"), "{rules}");
        assert!(rules.contains("prerouting priority -400; ip daddr @silent drop;"), "{rules}");
        assert!(rules.contains("output priority -400; ip saddr @silent drop;"), "{rules}");
        assert_eq!(v4.key(), [10, 1, 0, 1]);

        let address = "[fd00:1::1]:27960".parse().unwrap();
        let v6 = Silence::new("arena", address, Protocol::Udp, Scope::AddressAndPort);
        let rules = v6.rules(Direction::Both);
        assert!(rules.contains("type ipv6_addr . inet_proto . inet_service"), "{rules}");
        assert!(rules.contains("ip6 daddr . meta l4proto . th dport @silent drop"), "{rules}");
        assert_eq!(v6.key()[..4], [0xfd, 0, 0, 1]);
        assert_eq!(v6.key()[16..], [17, 0, 0, 0, 0x6d, 0x38, 0, 0]);

        let rules = v4.rules(Direction::Out);
        assert!(rules.contains("ip saddr @silent") && !rules.contains("daddr"), "{rules}");
    }

    #[test]
    fn different_names_have_different_tables() {
        let table =
            |name| Silence::new(name, "1.1.1.1:1".parse().unwrap(), Protocol::Tcp, Scope::Address).table;
        let names = ["a-b", "a_b", "a.b", "ab", "a_2db"];
        let tables: std::collections::BTreeSet<_> = names.map(table).into();
        assert_eq!(tables.len(), names.len());
    }

    #[test]
    fn listings_are_read() {
        let listing = "table ip filter\ntable inet CRIU-77\n";
        assert_eq!(tables(listing), [("ip".into(), "filter".into()), ("inet".into(), "CRIU-77".into())]);
        let body = "elements = { 10.1.0.1 . 6379 . 10.0.0.1 . 999,\n fd00:1::1 . 1 }";
        assert!(mentions(body, "10.1.0.1".parse().unwrap()));
        assert!(mentions(body, "fd00:1::1".parse().unwrap()));
        assert!(!mentions(body, "10.1.0.11".parse().unwrap()));
        assert!(!mentions(body, "10.1.0.2".parse().unwrap()));
    }
}
