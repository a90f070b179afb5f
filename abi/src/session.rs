//! What a native process and `hyv-host` say to each other on the unix socket (SOCK_SEQPACKET): one request,
//! one answer with file descriptors, and then nothing; closing the socket ends the session.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `b"HYVS"`, little-endian.
pub const HELLO_MAGIC: u32 = u32::from_le_bytes(*b"HYVS");
/// File name of the socket in the instance's runtime folder.
pub const SOCKET_NAME: &str = "verbs.sock";
/// File descriptors in the answer: window, RAM, control kick, data kick, wake, in this order.
pub const NUM_FDS: usize = 5;

/// Process to host.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Hello {
    /// [`HELLO_MAGIC`].
    pub magic: u32,
    /// [`crate::ABI_VERSION`].
    pub version: u32,
    /// RAM wanted, bytes; the host rounds it up to 2 MiB and seals it.
    pub ram_len: u64,
    /// What the process calls itself, UTF-8, padded with zeros; for the host's log.
    pub name: [u8; 32],
}

/// Host to process.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Welcome {
    /// [`HELLO_MAGIC`].
    pub magic: u32,
    /// The host's [`crate::ABI_VERSION`], told even when it refuses.
    pub version: u32,
    /// 0, or a [`crate::types::Errno`]; without 0 there are no file descriptors.
    pub status: u32,
    /// A [`crate::types::Reason`].
    pub reason: u32,
    /// RAM given, bytes.
    pub ram_len: u64,
}
