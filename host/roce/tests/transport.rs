//! Requester against responder over a link that loses, doubles and reorders, on a virtual clock.

use std::collections::VecDeque;

use hyv_roce::transport::*;
use hyv_roce::wire::{NakCode, Position};

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

#[derive(Clone, Debug)]
enum Packet {
    Request(Request, Vec<u8>),
    Reply(Reply, Vec<u8>),
}

/// Percentages.
#[derive(Clone, Copy, Debug)]
struct Link {
    loss: u64,
    double: u64,
    reorder: u64,
    /// Messages after which no receive is posted for a while.
    rnr: u64,
}

struct Wire {
    queue: VecDeque<(u64, Packet)>,
}

impl Wire {
    fn put(&mut self, rng: &mut Rng, link: Link, now: u64, p: Packet) {
        if rng.chance(link.loss) {
            return;
        }
        let copies = if rng.chance(link.double) { 2 } else { 1 };
        for _ in 0..copies {
            let late = if rng.chance(link.reorder) {
                rng.below(40_000)
            } else {
                0
            };
            let at = now + 5_000 + late;
            let i = self.queue.partition_point(|(t, _)| *t <= at);
            self.queue.insert(i, (at, p.clone()));
        }
    }
    fn take(&mut self, now: u64) -> Option<Packet> {
        (self.queue.front()?.0 <= now).then(|| self.queue.pop_front().unwrap().1)
    }
}

#[derive(Clone, Debug)]
struct Op {
    message: Message,
    data: Vec<u8>,
}

const MEM: usize = 1 << 16;

/// Runs random messages through; panics if anything is lost, doubled, out of order or different. Gives the request packets sent, and
/// how many it takes.
fn run(seed: u64, link: Link, count: usize) -> (u64, u64) {
    println!("seed {seed} {link:?} count {count}");
    let mut rng = Rng(seed);
    let mtu = 256u32 << rng.below(5);
    let psn = Psn::new(0x100_0000 - rng.below(60) as u32);
    let depth = 1 + rng.below(8) as u32;
    let mut needed = 0;
    let mut q = Requester::new(RequesterConfig {
        qpn: seed as u32,
        psn,
        mtu,
        retry_cnt: 7,
        rnr_retry: 7,
        timeout_ns: Some(4096 << 10),
        max_rd_atomic: depth,
        reliable: true,
    });
    let mut r = Responder::new(ResponderConfig {
        psn,
        mtu,
        max_dest_rd_atomic: depth,
    });
    let mut target: Vec<u8> = (0..MEM).map(|_| rng.next() as u8).collect();
    // What the memory must be when all is done, writes and atomics applied in order; READs see a region that nobody writes.
    let mut model = target.clone();
    let mut todo = VecDeque::new();
    let (mut sent, mut sums) = (Vec::new(), Vec::new());
    for i in 0..count {
        let len = match rng.below(4) {
            0 => rng.below(64) as u32,
            1 => rng.below(u64::from(mtu) * 2 + 1) as u32,
            2 => mtu * rng.below(4) as u32,
            _ => rng.below(20_000) as u32,
        };
        let fence = rng.chance(10);
        let addr = |rng: &mut Rng| Remote {
            addr: rng.below(MEM as u64 / 2 - 20_000),
            rkey: 9,
        };
        let (kind, len) = match rng.below(5) {
            0 | 1 => (MessageKind::Send, len),
            2 => (MessageKind::Write(addr(&mut rng)), len),
            3 => {
                let mut a = addr(&mut rng);
                a.addr += MEM as u64 / 2;
                (MessageKind::Read(a), len)
            }
            _ => (
                MessageKind::Atomic(Remote {
                    addr: MEM as u64 - 8,
                    rkey: 9,
                }),
                8,
            ),
        };
        let mut data: Vec<u8> = (0..len).map(|_| rng.next() as u8).collect();
        match kind {
            MessageKind::Send => sent.push(data.clone()),
            MessageKind::Write(a) => {
                model[a.addr as usize..][..len as usize].copy_from_slice(&data)
            }
            MessageKind::Read(_) => data.fill(0),
            MessageKind::Atomic(_) => {
                let at = MEM - 8;
                let v = u64::from_le_bytes(model[at..].try_into().unwrap());
                sums.push((i, v));
                model[at..].copy_from_slice(&v.wrapping_add(1).to_le_bytes());
                data.fill(0);
            }
        }
        needed += u64::from(match kind {
            MessageKind::Atomic(_) => 1,
            MessageKind::Read(_) => packets(len, mtu).div_ceil(hyv_roce::limits::READ_CHUNK),
            _ => packets(len, mtu),
        });
        todo.push_back(Op {
            message: Message { kind, len, fence },
            data,
        });
    }
    let want_reads: Vec<Vec<u8>> = todo
        .iter()
        .map(|o: &Op| match o.message.kind {
            MessageKind::Read(a) => model[a.addr as usize..][..o.message.len as usize].to_vec(),
            _ => Vec::new(),
        })
        .collect();
    let mut live: VecDeque<Op> = VecDeque::new();
    let mut finished: Vec<Op> = Vec::new();
    let (mut there, mut back) = (
        Wire {
            queue: VecDeque::new(),
        },
        Wire {
            queue: VecDeque::new(),
        },
    );
    let mut received: Vec<Vec<u8>> = Vec::new();
    let mut assembling = Vec::new();
    let (mut now, mut packets_sent) = (0u64, 0u64);
    let mut posted_at = 0;
    while finished.len() < count {
        now += 1_000;
        assert!(
            now < 600_000_000_000,
            "seed {seed}: no progress; {q:?} {r:?}"
        );
        // Requester.
        while let Some(p) = back.take(now) {
            let Packet::Reply(reply, payload) = p else {
                unreachable!()
            };
            match q.on_reply(&reply, now) {
                Effect::Place { index, offset } => {
                    live[index].data[offset as usize..][..payload.len()].copy_from_slice(&payload)
                }
                Effect::Atomic { index, value } => {
                    live[index].data.copy_from_slice(&value.to_le_bytes())
                }
                Effect::Fail { .. } => panic!("seed {seed}: failed by {reply:?} {q:?}"),
                _ => {}
            }
            while q.pop_completed() {
                finished.push(live.pop_front().unwrap());
            }
        }
        if q.deadline().is_some_and(|d| d <= now)
            && let Effect::Fail { .. } = q.on_timer(now)
        {
            panic!("seed {seed}: timed out {q:?}");
        }
        for _ in 0..4 {
            if q.wants_message()
                && let Some(op) = todo.pop_front()
            {
                q.push(op.message);
                live.push_back(op);
            }
            let mark = q.mark();
            let Some(s) = q.next(now) else { break };
            if rng.chance(3) {
                // The carrier was busy.
                q.rewind(&mark);
                let t = q.next(now).unwrap();
                assert_eq!(
                    (t.psn, t.offset, t.len, t.position),
                    (s.psn, s.offset, s.len, s.position)
                );
            }
            let m = &live[s.index];
            let answered = s.kind.is_answered();
            let data = if answered {
                Vec::new()
            } else {
                m.data[s.offset as usize..][..s.len as usize].to_vec()
            };
            let op = match s.kind {
                MessageKind::Send => RequestOp::Send,
                MessageKind::Write(a) => {
                    RequestOp::Write(s.position.begins().then_some((a, m.message.len)))
                }
                MessageKind::Read(a) => RequestOp::Read(a, s.len),
                MessageKind::Atomic(a) => RequestOp::Atomic(a),
            };
            let request = Request {
                psn: s.psn,
                op,
                position: s.position,
                len: data.len() as u32,
                ack_req: s.ack_req,
            };
            packets_sent += 1;
            there.put(&mut rng, link, now, Packet::Request(request, data));
        }
        // Responder.
        while let Some(p) = there.take(now) {
            let Packet::Request(request, payload) = p else {
                unreachable!()
            };
            let Check::Go(go) = r.check(&request) else {
                assert!(!r.is_over());
                continue;
            };
            match go {
                Go::Send { offset } => {
                    if offset == 0 && request.position.begins() && posted_at > now {
                        r.not_ready(1);
                        continue;
                    }
                    if request.position.begins() {
                        assembling.clear();
                        if rng.chance(link.rnr) {
                            posted_at = now + rng.below(100_000);
                        }
                    }
                    assert_eq!(assembling.len(), offset as usize);
                    assembling.extend(&payload);
                    if request.position.ends() {
                        received.push(assembling.clone());
                    }
                    r.accept(&request);
                }
                Go::Write { remote, offset, .. } => {
                    target[remote.addr as usize + offset as usize..][..payload.len()]
                        .copy_from_slice(&payload);
                    r.accept(&request);
                }
                Go::Read { remote, len } => r.accept_read(remote, len),
                Go::Atomic { remote } => {
                    let word = &mut target[remote.addr as usize..][..8];
                    let v = u64::from_le_bytes((&*word).try_into().unwrap());
                    word.copy_from_slice(&v.wrapping_add(1).to_le_bytes());
                    r.accept_atomic(v);
                }
            }
        }
        for _ in 0..6 {
            let Some(a) = r.answer(3) else { break };
            let mut n = 1;
            match a {
                Answer::Ack { psn, .. } => back.put(
                    &mut rng,
                    link,
                    now,
                    Packet::Reply(Reply::Ack { psn }, Vec::new()),
                ),
                Answer::Nak { psn, code, .. } => {
                    assert_eq!(code, NakCode::PsnSequence);
                    back.put(
                        &mut rng,
                        link,
                        now,
                        Packet::Reply(Reply::Nak { psn, code }, Vec::new()),
                    );
                }
                Answer::RnrNak { psn, timer, .. } => back.put(
                    &mut rng,
                    link,
                    now,
                    Packet::Reply(Reply::RnrNak { psn, timer }, Vec::new()),
                ),
                Answer::AtomicValue { psn, value, .. } => back.put(
                    &mut rng,
                    link,
                    now,
                    Packet::Reply(Reply::AtomicValue { psn, value }, Vec::new()),
                ),
                Answer::ReadData {
                    psn,
                    packets,
                    begins,
                    remote,
                    len,
                    ..
                } => {
                    let ends = r.ends(packets);
                    for i in 0..packets {
                        let l = (len - i * mtu).min(mtu);
                        let position = match (begins && i == 0, ends && i + 1 == packets) {
                            (true, true) => Position::Only,
                            (true, false) => Position::First,
                            (false, true) => Position::Last,
                            _ => Position::Middle,
                        };
                        let at = remote.addr as usize + (i * mtu) as usize;
                        let data = target[at..][..l as usize].to_vec();
                        back.put(
                            &mut rng,
                            link,
                            now,
                            Packet::Reply(
                                Reply::ReadData {
                                    psn: psn.add(i),
                                    position,
                                    len: l,
                                },
                                data,
                            ),
                        );
                    }
                    n = packets;
                }
            }
            r.sent(n);
        }
        let next = [
            there.queue.front().map(|q| q.0),
            back.queue.front().map(|q| q.0),
            q.deadline(),
        ];
        if !q.wants_message()
            && !r.has_answer()
            && let Some(t) = next.into_iter().flatten().min()
            && t > now + 10_000
        {
            now = t - 1_000;
        }
    }
    assert_eq!(received, sent, "seed {seed}: messages");
    assert_eq!(target, model, "seed {seed}: memory");
    for (i, op) in finished.iter().enumerate() {
        if let MessageKind::Read(_) = op.message.kind {
            // The last word may be an atomic's.
            assert!(op.data == want_reads[i], "seed {seed}: READ {i}");
        }
    }
    for (i, v) in sums {
        assert_eq!(
            finished[i].data,
            v.to_le_bytes(),
            "seed {seed}: atomic {i} once"
        );
    }
    (packets_sent, needed)
}

#[test]
fn a_clean_link_sends_nothing_twice() {
    for seed in 0..30 {
        let link = Link {
            loss: 0,
            double: 0,
            reorder: 0,
            rnr: 0,
        };
        let (sent, needed) = run(seed, link, 60);
        assert_eq!(sent, needed, "seed {seed}");
    }
}

#[test]
fn whatever_the_link_does_all_arrives_once_and_in_order() {
    for seed in 0..60 {
        let mut rng = Rng(seed ^ 0x5eed);
        let link = Link {
            loss: rng.below(12),
            double: rng.below(10),
            reorder: rng.below(20),
            rnr: rng.below(8),
        };
        let (sent, needed) = run(seed, link, 60);
        assert!(sent >= needed, "seed {seed}");
    }
}
