//! The site's tunnel end for sites without a tunnel device: our own XDP or tc program, which takes the outer header off
//! what the load balancer sends in mode `dsr`.
//!
//! * [`config`]: section `[decapsulator]` of `agent.toml`.
//! * [`interface`]: which hook suits an interface.
//! * [`hook`]: attaching, taking over and removing.
//! * [`program`]: loading over the pinned tables, and what is in them.
//!
//! Tables and links are pinned: a killed agent leaves the decapsulation running, and the next one puts its own program
//! in the same place without missing a packet.
//!
//! What is not here: what is stripped and why. That is `lb_core::decapsulate`, for the kernel and for tests.

pub mod config;
pub mod hook;
pub mod interface;
pub mod program;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, UdpSocket};
use std::path::{Path, PathBuf};

use aya::maps::{MapData, PerCpuArray};
use lb_core::decapsulate::Reason;
use serde::Serialize;

use self::config::Config;
use self::hook::Hook;

/// Why there is no decapsulation.
#[derive(Debug, thiserror::Error)]
pub enum DecapsulatorError {
    /// An interface that is not there, or is none to attach to.
    #[error("interface {name:?} {problem} (config: decapsulator.interfaces)")]
    Interface {
        /// As configured.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// The kernel, or its BPF file system.
    #[error("{doing}")]
    Kernel {
        /// What was tried, and what to do about it.
        doing: String,
        /// In the kernel's words.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Wraps what the kernel answered with what was being done.
pub(crate) fn kernel<E>(doing: impl Into<String>) -> impl FnOnce(E) -> DecapsulatorError
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let doing = doing.into();
    move |error| DecapsulatorError::Kernel { doing, source: error.into() }
}

/// A decapsulator that runs. It goes on when this is dropped.
pub struct Decapsulator {
    hooks: Vec<Hook>,
    reasons: PerCpuArray<MapData, u64>,
}

impl fmt::Debug for Decapsulator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decapsulator").field("hooks", &self.hooks).finish_non_exhaustive()
    }
}

/// For the agent's API.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Status {
    /// Where it is attached.
    pub hooks: Vec<Hook>,
    /// How many packets there were since the tables were made, by what became of them.
    pub packets: BTreeMap<&'static str, u64>,
}

impl Decapsulator {
    /// Opens what is configured and removes what a former agent had elsewhere. `memory` is the file that says where.
    pub async fn as_configured(
        config: Option<&Config>,
        destinations: &BTreeSet<IpAddr>,
        memory: &Path,
    ) -> Result<Option<Self>, DecapsulatorError> {
        let remembering = || kernel(format!("remembering the decapsulator's pins in {}", memory.display()));
        let former = fs::read_to_string(memory).ok().map(PathBuf::from);
        let opened = match config {
            Some(config) => {
                let opened = Self::open(config, destinations).await?;
                fs::write(memory, config.pin_path.as_os_str().as_encoded_bytes()).map_err(remembering())?;
                Some(opened)
            }
            None => None,
        };
        if let Some(former) = former
            && config.is_none_or(|config| config.pin_path != former)
        {
            hook::remove_all(&former)?;
        }
        if config.is_none() && memory.exists() {
            fs::remove_file(memory).map_err(remembering())?;
        }
        Ok(opened)
    }

    /// Sets the tables up for inner packets to `destinations` and attaches the programs, in the calling thread's network
    /// namespace. Takes over what a former agent left, and removes what is not configured any more.
    pub async fn open(config: &Config, destinations: &BTreeSet<IpAddr>) -> Result<Self, DecapsulatorError> {
        let mut wanted = Vec::new();
        for name in &config.interfaces {
            wanted.push((name.as_str(), interface::choose(name, config.hook).await?));
        }
        for endpoint in &config.endpoints {
            if UdpSocket::bind((*endpoint, 0)).is_err() {
                tracing::warn!(
                    %endpoint,
                    "the site does not hold this tunnel endpoint: unless packets to it are routed here, add it, \
                     such as `ip address add {endpoint} dev {}`",
                    config.interfaces[0]
                );
            }
        }
        let mut ebpf = program::load(&config.pin_path)?;
        program::fill(&mut ebpf, config, destinations)?;
        let hooks = hook::attach_all(&mut ebpf, &wanted, &config.pin_path)?;
        for Hook { interface, hook } in &hooks {
            tracing::info!("decapsulator attached interface={interface} hook={hook}");
        }
        let reasons = ebpf
            .take_map("REASONS")
            .ok_or_else(|| io::Error::from(ErrorKind::NotFound))
            .map_err(kernel("looking for the decapsulator's counters"))?;
        let reasons = reasons.try_into().map_err(kernel("looking at the decapsulator's counters"))?;
        Ok(Self { hooks, reasons })
    }

    /// Where it is attached, and what it has done.
    pub fn status(&self) -> Status {
        let count = |reason: &Reason| {
            let counts = self.reasons.get(&(*reason as u32), 0);
            (reason.label(), counts.map_or(0, |counts| counts.iter().sum()))
        };
        Status { hooks: self.hooks.clone(), packets: Reason::ALL.iter().map(count).collect() }
    }
}
