//! What a workload asks of a store, whichever store that is.

use anyhow::Result;

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// The value of a key.
    Read(&'a [u8]),
    /// A value for a key, whether it is there or not.
    Write(&'a [u8], &'a [u8]),
    /// No value for a key any more.
    Remove(&'a [u8]),
    /// Up to `length` values from a place on, in the store's own order.
    Scan {
        /// Where, among all 64-bit positions.
        position: u64,
        /// How many.
        length: u8,
    },
}

/// What became of it.
#[derive(Debug)]
pub enum Outcome<'a> {
    /// The value of a key.
    Value(&'a [u8]),
    /// It is done.
    Done,
    /// There is no such key.
    Missing,
    /// The store has no room for it now and wants to be asked again.
    Busy,
    /// The store refused it.
    Refused(String),
}

/// A store under measurement: requests go in, outcomes come out, as many under way as the caller wants.
pub trait Target {
    /// Begins a request; `ticket` (below the number given to [`Self::prepare`], and not under way) comes back with its outcome.
    /// False: it was not begun, because no more can be under way now: wait first.
    ///
    /// # Errors
    /// When the connection has ended.
    fn submit(&mut self, ticket: u32, request: Request<'_>) -> Result<bool>;

    /// Waits until at least one request has come to its end, and hands out all that have.
    ///
    /// # Errors
    /// When the connection has ended, or the store is silent.
    fn wait(&mut self, each: &mut impl FnMut(u32, Outcome<'_>)) -> Result<()>;

    /// Makes room for so many requests under way.
    fn prepare(&mut self, tickets: u32);
}
