//! hyv-host: starts guests in QEMU, owns their memory, and serves their control verbs.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`sys`] | the operating system, wrapped |
//! | [`accel`] | finds QEMU and decides between KVM and TCG |
//! | [`backend`] | users, their control verbs, the control thread |
//! | [`cm`] | connection management: identifiers, ports, the handshake |
//! | [`instance`] | a device, its users and its guests, put together |
//! | [`message`] | errors as people read them |
//! | [`program`] | what every program does first: command line, log, signals |
//! | [`session`] | the socket by which a process becomes a user |
//! | [`timer`] | deadlines by key |
//! | [`wire`] | the way to other hosts: address, carrier, recording |
//! | [`vmm`] | one guest: its QEMU, its memory, its window, its end |
//! | [`limits`] | every limit of the launcher, with its reason |

pub mod accel;
pub mod backend;
pub mod cm;
pub mod instance;
pub mod limits;
pub mod message;
pub mod program;
pub mod session;
pub mod sys;
pub mod timer;
pub mod vmm;
pub mod wire;
