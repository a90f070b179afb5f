//! The software RNIC: an engine that polls its users' work queues, executes what it finds and writes
//! completions. It has no thread, no descriptor and no clock of its own: [`EngineCell`] lets either a
//! thread ([`thread`]) or a trusted client drive it inline.
//!
//! | module | holds |
//! | --- | --- |
//! | [`mem`] | the room for `unsafe`: users' memory, ring words, copies |
//! | [`table`] | objects with generation-checked handles |
//! | [`state`] | the QP state machine and its attribute masks |
//! | `objects` | users, PDs, MRs, CQs, QPs |
//! | `recv` | receive rings, own and shared, and what a QP has taken of them |
//! | `verbs` | control verbs on them |
//! | `engine` | the poll loop: hot set, doorbells, timers |
//! | `exec` | executing one work request between two QPs of this host |
//! | `wire` | QPs whose peer is on another host: between the rings, the transport's state machines and a carrier |
//! | [`cell`] | who drives the engine, and how control gets in |
//! | [`checks`] | properties that hold whatever users and peers do, for fuzzing |
//! | [`thread`] | the engine's own thread: spin, then sleep |
//!
//! The data path is `engine` → `exec` → `mem`. Nothing there allocates, locks or logs.

pub mod cell;
pub mod checks;
mod engine;
mod exec;
pub mod limits;
pub mod mem;
mod objects;
mod recv;
pub mod state;
pub mod table;
pub mod thread;
mod verbs;
mod wire;

pub use cell::{Driver, EngineCell};
pub use engine::{Counters, Engine, EngineConfig};
pub use mem::UserMemory;
pub use objects::UserId;
pub use wire::MadArrival;

/// Wakes a user that sleeps: an interrupt into a guest, an eventfd of a process. Called from the driver's
/// thread; must not block.
pub trait Wake: Send + Sync {
    /// Wake it.
    fn wake(&self);
}
