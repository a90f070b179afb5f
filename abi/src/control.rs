//! Control verbs: requests and replies on the control virtqueue.
//!
//! A request is one descriptor chain: device-readable bytes ([`RequestHeader`], then the verb's body), then
//! device-writable bytes ([`ReplyHeader`], then room for the reply's body). A longer request body than the
//! verb's is accepted (a later version's fields are ignored), a shorter one is not. All integers are little-endian.
//!
//! Handles are `u32`: an index (low 16 bits) and a generation (high 16 bits), valid for one user.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of the largest request, header included.
pub const MAX_REQUEST: usize = 512;
/// Bytes of the largest reply, header included.
pub const MAX_REPLY: usize = 512;
/// Private data of a connection request (RDMA CM: 92 bytes less the 36 of its header).
pub const MAX_PRIVATE_REQ: usize = 56;
/// Private data of an accept.
pub const MAX_PRIVATE_REP: usize = 196;
/// Private data of a reject.
pub const MAX_PRIVATE_REJ: usize = 148;
/// Private data of a datagram's request (SIDR_REQ: 216 bytes less the 36 of the header).
pub const MAX_PRIVATE_SIDR_REQ: usize = 180;
/// Private data of the answer to it, yes or no (SIDR_REP).
pub const MAX_PRIVATE_SIDR_REP: usize = 136;
/// Room for private data in every message.
pub const PRIVATE_LEN: usize = 196;

/// Starts every request.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RequestHeader {
    /// Which verb; [`Opcode`].
    pub opcode: u16,
    /// [`crate::ABI_VERSION`].
    pub version: u16,
    /// Bytes of the body.
    pub len: u32,
    /// Comes back in the reply.
    pub cookie: u64,
}

/// Starts every reply.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ReplyHeader {
    /// 0, or a [`crate::types::Errno`].
    pub status: u32,
    /// A [`crate::types::Reason`].
    pub reason: u32,
    /// Bytes of the body; 0 with an error.
    pub len: u32,
    /// 0.
    pub reserved: u32,
    /// The request's.
    pub cookie: u64,
}

/// Bytes of a [`RequestHeader`].
pub const REQUEST_HEADER_LEN: usize = size_of::<RequestHeader>();
/// Bytes of a [`ReplyHeader`].
pub const REPLY_HEADER_LEN: usize = size_of::<ReplyHeader>();

/// A control verb's request: knows its number and what answers it.
pub trait Verb: FromBytes + IntoBytes + Immutable + KnownLayout + Copy {
    /// Which verb.
    const OPCODE: Opcode;
    /// The reply's body.
    type Reply: FromBytes + IntoBytes + Immutable + KnownLayout + Copy;
}

/// One line of the table.
#[derive(Clone, Copy, Debug)]
pub struct VerbInfo {
    /// Its number.
    pub opcode: Opcode,
    /// Its name.
    pub name: &'static str,
    /// What it does.
    pub doc: &'static str,
    /// Bytes of the request's body.
    pub request_len: usize,
    /// Bytes of the reply's body.
    pub reply_len: usize,
}

macro_rules! verbs {
    ($($num:literal $name:ident => $reply:ident, $doc:literal;)*) => {
        /// The control verbs.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
        #[repr(u16)]
        pub enum Opcode { $(#[doc = $doc] $name = $num,)* }

        impl Opcode {
            /// The verb a number stands for, if any.
            #[must_use]
            pub const fn from_u16(v: u16) -> Option<Self> {
                match v { $($num => Some(Self::$name),)* _ => None }
            }
        }

        /// The table of control verbs: the contract, its documentation, and what tests go through.
        pub const VERBS: &[VerbInfo] = &[$(VerbInfo {
            opcode: Opcode::$name,
            name: stringify!($name),
            doc: $doc,
            request_len: size_of::<$name>(),
            reply_len: size_of::<$reply>(),
        },)*];

        $(impl Verb for $name { const OPCODE: Opcode = Opcode::$name; type Reply = $reply; })*

        const _: () = {
            $(assert!(REQUEST_HEADER_LEN + size_of::<$name>() <= MAX_REQUEST);
              assert!(REPLY_HEADER_LEN + size_of::<$reply>() <= MAX_REPLY);)*
        };
    };
}

// Numbers are never reused. 1-9 device, 10-19 PD and MR, 20-29 CQ, 30-39 QP, 40-49 SRQ, 50-59 AH and MW, 60-79 CM.
verbs! {
    1 QueryDevice => DeviceAttr, "What the device can do (ibv_query_device).";
    2 QueryPort => PortAttr, "State of a port (ibv_query_port).";
    3 QueryGid => GidReply, "A GID of a port (ibv_query_gid).";
    4 QueryPkey => PkeyReply, "A P_Key of a port (ibv_query_pkey).";
    5 QueryCounters => Counters, "Packets, retransmissions, NAKs and drops of the device, of this user or of one QP.";
    10 AllocPd => HandleReply, "Make a protection domain (ibv_alloc_pd).";
    11 DeallocPd => Empty, "Drop a protection domain that nothing uses (ibv_dealloc_pd).";
    12 RegMr => MrReply, "Register memory (ibv_reg_mr_iova).";
    13 DeregMr => Empty, "Deregister memory: its keys stop working before this returns (ibv_dereg_mr).";
    14 ReregMr => MrReply, "Change a region's memory, PD or access; its keys change with it (ibv_rereg_mr).";
    20 CreateCq => HandleReply, "Make a completion queue in the user's RAM (ibv_create_cq).";
    21 DestroyCq => Empty, "Drop a completion queue that no QP uses (ibv_destroy_cq).";
    22 ResizeCq => Empty, "Move a completion queue to another ring; what was not polled moves along (ibv_resize_cq).";
    30 CreateQp => QpReply, "Make a queue pair in the user's RAM (ibv_create_qp).";
    31 ModifyQp => Empty, "Move a queue pair through its states (ibv_modify_qp).";
    32 QueryQp => QpAttr, "A queue pair's attributes and state (ibv_query_qp).";
    33 DestroyQp => Empty, "Drop a queue pair: the device touches its rings no more once this returns (ibv_destroy_qp).";
    40 CreateSrq => HandleReply, "Make a shared receive queue in the user's RAM (ibv_create_srq).";
    41 ModifySrq => Empty, "Arm the limit event of a shared receive queue (ibv_modify_srq).";
    42 QuerySrq => SrqAttr, "A shared receive queue's attributes (ibv_query_srq).";
    43 DestroySrq => Empty, "Drop a shared receive queue that no QP uses (ibv_destroy_srq).";
    50 CreateAh => HandleReply, "Make an address handle for datagrams (ibv_create_ah).";
    51 DestroyAh => Empty, "Drop an address handle (ibv_destroy_ah).";
    55 AllocMw => MrReply, "Make a memory window of type 2, not bound yet (ibv_alloc_mw).";
    56 DeallocMw => Empty, "Drop a memory window; its key stops working (ibv_dealloc_mw).";
    60 CmCreateId => HandleReply, "Make a connection identifier (rdma_create_id).";
    61 CmDestroyId => Empty, "Drop a connection identifier; it disconnects first (rdma_destroy_id).";
    62 CmBindAddr => CmAddr, "Give an identifier a local address and port, 0 for any (rdma_bind_addr).";
    63 CmListen => Empty, "Listen on the bound port (rdma_listen).";
    64 CmResolveAddr => Empty, "Find the way to an address; answers with an event (rdma_resolve_addr).";
    65 CmResolveRoute => Empty, "Find the route; answers with an event (rdma_resolve_route).";
    66 CmConnect => Empty, "Ask for a connection; answers with an event (rdma_connect).";
    67 CmAccept => Empty, "Accept a connection request (rdma_accept).";
    68 CmReject => Empty, "Reject a connection request (rdma_reject).";
    69 CmEstablish => Empty, "The connecting side's QP is ready to send (the RTU).";
    70 CmDisconnect => Empty, "End a connection; both QPs go to error (rdma_disconnect).";
    71 CmGetEvent => CmEvent, "Take the oldest event, EAGAIN if there is none (rdma_get_cm_event).";
}

macro_rules! body {
    ($(#[$doc:meta])* $name:ident { $($(#[$fdoc:meta])* $field:ident: $ty:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        pub struct $name { $($(#[$fdoc])* pub $field: $ty,)* }
    };
}

body! {
    /// Nothing.
    Empty {}
}
body! {
    /// A new object.
    HandleReply {
        /// Its handle.
        handle: u32,
        /// 0.
        reserved: u32,
    }
}
body! {
    /// Ask for [`DeviceAttr`].
    QueryDevice {}
}
body! {
    /// Ask for [`PortAttr`].
    QueryPort {
        /// Port, from 1.
        port: u32,
    }
}
body! {
    /// Ask for a GID.
    QueryGid {
        /// Port, from 1.
        port: u32,
        /// Index in the port's table.
        index: u32,
    }
}
body! {
    /// Ask for a P_Key.
    QueryPkey {
        /// Port, from 1.
        port: u32,
        /// Index in the port's table.
        index: u32,
    }
}
body! {
    /// A P_Key.
    PkeyReply {
        /// 0xffff is the default partition, full member.
        pkey: u32,
        /// 0.
        reserved: u32,
    }
}
body! {
    /// Ask for [`Counters`].
    QueryCounters {
        /// [`CounterScope`].
        scope: u32,
        /// QP handle for [`CounterScope::Qp`].
        handle: u32,
    }
}
body! {
    /// What happened since the device, the user or the QP was made. Packets are those on the wire; what stays in memory
    /// on one host has none and shows in `work_requests`, `bytes` and `rnr_waits`.
    Counters {
        /// Send work requests completed, with success or not.
        work_requests: u64,
        /// Payload bytes of messages moved.
        bytes: u64,
        /// Work requests that ended in an error.
        errors: u64,
        /// Times that a work request on this host waited for a receive.
        rnr_waits: u64,
        /// Packets sent.
        tx_packets: u64,
        /// Bytes sent, from BTH to ICRC.
        tx_bytes: u64,
        /// Packets received that belong here.
        rx_packets: u64,
        /// Bytes received, from BTH to ICRC.
        rx_bytes: u64,
        /// Request packets sent again.
        retransmissions: u64,
        /// Times that an ACK did not come in time.
        timeouts: u64,
        /// Packets that the carrier could not take.
        tx_dropped: u64,
        /// Request packets received again.
        duplicates: u64,
        /// Responses outside what was outstanding (ghost ACKs).
        ghosts: u64,
        /// RNR NAKs sent.
        rnr_naks_sent: u64,
        /// RNR NAKs received.
        rnr_naks_received: u64,
        /// PSN sequence NAKs sent.
        sequence_naks_sent: u64,
        /// PSN sequence NAKs received.
        sequence_naks_received: u64,
        /// Invalid-request NAKs sent.
        invalid_naks_sent: u64,
        /// Invalid-request NAKs received.
        invalid_naks_received: u64,
        /// Remote-access NAKs sent.
        access_naks_sent: u64,
        /// Remote-access NAKs received.
        access_naks_received: u64,
        /// Remote-operational NAKs sent.
        operational_naks_sent: u64,
        /// Remote-operational NAKs received.
        operational_naks_received: u64,
        /// Packets whose ICRC was wrong.
        icrc_errors: u64,
        /// Packets too short, too long or with nonsense in their headers.
        drops_malformed: u64,
        /// Packets for a QP that does not exist.
        drops_no_qp: u64,
        /// Packets that the QP's type or state does not take.
        drops_state: u64,
        /// Packets from an address that is not the QP's peer.
        drops_source: u64,
        /// Packets of a partition that the QP is not in.
        drops_pkey: u64,
        /// Datagrams with a wrong Q_Key.
        drops_qkey: u64,
        /// Datagrams and unreliable messages without a receive, or longer than it.
        drops_receive: u64,
        /// Unreliable packets out of order.
        drops_order: u64,
    }
}
body! {
    /// Limits of the device, as `struct ibv_device_attr`.
    DeviceAttr {
        /// Node GUID.
        node_guid: u64,
        /// Bytes of the largest memory region.
        max_mr_size: u64,
        /// Bytes that this user may register.
        max_mr_bytes: u64,
        /// QPs per user.
        max_qp: u32,
        /// Send work requests outstanding (slots of the largest ring).
        max_qp_wr: u32,
        /// SGEs of a send.
        max_send_sge: u32,
        /// SGEs of a receive.
        max_recv_sge: u32,
        /// Inline bytes of a send.
        max_inline: u32,
        /// CQs per user.
        max_cq: u32,
        /// Entries of a CQ.
        max_cqe: u32,
        /// MRs per user.
        max_mr: u32,
        /// PDs per user.
        max_pd: u32,
        /// SRQs per user.
        max_srq: u32,
        /// READs and atomics outstanding as target, per QP.
        max_qp_rd_atom: u32,
        /// READs and atomics outstanding as initiator, per QP.
        max_qp_init_rd_atom: u32,
        /// Bytes of the longest message.
        max_msg_len: u32,
        /// Ports.
        phys_port_cnt: u32,
    }
}
body! {
    /// State of a port, as `struct ibv_port_attr`.
    PortAttr {
        /// 4 is active (enum ibv_port_state).
        state: u32,
        /// Largest MTU, bytes.
        max_mtu: u32,
        /// MTU in force, bytes.
        active_mtu: u32,
        /// GIDs in its table.
        gid_tbl_len: u32,
        /// Bytes of the longest message.
        max_msg_len: u32,
        /// P_Keys in its table.
        pkey_tbl_len: u32,
    }
}
body! {
    /// A GID.
    GidReply {
        /// An IPv6 or IPv4-mapped address.
        gid: [u8; 16],
    }
}
body! {
    /// Make a PD.
    AllocPd {}
}
body! {
    /// Drop a PD.
    DeallocPd {
        /// Its handle.
        pd: u32,
    }
}
body! {
    /// Register memory.
    RegMr {
        /// PD.
        pd: u32,
        /// [`crate::types::Access`].
        access: u32,
        /// Virtual address that work requests and peers will use for its first byte.
        iova: u64,
        /// RAM offset of its first byte.
        ram_offset: u64,
        /// Bytes.
        len: u64,
    }
}
body! {
    /// A registered region.
    MrReply {
        /// Its handle.
        handle: u32,
        /// Key for local SGEs.
        lkey: u32,
        /// Key for peers.
        rkey: u32,
        /// 0.
        reserved: u32,
    }
}
body! {
    /// Drop an MR.
    DeregMr {
        /// Its handle.
        mr: u32,
    }
}
body! {
    /// Change an MR.
    ReregMr {
        /// Its handle.
        mr: u32,
        /// What changes: [`rereg`].
        flags: u32,
        /// The new PD.
        pd: u32,
        /// The new [`crate::types::Access`].
        access: u32,
        /// As in [`RegMr`].
        iova: u64,
        /// As in [`RegMr`].
        ram_offset: u64,
        /// As in [`RegMr`].
        len: u64,
    }
}
body! {
    /// Make a memory window.
    AllocMw {
        /// PD.
        pd: u32,
        /// 2 (enum ibv_mw_type).
        mw_type: u32,
    }
}
body! {
    /// Drop a memory window.
    DeallocMw {
        /// Its handle.
        mw: u32,
    }
}
body! {
    /// Make an address handle, as `struct ibv_ah_attr`.
    CreateAh {
        /// PD.
        pd: u32,
        /// Port; 1.
        port_num: u32,
        /// Destination GID.
        dest_gid: [u8; 16],
        /// Index of the GID to send from; 0.
        sgid_index: u32,
        /// Traffic class (DSCP and ECN).
        traffic_class: u32,
        /// Hop limit; 0 takes the device's.
        hop_limit: u32,
        /// Flow label, 20 bits.
        flow_label: u32,
    }
}
body! {
    /// Drop an address handle.
    DestroyAh {
        /// Its handle.
        ah: u32,
    }
}
body! {
    /// Make an SRQ.
    CreateSrq {
        /// PD.
        pd: u32,
        /// log2 of the ring's slots.
        log2: u32,
        /// RAM offset of the ring, as a receive ring of a QP.
        ring: u64,
        /// RAM offset of the control line: 64 bytes, zeroed, aligned. Word 0: receives ever posted, modulo 2^32.
        ctrl: u64,
        /// Receive stride in bytes; [`crate::queue::RECV_STRIDES`].
        stride: u32,
        /// 0.
        reserved: u32,
    }
}
body! {
    /// Arm the limit.
    ModifySrq {
        /// Its handle.
        srq: u32,
        /// An event is raised, once, when fewer receives than this are posted; 0 disarms.
        limit: u32,
    }
}
body! {
    /// Ask for [`SrqAttr`].
    QuerySrq {
        /// Its handle.
        srq: u32,
    }
}
body! {
    /// Attributes of an SRQ, as `struct ibv_srq_attr`.
    SrqAttr {
        /// Slots of its ring.
        max_wr: u32,
        /// SGEs of a receive.
        max_sge: u32,
        /// The armed limit; 0 when it is not armed.
        limit: u32,
        /// 0.
        reserved: u32,
    }
}
body! {
    /// Drop an SRQ.
    DestroySrq {
        /// Its handle.
        srq: u32,
    }
}
body! {
    /// Make a CQ.
    CreateCq {
        /// RAM offset of the ring: 64-byte entries, zeroed, 64-byte aligned.
        ring: u64,
        /// RAM offset of the control line: 64 bytes, zeroed, aligned.
        ctrl: u64,
        /// log2 of its entries.
        log2: u32,
        /// 0.
        reserved: u32,
    }
}
body! {
    /// Drop a CQ.
    DestroyCq {
        /// Its handle.
        cq: u32,
    }
}
body! {
    /// Resize a CQ. The user publishes its consumer index in the control line before, and polls no more until the reply:
    /// entry `i` of those not polled is then at position `i` of the new ring, whose later positions are zeroed.
    ResizeCq {
        /// Its handle.
        cq: u32,
        /// log2 of the new ring's entries.
        log2: u32,
        /// RAM offset of the new ring, as in [`CreateCq`].
        ring: u64,
    }
}
body! {
    /// Make a QP.
    CreateQp {
        /// PD.
        pd: u32,
        /// [`crate::types::QpType`].
        qp_type: u32,
        /// CQ of its sends.
        send_cq: u32,
        /// CQ of its receives.
        recv_cq: u32,
        /// SRQ handle, or `u32::MAX`.
        srq: u32,
        /// Nonzero: every send is signaled (sq_sig_all).
        sig_all: u32,
        /// RAM offset of the send ring: 64-byte slots, zeroed, 64-byte aligned.
        sq_ring: u64,
        /// RAM offset of the receive ring, likewise.
        rq_ring: u64,
        /// log2 of the send ring's slots.
        sq_log2: u32,
        /// log2 of the receive ring's slots.
        rq_log2: u32,
        /// Receive stride in bytes; [`crate::queue::RECV_STRIDES`].
        rq_stride: u32,
        /// 0.
        reserved: u32,
    }
}
body! {
    /// A new QP.
    QpReply {
        /// Its handle; the low 16 bits are its doorbell index.
        handle: u32,
        /// Its number, 24 bits.
        qpn: u32,
    }
}
body! {
    /// Attributes of a QP, as `struct ibv_qp_attr`.
    QpAttr {
        /// [`crate::types::QpState`].
        state: u32,
        /// The state it is expected to be in.
        cur_state: u32,
        /// Access that peers have: the remote bits of [`crate::types::Access`].
        access: u32,
        /// P_Key index; 0.
        pkey_index: u32,
        /// Port; 1.
        port_num: u32,
        /// Q_Key (UD).
        qkey: u32,
        /// Path MTU in bytes: 256 to 4096.
        path_mtu: u32,
        /// Peer's QPN.
        dest_qp_num: u32,
        /// First PSN expected.
        rq_psn: u32,
        /// First PSN sent.
        sq_psn: u32,
        /// READs and atomics outstanding as initiator.
        max_rd_atomic: u32,
        /// READs and atomics outstanding as target.
        max_dest_rd_atomic: u32,
        /// RNR timer code that peers are told.
        min_rnr_timer: u32,
        /// ACK timeout code.
        timeout: u32,
        /// Retries on timeout.
        retry_cnt: u32,
        /// Retries on RNR; 7 is for ever.
        rnr_retry: u32,
        /// Peer's GID.
        dest_gid: [u8; 16],
        /// Traffic class (DSCP and ECN).
        traffic_class: u32,
        /// Hop limit; 0 takes the device's.
        hop_limit: u32,
        /// Flow label, 20 bits.
        flow_label: u32,
        /// Index of the GID to send from; 0.
        sgid_index: u32,
    }
}
body! {
    /// Modify a QP.
    ModifyQp {
        /// Its handle.
        qp: u32,
        /// [`crate::types::QpAttrMask`].
        mask: u32,
        /// The values that the mask names.
        attr: QpAttr,
    }
}
body! {
    /// Ask for [`QpAttr`].
    QueryQp {
        /// Its handle.
        qp: u32,
    }
}
body! {
    /// Drop a QP.
    DestroyQp {
        /// Its handle.
        qp: u32,
    }
}
body! {
    /// Make an identifier.
    CmCreateId {
        /// [`PortSpace`].
        port_space: u32,
        /// 0.
        reserved: u32,
    }
}
body! {
    /// Drop an identifier.
    CmDestroyId {
        /// Its handle.
        id: u32,
    }
}
body! {
    /// Bind.
    CmBindAddr {
        /// Its handle.
        id: u32,
        /// Port, 0 for any.
        port: u32,
        /// Local GID, or zeros for any of this device's.
        gid: [u8; 16],
    }
}
body! {
    /// A bound address.
    CmAddr {
        /// GID.
        gid: [u8; 16],
        /// Port.
        port: u32,
        /// 0.
        reserved: u32,
    }
}
body! {
    /// Listen.
    CmListen {
        /// Its handle.
        id: u32,
        /// Connection requests that may wait, 1 to 1,024.
        backlog: u32,
    }
}
body! {
    /// Resolve an address.
    CmResolveAddr {
        /// Its handle.
        id: u32,
        /// Port of the listener.
        port: u32,
        /// GID of the listener; zeros or loopback for this host's own.
        gid: [u8; 16],
        /// Time limit, ms.
        timeout_ms: u32,
        /// 0.
        reserved: u32,
    }
}
body! {
    /// Resolve a route.
    CmResolveRoute {
        /// Its handle.
        id: u32,
        /// Time limit, ms.
        timeout_ms: u32,
    }
}
body! {
    /// Connection parameters, as `struct rdma_conn_param`.
    CmParam {
        /// The sender's QPN (not its handle).
        qpn: u32,
        /// First PSN that it expects: the receiver of this is to send from there (12.7.31).
        psn: u32,
        /// READs and atomics it accepts.
        responder_resources: u8,
        /// READs and atomics it will issue.
        initiator_depth: u8,
        /// Retries on timeout.
        retry_count: u8,
        /// Retries on RNR.
        rnr_retry_count: u8,
        /// Q_Key of the datagram QP ([`PortSpace::Udp`]); 0 otherwise.
        qkey: u32,
        /// Path MTU, bytes: 256 to 4096. With `CmConnect` the most that is wanted, 0 for what the port has; with an event what
        /// the connection has. The accepting side does not choose it.
        path_mtu: u32,
        /// ACK timeout, a 5-bit code (4.096 us x 2^code). Chosen by the connecting side (0: the host's choice), and with an
        /// event what the connection has.
        ack_timeout: u32,
        /// Bytes of private data.
        private_len: u32,
        /// Private data.
        private: [u8; PRIVATE_LEN],
    }
}
body! {
    /// Connect.
    CmConnect {
        /// Its handle.
        id: u32,
        /// Parameters.
        param: CmParam,
    }
}
body! {
    /// Accept.
    CmAccept {
        /// The handle that came with the request.
        id: u32,
        /// Parameters.
        param: CmParam,
    }
}
body! {
    /// Reject.
    CmReject {
        /// The handle that came with the request.
        id: u32,
        /// Bytes of private data.
        private_len: u32,
        /// Private data.
        private: [u8; PRIVATE_LEN],
    }
}
body! {
    /// Ready to send.
    CmEstablish {
        /// Its handle.
        id: u32,
    }
}
body! {
    /// Disconnect.
    CmDisconnect {
        /// Its handle.
        id: u32,
    }
}
body! {
    /// Ask for an event.
    CmGetEvent {}
}
body! {
    /// An event, as `struct rdma_cm_event`.
    CmEvent {
        /// [`CmEventKind`].
        event: u32,
        /// 0, or a reason: an errno, or the REJ reason.
        status: u32,
        /// The identifier it belongs to; for a connection request a new one.
        id: u32,
        /// For a connection request, the listener.
        listen_id: u32,
        /// The peer's GID.
        peer_gid: [u8; 16],
        /// The peer's parameters.
        param: CmParam,
    }
}

/// What [`QueryCounters`] counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum CounterScope {
    /// The whole device, all users.
    Device = 0,
    /// This user.
    User = 1,
    /// One QP of this user.
    Qp = 2,
}

impl CounterScope {
    /// The scope a number stands for, if any.
    #[must_use]
    pub const fn from_u32(v: u32) -> Option<Self> {
        Some(match v {
            0 => Self::Device,
            1 => Self::User,
            2 => Self::Qp,
            _ => return None,
        })
    }
}

/// Flags of [`ReregMr`], numbered as `enum ibv_rereg_mr_flags`.
pub mod rereg {
    /// `iova`, `ram_offset` and `len` change.
    pub const TRANSLATION: u32 = 1 << 0;
    /// `pd` changes.
    pub const PD: u32 = 1 << 1;
    /// `access` changes.
    pub const ACCESS: u32 = 1 << 2;
    /// All of them.
    pub const ALL: u32 = TRANSLATION | PD | ACCESS;
}

/// Port spaces, numbered as `enum rdma_port_space`: a port is known by its space and number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u32)]
pub enum PortSpace {
    /// Reliable connections.
    Tcp = 0x0106,
    /// Datagrams, found by service ID resolution (SIDR).
    Udp = 0x0111,
}

impl PortSpace {
    /// The space a number stands for, if any.
    #[must_use]
    pub const fn from_u32(v: u32) -> Option<Self> {
        Some(match v {
            0x0106 => Self::Tcp,
            0x0111 => Self::Udp,
            _ => return None,
        })
    }
}

/// Event kinds, numbered as `enum rdma_cm_event_type`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum CmEventKind {
    /// The address resolved.
    AddrResolved = 0,
    /// It did not.
    AddrError = 1,
    /// The route resolved.
    RouteResolved = 2,
    /// It did not.
    RouteError = 3,
    /// Somebody wants to connect.
    ConnectRequest = 4,
    /// The peer accepted: ready the QP, then `CmEstablish`.
    ConnectResponse = 5,
    /// The connection could not be made.
    ConnectError = 6,
    /// No way to the peer.
    Unreachable = 7,
    /// The peer refused.
    Rejected = 8,
    /// The connection stands.
    Established = 9,
    /// The connection ended.
    Disconnected = 10,
    /// The device went away.
    DeviceRemoval = 11,
}

impl CmEventKind {
    /// The kind a number stands for, if any.
    #[must_use]
    pub const fn from_u32(v: u32) -> Option<Self> {
        Some(match v {
            0 => Self::AddrResolved,
            1 => Self::AddrError,
            2 => Self::RouteResolved,
            3 => Self::RouteError,
            4 => Self::ConnectRequest,
            5 => Self::ConnectResponse,
            6 => Self::ConnectError,
            7 => Self::Unreachable,
            8 => Self::Rejected,
            9 => Self::Established,
            10 => Self::Disconnected,
            11 => Self::DeviceRemoval,
            _ => return None,
        })
    }
}

impl CmParam {
    /// Nothing set.
    pub const EMPTY: Self = Self {
        qpn: 0,
        psn: 0,
        responder_resources: 0,
        initiator_depth: 0,
        retry_count: 0,
        rnr_retry_count: 0,
        qkey: 0,
        path_mtu: 0,
        ack_timeout: 0,
        private_len: 0,
        private: [0; PRIVATE_LEN],
    };
}

impl QpAttr {
    /// Nothing set: what a QP in RESET has.
    pub const EMPTY: Self = Self {
        state: 0,
        cur_state: 0,
        access: 0,
        pkey_index: 0,
        port_num: 0,
        qkey: 0,
        path_mtu: 0,
        dest_qp_num: 0,
        rq_psn: 0,
        sq_psn: 0,
        max_rd_atomic: 0,
        max_dest_rd_atomic: 0,
        min_rnr_timer: 0,
        timeout: 0,
        retry_cnt: 0,
        rnr_retry: 0,
        dest_gid: [0; 16],
        traffic_class: 0,
        hop_limit: 0,
        flow_label: 0,
        sgid_index: 0,
    };
}
