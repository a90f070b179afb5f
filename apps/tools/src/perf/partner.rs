//! The side that owns the memory, answers SENDs and says what to measure.

use alloc::vec;
use alloc::vec::Vec;

use hyv_verbs::cm::{self, ConnParam, ConnectOptions, Connection};
use hyv_verbs::{
    Access, CompletionQueue, Context, Gid, MemoryRegion, Payload, QpCaps, QueuePair, RecvWr,
    RemoteAddr, SendOp, SendWr,
};

use super::protocol::{Greeting, Report};
use super::{
    Command, Kind, MAX_SAMPLES, MAX_SIZE, PerfError, RECEIVES, RECV_AT, REGION, SAMPLES_AT,
    SILENCE_NS, Verb,
};

/// A slice's result.
#[derive(Clone, Debug)]
pub struct Samples {
    /// Ns per work request, one for each batch.
    pub ns: Vec<f64>,
    /// Work requests in all.
    pub ops: u64,
    /// Ns that they took.
    pub elapsed_ns: f64,
}

/// The partner of one agent.
#[derive(Debug)]
pub struct Partner {
    context: Context,
    _connection: Connection,
    qp: QueuePair,
    cq: CompletionQueue,
    region: MemoryRegion,
    agent: Greeting,
    /// Sends posted and not yet known to be complete, by every sixteenth's completion.
    unsignaled: u32,
}

/// A READ's name.
const READ: u64 = 1;

impl Partner {
    /// Connects to the agent that listens on `port` at `gid`.
    ///
    /// # Errors
    /// When nobody listens there, or memory does not suffice.
    pub fn connect(context: &Context, (gid, port): (Gid, u16)) -> Result<Self, PerfError> {
        let pd = context.alloc_pd()?;
        let region = pd.alloc_mr(
            REGION,
            Access::LOCAL_WRITE
                | Access::REMOTE_READ
                | Access::REMOTE_WRITE
                | Access::REMOTE_ATOMIC,
        )?;
        let cq = context.create_cq(4 * RECEIVES + 64)?;
        let greeting = Greeting {
            buffer: region.addr(),
            offset: 0,
            rkey: region.rkey(),
            hz: 0,
        }
        .encode();
        let options = ConnectOptions {
            caps: QpCaps {
                max_send_wr: 2 * RECEIVES,
                max_recv_wr: RECEIVES,
                max_inline_data: super::INLINE as u32,
                ..QpCaps::default()
            },
            param: ConnParam {
                private_data: &greeting,
                ..ConnParam::default()
            },
            ..ConnectOptions::default()
        };
        let mut connection = cm::connect(context, (gid, port), &pd, (&cq, &cq), &options, |qp| {
            for _ in 0..RECEIVES {
                post_recv(qp, &region)?;
            }
            Ok::<(), PerfError>(())
        })?;
        let agent =
            Greeting::decode(&connection.private_data).ok_or(PerfError::Protocol("is no agent"))?;
        let qp = connection
            .id
            .take_qp()
            .ok_or(PerfError::Protocol("has no queue pair"))?;
        Ok(Self {
            context: context.clone(),
            _connection: connection,
            qp,
            cq,
            region,
            agent,
            unsignaled: 0,
        })
    }

    /// Where in this user's RAM the buffer lies that the agent READs and WRITEs.
    ///
    /// # Errors
    /// Never for a region that is registered.
    pub fn offset(&self) -> Result<u64, PerfError> {
        super::ram_offset(&self.context, &self.region)
    }

    /// Where in the agent's RAM its own buffer lies, as it says.
    #[must_use]
    pub const fn agent_offset(&self) -> u64 {
        self.agent.offset
    }

    /// Has the agent answer on the probe lines ([`Kind::Floor`], [`Kind::Exchange`]); returns when it is about to.
    ///
    /// # Errors
    /// When it does not.
    pub fn probe(&mut self, kind: Kind, drive: impl FnMut()) -> Result<(), PerfError> {
        let command = Command {
            kind,
            verb: Verb::Write,
            size: 0,
            slice_ns: 0,
            batch_ns: 0,
        };
        self.run(&command, drive).map(drop)
    }

    /// Has the agent measure one slice. `drive` is called at every turn of waiting: it drives the engine, if this thread does.
    ///
    /// # Errors
    /// When a work request fails or the agent falls silent.
    pub fn measure(
        &mut self,
        command: &Command,
        mut drive: impl FnMut(),
    ) -> Result<Samples, PerfError> {
        let report = self.run(command, &mut drive)?;
        let n = (report.samples as usize).min(MAX_SAMPLES);
        let mut bytes = vec![0u8; 4 * n];
        if n > 0 {
            let sges = [self.region.sge(SAMPLES_AT, 4 * n as u32)];
            self.qp.post_send(&SendWr::new(
                READ,
                SendOp::Read(RemoteAddr {
                    addr: self.agent.buffer.wrapping_add(SAMPLES_AT),
                    rkey: self.agent.rkey,
                }),
                Payload::Sges(&sges),
            ))?;
            let start = self.context.now_ns();
            loop {
                drive();
                match self.cq.poll_one() {
                    Some(wc) if !wc.is_ok() => return Err(PerfError::Completion(wc.status)),
                    Some(wc) if wc.wr_id == READ && !wc.is_recv() => break,
                    Some(_) => {}
                    None if self.context.now_ns().saturating_sub(start) > SILENCE_NS => {
                        return Err(PerfError::Silent);
                    }
                    None => {}
                }
            }
            self.region
                .read(SAMPLES_AT as usize, &mut bytes)
                .map_err(|_| PerfError::Protocol("gave too many samples"))?;
        }
        let ns_per_tick = 1e9 / self.agent.hz.max(1) as f64;
        let per_op = ns_per_tick / f64::from(report.per_sample.max(1));
        Ok(Samples {
            ns: bytes
                .as_chunks::<4>()
                .0
                .iter()
                .map(|b| f64::from(u32::from_le_bytes(*b)) * per_op)
                .collect(),
            ops: report.ops,
            elapsed_ns: report.ticks as f64 * ns_per_tick,
        })
    }

    /// One READ of `size` bytes of the agent's buffer, posted by this side, from posting to its completion. The agent's CPU takes no
    /// part in it. `drive` is called at every turn of waiting: it drives the engine, if this thread does.
    ///
    /// # Errors
    /// When it fails, or takes too long; [`PerfError::Protocol`] for more than [`MAX_SIZE`] bytes.
    #[inline]
    pub fn read(&mut self, size: u32, mut drive: impl FnMut()) -> Result<(), PerfError> {
        if size as usize > MAX_SIZE {
            return Err(PerfError::Protocol("has no buffer of that size"));
        }
        let from = RemoteAddr {
            addr: self.agent.buffer,
            rkey: self.agent.rkey,
        };
        let sges = [self.region.sge(0, size)];
        let wr = SendWr::new(READ, SendOp::Read(from), Payload::Sges(&sges));
        self.qp.post_send(&wr)?;
        let (mut turns, mut since) = (0u32, None);
        loop {
            drive();
            match self.cq.poll_one() {
                Some(wc) if !wc.is_ok() => return Err(PerfError::Completion(wc.status)),
                Some(wc) if wc.wr_id == READ && !wc.is_recv() => return Ok(()),
                Some(_) => {}
                None => {
                    turns = turns.wrapping_add(1);
                    if turns.is_multiple_of(super::PATIENCE) {
                        let now = self.context.now_ns();
                        if now.saturating_sub(*since.get_or_insert(now)) > SILENCE_NS {
                            return Err(PerfError::Silent);
                        }
                    }
                }
            }
        }
    }

    /// Sends a command and takes part until the report comes.
    fn run(&mut self, command: &Command, mut drive: impl FnMut()) -> Result<Report, PerfError> {
        let bytes = command.encode();
        self.qp
            .post_send(&SendWr::new(0, SendOp::Send, Payload::Inline(&bytes)))?;
        let echo = command.kind == Kind::Latency && command.verb == Verb::Send;
        let size = command.size;
        let patience = SILENCE_NS + command.slice_ns;
        let start = self.context.now_ns();
        let mut turns = 0u32;
        loop {
            drive();
            let Some(wc) = self.cq.poll_one() else {
                turns = turns.wrapping_add(1);
                if turns.is_multiple_of(super::PATIENCE)
                    && self.context.now_ns().saturating_sub(start) > patience
                {
                    return Err(PerfError::Silent);
                }
                continue;
            };
            if !wc.is_ok() {
                return Err(PerfError::Completion(wc.status));
            }
            if !wc.is_recv() {
                continue;
            }
            // A report has a length that no measured message of this slice shares, or comes when none is measured.
            let report = match wc.inline_data() {
                Some(data) if !is_measured(data, command) => Report::decode(data),
                _ => None,
            };
            if report.is_none() && echo {
                self.echo(size)?;
            }
            post_recv(&mut self.qp, &self.region)?;
            if let Some(report) = report {
                return Ok(report);
            }
        }
    }

    #[inline]
    fn echo(&mut self, size: u32) -> Result<(), PerfError> {
        let sges = [self.region.sge(0, size)];
        let bytes = [0x5a; super::INLINE];
        let payload = if size as usize <= super::INLINE {
            Payload::Inline(&bytes[..size as usize])
        } else {
            Payload::Sges(&sges)
        };
        let mut wr = SendWr::new(0, SendOp::Send, payload);
        self.unsignaled += 1;
        if self.unsignaled < 16 {
            wr = wr.unsignaled();
        } else {
            self.unsignaled = 0;
        }
        Ok(self.qp.post_send(&wr)?)
    }
}

/// Whether a message is one of those that are measured: all its bytes are the filler.
fn is_measured(data: &[u8], command: &Command) -> bool {
    command.verb == Verb::Send
        && data.len() == command.size as usize
        && data.iter().all(|&b| b == 0x5a)
}

fn post_recv(qp: &mut QueuePair, region: &MemoryRegion) -> Result<(), PerfError> {
    let sges = [region.sge(RECV_AT, MAX_SIZE as u32)];
    Ok(qp.post_recv(&RecvWr {
        wr_id: 0,
        sges: &sges,
    })?)
}
