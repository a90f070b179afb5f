//! `--idle-qps`: a second host on the same cores, with queue pairs that do nothing beside the one that works.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use hyv_host::backend::UserMemory;
use hyv_host::instance::Instance;
use hyv_tools::perf::Partner;
use hyv_verbs::{
    Access, CompletionQueue, Context, Gid, Platform, Process, ProtectionDomain, QpCaps, QueuePair,
    RtrParams, RtsParams,
};

use super::lanes::{PARTNER_RAM, memory_to_memory};
use crate::machine::{Native, Roles};

/// RAM for one idle queue pair's rings.
const RINGS: u64 = 4 << 10;
/// The partner's and its agent's lane.
pub(super) const PLACE: &str = "crowded";
/// The agent's name as a user of its host.
const AGENT: &str = "native-crowded";

/// The host and its idle queue pairs, in the order in which they are to end.
pub(super) struct Crowd {
    _idle: Vec<QueuePair>,
    _cq: CompletionQueue,
    _pd: ProtectionDomain,
    _native: Native,
    _process: Arc<Process>,
    pub(super) instance: Instance,
}

impl Crowd {
    /// Starts it and connects `count` queue pairs to themselves; an agent listens on `port`, with the partner that it gives.
    pub(super) fn start(count: u32, roles: &Roles, port: u16) -> Result<(Self, Partner)> {
        let instance = memory_to_memory(roles)?;
        let ram = PARTNER_RAM + u64::from(count) * RINGS;
        let process = Process::connect(instance.dir().path(), ram, "crowd")?;
        let platform: Arc<dyn Platform> = Arc::<Process>::clone(&process);
        let context = Context::open(platform).context("cannot open the device")?;
        let pd = context.alloc_pd()?;
        let cq = context.create_cq(16)?;
        let gid = context.query_gid(1, 0)?;
        let caps = QpCaps {
            max_send_wr: 1,
            max_recv_wr: 1,
            ..QpCaps::default()
        };
        let idle = (0..count).map(|_| {
            let mut qp = pd.create_qp(&cq, &cq, &caps)?;
            qp.to_init(Access::REMOTE_READ | Access::REMOTE_WRITE)?;
            qp.to_rtr(&RtrParams::to(gid, qp.qpn(), 0))?;
            qp.to_rts(&RtsParams::from_psn(0))?;
            Ok(qp)
        });
        let idle = idle
            .collect::<Result<Vec<_>, hyv_verbs::Error>>()
            .with_context(|| format!("--idle-qps {count}"))?;
        let mut native = Native::agent(instance.dir().path(), port, AGENT, roles)?;
        let partner = native.wait_for(Duration::from_secs(10), || {
            Partner::connect(&context, (Gid::LOCAL, port))
        })?;
        let crowd = Self {
            _idle: idle,
            _cq: cq,
            _pd: pd,
            _native: native,
            _process: process,
            instance,
        };
        Ok((crowd, partner))
    }

    /// The agent's memory and the partner's.
    pub(super) fn memories(&self) -> Result<(UserMemory, UserMemory)> {
        let of = |user: &str| {
            let memory = self.instance.backend().user_memory(user);
            memory.with_context(|| format!("{user} is gone"))
        };
        Ok((of(AGENT)?, of("crowd")?))
    }
}
