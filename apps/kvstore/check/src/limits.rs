//! Every limit of the checker, each with its reason.

/// Longest key in bytes: the store's own limit.
pub const MAX_KEY_BYTES: usize = 65_535;

/// Longest line of a history file in bytes: a key in its longest spelling (three characters for a byte), and room for the
/// numbers beside it. A reader never holds more than this of a damaged file.
pub const MAX_LINE_BYTES: usize = 3 * MAX_KEY_BYTES + 1024;

/// Bytes that a recorder collects before it writes them: system calls do not show in what is measured.
pub const WRITE_BUFFER_BYTES: usize = 64 << 10;

/// Configurations looked at between two events of one key. Histories whose versions are recorded need a handful; one that
/// needs more has hundreds of operations at once that nothing tells apart. Bounds memory (some 200 bytes each).
pub const MAX_CONFIGURATIONS: usize = 200_000;

/// Configurations looked at in all for one key, beyond [`STEPS_PER_OPERATION`] for each operation: some ten seconds.
pub const MAX_STEPS: u64 = 20_000_000;

/// See [`MAX_STEPS`].
pub const STEPS_PER_OPERATION: u64 = 200;

/// Frontiers up to this many configurations are freed of those that others cover, which takes the square of it.
pub const MAX_COMPARED: usize = 512;

/// Returns between two looks for unanswered operations that have become the same: it costs as much as one return.
pub const MERGE_EVERY: u32 = 64;

/// Configurations looked at in each search that makes the explanation of a violation shorter, beyond [`STEPS_PER_OPERATION`] for each
/// operation: one that needs more is not taken.
pub const MAX_SHORTENING_STEPS: u64 = 5_000;

/// And in all of them together: a second or two.
pub const MAX_SHORTENING_STEPS_IN_ALL: u64 = 200_000;

/// Operations that an explanation shows: what a person reads.
pub const MAX_SHOWN: usize = 40;

/// Possible states that an explanation names.
pub const MAX_STATES_SHOWN: usize = 5;
