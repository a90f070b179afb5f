//! Little-endian loads and stores at byte offsets of the region.

#[inline(always)]
pub(crate) fn load_u64(mem: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(mem[offset..offset + 8].try_into().unwrap_or([0; 8]))
}

#[inline(always)]
pub(crate) fn store_u64(mem: &mut [u8], offset: usize, value: u64) {
    mem[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
}

#[inline(always)]
pub(crate) fn load_u32(mem: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(mem[offset..offset + 4].try_into().unwrap_or([0; 4]))
}

#[inline(always)]
pub(crate) fn store_u32(mem: &mut [u8], offset: usize, value: u32) {
    mem[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
}

#[inline(always)]
pub(crate) fn load_u16(mem: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(mem[offset..offset + 2].try_into().unwrap_or([0; 2]))
}

/// Keeps stores in the order of the program for whoever reads the region meanwhile. On x86-64 this binds the compiler only.
#[inline(always)]
pub(crate) fn order() {
    core::sync::atomic::fence(core::sync::atomic::Ordering::Release);
}
