//! Objects by generation-checked handle: index in the low 16 bits, generation in the high 16.

use std::collections::VecDeque;

use crate::limits::MIN_FREE;

/// A table of at most 65,536 objects. Places are used again the oldest first, and not before many are free or none is left
/// that was never used, so that what goes by the index alone, or by few bits of generation, stays stale for long.
#[derive(Debug)]
pub struct Table<T> {
    slots: Vec<Slot<T>>,
    /// The oldest first.
    free: VecDeque<u16>,
    limit: usize,
}

#[derive(Debug)]
struct Slot<T> {
    generation: u16,
    value: Option<T>,
}

/// The index part of a handle.
#[inline]
#[must_use]
pub const fn index(handle: u32) -> usize {
    (handle & 0xffff) as usize
}

impl<T> Table<T> {
    /// An empty table for at most `limit` objects.
    #[must_use]
    pub const fn new(limit: usize) -> Self {
        assert!(limit <= 65_536, "a handle's index has 16 bits");
        Self {
            slots: Vec::new(),
            free: VecDeque::new(),
            limit,
        }
    }

    /// Objects in it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether it holds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Puts in what `make` makes of the new handle; `None` when full.
    pub fn insert_with(&mut self, make: impl FnOnce(u32) -> T) -> Option<u32> {
        let i = if self.slots.len() < self.limit && self.free.len() < MIN_FREE {
            self.slots.push(Slot {
                generation: 1,
                value: None,
            });
            self.slots.len() - 1
        } else {
            usize::from(self.free.pop_front()?)
        };
        let slot = &mut self.slots[i];
        let handle = i as u32 | u32::from(slot.generation) << 16;
        slot.value = Some(make(handle));
        Some(handle)
    }

    /// The object, if the handle is current.
    #[inline]
    #[must_use]
    pub fn get(&self, handle: u32) -> Option<&T> {
        let slot = self.slots.get(index(handle))?;
        if u32::from(slot.generation) == handle >> 16 {
            slot.value.as_ref()
        } else {
            None
        }
    }

    /// The object, if the handle is current.
    #[inline]
    pub fn get_mut(&mut self, handle: u32) -> Option<&mut T> {
        let slot = self.slots.get_mut(index(handle))?;
        if u32::from(slot.generation) == handle >> 16 {
            slot.value.as_mut()
        } else {
            None
        }
    }

    /// The object at an index, whatever its generation.
    #[inline]
    #[must_use]
    pub fn at(&self, index: usize) -> Option<&T> {
        self.slots.get(index)?.value.as_ref()
    }

    /// The object at an index, whatever its generation.
    #[inline]
    pub fn at_mut(&mut self, index: usize) -> Option<&mut T> {
        self.slots.get_mut(index)?.value.as_mut()
    }

    /// Takes the object out; its handle is never valid again (generations wrap after 65,535 reuses).
    pub fn remove(&mut self, handle: u32) -> Option<T> {
        self.get(handle)?;
        let slot = &mut self.slots[index(handle)];
        let value = slot.value.take();
        slot.generation = slot.generation.wrapping_add(1).max(1);
        self.free.push_back(index(handle) as u16);
        value
    }

    /// All objects.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        self.slots.iter().enumerate().filter_map(|(i, s)| {
            s.value
                .as_ref()
                .map(|v| (i as u32 | u32::from(s.generation) << 16, v))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stale_handles_are_refused() {
        let mut t = Table::new(2);
        let a = t.insert_with(|_| 'a').unwrap();
        let b = t.insert_with(|_| 'b').unwrap();
        assert!(t.insert_with(|_| 'c').is_none());
        assert_eq!(t.remove(a), Some('a'));
        assert_eq!(t.remove(a), None);
        let c = t.insert_with(|_| 'c').unwrap();
        assert_eq!(index(c), index(a));
        assert_ne!(c, a);
        assert_eq!(
            (t.get(a), t.get(b), t.get(c)),
            (None, Some(&'b'), Some(&'c'))
        );
        assert_eq!(t.get(0xffff_ffff), None);
        assert_eq!(t.iter().count(), 2);
    }

    #[test]
    fn places_rest_before_they_are_used_again() {
        let mut t = Table::new(MIN_FREE * 4);
        let first = t.insert_with(|_| ()).unwrap();
        t.remove(first);
        for k in 1..MIN_FREE {
            let h = t.insert_with(|_| ()).unwrap();
            assert_eq!(index(h), k, "a place that was never used");
            t.remove(h);
        }
        // From now on the oldest, around and around.
        for k in 0..3 * MIN_FREE {
            let h = t.insert_with(|_| ()).unwrap();
            assert_eq!(index(h), k % MIN_FREE);
            assert_eq!(h >> 16, 2 + (k / MIN_FREE) as u32);
            t.remove(h);
        }
        // A full table hands out what there is.
        let all: Vec<_> = std::iter::from_fn(|| t.insert_with(|_| ())).collect();
        assert_eq!(all.len(), MIN_FREE * 4);
        t.remove(all[9]);
        assert_eq!(index(t.insert_with(|_| ()).unwrap()), index(all[9]));
    }
}
