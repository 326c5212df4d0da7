//! Who gets new flows, as the datapath is told.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

use tokio_util::sync::CancellationToken;

use super::{Control, ControlError, Standing, lock};

/// Rings are computed this often at most, however many backends come, go and grow.
const PACE: Duration = Duration::from_millis(250);

impl Control {
    /// What the health checks found out. The share of new flows follows within a quarter of a second.
    pub fn set_health(&self, backend: &str, up: bool) -> Result<(), ControlError> {
        self.entry(backend)?;
        let mut shares = lock(&self.shares);
        if shares.set_health(backend, up, Instant::now()) {
            lock(&self.stale).extend(shares.services_of(backend).iter().cloned());
            drop(shares);
            self.reshare.notify_one();
            tracing::info!(backend, up, "health");
        }
        Ok(())
    }

    /// Gives a backend no new flows, or again: those that it has stay. When this returns it is so, and stays so over
    /// restarts.
    pub fn set_drained(&self, backend: &str, drained: bool) -> Result<(), ControlError> {
        self.entry(backend)?;
        let _installing = lock(&self.installing);
        if !drained && self.standing(backend)?.is_drained_by_file() {
            return Err(ControlError::DrainedByFile(backend.to_owned()));
        }
        self.datapath.set_drained(backend, drained)?;
        let services: BTreeSet<String> = {
            let mut shares = lock(&self.shares);
            shares.set_drained(backend, drained, Instant::now());
            shares.services_of(backend).iter().cloned().collect()
        };
        self.weigh(&services)?;
        self.reshare.notify_one();
        tracing::info!(backend, drained, "drain");
        Ok(())
    }

    /// What is known of a backend besides its gate.
    pub fn standing(&self, backend: &str) -> Result<Standing, ControlError> {
        lock(&self.shares).standing(backend).ok_or_else(|| ControlError::UnknownBackend(backend.to_owned()))
    }

    /// Tells the datapath the services' effective weights. Under `installing`.
    fn weigh(&self, services: &BTreeSet<String>) -> Result<(), ControlError> {
        let now = Instant::now();
        let plans: Vec<_> = {
            let shares = lock(&self.shares);
            services.iter().filter_map(|service| shares.weighed(service, now)).collect()
        };
        Ok(self.datapath.weigh(&plans)?)
    }

    /// Follows health and slow starts until `stop`.
    pub async fn share(self: Arc<Self>, stop: CancellationToken) {
        let mut growing = false;
        loop {
            let step = async {
                match growing {
                    true => tokio::time::sleep(PACE).await,
                    false => std::future::pending().await,
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.reshare.notified() => {}
                () = step => {}
            }
            // Computing rings takes milliseconds, which no task that waits for packets should wait for.
            let this = self.clone();
            growing = tokio::task::spawn_blocking(move || this.reshare_now()).await.unwrap_or(true);
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(PACE) => {}
            }
        }
    }

    /// Brings stale services up to date; whether a slow start is going on.
    fn reshare_now(&self) -> bool {
        let _installing = lock(&self.installing);
        let growing = lock(&self.shares).growing(Instant::now());
        let mut services = std::mem::take(&mut *lock(&self.stale));
        services.extend(growing.iter().cloned());
        if !services.is_empty()
            && let Err(error) = self.weigh(&services)
        {
            tracing::error!(%error, "cannot share out new flows anew; trying again");
            lock(&self.stale).append(&mut services);
            return true;
        }
        !growing.is_empty()
    }
}
