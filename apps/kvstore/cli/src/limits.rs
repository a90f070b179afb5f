//! Every limit of the `kv` command, each with its reason.

/// Longest key in bytes: its length is a 16-bit field of the protocol and of a log entry.
pub const MAX_KEY_BYTES: usize = 65_535;

/// Largest value in bytes: the store's promise, and what keeps a log segment at a few MiB.
pub const MAX_VALUE_BYTES: usize = 1 << 20;

/// Longest line of JSON lines in bytes: a legal record in its longest spelling (`\u0000` takes six
/// bytes for one), and 4 KiB for names, punctuation and blanks. Anything longer cannot be stored,
/// so the reader never holds more than this, however long the line is.
pub const MAX_JSON_LINE_BYTES: usize = 6 * (MAX_KEY_BYTES + MAX_VALUE_BYTES) + 4096;

/// Bytes read from, or collected before being written to, a file at once: large enough that system
/// calls do not show.
pub const FILE_BUFFER_BYTES: usize = 256 << 10;

/// Longest name of an unknown JSON field that an error message repeats, in characters.
pub const MAX_QUOTED_CHARS: usize = 40;
