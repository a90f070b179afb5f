//! What was done to each table.

use alloc::vec::Vec;

use crate::proto::TableOperations;
use crate::store::DEFAULT_TABLE;

/// Counts by table. Only tables that exist get any, so there are never more than those.
#[derive(Debug)]
pub(super) struct Counts {
    /// By id.
    list: Vec<(u32, TableOperations)>,
    /// Whose turn it was last: mostly it is that one's again.
    last: usize,
}

impl Counts {
    pub fn new() -> Self {
        Self {
            list: alloc::vec![(DEFAULT_TABLE, TableOperations::default())],
            last: 0,
        }
    }

    /// Those of a table that exists.
    #[inline]
    pub fn of(&mut self, table: u32) -> &mut TableOperations {
        if self.list[self.last].0 != table {
            self.last = self.place(table);
        }
        &mut self.list[self.last].1
    }

    #[cold]
    fn place(&mut self, table: u32) -> usize {
        match self.list.binary_search_by_key(&table, |of| of.0) {
            Ok(place) => place,
            Err(place) => {
                self.list.insert(place, (table, TableOperations::default()));
                place
            }
        }
    }

    pub fn get(&self, table: u32) -> TableOperations {
        let place = self.list.binary_search_by_key(&table, |of| of.0);
        place.map_or_else(|_| TableOperations::default(), |place| self.list[place].1)
    }

    /// A table was dropped.
    pub fn forget(&mut self, table: u32) {
        if table != DEFAULT_TABLE {
            self.list.retain(|of| of.0 != table);
            self.last = 0;
        }
    }
}
