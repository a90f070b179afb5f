//! Optional parts of requests, and of the elements of multi-operations.
//!
//! *Rules*: one byte of bits (1 exists, 2 absent, 4 at most, 8 other than), at least one of them set; then the versions of the
//! last two, u64 each, if they are given.

use super::ProtoError;
use super::cursor::{Reader, Writer};
use crate::limits::MAX_RESULTS;
use crate::store::{RejectRules, RequestId};

/// Memory of the client that the server READs or WRITEs: an allegation, which the NIC checks on use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemoteBuffer {
    /// Address, as registered by the client.
    pub addr: u64,
    /// Remote key of the client's memory region.
    pub rkey: u32,
    /// Bytes.
    pub len: u32,
}

impl RemoteBuffer {
    pub(super) fn emit(&self, out: &mut Writer<'_>) -> Result<(), ProtoError> {
        out.put(&self.addr.to_le_bytes())?;
        out.put(&self.rkey.to_le_bytes())?;
        out.put(&self.len.to_le_bytes())
    }

    pub(super) fn parse(input: &mut Reader<'_>) -> Result<Self, ProtoError> {
        Ok(Self {
            addr: input.u64()?,
            rkey: input.u32()?,
            len: input.u32()?,
        })
    }
}

/// What makes a request execute once: its number, and which results the client has not seen. The client is the one that the
/// connection was made for. A multi-operation's elements have consecutive numbers.
///
/// In a message: number (u64), how many numbers the first incomplete request is behind it (u8).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Once {
    /// Number of the request, from 1; a retry has the same.
    pub sequence: u64,
    /// The first request whose result the client has not seen, at most `sequence` and less than [`MAX_RESULTS`] behind it.
    pub first_incomplete: u64,
}

impl Once {
    /// The request of `client`.
    #[must_use]
    pub const fn id(&self, client: u64) -> RequestId {
        RequestId {
            client,
            sequence: self.sequence,
        }
    }

    pub(super) fn emit(&self, out: &mut Writer<'_>) -> Result<(), ProtoError> {
        let behind = self.sequence.checked_sub(self.first_incomplete);
        let behind = behind
            .filter(|behind| *behind < MAX_RESULTS as u64 && self.first_incomplete > 0)
            .ok_or(ProtoError::Field("first_incomplete"))?;
        out.put(&self.sequence.to_le_bytes())?;
        out.put(&[behind as u8])
    }

    pub(super) fn parse(input: &mut Reader<'_>) -> Result<Self, ProtoError> {
        let sequence = input.u64()?;
        let behind = input.u8()?;
        if usize::from(behind) >= MAX_RESULTS || u64::from(behind) >= sequence {
            return Err(ProtoError::Field("first_incomplete"));
        }
        Ok(Self {
            sequence,
            first_incomplete: sequence - u64::from(behind),
        })
    }
}

const _: () = assert!(MAX_RESULTS <= 256);

const EXISTS: u8 = 1;
const ABSENT: u8 = 2;
const AT_MOST: u8 = 4;
const OTHER_THAN: u8 = 8;

pub(super) fn emit_rules(rules: &RejectRules, out: &mut Writer<'_>) -> Result<(), ProtoError> {
    let bit = |set: bool, bit: u8| if set { bit } else { 0 };
    let bits = bit(rules.exists, EXISTS)
        | bit(rules.absent, ABSENT)
        | bit(rules.at_most.is_some(), AT_MOST)
        | bit(rules.other_than.is_some(), OTHER_THAN);
    out.put(&[bits])?;
    for version in [rules.at_most, rules.other_than].into_iter().flatten() {
        out.put(&version.to_le_bytes())?;
    }
    Ok(())
}

pub(super) fn parse_rules(input: &mut Reader<'_>) -> Result<RejectRules, ProtoError> {
    let bits = input.u8()?;
    if bits == 0 || bits & !(EXISTS | ABSENT | AT_MOST | OTHER_THAN) != 0 {
        return Err(ProtoError::Field("rules"));
    }
    let mut version = |bit: u8| {
        if bits & bit != 0 {
            input.u64().map(Some)
        } else {
            Ok(None)
        }
    };
    Ok(RejectRules {
        exists: bits & EXISTS != 0,
        absent: bits & ABSENT != 0,
        at_most: version(AT_MOST)?,
        other_than: version(OTHER_THAN)?,
    })
}
