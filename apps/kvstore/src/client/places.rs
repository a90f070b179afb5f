//! Where objects were found: what makes one READ of two.

use alloc::vec::Vec;

/// Where an object was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub hash: u64,
    /// In the region; 0: nothing.
    pub offset: u64,
    /// What its state word says as long as it is there.
    pub generation: u64,
    /// Of the whole entry.
    pub bytes: u32,
}

const NOWHERE: Place = Place {
    hash: 0,
    offset: 0,
    generation: 0,
    bytes: 0,
};

/// Two places in one line of the cache.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
struct Set([Place; 2]);

/// Places by hash, in sets of two, the older one of which makes room: as many single places lose several times as many objects to
/// others.
pub(super) struct Places {
    sets: Vec<Set>,
}

impl Places {
    /// Room for `count` places or some more.
    pub fn new(count: usize) -> Self {
        let sets = count.div_ceil(2).next_power_of_two();
        Self {
            sets: alloc::vec![Set([NOWHERE; 2]); sets],
        }
    }

    #[inline]
    fn set(&mut self, hash: u64) -> &mut [Place; 2] {
        let mask = self.sets.len() - 1;
        // The tag and the bucket come from the ends of the hash.
        &mut self.sets[(hash >> 20) as usize & mask].0
    }

    /// Where the object of `hash` was found last.
    #[inline]
    pub fn get(&mut self, hash: u64) -> Option<Place> {
        let set = self.set(hash);
        set.iter()
            .find(|p| p.hash == hash && p.offset != 0)
            .copied()
    }

    /// Remembers where an object is.
    #[inline]
    pub fn put(&mut self, place: Place) {
        let set = self.set(place.hash);
        match set.iter_mut().find(|p| p.hash == place.hash) {
            Some(old) => *old = place,
            None => *set = [place, set[0]],
        }
    }

    /// An object is not where it was.
    #[inline]
    pub fn forget(&mut self, hash: u64) {
        if let Some(old) = self.set(hash).iter_mut().find(|p| p.hash == hash) {
            *old = NOWHERE;
        }
    }

    /// All are worth nothing any more.
    pub fn clear(&mut self) {
        self.sets.fill(Set([NOWHERE; 2]));
    }
}

const _: () = assert!(size_of::<Set>() == 64);

#[cfg(test)]
mod tests {
    use super::*;

    fn place(hash: u64, offset: u64) -> Place {
        Place {
            hash,
            offset,
            generation: 3,
            bytes: 100,
        }
    }

    /// Hashes that share a set, whatever their number.
    const fn rival(n: u64) -> u64 {
        n | 5 << 20
    }

    #[test]
    fn a_third_place_of_a_set_drives_the_oldest_out() {
        let mut places = Places::new(64);
        for n in 1..=3 {
            places.put(place(rival(n), 8 * n));
        }
        assert_eq!(places.get(rival(1)), None);
        assert_eq!(places.get(rival(2)), Some(place(rival(2), 16)));
        assert_eq!(places.get(rival(3)), Some(place(rival(3), 24)));
    }

    #[test]
    fn an_object_has_one_place_and_it_is_the_last_that_was_told() {
        let mut places = Places::new(64);
        places.put(place(rival(1), 8));
        places.put(place(rival(2), 16));
        places.put(place(rival(1), 800));
        assert_eq!(places.get(rival(1)), Some(place(rival(1), 800)));
        assert_eq!(places.get(rival(2)), Some(place(rival(2), 16)));
        places.forget(rival(1));
        assert_eq!(places.get(rival(1)), None);
        assert!(places.get(rival(2)).is_some());
        places.clear();
        assert_eq!(places.get(rival(2)), None);
    }

    #[test]
    fn nothing_is_found_for_a_hash_of_nothing() {
        let mut places = Places::new(1);
        assert_eq!(places.get(0), None);
        places.put(place(0, 8));
        assert_eq!(places.get(0), Some(place(0, 8)));
    }
}
