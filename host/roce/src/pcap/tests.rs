use alloc::{vec, vec::Vec};

use super::*;

/// All records of a file, as (time, link, original length, bytes).
type Read = Result<Vec<(u64, LinkType, usize, Vec<u8>)>, FileError>;

/// Fed in pieces of `piece` bytes.
fn read(file: &[u8], piece: usize) -> Read {
    let mut decoder = Decoder::new();
    let mut records = vec![];
    let (mut at, mut have) = (0, 0);
    loop {
        match decoder.step(&file[at..have])? {
            Step::Record(r, taken) => {
                records.push((r.time_ns, r.link, r.original_len, r.data.to_vec()));
                at += taken;
            }
            Step::Skip(taken) => at += taken,
            Step::Need(need) => {
                assert!(need > have - at);
                if have == file.len() {
                    decoder.end(&file[at..], need)?;
                    return Ok(records);
                }
                have = (have + piece).min(file.len());
            }
        }
    }
}

fn words(big: bool, words: &[u32]) -> Vec<u8> {
    words
        .iter()
        .flat_map(|w| {
            if big {
                w.to_be_bytes()
            } else {
                w.to_le_bytes()
            }
        })
        .collect()
}

#[test]
fn what_is_written_is_read() {
    let mut file = file_header(LinkType::RawIp).to_vec();
    for (time, data) in [(1_700_000_000_123_456_789, &b"abc"[..]), (5, b"")] {
        file.extend(record_header(time, data.len()));
        file.extend(data);
    }
    for piece in [1, 7, 1000] {
        let records = read(&file, piece).unwrap();
        assert_eq!(
            records,
            [
                (
                    1_700_000_000_123_456_789,
                    LinkType::RawIp,
                    3,
                    b"abc".to_vec()
                ),
                (5, LinkType::RawIp, 0, vec![]),
            ]
        );
    }
    for cut in [1, 4, 23, 25, 40, 42] {
        let error = read(&file[..cut], 1000).unwrap_err();
        assert!(matches!(error, FileError::Truncated { .. }), "{error}");
    }
    assert!(read(&[], 1).is_err());
}

#[test]
fn classic_in_all_dialects() {
    for big in [false, true] {
        for (magic, fraction_ns) in [(0xa1b2_c3d4, 7000), (0xa1b2_3c4d, 7)] {
            let mut file = words(big, &[magic, 0, 0, 0, 65535, 1 | 0x5000_0000]);
            let version = if big { [0, 2, 0, 4] } else { [2, 0, 4, 0] };
            file[4..8].copy_from_slice(&version);
            file.extend(words(big, &[3, 7, 2, 60]));
            file.extend([1, 2]);
            assert_eq!(
                read(&file, 5).unwrap(),
                [(
                    3_000_000_000 + fraction_ns,
                    LinkType::Ethernet,
                    60,
                    vec![1, 2]
                )]
            );
        }
    }
}

#[test]
fn garbage_is_named() {
    assert_eq!(
        read(b"hello, world", 12),
        Err(FileError::Magic(0x6865_6c6c))
    );
    let mut file = file_header(LinkType::Ethernet).to_vec();
    file.extend(words(false, &[0, 0, 1 << 20, 1 << 20]));
    assert!(matches!(read(&file, 64), Err(FileError::Length { .. })));
    file[4] = 9;
    assert_eq!(read(&file, 64), Err(FileError::Version(9, 4)));
}

fn block(big: bool, kind: u32, body: &[u8]) -> Vec<u8> {
    let len = (12 + body.len().next_multiple_of(4)) as u32;
    let mut b = words(big, &[kind, len]);
    b.extend(body);
    b.resize(len as usize - 4, 0);
    b.extend(words(big, &[len]));
    b
}

#[test]
fn pcapng() {
    for big in [false, true] {
        let section = [
            words(big, &[0x1a2b_3c4d]),
            if big {
                vec![0, 1, 0, 0]
            } else {
                vec![1, 0, 0, 0]
            },
            vec![0xff; 8],
        ]
        .concat();
        let half = |v: u16| {
            if big {
                v.to_be_bytes()
            } else {
                v.to_le_bytes()
            }
        };
        let nanoseconds = [&half(9)[..], &half(1), &[9, 0, 0, 0], &half(0), &half(0)].concat();
        let mut file = block(big, 0x0a0d_0d0a, &section);
        file.extend(block(
            big,
            1,
            &[&half(113)[..], &half(0), &words(big, &[0])].concat(),
        ));
        file.extend(block(
            big,
            1,
            &[&half(1)[..], &half(0), &words(big, &[2]), &nanoseconds].concat(),
        ));
        // Name resolution: passed over.
        file.extend(block(big, 4, &[0; 8]));
        for interface in [0, 1] {
            let body = [words(big, &[interface, 1, 5, 3, 90]), b"xyz".to_vec()].concat();
            file.extend(block(big, 6, &body));
        }
        file.extend(block(big, 3, &[words(big, &[3]), b"xyz".to_vec()].concat()));
        let stamp = (1 << 32) + 5;
        assert_eq!(
            read(&file, 3).unwrap(),
            [
                (stamp * 1000, LinkType::LinuxSll, 90, b"xyz".to_vec()),
                (stamp, LinkType::Ethernet, 90, b"xyz".to_vec()),
                (0, LinkType::LinuxSll, 3, b"xyz".to_vec()),
            ]
        );
        let unknown = block(big, 6, &words(big, &[7, 0, 0, 0, 0]));
        file.extend(&unknown);
        assert_eq!(read(&file, 100), Err(FileError::Interface(7)));
        let at = file.len() - 1;
        file[at] ^= 1;
        file[at - 3] ^= 1;
        assert_eq!(read(&file, 100), Err(FileError::Block(6)));
    }
}
