//! Putting a packet into a tunnel and taking it out again is the identity, and whatever comes to a tunnel's end does no
//! harm.
#![no_main]

use std::net::IpAddr;

use lb_core::decapsulate::Verdict;
use lb_core::encapsulate;
use lb_core::host::{Frame, HostTunnels};
use lb_core::packet::{ETHER_TYPE_V4, ETHER_TYPE_V6, LINK_HEADER};
use lb_core::record::{Link, Location};
use lb_core::{V4, V6};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&choice, bytes)) = data.split_first() else { return };
    if bytes.len() < LINK_HEADER + 1 || bytes.len() > 2000 {
        return;
    }
    let ends: [IpAddr; 2] = if choice & 1 == 0 {
        [[1, 2, 3, 4].into(), [5, 6, 7, 8].into()]
    } else {
        [[0xfd01, 0, 0, 0, 0, 0, 0, 1].into(), [0xfd02, 0, 0, 0, 0, 0, 0, 2].into()]
    };
    let mut site = HostTunnels::default();
    site.endpoints.insert(ends[1]);
    site.sources.insert(ends[0]);
    site.process(&mut Frame(bytes.to_vec()));
    round_trip(choice, bytes, ends, site);
});

/// What can be said of any packet that the load balancer would send into a tunnel.
fn round_trip(choice: u8, bytes: &[u8], [source, destination]: [IpAddr; 2], mut site: HostTunnels) {
    let v6_inner = choice & 2 != 0;
    let mut frame = Frame(bytes.to_vec());
    let (header, ether_type) = if v6_inner { (40, ETHER_TYPE_V6) } else { (20, ETHER_TYPE_V4) };
    let outer = if source.is_ipv4() { 20 } else { 40 };
    // IPv6 does not go into IPv4 here, and frames as long as they say.
    if frame.0.len() < LINK_HEADER + header || v6_inner && source.is_ipv4() {
        return;
    }
    frame.0[12..14].copy_from_slice(&ether_type.to_be_bytes());
    let length = (frame.0.len() - LINK_HEADER) as u16;
    if v6_inner {
        frame.0[14] = 0x60 | frame.0[14] & 0xf;
        frame.0[18..20].copy_from_slice(&(length - 40).to_be_bytes());
    } else {
        frame.0[14] = 0x45;
        frame.0[16..18].copy_from_slice(&length.to_be_bytes());
    }
    let inner: IpAddr = if v6_inner {
        <[u8; 16]>::try_from(&frame.0[38..54]).expect("sixteen bytes").into()
    } else {
        <[u8; 4]>::try_from(&frame.0[30..34]).expect("four bytes").into()
    };
    site.destinations.insert(inner.to_canonical());
    let link = Link::new(1, [2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let location = match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => Location::tunnel4(
            link,
            0,
            u32::from_ne_bytes(source.octets()),
            u32::from_ne_bytes(destination.octets()),
        ),
        (source, destination) => Location::tunnel6(link, 0, words(source), words(destination)),
    };
    let mut sent = frame.clone();
    let done =
        if v6_inner { encapsulate(V6, &mut sent, &location) } else { encapsulate(V4, &mut sent, &location) };
    assert_eq!(done, Some(()));
    assert_eq!(sent.0.len(), frame.0.len() + outer);
    let verdict = site.process(&mut sent);
    assert!(matches!(verdict, Verdict::Strip(_)), "{verdict:?} for {sent:02x?}");
    assert_eq!(sent.0[12..], frame.0[12..], "what comes out is what went in");
}

fn words(address: IpAddr) -> [u32; 4] {
    let IpAddr::V6(address) = address else { return [0; 4] };
    let octets = address.octets();
    std::array::from_fn(|i| u32::from_ne_bytes(octets[4 * i..4 * i + 4].try_into().expect("four bytes")))
}
