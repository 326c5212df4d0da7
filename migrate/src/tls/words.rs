//! What went wrong in a handshake, for an operator.

use std::io;

use rustls::{AlertDescription, CertificateError, Error, InvalidMessage};

/// Says what is wrong with the other end, or what the other end finds wrong with us.
pub fn plain_words(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(problem) => format!("its certificate is not taken: {}", of_theirs(problem)),
        Error::AlertReceived(alert) => of_ours(*alert),
        Error::NoCertificatesPresented => {
            "it shows no certificate: give it one of `migrate pki issue` in its section [tls]".to_owned()
        }
        Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            "it does not speak TLS: set section [tls] at both ends, and https:// in the site's agent address"
                .to_owned()
        }
        other => other.to_string(),
    }
}

/// What is wrong with a certificate of ours that we have looked at ourselves.
pub(super) fn own_fault(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(problem) => of_theirs(problem),
        other => other.to_string(),
    }
}

/// [`plain_words`] for what a connection's handshake ends with.
pub(crate) fn plain_io(error: io::Error) -> io::Error {
    let kind = error.kind();
    match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
        Some(inner) => io::Error::new(kind, plain_words(inner)),
        None => error,
    }
}

fn of_theirs(problem: &CertificateError) -> String {
    use CertificateError::{
        BadSignature, Expired, ExpiredContext, InvalidPurpose, InvalidPurposeContext, NotValidForName,
        NotValidForNameContext, NotValidYet, NotValidYetContext, Other, UnknownIssuer,
    };
    match problem {
        UnknownIssuer | BadSignature => {
            "it was issued by another CA than the one in `tls.ca`: both ends need certificates of one CA"
                .to_owned()
        }
        Expired | ExpiredContext { .. } => {
            "it has expired: issue a new one with `migrate pki issue`, or set the clocks right".to_owned()
        }
        NotValidYet | NotValidYetContext { .. } => "it is not valid yet: set the clocks right".to_owned(),
        InvalidPurpose | InvalidPurposeContext { .. } => {
            "it is not made for this end of a connection".to_owned()
        }
        NotValidForName | NotValidForNameContext { .. } => {
            "it is for other addresses: issue one with --address for this one, or with none".to_owned()
        }
        Other(reason) => reason.0.to_string(),
        other => other.to_string(),
    }
}

fn of_ours(alert: AlertDescription) -> String {
    let why = match alert {
        AlertDescription::UnknownCA | AlertDescription::DecryptError => {
            "it was issued by another CA than the one that the other end trusts"
        }
        AlertDescription::CertificateExpired => "it has expired, or the clocks differ",
        AlertDescription::CertificateRequired => "there is none: set section [tls]",
        AlertDescription::BadCertificate => "it is for other addresses than this one",
        AlertDescription::CertificateUnknown | AlertDescription::UnsupportedCertificate => {
            "it is not that of who is meant: another site's, or another role's"
        }
        other => return format!("the other end ends the connection ({other:?}): its log says why"),
    };
    format!("the other end does not take our certificate: {why}")
}
