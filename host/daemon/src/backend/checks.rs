//! What holds whatever a user writes into its control queue: the fuzz target `control` and the tests over its corpus call the same
//! function.
//!
//! Two users of one device, served as the control thread serves them. One does what the input says; the other means well.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use hyv_abi::control::{
    AllocPd, CmAccept, CmBindAddr, CmCreateId, CmEventKind, CmGetEvent, CmListen, CmParam,
    CreateCq, CreateQp, Empty, HandleReply, MAX_REPLY, MAX_REQUEST, MrReply, Opcode, PortSpace,
    QpReply, QueryDevice, REPLY_HEADER_LEN, REQUEST_HEADER_LEN, RegMr, ReplyHeader, RequestHeader,
    ReregMr, ResizeCq, VERBS, Verb,
};
use hyv_abi::types::{Errno, Reason, VerbError};
use hyv_rnic::thread::Kicks;
use hyv_rnic::{Engine, EngineCell, EngineConfig};
use vm_memory::{Bytes, GuestAddress};
use zerocopy::{FromBytes, IntoBytes};

use super::control::ControlQueue;
use super::memory::RamView;
use super::provider::{Provider, Wake};
use super::rate::TokenBucket;
use super::soft::SoftRnic;
use super::users::{Directory, Turn, User};
use super::{UserKind, UserMemory};
use crate::cm::{Cm, CmConfig, UserKey};
use crate::sys::event::EventFd;
use crate::sys::memory::{Mapping, sealed_memfd};
use crate::sys::window::SharedWindow;

/// Steps of one input: more find nothing new and only take time.
const MAX_STEPS: usize = 256;
/// Bytes of a user's RAM.
const RAM: u64 = 64 << 10;
/// Connection identifiers of a user: few, so that their end is reached.
const MAX_IDS: usize = 6;
/// Requests at once of the one that the input drives.
const BURST: u32 = 200;
/// Entries of a queue.
const SIZE: u16 = 16;
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x1200;
const USED: u64 = 0x1400;
const REQUEST: u64 = 0x1800;
const REPLY: u64 = 0x2000;
/// What is behind it is for the device.
const SAFE: u64 = 0x3000;
/// Port of the listener.
const PORT: u32 = 7174;
const GID: [u8; 16] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 77, 0, 1];

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Nobody sleeps.
struct Awake;

impl Wake for Awake {
    fn wake(&self) {}
}

/// The rest of an input; zeros when there is none.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn or0(&mut self) -> u8 {
        self.byte().unwrap_or(0)
    }

    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        std::array::from_fn(|_| self.or0())
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.bytes())
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.bytes())
    }
}

/// A user and the driver's side of its queue.
struct Side {
    user: User,
    ram: Arc<Mapping>,
    avail: u16,
    used: u16,
    cookie: u64,
}

impl Side {
    fn new(host: &mut Host, key: u64, burst: u32) -> Self {
        const ROOM: &str = "memory and descriptors for a user";
        let fd = sealed_memfd("hyv-check", RAM).expect(ROOM);
        let ram = Arc::new(Mapping::new(&fd, RAM).expect(ROOM));
        let memory = UserMemory {
            window: Arc::new(SharedWindow::create().expect(ROOM)),
            ram: Arc::clone(&ram),
        };
        let wake: Arc<dyn Wake> = Arc::new(Awake);
        let id = host
            .rnic
            .add_user(&memory, Arc::clone(&wake), EventFd::new().expect(ROOM))
            .expect("a place for a user");
        let key = UserKey(key);
        host.cm.add_user(key);
        let window = Arc::clone(&memory.window);
        host.directory.insert(key, id, window, Arc::clone(&wake));
        let user = User {
            key,
            id,
            name: "check".into(),
            kind: UserKind::Process,
            ram: RamView::new(Arc::clone(&ram)).expect(ROOM),
            memory,
            kick_control: EventFd::new().expect(ROOM),
            wake,
            queue: ControlQueue::default(),
            bucket: TokenBucket::new(1000, burst, host.now_ns),
            qpns: HashMap::new(),
            queue_warnings: 0,
        };
        let mut it = Self {
            user,
            ram,
            avail: 0,
            used: 0,
            cookie: 0,
        };
        it.enable();
        it
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.ram.write_at(at, bytes).expect("inside the RAM");
    }

    fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.ram.read_at(at, &mut bytes).expect("inside the RAM");
        bytes
    }

    /// All of its RAM.
    fn all(&self) -> Vec<u8> {
        let mut all = vec![0; RAM as usize];
        let memory = self.user.ram.memory();
        memory
            .read_slice(&mut all, GuestAddress(0))
            .expect("inside the RAM");
        all
    }

    fn enable(&mut self) {
        let c = &self.user.memory.window.user.control;
        for (word, value) in [(&c.desc, DESC), (&c.avail, AVAIL), (&c.used, USED)] {
            word.store(value, Ordering::Relaxed);
        }
        c.size.store(SIZE.into(), Ordering::Relaxed);
        c.enable.store(1, Ordering::Release);
    }

    /// Takes the queue out of service and starts over.
    fn restart(&mut self, host: &mut Host) {
        let control = &self.user.memory.window.user.control;
        control.enable.store(0, Ordering::Release);
        assert_eq!(host.turn(self), Turn::default(), "served and not enabled");
        self.write(AVAIL, &[0; 64]);
        self.write(USED, &[0; 256]);
        (self.avail, self.used) = (0, 0);
        self.enable();
    }

    fn descriptor(&self, i: u16, (addr, len, flags, next): (u64, u32, u16, u16)) {
        let at = DESC + 16 * u64::from(i % SIZE);
        self.write(at, &addr.to_le_bytes());
        self.write(at + 8, &len.to_le_bytes());
        self.write(at + 12, &flags.to_le_bytes());
        self.write(at + 14, &next.to_le_bytes());
    }

    fn make_available(&mut self, head: u16) {
        let slot = AVAIL + 4 + 2 * u64::from(self.avail % SIZE);
        self.write(slot, &head.to_le_bytes());
        self.avail = self.avail.wrapping_add(1);
        self.write(AVAIL + 2, &self.avail.to_le_bytes());
    }

    /// Puts a request there, in two pieces if `split` is inside of it, with `room` bytes for the reply in two pieces.
    fn submit(&mut self, request: &[u8], split: usize, room: u32) {
        let request = &request[..request.len().min(MAX_REQUEST + 64)];
        self.write(REQUEST, request);
        self.write(REPLY, &[0xaa; MAX_REPLY]);
        let (a, b) = (split.min(request.len()), room / 2);
        let rest = (request.len() - a) as u32;
        self.descriptor(0, (REQUEST, a as u32, NEXT, 1));
        self.descriptor(1, (REQUEST + a as u64, rest, NEXT, 2));
        self.descriptor(2, (REPLY, b, NEXT | WRITE, 3));
        self.descriptor(3, (REPLY + u64::from(b), room - b, WRITE, 0));
        self.make_available(0);
    }

    /// The reply to the request just served: how long, header, body.
    fn reply(&mut self, room: u32) -> (usize, Option<ReplyHeader>, Vec<u8>) {
        let at = USED + 4 + 8 * u64::from(self.used % SIZE);
        self.used = self.used.wrapping_add(1);
        let index: [u8; 2] = self.read(USED + 2);
        assert_eq!(u16::from_le_bytes(index), self.used, "one used entry");
        assert_eq!(self.read::<4>(at), [0; 4], "the chain's head");
        let written = u32::from_le_bytes(self.read(at + 4));
        assert!(written <= room, "{written} bytes in room for {room}");
        let bytes: [u8; MAX_REPLY] = self.read(REPLY);
        let (reply, rest) = bytes.split_at(written as usize);
        assert!(rest.iter().all(|b| *b == 0xaa), "behind the reply");
        let Ok((header, body)) = ReplyHeader::read_from_prefix(reply) else {
            assert_eq!(written, 0, "half a header");
            return (0, None, Vec::new());
        };
        assert_eq!(header.len as usize, body.len(), "the body's length");
        (written as usize, Some(header), body.to_vec())
    }

    /// A call of one that means well.
    fn call<V: Verb>(&mut self, host: &mut Host, verb: V) -> Result<V::Reply, VerbError> {
        self.cookie += 1;
        let header = RequestHeader {
            opcode: V::OPCODE as u16,
            version: hyv_abi::ABI_VERSION as u16,
            len: size_of::<V>() as u32,
            cookie: self.cookie,
        };
        let request = [header.as_bytes(), verb.as_bytes()].concat();
        self.submit(&request, usize::MAX, MAX_REPLY as u32);
        let turn = host.turn(self);
        assert_eq!((turn.requests, turn.broken), (1, false));
        let (_, reply, body) = self.reply(MAX_REPLY as u32);
        let reply = reply.expect("room for a header");
        assert_eq!(reply.cookie, self.cookie);
        if reply.status != 0 {
            let (errno, reason) = (reply.status, reply.reason);
            return Err(VerbError::new(
                Errno::from_u32(errno),
                Reason::from_u32(reason),
            ));
        }
        Ok(V::Reply::read_from_bytes(&body).expect("the verb's reply"))
    }
}

/// What the control thread has.
struct Host {
    cell: Arc<EngineCell>,
    rnic: SoftRnic,
    cm: Cm,
    directory: Directory,
    clock: Arc<AtomicU64>,
    now_ns: u64,
}

impl Host {
    fn new() -> Self {
        let clock = Arc::new(AtomicU64::new(1_000_000));
        let time = Arc::clone(&clock);
        let cell = EngineCell::new(Engine::new(EngineConfig {
            clock: Box::new(move || time.load(Ordering::Relaxed)),
            gid: GID,
            node_guid: 1,
            carrier: None,
            mad_bell: Box::new(|| {}),
        }));
        let kicks = Kicks::new().expect("descriptors for the engine");
        let config = CmConfig {
            max_ids: MAX_IDS,
            ..CmConfig::default()
        };
        Self {
            rnic: SoftRnic::new(Arc::clone(&cell), kicks),
            cell,
            cm: Cm::new(config, vec![GID]),
            directory: Directory::default(),
            now_ns: 1_000_000,
            clock,
        }
    }

    /// As the control thread serves a user.
    fn turn(&mut self, side: &mut Side) -> Turn {
        let _ = side.user.take_wake_in();
        self.cm.tick(self.now_ns);
        side.user
            .turn(&mut self.cm, &self.rnic, &self.directory, self.now_ns)
    }

    fn pass(&mut self, ns: u64) {
        self.now_ns += ns;
        self.clock.store(self.now_ns, Ordering::Relaxed);
        if self.cm.next_timeout().is_some_and(|at| at <= self.now_ns) {
            self.cm.handle_timeout(self.now_ns);
            self.directory.apply(&mut self.cm, &self.rnic);
        }
    }

    fn poll(&self, turns: usize) {
        self.cell.control(|e| {
            for _ in 0..turns {
                e.poll();
            }
        });
    }

    fn remove(&mut self, side: Side) {
        let Side { user, ram, .. } = side;
        user.retire(&mut self.cm, &self.rnic, &mut self.directory, self.now_ns);
        assert_eq!(self.cm.ids(user.key), 0, "identifiers are left");
        let id = user.id;
        assert!(self.rnic.device_attr(id).is_err(), "the device knows it");
        let window = Arc::clone(&user.memory.window);
        drop(user);
        assert_eq!(Arc::strong_count(&ram), 1, "the RAM is still referred to");
        assert_eq!(Arc::strong_count(&window), 1, "so is the window");
    }
}

struct World {
    host: Host,
    bad: Side,
    good: Side,
    /// The bad one's queue is as it should be, and the device writes nothing over it.
    clean: bool,
    tame: bool,
    /// Numbers that it was given.
    known: Vec<u32>,
    good_pd: u32,
    good_qpn: u32,
    good_ram: Vec<u8>,
}

impl World {
    fn new() -> Self {
        let mut host = Host::new();
        let bad = Side::new(&mut host, 1, BURST);
        let mut good = Side::new(&mut host, 2, 1_000_000);
        let ok = "a verb of one that means well";
        let good_pd = good.call(&mut host, AllocPd {}).expect(ok).handle;
        let mr = RegMr {
            pd: good_pd,
            access: 0xf,
            iova: 0x7f00_0000_0000,
            ram_offset: SAFE,
            len: RAM - SAFE - 0x4000,
        };
        let mr = good.call(&mut host, mr).expect(ok);
        let cq = CreateCq {
            ring: RAM - 0x1000,
            ctrl: RAM - 0x2000,
            log2: 4,
            reserved: 0,
        };
        let cq = good.call(&mut host, cq).expect(ok).handle;
        let qp = CreateQp {
            pd: good_pd,
            qp_type: 2,
            send_cq: cq,
            recv_cq: cq,
            srq: u32::MAX,
            sig_all: 0,
            sq_ring: RAM - 0x3000,
            rq_ring: RAM - 0x4000,
            sq_log2: 2,
            rq_log2: 2,
            rq_stride: 64,
            reserved: 0,
        };
        let qp = good.call(&mut host, qp).expect(ok);
        let id = CmCreateId {
            port_space: PortSpace::Tcp as u32,
            reserved: 0,
        };
        let id = good.call(&mut host, id).expect(ok).handle;
        let bind = CmBindAddr {
            id,
            port: PORT,
            gid: [0; 16],
        };
        good.call(&mut host, bind).expect(ok);
        good.call(&mut host, CmListen { id, backlog: 2 }).expect(ok);
        let mut it = Self {
            host,
            bad,
            good,
            clean: true,
            tame: true,
            known: vec![mr.handle, mr.rkey, qp.handle, qp.qpn, id, PORT],
            good_pd,
            good_qpn: qp.qpn,
            good_ram: vec![0; RAM as usize],
        };
        it.remember();
        it
    }

    fn remember(&mut self) {
        self.good_ram = self.good.all();
    }

    /// The good one's memory is as it left it.
    fn check(&self) {
        let now = self.good.all();
        assert!(now == self.good_ram, "the other user's RAM changed");
        let c = &self.good.user.memory.window.user.control;
        assert_eq!(c.enable.load(Ordering::Relaxed), 1);
        assert_eq!(c.desc.load(Ordering::Relaxed), DESC);
    }

    /// The good one goes about its business.
    fn good_turn(&mut self, how: u8) {
        self.check();
        let Self { host, good, .. } = self;
        let device = good.call(host, QueryDevice {}).expect("a device");
        assert_eq!(device.max_mr_size, RAM);
        let pd = good.call(host, AllocPd {}).expect("a PD").handle;
        assert_ne!(pd, self.good_pd);
        let verb = hyv_abi::control::DeallocPd { pd };
        assert_eq!(good.call(host, verb), Ok(Empty {}));
        while let Ok(event) = good.call(host, CmGetEvent {}) {
            if event.event == CmEventKind::ConnectRequest as u32 {
                let param = CmParam {
                    qpn: self.good_qpn,
                    ..CmParam::EMPTY
                };
                let id = event.id;
                // The other may have gone meanwhile.
                let _ = if how & 1 == 0 {
                    good.call(host, CmAccept { id, param })
                } else {
                    good.call(host, hyv_abi::control::CmDestroyId { id })
                };
            }
        }
        self.remember();
    }

    /// A field of a request: something small, something known, a place, a limit, or anything.
    fn field(&self, input: &mut Input<'_>) -> u32 {
        const LIMITS: [u32; 16] = [
            u32::MAX,
            1 << 31,
            (1 << 31) - 1,
            PortSpace::Tcp as u32,
            PortSpace::Udp as u32,
            256,
            1024,
            4096,
            0xffff,
            0x1_0000,
            0x1f_ffff,
            RAM as u32,
            RAM as u32 - 64,
            1 << 30,
            0xff_ffff,
            64,
        ];
        let c = input.or0();
        let low = usize::from(c & 0x3f);
        match c {
            0..0x40 => u32::from(c),
            0x40..0x80 => self.known[low % self.known.len()],
            0x80..0xc0 => SAFE as u32 + 0x300 * u32::from(c & 0x3f),
            0xc0..0xf0 => LIMITS[low % LIMITS.len()],
            _ => input.u32(),
        }
    }

    /// A request for one of the verbs.
    fn request(&mut self, input: &mut Input<'_>, opcode: Opcode, len: usize) {
        let mut body: Vec<u8> = Vec::with_capacity(len + 8);
        while body.len() < len && !input.0.is_empty() {
            body.extend(self.field(input).to_le_bytes());
        }
        body.resize(len, 0);
        self.send(input, opcode as u16, &body);
    }

    /// Whether a verb would let the device write over the queue.
    fn is_wild(opcode: u16, body: &[u8]) -> bool {
        fn low<V: Verb>(body: &[u8], of: impl Fn(V) -> u64) -> bool {
            V::read_from_prefix(body).is_ok_and(|(v, _)| of(v) < SAFE)
        }
        match Opcode::from_u16(opcode) {
            Some(Opcode::RegMr) => low(body, |v: RegMr| v.ram_offset),
            Some(Opcode::ReregMr) => low(body, |v: ReregMr| v.ram_offset),
            Some(Opcode::CreateCq) => low(body, |v: CreateCq| v.ring.min(v.ctrl)),
            Some(Opcode::ResizeCq) => low(body, |v: ResizeCq| v.ring),
            _ => false,
        }
    }

    fn send(&mut self, input: &mut Input<'_>, opcode: u16, body: &[u8]) {
        let how = input.or0();
        if !self.clean {
            self.bad.restart(&mut self.host);
            self.clean = true;
        }
        self.bad.cookie += 1;
        let header = RequestHeader {
            opcode,
            version: if how == 0xff {
                9
            } else {
                hyv_abi::ABI_VERSION as u16
            },
            len: if how & 0xf0 == 0xe0 {
                input.u32()
            } else {
                body.len() as u32
            },
            cookie: self.bad.cookie,
        };
        let request = [header.as_bytes(), body].concat();
        let (split, room) = match how & 3 {
            3 => (usize::from(input.or0()), u32::from(input.or0())),
            _ => (REQUEST_HEADER_LEN, MAX_REPLY as u32),
        };
        self.tame &= !Self::is_wild(opcode, body);
        self.bad.submit(&request, split, room);
        let turn = self.host.turn(&mut self.bad);
        if !self.tame {
            self.clean = false;
            return;
        }
        assert_eq!((turn.requests, turn.broken, turn.more), (1, false, false));
        let (written, reply, body) = self.bad.reply(room);
        let Some(reply) = reply else {
            assert!((room as usize) < REPLY_HEADER_LEN, "no reply");
            return;
        };
        assert_eq!(reply.cookie, self.bad.cookie);
        let info = VERBS.iter().find(|v| v.opcode as u16 == opcode);
        if reply.status != 0 {
            assert_eq!(written, REPLY_HEADER_LEN, "a body beside an error");
            return;
        }
        let info = info.expect("a verb that exists");
        assert_eq!(body.len(), info.reply_len, "the reply of {}", info.name);
        let mut learn = |n: &[u32]| {
            self.known.extend_from_slice(n);
            // The latest are the likeliest to be current.
            if self.known.len() > 64 {
                self.known.drain(6..6 + self.known.len() - 64);
            }
        };
        match info.opcode {
            Opcode::CreateQp => {
                if let Ok(qp) = QpReply::read_from_bytes(&body) {
                    learn(&[qp.handle, qp.qpn]);
                }
            }
            Opcode::RegMr | Opcode::ReregMr | Opcode::AllocMw => {
                if let Ok(mr) = MrReply::read_from_bytes(&body) {
                    learn(&[mr.handle, mr.rkey]);
                }
            }
            _ => {
                if let Ok(made) = HandleReply::read_from_bytes(&body)
                    && info.reply_len == size_of::<HandleReply>()
                {
                    learn(&[made.handle]);
                }
            }
        }
    }

    /// A request without a mistake for what others need, so that more of them find something.
    fn build(&mut self, input: &mut Input<'_>, what: u8) {
        let known = |i: u8| {
            let n = self.known.len();
            self.known[n - 1 - usize::from(i) % n.min(8)]
        };
        let (a, b) = (input.or0(), input.or0());
        let place = |i: u8| SAFE + 0x400 * u64::from(i % 40);
        let bytes = |v: &dyn AsRef<[u8]>| v.as_ref().to_vec();
        let (opcode, body) = match what % 5 {
            0 => {
                let verb = CreateCq {
                    ring: place(a),
                    ctrl: place(b),
                    log2: 3,
                    reserved: 0,
                };
                (Opcode::CreateCq, bytes(&verb.as_bytes()))
            }
            1 => {
                let verb = RegMr {
                    pd: known(a),
                    access: u32::from(b & 0x1f) | 1,
                    iova: place(a),
                    ram_offset: place(b),
                    len: 0x1000,
                };
                (Opcode::RegMr, bytes(&verb.as_bytes()))
            }
            2 => {
                let verb = CreateQp {
                    pd: known(a),
                    qp_type: 2 + u32::from(b & 3) % 3,
                    send_cq: known(b >> 2),
                    recv_cq: known(b >> 2),
                    srq: u32::MAX,
                    sig_all: 1,
                    sq_ring: place(a),
                    rq_ring: place(b),
                    sq_log2: 2,
                    rq_log2: 2,
                    rq_stride: 32,
                    reserved: 0,
                };
                (Opcode::CreateQp, bytes(&verb.as_bytes()))
            }
            3 => {
                use hyv_abi::types::{QpAttrMask as M, QpState, QpType};
                let ty = [QpType::Rc, QpType::Uc, QpType::Ud][usize::from(b >> 4) % 3];
                let (from, to) = match b % 3 {
                    0 => (QpState::Reset, QpState::Init),
                    1 => (QpState::Init, QpState::Rtr),
                    _ => (QpState::Rtr, QpState::Rts),
                };
                let masks = hyv_rnic::state::transition(ty, from, to);
                let needs = masks.map_or(M::empty(), |m| m.required);
                let verb = hyv_abi::control::ModifyQp {
                    qp: known(a >> 4),
                    mask: (M::STATE | needs).bits(),
                    attr: hyv_abi::control::QpAttr {
                        state: to as u32,
                        access: 0xf,
                        port_num: 1,
                        path_mtu: 1024,
                        dest_qp_num: known(a),
                        ..hyv_abi::control::QpAttr::EMPTY
                    },
                };
                (Opcode::ModifyQp, bytes(&verb.as_bytes()))
            }
            _ => (Opcode::AllocPd, Vec::new()),
        };
        self.send(input, opcode as u16, &body);
    }

    fn step(&mut self, input: &mut Input<'_>) -> Option<()> {
        let op = input.byte()?;
        match op & 0xf {
            0..=3 => {
                let info = &VERBS[usize::from(input.or0()) % VERBS.len()];
                let (opcode, len) = (info.opcode, info.request_len);
                self.request(input, opcode, len);
            }
            4 => self.build(input, op >> 4),
            5 => {
                // A header and a body of any bytes.
                let (opcode, n) = (input.u16(), usize::from(input.or0()));
                let (body, rest) = input.0.split_at(n.min(input.0.len()));
                input.0 = rest;
                self.send(input, opcode, body);
            }
            6 => {
                // A word of rings, requests and replies.
                let at = DESC + 8 * u64::from(input.u16() % 0x200);
                self.bad.write(at, &input.bytes::<8>());
                self.clean = false;
            }
            7 => {
                let d = input.bytes::<8>();
                let addr = match d[0] & 7 {
                    0..5 => REQUEST + 64 * u64::from(d[1]),
                    5 => RAM - u64::from(d[1]),
                    6 => u64::MAX - u64::from(d[1]),
                    _ => u64::from(d[1]) << (d[0] >> 2),
                };
                let len = u32::from_le_bytes([d[2], d[3], 0, d[4] & 0x81]);
                let flags = u16::from(d[5] & 7);
                let i = u16::from(d[6]);
                self.bad.descriptor(i, (addr, len, flags, u16::from(d[7])));
                self.clean = false;
            }
            8 => {
                self.bad.make_available(u16::from(op >> 4) % (SIZE + 1));
                self.clean = false;
            }
            9 => {
                self.bad.write(AVAIL, &input.bytes::<4>());
                self.clean = false;
            }
            10 => {
                let value = match op >> 4 {
                    0..8 => u64::from(input.u16()),
                    _ => u64::from_le_bytes(input.bytes()),
                };
                let c = &self.bad.user.memory.window.user.control;
                match op >> 4 & 7 {
                    0 => c.desc.store(value, Ordering::Relaxed),
                    1 => c.avail.store(value, Ordering::Relaxed),
                    2 => c.used.store(value, Ordering::Relaxed),
                    3 => c.size.store(value as u32, Ordering::Relaxed),
                    4 => c.enable.store(value as u32 & 3, Ordering::Relaxed),
                    5 => {
                        let word = &self.bad.user.memory.window.user.wake_in_ns;
                        word.store(value, Ordering::Relaxed);
                    }
                    _ => self.bad.enable(),
                }
                self.clean = false;
            }
            11 => {
                let turn = self.host.turn(&mut self.bad);
                assert!(turn.requests <= super::limits::REQUESTS_PER_TURN);
            }
            12 => {
                // Something for the device to do: words in rings, and doorbells.
                let at = SAFE + 8 * (u64::from(input.u16()) % ((RAM - SAFE) / 8));
                self.bad.write(at, &input.bytes::<8>());
                let bells = &self.bad.user.memory.window.doorbells;
                let _ = bells.ring(u32::from(op >> 4));
            }
            13 => self.host.poll(usize::from(input.or0()) + 1),
            14 => self.host.pass(1 << (input.or0() % 36)),
            _ => self.good_turn(op >> 4),
        }
        assert!(self.host.cm.ids(self.bad.user.key) <= MAX_IDS);
        assert!(self.host.cm.ids(self.good.user.key) <= MAX_IDS);
        Some(())
    }
}

/// A user writes into its control queue what `bytes` tell it. What it asks for is answered once, in the room that it gave; the other
/// user's memory stays as it is, and its requests are answered rightly; when both are gone nothing of them is left.
///
/// # Panics
/// If that is not so.
pub fn control(bytes: &[u8]) {
    let mut input = Input(bytes);
    let mut world = World::new();
    for _ in 0..MAX_STEPS {
        if world.step(&mut input).is_none() {
            break;
        }
    }
    world.host.poll(200);
    world.good_turn(0);
    let World {
        mut host,
        bad,
        mut good,
        ..
    } = world;
    host.remove(bad);
    host.poll(200);
    good.call(&mut host, QueryDevice {}).expect("a device");
    host.remove(good);
    // What waits in time goes with it.
    while let Some(at) = host.cm.next_timeout() {
        host.pass(at.saturating_sub(host.now_ns).max(1));
    }
    assert_eq!(host.cell.control(|e| e.held()), 0, "objects are left");
}
