//! Enumerations beside everything else: what exists throughout, the keys that fill the store, is on exactly one page.

use anyhow::{Context as _, Result, bail};
use kvstore::client::Client;

use super::workload::Keys;

/// An enumeration of the default table, page by page.
#[derive(Debug, Default)]
pub(super) struct Scan {
    cursor: u64,
    /// By key: how often it was on a page.
    seen: Vec<u8>,
    /// Enumerations that came to their end.
    pub whole: u64,
}

impl Scan {
    /// Takes the next page.
    pub fn step(&mut self, client: &mut Client, fill: u64) -> Result<()> {
        let page = client
            .keys(0, self.cursor)
            .context("the supervisor cannot enumerate")?;
        let next = page.next;
        self.page(&page.keys, next, fill)
    }

    fn page(&mut self, keys: &[Vec<u8>], next: Option<u64>, fill: u64) -> Result<()> {
        self.seen.resize(fill as usize, 0);
        for key in keys {
            if let Some(n) = Keys::fill_number(key) {
                let Some(seen) = self.seen.get_mut(n as usize) else {
                    bail!("an enumeration found a key that nobody wrote: fill/{n}");
                };
                *seen = seen.saturating_add(1);
            }
        }
        if let Some(next) = next {
            self.cursor = next;
            return Ok(());
        }
        if let Some(n) = self.seen.iter().position(|seen| *seen != 1) {
            bail!(
                "an enumeration found the key fill/{n} {} times; it exists all the time, so once is right",
                self.seen[n]
            );
        }
        self.whole += 1;
        self.cursor = 0;
        self.seen.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(keys: &[u64]) -> Vec<Vec<u8>> {
        let fill = keys.iter().map(|n| Keys::fill(*n).key);
        fill.chain([b"hot/1".to_vec()]).collect()
    }

    #[test]
    fn each_key_once() {
        let mut scan = Scan::default();
        for _ in 0..2 {
            scan.page(&page(&[2, 0]), Some(7), 3).unwrap();
            assert_eq!(scan.cursor, 7);
            scan.page(&page(&[1]), None, 3).unwrap();
            assert_eq!(scan.cursor, 0);
        }
        assert_eq!(scan.whole, 2);
    }

    #[test]
    fn missing_twice_and_unheard_of() {
        let wrong = |first: &[u64], second: &[u64]| {
            let mut scan = Scan::default();
            scan.page(&page(first), Some(1), 3)
                .and_then(|()| scan.page(&page(second), None, 3))
                .unwrap_err()
                .to_string()
        };
        assert!(wrong(&[0], &[2]).contains("fill/1 0 times"));
        assert!(wrong(&[0, 1], &[1, 2]).contains("fill/1 2 times"));
        assert!(wrong(&[0, 1, 2], &[3]).contains("nobody wrote: fill/3"));
    }
}
