//! The messages (IBA 1.4, 12.6). Offsets are from the first byte behind the MAD's header; private data run to its end.

use crate::{
    carrier::Gid,
    wire::{array, be16, be24, be32, be64, put16, put24, put32, put64},
};

use super::DATA_LEN;

/// Writes private data, or another array, at `at`.
fn put<const N: usize>(b: &mut [u8], at: usize, bytes: &[u8; N]) {
    b[at..at + N].copy_from_slice(bytes);
}

/// Transport service type of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
pub enum TransportType {
    /// Reliable connection.
    Rc = 0,
    /// Unreliable connection.
    Uc = 1,
    /// Reliable datagram.
    Rd = 2,
    /// The extended transport type (XRC) counts.
    Extended = 3,
}

impl TransportType {
    fn from_bits(bits: u8) -> TransportType {
        match bits & 3 {
            0 => TransportType::Rc,
            1 => TransportType::Uc,
            2 => TransportType::Rd,
            _ => TransportType::Extended,
        }
    }
}

/// A path between two ports, as a REQ describes its primary and its alternate one (12.6.5). All zeros where there is none.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Default)]
pub struct Path {
    /// Sender's LID; 0xffff over RoCE with Linux.
    pub local_lid: u16,
    /// Receiver's LID.
    pub remote_lid: u16,
    /// Sender's GID.
    pub local_gid: Gid,
    /// Receiver's GID.
    pub remote_gid: Gid,
    /// Flow label, 20 bits.
    pub flow_label: u32,
    /// Packet rate, encoded, 6 bits.
    pub packet_rate: u8,
    /// Traffic class.
    pub traffic_class: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Service level, 4 bits.
    pub sl: u8,
    /// Both are on one subnet: no GRH is needed (it always is over RoCE).
    pub subnet_local: bool,
    /// Time-out of the sender's queue pair, 5 bits: 4.096 us · 2^n.
    pub local_ack_timeout: u8,
}

impl Path {
    const LEN: usize = 44;

    fn read(b: &[u8]) -> Path {
        let label_rate = be32(b, 36);
        Path {
            local_lid: be16(b, 0),
            remote_lid: be16(b, 2),
            local_gid: array(b, 4),
            remote_gid: array(b, 20),
            flow_label: label_rate >> 12,
            packet_rate: (label_rate & 0x3f) as u8,
            traffic_class: b[40],
            hop_limit: b[41],
            sl: b[42] >> 4,
            subnet_local: b[42] & 8 != 0,
            local_ack_timeout: b[43] >> 3,
        }
    }

    fn write(&self, b: &mut [u8]) {
        put16(b, 0, self.local_lid);
        put16(b, 2, self.remote_lid);
        put(b, 4, &self.local_gid);
        put(b, 20, &self.remote_gid);
        put32(
            b,
            36,
            self.flow_label << 12 | u32::from(self.packet_rate & 0x3f),
        );
        b[40] = self.traffic_class;
        b[41] = self.hop_limit;
        b[42] = self.sl << 4 | u8::from(self.subnet_local) << 3;
        b[43] = self.local_ack_timeout << 3;
    }
}

/// Asks for a connection (12.6.5).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Req {
    /// The sender's name for the connection.
    pub local_comm_id: u32,
    /// Who is called: port space and port with RDMA CM, see [`super::rdma_cm::service_id`].
    pub service_id: u64,
    /// The sender's channel adapter.
    pub local_ca_guid: u64,
    /// Q_Key, of datagram services.
    pub local_qkey: u32,
    /// The sender's queue pair, 24 bits.
    pub local_qpn: u32,
    /// READs and atomics that the sender can answer at once.
    pub responder_resources: u8,
    /// The sender's EE context (RD), 24 bits.
    pub local_eecn: u32,
    /// READs and atomics that the sender will have outstanding at once.
    pub initiator_depth: u8,
    /// The receiver's EE context (RD), 24 bits.
    pub remote_eecn: u32,
    /// How long the sender waits for the answer, 5 bits: 4.096 us · 2^n.
    pub remote_cm_timeout: u8,
    /// Transport.
    pub transport: TransportType,
    /// The sender's queue pair uses end-to-end credits.
    pub flow_control: bool,
    /// First PSN that the **receiver** of this message is to send, 24 bits (12.7.31): the sender's own queue pair expects it.
    pub starting_psn: u32,
    /// How long the receiver is to wait for an answer of the sender, 5 bits.
    pub local_cm_timeout: u8,
    /// Retries of the receiver's queue pair, 3 bits.
    pub retry_count: u8,
    /// Partition key.
    pub pkey: u16,
    /// Path MTU, 4 bits, encoded: 1 is 256, 5 is 4096.
    pub path_mtu: u8,
    /// RD only.
    pub rdc_exists: bool,
    /// RNR retries of the receiver's queue pair, 3 bits; 7 is for ever.
    pub rnr_retry_count: u8,
    /// Retries of CM messages, 4 bits.
    pub max_cm_retries: u8,
    /// The sender's queue pair takes its receives from a shared queue.
    pub srq: bool,
    /// 3 bits; 1 is XRC.
    pub extended_transport: u8,
    /// The path.
    pub primary: Path,
    /// Another one, to fail over to.
    pub alternate: Path,
    /// Private data.
    pub private: [u8; Req::PRIVATE],
}

impl Req {
    /// Bytes of private data.
    pub const PRIVATE: usize = DATA_LEN - 140;

    pub(super) fn read(b: &[u8]) -> Req {
        Req {
            local_comm_id: be32(b, 0),
            service_id: be64(b, 8),
            local_ca_guid: be64(b, 16),
            local_qkey: be32(b, 28),
            local_qpn: be24(b, 32),
            responder_resources: b[35],
            local_eecn: be24(b, 36),
            initiator_depth: b[39],
            remote_eecn: be24(b, 40),
            remote_cm_timeout: b[43] >> 3,
            transport: TransportType::from_bits(b[43] >> 1),
            flow_control: b[43] & 1 != 0,
            starting_psn: be24(b, 44),
            local_cm_timeout: b[47] >> 3,
            retry_count: b[47] & 7,
            pkey: be16(b, 48),
            path_mtu: b[50] >> 4,
            rdc_exists: b[50] & 8 != 0,
            rnr_retry_count: b[50] & 7,
            max_cm_retries: b[51] >> 4,
            srq: b[51] & 8 != 0,
            extended_transport: b[51] & 7,
            primary: Path::read(&b[52..]),
            alternate: Path::read(&b[52 + Path::LEN..]),
            private: array(b, 140),
        }
    }

    pub(super) fn write(&self, b: &mut [u8]) {
        put32(b, 0, self.local_comm_id);
        put64(b, 8, self.service_id);
        put64(b, 16, self.local_ca_guid);
        put32(b, 28, self.local_qkey);
        put24(b, 32, self.local_qpn);
        b[35] = self.responder_resources;
        put24(b, 36, self.local_eecn);
        b[39] = self.initiator_depth;
        put24(b, 40, self.remote_eecn);
        b[43] =
            self.remote_cm_timeout << 3 | (self.transport as u8) << 1 | u8::from(self.flow_control);
        put24(b, 44, self.starting_psn);
        b[47] = self.local_cm_timeout << 3 | self.retry_count & 7;
        put16(b, 48, self.pkey);
        b[50] = self.path_mtu << 4 | u8::from(self.rdc_exists) << 3 | self.rnr_retry_count & 7;
        b[51] = self.max_cm_retries << 4 | u8::from(self.srq) << 3 | self.extended_transport & 7;
        self.primary.write(&mut b[52..]);
        self.alternate.write(&mut b[52 + Path::LEN..]);
        put(b, 140, &self.private);
    }
}

/// Which message an MRA or a REJ answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
pub enum Rejected {
    /// A REQ.
    Req = 0,
    /// A REP.
    Rep = 1,
    /// REJ: none, as it comes from a time-out. MRA: a LAP.
    Other = 2,
    /// Reserved.
    Reserved = 3,
}

impl Rejected {
    fn from_bits(bits: u8) -> Rejected {
        match bits & 3 {
            0 => Rejected::Req,
            1 => Rejected::Rep,
            2 => Rejected::Other,
            _ => Rejected::Reserved,
        }
    }
}

/// Asks for patience (12.6.6).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mra {
    /// The sender's name for the connection.
    pub local_comm_id: u32,
    /// The receiver's.
    pub remote_comm_id: u32,
    /// Which message has come.
    pub message: Rejected,
    /// How long its answer may take, 5 bits: 4.096 us · 2^n.
    pub service_timeout: u8,
    /// Private data.
    pub private: [u8; Mra::PRIVATE],
}

impl Mra {
    /// Bytes of private data.
    pub const PRIVATE: usize = DATA_LEN - 10;

    pub(super) fn read(b: &[u8]) -> Mra {
        Mra {
            local_comm_id: be32(b, 0),
            remote_comm_id: be32(b, 4),
            message: Rejected::from_bits(b[8] >> 6),
            service_timeout: b[9] >> 3,
            private: array(b, 10),
        }
    }

    pub(super) fn write(&self, b: &mut [u8]) {
        put32(b, 0, self.local_comm_id);
        put32(b, 4, self.remote_comm_id);
        b[8] = (self.message as u8) << 6;
        b[9] = self.service_timeout << 3;
        put(b, 10, &self.private);
    }
}

/// Why a connection is refused (12.6.7.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct RejectReason(pub u16);

#[expect(missing_docs, reason = "the specification's names say it")]
impl RejectReason {
    pub const NO_QP: RejectReason = RejectReason(1);
    pub const NO_EEC: RejectReason = RejectReason(2);
    pub const NO_RESOURCES: RejectReason = RejectReason(3);
    pub const TIMEOUT: RejectReason = RejectReason(4);
    pub const UNSUPPORTED: RejectReason = RejectReason(5);
    pub const INVALID_COMM_ID: RejectReason = RejectReason(6);
    pub const INVALID_COMM_INSTANCE: RejectReason = RejectReason(7);
    pub const INVALID_SERVICE_ID: RejectReason = RejectReason(8);
    pub const INVALID_TRANSPORT_TYPE: RejectReason = RejectReason(9);
    pub const STALE_CONNECTION: RejectReason = RejectReason(10);
    pub const RDC_NOT_EXIST: RejectReason = RejectReason(11);
    pub const INVALID_GID: RejectReason = RejectReason(12);
    pub const INVALID_LID: RejectReason = RejectReason(13);
    pub const INVALID_SL: RejectReason = RejectReason(14);
    pub const INVALID_TRAFFIC_CLASS: RejectReason = RejectReason(15);
    pub const INVALID_HOP_LIMIT: RejectReason = RejectReason(16);
    pub const INVALID_PACKET_RATE: RejectReason = RejectReason(17);
    pub const PORT_CM_REDIRECT: RejectReason = RejectReason(24);
    pub const PORT_REDIRECT: RejectReason = RejectReason(25);
    pub const INVALID_MTU: RejectReason = RejectReason(26);
    pub const INSUFFICIENT_RESPONDER_RESOURCES: RejectReason = RejectReason(27);
    pub const CONSUMER_DEFINED: RejectReason = RejectReason(28);
    pub const INVALID_RNR_RETRY: RejectReason = RejectReason(29);
    pub const DUPLICATE_LOCAL_COMM_ID: RejectReason = RejectReason(30);
    pub const INVALID_CLASS_VERSION: RejectReason = RejectReason(31);
    pub const INVALID_FLOW_LABEL: RejectReason = RejectReason(32);
}

/// Refuses a connection (12.6.7).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rej {
    /// The sender's name for the connection; 0 if it has none.
    pub local_comm_id: u32,
    /// The receiver's.
    pub remote_comm_id: u32,
    /// Which message is refused.
    pub message: Rejected,
    /// How many bytes of `info` count, 7 bits.
    pub info_len: u8,
    /// Why.
    pub reason: RejectReason,
    /// What would have been accepted.
    pub info: [u8; Rej::INFO],
    /// Private data.
    pub private: [u8; Rej::PRIVATE],
}

impl Rej {
    /// Bytes of additional reject information.
    pub const INFO: usize = 72;
    /// Bytes of private data.
    pub const PRIVATE: usize = DATA_LEN - 84;

    pub(super) fn read(b: &[u8]) -> Rej {
        Rej {
            local_comm_id: be32(b, 0),
            remote_comm_id: be32(b, 4),
            message: Rejected::from_bits(b[8] >> 6),
            info_len: b[9] >> 1,
            reason: RejectReason(be16(b, 10)),
            info: array(b, 12),
            private: array(b, 84),
        }
    }

    pub(super) fn write(&self, b: &mut [u8]) {
        put32(b, 0, self.local_comm_id);
        put32(b, 4, self.remote_comm_id);
        b[8] = (self.message as u8) << 6;
        b[9] = self.info_len << 1;
        put16(b, 10, self.reason.0);
        put(b, 12, &self.info);
        put(b, 84, &self.private);
    }
}

/// Accepts a connection (12.6.8).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rep {
    /// The sender's name for the connection.
    pub local_comm_id: u32,
    /// The receiver's.
    pub remote_comm_id: u32,
    /// Q_Key, of datagram services.
    pub local_qkey: u32,
    /// The sender's queue pair, 24 bits.
    pub local_qpn: u32,
    /// The sender's EE context (RD), 24 bits.
    pub local_eecn: u32,
    /// First PSN that the **receiver** of this message is to send, 24 bits (12.7.31): the sender's own queue pair expects it.
    pub starting_psn: u32,
    /// READs and atomics that the sender can answer at once.
    pub responder_resources: u8,
    /// READs and atomics that the sender will have outstanding at once.
    pub initiator_depth: u8,
    /// How long the sender takes to acknowledge, 5 bits.
    pub target_ack_delay: u8,
    /// Whether the alternate path is accepted, 2 bits; 0: yes, 1: not supported, 2: refused.
    pub failover: u8,
    /// The sender's queue pair uses end-to-end credits.
    pub flow_control: bool,
    /// RNR retries of the receiver's queue pair, 3 bits; 7 is for ever.
    pub rnr_retry_count: u8,
    /// The sender's queue pair takes its receives from a shared queue.
    pub srq: bool,
    /// The sender's channel adapter.
    pub local_ca_guid: u64,
    /// Private data.
    pub private: [u8; Rep::PRIVATE],
}

impl Rep {
    /// Bytes of private data.
    pub const PRIVATE: usize = DATA_LEN - 36;

    pub(super) fn read(b: &[u8]) -> Rep {
        Rep {
            local_comm_id: be32(b, 0),
            remote_comm_id: be32(b, 4),
            local_qkey: be32(b, 8),
            local_qpn: be24(b, 12),
            local_eecn: be24(b, 16),
            starting_psn: be24(b, 20),
            responder_resources: b[24],
            initiator_depth: b[25],
            target_ack_delay: b[26] >> 3,
            failover: b[26] >> 1 & 3,
            flow_control: b[26] & 1 != 0,
            rnr_retry_count: b[27] >> 5,
            srq: b[27] & 0x10 != 0,
            local_ca_guid: be64(b, 28),
            private: array(b, 36),
        }
    }

    pub(super) fn write(&self, b: &mut [u8]) {
        put32(b, 0, self.local_comm_id);
        put32(b, 4, self.remote_comm_id);
        put32(b, 8, self.local_qkey);
        put24(b, 12, self.local_qpn);
        put24(b, 16, self.local_eecn);
        put24(b, 20, self.starting_psn);
        b[24] = self.responder_resources;
        b[25] = self.initiator_depth;
        b[26] = self.target_ack_delay << 3 | (self.failover & 3) << 1 | u8::from(self.flow_control);
        b[27] = self.rnr_retry_count << 5 | u8::from(self.srq) << 4;
        put64(b, 28, self.local_ca_guid);
        put(b, 36, &self.private);
    }
}

/// Confirms a connection (12.6.9).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rtu {
    /// The sender's name for the connection.
    pub local_comm_id: u32,
    /// The receiver's.
    pub remote_comm_id: u32,
    /// Private data.
    pub private: [u8; Rtu::PRIVATE],
}

impl Rtu {
    /// Bytes of private data.
    pub const PRIVATE: usize = DATA_LEN - 8;

    pub(super) fn read(b: &[u8]) -> Rtu {
        Rtu {
            local_comm_id: be32(b, 0),
            remote_comm_id: be32(b, 4),
            private: array(b, 8),
        }
    }

    pub(super) fn write(&self, b: &mut [u8]) {
        put32(b, 0, self.local_comm_id);
        put32(b, 4, self.remote_comm_id);
        put(b, 8, &self.private);
    }
}

/// Asks for a connection's end (12.6.10).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Dreq {
    /// The sender's name for the connection.
    pub local_comm_id: u32,
    /// The receiver's.
    pub remote_comm_id: u32,
    /// The receiver's queue pair, 24 bits.
    pub remote_qpn: u32,
    /// Private data.
    pub private: [u8; Dreq::PRIVATE],
}

impl Dreq {
    /// Bytes of private data.
    pub const PRIVATE: usize = DATA_LEN - 12;

    pub(super) fn read(b: &[u8]) -> Dreq {
        Dreq {
            local_comm_id: be32(b, 0),
            remote_comm_id: be32(b, 4),
            remote_qpn: be24(b, 8),
            private: array(b, 12),
        }
    }

    pub(super) fn write(&self, b: &mut [u8]) {
        put32(b, 0, self.local_comm_id);
        put32(b, 4, self.remote_comm_id);
        put24(b, 8, self.remote_qpn);
        put(b, 12, &self.private);
    }
}

/// Confirms a connection's end (12.6.11).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Drep {
    /// The sender's name for the connection.
    pub local_comm_id: u32,
    /// The receiver's.
    pub remote_comm_id: u32,
    /// Private data.
    pub private: [u8; Drep::PRIVATE],
}

impl Drep {
    /// Bytes of private data.
    pub const PRIVATE: usize = DATA_LEN - 8;

    pub(super) fn read(b: &[u8]) -> Drep {
        Drep {
            local_comm_id: be32(b, 0),
            remote_comm_id: be32(b, 4),
            private: array(b, 8),
        }
    }

    pub(super) fn write(&self, b: &mut [u8]) {
        put32(b, 0, self.local_comm_id);
        put32(b, 4, self.remote_comm_id);
        put(b, 8, &self.private);
    }
}

/// Asks which datagram queue pair serves a service (12.11.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SidrReq {
    /// The sender's name for the request.
    pub request_id: u32,
    /// Partition key.
    pub pkey: u16,
    /// Who is called.
    pub service_id: u64,
    /// Private data.
    pub private: [u8; SidrReq::PRIVATE],
}

impl SidrReq {
    /// Bytes of private data.
    pub const PRIVATE: usize = DATA_LEN - 16;

    pub(super) fn read(b: &[u8]) -> SidrReq {
        SidrReq {
            request_id: be32(b, 0),
            pkey: be16(b, 4),
            service_id: be64(b, 8),
            private: array(b, 16),
        }
    }

    pub(super) fn write(&self, b: &mut [u8]) {
        put32(b, 0, self.request_id);
        put16(b, 4, self.pkey);
        put64(b, 8, self.service_id);
        put(b, 16, &self.private);
    }
}

/// How a SIDR request ended (12.11.2.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct SidrStatus(pub u8);

#[expect(missing_docs, reason = "the specification's names say it")]
impl SidrStatus {
    pub const VALID: SidrStatus = SidrStatus(0);
    pub const SERVICE_ID_NOT_SUPPORTED: SidrStatus = SidrStatus(1);
    pub const REJECTED: SidrStatus = SidrStatus(2);
    pub const NO_QP: SidrStatus = SidrStatus(3);
    pub const REDIRECT: SidrStatus = SidrStatus(4);
    pub const UNSUPPORTED_VERSION: SidrStatus = SidrStatus(5);
}

/// Names a datagram queue pair, or refuses (12.11.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SidrRep {
    /// The requester's name for the request.
    pub request_id: u32,
    /// How it ended.
    pub status: SidrStatus,
    /// How many bytes of `info` count.
    pub info_len: u8,
    /// The queue pair, 24 bits.
    pub qpn: u32,
    /// Who was called.
    pub service_id: u64,
    /// Its Q_Key.
    pub qkey: u32,
    /// What would have been accepted, or where to go.
    pub info: [u8; SidrRep::INFO],
    /// Private data.
    pub private: [u8; SidrRep::PRIVATE],
}

impl SidrRep {
    /// Bytes of additional information.
    pub const INFO: usize = 72;
    /// Bytes of private data.
    pub const PRIVATE: usize = DATA_LEN - 96;

    pub(super) fn read(b: &[u8]) -> SidrRep {
        SidrRep {
            request_id: be32(b, 0),
            status: SidrStatus(b[4]),
            info_len: b[5],
            qpn: be24(b, 8),
            service_id: be64(b, 12),
            qkey: be32(b, 20),
            info: array(b, 24),
            private: array(b, 96),
        }
    }

    pub(super) fn write(&self, b: &mut [u8]) {
        put32(b, 0, self.request_id);
        b[4] = self.status.0;
        b[5] = self.info_len;
        put24(b, 8, self.qpn);
        put64(b, 12, self.service_id);
        put32(b, 20, self.qkey);
        put(b, 24, &self.info);
        put(b, 96, &self.private);
    }
}

// The specification's sizes of private data (12.6, tables): all messages fill the MAD.
const _: () = {
    assert!(Req::PRIVATE == 92 && 52 + 2 * Path::LEN == 140);
    assert!(Mra::PRIVATE == 222 && Rej::PRIVATE == 148 && Rep::PRIVATE == 196);
    assert!(Rtu::PRIVATE == 224 && Dreq::PRIVATE == 220 && Drep::PRIVATE == 224);
    assert!(SidrReq::PRIVATE == 216 && SidrRep::PRIVATE == 136);
};
