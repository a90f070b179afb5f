//! Packets that say anything, with a valid ICRC, at queue pairs that have requests of their own under way.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use hyv_abi::types::QpType;
use hyv_roce::carrier::{Arrival, Carrier, Flow, Gid, Sent};
use hyv_roce::icrc;
use hyv_roce::wire::{
    Aeth, AtomicEth, Bth, Deth, Extension, Layout, Opcode, Operation, Packet, Repr, Reth, Service,
    Syndrome,
};

use super::guest::{self, Path, QKEY, QPS};
use super::{Input, US, World, gid};
use crate::limits::STALE_TIMERS;

/// Whom the hostile queue pairs are connected to, somebody else, and whom both must not disturb.
const PEER: Gid = gid(2);
const STRANGER: Gid = gid(3);
const FRIEND: Gid = gid(4);
/// The peer's first QPN.
const PEER_QPN: u32 = 0x200;
/// Our source port and identification.
const PORT: u16 = 0xc001;
const IDENT: u16 = 5;
/// That of QP 1.
const GSI_QKEY: u32 = 0x8001_0000;
/// Packets of the device's that an input can answer.
const REMEMBERED: usize = 16;
/// Packets that wait at most: what a receive buffer holds.
const MAX_WAITING: usize = 64;

/// What lies between the device and the input.
#[derive(Default)]
struct Net {
    /// Sender, whether the identification is seen, bytes.
    inbox: VecDeque<(Gid, bool, Vec<u8>)>,
    /// What the device said last, the newest first.
    said: VecDeque<(Repr, Gid)>,
    /// Sends that find no room.
    busy: u8,
    /// What must not be sent.
    secrets: Vec<[u8; 8]>,
}

type Shared = Arc<Mutex<Net>>;

fn lock(net: &Shared) -> std::sync::MutexGuard<'_, Net> {
    net.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Port(Shared);

impl Carrier for Port {
    fn local(&self) -> Gid {
        US
    }

    fn link_mtu(&self) -> usize {
        9000
    }

    fn burst(&self, _: &Flow) -> (usize, usize) {
        (8, 40_000)
    }

    fn source_ports(&self) -> (u16, u16) {
        (0xc000, 4)
    }

    fn ident(&self, index: usize) -> u16 {
        index as u16
    }

    fn send(&mut self, flow: &Flow, segment: usize, payloads: &[u8]) -> Sent {
        let mut net = lock(&self.0);
        if net.busy > 0 {
            net.busy -= 1;
            return Sent::Busy;
        }
        assert!(flow.dst == PEER || flow.dst == FRIEND, "sent to a stranger");
        let crc = icrc::Flow::new(&US, &flow.dst, flow.src_port);
        for (i, bytes) in payloads.chunks(segment).enumerate() {
            assert!(i < 8 && bytes.len() <= 4200, "too much for the link");
            assert!(crc.check(bytes, i as u16), "an ICRC of ours is wrong");
            let packet = Packet::new_checked(bytes).expect("a packet of ours parses");
            let repr = packet.repr().expect("a packet of ours parses");
            for secret in &net.secrets {
                assert!(!guest::holds(bytes, *secret), "a secret was sent");
            }
            net.said.push_front((repr, flow.dst));
        }
        net.said.truncate(REMEMBERED);
        Sent::All
    }

    fn receive(&mut self, take: &mut dyn FnMut(&Arrival<'_>)) -> usize {
        let batch: Vec<_> = lock(&self.0).inbox.drain(..).collect();
        for (src, sees_ident, payload) in &batch {
            take(&Arrival {
                src: *src,
                dst: US,
                src_port: PORT,
                traffic_class: 0,
                hop_limit: 64,
                ident: sees_ident.then_some(IDENT),
                payload,
            });
        }
        batch.len()
    }

    fn cheap_poll(&self) -> bool {
        true
    }
    fn takes_company(&self) -> bool {
        true
    }
}

struct Wired {
    world: World,
    net: Shared,
    friend_psn: u32,
}

impl Wired {
    fn new(bytes: &[u8]) -> Self {
        let net = Shared::default();
        let port = Box::new(Port(Arc::clone(&net)));
        let mut world = World::new(bytes, Some(port), Some((PEER, PEER_QPN)));
        lock(&net).secrets = world.guests.iter().map(guest::Guest::marker).collect();
        let friend = world.guests[0].friend;
        world.guests[0]
            .connect(&mut world.e, &friend, &Path::new((FRIEND, 0x300)))
            .expect("the friend's RTS");
        Self {
            world,
            net,
            friend_psn: guest::PSN,
        }
    }

    fn deliver(&self, src: Gid, sees_ident: bool, bytes: Vec<u8>) {
        let mut net = lock(&self.net);
        if net.inbox.len() < MAX_WAITING {
            net.inbox.push_back((src, sees_ident, bytes));
        }
    }

    /// A packet to one of the queue pairs. `who` says from whom to which.
    fn packet(&mut self, input: &mut Input<'_>, who: u8) {
        let (g, q) = (usize::from(who >> 3 & 1), usize::from(who >> 4 & 7));
        let guests = &self.world.guests;
        let (qpn, ty) = match q {
            0..QPS => (guests[g].qps[q].qpn, guests[g].qps[q].ty),
            5 => (guests[0].friend.qpn, QpType::Rc),
            6 => (guests[g].probe.qpn, QpType::Rc),
            _ => (1, QpType::Ud),
        };
        let src = if who & 6 == 6 { STRANGER } else { PEER };
        let service = match ty {
            QpType::Rc => Service::Rc,
            QpType::Uc => Service::Uc,
            QpType::Ud => Service::Ud,
        };
        let (kind, order, how) = (input.or0(), input.or0(), input.or0());
        let all = Opcode::ALL;
        let opcode = if kind < 0xe0 {
            let of = |o: &&Opcode| o.info().service == service;
            let n = all.iter().filter(of).count();
            *all.iter()
                .filter(of)
                .nth(usize::from(kind) % n)
                .expect("below their number")
        } else {
            all[usize::from(kind) % all.len()]
        };
        let info = opcode.info();
        let answers = matches!(
            info.operation,
            Operation::Acknowledge | Operation::ReadResponse | Operation::AtomicAcknowledge
        );
        let psn = if answers {
            self.said_psn(g, q, order)
        } else {
            self.world.e.expected_psn(qpn).unwrap_or(guest::PSN)
        };
        let psn = match order >> 5 {
            6 => psn.wrapping_add(u32::from(order & 0x1f) + 1),
            7 => psn.wrapping_sub(u32::from(order & 0x1f) + 1),
            _ => psn,
        };
        let mut bth = Bth::new(opcode, qpn, psn);
        bth.ack_req = how & 1 != 0;
        bth.solicited = how & 2 != 0;
        if how & 0xc == 0xc {
            bth.pkey = 0x7fff;
        }
        let ext = self.extension(input, info.layout, g);
        let payload = if info.payload {
            let choice = input.or0();
            [256, 0, 8, 32, 33, 1, 512, 1024, 4096, 700][usize::from(choice) % 10]
        } else {
            0
        };
        let mut repr = Repr { bth, ext };
        repr.set_pad(payload);
        let mut bytes = vec![0; repr.buffer_len(payload)];
        repr.emit(&vec![self.world.steps as u8; payload], &mut bytes);
        if how & 0x10 != 0 {
            for _ in 0..input.or0() % 4 {
                let at = usize::from(input.or0()) % bytes.len();
                bytes[at] = input.or0();
            }
        }
        icrc::Flow::new(&src, &US, PORT).seal(&mut bytes, IDENT);
        if how & 0xe0 == 0xe0 {
            // And now it is not valid any more, but for the byte that is not covered.
            let at = usize::from(input.or0()) % bytes.len();
            bytes[at] ^= 1;
        }
        self.deliver(src, how & 0x20 == 0, bytes);
    }

    /// What an answer is to: one of the packets that the queue pair sent last.
    fn said_psn(&self, g: usize, q: usize, order: u8) -> u32 {
        let to = PEER_QPN + (QPS * g + q) as u32;
        let net = lock(&self.net);
        let mut mine = net.said.iter().filter(|(r, _)| r.bth.dest_qpn == to);
        mine.nth(usize::from(order & 7))
            .map_or(guest::PSN, |(r, _)| r.bth.psn)
    }

    fn extension(&self, input: &mut Input<'_>, layout: Layout, g: usize) -> Extension {
        let w = &self.world;
        let imm = 0x0a0b_0c0d;
        let aeth = |input: &mut Input<'_>| Aeth {
            syndrome: Syndrome::from_byte(input.or0()),
            msn: u32::from(input.or0()),
        };
        let deth = |input: &mut Input<'_>| Deth {
            qkey: match input.or0() >> 5 {
                7 => 7,
                6 => GSI_QKEY,
                _ => QKEY,
            },
            reserved: 0,
            src_qpn: PEER_QPN + 3,
        };
        let reth = |input: &mut Input<'_>| {
            let (rkey, address, len) = w.piece(input, g, g);
            let dma_len = match input.or0() {
                0xff => u32::MAX,
                0xfe => 1 << 30,
                n @ 0xf0.. => len.wrapping_sub(u32::from(n & 0xf)),
                n => len + 64 * u32::from(n >> 5),
            };
            Reth {
                address,
                rkey,
                dma_len,
            }
        };
        match layout {
            Layout::None => Extension::None,
            Layout::Imm => Extension::Imm(imm),
            Layout::Ieth => Extension::Ieth(w.key(g, input.or0())),
            Layout::Reth => Extension::Reth(reth(input)),
            Layout::RethImm => Extension::RethImm(reth(input), imm),
            Layout::Aeth => Extension::Aeth(aeth(input)),
            Layout::AethAtomicAck => Extension::AethAtomicAck(aeth(input), 0x77),
            Layout::Atomic => {
                let (rkey, address, compare) = w.piece(input, g, g);
                Extension::Atomic(AtomicEth {
                    address,
                    rkey,
                    swap_add: 0x0101,
                    compare: u64::from(compare & 1),
                })
            }
            Layout::Deth => Extension::Deth(deth(input)),
            Layout::DethImm => Extension::DethImm(deth(input), imm),
        }
    }

    /// A packet of any bytes, with a valid ICRC.
    fn raw(&mut self, input: &mut Input<'_>) {
        let n = usize::from(input.or0()).min(input.0.len());
        let (bytes, rest) = input.0.split_at(n);
        input.0 = rest;
        let mut bytes = bytes.to_vec();
        bytes.extend([0; 4]);
        icrc::Flow::new(&PEER, &US, PORT).seal(&mut bytes, IDENT);
        self.deliver(PEER, true, bytes);
    }

    fn step(&mut self, input: &mut Input<'_>) -> Option<()> {
        if self.world.steps == super::MAX_STEPS {
            return None;
        }
        let who = input.0.first().copied()?;
        if who & 1 == 0 {
            input.byte();
            return self.world.step(input);
        }
        input.byte();
        self.world.steps += 1;
        match who {
            0xff => lock(&self.net).busy = input.or0() % 8,
            0xfd => self.raw(input),
            0xfb => self.befriend(),
            _ => self.packet(input, who),
        }
        if who & 2 == 0 {
            self.world.poll(2);
        }
        if self.world.steps.is_multiple_of(super::CHECK_STEPS) {
            self.world.check();
        }
        Some(())
    }

    /// The friend writes nothing, and is told that it arrived.
    fn befriend(&mut self) {
        let qpn = self.world.guests[0].friend.qpn;
        let psn = self.friend_psn;
        self.friend_psn = (psn + 1) & 0xff_ffff;
        let mut bth = Bth::new(Opcode::RcWriteOnly, qpn, psn);
        bth.ack_req = true;
        let reth = Reth {
            address: 0,
            rkey: 0,
            dma_len: 0,
        };
        let repr = Repr {
            bth,
            ext: Extension::Reth(reth),
        };
        let mut bytes = vec![0; repr.buffer_len(0)];
        repr.emit(&[], &mut bytes);
        icrc::Flow::new(&FRIEND, &US, PORT).seal(&mut bytes, IDENT);
        {
            let mut net = lock(&self.net);
            net.inbox.push_back((FRIEND, true, bytes));
            net.said.clear();
            net.busy = 0;
        }
        let acked = |(r, dst): &(Repr, Gid)| {
            *dst == FRIEND
                && r.bth.psn == psn
                && r.ext.aeth().is_some_and(|a| a.syndrome == Syndrome::ACK)
        };
        for _ in 0..1000 {
            self.world.poll(1);
            if lock(&self.net).said.iter().any(acked) {
                return;
            }
            self.world.pass(1000);
        }
        panic!("the friend's packet {psn:#x} is not acknowledged");
    }
}

/// Peers send, and users ask for, what `bytes` tell them.
///
/// # Panics
/// If anything of what [`crate::checks`] lists does not hold; if a packet of the device's does not parse, has a wrong ICRC or
/// a secret in it; if a queue pair with another peer is disturbed.
pub fn transport(bytes: &[u8]) {
    let mut input = Input(bytes);
    let mut wired = Wired::new(bytes);
    while wired.step(&mut input).is_some() {}
    wired.befriend();
    let slots = wired.world.e.qps.len();
    assert!(wired.world.e.timers() <= 2 * slots + STALE_TIMERS);
    wired.world.end();
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A timer lasts up to hours, a queue pair can be reset 10,000 times a second.
    #[test]
    fn timers_of_connections_that_are_over_do_not_pile_up() {
        let mut it = Wired::new(&[]);
        let w = &mut it.world;
        for _ in 0..1000 {
            let mut path = w.path(0, 0);
            path.timeout = 31;
            w.guests[0].revive(&mut w.e, 0, &path);
            // A WRITE of 8 bytes inline.
            w.step(&mut Input(&[0, 0xa0, 4, 0, 0])).expect("a step");
            w.steps = 0;
            w.pass(1000);
            w.poll(20);
        }
        assert!(it.world.e.device_counters().tx_packets >= 1000);
        assert!(it.world.e.timers() <= 2 * it.world.e.qps.len() + STALE_TIMERS);
    }
}
