//! RDMA verbs, shaped like ibverbs, with Rust's ownership in place of a manual destroy order.
//!
//! The same code runs in the unikernel and in Linux processes: what differs between them is behind
//! [`Platform`]. `no_std` with `alloc`; the feature `std` adds [`process::Process`], the platform of a native
//! Linux process.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`platform`] | what the verbs need from their surroundings |
//! | [`ring`] | send, receive and completion rings: the bytes of the data path |
//! | [`wr`], [`wc`] | work requests and completions |
//! | [`context`], [`event`] | the device: queries, counters; asynchronous events |
//! | [`mr`], [`mw`] | protection domains, memory regions, memory windows |
//! | [`cq`], [`channel`] | completion queues, and one place to wait for several |
//! | [`qp`], [`srq`], [`ah`] | queue pairs, shared receive queues, addresses of datagrams |
//! | [`cm`] | connections, in librdmacm's shape |
//! | [`probe`] | the floor: one cache line bounced |
//! | [`process`] | the platform of a Linux process |
//!
//! Control verbs (make, modify, destroy) travel over a virtqueue, may sleep and answer with an [`Error`]. The
//! data path ([`QueuePair::post_send`], [`QueuePair::post_recv`], [`CompletionQueue::poll`]) touches only
//! rings in memory and the doorbell: no lock, no allocation, no log.
//!
//! A client of an appliance on this machine:
//!
//! ```no_run
//! # #[cfg(feature = "std")]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use hyv_verbs::cm::{self, ConnectOptions};
//! use hyv_verbs::{Access, Context, Error, Gid, Payload, Process, RecvWr, SendOp, SendWr, WorkCompletion};
//!
//! let process = Process::connect("/run/user/1000/hyv/kvstore".as_ref(), 16 << 20, "example")?;
//! let context = Context::open(process)?;
//! let pd = context.alloc_pd()?;
//! let mut cq = context.create_cq(64)?;
//! let mr = pd.alloc_mr(4096, Access::LOCAL_WRITE)?;
//! let prepare = |qp: &mut hyv_verbs::QueuePair| {
//!     qp.post_recv(&RecvWr { wr_id: 1, sges: &[mr.sge(0, 4096)] }).map_err(|_| Error::NoQueuePair)
//! };
//! let mut connection =
//!     cm::connect(&context, (Gid::LOCAL, 7471), &pd, (&cq, &cq), &ConnectOptions::default(), prepare)?;
//! let Some(qp) = connection.id.qp_mut() else { return Ok(()) };
//! qp.post_send(&SendWr::new(2, SendOp::Send, Payload::Inline(b"hello")))?;
//! let mut done = [WorkCompletion::EMPTY; 4];
//! loop {
//!     let n = cq.wait(&mut done, None)?;
//!     if done[..n].iter().any(WorkCompletion::is_recv) {
//!         break;
//!     }
//! }
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "std"))]
//! # fn main() {}
//! ```
#![no_std]

#[cfg(all(not(loom), any(feature = "std", test)))]
extern crate std;

#[cfg(not(loom))]
extern crate alloc;

pub mod ring;

#[cfg(not(loom))]
pub mod ah;
#[cfg(not(loom))]
pub mod channel;
#[cfg(all(not(loom), feature = "std", target_os = "linux"))]
mod clock;
#[cfg(not(loom))]
pub mod cm;
#[cfg(not(loom))]
pub mod context;
#[cfg(not(loom))]
mod control;
#[cfg(not(loom))]
pub mod cq;
#[cfg(not(loom))]
mod dma;
#[cfg(not(loom))]
pub mod error;
#[cfg(not(loom))]
pub mod event;
#[cfg(not(loom))]
pub mod limits;
#[cfg(not(loom))]
pub mod mr;
#[cfg(not(loom))]
pub mod mw;
#[cfg(not(loom))]
pub mod platform;
#[cfg(not(loom))]
pub mod probe;
#[cfg(all(not(loom), feature = "std", target_os = "linux"))]
pub mod process;
#[cfg(not(loom))]
pub mod qp;
#[cfg(not(loom))]
mod shadow;
#[cfg(not(loom))]
pub mod srq;
#[cfg(not(loom))]
pub mod wc;
#[cfg(not(loom))]
pub mod wr;

#[cfg(not(loom))]
pub use {
    ah::{AddressHandle, AhAttr, Grh},
    channel::CompletionChannel,
    context::{Context, Gid},
    cq::CompletionQueue,
    error::{Error, PostError, PostListError},
    event::{AsyncEvent, Event, EventSet},
    mr::{MemoryRegion, ProtectionDomain, Rereg},
    mw::{MemoryWindow, inc_rkey},
    platform::{HostGone, Platform},
    qp::{QpCaps, QpInitAttr, QueuePair, RtrParams, RtsParams, SendBatch},
    srq::{SharedReceiveQueue, SrqCaps},
    wc::WorkCompletion,
    wr::{Bind, Datagram, Payload, RecvWr, RemoteAddr, SendFlags, SendOp, SendWr},
};

#[cfg(all(not(loom), feature = "std", target_os = "linux"))]
pub use process::{ConnectError, Process};

#[cfg(not(loom))]
pub use hyv_abi::{
    control::{CmEventKind, Counters, DeviceAttr, PortAttr, PortSpace, QpAttr, SrqAttr},
    queue::{Sge, WcOpcode, WcStatus},
    types::{Access, Errno, QpAttrMask, QpState, QpType, Reason, VerbError},
};
