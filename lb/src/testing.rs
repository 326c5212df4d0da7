//! What the tests of this crate share: a configuration, and control over a datapath in memory.

use std::sync::Arc;

use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::config::{Config, Current};
use crate::control::Control;
use crate::datapath::Event;
use crate::memory::MemoryDatapath;

pub(crate) const CONFIG: &str = r#"
[datapath]
interfaces = ["mem0"]
nat_source4 = "10.9.0.0/24"

[[sites]]
name = "ams"
next_hop = "10.2.1.1"
agent = "http://10.2.1.1:7401"

[[sites]]
name = "fra"
next_hop = "10.2.2.1"
agent = "http://10.2.2.1:7401"

[[sites]]
name = "bare"
next_hop = "10.2.3.1"

[[backends]]
name = "chat-1"
address = "10.1.0.1:6379"
site = "ams"

[[backends]]
name = "chat-2"
address = "10.1.0.2:6379"
site = "bare"

[[services]]
name = "chat"
address = "10.0.0.100:6379"
protocol = "tcp"
backends = ["chat-1", "chat-2"]
"#;

/// Control with its driver running; it ends with the test.
pub(crate) struct TestControl {
    pub(crate) control: Arc<Control>,
    pub(crate) datapath: Arc<MemoryDatapath>,
    pub(crate) config: Current,
    _stop: DropGuard,
}

impl TestControl {
    pub(crate) fn new() -> Self {
        Self::over(MemoryDatapath::new)
    }

    pub(crate) fn over(datapath: impl FnOnce(UnboundedSender<Event>) -> MemoryDatapath) -> Self {
        let config = Arc::new(Config::parse(CONFIG, "test.toml").unwrap());
        let (sender, events) = unbounded_channel();
        let datapath = Arc::new(datapath(sender));
        let control = Arc::new(Control::start(datapath.clone(), &config.plan, config.hold).unwrap());
        let stop = CancellationToken::new();
        let (driven, token) = (control.clone(), stop.clone());
        tokio::spawn(async move { driven.drive(events, token).await });
        tokio::spawn(control.clone().share(stop.clone()));
        let config = Current::new(config);
        Self { control, datapath, config, _stop: stop.drop_guard() }
    }
}
