//! A mapped AF_PACKET receive ring: `TPACKET_V2` with a virtio-net header in front of each frame (`packet(7)`, and
//! `Documentation/networking/packet_mmap.rst`).
#![allow(unsafe_code, reason = "maps the ring that the kernel writes")]

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use super::socket::Socket;
use crate::limits;

/// Bytes of `struct virtio_net_hdr`.
pub const VNET_BYTES: usize = 10;
/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`.
pub const VNET_NEEDS_CSUM: u8 = 1;
/// `VIRTIO_NET_HDR_GSO_NONE`.
pub const VNET_GSO_NONE: u8 = 0;
/// `VIRTIO_NET_HDR_GSO_UDP_L4`.
pub const VNET_GSO_UDP_L4: u8 = 5;
/// `VIRTIO_NET_HDR_GSO_ECN`, a flag beside the type.
pub const VNET_GSO_ECN: u8 = 0x80;

const TP_STATUS_KERNEL: u32 = 0;
const TP_STATUS_USER: u32 = 1;
const TP_STATUS_LOSING: u32 = 4;
const TPACKET_V2: i32 = 1;
/// Bytes of `struct tpacket2_hdr`.
const HEADER: usize = 32;

/// A frame in the ring.
#[derive(Debug)]
pub struct Frame<'a> {
    /// `gso_type` of its virtio-net header.
    pub gso_type: u8,
    /// `gso_size` of its virtio-net header: payload bytes of each segment but the last.
    pub gso_size: usize,
    /// From the IP header on.
    pub network: &'a [u8],
    /// The frame was longer than its slot.
    pub cut: bool,
}

/// A receive ring, which lives as long as its socket.
#[derive(Debug)]
pub struct Ring {
    socket: Socket,
    base: NonNull<u8>,
    slots: usize,
    next: usize,
    losing: bool,
}

// SAFETY: the mapping belongs to this value alone and may be used from any one thread.
unsafe impl Send for Ring {}

impl Ring {
    /// Gives a packet socket a ring of `slots` slots, or of fewer if there is not the memory.
    ///
    /// # Errors
    /// When the kernel has no such ring, or no memory even for [`limits::MIN_SLOTS`].
    pub fn new(socket: Socket, slots: usize) -> io::Result<Ring> {
        socket.set_int(libc::SOL_PACKET, libc::PACKET_VERSION, TPACKET_V2)?;
        socket.set_int(libc::SOL_PACKET, libc::PACKET_VNET_HDR, 1)?;
        let mut slots = slots.max(limits::MIN_SLOTS);
        loop {
            // struct tpacket_req: a block for each slot.
            let mut request = [0; 16];
            let slot = limits::SLOT_BYTES as u32;
            for (word, value) in
                request
                    .chunks_exact_mut(4)
                    .zip([slot, slots as u32, slot, slots as u32])
            {
                word.copy_from_slice(&value.to_ne_bytes());
            }
            match socket.set_bytes(libc::SOL_PACKET, libc::PACKET_RX_RING, &request) {
                Ok(()) => break,
                Err(error)
                    if error.raw_os_error() == Some(libc::ENOMEM)
                        && slots / 2 >= limits::MIN_SLOTS =>
                {
                    slots /= 2;
                }
                Err(error) => return Err(error),
            }
        }
        // SAFETY: a new mapping of the whole ring at a place that the kernel chooses.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                slots * limits::SLOT_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_POPULATE,
                socket.raw(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Ring {
            socket,
            base,
            slots,
            next: 0,
            losing: false,
        })
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> &Socket {
        &self.socket
    }

    /// How many slots it has.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Whether the ring was found full since this was asked last.
    pub fn take_losing(&mut self) -> bool {
        std::mem::take(&mut self.losing)
    }

    /// Takes the count of frames dropped because the ring was full; the kernel starts again at 0.
    ///
    /// # Errors
    /// As `getsockopt(2)`.
    pub fn take_drops(&self) -> io::Result<u32> {
        // struct tpacket_stats: packets (which count the drops too), drops.
        let mut stats = [0; 8];
        self.socket
            .get_bytes(libc::SOL_PACKET, libc::PACKET_STATISTICS, &mut stats)?;
        Ok(u32::from_ne_bytes([stats[4], stats[5], stats[6], stats[7]]))
    }

    /// Hands over the next frame if there is one, then gives its slot back to the kernel.
    #[inline]
    pub fn next(&mut self, take: impl FnOnce(&Frame<'_>)) -> bool {
        // SAFETY: `next` is below `slots`, so the slot lies in the mapping.
        let slot = unsafe { self.base.as_ptr().add(self.next * limits::SLOT_BYTES) };
        // SAFETY: the slot begins with the status word, aligned to the slot, which kernel and user both access as one word.
        let status = unsafe { AtomicU32::from_ptr(slot.cast()) };
        let seen = status.load(Ordering::Acquire);
        if seen & TP_STATUS_USER == 0 {
            return false;
        }
        self.losing |= seen & TP_STATUS_LOSING != 0;
        // SAFETY: until the status says otherwise the kernel does not write the slot, which is SLOT_BYTES of the mapping; what
        // follows the status word is read only.
        let bytes = unsafe { std::slice::from_raw_parts(slot.add(4), limits::SLOT_BYTES - 4) };
        take(&frame(bytes));
        status.store(TP_STATUS_KERNEL, Ordering::Release);
        self.next = if self.next + 1 == self.slots {
            0
        } else {
            self.next + 1
        };
        true
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, to which no reference outlives `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.slots * limits::SLOT_BYTES) };
    }
}

/// Takes apart a slot, given from behind its status word. Offsets that make no sense give an empty, cut frame.
fn frame(slot: &[u8]) -> Frame<'_> {
    let u32_at = |at: usize| {
        u32::from_ne_bytes([slot[at - 4], slot[at - 3], slot[at - 2], slot[at - 1]]) as usize
    };
    let u16_at = |at: usize| u16::from_ne_bytes([slot[at - 4], slot[at - 3]]) as usize;
    // struct tpacket2_hdr: status, len, snaplen (u32); mac, net (u16); …
    let (len, kept, mac, net) = (u32_at(4), u32_at(8), u16_at(12), u16_at(14));
    let nothing = Frame {
        gso_type: 0,
        gso_size: 0,
        network: &[],
        cut: true,
    };
    if mac < HEADER + VNET_BYTES || net < mac {
        return nothing;
    }
    // Offsets count from the status word, which `slot` leaves out.
    let vnet = slot.get(mac - VNET_BYTES - 4..mac - 4);
    let network = slot.get(net - 4..mac + kept - 4);
    match (vnet, network) {
        (Some(vnet), Some(network)) => Frame {
            gso_type: vnet[1],
            gso_size: u16::from_ne_bytes([vnet[4], vnet[5]]).into(),
            network,
            cut: kept < len,
        },
        _ => nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(len: u32, kept: u32, mac: u16, net: u16) -> Vec<u8> {
        let mut slot = vec![0; 4096];
        slot[0..4].copy_from_slice(&len.to_ne_bytes());
        slot[4..8].copy_from_slice(&kept.to_ne_bytes());
        slot[8..10].copy_from_slice(&mac.to_ne_bytes());
        slot[10..12].copy_from_slice(&net.to_ne_bytes());
        slot
    }

    #[test]
    fn frames_are_found_behind_their_headers() {
        let mut bytes = slot(100, 100, 82, 96);
        bytes[82 - 4 - 10 + 1] = VNET_GSO_UDP_L4;
        bytes[82 - 4 - 10 + 4..][..2].copy_from_slice(&1082u16.to_ne_bytes());
        bytes[96 - 4] = 0x45;
        let frame = frame(&bytes);
        assert_eq!((frame.gso_type, frame.gso_size), (VNET_GSO_UDP_L4, 1082));
        assert_eq!((frame.network.len(), frame.network[0]), (100 - 14, 0x45));
        assert!(!frame.cut);
        assert!(super::frame(&slot(200, 100, 82, 96)).cut);
    }

    #[test]
    fn offsets_that_lie_give_nothing() {
        for (kept, mac, net) in [
            (0, 0, 0),
            (100, 41, 60),
            (100, 82, 81),
            (5000, 82, 96),
            (u32::MAX, 82, 96),
            (5, 82, 96),
            (100, 60_000, 60_014),
        ] {
            let bytes = slot(kept, kept, mac, net);
            let frame = frame(&bytes);
            assert!(frame.cut && frame.network.is_empty(), "{kept} {mac} {net}");
        }
    }
}
