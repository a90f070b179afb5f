//! Makes the fuzz targets' corpora from the captures: `cargo run -p hyv-roce --example corpus -- fuzz/corpus`.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use hyv_roce::{
    mad,
    pcap::{Decoder, Step, file_header, record_header},
    wire::{Packet, ethernet, ip, udp},
};

const FRONT: usize = ethernet::LEN + ip::V4_LEN + udp::LEN;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let Some(folder) = std::env::args_os().nth(1).map(PathBuf::from) else {
        return Err("name the folder of the corpora: fuzz/corpus".into());
    };
    let captures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/captures");
    let mut packets: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut mads: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut conversations: BTreeMap<&str, Vec<Vec<u8>>> = BTreeMap::new();
    for name in ["vec", "pingpong", "cm"] {
        let file = fs::read(captures.join(name).with_extension("pcap"))?;
        for frame in frames(&file)? {
            if frame.len() < FRONT || frame[12..14] != [8, 0] {
                continue;
            }
            conversations.entry(name).or_default().push(frame.clone());
            let bytes = &frame[FRONT..];
            let packet = Packet::new_checked(bytes)?;
            let repr = packet.repr()?;
            if repr.bth.dest_qpn == mad::GSI_QPN {
                let parsed = mad::Mad::parse(packet.payload())?;
                let name = parsed.message.name().to_lowercase();
                mads.entry(name).or_insert_with(|| packet.payload().into());
                continue;
            }
            // The shortest of each kind and pad.
            let syndrome = repr.ext.aeth().map_or(0, |a| a.syndrome.byte());
            let name = format!("{:02x}-{syndrome:02x}-{}", bytes[0], repr.bth.pad);
            let kept = packets.entry(name).or_insert_with(|| bytes.into());
            if bytes.len() < kept.len() {
                *kept = bytes.into();
            }
        }
    }
    save(&folder.join("packet"), &packets)?;
    save(&folder.join("mad"), &mads)?;

    let mut streams = BTreeMap::new();
    let mut files = BTreeMap::new();
    for (name, frames) in &conversations {
        let some: Vec<_> = frames.iter().filter(|f| f.len() < 600).take(12).collect();
        let mut stream = vec![];
        let mut file = file_header(hyv_roce::pcap::LinkType::Ethernet).to_vec();
        for frame in &some {
            let packet = &frame[ethernet::LEN..];
            let units = packet.len().div_ceil(16);
            stream.push(u8::try_from(units)?);
            stream.extend(packet);
            stream.resize(stream.len() + units * 16 - packet.len(), 0);
        }
        for frame in &some[..4] {
            file.extend(record_header(1_700_000_000_000_000_001, frame.len()));
            file.extend(*frame);
        }
        streams.insert((*name).to_owned(), stream);
        files.insert(format!("{name}.pcapng"), pcapng(&some[..4]));
        files.insert(format!("{name}.pcap"), file);
    }
    save(&folder.join("frames"), &streams)?;
    save(&folder.join("capture"), &files)?;
    Ok(())
}

fn frames(file: &[u8]) -> Result<Vec<Vec<u8>>, hyv_roce::pcap::FileError> {
    let mut decoder = Decoder::new();
    let mut frames = vec![];
    let mut at = 0;
    loop {
        match decoder.step(&file[at..])? {
            Step::Record(record, len) => {
                frames.push(record.data.to_vec());
                at += len;
            }
            Step::Skip(len) => at += len,
            Step::Need(need) => {
                decoder.end(&file[at..], need)?;
                return Ok(frames);
            }
        }
    }
}

/// Section header, one interface, and packets, big-endian.
fn pcapng(frames: &[&Vec<u8>]) -> Vec<u8> {
    let block = |kind: u32, body: &[u8]| {
        let len = 12 + body.len().next_multiple_of(4);
        let mut b = kind.to_be_bytes().to_vec();
        b.extend((len as u32).to_be_bytes());
        b.extend(body);
        b.resize(len - 4, 0);
        b.extend((len as u32).to_be_bytes());
        b
    };
    let words = |words: &[u32]| -> Vec<u8> { words.iter().flat_map(|w| w.to_be_bytes()).collect() };
    let mut file = block(
        0x0a0d_0d0a,
        &words(&[0x1a2b_3c4d, 0x0001_0000, u32::MAX, u32::MAX]),
    );
    // Ethernet, nanoseconds.
    file.extend(block(
        1,
        &words(&[0x0001_0000, 0, 0x0009_0001, 0x0900_0000, 0]),
    ));
    for frame in frames {
        let len = frame.len() as u32;
        let body = [words(&[0, 0x1000, 0x2000, len, len]), (*frame).clone()].concat();
        file.extend(block(6, &body));
    }
    file
}

fn save(folder: &Path, inputs: &BTreeMap<String, Vec<u8>>) -> std::io::Result<()> {
    fs::create_dir_all(folder)?;
    for (name, bytes) in inputs {
        fs::write(folder.join(name), bytes)?;
    }
    Ok(())
}
