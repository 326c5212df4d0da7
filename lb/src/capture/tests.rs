//! Captures, read back with an independent reader.

use lb_core::Reason;
use pcap_parser::pcapng::{Block, InterfaceDescriptionBlock, OptionCode, PcapNGOption, SectionHeaderBlock};
use pcap_parser::traits::{PcapNGPacketBlock as _, PcapReaderIterator as _};
use pcap_parser::{PcapBlockOwned, PcapError, PcapNGReader};

use super::stream::{Hook, Interface, Recorder, Sample};

/// What a reader makes of one packet.
#[derive(Debug, PartialEq, Eq)]
struct Read {
    interface: String,
    seconds: u32,
    nanoseconds: u32,
    length: u32,
    bytes: Vec<u8>,
    comment: String,
    verdict: Vec<u8>,
}

fn text(option: Option<&PcapNGOption<'_>>) -> String {
    let option = option.expect("the option is there");
    String::from_utf8(option.value()[..usize::from(option.len)].to_vec()).unwrap()
}

fn find<'o, 'a>(options: &'o [PcapNGOption<'a>], code: OptionCode) -> Option<&'o PcapNGOption<'a>> {
    options.iter().find(|option| option.code == code)
}

fn read(stream: &[u8]) -> (Vec<String>, Vec<Read>) {
    let mut reader = PcapNGReader::new(1 << 16, stream).unwrap();
    let (mut interfaces, mut resolutions, mut packets) = (Vec::new(), Vec::new(), Vec::new());
    loop {
        let (used, block) = match reader.next() {
            Ok(next) => next,
            Err(PcapError::Eof) => return (interfaces, packets),
            Err(PcapError::Incomplete(_)) => {
                reader.refill().unwrap();
                continue;
            }
            Err(error) => panic!("not pcap-ng: {error:?}"),
        };
        match block {
            PcapBlockOwned::NG(Block::SectionHeader(SectionHeaderBlock { options, .. })) => {
                assert!(text(find(&options, OptionCode::ShbUserAppl)).starts_with("Drover "));
            }
            PcapBlockOwned::NG(Block::InterfaceDescription(block)) => {
                let InterfaceDescriptionBlock { linktype, if_tsresol, options, .. } = &block;
                assert_eq!((linktype.0, *if_tsresol), (1, 9));
                interfaces.push(text(find(options, OptionCode::IfName)));
                resolutions.push(block.ts_resolution().unwrap());
            }
            PcapBlockOwned::NG(Block::EnhancedPacket(block)) => {
                let interface = block.if_id as usize;
                let (seconds, nanoseconds) = block.decode_ts(0, resolutions[interface]);
                packets.push(Read {
                    interface: interfaces[interface].clone(),
                    seconds,
                    nanoseconds,
                    length: block.origlen,
                    bytes: block.packet_data().to_vec(),
                    comment: text(find(&block.options, OptionCode::Comment)),
                    verdict: find(&block.options, OptionCode(7)).unwrap().value()[..9].to_vec(),
                });
            }
            _ => panic!("a block that nobody wrote"),
        }
        reader.consume(used);
    }
}

fn sample(reason: Reason, interface: u32, time_ns: u64, bytes: &[u8]) -> Sample {
    Sample { reason: Some(reason), interface, length: 1514, time_ns, bytes: bytes.into() }
}

fn eth0() -> Interface {
    Interface { name: "eth0".to_owned(), hook: Hook::Tc }
}

#[test]
fn packets_come_back_with_interface_time_and_reason() {
    let samples = [
        sample(Reason::ToBackend, 4, 1_000_000_007, &[1; 60]),
        sample(Reason::StaleSite, 9, 1_000_000_008, &[2; 61]),
        sample(Reason::ToClient, 4, 2_999_999_999, &[3; 62]),
        sample(Reason::NoFlow, 9, 3_000_000_000, &[4; 63]),
    ];
    let (mut recorder, mut stream) = Recorder::new(1_700_000_000_000_000_000);
    for sample in &samples {
        recorder.record(sample, |number| (number == 4).then(eth0), &mut stream);
    }
    let (interfaces, packets) = read(&stream);
    assert_eq!(interfaces, ["eth0", "interface 9"]);
    let times: Vec<(u32, u32)> = packets.iter().map(|read| (read.seconds, read.nanoseconds)).collect();
    assert_eq!(
        times,
        [(1_700_000_001, 7), (1_700_000_001, 8), (1_700_000_002, 999_999_999), (1_700_000_003, 0)]
    );
    for (read, sample) in packets.iter().zip(&samples) {
        let reason = sample.reason.unwrap();
        assert_eq!(read.comment, format!("{}: {}", reason.label(), reason.text()));
        assert_eq!((read.length, &read.bytes[..]), (1514, &sample.bytes[..]));
        assert_eq!(read.interface, if sample.interface == 4 { "eth0" } else { "interface 9" });
    }
    assert_eq!(packets.len(), samples.len());
    let verdicts: Vec<_> = packets.iter().map(|read| (read.verdict[0], read.verdict[1])).collect();
    assert_eq!(verdicts, [(1, 7), (2, 1), (1, 7), (2, 1)], "redirected by tc, dropped by XDP");
}

#[test]
fn every_length_is_padded_and_every_reason_has_a_comment() {
    let (mut recorder, mut stream) = Recorder::new(0);
    for (length, reason) in (0..).zip(Reason::ALL) {
        recorder.record(&sample(*reason, 1, 0, &vec![7; length]), |_| None, &mut stream);
        assert!(stream.len().is_multiple_of(4));
    }
    let (_, packets) = read(&stream);
    assert_eq!(packets.len(), Reason::ALL.len());
    for (length, read) in packets.iter().enumerate() {
        assert_eq!(read.bytes.len(), length);
    }
}

#[test]
fn a_reason_of_another_version_is_said_to_be_unknown() {
    let (mut recorder, mut stream) = Recorder::new(0);
    let unknown = Sample { reason: None, ..sample(Reason::Held, 1, 0, &[0; 14]) };
    recorder.record(&unknown, |_| None, &mut stream);
    assert_eq!(read(&stream).1[0].comment, "a reason that this version does not know");
}
