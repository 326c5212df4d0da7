//! An own certificate, its key and the CA: read from files, and looked at before anybody else does.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::{self, cipher_suite};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use serde::{Deserialize, Serialize};

use super::identity::{Identity, IdentityError};
use super::verify::{Callers, SiteAgent};
use super::words::own_fault;

/// What both ends speak inside.
const HTTP2: &[u8] = b"h2";
/// For operators with curl.
const HTTP1: &[u8] = b"http/1.1";

/// Section `[tls]` of `agent.toml` and of the load balancer's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Files {
    /// The certificate of the CA that both ends trust.
    pub ca: PathBuf,
    /// The own certificate.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

impl Files {
    /// The keys of the section and what stands there.
    pub fn each(&self) -> [(&'static str, &Path); 3] {
        [("ca", &self.ca), ("certificate", &self.certificate), ("key", &self.key)]
    }
}

/// Why files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file.
    #[error("tls: {} cannot be read", .0.display())]
    Read(PathBuf, #[source] io::Error),
    /// Not PEM, or not what is meant.
    #[error("tls: {} holds no {what}: is it the file that `migrate pki` wrote?", .file.display())]
    Pem {
        /// The file.
        file: PathBuf,
        /// What should be in it.
        what: &'static str,
        /// Why it is not.
        #[source]
        source: pem::Error,
    },
    /// The key is no secret.
    #[error("tls: others may read the key {}: chmod 600 it, and issue a new one if they may have", .0.display())]
    Open(PathBuf),
    /// The key belongs to another certificate.
    #[error("tls: the key {} is not that of the certificate {}", .key.display(), .certificate.display())]
    Key {
        /// The key.
        key: PathBuf,
        /// The certificate.
        certificate: PathBuf,
        /// In the library's words.
        #[source]
        source: rustls::Error,
    },
    /// The CA's certificate.
    #[error("tls: {} is no CA's certificate", .0.display())]
    Ca(PathBuf, #[source] rustls::Error),
    /// It would be refused by everybody.
    #[error("tls: the certificate {} would be refused: {why}", .certificate.display())]
    Refused {
        /// The certificate.
        certificate: PathBuf,
        /// In plain words.
        why: String,
    },
    /// It names nobody.
    #[error("tls: the certificate {} cannot be used", .0.display())]
    Identity(PathBuf, #[source] IdentityError),
    /// It names somebody else.
    #[error("tls: the certificate {} is that of {found}, and that of {wanted} is meant: issue one with `migrate pki issue`",
        .certificate.display())]
    Other {
        /// The certificate.
        certificate: PathBuf,
        /// Whose it is.
        found: Identity,
        /// Whose it should be.
        wanted: String,
    },
    /// The library.
    #[error("tls cannot be set up")]
    Setup(#[source] rustls::Error),
}

/// Who we are, with the proof, and whom we believe.
#[derive(Clone, Debug)]
pub struct Credentials {
    identity: Identity,
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    callers: Arc<dyn ClientCertVerifier>,
    chain: Vec<CertificateDer<'static>>,
    key: Arc<PrivateKeyDer<'static>>,
}

impl Credentials {
    /// Reads the files of an agent; the certificate has to be that of its site's agent.
    pub fn of_agent(files: &Files, site: &str) -> Result<Self, TlsError> {
        Self::read(files)?.expect(files, format!("the agent of site {site:?}"), |identity| {
            *identity == Identity::Agent(site.to_owned())
        })
    }

    /// Reads the files of a load balancer; the certificate has to be a coordinator's.
    pub fn of_coordinator(files: &Files) -> Result<Self, TlsError> {
        Self::read(files)?.expect(files, "a coordinator".to_owned(), |identity| {
            matches!(identity, Identity::Coordinator(_))
        })
    }

    /// Reads files and sees that the certificate is good today and that the key belongs to it.
    pub fn read(files: &Files) -> Result<Self, TlsError> {
        let provider = Arc::new(provider());
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&files.ca)? {
            roots.add(certificate).map_err(|source| TlsError::Ca(files.ca.clone(), source))?;
        }
        let (roots, chain) = (Arc::new(roots), certificates(&files.certificate)?);
        let Some((own, between)) = chain.split_first() else {
            return Err(no_pem(&files.certificate, "certificate", pem::Error::NoItemsFound));
        };
        let key = key(&files.key)?;
        CertifiedKey::from_der(chain.clone(), key.clone_key(), &provider).map_err(|source| {
            TlsError::Key { key: files.key.clone(), certificate: files.certificate.clone(), source }
        })?;
        let callers = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|error| TlsError::Setup(rustls::Error::General(error.to_string())))?;
        let identity =
            Identity::of(own).map_err(|error| TlsError::Identity(files.certificate.clone(), error))?;
        // Every certificate of ours may call, so this holds for agents too.
        callers.verify_client_cert(own, between, UnixTime::now()).map_err(|error| TlsError::Refused {
            certificate: files.certificate.clone(),
            why: own_fault(&error),
        })?;
        let callers = Arc::new(Callers::new(callers));
        Ok(Self { identity, provider, roots, callers, key: Arc::new(key), chain })
    }

    fn expect(
        self,
        files: &Files,
        wanted: String,
        is_meant: impl FnOnce(&Identity) -> bool,
    ) -> Result<Self, TlsError> {
        if is_meant(&self.identity) {
            return Ok(self);
        }
        Err(TlsError::Other { certificate: files.certificate.clone(), found: self.identity, wanted })
    }

    /// Who we are.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// For taking connections: from whoever has a certificate of the CA with an identity in it.
    pub fn server_config(&self) -> Result<ServerConfig, TlsError> {
        let mut config = ServerConfig::builder_with_provider(self.provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(TlsError::Setup)?
            .with_client_cert_verifier(self.callers.clone())
            .with_single_cert(self.chain.clone(), self.key.clone_key())
            .map_err(TlsError::Setup)?;
        config.alpn_protocols = vec![HTTP2.to_vec(), HTTP1.to_vec()];
        // Connections are few and live long; each one shows its certificate.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(config)
    }

    pub(super) fn provider(&self) -> Arc<CryptoProvider> {
        self.provider.clone()
    }

    pub(super) fn site_agent(&self, site: &str) -> Arc<SiteAgent> {
        Arc::new(SiteAgent::new(site, self.roots.clone(), &self.provider))
    }

    /// For a connection to the agent of one site.
    pub fn client_config(&self, site: &str) -> Result<ClientConfig, TlsError> {
        let mut config = ClientConfig::builder_with_provider(self.provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(TlsError::Setup)?
            .dangerous()
            .with_custom_certificate_verifier(self.site_agent(site))
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())
            .map_err(TlsError::Setup)?;
        config.alpn_protocols = vec![HTTP2.to_vec()];
        config.resumption = Resumption::disabled();
        Ok(config)
    }
}

fn provider() -> CryptoProvider {
    // AES-128 first: the images are encrypted inside the freeze window, and this is the fastest where processors know
    // AES, as servers' do.
    CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        ..ring::default_provider()
    }
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let pem = read(file)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match found {
        Ok(found) if found.is_empty() => Err(no_pem(file, "certificate", pem::Error::NoItemsFound)),
        Ok(found) => Ok(found),
        Err(error) => Err(no_pem(file, "certificate", error)),
    }
}

fn key(file: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let pem = read(file)?;
    let metadata = std::fs::metadata(file).map_err(|error| TlsError::Read(file.to_owned(), error))?;
    if metadata.permissions().mode() & 0o077 != 0 {
        return Err(TlsError::Open(file.to_owned()));
    }
    PrivateKeyDer::from_pem_slice(&pem).map_err(|error| no_pem(file, "private key", error))
}

fn read(file: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(file).map_err(|error| TlsError::Read(file.to_owned(), error))
}

fn no_pem(file: &Path, what: &'static str, source: pem::Error) -> TlsError {
    TlsError::Pem { file: file.to_owned(), what, source }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::super::pki::{self, Validity};
    use super::*;
    use crate::client::chain;

    #[test]
    fn files_that_nobody_would_take_are_refused_at_the_start() {
        let root = tempfile::tempdir().unwrap();
        let year = Validity::days(365).unwrap();
        let (dir, foreign) = (root.path().join("pki"), root.path().join("foreign"));
        pki::init(&dir, "drover", year).unwrap();
        let foreign_ca = pki::init(&foreign, "drover", year).unwrap();
        let ams = pki::issue(&dir, &Identity::Agent("ams".into()), &[], year).unwrap();
        let lb = pki::issue(&dir, &Identity::Coordinator("lb".into()), &[], year).unwrap();
        let now = SystemTime::now();
        let day = Duration::from_secs(86_400);
        let past = Validity { from: now - 2 * day, until: now - day };
        let old = pki::issue(&dir, &Identity::Agent("old".into()), &[], past).unwrap();
        let open = root.path().join("open.key");
        std::fs::copy(&ams.key, &open).unwrap();
        std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o640)).unwrap();

        assert_eq!(Credentials::of_agent(&ams, "ams").unwrap().identity(), &Identity::Agent("ams".into()));
        Credentials::of_coordinator(&lb).unwrap();
        let as_ams = |files: &Files| chain(&Credentials::of_agent(files, "ams").unwrap_err());
        for (files, said) in [
            (Files { key: root.path().join("none"), ..ams.clone() }, "none cannot be read"),
            (Files { certificate: ams.key.clone(), ..ams.clone() }, "holds no certificate"),
            (Files { key: ams.certificate.clone(), ..ams.clone() }, "chmod 600"),
            (Files { key: open, ..ams.clone() }, "chmod 600"),
            (Files { key: lb.key.clone(), ..ams.clone() }, "is not that of the certificate"),
            (Files { ca: foreign_ca, ..ams.clone() }, "another CA"),
            (old, "has expired"),
            (lb.clone(), "is that of coordinator \"lb\", and that of the agent of site \"ams\" is meant"),
            (
                Files { certificate: ams.ca.clone(), key: dir.join("ca.key"), ca: ams.ca.clone() },
                "names neither",
            ),
        ] {
            let error = as_ams(&files);
            assert!(error.contains(said), "{error:?} does not say {said:?}");
        }
        let error = Credentials::of_agent(&ams, "fra").unwrap_err().to_string();
        assert!(error.contains("is that of the agent of site \"ams\""), "{error}");
        let error = Credentials::of_coordinator(&ams).unwrap_err().to_string();
        assert!(error.contains("that of a coordinator is meant"), "{error}");
    }
}
