//! What a client can ask for.

use crate::proto::{Element, MultiOp};
use crate::store::{CleanerMode, DEFAULT_TABLE, Increment, NEVER, RejectRules};

/// An operation to submit. Its completion's [`crate::proto::Reply`] is named with each.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Operation<'a> {
    /// Reads an object, of any size: `Value`, or the status `NotFound`.
    Read {
        /// Table.
        table: u32,
        /// Key.
        key: &'a [u8],
        /// When to refuse.
        rules: RejectRules,
    },
    /// Writes an object: `Version`.
    Write {
        /// Table.
        table: u32,
        /// Key.
        key: &'a [u8],
        /// Value.
        value: &'a [u8],
        /// When to refuse.
        rules: RejectRules,
        /// From when on the object does not exist any more, by the server's clock ([`super::Client::server_time`]); [`NEVER`]: it stays.
        expires: u64,
    },
    /// Removes an object: `Version` of what was removed, or the status `NotFound`.
    Remove {
        /// Table.
        table: u32,
        /// Key.
        key: &'a [u8],
        /// When to refuse.
        rules: RejectRules,
    },
    /// Adds to a number: `Incremented`.
    Increment {
        /// Table.
        table: u32,
        /// Key.
        key: &'a [u8],
        /// What to add.
        by: Increment,
        /// When to refuse.
        rules: RejectRules,
    },
    /// A page of a table's objects: `Page`. What exists throughout is on exactly one page.
    Enumerate {
        /// Table.
        table: u32,
        /// 0 at first, then what the last page said.
        cursor: u64,
        /// Most objects wanted; 0: as many as fit. A page may have fewer, even none, and not be the last.
        limit: u16,
        /// Versions and values too; values over [`crate::limits::EAGER_VALUE_BYTES`] are left out.
        values: bool,
    },
    /// Many operations of one kind in one request: `Results`, for [`crate::proto::Results::parse`].
    Multi {
        /// Which.
        op: MultiOp,
        /// The elements. If they are to execute once, at most [`super::MAX_ONCE_ELEMENTS`].
        elements: &'a [Element<'a>],
    },
    /// Creates a table, if there is none of that name: `Table`.
    CreateTable {
        /// Name.
        name: &'a str,
    },
    /// Drops a table with everything in it: `Empty`.
    DropTable {
        /// Id.
        table: u32,
    },
    /// The id of a table: `Table`, or the status `NotFound`.
    FindTable {
        /// Name.
        name: &'a str,
    },
    /// A page of tables: `Tables`.
    Tables {
        /// Those with higher ids than this; none: from the first one on.
        after: Option<u32>,
    },
    /// Counters and service times: `Stats`.
    Stats,
    /// Nothing but a reply: `Empty`.
    Ping,
    /// Bounces the probe line: `Probe`, then see [`hyv_verbs::probe`].
    Probe {
        /// How often.
        rounds: u32,
    },
    /// When the server's cleaner works, until this connection ends or any client asks for something else: `Empty`. For measurements; a
    /// connection that is made anew has to ask again.
    Cleaner {
        /// When.
        mode: CleanerMode,
    },
}

impl<'a> Operation<'a> {
    /// A read without conditions.
    #[must_use]
    pub const fn read(table: u32, key: &'a [u8]) -> Self {
        Self::Read {
            table,
            key,
            rules: RejectRules::NONE,
        }
    }

    /// A write without conditions, of an object that stays.
    #[must_use]
    pub const fn write(table: u32, key: &'a [u8], value: &'a [u8]) -> Self {
        Self::Write {
            table,
            key,
            value,
            rules: RejectRules::NONE,
            expires: NEVER,
        }
    }

    /// A remove without conditions.
    #[must_use]
    pub const fn remove(table: u32, key: &'a [u8]) -> Self {
        Self::Remove {
            table,
            key,
            rules: RejectRules::NONE,
        }
    }

    /// An increment without conditions.
    #[must_use]
    pub const fn increment(table: u32, key: &'a [u8], by: Increment) -> Self {
        Self::Increment {
            table,
            key,
            by,
            rules: RejectRules::NONE,
        }
    }

    /// A read of the default table.
    #[must_use]
    pub const fn get(key: &'a [u8]) -> Self {
        Self::read(DEFAULT_TABLE, key)
    }

    /// A write to the default table.
    #[must_use]
    pub const fn put(key: &'a [u8], value: &'a [u8]) -> Self {
        Self::write(DEFAULT_TABLE, key, value)
    }
}
