//! A certificate authority in a folder: `ca.pem` and `ca.key`, and beside them what it issues.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType, date_time_ymd,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::files::Files;
use super::identity::Identity;
use crate::protocol::is_valid_id;

/// How long a CA is good, unless said otherwise.
pub const CA_DAYS: u32 = 3650;
/// How long a certificate is good, unless said otherwise.
pub const CERTIFICATE_DAYS: u32 = 365;
/// The longest time that can be asked for.
pub const MAX_DAYS: u32 = 36_500;

/// A new certificate is good at a host whose clock is behind by this much.
const CLOCK_DRIFT: Duration = Duration::from_secs(3600);
/// The CA's name is followed by a part of its key's, and X.509 ends names after 64 characters.
const MAX_NAME_BYTES: usize = 48;

/// Why nothing was made.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// Made before.
    #[error("{} is there already and is not overwritten: move it away, or choose another folder or name", .0.display())]
    Exists(PathBuf),
    /// No CA.
    #[error("there is no CA in {}: make one with `migrate pki init --dir {}`", .0.display(), .0.display())]
    NoCa(PathBuf, #[source] io::Error),
    /// A folder that others can look into.
    #[error("others may read {}, and a CA's key is for nobody else: chmod 700 it, or choose a new folder", .0.display())]
    Open(PathBuf),
    /// A file or folder.
    #[error("{} cannot be written", .0.display())]
    Write(PathBuf, #[source] io::Error),
    /// Not ours.
    #[error("{} is not what `migrate pki init` makes: {problem}", .file.display())]
    NotOurs {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A name.
    #[error("{0:?} cannot be a name: letters, digits, `-`, `_` and `.` are meant, at most {MAX_NAME_BYTES}")]
    Name(String),
    /// An address.
    #[error("{0:?} is neither an IP address nor a host's name: leave out port and scheme")]
    Address(String),
    /// A time.
    #[error("{0} days cannot be: 1 to {MAX_DAYS} are meant")]
    Days(u32),
    /// The cryptography.
    #[error("the certificate cannot be made")]
    Make(#[from] rcgen::Error),
}

/// From when until when something is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// Its first moment.
    pub from: SystemTime,
    /// Its last one.
    pub until: SystemTime,
}

impl Validity {
    /// From now on for so many days.
    pub fn days(days: u32) -> Result<Self, PkiError> {
        if !(1..=MAX_DAYS).contains(&days) {
            return Err(PkiError::Days(days));
        }
        let now = SystemTime::now();
        Ok(Self { from: now - CLOCK_DRIFT, until: now + Duration::from_secs(u64::from(days) * 86_400) })
    }

    fn write_to(self, params: &mut CertificateParams) {
        let moment = |at: SystemTime| {
            let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
            // X.509 counts whole seconds.
            date_time_ymd(1970, 1, 1) + Duration::from_secs(since.as_secs())
        };
        (params.not_before, params.not_after) = (moment(self.from), moment(self.until));
    }
}

/// Makes a CA in a folder, which is made too; gives its certificate's file.
pub fn init(dir: &Path, name: &str, validity: Validity) -> Result<PathBuf, PkiError> {
    check_name(name)?;
    make_private(dir)?;
    let (certificate, key_file) = (dir.join("ca.pem"), dir.join("ca.key"));
    refuse_existing(&[&certificate, &key_file])?;
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    // Two CAs of one name are two, and whoever is given the wrong one is told so rather than of a bad signature.
    let point = key.public_key_raw();
    let tag: String = point[point.len() - 4..].iter().map(|byte| format!("{byte:02x}")).collect();
    let mut params = named(&format!("{name} {tag}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    validity.write_to(&mut params);
    let made = params.self_signed(&key)?;
    write_new(&key_file, &key.serialize_pem(), 0o600)?;
    write_new(&certificate, &made.pem(), 0o644)?;
    Ok(certificate)
}

/// Issues a certificate with a key of its own; `addresses` are IP addresses and host names.
///
/// Without addresses the certificate is good wherever the agent is: what counts is the site. With them, an agent
/// that is reached at another address is refused.
pub fn issue(
    dir: &Path,
    identity: &Identity,
    addresses: &[String],
    validity: Validity,
) -> Result<Files, PkiError> {
    check_name(identity.name())?;
    let (issuer, ca) = open(dir)?;
    let stem = match identity {
        Identity::Coordinator(name) => format!("coordinator-{name}"),
        Identity::Agent(site) => format!("agent-{site}"),
    };
    let files =
        Files { ca, certificate: dir.join(format!("{stem}.pem")), key: dir.join(format!("{stem}.key")) };
    refuse_existing(&[&files.certificate, &files.key])?;
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = named(&stem);
    let uri = identity.uri();
    params.subject_alt_names = vec![SanType::URI(uri.as_str().try_into()?)];
    for address in addresses {
        params.subject_alt_names.push(alternative_name(address)?);
    }
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    if let Identity::Agent(_) = identity {
        params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
    }
    params.use_authority_key_identifier_extension = true;
    validity.write_to(&mut params);
    let made = params.signed_by(&key, &issuer)?;
    write_new(&files.key, &key.serialize_pem(), 0o600)?;
    write_new(&files.certificate, &made.pem(), 0o644)?;
    Ok(files)
}

fn named(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}

fn alternative_name(address: &str) -> Result<SanType, PkiError> {
    let bad = || PkiError::Address(address.to_owned());
    if let Ok(ip) = address.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(ip));
    }
    rustls::pki_types::DnsName::try_from(address).map_err(|_| bad())?;
    Ok(SanType::DnsName(address.try_into().map_err(|_| bad())?))
}

/// The CA that [`init`] has made: what signs, and its certificate's file.
pub(super) fn open(dir: &Path) -> Result<(Issuer<'static, KeyPair>, PathBuf), PkiError> {
    let (file, key_file) = (dir.join("ca.pem"), dir.join("ca.key"));
    let no_ca = |error| PkiError::NoCa(dir.to_owned(), error);
    let pem = fs::read(&file).map_err(no_ca)?;
    let key = fs::read_to_string(&key_file).map_err(no_ca)?;
    let not_ours = |file: &Path, problem: String| PkiError::NotOurs { file: file.to_owned(), problem };
    let key = KeyPair::from_pem(&key).map_err(|error| not_ours(&key_file, error.to_string()))?;
    let certificate =
        CertificateDer::from_pem_slice(&pem).map_err(|error| not_ours(&file, error.to_string()))?;
    let anchor =
        webpki::anchor_from_trusted_cert(&certificate).map_err(|error| not_ours(&file, error.to_string()))?;
    let name = common_name(anchor.subject.as_ref());
    let name = name.ok_or_else(|| not_ours(&file, "its name is written in another way".to_owned()))?;
    if !anchor.subject_public_key_info.as_ref().ends_with(key.public_key_raw()) {
        return Err(not_ours(&file, format!("it belongs to another key than {}", key_file.display())));
    }
    Ok((Issuer::new(named(name), key), file))
}

/// The one common name of a subject as [`init`] writes it (X.501: a set of one pair, whose value is UTF-8); all lengths
/// are short.
fn common_name(subject: &[u8]) -> Option<&str> {
    let [0x31, _, 0x30, _, 0x06, 0x03, 0x55, 0x04, 0x03, 0x0c, length, name @ ..] = subject else {
        return None;
    };
    (name.len() == usize::from(*length)).then(|| std::str::from_utf8(name).ok()).flatten()
}

fn check_name(name: &str) -> Result<(), PkiError> {
    let fits = is_valid_id(name) && name.len() <= MAX_NAME_BYTES;
    if fits { Ok(()) } else { Err(PkiError::Name(name.to_owned())) }
}

/// Makes the folder for its owner alone, or sees that it is.
fn make_private(dir: &Path) -> Result<(), PkiError> {
    let failed = |error| PkiError::Write(dir.to_owned(), error);
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
    let mode = fs::metadata(dir).map_err(failed)?.permissions().mode();
    if mode & 0o077 == 0 { Ok(()) } else { Err(PkiError::Open(dir.to_owned())) }
}

fn refuse_existing(files: &[&Path]) -> Result<(), PkiError> {
    match files.iter().find(|file| file.exists()) {
        Some(file) => Err(PkiError::Exists(file.to_path_buf())),
        None => Ok(()),
    }
}

pub(super) fn write_new(file: &Path, text: &str, mode: u32) -> Result<(), PkiError> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::AlreadyExists => PkiError::Exists(file.to_owned()),
        _ => PkiError::Write(file.to_owned(), error),
    };
    let mut made = OpenOptions::new().write(true).create_new(true).mode(mode).open(file).map_err(failed)?;
    made.write_all(text.as_bytes()).map_err(failed)?;
    made.sync_all().map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn year() -> Validity {
        Validity::days(365).unwrap()
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn no_key_is_for_others() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("pki");
        init(&dir, "drover", year()).unwrap();
        let files = issue(&dir, &Identity::Agent("ams".into()), &[], year()).unwrap();
        assert_eq!(mode(&dir), 0o700);
        assert_eq!((mode(&dir.join("ca.key")), mode(&files.key)), (0o600, 0o600));
    }

    #[test]
    fn nothing_is_overwritten() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("pki");
        init(&dir, "drover", year()).unwrap();
        assert!(matches!(init(&dir, "drover", year()), Err(PkiError::Exists(_))));
        let identity = Identity::Coordinator("lb-1".into());
        let files = issue(&dir, &identity, &[], year()).unwrap();
        let before = fs::read(&files.key).unwrap();
        let error = issue(&dir, &identity, &[], year()).unwrap_err();
        assert!(error.to_string().contains("coordinator-lb-1.pem is there already"), "{error}");
        assert_eq!(fs::read(&files.key).unwrap(), before);
    }

    #[test]
    fn every_mistake_says_what_to_do() {
        let root = tempfile::tempdir().unwrap();
        let agent = Identity::Agent("ams".into());
        let error = issue(root.path(), &agent, &[], year()).unwrap_err().to_string();
        assert!(error.contains("make one with `migrate pki init --dir"), "{error}");
        let open = root.path().join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(matches!(init(&open, "drover", year()), Err(PkiError::Open(_))));
        let dir = root.path().join("pki");
        assert!(matches!(init(&dir, "a b", year()), Err(PkiError::Name(_))));
        init(&dir, "drover", year()).unwrap();
        for address in ["10.2.1.1:7401", "http://ams", "", "10.2.1.0/24"] {
            let error = issue(&dir, &agent, &[address.into()], year()).unwrap_err();
            assert!(matches!(error, PkiError::Address(_)), "{address}: {error}");
        }
        assert!(matches!(issue(&dir, &Identity::Agent("../x".into()), &[], year()), Err(PkiError::Name(_))));
        assert!(matches!(Validity::days(0), Err(PkiError::Days(0))));
        fs::write(dir.join("ca.pem"), "no certificate").unwrap();
        assert!(matches!(issue(&dir, &agent, &[], year()), Err(PkiError::NotOurs { .. })));
    }

    #[test]
    fn a_ca_with_the_key_of_another_issues_nothing() {
        let root = tempfile::tempdir().unwrap();
        let (one, other) = (root.path().join("one"), root.path().join("other"));
        init(&one, "drover", year()).unwrap();
        init(&other, "drover", year()).unwrap();
        fs::copy(other.join("ca.key"), one.join("ca.key")).unwrap();
        let error = issue(&one, &Identity::Agent("ams".into()), &[], year()).unwrap_err();
        assert!(error.to_string().contains("belongs to another key"), "{error}");
    }
}
