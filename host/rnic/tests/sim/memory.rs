//! A piece of a user's RAM, beside what it must hold. Bytes that the device may write right now are *lent*; all others must not
//! change, and lent ones become what was sent or stay what they were.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::common::{Ram, Rng};

/// Unregistered bytes on either side.
pub const GUARD: u64 = 64;

pub struct Memory {
    ram: Arc<Ram>,
    /// Offset in RAM of the first byte, guard included.
    base: u64,
    want: Vec<u8>,
    /// By offset in RAM: length.
    lent: BTreeMap<u64, u64>,
    name: String,
}

impl Memory {
    /// The memory around the `len` bytes at `offset` of RAM, filled.
    pub fn new(ram: &Arc<Ram>, offset: u64, len: u64, rng: &mut Rng, name: String) -> Self {
        let want = rng.bytes((len + 2 * GUARD) as usize);
        ram.write(offset - GUARD, &want);
        Self {
            ram: Arc::clone(ram),
            base: offset - GUARD,
            want,
            lent: BTreeMap::new(),
            name,
        }
    }

    fn range(&self, at: u64, len: u64) -> std::ops::Range<usize> {
        let from = (at - self.base) as usize;
        from..from + len as usize
    }

    /// What must be there.
    pub fn get(&self, at: u64, len: u64) -> &[u8] {
        &self.want[self.range(at, len)]
    }

    /// The user writes.
    pub fn put(&mut self, at: u64, bytes: &[u8]) {
        self.ram.write(at, bytes);
        let range = self.range(at, bytes.len() as u64);
        self.want[range].copy_from_slice(bytes);
    }

    /// The device may write there from now on.
    pub fn lend(&mut self, at: u64, len: u64) {
        if len > 0 {
            let before = self.lent.insert(at, len);
            assert!(before.is_none(), "{}: lent twice", self.name);
        }
    }

    /// The device must have written this.
    pub fn written(&mut self, at: u64, bytes: &[u8], what: &str) {
        let now = self.ram.read(at, bytes.len() as u64);
        if let Some(i) = (0..bytes.len()).find(|&i| now[i] != bytes[i]) {
            let (n, name) = (bytes.len(), &self.name);
            let old = self.get(at, n as u64)[i];
            panic!(
                "{name}: {what}: byte {i} of {n} is {:#x}, sent was {:#x}, before it was {old:#x}",
                now[i], bytes[i]
            );
        }
        let range = self.range(at, bytes.len() as u64);
        self.want[range].copy_from_slice(bytes);
    }

    /// The device may write there no more.
    pub fn take_back(&mut self, at: u64) {
        self.lent.remove(&at);
    }

    /// The device may write there no more, and has written all, some or none of any of these.
    pub fn perhaps(&mut self, at: u64, len: u64, any: &[&[u8]], what: &str) {
        let now = self.ram.read(at, len);
        let range = self.range(at, len);
        let old = &self.want[range.clone()];
        let wrong = (0..now.len())
            .find(|&i| now[i] != old[i] && !any.iter().any(|new| new.get(i) == Some(&now[i])));
        if let Some(i) = wrong {
            let name = &self.name;
            panic!("{name}: {what}: byte {i} of {len} is neither what it was nor what was sent");
        }
        self.want[range].copy_from_slice(&now);
        self.lent.remove(&at);
    }

    /// Nothing may be written any more, whatever was lent.
    pub fn freeze(&mut self) {
        for (at, len) in std::mem::take(&mut self.lent) {
            let now = self.ram.read(at, len);
            let range = self.range(at, len);
            self.want[range].copy_from_slice(&now);
        }
    }

    /// All that is not lent is as it must be.
    pub fn check(&self) {
        let mut now = self.ram.read(self.base, self.want.len() as u64);
        for (&at, &len) in &self.lent {
            let range = self.range(at, len);
            now[range.clone()].copy_from_slice(&self.want[range]);
        }
        if let Some(i) = (0..now.len()).find(|&i| now[i] != self.want[i]) {
            let (name, at) = (&self.name, self.base + i as u64);
            panic!(
                "{name}: byte {at:#x} of RAM ({} of {}) changed from {:#x} to {:#x}, and nobody may write there",
                i,
                self.want.len(),
                self.want[i],
                now[i]
            );
        }
    }
}
