//! Limits, each with its reason.

/// Oldest QEMU: AVX2 under TCG came with 7.2, and `query-stats` (counting VM exits) with 7.1.
pub const MIN_QEMU: (u32, u32) = (7, 2);

/// End-to-end tests at once. Each one runs guest, engine and client; more than one of them on a small
/// machine makes the time limits mean nothing.
pub const E2E_AT_ONCE: &str = "1";

/// How long the simulation of the transport tries fresh seeds in a whole run, s: a few thousand conversations. The fixed ones run always.
pub const SIMULATION_S: &str = "180";

/// How long each of the store's random schedules (some fifteen tests) tries fresh seeds in a whole run, s. Each runs with one fresh seed always.
pub const STORE_S: &str = "3";
