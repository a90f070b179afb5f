//! Moving a large object: its copy is made in parts, in as many slices of the cleaner as it takes. Until the copy is whole the
//! object stays where it is, and the copy is an abandoned entry of the survivor; if the object dies meanwhile the copy's space is
//! taken back, so that a victim never takes more of the survivor than it had live bytes.

use super::Store;
use super::entry::{ENTRY_HEADER_BYTES, EntryHeader, EntryKind, seal};
use super::victim::Moved;
use crate::limits::LARGE_MOVE_BYTES;

/// Least bytes of a part: a slice gets somewhere however small its budget.
const LEAST_PART: usize = 64;

/// A copy under way, of the victim's next entry.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Relocation {
    to: usize,
    generation: u64,
    bytes: usize,
    done: usize,
}

/// A copy in the survivor that lacks its state word.
pub(crate) struct Copied {
    pub(crate) to: usize,
    pub(crate) generation: u64,
    /// What this slice copied.
    pub(crate) part: usize,
}

impl<R: AsRef<[u8]> + AsMut<[u8]>> Store<R> {
    /// Copies the object at `entry` to the survivor, all but its state word; a large one in parts of about `budget` bytes.
    pub(crate) fn copy_object(
        &mut self,
        entry: usize,
        header: &EntryHeader,
        budget: usize,
    ) -> Result<Copied, Moved> {
        let bytes = header.total_bytes();
        if bytes <= LARGE_MOVE_BYTES {
            let (to, generation) = self.survivor_space(bytes).ok_or(Moved::Blocked)?;
            self.log.bytes.dead += bytes as u64;
            self.region
                .as_mut()
                .copy_within(entry + 8..entry + bytes, to + 8);
            return Ok(Copied {
                to,
                generation,
                part: bytes,
            });
        }
        let mut copy = match self.cleaner.relocation.take() {
            Some(copy) => copy,
            None => self.begin_relocation(header)?,
        };
        let part = (bytes - copy.done).min(budget.max(LEAST_PART));
        let end = copy.done + part;
        let mem = self.region.as_mut();
        mem.copy_within(entry + copy.done..entry + end, copy.to + copy.done);
        if end < bytes {
            copy.done = end;
            self.cleaner.relocation = Some(copy);
            self.cleaner.bytes_moved += part as u64;
            return Err(Moved::Part(part));
        }
        // What it had of a header until now said that it is nothing.
        mem.copy_within(entry + 8..entry + ENTRY_HEADER_BYTES, copy.to + 8);
        Ok(Copied {
            to: copy.to,
            generation: copy.generation,
            part,
        })
    }

    fn begin_relocation(&mut self, header: &EntryHeader) -> Result<Relocation, Moved> {
        let bytes = header.total_bytes();
        let (to, generation) = self.survivor_space(bytes).ok_or(Moved::Blocked)?;
        self.log.bytes.dead += bytes as u64;
        let abandoned = EntryHeader {
            state: generation << 1,
            kind: EntryKind::Abandoned,
            ..*header
        };
        let mem = &mut self.region.as_mut()[to..to + bytes];
        abandoned.emit(mem);
        seal(mem, &abandoned);
        Ok(Relocation {
            to,
            generation,
            bytes,
            done: ENTRY_HEADER_BYTES,
        })
    }

    /// Gives up the copy under way, if there is one: its object died.
    pub(crate) fn give_up_relocation(&mut self) {
        if let Some(copy) = self.cleaner.relocation.take() {
            self.log.bytes.dead -= copy.bytes as u64;
            self.log
                .take_back(self.region.as_mut(), copy.to, copy.bytes);
        }
    }
}
