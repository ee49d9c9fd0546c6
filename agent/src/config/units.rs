//! Small values of the configuration: network prefixes and sizes.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use thiserror::Error;

/// A network, such as `10.1.0.0/16`. No host bits are set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IpPrefix {
    address: IpAddr,
    length: u8,
}

/// Why a text is not a network prefix.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PrefixError {
    /// No `/`, or no address before it, or no number after it.
    #[error("not a network prefix")]
    Syntax,
    /// Longer than the address.
    #[error("a prefix of this family has at most {0} bits")]
    TooLong(u8),
    /// The address has bits set outside the prefix.
    #[error("the address has bits set beyond the prefix; the network is {0}")]
    HostBits(IpPrefix),
}

impl IpPrefix {
    /// The network's address.
    pub fn address(self) -> IpAddr {
        self.address
    }

    /// Length in bits: up to 32 for IPv4, 128 for IPv6.
    pub fn length(self) -> u8 {
        self.length
    }

    /// Whether `address` belongs to this network.
    pub fn contains(self, address: IpAddr) -> bool {
        match (self.address, address) {
            (IpAddr::V4(_), IpAddr::V4(_)) | (IpAddr::V6(_), IpAddr::V6(_)) => {
                masked(address, self.length) == self.address
            }
            _ => false,
        }
    }
}

fn masked(address: IpAddr, length: u8) -> IpAddr {
    match address {
        IpAddr::V4(a) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0);
            Ipv4Addr::from(u32::from(a) & mask).into()
        }
        IpAddr::V6(a) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0);
            Ipv6Addr::from(u128::from(a) & mask).into()
        }
    }
}

impl FromStr for IpPrefix {
    type Err = PrefixError;

    fn from_str(text: &str) -> Result<Self, PrefixError> {
        let (address, length) = text.split_once('/').ok_or(PrefixError::Syntax)?;
        let address: IpAddr = address.parse().map_err(|_| PrefixError::Syntax)?;
        let length: u8 = length.parse().map_err(|_| PrefixError::Syntax)?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        if length > most {
            return Err(PrefixError::TooLong(most));
        }
        let network = IpPrefix {
            address: masked(address, length),
            length,
        };
        if network.address != address {
            return Err(PrefixError::HostBits(network));
        }
        Ok(network)
    }
}

impl fmt::Display for IpPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

/// A number of bytes, written `268435456`, `"256 MiB"` or `"1 GiB"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

/// A text that is no size.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("not a size")]
pub struct SizeError;

impl FromStr for ByteSize {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let text = text.trim();
        let digits = text.find(|c: char| !c.is_ascii_digit());
        let (number, unit) = text.split_at(digits.unwrap_or(text.len()));
        let number: u64 = number.parse().map_err(|_| SizeError)?;
        let factor: u64 = match unit.trim() {
            "" | "B" => 1,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            "TiB" => 1 << 40,
            _ => return Err(SizeError),
        };
        number.checked_mul(factor).map(ByteSize).ok_or(SizeError)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_prefix_contains_its_addresses_only() {
        let p: IpPrefix = "10.1.0.0/16".parse().unwrap();
        assert!(p.contains("10.1.255.255".parse().unwrap()));
        assert!(!p.contains("10.2.0.0".parse().unwrap()));
        assert!(!p.contains("fd00::1".parse().unwrap()));
        let all: IpPrefix = "0.0.0.0/0".parse().unwrap();
        assert!(all.contains("255.1.2.3".parse().unwrap()));
        let six: IpPrefix = "fd00:1::/32".parse().unwrap();
        assert!(six.contains("fd00:1:ffff::1".parse().unwrap()));
        assert!(!six.contains("fd00:2::1".parse().unwrap()));
    }

    #[test]
    fn bad_prefixes_say_why() {
        let parse = |s: &str| s.parse::<IpPrefix>().unwrap_err();
        assert_eq!(parse("10.1.0.0"), PrefixError::Syntax);
        assert_eq!(parse("10.1.0.0/33"), PrefixError::TooLong(32));
        assert_eq!(parse("fd00::/129"), PrefixError::TooLong(128));
        assert!(parse("10.1.0.1/16").to_string().ends_with("10.1.0.0/16"));
    }

    #[test]
    fn sizes() {
        assert_eq!("256 MiB".parse(), Ok(ByteSize(256 << 20)));
        assert_eq!("17".parse(), Ok(ByteSize(17)));
        for bad in ["", "MiB", "1.5 GiB", "3 MB", "99999999 TiB", "-1"] {
            assert_eq!(bad.parse::<ByteSize>(), Err(SizeError), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in ".{0,40}") {
            let _ = text.parse::<IpPrefix>();
            let _ = text.parse::<ByteSize>();
        }
    }
}
