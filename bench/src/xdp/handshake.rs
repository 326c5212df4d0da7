//! Opens flows as clients and servers do: every packet goes through the program under test.

use anyhow::{Context, Result, ensure};
use lb_core::host::Frame;

use super::case::{Family, Mode, Protocol};
use super::fixture::{SITE_LINK, Subject};
use super::packets::{ACK, Clients, SYN, SYN_ACK, Template, packet};

/// Establishes the flows of the first `flows` clients, telling `progress` after each thousand.
pub fn establish(
    subject: &mut Subject,
    (mode, family, protocol): (Mode, Family, Protocol),
    flows: u32,
    mut progress: impl FnMut(u32),
) -> Result<()> {
    const TOLD_EVERY: u32 = 1000;
    let mut first = Template::new(family, protocol, Clients::Known, SYN);
    let mut next = Template::new(family, protocol, Clients::Known, ACK);
    for number in 0..flows {
        let what = || format!("flow {number} of {flows} could not be established");
        let translated = subject.send(first.of(number))?.with_context(what)?;
        if mode == Mode::Dsr {
            // Answers go past the load balancer: only further packets show that the client hears the server.
            subject.send(next.of(number))?.with_context(what)?;
        } else {
            subject.send(&answer(translated, protocol).0)?.with_context(what)?;
        }
        subject.send(next.of(number))?.with_context(what)?;
        if number % TOLD_EVERY == 0 {
            progress(number);
        }
    }
    progress(flows);
    let waiting = subject.newcomers()?;
    ensure!(waiting == 0, "{waiting} entries of {flows} flows are not established");
    Ok(())
}

/// What the backend answers to a translated packet.
fn answer(translated: Vec<u8>, protocol: Protocol) -> Frame {
    let (client, backend, _) = Frame(translated).ends();
    let (site, own) = SITE_LINK;
    packet((own, site), (backend, client), protocol, SYN_ACK)
}
