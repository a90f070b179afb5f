//! The software RNIC as a provider.
#![allow(unsafe_code, reason = "lends a user's mappings to the engine")]

use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hyv_abi::control::{
    CreateCq, CreateQp, CreateSrq, DeviceAttr, ModifyQp, ModifySrq, MrReply, PkeyReply, PortAttr,
    QpAttr, QpReply, RegMr, SrqAttr,
};
use hyv_abi::types::{Errno, Reason, VerbError};
use hyv_rnic::thread::Kicks;
use hyv_rnic::{Engine, EngineCell};

use super::UserMemory;
use super::provider::{Provider, UserId, Wake};
use crate::sys::event::EventFd;
use crate::wire::Routes;

type Result<T> = std::result::Result<T, VerbError>;

#[derive(Default)]
struct Users {
    ids: HashMap<u64, hyv_rnic::UserId>,
    last: u64,
}

/// The engine behind [`Provider`]: every call stops it between two turns.
pub struct SoftRnic {
    cell: Arc<EngineCell>,
    kicks: Arc<Kicks>,
    users: Mutex<Users>,
    routes: Option<Routes>,
}

impl std::fmt::Debug for SoftRnic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SoftRnic")
            .field("users", &self.users().ids.len())
            .finish_non_exhaustive()
    }
}

struct EngineWake(Arc<dyn Wake>);

impl hyv_rnic::Wake for EngineWake {
    fn wake(&self) {
        self.0.wake();
    }
}

impl SoftRnic {
    /// Around an engine. `kicks` is what the engine's thread sleeps on.
    #[must_use]
    pub fn new(cell: Arc<EngineCell>, kicks: Arc<Kicks>) -> Self {
        Self {
            cell,
            kicks,
            users: Mutex::default(),
            routes: None,
        }
    }

    /// With an engine that reaches other hosts, and how to know which.
    #[must_use]
    pub fn with_routes(mut self, routes: Option<Routes>) -> Self {
        self.routes = routes;
        self
    }

    fn users(&self) -> MutexGuard<'_, Users> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<R>(
        &self,
        user: UserId,
        f: impl FnOnce(&mut Engine, hyv_rnic::UserId) -> Result<R>,
    ) -> Result<R> {
        let id = self.users().ids.get(&user.0).copied();
        let id = id.ok_or(VerbError::new(Errno::NoEnt, Reason::BadHandle))?;
        self.cell.control(|engine| f(engine, id))
    }
}

/// The engine's view of a user's memory.
fn engine_memory(memory: &UserMemory) -> Arc<hyv_rnic::UserMemory> {
    let window = NonNull::from(&**memory.window);
    // A mapping is never at address 0.
    let ram = NonNull::new(memory.ram.as_ptr()).unwrap_or(NonNull::dangling());
    let len = memory.ram.len() as u64;
    // SAFETY: both are mapped readable and writable on 2 MiB boundaries from files sealed against truncation, for as
    // long as the clone of `memory` lives that goes along; the window is only ever seen as a `Window` of atomics, and
    // RAM is only reached through atomics and raw copies.
    Arc::new(unsafe { hyv_rnic::UserMemory::new(window, ram, len, Box::new(memory.clone())) })
}

impl Provider for SoftRnic {
    fn add_user(&self, memory: &UserMemory, wake: Arc<dyn Wake>, kick: EventFd) -> Result<UserId> {
        let no_room = VerbError::new(Errno::NoMem, Reason::QuotaObjects);
        let key = {
            let mut users = self.users();
            users.last += 1;
            users.last
        };
        self.kicks.add(key, kick.into()).map_err(|_| no_room)?;
        let memory = engine_memory(memory);
        match self
            .cell
            .control(|engine| engine.add_user(memory, Arc::new(EngineWake(wake))))
        {
            Ok(id) => {
                self.users().ids.insert(key, id);
                Ok(UserId(key))
            }
            Err(e) => {
                self.kicks.remove(key);
                Err(e)
            }
        }
    }

    fn remove_user(&self, user: UserId) {
        let id = self.users().ids.remove(&user.0);
        if let Some(id) = id {
            self.cell.control(|engine| engine.remove_user(id));
            self.kicks.remove(user.0);
        }
    }

    fn device_attr(&self, user: UserId) -> Result<DeviceAttr> {
        self.with(user, |e, u| e.device_attr(u))
    }

    fn port_attr(&self, port: u32) -> Result<PortAttr> {
        self.cell.control(|e| e.port_attr(port))
    }

    fn gid(&self, port: u32, index: u32) -> Result<[u8; 16]> {
        self.cell.control(|e| e.gid(port, index))
    }

    fn pkey(&self, port: u32, index: u32) -> Result<PkeyReply> {
        self.cell.control(|e| e.pkey(port, index))
    }

    fn alloc_pd(&self, user: UserId) -> Result<u32> {
        self.with(user, |e, u| e.alloc_pd(u))
    }

    fn dealloc_pd(&self, user: UserId, pd: u32) -> Result<()> {
        self.with(user, |e, u| e.dealloc_pd(u, pd))
    }

    fn reg_mr(&self, user: UserId, verb: &RegMr) -> Result<MrReply> {
        self.with(user, |e, u| e.reg_mr(u, verb))
    }

    fn dereg_mr(&self, user: UserId, mr: u32) -> Result<()> {
        self.with(user, |e, u| e.dereg_mr(u, mr))
    }

    fn create_cq(&self, user: UserId, verb: &CreateCq) -> Result<u32> {
        self.with(user, |e, u| e.create_cq(u, verb))
    }

    fn destroy_cq(&self, user: UserId, cq: u32) -> Result<()> {
        self.with(user, |e, u| e.destroy_cq(u, cq))
    }

    fn create_qp(&self, user: UserId, verb: &CreateQp) -> Result<QpReply> {
        self.with(user, |e, u| e.create_qp(u, verb))
    }

    fn modify_qp(&self, user: UserId, verb: &ModifyQp) -> Result<()> {
        self.with(user, |e, u| e.modify_qp(u, verb))
    }

    fn query_qp(&self, user: UserId, qp: u32) -> Result<QpAttr> {
        self.with(user, |e, u| e.query_qp(u, qp))
    }

    fn destroy_qp(&self, user: UserId, qp: u32) -> Result<()> {
        self.with(user, |e, u| e.destroy_qp(u, qp))
    }

    fn create_srq(&self, user: UserId, verb: &CreateSrq) -> Result<u32> {
        self.with(user, |e, u| e.create_srq(u, verb))
    }

    fn modify_srq(&self, user: UserId, verb: &ModifySrq) -> Result<()> {
        self.with(user, |e, u| e.modify_srq(u, verb))
    }

    fn query_srq(&self, user: UserId, srq: u32) -> Result<SrqAttr> {
        self.with(user, |e, u| e.query_srq(u, srq))
    }

    fn destroy_srq(&self, user: UserId, srq: u32) -> Result<()> {
        self.with(user, |e, u| e.destroy_srq(u, srq))
    }

    fn owns_qpn(&self, user: UserId, qpn: u32) -> bool {
        self.with(user, |e, u| Ok(e.owns_qpn(u, qpn)))
            .unwrap_or(false)
    }

    fn fail_qpn(&self, user: UserId, qpn: u32) {
        // A user that is gone has no queue pairs to fail.
        let _ = self.with(user, |e, u| {
            e.fail_qpn(u, qpn);
            Ok(())
        });
    }

    fn send_mad(&self, _src: &[u8; 16], dst: &[u8; 16], mad: &[u8; 256]) {
        // The engine has one address.
        self.cell
            .control(|e| e.send_mad(dst, hyv_roce::mad::GSI_QPN, mad));
    }

    fn take_mads(&self) -> Vec<([u8; 16], Box<[u8; 256]>)> {
        let arrived = self.cell.control(Engine::take_mads);
        // Management talks from QP 1 to QP 1; anybody may send to it from elsewhere.
        let from_gsi = arrived
            .into_iter()
            .filter(|m| m.src_qpn == hyv_roce::mad::GSI_QPN);
        from_gsi.map(|m| (m.src, m.mad)).collect()
    }

    fn has_route(&self, src: &[u8; 16], dst: &[u8; 16]) -> bool {
        self.routes.as_ref().is_some_and(|r| r.has(src, dst))
    }
}
