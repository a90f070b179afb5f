//! Every verb as a native process uses it: library, session, control thread and the engine on its own thread.

use std::sync::Arc;
use std::time::Duration;

use hyv_host::backend::soft::SoftRnic;
use hyv_host::backend::{Backend, BackendConfig};
use hyv_host::sys::clock::monotonic_ns;
use hyv_rnic::thread::{EngineThread, Kicks};
use hyv_rnic::{Engine, EngineCell, EngineConfig};
use hyv_verbs::cm::{self, ConnParam};
use hyv_verbs::{
    Access, AhAttr, AsyncEvent, CmEventKind, CompletionQueue, Context, Errno, Error, Gid, Grh,
    MemoryRegion, Payload, Process, ProtectionDomain, QpCaps, QpInitAttr, QpState, QpType,
    QueuePair, RecvWr, Rereg, RtrParams, RtsParams, SendFlags, SendOp, SendWr, SrqCaps, WcOpcode,
    WcStatus, WorkCompletion,
};

const RAM: u64 = 16 << 20;
const GID: [u8; 16] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 9, 8, 7];
const PATIENCE: Duration = Duration::from_secs(20);
const LONG: u32 = 300_000;

struct Host {
    _backend: Backend,
    _engine: EngineThread,
    dir: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        let config = EngineConfig {
            clock: Box::new(monotonic_ns),
            gid: GID,
            node_guid: 1,
            carrier: None,
            mad_bell: Box::new(|| {}),
        };
        let cell = EngineCell::new(Engine::new(config));
        let kicks = Kicks::new().unwrap();
        let spin = Duration::from_micros(50);
        let engine = EngineThread::spawn(cell.clone(), kicks.clone(), spin, || {}).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let config = BackendConfig {
            runtime_dir: Some(dir.path().into()),
            ..BackendConfig::default()
        };
        let backend = Backend::spawn(config, Arc::new(SoftRnic::new(cell, kicks))).unwrap();
        Self {
            _backend: backend,
            _engine: engine,
            dir,
        }
    }

    fn open(&self, name: &str) -> Context {
        Context::open(Process::connect(self.dir.path(), RAM, name).unwrap()).unwrap()
    }
}

/// A process with memory and a completion queue.
struct Side {
    context: Context,
    pd: ProtectionDomain,
    mr: MemoryRegion,
    cq: CompletionQueue,
}

fn everything() -> Access {
    Access::LOCAL_WRITE
        | Access::REMOTE_WRITE
        | Access::REMOTE_READ
        | Access::REMOTE_ATOMIC
        | Access::MW_BIND
}

fn remote() -> Access {
    everything() & !(Access::LOCAL_WRITE | Access::MW_BIND)
}

fn caps() -> QpCaps {
    QpCaps {
        max_send_sge: 2,
        max_inline_data: 64,
        ..QpCaps::default()
    }
}

impl Side {
    fn new(context: Context) -> Self {
        let pd = context.alloc_pd().unwrap();
        Self {
            mr: pd.alloc_mr(2 << 20, everything()).unwrap(),
            cq: context.create_cq(256).unwrap(),
            pd,
            context,
        }
    }

    fn qp(&self, ty: QpType) -> QueuePair {
        let attr = QpInitAttr::new(ty, &self.cq, &self.cq).with_caps(caps());
        self.pd.create_qp_ex(&attr).unwrap()
    }

    fn pair(&self, ty: QpType) -> (QueuePair, QueuePair) {
        let (mut a, mut b) = (self.qp(ty), self.qp(ty));
        join(&mut a, &mut b);
        (a, b)
    }

    fn recv(&self, qp: &mut QueuePair, wr_id: u64, at: u64, len: u32) {
        qp.post_recv(&RecvWr {
            wr_id,
            sges: &[self.mr.sge(at, len)],
        })
        .unwrap();
    }

    /// The next completion.
    fn take(&mut self) -> WorkCompletion {
        take(&mut self.cq)
    }

    /// The next completions: of a send, and of a receive.
    fn both(&mut self) -> (WorkCompletion, WorkCompletion) {
        let (x, y) = (self.take(), self.take());
        assert_ne!(x.is_recv(), y.is_recv(), "{x:?} {y:?}");
        if x.is_recv() { (y, x) } else { (x, y) }
    }

    fn bytes(&self, at: usize, len: usize) -> Vec<u8> {
        let mut to = vec![0; len];
        self.mr.read(at, &mut to).unwrap();
        to
    }
}

fn take(cq: &mut CompletionQueue) -> WorkCompletion {
    let mut out = [WorkCompletion::EMPTY];
    assert_eq!(cq.wait(&mut out, Some(PATIENCE)), Ok(1), "a completion");
    out[0]
}

fn join(a: &mut QueuePair, b: &mut QueuePair) {
    let (qa, qb) = (a.qpn(), b.qpn());
    for (qp, peer) in [(a, qb), (b, qa)] {
        qp.to_init(remote()).unwrap();
        qp.to_rtr(&RtrParams::to(Gid(GID), peer, 0)).unwrap();
        qp.to_rts(&RtsParams::from_psn(0)).unwrap();
    }
}

fn inline(wr_id: u64, op: SendOp, data: &[u8]) -> SendWr<'_> {
    SendWr::new(wr_id, op, Payload::Inline(data))
}

#[test]
fn shared_receives_serve_short_and_long_messages() {
    let host = Host::new();
    let mut s = Side::new(host.open("srq"));
    let caps = SrqCaps {
        max_wr: 8,
        max_sge: 2,
    };
    let mut srq = s.pd.create_srq(&caps).unwrap();
    let mut cqs: Vec<_> = (0..2).map(|_| s.context.create_cq(64).unwrap()).collect();
    let mut pairs = Vec::new();
    for cq in &cqs {
        let mut a = s.qp(QpType::Rc);
        let attr = QpInitAttr::new(QpType::Rc, &s.cq, cq).with_srq(&srq);
        let mut b = s.pd.create_qp_ex(&attr).unwrap();
        join(&mut a, &mut b);
        pairs.push((a, b));
    }
    const SLOT: u64 = 64 << 10;
    let message: Vec<u8> = (0..SLOT as u32).map(|i| (i * 31) as u8).collect();
    s.mr.write(1 << 20, &message).unwrap();
    let post = |srq: &mut hyv_verbs::SharedReceiveQueue, wr_id: u64| {
        let at = wr_id * SLOT;
        let sges = [s.mr.sge(at, 16), s.mr.sge(at + 16, SLOT as u32 - 16)];
        srq.post_recv(&RecvWr { wr_id, sges: &sges })
    };
    for i in 0..8 {
        post(&mut srq, i).unwrap();
    }
    assert!(post(&mut srq, 0).is_err());
    // Both at once, over and over: one long message and several short ones.
    for round in 0..200u64 {
        let long = s.mr.sge(1 << 20, SLOT as u32 - 7);
        let text = round.to_le_bytes();
        let sges = [long];
        let bulk = SendWr::new(1, SendOp::Send, Payload::Sges(&sges)).unsignaled();
        pairs[0].0.post_send(&bulk).unwrap();
        for (k, flags) in [(0, SendFlags::empty()), (1, SendFlags::SIGNALED)] {
            let wr = SendWr {
                flags,
                ..inline(k, SendOp::SendImm(k as u32), &text)
            };
            pairs[1].0.post_send(&wr).unwrap();
        }
        let last = SendWr::new(2, SendOp::Send, Payload::Sges(&sges[..0]));
        pairs[0].0.post_send(&last).unwrap();
        for (cq, qp) in [(0, 0), (1, 1), (1, 1), (0, 0)] {
            let wc = take(&mut cqs[cq]);
            assert!(wc.is_ok() && wc.is_recv(), "{wc:?}");
            assert_eq!(wc.qpn, pairs[qp].1.qpn());
            let at = (wc.wr_id * SLOT) as usize;
            match wc.byte_len {
                0 => {}
                8 => assert_eq!(s.bytes(at, 8), text),
                n => assert_eq!(s.bytes(at, n as usize), message[..n as usize]),
            }
            post(&mut srq, wc.wr_id).unwrap();
        }
        for _ in 0..2 {
            assert!(take(&mut s.cq).is_ok());
        }
    }
    // The limit, waited for by a thread that sleeps.
    srq.set_limit(7).unwrap();
    let context = s.context.clone();
    let waiting = std::thread::spawn(move || context.get_async_event(Some(PATIENCE)));
    pairs[0]
        .0
        .post_send(&inline(3, SendOp::Send, b"a"))
        .unwrap();
    pairs[0]
        .0
        .post_send(&inline(4, SendOp::Send, b"b"))
        .unwrap();
    let limit = AsyncEvent::SrqLimit(srq.index());
    assert_eq!(waiting.join().unwrap(), Ok(Some(limit)));
    assert_eq!(srq.query().unwrap().limit, 0);
    // A queue pair in error takes no more, and says so.
    pairs[1].1.to_err().unwrap();
    let last = AsyncEvent::QpLastWqe(pairs[1].1.index());
    assert_eq!(s.context.get_async_event(Some(PATIENCE)), Ok(Some(last)));
    assert_eq!(srq.destroy(), Err(Error::InUse));
}

/// One thread posts to a shared queue, two poll what was taken of it, two send.
#[test]
fn threads_share_receives() {
    const MESSAGES: u64 = 20_000;
    const SLOTS: u64 = 16;
    let host = Host::new();
    let s = Side::new(host.open("threads"));
    let caps = SrqCaps {
        max_wr: SLOTS as u32,
        max_sge: 1,
    };
    let mut srq = s.pd.create_srq(&caps).unwrap();
    let (free, freed) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        for side in 0..2u64 {
            let mut recv_cq = s.context.create_cq(64).unwrap();
            let mut send_cq = s.context.create_cq(64).unwrap();
            let mut a =
                s.pd.create_qp(&send_cq, &send_cq, &QpCaps::default())
                    .unwrap();
            let attr = QpInitAttr::new(QpType::Rc, &recv_cq, &recv_cq).with_srq(&srq);
            let mut b = s.pd.create_qp_ex(&attr).unwrap();
            join(&mut a, &mut b);
            let (mr, free) = (&s.mr, free.clone());
            scope.spawn(move || {
                for i in 0..MESSAGES {
                    let stamp = (side << 32 | i).to_le_bytes();
                    a.post_send(&inline(i, SendOp::Send, &stamp)).unwrap();
                    if i % 8 == 7 {
                        for _ in 0..8 {
                            assert!(take(&mut send_cq).is_ok());
                        }
                    }
                }
                a
            });
            scope.spawn(move || {
                for i in 0..MESSAGES {
                    let wc = take(&mut recv_cq);
                    assert!(wc.is_ok(), "{wc:?}");
                    let mut stamp = [0; 8];
                    mr.read(wc.wr_id as usize * 64, &mut stamp).unwrap();
                    assert_eq!(u64::from_le_bytes(stamp), side << 32 | i);
                    free.send(wc.wr_id).unwrap();
                }
                b
            });
        }
        drop(free);
        for wr_id in (0..SLOTS).chain(freed) {
            let sges = [s.mr.sge(wr_id * 64, 64)];
            srq.post_recv(&RecvWr { wr_id, sges: &sges }).unwrap();
        }
    });
}

#[test]
fn datagrams_and_unreliable_connections() {
    let host = Host::new();
    let mut s = Side::new(host.open("ud"));
    let (mut a, mut b) = (s.qp(QpType::Ud), s.qp(QpType::Ud));
    a.ready_datagram(0x1234, 1).unwrap();
    b.ready_datagram(0x1234, 2).unwrap();
    let gid = s.context.query_gid(1, 0).unwrap();
    assert_eq!(gid, Gid(GID));
    let attr = AhAttr {
        traffic_class: 0x20,
        ..AhAttr::to(gid)
    };
    let ah = s.pd.create_ah(&attr).unwrap();
    s.recv(&mut b, 1, 0, 4096 + 40);
    let to = ah.to(b.qpn(), 0x1234);
    a.post_send(&inline(2, SendOp::SendImmTo(to, 77), b"datagram"))
        .unwrap();
    let (sent, got) = s.both();
    assert_eq!((sent.wr_id, sent.opcode), (2, WcOpcode::Send));
    assert_eq!((got.wr_id, got.byte_len, got.imm), (1, 48, Some(77)));
    assert_eq!((got.src_qp, got.grh), (a.qpn(), true));
    assert_eq!(s.bytes(40, 8), b"datagram");
    let grh = Grh::parse(&s.bytes(0, 40).try_into().unwrap()).unwrap();
    assert_eq!((grh.src, grh.dest), (gid, gid));
    assert_eq!(grh.traffic_class, 0x20);
    // Back to where it came from.
    let back = s.pd.create_ah(&AhAttr::reply_to(&grh)).unwrap();
    s.recv(&mut a, 3, 8192, 4096 + 40);
    let sges = [s.mr.sge(0, 4096)];
    let reply = SendOp::SendTo(back.to(got.src_qp, 0x1234));
    b.post_send(&SendWr::new(4, reply, Payload::Sges(&sges)))
        .unwrap();
    let (_, got) = s.both();
    assert_eq!((got.byte_len, got.src_qp), (4136, b.qpn()));
    assert_eq!(s.bytes(8192 + 40, 4096), s.bytes(0, 4096));
    // A wrong Q_Key and no receive: the sender learns of neither.
    for qkey in [0x9999, 0x1234] {
        let op = SendOp::SendTo(ah.to(b.qpn(), qkey));
        a.post_send(&inline(5, op, b"gone")).unwrap();
        let wc = s.take();
        assert_eq!((wc.wr_id, wc.status), (5, WcStatus::Success));
    }
    // Longer than the MTU: sends stop, receives do not.
    let sges = [s.mr.sge(0, 4097)];
    let op = SendOp::SendTo(to);
    a.post_send(&SendWr::new(6, op, Payload::Sges(&sges)))
        .unwrap();
    a.post_send(&inline(7, op, b"flushed")).unwrap();
    assert_eq!(s.take().status, WcStatus::LocLenErr);
    assert_eq!(s.take().status, WcStatus::WrFlushErr);
    assert_eq!(a.state(), QpState::Sqe);
    assert_eq!(a.query().unwrap().state, QpState::Sqe as u32);
    s.recv(&mut a, 8, 0, 100);
    b.post_send(&inline(9, reply, b"heard")).unwrap();
    let (_, got) = s.both();
    assert_eq!(got.wr_id, 8);
    a.resume_sends().unwrap();
    s.recv(&mut b, 10, 0, 100);
    a.post_send(&inline(11, op, b"again")).unwrap();
    assert!(s.both().1.is_ok());
    assert!(s.context.counters().unwrap().drops_qkey >= 1);
    let nowhere = AhAttr::to(Gid::from(std::net::Ipv4Addr::new(192, 0, 2, 1)));
    let error = s.pd.create_ah(&nowhere).unwrap_err();
    assert_eq!(error.errno(), Errno::HostUnreach as u32, "{error}");

    let (mut a, mut b) = s.pair(QpType::Uc);
    a.post_send(&inline(1, SendOp::Send, b"nobody")).unwrap();
    assert!(s.take().is_ok());
    s.recv(&mut b, 2, 0, 64);
    let write = SendOp::WriteImm(s.mr.remote(4096), 5);
    a.post_send(&inline(3, write, b"placed")).unwrap();
    let (_, got) = s.both();
    assert_eq!((got.opcode, got.imm), (WcOpcode::RecvRdmaWithImm, Some(5)));
    assert_eq!(s.bytes(4096, 6), b"placed");
    assert!(a.counters().unwrap().work_requests >= 2);
}

#[test]
fn windows_open_and_close_parts_of_regions() {
    let host = Host::new();
    let mut s = Side::new(host.open("mw"));
    let (mut a, mut b) = s.pair(QpType::Rc);
    let region = s.pd.alloc_mr(8192, everything()).unwrap();
    let mut window = s.pd.alloc_mw().unwrap();
    let access = Access::REMOTE_WRITE;
    let part = (&region, 1000, 100);
    let key = b
        .bind_mw(&mut window, 1, part, access, SendFlags::SIGNALED)
        .unwrap();
    let wc = s.take();
    assert_eq!(
        (wc.opcode, wc.status),
        (WcOpcode::BindMw, WcStatus::Success)
    );
    let at = |offset: u64, rkey: u32| {
        let addr = region.addr() + offset;
        SendOp::Write(hyv_verbs::RemoteAddr { addr, rkey })
    };
    a.post_send(&inline(2, at(1096, key), b"edge")).unwrap();
    assert!(s.take().is_ok());
    let mut now = [0; 4];
    region.read(1096, &mut now).unwrap();
    assert_eq!(&now, b"edge");
    // The peer gives it back with its last word.
    s.recv(&mut b, 3, 0, 64);
    a.post_send(&inline(4, SendOp::SendInv(key), b"done"))
        .unwrap();
    let (_, got) = s.both();
    assert_eq!((got.invalidated_rkey, got.imm), (Some(key), None));
    // Bound again, and taken back by its owner; what comes later is refused.
    let key = b
        .bind_mw(&mut window, 5, part, access, SendFlags::SIGNALED)
        .unwrap();
    assert!(s.take().is_ok());
    b.post_send(&SendWr::local_inv(6, key)).unwrap();
    assert_eq!(s.take().opcode, WcOpcode::LocalInv);
    a.post_send(&inline(7, at(1000, key), b"late")).unwrap();
    let wc = s.take();
    assert_eq!((wc.wr_id, wc.status), (7, WcStatus::RemAccessErr));
    assert_eq!(a.state(), QpState::Err);
    let mut events = Vec::new();
    while events.len() < 2 {
        let event = s.context.get_async_event(Some(PATIENCE)).unwrap();
        events.push(event.expect("the responder's and the requester's events"));
        if events.contains(&AsyncEvent::QpAccessError(b.index())) {
            break;
        }
    }
    assert!(events.contains(&AsyncEvent::QpAccessError(b.index())));
    // A region that windows are bound to goes with the last of them.
    let (_c, mut d) = s.pair(QpType::Rc);
    d.bind_mw(&mut window, 8, part, access, SendFlags::SIGNALED)
        .unwrap();
    assert!(s.take().is_ok());
    let lkey = region.lkey();
    let error = region.deregister_now().unwrap_err();
    assert_eq!(error.errno(), Errno::Busy as u32);
    window.dealloc_now().unwrap();
    let sges = [hyv_verbs::Sge {
        addr: s.mr.addr(),
        len: 8,
        lkey,
    }];
    d.post_send(&SendWr::new(9, SendOp::Send, Payload::Sges(&sges)))
        .unwrap();
    assert_eq!(s.take().status, WcStatus::LocProtErr, "its key is none");
}

#[test]
fn regions_are_registered_anew() {
    let host = Host::new();
    let mut s = Side::new(host.open("rereg"));
    let (mut a, _b) = s.pair(QpType::Rc);
    let mut region = s.pd.alloc_mr(4096, everything()).unwrap();
    region.write(0, b"before").unwrap();
    let old = region.remote(0);
    region
        .rereg(&Rereg {
            access: Some(Access::LOCAL_WRITE | Access::REMOTE_READ),
            len: Some(LONG as usize),
            pd: None,
        })
        .unwrap();
    region.write(LONG as usize - 5, b"after").unwrap();
    let last = region.remote(u64::from(LONG) - 5);
    let sges = [s.mr.sge(0, 5)];
    let read = |op| SendWr::new(1, op, Payload::Sges(&sges));
    a.post_send(&read(SendOp::Read(last))).unwrap();
    assert!(s.take().is_ok());
    assert_eq!(s.bytes(0, 5), b"after");
    let none = Rereg {
        len: Some(0),
        ..Rereg::default()
    };
    assert!(region.rereg(&none).is_err());
    a.post_send(&read(SendOp::Read(last))).unwrap();
    assert!(s.take().is_ok(), "a refused change changes nothing");
    a.post_send(&read(SendOp::Read(old))).unwrap();
    assert_eq!(s.take().status, WcStatus::RemAccessErr, "the old key");
}

#[test]
fn queues_are_resized_under_load() {
    let host = Host::new();
    let mut s = Side::new(host.open("resize"));
    let big = QpCaps {
        max_send_wr: 128,
        ..caps()
    };
    let mut cq = s.context.create_cq(512).unwrap();
    let mut a = s.pd.create_qp(&cq, &s.cq, &big).unwrap();
    let mut b = s.qp(QpType::Rc);
    join(&mut a, &mut b);
    let write = |id| inline(id, SendOp::Write(s.mr.remote(0)), b"resize");
    let (mut posted, mut seen) = (0u64, 0u64);
    for round in 0..300u32 {
        while posted < seen + 128 && a.post_send(&write(posted)).is_ok() {
            posted += 1;
        }
        // While the engine completes.
        cq.resize([128, 1000, 300, 150][round as usize % 4])
            .unwrap();
        for _ in 0..100 {
            let wc = take(&mut cq);
            assert_eq!((wc.wr_id, wc.status), (seen, WcStatus::Success));
            seen += 1;
        }
    }
    while seen < posted {
        assert_eq!(take(&mut cq).wr_id, seen);
        seen += 1;
    }
    for id in 0..64 {
        a.post_send(&write(id)).unwrap();
    }
    s.recv(&mut a, 1, 0, 64);
    b.post_send(&inline(9, SendOp::Send, b"order")).unwrap();
    // All of a's are done once b's message was answered by its completions.
    assert!(take(&mut s.cq).is_ok() && take(&mut s.cq).is_ok());
    let mut out = [WorkCompletion::EMPTY; 64];
    let mut n = 0;
    while n < 64 {
        n += cq.wait(&mut out[n..], Some(PATIENCE)).unwrap();
    }
}

#[test]
fn one_place_to_wait_for_many_queues() {
    let host = Host::new();
    let s = Side::new(host.open("channel"));
    let channel = s.context.create_comp_channel();
    let mut queues: Vec<_> = (0..5)
        .map(|_| s.context.create_cq_on(64, &channel).unwrap())
        .collect();
    let mut pairs: Vec<_> = queues
        .iter()
        .map(|cq| {
            let mut a = s.qp(QpType::Rc);
            let attr = QpInitAttr::new(QpType::Rc, cq, cq).with_caps(caps());
            let mut b = s.pd.create_qp_ex(&attr).unwrap();
            join(&mut a, &mut b);
            for i in 0..60 {
                s.recv(&mut b, i, 0, 64);
            }
            (a, b)
        })
        .collect();
    for cq in &mut queues {
        cq.req_notify(true);
    }
    // Another thread sends, the last message of each queue solicited.
    let sending = std::thread::spawn(move || {
        for i in 0..60u64 {
            for (a, _) in &mut pairs {
                let flags = if i == 59 {
                    SendFlags::SOLICITED
                } else {
                    SendFlags::empty()
                };
                let wr = inline(i, SendOp::Send, b"m").unsignaled();
                a.post_send(&wr.with_flags(flags)).unwrap();
            }
        }
        pairs
    });
    let mut heard = vec![0; queues.len()];
    while heard.iter().any(|n| *n < 60) {
        let index = channel
            .get_event(Some(PATIENCE))
            .unwrap()
            .expect("an event");
        let at = queues.iter().position(|cq| cq.index() == index).unwrap();
        let mut out = [WorkCompletion::EMPTY; 64];
        let n = queues[at].poll(&mut out);
        assert_eq!(n, 60, "nothing before the solicited one raises an event");
        heard[at] += n;
    }
    drop(sending.join().unwrap());
}

#[test]
fn a_datagram_service_is_found_by_its_port() {
    let host = Host::new();
    let mut s = Side::new(host.open("server"));
    let mut c = Side::new(host.open("client"));
    const PORT: u16 = 4321;
    let gone = cm::find_datagram(&c.context, (Gid(GID), PORT), b"", PATIENCE).unwrap_err();
    assert!(
        matches!(
            gone,
            Error::Rejected {
                reason: cm::RejectReason::NoListener,
                ..
            }
        ),
        "{gone}"
    );
    let (_listener, channel) = cm::listen_datagram(&s.context, (Gid::LOCAL, PORT), 4).unwrap();
    let serving = std::thread::spawn(move || {
        let mut qp = s.qp(QpType::Ud);
        qp.ready_datagram(0x55, 0).unwrap();
        s.recv(&mut qp, 1, 0, 256);
        let mut event = channel.get_event(Some(PATIENCE)).unwrap().unwrap();
        assert_eq!(event.kind, CmEventKind::ConnectRequest);
        assert!(event.private_data().starts_with(b"who serves?"));
        let mut id = event.take_request().unwrap();
        id.use_qp(&qp);
        let param = ConnParam {
            private_data: b"I do",
            qkey: 0x55,
            ..ConnParam::default()
        };
        id.accept(&param).unwrap();
        let got = s.take();
        assert_eq!((got.wr_id, got.byte_len), (1, 45));
        let grh = Grh::parse(&s.bytes(0, 40).try_into().unwrap()).unwrap();
        let ah = s.pd.create_ah(&AhAttr::reply_to(&grh)).unwrap();
        let to = ah.to(got.src_qp, 0x66);
        qp.post_send(&inline(2, SendOp::SendTo(to), &s.bytes(40, 5)))
            .unwrap();
        assert!(s.take().is_ok());
    });
    let addr = std::net::Ipv4Addr::new(10, 9, 8, 7);
    let service = cm::find_datagram(&c.context, (addr, PORT), b"who serves?", PATIENCE).unwrap();
    assert!(service.private_data.starts_with(b"I do"));
    let mut qp = c.qp(QpType::Ud);
    qp.ready_datagram(0x66, 0).unwrap();
    c.recv(&mut qp, 1, 0, 256);
    let ah = c.pd.create_ah(&service.peer.addr).unwrap();
    let op = SendOp::SendTo(ah.to(service.peer.qpn, service.peer.qkey));
    qp.post_send(&inline(2, op, b"hello")).unwrap();
    let (_, got) = c.both();
    assert_eq!(c.bytes(40, got.byte_len as usize - 40), b"hello");
    serving.join().unwrap();
}
