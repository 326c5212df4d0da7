//! Section `[decapsulator]` of `agent.toml`.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Deserialize;

/// What the tables have room for.
const ENDPOINTS_MOST: usize = 64;
const SOURCES_MOST: usize = 1024;
/// The kernel's IFNAMSIZ, with its final zero.
const INTERFACE_NAME: usize = 16;
const BPFFS: &str = "/sys/fs/bpf";

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawDecapsulator {
    interfaces: Vec<String>,
    #[serde(default)]
    hook: HookChoice,
    endpoints: Vec<String>,
    from: Option<Vec<String>>,
    pin_path: Option<PathBuf>,
}

/// Where to attach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HookChoice {
    /// tc on virtual interfaces, else XDP.
    #[default]
    Auto,
    /// XDP: native, or generic where the driver has none.
    Xdp,
    /// tc's ingress: TCX, or a filter of clsact before Linux 6.6.
    Tc,
}

/// A decapsulator's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where encapsulated packets come in; never empty.
    pub interfaces: Vec<String>,
    /// Where to attach.
    pub hook: HookChoice,
    /// The site's own addresses that tunnels lead to; never empty.
    pub endpoints: BTreeSet<IpAddr>,
    /// Whose packets are taken; everybody's if empty.
    pub from: BTreeSet<Prefix>,
    /// Where tables and links are pinned, on a BPF file system.
    pub pin_path: PathBuf,
}

/// An address and how many of its first bits count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Prefix {
    address: IpAddr,
    length: u8,
}

impl Prefix {
    /// Its address among IPv6's, where IPv4's are mapped into, and its length there.
    pub fn among_v6(self) -> (Ipv6Addr, u8) {
        match self.address {
            IpAddr::V4(v4) => (v4.to_ipv6_mapped(), self.length + 96),
            IpAddr::V6(v6) => (v6, self.length),
        }
    }
}

impl FromStr for Prefix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let meant =
            || format!("{text:?}: an address or a prefix is meant, such as 10.2.1.254 or 10.2.0.0/16");
        let (address, length) = text.split_once('/').map_or((text, None), |(at, length)| (at, Some(length)));
        let address: IpAddr = address.parse().map_err(|_| meant())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let length = length.map_or(Ok(most), str::parse).map_err(|_| meant())?;
        if length > most {
            return Err(meant());
        }
        let prefix = Self { address, length };
        let (bits, counted) = prefix.among_v6();
        let rest = u128::MAX.checked_shr(counted.into()).unwrap_or(0);
        if bits.to_bits() & rest != 0 {
            return Err(format!("{text:?} has bits behind its first {length}: is /{most} meant?"));
        }
        Ok(prefix)
    }
}

/// A key and what is wrong with it.
type Problem = (&'static str, String);

impl RawDecapsulator {
    /// For a site of this name.
    pub(crate) fn validate(self, site: &str) -> Result<Config, Problem> {
        let pin_path = self.pin_path.unwrap_or_else(|| default_pin_path(site));
        if !pin_path.is_absolute() || pin_path.to_string_lossy().contains('.') {
            let meant = format!("an absolute path without dots is meant, below {BPFFS}");
            return Err(("pin_path", meant));
        }
        Ok(Config {
            interfaces: interfaces(self.interfaces).map_err(|problem| ("interfaces", problem))?,
            hook: self.hook,
            endpoints: endpoints(&self.endpoints).map_err(|problem| ("endpoints", problem))?,
            from: sources(self.from.as_deref()).map_err(|problem| ("from", problem))?,
            pin_path,
        })
    }
}

/// Where pins are unless the configuration says otherwise. Names on that file system have no dots.
pub fn default_pin_path(site: &str) -> PathBuf {
    Path::new(BPFFS).join("drover-agent").join(site.replace('.', "+"))
}

fn interfaces(names: Vec<String>) -> Result<Vec<String>, String> {
    if names.is_empty() {
        return Err("the interfaces are meant where the load balancer's packets come in".to_owned());
    }
    for (index, name) in names.iter().enumerate() {
        let strange = |c: char| c == '/' || c == ':' || c.is_whitespace();
        if name.is_empty() || name.len() >= INTERFACE_NAME || name.contains(strange) {
            return Err(format!("{name:?} is no interface's name"));
        }
        if names[..index].contains(name) {
            return Err(format!("{name:?} is there twice"));
        }
    }
    Ok(names)
}

fn endpoints(texts: &[String]) -> Result<BTreeSet<IpAddr>, String> {
    if texts.is_empty() || texts.len() > ENDPOINTS_MOST {
        return Err(format!(
            "the site's tunnel endpoints are meant (`tunnel` of the site in the load balancer), at most \
             {ENDPOINTS_MOST}"
        ));
    }
    let endpoint = |text: &String| match text.parse::<IpAddr>() {
        Ok(ip) if !ip.is_unspecified() && !ip.is_multicast() && !ip.is_loopback() => Ok(ip),
        _ => Err(format!("{text:?}: one of the site's own addresses is meant, such as 10.2.1.2")),
    };
    texts.iter().map(endpoint).collect()
}

fn sources(texts: Option<&[String]>) -> Result<BTreeSet<Prefix>, String> {
    match texts {
        None => Ok(BTreeSet::new()),
        Some(texts) if texts.is_empty() || texts.len() > SOURCES_MOST => Err(format!(
            "the load balancers' addresses or prefixes are meant, at most {SOURCES_MOST}; leave the key out to take \
             packets from anybody"
        )),
        Some(texts) => texts.iter().map(|text| text.parse()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_read_and_mapped() {
        let among = |text: &str| text.parse::<Prefix>().unwrap().among_v6();
        assert_eq!(among("10.2.0.0/16"), ("::ffff:10.2.0.0".parse().unwrap(), 112));
        assert_eq!(among("10.2.1.254"), ("::ffff:10.2.1.254".parse().unwrap(), 128));
        assert_eq!(among("0.0.0.0/0"), ("::ffff:0.0.0.0".parse().unwrap(), 96));
        assert_eq!(among("fd00::/8"), ("fd00::".parse().unwrap(), 8));
        assert_eq!(among("::/0"), ("::".parse().unwrap(), 0));
        for wrong in ["", "x", "10.2.0.0/33", "10.2.0.0/", "fd00::/129", "10.2.1.0/16", "fd00::1/64"] {
            assert!(wrong.parse::<Prefix>().is_err(), "{wrong}");
        }
    }
}
