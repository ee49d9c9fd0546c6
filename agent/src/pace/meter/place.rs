//! Which addresses are where: prefixes as operators write them, and what the
//! meter's maps make of them.

use super::MeterConfig;
use drover_ebpf::{MAX_PLACES, PLACE_AGENT, PLACE_IN_RACK};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// Addresses that share their first bits: `10.1.0.0/16`, `fd00:1::/64`, or one
/// address alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Prefix {
    address: IpAddr,
    len: u8,
}

/// Why a text is no prefix.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PrefixError {
    /// It does not look like one.
    #[error("{0:?} is no prefix: write it like 10.1.0.0/16 or fd00:1::/64")]
    Malformed(String),
    /// It looks like an address in a prefix.
    #[error("{0:?} has bits set past its length: did you mean {1}?")]
    HostBits(String, Prefix),
}

/// Why prefixes and addresses cannot be used together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    /// Listed on both sides.
    #[error("{0} is listed as inside the rack and as across the core: remove one")]
    Both(Prefix),
    /// More than fit in the meter's maps.
    #[error("{0} prefixes and agents, more than the {MAX_PLACES} the meter holds: join prefixes")]
    TooMany(usize),
}

/// Where an address is, and whether an agent has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Inside this rack.
    pub in_rack: bool,
    /// An agent's.
    pub agent: bool,
}

impl Place {
    /// As the meter's maps have it.
    pub(super) fn value(self) -> u32 {
        (u32::from(self.in_rack) * PLACE_IN_RACK) | (u32::from(self.agent) * PLACE_AGENT)
    }
}

impl Prefix {
    /// The first `len` bits of `address`; the rest is cleared. `None` if the
    /// address is shorter.
    pub fn new(address: IpAddr, len: u8) -> Option<Self> {
        let address = match address {
            IpAddr::V4(a) if len <= 32 => {
                let mask = u32::MAX.checked_shl(32 - u32::from(len)).unwrap_or(0);
                IpAddr::V4(Ipv4Addr::from_bits(a.to_bits() & mask))
            }
            IpAddr::V6(a) if len <= 128 => {
                let mask = u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0);
                IpAddr::V6(Ipv6Addr::from_bits(a.to_bits() & mask))
            }
            _ => return None,
        };
        Some(Prefix { address, len })
    }

    /// One address.
    pub fn host(address: IpAddr) -> Self {
        let len = if address.is_ipv4() { 32 } else { 128 };
        Prefix { address, len }
    }

    /// Its first address.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// Bits that its addresses share.
    #[expect(
        clippy::len_without_is_empty,
        reason = "a number of bits, not of elements"
    )]
    pub fn len(&self) -> u8 {
        self.len
    }

    /// Whether an address begins with these bits.
    pub fn contains(&self, address: IpAddr) -> bool {
        Prefix::new(address, self.len).is_some_and(|prefix| prefix == *self)
    }
}

impl FromStr for Prefix {
    type Err = PrefixError;

    fn from_str(text: &str) -> Result<Self, PrefixError> {
        let malformed = || PrefixError::Malformed(text.to_owned());
        let (address, len) = match text.split_once('/') {
            Some((address, len)) => (address, Some(len.parse::<u8>().map_err(|_| malformed())?)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| malformed())?;
        let Some(len) = len else {
            return Ok(Prefix::host(address));
        };
        let prefix = Prefix::new(address, len).ok_or_else(malformed)?;
        if prefix.address != address {
            return Err(PrefixError::HostBits(text.to_owned(), prefix));
        }
        Ok(prefix)
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.len)
    }
}

impl TryFrom<String> for Prefix {
    type Error = PrefixError;

    fn try_from(text: String) -> Result<Self, PrefixError> {
        text.parse()
    }
}

impl From<Prefix> for String {
    fn from(prefix: Prefix) -> String {
        prefix.to_string()
    }
}

/// Addresses that no router passes on (link-local, unspecified, broadcast):
/// these stay in the rack unless the configuration says otherwise.
const LINK_LOCAL: [&str; 7] = [
    "0.0.0.0",
    "169.254.0.0/16",
    "224.0.0.0/24",
    "255.255.255.255",
    "::",
    "fe80::/10",
    "ff02::/16",
];

/// The entries of the meter's maps for a configuration. An agent's address
/// gets an entry of its own, which has to repeat on which side it is.
///
/// # Errors
/// See [`PlaceError`].
pub fn places(config: &MeterConfig) -> Result<BTreeMap<Prefix, Place>, PlaceError> {
    let mut places = BTreeMap::new();
    let sides = [(&config.in_rack, true), (&config.across_core, false)];
    for (prefix, in_rack) in sides
        .iter()
        .flat_map(|(list, side)| list.iter().map(move |prefix| (*prefix, *side)))
    {
        let place = Place {
            in_rack,
            agent: false,
        };
        if places.insert(prefix, place).is_some_and(|old| old != place) {
            return Err(PlaceError::Both(prefix));
        }
    }
    let agents: Vec<(Prefix, Place)> = config
        .agents
        .iter()
        .map(|&address| {
            let in_rack = places
                .iter()
                .filter(|(prefix, _)| prefix.contains(address))
                .max_by_key(|(prefix, _)| prefix.len)
                .is_some_and(|(_, place)| place.in_rack);
            let place = Place {
                in_rack,
                agent: true,
            };
            (Prefix::host(address), place)
        })
        .collect();
    places.extend(agents);
    for text in LINK_LOCAL {
        let prefix = text.parse().expect("a constant that the tests read");
        places.entry(prefix).or_insert(Place {
            in_rack: true,
            agent: false,
        });
    }
    if places.len() > MAX_PLACES as usize {
        return Err(PlaceError::TooMany(places.len()));
    }
    Ok(places)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn prefix(text: &str) -> Prefix {
        text.parse().unwrap()
    }

    #[test]
    fn prefixes_are_read_and_bad_ones_refused_with_what_to_write() {
        assert_eq!(prefix("10.1.0.0/16").to_string(), "10.1.0.0/16");
        assert_eq!(prefix("fd00::7").to_string(), "fd00::7/128");
        assert!(prefix("0.0.0.0/0").contains("9.9.9.9".parse().unwrap()));
        assert!(!prefix("0.0.0.0/0").contains("::1".parse().unwrap()));
        for bad in ["", "10.1/16", "10.0.0.0/33", "::/129", "10.0.0.0/", "a/b/c"] {
            let error = bad.parse::<Prefix>().unwrap_err();
            assert_eq!(error, PrefixError::Malformed(bad.into()));
        }
        let error = "10.1.2.3/16".parse::<Prefix>().unwrap_err();
        assert!(error.to_string().ends_with("did you mean 10.1.0.0/16?"));
    }

    #[test]
    fn agents_are_on_the_side_of_the_longest_prefix() {
        let config = MeterConfig {
            in_rack: vec![prefix("10.1.0.0/16"), prefix("fd01::/64")],
            across_core: vec![prefix("10.1.9.0/24")],
            agents: ["10.1.0.5", "10.1.9.5", "10.2.0.5", "fd01::5"]
                .map(|a| a.parse().unwrap())
                .to_vec(),
            ..MeterConfig::default()
        };
        let places = places(&config).unwrap();
        let in_rack = |text: &str| {
            let place = places[&prefix(text)];
            assert!(place.agent);
            place.in_rack
        };
        assert!(in_rack("10.1.0.5"));
        assert!(!in_rack("10.1.9.5"));
        assert!(!in_rack("10.2.0.5"));
        assert!(in_rack("fd01::5"));
        assert!(places[&prefix("fe80::/10")].in_rack);
    }

    #[test]
    fn a_prefix_on_both_sides_is_refused() {
        let config = MeterConfig {
            in_rack: vec![prefix("10.1.0.0/16")],
            across_core: vec![prefix("10.1.0.0/16")],
            ..MeterConfig::default()
        };
        assert_eq!(
            places(&config),
            Err(PlaceError::Both(prefix("10.1.0.0/16")))
        );
    }

    proptest! {
        #[test]
        fn any_text_is_a_prefix_or_an_error(text in ".{0,50}") {
            if let Ok(prefix) = text.parse::<Prefix>() {
                prop_assert_eq!(prefix.to_string().parse::<Prefix>(), Ok(prefix));
            }
        }

        #[test]
        fn prefixes_come_back_as_written(bits: u128, len in 0u8..=128, v4: bool) {
            let address = if v4 {
                IpAddr::V4(Ipv4Addr::from_bits(bits as u32))
            } else {
                IpAddr::V6(Ipv6Addr::from_bits(bits))
            };
            let len = if v4 { len % 33 } else { len };
            let prefix = Prefix::new(address, len).unwrap();
            prop_assert_eq!(prefix.to_string().parse::<Prefix>(), Ok(prefix));
            prop_assert!(prefix.contains(address));
        }
    }
}
