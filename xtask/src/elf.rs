//! Images without their symbols.
//!
//! What boots is described by an ELF file's program headers alone. Symbols and debug information lie
//! behind what those cover, with the section headers that describe them; so a stripped image is a
//! prefix of the file, with the fields that point to section headers cleared. This needs no binutils
//! and changes nothing that is loaded.

use anyhow::{Context as _, Result, bail};

const MAGIC_64_BIT_LITTLE_ENDIAN: &[u8] = b"\x7fELF\x02\x01";
const HEADER_BYTES: usize = 64;
const E_PHOFF: usize = 32;
const E_SHOFF: usize = 40;
const E_PHENTSIZE: usize = 54;
const E_PHNUM: usize = 56;
const E_SHENTSIZE: usize = 58;
const P_OFFSET: usize = 8;
const P_FILESZ: usize = 32;
const PROGRAM_HEADER_BYTES: usize = 56;

/// `image` without symbols, debug information and section headers.
///
/// # Errors
/// Where it is no 64-bit little-endian ELF file, or is cut off.
pub fn stripped(image: &[u8]) -> Result<Vec<u8>> {
    if image.len() < HEADER_BYTES || !image.starts_with(MAGIC_64_BIT_LITTLE_ENDIAN) {
        bail!("not a 64-bit ELF file");
    }
    let count = usize::from(u16_at(image, E_PHNUM)?);
    let size = usize::from(u16_at(image, E_PHENTSIZE)?);
    if count == 0 || size != PROGRAM_HEADER_BYTES {
        bail!("{count} program headers of {size} bytes, not some of {PROGRAM_HEADER_BYTES}");
    }
    let table = usize_at(image, E_PHOFF)?;
    let mut end = table
        .checked_add(count * size)
        .context("program headers beyond the file")?;
    for header in (table..end).step_by(size) {
        let start = usize_at(image, header + P_OFFSET)?;
        let len = usize_at(image, header + P_FILESZ)?;
        // A segment with nothing in the file (bss, a stack's flags) ends nowhere.
        if len > 0 {
            end = end.max(
                start
                    .checked_add(len)
                    .context("a segment beyond the file")?,
            );
        }
    }
    let mut kept = image
        .get(..end)
        .context("a segment beyond the file")?
        .to_vec();
    kept[E_SHOFF..E_SHOFF + 8].fill(0);
    // e_shentsize, e_shnum, e_shstrndx
    kept[E_SHENTSIZE..HEADER_BYTES].fill(0);
    Ok(kept)
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16> {
    let field = bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .context("the file is cut off")?;
    Ok(u16::from_le_bytes(*field))
}

fn usize_at(bytes: &[u8], at: usize) -> Result<usize> {
    let field = bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .context("the file is cut off")?;
    usize::try_from(u64::from_le_bytes(*field)).context("an offset beyond the file")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header, program headers of these offsets and sizes, 1,000 bytes, and section headers behind.
    fn file(segments: &[(u64, u64)]) -> Vec<u8> {
        let mut file = vec![0; HEADER_BYTES];
        file[..6].copy_from_slice(MAGIC_64_BIT_LITTLE_ENDIAN);
        file[E_PHOFF] = 64;
        file[E_PHENTSIZE] = 56;
        file[E_PHNUM] = segments.len() as u8;
        file[E_SHOFF..E_SHOFF + 2].copy_from_slice(&2000_u16.to_le_bytes());
        file[E_SHENTSIZE..HEADER_BYTES].copy_from_slice(&[64, 0, 5, 0, 4, 0]);
        for (offset, len) in segments {
            let mut header = [0; PROGRAM_HEADER_BYTES];
            header[P_OFFSET..P_OFFSET + 8].copy_from_slice(&offset.to_le_bytes());
            header[P_FILESZ..P_FILESZ + 8].copy_from_slice(&len.to_le_bytes());
            file.extend_from_slice(&header);
        }
        file.extend((0..1000).map(|i| (i % 251) as u8 | 1));
        file
    }

    #[test]
    fn everything_that_is_loaded_stays_and_nothing_behind_it() {
        let whole = file(&[(300, 100), (500, 33), (900, 0)]);
        let kept = stripped(&whole).unwrap();
        assert_eq!(kept.len(), 533);
        let differs: Vec<_> = (0..533).filter(|i| kept[*i] != whole[*i]).collect();
        assert!(
            differs
                .iter()
                .all(|i| (40..48).contains(i) || (58..64).contains(i))
        );
        assert_eq!((&kept[40..48], &kept[58..64]), (&[0; 8][..], &[0; 6][..]));
        assert_eq!(stripped(&kept).unwrap(), kept);
    }

    #[test]
    fn program_headers_stay_even_if_no_segment_covers_them() {
        assert_eq!(stripped(&file(&[(0, 10)])).unwrap().len(), 64 + 56);
    }

    #[test]
    fn what_is_no_elf_file_or_cut_off_is_refused() {
        assert!(stripped(b"").is_err());
        assert!(stripped(&[0x7f; 200]).is_err());
        assert!(stripped(&file(&[])).is_err());
        for segment in [
            (300, 10_000),
            (u64::MAX, 1),
            (u64::MAX, u64::MAX),
            (1, u64::MAX),
        ] {
            assert!(stripped(&file(&[segment])).is_err());
        }
        let whole = file(&[(300, 100), (500, 33)]);
        for len in 0..533 {
            assert!(stripped(&whole[..len]).is_err(), "{len}");
        }
    }

    #[test]
    fn a_real_program_still_runs() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("true");
        // Copied with its mode, then rewritten.
        std::fs::copy("/bin/true", &path).unwrap();
        let kept = stripped(&std::fs::read(&path).unwrap()).unwrap();
        std::fs::write(&path, kept).unwrap();
        // Another test's child may hold the file open for writing between its fork and exec.
        let status = loop {
            match std::process::Command::new(&path).status() {
                Err(e) if e.kind() == std::io::ErrorKind::ExecutableFileBusy => {}
                status => break status.unwrap(),
            }
        };
        assert!(status.success());
    }
}
