//! Reads what the meter needs from an Ethernet frame: addresses, TCP ports
//! and the length of the headers that every segment of it carries.

/// Bytes of a frame, from the start of its Ethernet header.
pub trait Load {
    /// `N` bytes at `offset`, or `None` if the frame ends before.
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;
}

impl Load for &[u8] {
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let start = offset as usize;
        self.get(start..start.checked_add(N)?)?.try_into().ok()
    }
}

/// Source and destination address of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Addresses {
    /// IPv4, in network order.
    V4 {
        /// Sender.
        source: [u8; 4],
        /// Receiver.
        destination: [u8; 4],
    },
    /// IPv6, in network order.
    V6 {
        /// Sender.
        source: [u8; 16],
        /// Receiver.
        destination: [u8; 16],
    },
}

/// What [`parse`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// Outer addresses: these decide which way the frame travels.
    pub addresses: Addresses,
    /// Source and destination port, of an unfragmented TCP segment only.
    pub tcp_ports: Option<(u16, u16)>,
    /// Bytes before the payload of the (innermost) transport header. When the
    /// kernel hands over many segments as one, each carries this much.
    pub header_len: u32,
}

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_QINQ: u16 = 0x88a8;
const TCP: u8 = 6;
const UDP: u8 = 17;
/// UDP ports on which the kernel's own tunnels carry segmented inner frames:
/// IANA's VXLAN, Linux's older VXLAN default, and Geneve.
const VXLAN: u16 = 4789;
const VXLAN_LINUX: u16 = 8472;
const GENEVE: u16 = 6081;
/// More extension headers than this are no ordinary traffic.
const MAX_EXTENSIONS: u32 = 6;

/// Network layer of a frame: what follows at `transport`.
struct Network {
    addresses: Addresses,
    protocol: u8,
    /// False for later fragments, which carry no transport header.
    first: bool,
    transport: u32,
}

/// Reads one frame. `None`: neither IPv4 nor IPv6, or cut short.
///
/// `many` says that the kernel carries several segments in this one frame
/// (GSO, GRO); only then are the headers of tunnels looked into.
#[inline(always)]
pub fn parse<L: Load>(bytes: &L, many: bool) -> Option<Frame> {
    let outer = network(bytes, 0)?;
    let (tcp_ports, header_len) = match outer.protocol {
        TCP if outer.first => {
            let (ports, len) = tcp(bytes, outer.transport)?;
            (Some(ports), len)
        }
        UDP if outer.first && many => (None, udp_payload(bytes, outer.transport)?),
        _ => (None, outer.transport),
    };
    Some(Frame {
        addresses: outer.addresses,
        tcp_ports,
        header_len,
    })
}

/// Bytes on the wire of a frame of `len` bytes that the kernel will cut (or
/// has put together) in segments with `segment` bytes of payload; and how many
/// segments that are. `segment` is 0 for a frame that is sent as it is.
#[inline(always)]
pub const fn on_wire(len: u32, header_len: u32, segment: u32) -> (u64, u64) {
    if segment == 0 || len <= header_len {
        return (len as u64, 1);
    }
    let payload = (len - header_len) as u64;
    let segments = payload.div_ceil(segment as u64);
    (len as u64 + (segments - 1) * header_len as u64, segments)
}

#[inline(always)]
fn network<L: Load>(bytes: &L, ethernet: u32) -> Option<Network> {
    let mut offset = ethernet + 12;
    let mut ethertype = u16::from_be_bytes(bytes.load(offset)?);
    offset += 2;
    // Tags the network card handles are not in the bytes; these two are.
    if ethertype == ETHERTYPE_VLAN || ethertype == ETHERTYPE_QINQ {
        ethertype = u16::from_be_bytes(bytes.load(offset + 2)?);
        offset += 4;
        if ethertype == ETHERTYPE_VLAN {
            ethertype = u16::from_be_bytes(bytes.load(offset + 2)?);
            offset += 4;
        }
    }
    match ethertype {
        ETHERTYPE_IPV4 => ipv4(bytes, offset),
        ETHERTYPE_IPV6 => ipv6(bytes, offset),
        _ => None,
    }
}

#[inline(always)]
fn ipv4<L: Load>(bytes: &L, offset: u32) -> Option<Network> {
    let h: [u8; 20] = bytes.load(offset)?;
    let header = u32::from(h[0] & 0x0f) * 4;
    if header < 20 {
        return None;
    }
    Some(Network {
        addresses: Addresses::V4 {
            source: [h[12], h[13], h[14], h[15]],
            destination: [h[16], h[17], h[18], h[19]],
        },
        protocol: h[9],
        first: u16::from_be_bytes([h[6], h[7]]) & 0x1fff == 0,
        transport: offset + header,
    })
}

#[inline(always)]
fn ipv6<L: Load>(bytes: &L, offset: u32) -> Option<Network> {
    let source = bytes.load(offset + 8)?;
    let destination = bytes.load(offset + 24)?;
    let [mut protocol] = bytes.load(offset + 6)?;
    let mut transport = offset + 40;
    let mut first = true;
    let mut extensions = 0;
    while extensions < MAX_EXTENSIONS {
        // Hop-by-hop, routing, destination options; fragment; authentication.
        let length = match protocol {
            0 | 43 | 60 => {
                let [_, units] = bytes.load(transport)?;
                (u32::from(units) + 1) * 8
            }
            44 => {
                let at = u16::from_be_bytes(bytes.load(transport + 2)?);
                first = at & 0xfff8 == 0;
                8
            }
            51 => {
                let [_, words] = bytes.load(transport)?;
                (u32::from(words) + 2) * 4
            }
            _ => break,
        };
        [protocol] = bytes.load(transport)?;
        transport += length;
        if !first {
            break;
        }
        extensions += 1;
    }
    Some(Network {
        addresses: Addresses::V6 {
            source,
            destination,
        },
        protocol,
        first,
        transport,
    })
}

/// Ports, and where the payload starts.
#[inline(always)]
fn tcp<L: Load>(bytes: &L, offset: u32) -> Option<((u16, u16), u32)> {
    let h: [u8; 14] = bytes.load(offset)?;
    let source = u16::from_be_bytes([h[0], h[1]]);
    let destination = u16::from_be_bytes([h[2], h[3]]);
    let header = u32::from(h[12] >> 4) * 4;
    Some(((source, destination), offset + header))
}

/// Where the payload that is cut in segments starts: after the UDP header, or
/// after the inner headers of a tunnel.
#[inline(always)]
fn udp_payload<L: Load>(bytes: &L, offset: u32) -> Option<u32> {
    let plain = offset + 8;
    let tunnel = match u16::from_be_bytes(bytes.load(offset + 2)?) {
        VXLAN | VXLAN_LINUX => 8,
        GENEVE => {
            let [options] = bytes.load(plain)?;
            8 + u32::from(options & 0x3f) * 4
        }
        _ => return Some(plain),
    };
    let Some(inner) = network(bytes, plain + tunnel) else {
        return Some(plain);
    };
    match inner.protocol {
        TCP if inner.first => Some(tcp(bytes, inner.transport)?.1),
        UDP if inner.first => Some(inner.transport + 8),
        _ => Some(inner.transport),
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;
    use std::vec;
    use std::vec::Vec;

    fn ethernet(ethertype: u16) -> Vec<u8> {
        let mut frame = vec![2; 12];
        frame.extend(ethertype.to_be_bytes());
        frame
    }

    fn ipv4(mut frame: Vec<u8>, protocol: u8, options: u8, fragment: u16) -> Vec<u8> {
        let mut header = vec![0; 20 + usize::from(options)];
        header[0] = 0x40 | (5 + options / 4);
        header[6..8].copy_from_slice(&fragment.to_be_bytes());
        header[9] = protocol;
        header[12..16].copy_from_slice(&[10, 1, 0, 1]);
        header[16..20].copy_from_slice(&[10, 2, 0, 2]);
        frame.extend(header);
        frame
    }

    fn ipv6(mut frame: Vec<u8>, next: u8) -> Vec<u8> {
        let mut header = vec![0; 40];
        header[0] = 0x60;
        header[6] = next;
        header[23] = 1;
        header[39] = 2;
        frame.extend(header);
        frame
    }

    fn tcp(mut frame: Vec<u8>, options: u8) -> Vec<u8> {
        let mut header = vec![0; 20 + usize::from(options)];
        header[0..4].copy_from_slice(&[0x1d, 0x2e, 0x1f, 0x90]);
        header[12] = (5 + options / 4) << 4;
        frame.extend(header);
        frame.extend([0; 100]);
        frame
    }

    fn udp(mut frame: Vec<u8>, port: u16) -> Vec<u8> {
        frame.extend(1u16.to_be_bytes());
        frame.extend(port.to_be_bytes());
        frame.extend([0; 4]);
        frame
    }

    fn read(frame: &[u8], many: bool) -> Frame {
        parse(&frame, many).unwrap()
    }

    #[test]
    fn tcp_with_options_over_ipv4_with_options() {
        let frame = read(&tcp(ipv4(ethernet(0x0800), TCP, 8, 0x4000), 12), true);
        assert_eq!(frame.header_len, 14 + 28 + 32);
        assert_eq!(frame.tcp_ports, Some((7470, 8080)));
        let addresses = Addresses::V4 {
            source: [10, 1, 0, 1],
            destination: [10, 2, 0, 2],
        };
        assert_eq!(frame.addresses, addresses);
    }

    #[test]
    fn tcp_behind_two_vlan_tags() {
        let mut frame = ethernet(ETHERTYPE_QINQ);
        frame.extend([0, 5, 0x81, 0, 0, 7, 0x86, 0xdd]);
        let frame = read(&tcp(ipv6(frame, TCP), 0), true);
        assert_eq!(frame.header_len, 14 + 8 + 40 + 20);
        assert_eq!(frame.tcp_ports, Some((7470, 8080)));
    }

    #[test]
    fn tcp_behind_ipv6_extension_headers() {
        let mut frame = ipv6(ethernet(0x86dd), 0);
        frame.extend([60, 1]);
        frame.extend([0; 14]);
        frame.extend([51, 0, 0, 0, 0, 0, 0, 0]);
        frame.extend([TCP, 4]);
        frame.extend([0; 22]);
        let frame = read(&tcp(frame, 0), true);
        assert_eq!(frame.header_len, 14 + 40 + 16 + 8 + 24 + 20);
        assert!(frame.tcp_ports.is_some());
    }

    #[test]
    fn later_fragments_have_no_ports() {
        let frame = read(&tcp(ipv4(ethernet(0x0800), TCP, 0, 100), 0), false);
        assert_eq!(frame.tcp_ports, None);
        let mut fragment = ipv6(ethernet(0x86dd), 44);
        fragment.extend([TCP, 0, 1, 0, 0, 0, 0, 0]);
        let frame = read(&tcp(fragment, 0), false);
        assert_eq!(frame.tcp_ports, None);
    }

    #[test]
    fn segments_in_a_tunnel_repeat_the_inner_headers_too() {
        for (port, header) in [(VXLAN, vec![0; 8]), (GENEVE, vec![2; 16])] {
            let mut frame = udp(ipv4(ethernet(0x0800), UDP, 0, 0), port);
            frame.extend(&header);
            frame.extend(tcp(ipv6(ethernet(0x86dd), TCP), 12));
            let many = read(&frame, true);
            let inner = 14 + 40 + 32;
            assert_eq!(many.header_len as usize, 14 + 20 + 8 + header.len() + inner);
            assert_eq!(many.tcp_ports, None, "a tenant's, whatever is inside");
        }
        let plain = read(&udp(ipv4(ethernet(0x0800), UDP, 0, 0), 53), true);
        assert_eq!(plain.header_len, 14 + 20 + 8);
    }

    #[test]
    fn what_is_not_ip_or_cut_short_is_nothing() {
        assert_eq!(parse(&ethernet(0x0806).as_slice(), false), None);
        let whole = tcp(ipv4(ethernet(0x0800), TCP, 0, 0), 0);
        for len in 0..14 + 20 + 14 {
            assert_eq!(parse(&&whole[..len], false), None, "{len} bytes");
        }
    }

    #[test]
    fn every_segment_has_its_headers() {
        // 10 full segments and a short one.
        assert_eq!(on_wire(66 + 14_480 + 5, 66, 1448), (14_551 + 10 * 66, 11));
        assert_eq!(on_wire(1514, 66, 0), (1514, 1));
        assert_eq!(on_wire(66, 66, 1448), (66, 1), "no payload, one segment");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200), many: bool) {
            if let Some(read) = parse(&bytes.as_slice(), many) {
                // No IP frame has fewer headers; none read here can have more.
                prop_assert!((34..3000).contains(&read.header_len));
            }
        }

        #[test]
        fn any_change_of_a_good_frame_is_read_or_refused(at in 0usize..180, value: u8, many: bool) {
            let mut frame = udp(ipv4(ethernet(0x0800), UDP, 4, 0), GENEVE);
            frame.extend([0; 8]);
            frame.extend(tcp(ipv6(ethernet(0x86dd), TCP), 12));
            let at = at % frame.len();
            frame[at] = value;
            if let Some(read) = parse(&frame.as_slice(), many) {
                // No IP frame has fewer headers; none read here can have more.
                prop_assert!((34..3000).contains(&read.header_len));
            }
        }

        #[test]
        fn segments_add_up(payload in 1u32..100_000, header in 34u32..200, segment in 1u32..9000) {
            let (bytes, segments) = on_wire(payload + header, header, segment);
            let by_hand = u64::from(payload) + u64::from(payload.div_ceil(segment)) * u64::from(header);
            prop_assert_eq!(bytes, by_hand);
            prop_assert_eq!(segments, u64::from(payload.div_ceil(segment)));
        }
    }
}
