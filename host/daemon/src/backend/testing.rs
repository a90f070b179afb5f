//! For tests: the driver's side of a control queue, and a provider that remembers.
#![allow(unsafe_code, reason = "views a received window as its structure")]

use std::collections::{BTreeSet, HashMap};
use std::ops::Deref;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hyv_abi::control::{
    AllocMw, CmEvent, CmEventKind, CmGetEvent, Counters, CreateAh, CreateCq, CreateQp, CreateSrq,
    DeviceAttr, MAX_REPLY, ModifyQp, ModifySrq, MrReply, PkeyReply, PortAttr, QpAttr, QpReply,
    QueryCounters, REPLY_HEADER_LEN, RegMr, ReplyHeader, RequestHeader, ReregMr, ResizeCq, SrqAttr,
    Verb,
};
use hyv_abi::types::{Errno, Reason, VerbError};
use hyv_abi::window::{WINDOW_LEN, Window, summary};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::provider::{Provider, UserId, Wake};
use super::{UserMemory, limits};
use crate::session::Parts;
use crate::sys::event::EventFd;
use crate::sys::memory::Mapping;
use crate::sys::window::SharedWindow;

pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) const DESC: u64 = 0x1000;
pub(crate) const AVAIL: u64 = 0x2000;
pub(crate) const USED: u64 = 0x3000;
pub(crate) const REQUEST: u64 = 0x4000;
pub(crate) const REPLY: u64 = 0x5000;
pub(crate) const QUEUE_SIZE: u16 = 16;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;

/// One descriptor: address, length, flags, next.
pub(crate) type Desc = (u64, u32, u16, u16);

/// A window, as its maker or as a process that was handed its file has it.
#[derive(Clone)]
pub(crate) enum AnyWindow {
    Made(Arc<SharedWindow>),
    Received(Arc<Mapping>),
}

impl Deref for AnyWindow {
    type Target = Window;

    fn deref(&self) -> &Window {
        match self {
            Self::Made(w) => w,
            Self::Received(m) => {
                assert_eq!(m.len(), WINDOW_LEN);
                // SAFETY: that many bytes, 2 MiB-aligned, mapped as long as `m` lives; `Window` is all atomics.
                unsafe { &*m.as_ptr().cast::<Window>() }
            }
        }
    }
}

/// The driver's side of one user.
pub(crate) struct Driver {
    pub(crate) window: AnyWindow,
    pub(crate) ram: Arc<Mapping>,
    pub(crate) kick: EventFd,
    pub(crate) wake: EventFd,
    avail: u16,
    used: u16,
    cookie: u64,
}

impl Driver {
    /// Over the parts of a session, with the queue enabled.
    pub(crate) fn new(parts: &Parts) -> Self {
        let window = AnyWindow::Made(parts.memory.window.clone());
        let (kick, wake) = (
            parts.kick_control.try_clone().unwrap(),
            parts.wake.try_clone().unwrap(),
        );
        Self::over(window, parts.memory.ram.clone(), kick, wake)
    }

    pub(crate) fn over(window: AnyWindow, ram: Arc<Mapping>, kick: EventFd, wake: EventFd) -> Self {
        let mut it = Self {
            window,
            ram,
            kick,
            wake,
            avail: 0,
            used: 0,
            cookie: 0,
        };
        it.enable(DESC, AVAIL, USED, QUEUE_SIZE.into());
        it
    }

    pub(crate) fn enable(&mut self, desc: u64, avail: u64, used: u64, size: u32) {
        let c = &self.window.user.control;
        c.desc.store(desc, Ordering::Relaxed);
        c.avail.store(avail, Ordering::Relaxed);
        c.used.store(used, Ordering::Relaxed);
        c.size.store(size, Ordering::Relaxed);
        c.enable.store(1, Ordering::Release);
        self.kick.signal().unwrap();
    }

    /// Takes the queue out of service, and starts over with empty rings.
    pub(crate) fn disable(&mut self) {
        self.window.user.control.enable.store(0, Ordering::Release);
        self.kick.signal().unwrap();
        // Until it is served no more: a beat later the kick has been seen.
        let beat = &self.window.header.host_beat;
        let start = beat.load(Ordering::Acquire);
        self.wait("the beat", || beat.load(Ordering::Acquire) > start + 1);
        self.ram.write_at(AVAIL, &[0; 64]).unwrap();
        self.ram.write_at(USED, &[0; 256]).unwrap();
        (self.avail, self.used) = (0, 0);
    }

    pub(crate) fn wait(&self, what: &str, mut done: impl FnMut() -> bool) {
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < PATIENCE, "waited in vain for {what}");
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    fn read_u16(&self, offset: u64) -> u16 {
        // The index fields are aligned to 2 only: read them as part of their word.
        let word = self
            .ram
            .atomic_u32(offset & !3)
            .unwrap()
            .load(Ordering::Acquire);
        if offset & 2 == 0 {
            word as u16
        } else {
            (word >> 16) as u16
        }
    }

    /// Lays down descriptors from index 0, makes them available and kicks.
    pub(crate) fn submit(&mut self, chain: &[Desc]) {
        for (i, (addr, len, flags, next)) in chain.iter().enumerate() {
            let mut d = [0; 16];
            d[..8].copy_from_slice(&addr.to_le_bytes());
            d[8..12].copy_from_slice(&len.to_le_bytes());
            d[12..14].copy_from_slice(&flags.to_le_bytes());
            d[14..].copy_from_slice(&next.to_le_bytes());
            self.ram.write_at(DESC + 16 * i as u64, &d).unwrap();
        }
        self.make_available(0);
    }

    pub(crate) fn make_available(&mut self, head: u16) {
        let slot = AVAIL + 4 + 2 * u64::from(self.avail % QUEUE_SIZE);
        self.ram.write_at(slot, &head.to_le_bytes()).unwrap();
        self.set_avail(self.avail.wrapping_add(1));
    }

    pub(crate) fn set_avail(&mut self, index: u16) {
        std::sync::atomic::fence(Ordering::SeqCst);
        self.avail = index;
        let flags = self.read_u16(AVAIL);
        let word = u32::from(index) << 16 | u32::from(flags);
        self.ram
            .atomic_u32(AVAIL)
            .unwrap()
            .store(word, Ordering::Release);
        self.kick.signal().unwrap();
    }

    pub(crate) fn used_index(&self) -> u16 {
        self.read_u16(USED + 2)
    }

    /// Waits for the next used entry: how many bytes were written.
    pub(crate) fn wait_used(&mut self) -> u32 {
        let used = self.used;
        self.wait("a reply", || self.used_index() != used);
        let mut e = [0; 8];
        self.ram
            .read_at(USED + 4 + 8 * u64::from(used % QUEUE_SIZE), &mut e)
            .unwrap();
        self.used = used.wrapping_add(1);
        u32::from_le_bytes([e[4], e[5], e[6], e[7]])
    }

    pub(crate) fn reply(&self, written: u32) -> (ReplyHeader, Vec<u8>) {
        let mut bytes = vec![0; written as usize];
        self.ram.read_at(REPLY, &mut bytes).unwrap();
        let (header, body) = ReplyHeader::read_from_prefix(&bytes).unwrap();
        assert_eq!(header.len as usize, body.len());
        (header, body.to_vec())
    }

    /// A request of any bytes, with `room` bytes for the reply.
    pub(crate) fn raw(&mut self, request: &[u8], room: u32) -> (ReplyHeader, Vec<u8>) {
        self.ram.write_at(REQUEST, request).unwrap();
        self.submit(&[
            (REQUEST, request.len() as u32, NEXT, 1),
            (REPLY, room, WRITE, 0),
        ]);
        let written = self.wait_used();
        self.reply(written)
    }

    pub(crate) fn header<V: Verb>(&mut self) -> RequestHeader {
        self.cookie += 1;
        RequestHeader {
            opcode: V::OPCODE as u16,
            version: hyv_abi::ABI_VERSION as u16,
            len: size_of::<V>() as u32,
            cookie: self.cookie,
        }
    }

    pub(crate) fn call<V: Verb>(&mut self, verb: V) -> Result<V::Reply, VerbError> {
        let header = self.header::<V>();
        let request = [header.as_bytes(), verb.as_bytes()].concat();
        let (reply, body) = self.raw(&request, MAX_REPLY as u32);
        assert_eq!(reply.cookie, header.cookie);
        if reply.status == 0 {
            Ok(V::Reply::read_from_bytes(&body).unwrap())
        } else {
            assert!(body.is_empty());
            Err(VerbError::new(
                Errno::from_u32(reply.status),
                Reason::from_u32(reply.reason),
            ))
        }
    }

    /// Waits to be told of an event, and takes it.
    pub(crate) fn event(&mut self, kind: CmEventKind) -> CmEvent {
        let window = self.window.clone();
        let start = Instant::now();
        loop {
            match self.call(CmGetEvent {}) {
                Ok(e) => {
                    assert_eq!(CmEventKind::from_u32(e.event), Some(kind));
                    assert!(window.events.summary.load(Ordering::SeqCst) & summary::CM != 0);
                    return e;
                }
                Err(e) => assert_eq!(e.reason, Reason::NoEvent),
            }
            assert!(start.elapsed() < PATIENCE, "waited in vain for {kind:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A reply's header and nothing else.
pub(crate) const HEADER_ONLY: u32 = REPLY_HEADER_LEN as u32;

#[derive(Default)]
struct Objects {
    live: BTreeSet<u32>,
    wake: Option<Arc<dyn Wake>>,
}

#[derive(Default)]
struct Book {
    users: HashMap<u64, Objects>,
    last_user: u64,
    last: u32,
    log: Vec<String>,
}

/// A provider without a device: hands out handles, remembers what it was told, and has a quota of objects.
#[derive(Default)]
pub(crate) struct Fake {
    book: Mutex<Book>,
}

pub(crate) const FAKE_GID: [u8; 16] = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
pub(crate) const FAKE_USERS: usize = 3;
pub(crate) const FAKE_OBJECTS: usize = 16;

impl Fake {
    pub(crate) fn log(&self) -> Vec<String> {
        self.book.lock().unwrap().log.clone()
    }

    pub(crate) fn users(&self) -> usize {
        self.book.lock().unwrap().users.len()
    }

    pub(crate) fn objects(&self) -> usize {
        self.book
            .lock()
            .unwrap()
            .users
            .values()
            .map(|u| u.live.len())
            .sum()
    }

    fn create(&self, user: UserId) -> Result<u32, VerbError> {
        let mut b = self.book.lock().unwrap();
        b.last += 1;
        let handle = b.last;
        let objects = &mut b
            .users
            .get_mut(&user.0)
            .expect("a user that was added")
            .live;
        if objects.len() == FAKE_OBJECTS {
            return Err(VerbError::new(Errno::NoMem, Reason::QuotaObjects));
        }
        objects.insert(handle);
        Ok(handle)
    }

    fn find(&self, user: UserId, handle: u32) -> Result<(), VerbError> {
        if self.book.lock().unwrap().users[&user.0]
            .live
            .contains(&handle)
        {
            Ok(())
        } else {
            Err(VerbError::new(Errno::NoEnt, Reason::BadHandle))
        }
    }

    fn destroy(&self, user: UserId, handle: u32) -> Result<(), VerbError> {
        let mut b = self.book.lock().unwrap();
        let gone = b
            .users
            .get_mut(&user.0)
            .expect("a user that was added")
            .live
            .remove(&handle);
        if gone {
            Ok(())
        } else {
            Err(VerbError::new(Errno::NoEnt, Reason::BadHandle))
        }
    }
}

impl Provider for Fake {
    fn add_user(
        &self,
        _: &UserMemory,
        wake: Arc<dyn Wake>,
        _: EventFd,
    ) -> Result<UserId, VerbError> {
        let mut b = self.book.lock().unwrap();
        if b.users.len() == FAKE_USERS {
            return Err(VerbError::new(Errno::NoMem, Reason::QuotaObjects));
        }
        b.last_user += 1;
        let id = b.last_user;
        b.users.insert(
            id,
            Objects {
                wake: Some(wake),
                ..Objects::default()
            },
        );
        Ok(UserId(id))
    }

    fn remove_user(&self, user: UserId) {
        let mut b = self.book.lock().unwrap();
        b.users.remove(&user.0).expect("removed once");
        b.log.push(format!("remove {}", user.0));
    }

    fn device_attr(&self, user: UserId) -> Result<DeviceAttr, VerbError> {
        // Data-path events come by the same wake-up.
        self.book.lock().unwrap().users[&user.0]
            .wake
            .as_ref()
            .unwrap()
            .wake();
        Ok(DeviceAttr {
            node_guid: user.0,
            ..DeviceAttr::new_zeroed()
        })
    }

    fn port_attr(&self, port: u32) -> Result<PortAttr, VerbError> {
        if port != 1 {
            return Err(VerbError::new(Errno::Inval, Reason::BadGid));
        }
        Ok(PortAttr {
            state: 4,
            gid_tbl_len: 1,
            ..PortAttr::new_zeroed()
        })
    }

    fn gid(&self, port: u32, index: u32) -> Result<[u8; 16], VerbError> {
        if (port, index) == (1, 0) {
            Ok(FAKE_GID)
        } else {
            Err(VerbError::new(Errno::Inval, Reason::BadGid))
        }
    }

    fn pkey(&self, port: u32, index: u32) -> Result<PkeyReply, VerbError> {
        self.gid(port, index).map(|_| PkeyReply {
            pkey: 0xffff,
            reserved: 0,
        })
    }

    fn alloc_pd(&self, user: UserId) -> Result<u32, VerbError> {
        self.create(user)
    }

    fn dealloc_pd(&self, user: UserId, pd: u32) -> Result<(), VerbError> {
        self.destroy(user, pd)
    }

    fn reg_mr(&self, user: UserId, _: &RegMr) -> Result<MrReply, VerbError> {
        self.create(user).map(|h| MrReply {
            handle: h,
            lkey: h,
            rkey: h,
            reserved: 0,
        })
    }

    fn dereg_mr(&self, user: UserId, mr: u32) -> Result<(), VerbError> {
        self.destroy(user, mr)
    }

    fn create_cq(&self, user: UserId, _: &CreateCq) -> Result<u32, VerbError> {
        self.create(user)
    }

    fn destroy_cq(&self, user: UserId, cq: u32) -> Result<(), VerbError> {
        self.destroy(user, cq)
    }

    fn create_qp(&self, user: UserId, _: &CreateQp) -> Result<QpReply, VerbError> {
        self.create(user).map(|h| QpReply {
            handle: h,
            qpn: h + 1000,
        })
    }

    fn modify_qp(&self, user: UserId, verb: &ModifyQp) -> Result<(), VerbError> {
        self.query_qp(user, verb.qp).map(drop)
    }

    fn query_qp(&self, user: UserId, qp: u32) -> Result<QpAttr, VerbError> {
        self.find(user, qp).map(|()| QpAttr::new_zeroed())
    }

    fn destroy_qp(&self, user: UserId, qp: u32) -> Result<(), VerbError> {
        self.destroy(user, qp)
    }

    fn create_srq(&self, user: UserId, _: &CreateSrq) -> Result<u32, VerbError> {
        self.create(user)
    }

    fn modify_srq(&self, user: UserId, verb: &ModifySrq) -> Result<(), VerbError> {
        self.find(user, verb.srq)
    }

    fn query_srq(&self, user: UserId, srq: u32) -> Result<SrqAttr, VerbError> {
        self.find(user, srq).map(|()| SrqAttr::new_zeroed())
    }

    fn destroy_srq(&self, user: UserId, srq: u32) -> Result<(), VerbError> {
        self.destroy(user, srq)
    }

    fn query_counters(&self, user: UserId, _: &QueryCounters) -> Result<Counters, VerbError> {
        Ok(Counters {
            work_requests: user.0,
            ..Counters::new_zeroed()
        })
    }

    fn rereg_mr(&self, user: UserId, verb: &ReregMr) -> Result<MrReply, VerbError> {
        self.find(user, verb.mr).map(|()| MrReply {
            handle: verb.mr,
            lkey: verb.mr,
            rkey: verb.mr,
            reserved: 0,
        })
    }

    fn alloc_mw(&self, user: UserId, _: &AllocMw) -> Result<MrReply, VerbError> {
        self.create(user).map(|h| MrReply {
            handle: h,
            lkey: 0,
            rkey: h,
            reserved: 0,
        })
    }

    fn dealloc_mw(&self, user: UserId, mw: u32) -> Result<(), VerbError> {
        self.destroy(user, mw)
    }

    fn resize_cq(&self, user: UserId, verb: &ResizeCq) -> Result<(), VerbError> {
        self.find(user, verb.cq)
    }

    fn create_ah(&self, user: UserId, _: &CreateAh) -> Result<u32, VerbError> {
        self.create(user)
    }

    fn destroy_ah(&self, user: UserId, ah: u32) -> Result<(), VerbError> {
        self.destroy(user, ah)
    }

    fn owns_qpn(&self, user: UserId, qpn: u32) -> bool {
        self.book.lock().unwrap().users[&user.0]
            .live
            .contains(&qpn.wrapping_sub(1000))
    }

    fn fail_qpn(&self, user: UserId, qpn: u32) {
        self.book
            .lock()
            .unwrap()
            .log
            .push(format!("fail {}:{qpn}", user.0));
    }
}

/// Quotas that tests do not meet by accident.
pub(crate) fn small_quotas() -> limits::Quotas {
    limits::Quotas {
        sessions: 2,
        session_ram: 8 << 20,
        total_session_ram: 12 << 20,
        ..limits::Quotas::default()
    }
}
