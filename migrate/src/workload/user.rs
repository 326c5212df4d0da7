//! As whom a workload runs: named in the configuration, found on this host, taken on just before its program begins.

use std::ffi::CString;
use std::fmt;
use std::str::FromStr;

use nix::errno::Errno;
use nix::unistd::{Gid, Uid, User, getgrouplist, setgid, setgroups, setuid};

/// As it is configured: a name, or numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UserName {
    /// By the name that this host knows.
    Name(String),
    /// By numbers, which need no entry on this host.
    Numbers {
        /// The user.
        uid: u32,
        /// The group; by default the user's own on this host, else the one of the same number.
        gid: Option<u32>,
    },
}

/// Why there is no such user.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// Neither a name nor numbers.
    #[error("{0:?} is no user: a name, UID or UID:GID is meant, such as \"redis\" or \"999:999\"")]
    Text(String),
    /// Not on this host.
    #[error("no user {0:?} on this host: add it at every site with the same numbers, or write UID:GID")]
    Unknown(String),
    /// The system's list cannot be read.
    #[error("this host's users cannot be read")]
    System(#[from] Errno),
}

impl FromStr for UserName {
    type Err = UserError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || UserError::Text(text.to_owned());
        let number =
            |text: &str| text.parse::<u32>().ok().filter(|number| *number != u32::MAX).ok_or_else(bad);
        if text.starts_with(|first: char| first.is_ascii_digit()) {
            return match text.split_once(':') {
                Some((uid, gid)) => Ok(Self::Numbers { uid: number(uid)?, gid: Some(number(gid)?) }),
                None => Ok(Self::Numbers { uid: number(text)?, gid: None }),
            };
        }
        // useradd(8): what is sure to be taken everywhere.
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'$');
        let is_name = (1..=32).contains(&text.len()) && !text.starts_with('-') && text.bytes().all(is_plain);
        if is_name { Ok(Self::Name(text.to_owned())) } else { Err(bad()) }
    }
}

/// A user's numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    uid: Uid,
    gid: Gid,
    /// The user's further groups.
    groups: Vec<Gid>,
}

impl Identity {
    /// Looks a user up on this host.
    pub fn find(user: &UserName) -> Result<Self, UserError> {
        match user {
            UserName::Name(name) => {
                let known = User::from_name(name)?.ok_or_else(|| UserError::Unknown(name.clone()))?;
                let c_name = CString::new(name.as_str()).map_err(|_| UserError::Text(name.clone()))?;
                Ok(Self { uid: known.uid, gid: known.gid, groups: getgrouplist(&c_name, known.gid)? })
            }
            UserName::Numbers { uid, gid } => {
                let own = || Ok::<_, Errno>(User::from_uid(Uid::from_raw(*uid))?.map(|known| known.gid));
                let gid = match gid {
                    Some(gid) => Gid::from_raw(*gid),
                    None => own()?.unwrap_or(Gid::from_raw(*uid)),
                };
                Ok(Self { uid: Uid::from_raw(*uid), gid, groups: vec![gid] })
            }
        }
    }

    /// Becomes this user for good. Safe between fork and exec: three plain system calls.
    pub fn take_on(&self) -> Result<(), Errno> {
        setgroups(&self.groups)?;
        setgid(self.gid)?;
        setuid(self.uid)
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.uid, self.gid)?;
        self.groups.iter().try_for_each(|group| write!(f, ":{group}"))
    }
}

impl FromStr for Identity {
    type Err = UserError;

    /// As [`fmt::Display`] writes it.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let numbers: Option<Vec<u32>> = text.split(':').map(|number| number.parse().ok()).collect();
        match numbers.as_deref() {
            Some([uid, gid, groups @ ..]) => Ok(Self {
                uid: Uid::from_raw(*uid),
                gid: Gid::from_raw(*gid),
                groups: groups.iter().copied().map(Gid::from_raw).collect(),
            }),
            _ => Err(UserError::Text(text.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_told_apart() {
        let parse = |text: &str| text.parse::<UserName>();
        assert_eq!(parse("redis").unwrap(), UserName::Name("redis".into()));
        assert_eq!(parse("999").unwrap(), UserName::Numbers { uid: 999, gid: None });
        assert_eq!(parse("999:33").unwrap(), UserName::Numbers { uid: 999, gid: Some(33) });
        for bad in ["", "a b", "redis:redis", "-x", "99x", "1:", "1:2:3", "4294967295", "a/b"] {
            assert!(parse(bad).unwrap_err().to_string().contains("UID:GID is meant"), "{bad:?}");
        }
    }

    #[test]
    fn identities_are_found_and_travel_as_text() {
        let find = |text: &str| Identity::find(&text.parse().unwrap());
        let root = find("root").unwrap();
        assert_eq!((root.uid, root.gid), (Uid::from_raw(0), Gid::from_raw(0)));
        assert_eq!(root.to_string().parse::<Identity>().unwrap(), root);
        assert_eq!(find("0").unwrap().gid, root.gid);
        let stranger = find("54321").unwrap();
        assert_eq!(stranger.to_string(), "54321:54321:54321");
        assert_eq!(find("54321:7").unwrap().to_string(), "54321:7:7");
        assert!(
            find("nobody-has-this-name")
                .unwrap_err()
                .to_string()
                .contains("no user \"nobody-has-this-name\"")
        );
        assert!("7".parse::<Identity>().is_err());
    }
}
