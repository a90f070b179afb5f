//! What control verbs cost.
#![allow(
    unsafe_code,
    reason = "registers memory that no Rust reference ever points into"
)]

use alloc::vec::Vec;
use core::alloc::Layout;
use core::ptr::NonNull;

use hyv_verbs::{Access, Context, ProtectionDomain, QpCaps, RtrParams, RtsParams};

use super::{Clock, PerfError, REGISTERED};

/// [`REGISTERED`] bytes of shared RAM, never touched and never given back.
#[derive(Debug)]
pub(super) struct Memory(NonNull<u8>);

// SAFETY: an address that is only handed to the device.
unsafe impl Send for Memory {}

impl Memory {
    pub(super) fn new(context: &Context) -> Result<Self, PerfError> {
        const HUGE: usize = 2 << 20;
        let layout = Layout::from_size_align(REGISTERED, HUGE)
            .map_err(|_| PerfError::Protocol("asked for memory of no layout"))?;
        context
            .platform()
            .alloc_dma(layout)
            .map(Self)
            .ok_or(PerfError::Verbs(hyv_verbs::Error::OutOfMemory {
                len: REGISTERED,
            }))
    }
}

/// Times `create_qp` until RTS, the QP connected to itself.
pub(super) fn connect(
    context: &Context,
    pd: &ProtectionDomain,
    clock: Clock,
    rounds: u32,
) -> Result<Vec<u32>, PerfError> {
    let cq = context.create_cq(16)?;
    let gid = context.query_gid(1, 0)?;
    let mut samples = Vec::new();
    for _ in 0..rounds {
        let start = (clock.ticks)();
        let mut qp = pd.create_qp(&cq, &cq, &QpCaps::default())?;
        qp.to_init(Access::REMOTE_READ | Access::REMOTE_WRITE)?;
        qp.to_rtr(&RtrParams::to(gid, qp.qpn(), 0))?;
        qp.to_rts(&RtsParams::from_psn(0))?;
        samples.push(ticks(start, clock));
        qp.destroy()?;
    }
    Ok(samples)
}

/// Times `reg_mr`.
pub(super) fn register(
    memory: &Memory,
    pd: &ProtectionDomain,
    clock: Clock,
    rounds: u32,
) -> Result<Vec<u32>, PerfError> {
    let mut samples = Vec::new();
    for _ in 0..rounds {
        let start = (clock.ticks)();
        // SAFETY: that many bytes of shared RAM, allocated for good; nobody holds a reference into them and no work
        // is posted with the key.
        let region = unsafe { pd.reg_mr(memory.0, REGISTERED, Access::LOCAL_WRITE)? };
        samples.push(ticks(start, clock));
        region.deregister_now()?;
    }
    Ok(samples)
}

fn ticks(start: u64, clock: Clock) -> u32 {
    (clock.ticks)()
        .saturating_sub(start)
        .min(u64::from(u32::MAX)) as u32
}
