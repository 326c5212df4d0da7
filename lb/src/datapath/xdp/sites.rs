//! Keeps the sites' locations true: resolves locators when asked and looks at all of them again every second,
//! since neighbours change their hardware address, routes move, and sites that could not be reached come up.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use aya::maps::{Array, MapData};
use lb_core::record::Location;
use tokio::sync::mpsc as tokio_mpsc;

use super::locator::{Locator, LocatorError, PATIENCE, resolve};
use super::records::{from_bytes, to_bytes};
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
    /// Find out how to reach a site; nothing is written.
    Probe { locator: Locator, answer: mpsc::Sender<Result<Location, LocatorError>> },
    /// Write the location of a site and keep it true from now on.
    Keep { site: SiteNumber, locator: Locator, location: Location, done: mpsc::Sender<()> },
    /// Look for a site that cannot be reached now, and keep its location true from then on.
    Seek { site: SiteNumber, locator: Locator, is_new: bool, done: mpsc::Sender<()> },
    /// Look after these sites only.
    Retain { sites: HashSet<SiteNumber> },
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

    /// Finds the way to a site. Waits for the network, two seconds at most.
    pub fn probe(&self, locator: Locator) -> Result<Location, LocatorError> {
        self.begin_probe(locator)()
    }

    /// Begins to find the way to a site; what is returned waits for it.
    pub fn begin_probe(&self, locator: Locator) -> impl FnOnce() -> Result<Location, LocatorError> + use<> {
        let (answer, inbox) = mpsc::channel();
        self.ask(Request::Probe { locator, answer });
        move || inbox.recv().unwrap_or(Err(LocatorError::NoRoute(locator.next_hop)))
    }

    /// Writes a site's location into the tables; it is kept true from then on.
    pub fn keep(&self, site: SiteNumber, locator: Locator, location: Location) {
        let (done, inbox) = mpsc::channel();
        self.ask(Request::Keep { site, locator, location, done });
        let _ = inbox.recv();
    }

    /// Looks for a site that cannot be reached now, every second. Until it is found, packets go the way that the
    /// tables had for the site, or nowhere if `is_new`.
    pub fn seek(&self, site: SiteNumber, locator: Locator, is_new: bool) {
        let (done, inbox) = mpsc::channel();
        self.ask(Request::Seek { site, locator, is_new, done });
        let _ = inbox.recv();
    }

    /// Looks after no others from now on; what is known of the others stays in the tables.
    pub fn retain(&self, sites: HashSet<SiteNumber>) {
        self.ask(Request::Retain { sites });
    }

    fn ask(&self, request: Request) {
        // The thread ends only when this handle goes.
        let _ = self.requests.send(request);
    }
}

struct Keeper {
    locations: Locations,
    tables: Arc<SharedTables>,
    /// With what was last found.
    kept: HashMap<SiteNumber, (Locator, Option<Location>)>,
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
                    Some(Request::Probe { locator, answer }) => {
                        let handle = handle.clone();
                        // Others are not to wait for a neighbour that does not answer.
                        tokio::spawn(async move { answer.send(resolve(&handle, locator, PATIENCE).await) });
                    }
                    Some(Request::Keep { site, locator, location, done }) => {
                        self.kept.insert(site, (locator, Some(location)));
                        self.write(site, location);
                        let _ = done.send(());
                    }
                    Some(Request::Seek { site, locator, is_new, done }) => {
                        let former = self.former(site, is_new);
                        self.kept.insert(site, (locator, former));
                        let _ = done.send(());
                    }
                    Some(Request::Retain { sites }) => self.kept.retain(|site, _| sites.contains(site)),
                    None => return,
                },
                _ = refresh.tick() => self.refresh(&handle).await,
            }
        }
    }

    async fn refresh(&mut self, handle: &rtnetlink::Handle) {
        for (site, (locator, location)) in self.kept.clone() {
            // No waiting: what makes the kernel ask now will have been answered in a second.
            match resolve(handle, locator, Duration::ZERO).await {
                Ok(now) if Some(now) != location => {
                    tracing::info!(site = site.0, next_hop = %locator.next_hop, "the way to the site is another one");
                    self.kept.insert(site, (locator, Some(now)));
                    self.write(site, now);
                }
                Ok(_) => {}
                // The last known way stays: what is not answered now may still be reachable.
                Err(error) => tracing::debug!(site = site.0, %error, "locator not resolved"),
            }
        }
    }

    /// The location that a former daemon left for a site. What a number's former holder left is not the new site's.
    fn former(&mut self, site: SiteNumber, is_new: bool) -> Option<Location> {
        if is_new {
            self.write(site, Location::default());
            return None;
        }
        let record = self.locations.get(&site.0, 0).ok()?;
        let location: Location = from_bytes(&record);
        if location == Location::default() {
            return None;
        }
        self.tables.set_location(site, location);
        Some(location)
    }

    fn write(&mut self, site: SiteNumber, location: Location) {
        if let Err(error) = self.locations.set(site.0, to_bytes(&location), 0) {
            tracing::error!(site = site.0, %error, "cannot write the site's location");
        }
        self.tables.set_location(site, location);
    }
}
