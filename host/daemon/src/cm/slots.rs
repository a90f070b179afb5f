//! A table of objects by generation-checked handle: index in the low 16 bits, generation in the high 16.

use std::collections::VecDeque;

#[derive(Debug)]
struct Slot<T> {
    generation: u16,
    value: Option<T>,
}

/// Objects of one user. A handle stops working when its object goes, also once its slot is used again.
#[derive(Debug)]
pub(super) struct Slots<T> {
    slots: Vec<Slot<T>>,
    free: VecDeque<u16>,
    limit: usize,
    live: usize,
}

impl<T> Slots<T> {
    /// An empty table for at most `limit` objects (65,536 whatever is asked: the handle has no more bits).
    pub(super) fn new(limit: usize) -> Self {
        Self {
            slots: Vec::new(),
            free: VecDeque::new(),
            limit: limit.min(1 << 16),
            live: 0,
        }
    }

    /// Objects in the table.
    pub(super) fn len(&self) -> usize {
        self.live
    }

    /// Whether one more object fits.
    pub(super) fn has_room(&self) -> bool {
        self.live < self.limit
    }

    /// Adds an object; gives it back when the table is full.
    pub(super) fn insert(&mut self, value: T) -> Result<u32, T> {
        if !self.has_room() {
            return Err(value);
        }
        // The slot that was freed longest ago: a stale handle meets its old generation as late as possible.
        let index = match self.free.pop_front() {
            Some(index) => index,
            None => {
                let Ok(index) = u16::try_from(self.slots.len()) else {
                    return Err(value);
                };
                self.slots.push(Slot {
                    generation: 0,
                    value: None,
                });
                index
            }
        };
        let slot = &mut self.slots[usize::from(index)];
        // 0 is skipped, so that a handle is never 0 and never just an index.
        slot.generation = slot.generation.checked_add(1).unwrap_or(1);
        slot.value = Some(value);
        self.live += 1;
        Ok(u32::from(slot.generation) << 16 | u32::from(index))
    }

    fn slot(&self, handle: u32) -> Option<&Slot<T>> {
        let slot = self.slots.get((handle & 0xffff) as usize)?;
        (u32::from(slot.generation) == handle >> 16).then_some(slot)
    }

    /// The object of a handle.
    pub(super) fn get(&self, handle: u32) -> Option<&T> {
        self.slot(handle)?.value.as_ref()
    }

    /// The object of a handle, to change.
    pub(super) fn get_mut(&mut self, handle: u32) -> Option<&mut T> {
        let slot = self.slots.get_mut((handle & 0xffff) as usize)?;
        if u32::from(slot.generation) == handle >> 16 {
            slot.value.as_mut()
        } else {
            None
        }
    }

    /// Takes an object out; its handle is stale from here on.
    pub(super) fn remove(&mut self, handle: u32) -> Option<T> {
        let value = self.slot(handle)?.value.as_ref().map(|_| ());
        value?;
        let index = (handle & 0xffff) as u16;
        let value = self.slots[usize::from(index)].value.take();
        self.free.push_back(index);
        self.live -= 1;
        value
    }

    /// Every handle in use, in order of index.
    pub(super) fn handles(&self) -> impl Iterator<Item = u32> + '_ {
        self.slots
            .iter()
            .enumerate()
            .filter(|(_, s)| s.value.is_some())
            .map(|(i, s)| u32::from(s.generation) << 16 | i as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stale_handles_find_nothing() {
        let mut t = Slots::new(2);
        let a = t.insert('a').unwrap();
        let b = t.insert('b').unwrap();
        assert_eq!(t.insert('c'), Err('c'));
        assert_eq!((t.remove(a), t.remove(a), t.len()), (Some('a'), None, 1));
        let c = t.insert('c').unwrap();
        assert_eq!(c & 0xffff, a & 0xffff);
        assert_ne!(c, a);
        assert_eq!(
            (t.get(a), t.get(b), t.get(c)),
            (None, Some(&'b'), Some(&'c'))
        );
        assert!(t.get_mut(a).is_none() && t.get(0).is_none() && t.get(u32::MAX).is_none());
        assert_eq!(t.handles().collect::<Vec<_>>(), [c, b]);
    }

    #[test]
    fn generations_wrap_past_zero() {
        let mut t = Slots::new(1);
        for _ in 0..200_000 {
            let h = t.insert(()).unwrap();
            assert!(h >> 16 != 0);
            t.remove(h).unwrap();
        }
    }
}
