//! Unreliable datagrams, and QP 1: the datagrams of connection management.

use std::collections::VecDeque;

use hyv_abi::queue::flags;
use hyv_roce::carrier::{Arrival, DEFAULT_HOP_LIMIT, Flow, Gid, Sent};
use hyv_roce::icrc;
use hyv_roce::transport::Psn;
use hyv_roce::wire::grh::{self, Grh};
use hyv_roce::wire::{Bth, Deth, Extension, Opcode, Repr};

use super::qp::source_port;
use super::{Wire, gather};
use crate::engine::Engine;
use crate::exec::datagram::{Datagram, datagram_qkey};
use crate::limits::MAX_MADS;
use crate::mem::Bytes;
use crate::objects::{Ah, Wr};

/// Q_Key of QP 1 (IBA 1.4, 3.5.3.1).
const GSI_QKEY: u32 = 0x8001_0000;
/// Bytes of a MAD.
const MAD_LEN: usize = 256;

/// A datagram of connection management that arrived.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MadArrival {
    /// Sender.
    pub src: Gid,
    /// Its QP.
    pub src_qpn: u32,
    /// The datagram.
    pub mad: Box<[u8; MAD_LEN]>,
}

/// What QP 1 keeps.
#[derive(Default)]
pub(super) struct Mads {
    arrived: VecDeque<MadArrival>,
    leaving: VecDeque<(Gid, u32, Box<[u8; MAD_LEN]>)>,
    psn: Psn,
    /// The bell is to be rung.
    pub bell: bool,
}

impl Mads {
    /// Whether some wait to be sent.
    pub fn waits(&self) -> bool {
        !self.leaving.is_empty()
    }
}

impl Wire {
    /// A packet to QP 1.
    pub(super) fn take_mad(&mut self, a: &Arrival<'_>, repr: &Repr, payload: &[u8]) {
        let Extension::Deth(deth) = repr.ext else {
            self.counters.drops_state += 1;
            return;
        };
        if deth.qkey != GSI_QKEY {
            self.counters.drops_qkey += 1;
            return;
        }
        let Ok(mad) = <[u8; MAD_LEN]>::try_from(payload) else {
            self.counters.drops_malformed += 1;
            return;
        };
        self.counters.rx_packets += 1;
        self.counters.rx_bytes += a.payload.len() as u64;
        if self.mads.arrived.len() == MAX_MADS {
            self.mads.arrived.pop_front();
            self.counters.drops_receive += 1;
        }
        self.mads.arrived.push_back(MadArrival {
            src: a.src,
            src_qpn: deth.src_qpn,
            mad: Box::new(mad),
        });
        self.mads.bell = true;
    }

    /// Sends what waits, as far as the carrier takes it.
    pub(super) fn send_mads(&mut self) {
        while let Some((dst, qpn, mad)) = self.mads.leaving.pop_front() {
            let flow = Flow {
                dst,
                src_port: self.carrier().source_ports().0,
                traffic_class: 0,
                hop_limit: DEFAULT_HOP_LIMIT,
                flow_label: 0,
            };
            let mut repr = Repr {
                bth: Bth::new(Opcode::UdSendOnly, qpn, self.mads.psn.get()),
                ext: Extension::Deth(Deth {
                    qkey: GSI_QKEY,
                    reserved: 0,
                    src_qpn: 1,
                }),
            };
            let crc = icrc::Flow::new(&self.local, &dst, flow.src_port);
            self.burst.begin((1, usize::MAX));
            let ident = self.next_ident();
            self.burst.append(&crc, ident, &mut repr, MAD_LEN, |out| {
                out.copy_from_slice(&*mad)
            });
            let carrier = self.carrier.as_mut().expect("not handing packets over");
            match self.burst.send(carrier.as_mut(), &flow) {
                Sent::Busy => {
                    self.mads.leaving.push_front((dst, qpn, mad));
                    return;
                }
                Sent::All => {
                    self.counters.tx_packets += 1;
                    self.counters.tx_bytes += self.burst.used as u64;
                }
                Sent::Lost => self.counters.tx_dropped += 1,
            }
            self.mads.psn = self.mads.psn.add(1);
        }
    }
}

impl Engine {
    /// Sends a datagram of connection management to a QP of another host, as QP 1 does. It may get lost, as any datagram.
    /// Without a carrier it does.
    pub fn send_mad(&mut self, dst: &Gid, dest_qpn: u32, mad: &[u8; MAD_LEN]) {
        let Some(w) = self.wire.as_mut() else {
            return;
        };
        if w.mads.leaving.len() == MAX_MADS {
            w.counters.tx_dropped += 1;
            return;
        }
        w.mads.leaving.push_back((*dst, dest_qpn, Box::new(*mad)));
        w.send_mads();
    }

    /// The datagrams of connection management that have arrived since the last call.
    pub fn take_mads(&mut self) -> Vec<MadArrival> {
        match self.wire.as_mut() {
            Some(w) => w.mads.arrived.drain(..).collect(),
            None => Vec::new(),
        }
    }

    /// A datagram for a UD QP.
    pub(super) fn datagram(&mut self, slot: usize, a: &Arrival<'_>, repr: &Repr, payload: &[u8]) {
        let Some(deth) = repr.ext.deth() else {
            self.qp_mut(slot).counters.drops_malformed += 1;
            return;
        };
        if deth.qkey != self.qp(slot).attr.qkey {
            self.qp_mut(slot).counters.drops_qkey += 1;
            return;
        }
        let mut area = [0; grh::LEN];
        Grh {
            src: a.src,
            dst: a.dst,
            traffic_class: a.traffic_class,
            flow_label: 0,
            hop_limit: a.hop_limit,
            ident: a.ident.unwrap_or(0),
            packet_len: a.payload.len() as u16,
        }
        .emit(&mut area);
        let what = Datagram {
            src_qpn: deth.src_qpn,
            imm: repr.ext.imm(),
            solicited: repr.bth.solicited,
        };
        self.src.clear();
        self.src.push(Bytes::own(payload));
        if !self.deliver_datagram(slot, &area, payload.len() as u64, &what) {
            self.qp_mut(slot).counters.drops_receive += 1;
        }
    }

    /// Sends the datagram in `self.src` to another host. False if the carrier has no room now.
    pub(crate) fn send_away(
        &mut self,
        slot: usize,
        wr: &Wr,
        imm: Option<u32>,
        ah: &Ah,
        len: usize,
    ) -> bool {
        let Some(mut w) = self.wire.take() else {
            return true;
        };
        let qp = self.qps[slot].as_mut().expect("a live QP's slot");
        let ports = w.carrier().source_ports();
        let flow = Flow {
            dst: ah.dest_gid,
            src_port: source_port(ports, qp.qpn),
            traffic_class: ah.traffic_class,
            hop_limit: ah.hop_limit,
            flow_label: ah.flow_label,
        };
        let deth = Deth {
            qkey: datagram_qkey(wr, qp.attr.qkey),
            reserved: 0,
            src_qpn: qp.qpn,
        };
        let (opcode, ext) = match imm {
            None => (Opcode::UdSendOnly, Extension::Deth(deth)),
            Some(imm) => (Opcode::UdSendOnlyImm, Extension::DethImm(deth, imm)),
        };
        let dest_qpn = (wr.head.remote_addr >> 32) as u32;
        let mut bth = Bth::new(opcode, dest_qpn, qp.datagram_psn);
        bth.solicited = wr.head.flags & flags::SOLICITED != 0;
        let mut repr = Repr { bth, ext };
        let crc = icrc::Flow::new(&w.local, &ah.dest_gid, flow.src_port);
        w.burst.begin((1, usize::MAX));
        let ident = w.next_ident();
        let src = &self.src;
        w.burst
            .append(&crc, ident, &mut repr, len, |out| gather(src, 0, out));
        let carrier = w.carrier.as_mut().expect("not handing packets over");
        let sent = w.burst.send(carrier.as_mut(), &flow);
        match sent {
            Sent::All => {
                qp.counters.tx_packets += 1;
                qp.counters.tx_bytes += w.burst.used as u64;
            }
            Sent::Lost => qp.counters.tx_dropped += 1,
            Sent::Busy => {}
        }
        if sent != Sent::Busy {
            qp.datagram_psn = Psn::new(qp.datagram_psn).add(1).get();
        }
        self.wire = Some(w);
        sent != Sent::Busy
    }
}
