//! Limits, each with its reason.

use std::time::Duration;

/// Boot of a Linux peer, to the point where its RoCE device is up: 12 s on an idle core under TCG, and other guests may
/// share the cores: 85 s was seen with ten processes on two.
pub const PEER_BOOT: Duration = Duration::from_secs(240);

/// Life of a Linux peer: a QEMU whose test hangs ends all the same. Longer than the time that the test runner gives a
/// test (`.config/nextest.toml`).
pub const PEER_LIFE: Duration = Duration::from_secs(900);

/// Memory of a Linux peer, MiB: the initial file system, unpacked twice while it boots, and what `ib_write_bw` registers.
pub const PEER_MEMORY_MIB: u32 = 512;

/// Bytes of a command for a Linux peer: the terminal on its serial port keeps 4 KiB that nobody has read, and base64 takes
/// four for three.
pub const PEER_COMMAND: usize = 2 << 10;

/// Time for a peer's shell to take a command. It shares its core with what runs there.
pub const PEER_ANSWER: Duration = Duration::from_secs(20);

/// Nodes of one test network: their numbers are the last byte of an IPv4 address.
pub const NODES: u8 = 200;
