//! A CA in the lab's folder, and the certificates of its daemon and agents.

use std::path::Path;
use std::sync::Arc;

use migrate::tls::pki::{self, Validity};
use migrate::tls::{Credentials, Files, Identity};
use rustls::ClientConfig;

use crate::error::LabError;
use crate::{Site, address};

/// Who is who in a stack.
#[derive(Clone, Debug)]
pub struct Certificates {
    daemon: Files,
    agents: [Files; 2],
    clients: [Arc<ClientConfig>; 2],
}

impl Certificates {
    /// Makes all of them, in a folder that is made too.
    pub(super) fn make(dir: &Path) -> Result<Self, LabError> {
        let validity = Validity::days(2).map_err(failed)?;
        pki::init(dir, "lab", validity).map_err(failed)?;
        let coordinator = Identity::Coordinator("lb".to_owned());
        let daemon = pki::issue(dir, &coordinator, &[], validity).map_err(failed)?;
        let issue = |site: Site| {
            let identity = Identity::Agent(site.name().to_owned());
            pki::issue(dir, &identity, &[address::site4(site).to_string()], validity).map_err(failed)
        };
        let agents = [issue(Site::A)?, issue(Site::B)?];
        let credentials = Credentials::of_coordinator(&daemon).map_err(failed)?;
        let client = |site: Site| {
            let mut config = credentials.client_config(site.name()).map_err(failed)?;
            config.alpn_protocols = vec![b"http/1.1".to_vec()];
            Ok::<_, LabError>(Arc::new(config))
        };
        Ok(Self { clients: [client(Site::A)?, client(Site::B)?], daemon, agents })
    }

    /// The daemon's, which is a coordinator.
    pub fn daemon(&self) -> &Files {
        &self.daemon
    }

    /// Those of a site's agent.
    pub fn agent(&self, site: Site) -> &Files {
        &self.agents[site as usize]
    }

    /// For asking a site's agent in the daemon's name, over HTTP/1.1.
    pub fn client(&self, site: Site) -> Arc<ClientConfig> {
        self.clients[site as usize].clone()
    }
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> LabError {
    LabError::Certificates(Box::new(error))
}
