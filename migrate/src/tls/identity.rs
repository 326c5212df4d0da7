//! What a certificate says of its owner, as a URI among its alternative names.

use std::fmt;

use rustls::pki_types::CertificateDer;
use webpki::EndEntityCert;

use crate::protocol::is_valid_id;

const COORDINATOR: &str = "drover://coordinator/";
const AGENT: &str = "drover://agent/";

/// Who somebody is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Identity {
    /// A load balancer: it commands.
    Coordinator(String),
    /// The agent of the site of this name: it obeys, and sends images to another.
    Agent(String),
}

/// Why a certificate names nobody.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// It cannot be read.
    #[error("it is not a certificate that can be read")]
    Unreadable,
    /// It is somebody else's, such as a web server's.
    #[error("it names neither a coordinator nor an agent: issue one with `migrate pki issue`")]
    Nobody,
    /// Two names would be two sets of rights.
    #[error("it names more than one coordinator or agent: issue one for each")]
    Several,
}

impl Identity {
    /// As it stands in a certificate.
    pub fn uri(&self) -> String {
        match self {
            Self::Coordinator(name) => format!("{COORDINATOR}{name}"),
            Self::Agent(site) => format!("{AGENT}{site}"),
        }
    }

    fn parse(uri: &str) -> Option<Self> {
        let identity = match (uri.strip_prefix(COORDINATOR), uri.strip_prefix(AGENT)) {
            (Some(name), _) => Self::Coordinator(name.to_owned()),
            (None, Some(site)) => Self::Agent(site.to_owned()),
            (None, None) => return None,
        };
        is_valid_id(identity.name()).then_some(identity)
    }

    /// The name or site.
    pub fn name(&self) -> &str {
        match self {
            Self::Coordinator(name) | Self::Agent(name) => name,
        }
    }

    /// The owner of a certificate; whether to believe it is for its signature to say.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let certificate = EndEntityCert::try_from(certificate).map_err(|_| IdentityError::Unreadable)?;
        let mut found = certificate.valid_uri_names().filter_map(Self::parse);
        match (found.next(), found.next()) {
            (Some(identity), None) => Ok(identity),
            (None, _) => Err(IdentityError::Nobody),
            (Some(_), Some(_)) => Err(IdentityError::Several),
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Coordinator(name) => write!(f, "coordinator {name:?}"),
            Self::Agent(site) => write!(f, "the agent of site {site:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_and_identities_say_the_same() {
        for identity in [Identity::Coordinator("lb-1".into()), Identity::Agent("ams".into())] {
            assert_eq!(Identity::parse(&identity.uri()), Some(identity));
        }
        for bad in
            ["", "drover://agent/", "drover://agent/a/b", "drover://admin/x", "https://agent/ams", "ams"]
        {
            assert_eq!(Identity::parse(bad), None, "{bad}");
        }
    }
}
