//! What the two sides say to each other: 32 bytes each way, so that they travel in the completion.

/// Samples that one slice may give.
pub const MAX_SAMPLES: usize = 16_384;

/// The verbs that can be measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verb {
    /// SEND, answered by a SEND of the same size: the round trip.
    Send,
    /// RDMA WRITE, until its completion.
    Write,
    /// RDMA READ, until its completion.
    Read,
    /// Fetch and add.
    FetchAdd,
    /// Compare and swap.
    CmpSwp,
}

impl Verb {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Send,
        Self::Write,
        Self::Read,
        Self::FetchAdd,
        Self::CmpSwp,
    ];

    /// As users type it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Send => "send",
            Self::Write => "write",
            Self::Read => "read",
            Self::FetchAdd => "fetch-add",
            Self::CmpSwp => "cmp-swp",
        }
    }

    /// Whether it moves 8 bytes and no other number.
    #[must_use]
    pub const fn is_atomic(self) -> bool {
        matches!(self, Self::FetchAdd | Self::CmpSwp)
    }

    fn from_u8(v: u8) -> Option<Self> {
        Self::ALL.get(usize::from(v)).copied()
    }
}

/// What the agent is to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Answer `rounds` rounds on the window's probe line.
    Floor {
        /// How many.
        rounds: u32,
    },
    /// The same with a line of either side's.
    Exchange {
        /// How many.
        rounds: u32,
    },
    /// One work request at a time.
    Latency,
    /// [`super::DEPTH`] work requests at a time.
    Bandwidth,
    /// `rounds` times `create_qp` to RTS, each a sample.
    Connect {
        /// How many.
        rounds: u32,
    },
    /// `rounds` times `reg_mr` of [`super::REGISTERED`] bytes, each a sample.
    Register {
        /// How many.
        rounds: u32,
    },
}

/// A command.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Command {
    /// What to do.
    pub kind: Kind,
    /// With which verb.
    pub verb: Verb,
    /// Bytes.
    pub size: u32,
    /// How long, ns.
    pub slice_ns: u64,
    /// Shortest time of one sample, ns: as many work requests are timed together as it takes.
    pub batch_ns: u64,
}

/// Bytes of a command and of a report.
pub(super) const LEN: usize = 32;

impl Command {
    pub(super) fn encode(&self) -> [u8; LEN] {
        let (kind, rounds) = match self.kind {
            Kind::Floor { rounds } => (1u8, rounds),
            Kind::Latency => (2, 0),
            Kind::Bandwidth => (3, 0),
            Kind::Connect { rounds } => (4, rounds),
            Kind::Register { rounds } => (5, rounds),
            Kind::Exchange { rounds } => (6, rounds),
        };
        let mut b = [0; LEN];
        b[0] = kind;
        b[1] = self.verb as u8;
        b[4..8].copy_from_slice(&rounds.to_le_bytes());
        b[8..12].copy_from_slice(&self.size.to_le_bytes());
        b[16..24].copy_from_slice(&self.slice_ns.to_le_bytes());
        b[24..32].copy_from_slice(&self.batch_ns.to_le_bytes());
        b
    }

    pub(super) fn decode(b: &[u8]) -> Option<Self> {
        let b: &[u8; LEN] = b.try_into().ok()?;
        let rounds = u32_at(b, 4);
        Some(Self {
            kind: match b[0] {
                1 => Kind::Floor { rounds },
                2 => Kind::Latency,
                3 => Kind::Bandwidth,
                4 => Kind::Connect { rounds },
                5 => Kind::Register { rounds },
                6 => Kind::Exchange { rounds },
                _ => return None,
            },
            verb: Verb::from_u8(b[1])?,
            size: u32_at(b, 8),
            slice_ns: u64_at(b, 16),
            batch_ns: u64_at(b, 24),
        })
    }
}

/// What the agent says when it has done so (for a floor: when it is about to answer).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Report {
    /// Samples in its memory.
    pub samples: u32,
    /// Work requests per sample.
    pub per_sample: u32,
    /// Work requests in all samples.
    pub ops: u64,
    /// Ticks they took.
    pub ticks: u64,
}

impl Report {
    pub(super) fn encode(&self) -> [u8; LEN] {
        let mut b = [0; LEN];
        b[..4].copy_from_slice(&self.samples.to_le_bytes());
        b[4..8].copy_from_slice(&self.per_sample.to_le_bytes());
        b[8..16].copy_from_slice(&self.ops.to_le_bytes());
        b[16..24].copy_from_slice(&self.ticks.to_le_bytes());
        b
    }

    pub(super) fn decode(b: &[u8]) -> Option<Self> {
        let b: &[u8; LEN] = b.try_into().ok()?;
        Some(Self {
            samples: u32_at(b, 0),
            per_sample: u32_at(b, 4),
            ops: u64_at(b, 8),
            ticks: u64_at(b, 16),
        })
    }
}

/// Where the peer's memory is, and how its clock ticks; private data of the connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Greeting {
    /// Address of the message buffer; the samples lie [`super::SAMPLES_AT`] behind it.
    pub buffer: u64,
    /// The same as an offset into that side's RAM.
    pub offset: u64,
    /// Key of both.
    pub rkey: u32,
    /// Ticks per second of the agent's clock.
    pub hz: u64,
}

impl Greeting {
    pub(super) fn encode(&self) -> [u8; LEN] {
        let mut b = [0; LEN];
        b[..8].copy_from_slice(&self.buffer.to_le_bytes());
        b[8..16].copy_from_slice(&self.offset.to_le_bytes());
        b[16..20].copy_from_slice(&self.rkey.to_le_bytes());
        b[24..32].copy_from_slice(&self.hz.to_le_bytes());
        b
    }

    pub(super) fn decode(b: &[u8]) -> Option<Self> {
        let b: &[u8; LEN] = b.get(..LEN)?.try_into().ok()?;
        Some(Self {
            buffer: u64_at(b, 0),
            offset: u64_at(b, 8),
            rkey: u32_at(b, 16),
            hz: u64_at(b, 24),
        })
    }
}

fn u32_at(b: &[u8; LEN], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

fn u64_at(b: &[u8; LEN], at: usize) -> u64 {
    u64::from(u32_at(b, at)) | u64::from(u32_at(b, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_understood() {
        for verb in Verb::ALL {
            for kind in [
                Kind::Floor { rounds: 77 },
                Kind::Latency,
                Kind::Bandwidth,
                Kind::Connect { rounds: 3 },
                Kind::Register { rounds: 4 },
                Kind::Exchange { rounds: 5 },
            ] {
                let c = Command {
                    kind,
                    verb,
                    size: 0x0102_0304,
                    slice_ns: 0x0506_0708_090a_0b0c,
                    batch_ns: u64::MAX - 5,
                };
                assert_eq!(Command::decode(&c.encode()), Some(c));
            }
        }
        let r = Report {
            samples: 1,
            per_sample: 2,
            ops: u64::MAX,
            ticks: 1 << 40,
        };
        assert_eq!(Report::decode(&r.encode()), Some(r));
        let g = Greeting {
            buffer: 1 << 50,
            offset: 7,
            rkey: 0xffff_fffe,
            hz: 2_445_000_000,
        };
        assert_eq!(Greeting::decode(&g.encode()), Some(g));
        assert_eq!(Command::decode(&[9; LEN]), None);
        assert_eq!(Command::decode(&[0; 8]), None);
        assert_eq!(Greeting::decode(&[0; 8]), None);
    }
}
