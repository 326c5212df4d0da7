//! An address prefix such as `10.9.0.0/24`.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A prefix of one address family; bits behind the prefix are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix<A> {
    address: A,
    length: u8,
}

impl<A: Copy> Prefix<A> {
    /// The first address.
    pub fn address(&self) -> A {
        self.address
    }

    /// Length in bits.
    pub fn length(&self) -> u8 {
        self.length
    }
}

impl<A: fmt::Display> fmt::Display for Prefix<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

/// What an address family has to offer for its prefixes to be parsed.
pub trait Family: Copy + fmt::Display + std::str::FromStr {
    /// Bits of an address.
    const BITS: u8;
    /// An example for messages.
    const EXAMPLE: &'static str;
    /// The address as a number, in the upper bits of the `u128`.
    fn bits(self) -> u128;
    /// The address, if `ip` is of this family.
    fn of(ip: IpAddr) -> Option<Self>;
}

impl Family for Ipv4Addr {
    const BITS: u8 = 32;
    const EXAMPLE: &'static str = "10.9.0.0/24";
    fn bits(self) -> u128 {
        u128::from(u32::from(self)) << 96
    }
    fn of(ip: IpAddr) -> Option<Self> {
        match ip {
            IpAddr::V4(ip) => Some(ip),
            IpAddr::V6(_) => None,
        }
    }
}

impl Family for Ipv6Addr {
    const BITS: u8 = 128;
    const EXAMPLE: &'static str = "fd00:9::/112";
    fn bits(self) -> u128 {
        u128::from(self)
    }
    fn of(ip: IpAddr) -> Option<Self> {
        match ip {
            IpAddr::V6(ip) => Some(ip),
            IpAddr::V4(_) => None,
        }
    }
}

impl<A: Family> Prefix<A> {
    /// Whether the address is covered. An address of the other family is not.
    pub fn contains(&self, ip: IpAddr) -> bool {
        A::of(ip).is_some_and(|ip| mask(ip.bits(), self.length) == self.address.bits())
    }
}

impl<A: Family> std::str::FromStr for Prefix<A> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let example = A::EXAMPLE;
        let (address, length) = text
            .split_once('/')
            .ok_or_else(|| format!("{text:?} has no prefix length; write for example {example:?}"))?;
        let address: A = address.parse().map_err(|_| {
            format!("{address:?} is not an address of this family; write for example {example:?}")
        })?;
        let length =
            length.parse().ok().filter(|length| (1..=A::BITS).contains(length)).ok_or_else(|| {
                format!("the prefix length {length:?} is not a number from 1 to {}", A::BITS)
            })?;
        if mask(address.bits(), length) != address.bits() {
            return Err(format!("{text:?} has bits behind its prefix length; they must be zero"));
        }
        Ok(Self { address, length })
    }
}

fn mask(bits: u128, length: u8) -> u128 {
    bits & u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_knows_its_addresses() {
        let four: Prefix<Ipv4Addr> = "10.9.0.0/16".parse().unwrap();
        assert_eq!((four.address(), four.length()), (Ipv4Addr::new(10, 9, 0, 0), 16));
        assert!(four.contains("10.9.255.1".parse().unwrap()));
        assert!(!four.contains("10.10.0.1".parse().unwrap()));
        assert!(!four.contains("fd00:9::1".parse().unwrap()));
        let six: Prefix<Ipv6Addr> = "fd00:9::/112".parse().unwrap();
        assert!(six.contains("fd00:9::ffff".parse().unwrap()));
        assert!(!six.contains("fd00:9::1:0".parse().unwrap()));
        let one: Prefix<Ipv6Addr> = "fd00::1/128".parse().unwrap();
        assert!(one.contains("fd00::1".parse().unwrap()) && !one.contains("fd00::2".parse().unwrap()));
    }

    #[test]
    fn what_is_no_prefix_is_refused() {
        for text in ["10.9.0.0", "10.9.0.1/24", "10.9.0.0/33", "10.9.0.0/0", "fd00::/64", "10.9.0.0/x", "/8"]
        {
            assert!(text.parse::<Prefix<Ipv4Addr>>().is_err(), "{text}");
        }
    }
}
