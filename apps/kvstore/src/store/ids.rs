//! A small hash table from ids to places in a list: one or two cache lines a lookup, rebuilt by the rare calls that change it.

use alloc::vec::Vec;

/// Places in a list by id.
#[derive(Debug, Default)]
pub(crate) struct IdIndex {
    /// Id and place; an empty slot has [`FREE`] as its place. A power of two of them, never more than half of them used.
    slots: Vec<(u64, u32)>,
}

const FREE: u32 = u32::MAX;

impl IdIndex {
    /// The place of `id`.
    #[inline(always)]
    pub(crate) fn find(&self, id: u64) -> Option<usize> {
        let mask = self.slots.len().wrapping_sub(1);
        let mut at = Self::start(id) & mask;
        loop {
            let &(found, place) = self.slots.get(at)?;
            if place == FREE {
                return None;
            }
            if found == id {
                return Some(place as usize);
            }
            at = (at + 1) & mask;
        }
    }

    #[inline(always)]
    const fn start(id: u64) -> usize {
        (id.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as usize
    }

    /// Holds `ids`, all different, and nothing else.
    pub(crate) fn rebuild(&mut self, ids: impl ExactSizeIterator<Item = (u64, u32)>) {
        let size = (2 * (ids.len() + 1)).next_power_of_two().max(8);
        self.slots.clear();
        self.slots.resize(size, (0, FREE));
        for (id, place) in ids {
            let mut at = Self::start(id) & (size - 1);
            while self.slots[at].1 != FREE {
                at = (at + 1) & (size - 1);
            }
            self.slots[at] = (id, place);
        }
    }

    /// Adds `id`, which is new. False if it has to be rebuilt for that.
    pub(crate) fn insert(&mut self, id: u64, place: u32, count: usize) -> bool {
        let size = self.slots.len();
        if 2 * (count + 1) > size {
            return false;
        }
        let mut at = Self::start(id) & (size - 1);
        while self.slots[at].1 != FREE {
            at = (at + 1) & (size - 1);
        }
        self.slots[at] = (id, place);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_in_is_found_and_nothing_else() {
        let mut index = IdIndex::default();
        assert_eq!(index.find(0), None);
        let mut ids: Vec<u64> = Vec::new();
        for n in 0..3000u64 {
            let id = if n % 2 == 0 { n } else { n << 40 | 7 };
            if !index.insert(id, n as u32, ids.len()) {
                index.rebuild(
                    ids.iter()
                        .enumerate()
                        .map(|(place, id)| (*id, place as u32)),
                );
                assert!(index.insert(id, n as u32, ids.len()));
            }
            ids.push(id);
        }
        for (place, id) in ids.iter().enumerate() {
            assert_eq!(index.find(*id), Some(place));
            assert_eq!(index.find(id ^ (1 << 60)), None);
        }
    }
}
