//! Reading and writing fields in order, without ever going past an end.

use super::ProtoError;

#[derive(Debug, Clone, Copy)]
pub(super) struct Reader<'a> {
    pub(super) bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    #[inline]
    pub(super) fn take(&mut self, count: usize) -> Result<&'a [u8], ProtoError> {
        let (taken, rest) =
            self.bytes
                .split_at_checked(count)
                .ok_or_else(|| ProtoError::Truncated {
                    needed: count - self.bytes.len(),
                })?;
        self.bytes = rest;
        Ok(taken)
    }

    #[inline]
    fn array<const N: usize>(&mut self) -> Result<[u8; N], ProtoError> {
        let (taken, rest) =
            self.bytes
                .split_first_chunk()
                .ok_or_else(|| ProtoError::Truncated {
                    needed: N - self.bytes.len(),
                })?;
        self.bytes = rest;
        Ok(*taken)
    }

    #[inline]
    pub(super) fn u8(&mut self) -> Result<u8, ProtoError> {
        self.array().map(u8::from_le_bytes)
    }

    #[inline]
    pub(super) fn u16(&mut self) -> Result<u16, ProtoError> {
        self.array().map(u16::from_le_bytes)
    }

    #[inline]
    pub(super) fn u32(&mut self) -> Result<u32, ProtoError> {
        self.array().map(u32::from_le_bytes)
    }

    #[inline]
    pub(super) fn u64(&mut self) -> Result<u64, ProtoError> {
        self.array().map(u64::from_le_bytes)
    }

    #[inline]
    pub(super) fn rest(&mut self) -> &'a [u8] {
        core::mem::take(&mut self.bytes)
    }

    #[inline]
    pub(super) fn end(&self) -> Result<(), ProtoError> {
        match self.bytes.len() {
            0 => Ok(()),
            bytes => Err(ProtoError::Trailing { bytes }),
        }
    }
}

pub(super) struct Writer<'a> {
    pub(super) out: &'a mut [u8],
    /// Bytes written.
    pub(super) at: usize,
}

impl Writer<'_> {
    #[inline]
    pub(super) fn put(&mut self, bytes: &[u8]) -> Result<(), ProtoError> {
        let available = self.out.len();
        self.out
            .get_mut(self.at..self.at + bytes.len())
            .ok_or(ProtoError::NoRoom { available })?
            .copy_from_slice(bytes);
        self.at += bytes.len();
        Ok(())
    }
}
