//! Whom an agent lets in, and whom a client takes for a site's agent. Signatures, chains and times are rustls' business;
//! what is added here is who a certificate must name.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature,
};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore,
    SignatureScheme,
};

use super::identity::{Identity, IdentityError};

/// Why a certificate that is otherwise good is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum NotMeant {
    #[error(transparent)]
    Nobody(#[from] IdentityError),
    #[error(
        "it is that of {found}, and the agent of site {site:?} is meant: correct the site's agent address"
    )]
    Other { found: Identity, site: String },
}

impl From<NotMeant> for Error {
    fn from(reason: NotMeant) -> Self {
        CertificateError::Other(OtherError(Arc::new(reason))).into()
    }
}

/// Takes callers with a certificate of the CA that names somebody.
#[derive(Debug)]
pub(super) struct Callers(Arc<dyn ClientCertVerifier>);

impl Callers {
    pub(super) fn new(chains: Arc<dyn ClientCertVerifier>) -> Self {
        Self(chains)
    }
}

impl ClientCertVerifier for Callers {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.0.verify_client_cert(end_entity, intermediates, now)?;
        Identity::of(end_entity).map_err(NotMeant::from)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

/// Takes the agent of one site, wherever it is reached; where its certificate names addresses, only there.
#[derive(Debug)]
pub(super) struct SiteAgent {
    site: String,
    roots: Arc<RootCertStore>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl SiteAgent {
    pub(super) fn new(site: &str, roots: Arc<RootCertStore>, provider: &CryptoProvider) -> Self {
        Self { site: site.to_owned(), roots, algorithms: provider.signature_verification_algorithms }
    }

    fn check_address(certificate: &ParsedCertificate<'_>, dialled: &ServerName<'_>) -> Result<(), Error> {
        match verify_server_name(certificate, dialled) {
            // Should the library ever call it otherwise, then such a certificate is refused, which a test shows.
            Err(Error::InvalidCertificate(CertificateError::NotValidForNameContext {
                presented, ..
            })) if presented.iter().all(|name| name.starts_with("UniformResourceIdentifier(")) => Ok(()),
            checked => checked,
        }
    }
}

impl ServerCertVerifier for SiteAgent {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let certificate = ParsedCertificate::try_from(end_entity)?;
        let chain = verify_server_cert_signed_by_trust_anchor(
            &certificate,
            &self.roots,
            intermediates,
            now,
            self.algorithms.all,
        );
        if let Err(error) = chain {
            // A coordinator's certificate is not made for serving, which is better said as it is meant.
            return match (&error, Identity::of(end_entity)) {
                (
                    Error::InvalidCertificate(
                        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. },
                    ),
                    Ok(found),
                ) => Err(NotMeant::Other { found, site: self.site.clone() }.into()),
                _ => Err(error),
            };
        }
        match Identity::of(end_entity).map_err(NotMeant::from)? {
            Identity::Agent(site) if site == self.site => {}
            found => return Err(NotMeant::Other { found, site: self.site.clone() }.into()),
        }
        Self::check_address(&certificate, server_name)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
