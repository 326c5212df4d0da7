//! Keeps the sites' links true: resolves locators when asked and looks at all of them again every second,
//! since neighbours change their hardware address and routes move.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use aya::maps::{Array, MapData};
use lb_core::record::{Link, Location};
use tokio::sync::mpsc as tokio_mpsc;

use super::locator::{LocatorError, resolve};
use super::records::to_bytes;
use super::shared::SharedTables;
use crate::datapath::SiteNumber;

const REFRESH: Duration = Duration::from_secs(1);

/// The table of locations.
pub type Locations = Array<MapData, [u8; size_of::<Location>()]>;

/// Handle on the thread that owns the table of locations.
pub struct Sites {
    requests: tokio_mpsc::UnboundedSender<Request>,
}

enum Request {
    /// Find out how to reach a next hop; nothing is written.
    Probe { next_hop: IpAddr, answer: mpsc::Sender<Result<Link, LocatorError>> },
    /// Write the link of a site and keep it true from now on.
    Keep { site: SiteNumber, next_hop: IpAddr, link: Link, done: mpsc::Sender<()> },
}

impl Sites {
    /// Starts the thread in the caller's network namespace.
    pub fn start(locations: Locations, tables: Arc<SharedTables>) -> std::io::Result<Self> {
        let (requests, inbox) = tokio_mpsc::unbounded_channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let keeper = Keeper { locations, tables, kept: HashMap::new() };
        thread::Builder::new().name("sites".into()).spawn(move || runtime.block_on(keeper.run(inbox)))?;
        Ok(Self { requests })
    }

    /// Finds the link to a next hop. Waits for the network, two seconds at most.
    pub fn probe(&self, next_hop: IpAddr) -> Result<Link, LocatorError> {
        let (answer, inbox) = mpsc::channel();
        self.ask(Request::Probe { next_hop, answer });
        inbox.recv().unwrap_or(Err(LocatorError::NoRoute(next_hop)))
    }

    /// Writes a site's link into the tables; it is kept true from then on.
    pub fn keep(&self, site: SiteNumber, next_hop: IpAddr, link: Link) {
        let (done, inbox) = mpsc::channel();
        self.ask(Request::Keep { site, next_hop, link, done });
        let _ = inbox.recv();
    }

    fn ask(&self, request: Request) {
        // The thread ends only when this handle goes.
        let _ = self.requests.send(request);
    }
}

struct Keeper {
    locations: Locations,
    tables: Arc<SharedTables>,
    kept: HashMap<SiteNumber, (IpAddr, Link)>,
}

impl Keeper {
    async fn run(mut self, mut inbox: tokio_mpsc::UnboundedReceiver<Request>) {
        let handle = match rtnetlink::new_connection() {
            Ok((connection, handle, _)) => {
                tokio::spawn(connection);
                handle
            }
            Err(error) => {
                tracing::error!(%error, "cannot open a netlink socket; no site can be reached");
                return;
            }
        };
        let mut refresh = tokio::time::interval(REFRESH);
        loop {
            tokio::select! {
                request = inbox.recv() => match request {
                    Some(Request::Probe { next_hop, answer }) => {
                        let _ = answer.send(resolve(&handle, next_hop).await);
                    }
                    Some(Request::Keep { site, next_hop, link, done }) => {
                        self.kept.insert(site, (next_hop, link));
                        self.write(site, link);
                        let _ = done.send(());
                    }
                    None => return,
                },
                _ = refresh.tick() => self.refresh(&handle).await,
            }
        }
    }

    async fn refresh(&mut self, handle: &rtnetlink::Handle) {
        for (site, (next_hop, link)) in self.kept.clone() {
            match resolve(handle, next_hop).await {
                Ok(now) if now != link => {
                    tracing::info!(site = site.0, %next_hop, "the way to the site has changed");
                    self.kept.insert(site, (next_hop, now));
                    self.write(site, now);
                }
                Ok(_) => {}
                // The last known way stays: what is not answered now may still be reachable.
                Err(error) => tracing::debug!(site = site.0, %error, "locator not resolved"),
            }
        }
    }

    fn write(&mut self, site: SiteNumber, link: Link) {
        let location = Location::plain(link, 0);
        if let Err(error) = self.locations.set(site.0, to_bytes(&location), 0) {
            tracing::error!(site = site.0, %error, "cannot write the site's location");
        }
        self.tables.set_location(site, location);
    }
}
