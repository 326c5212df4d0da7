//! The configuration as it is now: a reload replaces it.

use std::sync::Arc;

use tokio::sync::watch;

use super::Config;

/// Everybody's handle on the present configuration.
#[derive(Clone, Debug)]
pub struct Current(Arc<watch::Sender<Arc<Config>>>);

impl Current {
    /// The first one.
    pub fn new(config: Arc<Config>) -> Self {
        Self(Arc::new(watch::Sender::new(config)))
    }

    /// The present one; who looks twice may see two.
    pub fn get(&self) -> Arc<Config> {
        self.0.borrow().clone()
    }

    /// Another one takes its place.
    pub fn replace(&self, config: Arc<Config>) {
        self.0.send_replace(config);
    }

    /// For those who have to act on another one.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Config>> {
        self.0.subscribe()
    }
}
