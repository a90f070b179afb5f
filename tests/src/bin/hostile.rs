//! A hostile user: becomes a user of the hyv-host at DIR like any other, makes queue pairs, some of them connected to the
//! store, and then writes garbage into all that it shares with the host: work queues, doorbells, control queue, log.
//!
//! `hyv-hostile DIR SEED MILLISECONDS` ends without a word to the host. Exit code 0: it did its worst. 2: the host
//! did not let it in.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hyv_abi::window::{KICK_CONTROL, KICK_DATA, Window};
use hyv_e2e::Random;
use hyv_verbs::cm::{ConnParam, ConnectOptions, Connection, connect};
use hyv_verbs::{
    Access, CompletionQueue, Context, Error, Gid, MemoryRegion, Payload, Platform, Process,
    ProtectionDomain, QpCaps, QueuePair, RecvWr, RtrParams, RtsParams, SendFlags, SendOp, SendWr,
};
use kvstore::proto::Hello;

/// The store's port.
const PORT: u16 = 7070;
/// RAM of the session.
const RAM: u64 = 8 << 20;
/// Bytes registered.
const REGION: usize = 256 << 10;
/// Connections to the store.
const CONNECTIONS: usize = 4;
/// Queue pairs connected to each other, two and two.
const PAIRS: usize = 8;
/// Words in a line.
const LINE: usize = 8;

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let (Some(dir), Some(Ok(seed)), Some(Ok(ms))) = (
        args.next(),
        args.next().map(|a| a.parse::<u64>()),
        args.next().map(|a| a.parse::<u64>()),
    ) else {
        eprintln!("usage: hyv-hostile DIR SEED MILLISECONDS");
        return ExitCode::FAILURE;
    };
    let user = match User::become_one(Path::new(&dir), Random::new(seed)) {
        Ok(user) => user,
        Err(e) => {
            eprintln!("error: {e}");
            return ExitCode::from(2);
        }
    };
    let (queues, requests, garbage) = user.do_the_worst(Duration::from_millis(ms));
    println!("{queues} queue pairs, {requests} requests, {garbage} pieces of garbage");
    // Without any clean-up: nothing in the session's memory is what the library left there.
    std::process::exit(0);
}

/// A user before its fall: everything made by the rules.
struct User {
    random: Random,
    process: Arc<Process>,
    context: Context,
    pd: ProtectionDomain,
    cq: CompletionQueue,
    region: MemoryRegion,
    queues: Vec<QueuePair>,
    connections: Vec<Connection>,
}

impl User {
    fn become_one(dir: &Path, random: Random) -> Result<Self, Box<dyn std::error::Error>> {
        let process = Process::connect(dir, RAM, "hostile")?;
        let context = Context::open(Arc::<Process>::clone(&process)).map_err(said)?;
        let pd = context.alloc_pd().map_err(said)?;
        let cq = context.create_cq(1000).map_err(said)?;
        let access = Access::LOCAL_WRITE
            | Access::REMOTE_READ
            | Access::REMOTE_WRITE
            | Access::REMOTE_ATOMIC;
        let region = pd.alloc_mr(REGION, access).map_err(said)?;
        let mut user = Self {
            random,
            process,
            context,
            pd,
            cq,
            region,
            queues: Vec::new(),
            connections: Vec::new(),
        };
        for _ in 0..CONNECTIONS {
            user.connect_to_store().map_err(said)?;
        }
        for _ in 0..PAIRS {
            user.make_pair().map_err(said)?;
        }
        Ok(user)
    }

    fn connect_to_store(&mut self) -> Result<(), Error> {
        // A new client, without a lease.
        let hello = Hello {
            lease: false,
            client: 0,
        };
        let hello = hello.to_bytes();
        let options = ConnectOptions {
            caps: caps(),
            param: ConnParam {
                private_data: &hello,
                ..ConnParam::default()
            },
            ..ConnectOptions::default()
        };
        let region = &self.region;
        let prepare = |qp: &mut QueuePair| -> Result<(), Error> {
            for i in 0..32 {
                let sges = [region.sge(i * 8192, 8192)];
                if qp
                    .post_recv(&RecvWr {
                        wr_id: i,
                        sges: &sges,
                    })
                    .is_err()
                {
                    break;
                }
            }
            Ok(())
        };
        let mut connection = connect(
            &self.context,
            (Gid::LOCAL, PORT),
            &self.pd,
            (&self.cq, &self.cq),
            &options,
            prepare,
        )?;
        self.queues.extend(connection.id.take_qp());
        self.connections.push(connection);
        Ok(())
    }

    fn make_pair(&mut self) -> Result<(), Error> {
        let gid = self.context.query_gid(1, 0)?;
        let make = || self.pd.create_qp(&self.cq, &self.cq, &caps());
        let mut pair = [make()?, make()?];
        let numbers = [pair[1].qpn(), pair[0].qpn()];
        for (qp, peer) in pair.iter_mut().zip(numbers) {
            qp.to_init(Access::REMOTE_READ | Access::REMOTE_WRITE | Access::REMOTE_ATOMIC)?;
            qp.to_rtr(&RtrParams::to(gid, peer, 0))?;
            qp.to_rts(&RtsParams::from_psn(0))?;
        }
        self.queues.extend(pair);
        Ok(())
    }

    /// Requests that the library lets through, most of them senseless: to the store and to its own.
    fn request_nonsense(&mut self) -> u64 {
        let mut posted = 0;
        for _ in 0..200 {
            let at = self.random.below(self.queues.len());
            let len = self.random.below(300);
            let mut message = self.random.bytes(len);
            if let Some(first) = message.first_mut().filter(|_| self.random.below(2) == 0) {
                // An operation that the store knows, with nonsense behind it.
                *first = self.random.below(9) as u8;
            }
            let remote = match self.random.below(3) {
                0 => self.region.remote(self.random.below(2 * REGION) as u64),
                1 => hyv_verbs::RemoteAddr {
                    addr: self.random.next_u64(),
                    rkey: self.region.rkey(),
                },
                _ => hyv_verbs::RemoteAddr {
                    addr: self.region.addr(),
                    rkey: self.random.next_u64() as u32,
                },
            };
            let op = match self.random.below(8) {
                0 => SendOp::Write(remote),
                1 => SendOp::Read(remote),
                2 => SendOp::WriteImm(remote, 7),
                3 => SendOp::FetchAdd { remote, add: 1 },
                4 => SendOp::SendImm(9),
                _ => SendOp::Send,
            };
            let sges = [self.region.sge(
                self.random.below(2 * REGION) as u64,
                self.random.below(10_000) as u32,
            )];
            let inline = matches!(op, SendOp::Send | SendOp::SendImm(_) | SendOp::Write(_));
            let payload = if inline && self.random.below(4) != 0 {
                Payload::Inline(&message)
            } else {
                Payload::Sges(&sges)
            };
            let wr = SendWr::new(posted, op, payload).with_flags(SendFlags::SIGNALED);
            posted += u64::from(self.queues[at].post_send(&wr).is_ok());
            while self.cq.poll_one().is_some() {}
        }
        posted
    }

    /// Ends as a user by the rules: what the library made is never touched through it again.
    fn do_the_worst(mut self, time: Duration) -> (usize, u64, u64) {
        let requests = self.request_nonsense();
        let process: &'static Process = Box::leak(Box::new(Arc::clone(&self.process)));
        let ram = ram::words(process);
        let mut storm = Storm {
            random: self.random.clone(),
            ram,
            window: process.window(),
            process,
            used: used_lines(ram),
            indices: self.queues.iter().map(|q| u32::from(q.index())).collect(),
        };
        let queues = self.queues.len();
        std::mem::forget(self);
        let start = Instant::now();
        let mut garbage = 0;
        while start.elapsed() < time {
            for _ in 0..64 {
                storm.strike();
            }
            garbage += 64;
        }
        (queues, requests, garbage)
    }
}

/// An error that is not one of the standard library's.
fn said(error: Error) -> String {
    error.to_string()
}

fn caps() -> QpCaps {
    QpCaps {
        max_inline_data: 400,
        max_send_sge: 4,
        max_recv_sge: 2,
        ..QpCaps::default()
    }
}

/// Lines that are not empty: rings, buffers, the allocator's own notes.
fn used_lines(ram: &[AtomicU64]) -> Vec<usize> {
    let used = |l: &usize| {
        ram[l * LINE..(l + 1) * LINE]
            .iter()
            .any(|w| w.load(Ordering::Relaxed) != 0)
    };
    (0..ram.len() / LINE).filter(used).collect()
}

/// All that the session shares with the host, as words.
struct Storm {
    random: Random,
    ram: &'static [AtomicU64],
    window: &'static Window,
    process: &'static Process,
    used: Vec<usize>,
    indices: Vec<u32>,
}

impl Storm {
    fn strike(&mut self) {
        match self.random.below(100) {
            0..=24 => self.spoil_a_word(),
            25..=59 => self.forge_a_work_request(),
            60..=79 => self.ring(),
            80..=91 => self.spoil_the_control_queue(),
            92..=94 => self.spoil_the_log(),
            95..=97 => self.spoil_the_user_page(),
            98 => self.spoil_any_window_page(),
            _ => {
                self.window
                    .user
                    .wake_in_ns
                    .store(self.number(), Ordering::Release);
                self.process.kick(KICK_CONTROL);
            }
        }
    }

    /// Large, small, or near something that means something.
    fn number(&mut self) -> u64 {
        match self.random.below(6) {
            0 => 0,
            1 => u64::MAX - self.random.below(300) as u64,
            2 => self.random.below(300) as u64,
            3 => self.random.below(self.ram.len() * 8) as u64,
            4 => 1 << self.random.below(64),
            _ => self.random.next_u64(),
        }
    }

    fn used_line(&mut self) -> usize {
        self.used[self.random.below(self.used.len())]
    }

    fn spoil_a_word(&mut self) {
        let at = self.used_line() * LINE + self.random.below(LINE);
        let old = self.ram[at].load(Ordering::Relaxed);
        let new = match self.random.below(3) {
            0 => old ^ (1 << self.random.below(64)),
            1 => old.wrapping_add(1),
            _ => self.number(),
        };
        self.ram[at].store(new, Ordering::Release);
    }

    /// What follows a line that ends in a sequence number is a slot for the next one: fills it with a variation.
    fn forge_a_work_request(&mut self) {
        let line = self.used_line();
        let Some(next) = self.ram.get((line + 1) * LINE..(line + 2) * LINE) else {
            return;
        };
        let this = &self.ram[line * LINE..(line + 1) * LINE];
        let last = this[LINE - 1].load(Ordering::Relaxed);
        for (to, from) in next.iter().zip(this).take(LINE - 1) {
            to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        for _ in 0..self.random.below(3) {
            let value = self.number();
            next[self.random.below(LINE - 1)].store(value, Ordering::Relaxed);
        }
        let sequence = u64::from((last as u32).wrapping_add(1));
        next[LINE - 1].store(sequence | (last & !0xffff_ffff), Ordering::Release);
        self.used.push(line + 1);
        if self.used.len() > 100_000 {
            self.used.truncate(1000);
        }
        let index = self.indices[self.random.below(self.indices.len())];
        let _ = self.window.doorbells.ring(index);
        self.process.kick(KICK_DATA);
    }

    /// Doorbells of queues that exist and of those that do not.
    fn ring(&mut self) {
        let bells = &self.window.doorbells;
        match self.random.below(4) {
            0 => {
                let at = self.random.below(bells.level0.len());
                let bits = self.number();
                bells.level0[at].store(bits, Ordering::Release);
            }
            1 => {
                let at = self.random.below(bells.level1.len());
                bells.level1[at].store(u64::MAX, Ordering::Release);
            }
            2 => {
                let at = self.random.below(bells.polled.len());
                bells.polled[at].store(self.random.next_u64() as u8, Ordering::Release);
            }
            _ => bells
                .need_wakeup
                .store(self.random.next_u64() as u32, Ordering::Release),
        }
        self.process.kick(KICK_DATA);
    }

    /// Descriptors, indices and requests of the control queue.
    fn spoil_the_control_queue(&mut self) {
        let queue = &self.window.user.control;
        let parts = [&queue.desc, &queue.avail, &queue.used]
            .map(|w| w.load(Ordering::Relaxed) as usize / 8);
        let at = parts[self.random.below(3)].wrapping_add(self.random.below(64));
        let value = self.number();
        if let Some(word) = self.ram.get(at) {
            word.store(value, Ordering::Release);
        }
        if let Some(avail) = self.ram.get(parts[1]) {
            // Flags and index of the available ring.
            avail.fetch_add((self.random.below(4) as u64) << 16, Ordering::AcqRel);
        }
        self.process.kick(KICK_CONTROL);
    }

    fn spoil_the_log(&mut self) {
        let log = &self.window.log;
        let at = self.random.below(log.text.len());
        log.text[at].store(self.number(), Ordering::Relaxed);
        let head = match self.random.below(3) {
            0 => self.number(),
            _ => log
                .head
                .load(Ordering::Relaxed)
                .wrapping_add(8 * self.random.below(64) as u64),
        };
        log.head.store(head, Ordering::Release);
    }

    fn spoil_the_user_page(&mut self) {
        let user = &self.window.user;
        let value = self.number();
        match self.random.below(6) {
            0 => user.state.store(value as u32, Ordering::Release),
            1 => user.exit_code.store(value as u32, Ordering::Release),
            2 => user.app[self.random.below(32)].store(value, Ordering::Release),
            3 => user.overhead_bytes.store(value, Ordering::Release),
            4 => user.control.enable.store(value as u32, Ordering::Release),
            // Rarely: a queue that lies elsewhere is given up, and nothing else reaches the control verbs.
            _ if self.random.below(50) == 0 => user.control.desc.store(value, Ordering::Release),
            _ => user.beat.store(value, Ordering::Release),
        }
        self.process.kick(KICK_CONTROL);
    }

    /// What only the host writes is shared memory too.
    fn spoil_any_window_page(&mut self) {
        let value = self.number();
        let (header, events) = (&self.window.header, &self.window.events);
        match self.random.below(5) {
            0 => header.ram_len.store(value, Ordering::Release),
            1 => header.generation.store(value as u32, Ordering::Release),
            2 => events.summary.store(value, Ordering::Release),
            3 => events.qp_fatal[self.random.below(events.qp_fatal.len())]
                .store(value, Ordering::Release),
            _ => self.window.probe.line.store(value, Ordering::Release),
        }
    }
}

mod ram {
    #![allow(
        unsafe_code,
        reason = "looks at all of a session's memory as words, whatever lies there"
    )]

    use std::alloc::Layout;
    use std::sync::atomic::AtomicU64;

    use hyv_verbs::{Platform, Process};

    /// All RAM of the session.
    pub(super) fn words(process: &'static Process) -> &'static [AtomicU64] {
        let piece = process
            .alloc_dma(Layout::new::<[u64; 8]>())
            .expect("64 bytes are left");
        let offset = process
            .ram_offset(piece.as_ptr(), 64)
            .expect("its own memory is shared");
        let base = piece.as_ptr().wrapping_sub(offset as usize);
        // SAFETY: the session's RAM is one mapping of that length, which lives as long as the process object, that is, for
        // ever. Nothing of what the library allocated in it is used again: its owner is forgotten by the caller.
        unsafe { std::slice::from_raw_parts(base.cast::<AtomicU64>(), process.ram_len() / 8) }
    }
}
