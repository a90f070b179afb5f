//! The side that posts and polls.

use alloc::vec::Vec;
use core::sync::atomic::Ordering;
use core::time::Duration;

use hyv_verbs::cm::{self, CmId, ConnParam, EventChannel};
use hyv_verbs::{
    Access, CmEventKind, CompletionQueue, Context, Gid, MemoryRegion, Payload, ProtectionDomain,
    QpCaps, QueuePair, RecvWr, RemoteAddr, SendOp, SendWr, WorkCompletion, probe,
};

use super::control;
use super::protocol::{Greeting, LEN, Report};
use super::{
    Command, DEPTH, INLINE, Kind, MAX_SAMPLES, MAX_SIZE, PATIENCE, PerfError, RECEIVES, RECV_AT,
    REGION, SAMPLES_AT, SILENCE_NS, Verb,
};

/// A clock that costs as little as the machine allows: the TSC.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// Now, in ticks.
    pub ticks: fn() -> u64,
    /// Ticks per second.
    pub hz: u64,
}

impl Clock {
    fn of_ns(&self, ns: u64) -> u64 {
        (u128::from(ns) * u128::from(self.hz) / 1_000_000_000) as u64
    }
}

/// Drives the engine, where the agent's own thread does.
pub trait Drive {
    /// One turn of the engine, which is taken from its thread first, if need be.
    fn turn(&mut self);
    /// Gives the engine back to its thread: the agent is about to sleep, or to wait for a control verb.
    fn rest(&mut self);
}

/// Somebody else drives.
impl Drive for () {
    #[inline]
    fn turn(&mut self) {}
    fn rest(&mut self) {}
}

/// Work requests before anything is timed: caches, predictors and the hot set settle. Fewer, at least twice the depth, where they
/// would take longer than a quarter of the slice.
const WARM_UP: u32 = 256;
/// How long the agent polls for a command before it sleeps.
const SPIN_NS: u64 = 50_000;
/// A receive's name.
const RECV: u64 = 1 << 63;
/// Sends of a ping-pong between two signaled ones.
const SIGNAL_EVERY: u32 = 16;

/// An agent that serves one partner after the other.
pub struct Agent {
    context: Context,
    clock: Clock,
    pd: ProtectionDomain,
    region: MemoryRegion,
    /// What `Register` registers, once it was asked for.
    memory: Option<control::Memory>,
    _listener: CmId,
    channel: EventChannel,
}

/// The connection to the partner of the moment.
struct Link {
    id: CmId,
    qp: QueuePair,
    cq: CompletionQueue,
    peer: RemoteAddr,
}

impl Agent {
    /// Listens on `port`.
    ///
    /// # Errors
    /// When the memory does not suffice or the port is taken.
    pub fn new(context: &Context, clock: Clock, port: u16) -> Result<Self, PerfError> {
        let pd = context.alloc_pd()?;
        let region = pd.alloc_mr(
            REGION,
            Access::LOCAL_WRITE | Access::REMOTE_READ | Access::REMOTE_WRITE,
        )?;
        let (listener, channel) = cm::listen(context, (Gid::LOCAL, port), 1)?;
        Ok(Self {
            context: context.clone(),
            clock,
            pd,
            region,
            memory: None,
            _listener: listener,
            channel,
        })
    }

    /// Serves partners until `stop` says so, while somebody else drives the engine.
    ///
    /// # Errors
    /// When the device or its host is gone; what goes wrong with one partner ends that connection only and goes to `lost`.
    pub fn serve(
        &mut self,
        stop: impl FnMut() -> bool,
        lost: impl FnMut(PerfError),
    ) -> Result<(), PerfError> {
        self.serve_driving(&mut (), stop, lost)
    }

    /// The same, and drives the engine while it carries out a command.
    ///
    /// # Errors
    /// As [`Self::serve`].
    pub fn serve_driving(
        &mut self,
        drive: &mut impl Drive,
        mut stop: impl FnMut() -> bool,
        mut lost: impl FnMut(PerfError),
    ) -> Result<(), PerfError> {
        while !stop() {
            let Some(mut event) = self.channel.get_event(Some(Duration::from_millis(200)))? else {
                continue;
            };
            if event.kind != CmEventKind::ConnectRequest {
                continue;
            }
            let greeting = Greeting::decode(event.private_data());
            let Some(mut id) = event.take_request() else {
                continue;
            };
            let Some(greeting) = greeting else {
                id.reject(b"not a measurement")?;
                continue;
            };
            match self.link(id, &greeting) {
                Ok(mut link) => {
                    let served = self.serve_one(&mut link, drive, &mut stop);
                    // What follows are control verbs.
                    drive.rest();
                    if let Err(e) = served.and_then(|()| Ok(link.id.disconnect()?)) {
                        lost(e);
                    }
                }
                Err(e) => lost(e),
            }
        }
        Ok(())
    }

    fn link(&self, mut id: CmId, greeting: &Greeting) -> Result<Link, PerfError> {
        let cq = self.context.create_cq(2 * RECEIVES + 2 * DEPTH + 64)?;
        let caps = QpCaps {
            max_send_wr: 4 * RECEIVES,
            max_recv_wr: RECEIVES,
            max_inline_data: INLINE as u32,
            ..QpCaps::default()
        };
        id.create_qp(&self.pd, &cq, &cq, &caps)?;
        let mut qp = id
            .take_qp()
            .ok_or(PerfError::Protocol("has no queue pair"))?;
        for _ in 0..RECEIVES {
            post_recv(&mut qp, &self.region)?;
        }
        let mine = Greeting {
            buffer: self.region.addr(),
            offset: super::ram_offset(&self.context, &self.region)?,
            rkey: self.region.rkey(),
            hz: self.clock.hz,
        };
        id.accept(&ConnParam {
            private_data: &mine.encode(),
            ..ConnParam::default()
        })?;
        Ok(Link {
            id,
            qp,
            cq,
            peer: RemoteAddr {
                addr: greeting.buffer,
                rkey: greeting.rkey,
            },
        })
    }

    fn serve_one(
        &mut self,
        link: &mut Link,
        drive: &mut impl Drive,
        stop: &mut impl FnMut() -> bool,
    ) -> Result<(), PerfError> {
        loop {
            // The engine's thread can wait as well, and another agent may want to drive meanwhile.
            drive.rest();
            let Some(command) = self.next_command(link, stop)? else {
                return Ok(());
            };
            match command.kind {
                Kind::Floor { rounds } | Kind::Exchange { rounds } => {
                    self.report(link, drive, (0, 0, 0, 0))?;
                    let platform = self.context.platform();
                    let lines = match command.kind {
                        Kind::Exchange { .. } => probe::Lines::two(platform.window()),
                        _ => probe::Lines::one(platform.window()),
                    };
                    probe::respond(lines, rounds, SILENCE_NS, || platform.now_ns());
                }
                Kind::Latency => self.measure(link, drive, &command, 1)?,
                Kind::Bandwidth => self.measure(link, drive, &command, DEPTH)?,
                Kind::Connect { rounds } => {
                    drive.rest();
                    let samples = control::connect(&self.context, &self.pd, self.clock, rounds)?;
                    self.answer(link, drive, &samples, 1)?;
                }
                Kind::Register { rounds } => {
                    drive.rest();
                    let memory = match &self.memory {
                        Some(m) => m,
                        None => self.memory.insert(control::Memory::new(&self.context)?),
                    };
                    let samples = control::register(memory, &self.pd, self.clock, rounds)?;
                    self.answer(link, drive, &samples, 1)?;
                }
            }
        }
    }

    /// The next command; `None` when the partner has gone.
    fn next_command(
        &self,
        link: &mut Link,
        stop: &mut impl FnMut() -> bool,
    ) -> Result<Option<Command>, PerfError> {
        let platform = self.context.platform();
        let mut since = platform.now_ns();
        loop {
            let mut done = [WorkCompletion::EMPTY; 1];
            let slept = platform.now_ns().saturating_sub(since) > SPIN_NS;
            let n = if slept {
                since = platform.now_ns();
                link.cq.wait(&mut done, Some(Duration::from_millis(200)))?
            } else {
                link.cq.poll(&mut done)
            };
            if n == 1 {
                let wc = &done[0];
                if !wc.is_ok() {
                    // The partner left: everything flushes.
                    return Ok(None);
                }
                if wc.is_recv() {
                    let command = wc.inline_data().and_then(Command::decode);
                    post_recv(&mut link.qp, &self.region)?;
                    return match command {
                        Some(c) if c.size as usize <= MAX_SIZE => Ok(Some(c)),
                        _ => Err(PerfError::Protocol("gave a command that makes no sense")),
                    };
                }
            } else if slept {
                if stop() {
                    return Ok(None);
                }
                while let Some(event) = self.channel.poll_event()? {
                    if event.kind == CmEventKind::Disconnected {
                        return Ok(None);
                    }
                }
            }
        }
    }

    fn report(
        &self,
        link: &mut Link,
        drive: &mut impl Drive,
        (samples, per_sample, ops, ticks): (u32, u32, u64, u64),
    ) -> Result<(), PerfError> {
        let report = Report {
            samples,
            per_sample,
            ops,
            ticks,
        };
        let bytes = report.encode();
        link.qp
            .post_send(&SendWr::new(0, SendOp::Send, Payload::Inline(&bytes)))?;
        // Its completion, so that no measurement begins with it.
        self.finish(link, drive, 1)
    }

    /// Polls until `n` sends have completed.
    fn finish(&self, link: &mut Link, drive: &mut impl Drive, n: u32) -> Result<(), PerfError> {
        let mut wait = Patience::new(self.clock);
        let mut left = n;
        while left > 0 {
            match link.cq.poll_one() {
                Some(wc) if !wc.is_ok() => return Err(PerfError::Completion(wc.status)),
                Some(wc) if !wc.is_recv() => left -= 1,
                Some(_) => return Err(PerfError::Protocol("spoke while it should listen")),
                None => {
                    drive.turn();
                    wait.turn()?;
                }
            }
        }
        Ok(())
    }

    fn measure(
        &self,
        link: &mut Link,
        drive: &mut impl Drive,
        command: &Command,
        depth: u32,
    ) -> Result<(), PerfError> {
        let mut run = Run::new(self, link, drive, command, depth);
        let now = self.clock.ticks;
        let slice = self.clock.of_ns(command.slice_ns);
        let (start, mut warm) = (now(), 0);
        while warm < 2 * depth || (warm < WARM_UP && now() - start < slice / 4) {
            run.ops(depth)?;
            warm += depth;
        }
        // How many work requests fill a sample.
        let batch = self.clock.of_ns(command.batch_ns);
        let mut per_sample = depth;
        loop {
            let start = now();
            run.ops(per_sample)?;
            let took = now() - start;
            if took >= batch || per_sample >= 1 << 16 {
                break;
            }
            let factor = (batch as f64 / took.max(1) as f64 * 1.1).clamp(1.2, 64.0);
            per_sample = ((f64::from(per_sample) * factor) as u32).max(per_sample + 1);
        }
        let mut samples: Vec<u32> = Vec::with_capacity(MAX_SAMPLES);
        let begin = now();
        let mut last = begin;
        while last - begin < slice && samples.len() < MAX_SAMPLES {
            run.ops(per_sample)?;
            let t = now();
            samples.push((t - last).min(u64::from(u32::MAX)) as u32);
            last = t;
        }
        run.drain()?;
        self.answer(link, drive, &samples, per_sample)
    }

    /// Puts samples where the partner READs them, and reports them.
    fn answer(
        &self,
        link: &mut Link,
        drive: &mut impl Drive,
        samples: &[u32],
        per_sample: u32,
    ) -> Result<(), PerfError> {
        let samples = &samples[..samples.len().min(MAX_SAMPLES)];
        for (i, &s) in samples.iter().enumerate() {
            self.region
                .write(SAMPLES_AT as usize + 4 * i, &s.to_le_bytes())
                .map_err(|_| PerfError::Protocol("has no room for samples"))?;
        }
        let n = samples.len() as u32;
        let ops = u64::from(n) * u64::from(per_sample);
        let ticks = samples.iter().map(|&t| u64::from(t)).sum();
        self.report(link, drive, (n, per_sample, ops, ticks))
    }
}

/// Gives up when nothing happens for long.
struct Patience {
    clock: Clock,
    turns: u32,
    since: Option<u64>,
}

impl Patience {
    const fn new(clock: Clock) -> Self {
        Self {
            clock,
            turns: 0,
            since: None,
        }
    }

    #[inline]
    fn turn(&mut self) -> Result<(), PerfError> {
        self.turns = self.turns.wrapping_add(1);
        if self.turns.is_multiple_of(PATIENCE) {
            let now = (self.clock.ticks)();
            let since = *self.since.get_or_insert(now);
            if now.saturating_sub(since) > self.clock.of_ns(SILENCE_NS) {
                return Err(PerfError::Silent);
            }
        }
        Ok(())
    }
}

fn post_recv(qp: &mut QueuePair, region: &MemoryRegion) -> Result<(), PerfError> {
    // All receives share one place: nobody looks at a measured message's bytes, and commands come in completions.
    let sges = [region.sge(RECV_AT, MAX_SIZE as u32)];
    Ok(qp.post_recv(&RecvWr {
        wr_id: RECV,
        sges: &sges,
    })?)
}

/// One measurement.
struct Run<'a, D> {
    agent: &'a Agent,
    link: &'a mut Link,
    drive: &'a mut D,
    verb: Verb,
    size: u32,
    depth: u32,
    /// Under way.
    out: u32,
    since_signal: u32,
    bytes: [u8; INLINE],
}

impl<'a, D: Drive> Run<'a, D> {
    fn new(
        agent: &'a Agent,
        link: &'a mut Link,
        drive: &'a mut D,
        command: &Command,
        depth: u32,
    ) -> Self {
        Self {
            agent,
            link,
            drive,
            verb: command.verb,
            size: command.size,
            depth,
            out: 0,
            since_signal: 0,
            bytes: [0x5a; INLINE],
        }
    }

    /// Starts and finishes `n` work requests; with a depth above 1 it leaves that many under way.
    #[inline]
    fn ops(&mut self, n: u32) -> Result<(), PerfError> {
        let pingpong = self.verb == Verb::Send && self.depth == 1;
        let mut done = 0;
        while done < n {
            while self.out < self.depth {
                self.post(pingpong)?;
                self.out += 1;
            }
            done += self.reap(pingpong)?;
        }
        Ok(())
    }

    /// Finishes what is under way.
    fn drain(&mut self) -> Result<(), PerfError> {
        let pingpong = self.verb == Verb::Send && self.depth == 1;
        while self.out > 0 {
            self.reap(pingpong)?;
        }
        Ok(())
    }

    #[inline]
    fn post(&mut self, pingpong: bool) -> Result<(), PerfError> {
        let remote = self.link.peer;
        let op = match self.verb {
            Verb::Send => SendOp::Send,
            Verb::Write => SendOp::Write(remote),
            Verb::Read => SendOp::Read(remote),
            Verb::FetchAdd => SendOp::FetchAdd { remote, add: 1 },
            Verb::CmpSwp => SendOp::CmpSwp {
                remote,
                compare: 0,
                swap: 0,
            },
        };
        let size = self.size as usize;
        let sges = [self.agent.region.sge(0, self.size)];
        let payload = if matches!(self.verb, Verb::Send | Verb::Write) && size <= INLINE {
            Payload::Inline(&self.bytes[..size])
        } else {
            Payload::Sges(&sges)
        };
        let mut wr = SendWr::new(0, op, payload);
        if pingpong {
            self.since_signal += 1;
            if self.since_signal < SIGNAL_EVERY {
                wr = wr.unsignaled();
            } else {
                self.since_signal = 0;
            }
        }
        Ok(self.link.qp.post_send(&wr)?)
    }

    /// Waits for at least one work request to finish; gives how many did.
    #[inline]
    fn reap(&mut self, pingpong: bool) -> Result<u32, PerfError> {
        let mut wait = Patience::new(self.agent.clock);
        loop {
            let Some(wc) = self.link.cq.poll_one() else {
                self.drive.turn();
                wait.turn()?;
                continue;
            };
            if !wc.is_ok() {
                return Err(PerfError::Completion(wc.status));
            }
            if wc.is_recv() {
                post_recv(&mut self.link.qp, &self.agent.region)?;
                if !pingpong {
                    return Err(PerfError::Protocol("spoke while it should listen"));
                }
                self.out -= 1;
                return Ok(1);
            }
            if !pingpong {
                self.out -= 1;
                return Ok(1);
            }
        }
    }
}

const _: () = assert!(LEN <= INLINE && DEPTH < RECEIVES);

impl core::fmt::Debug for Agent {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let beat = &self.context.platform().window().header.host_beat;
        f.debug_struct("Agent")
            .field("host_beat", &beat.load(Ordering::Relaxed))
            .finish_non_exhaustive()
    }
}
