//! Memory windows: bound by their owner, used by the other end, invalidated by either.

use hyv_abi::control::AllocMw;
use hyv_abi::queue::{WcOpcode, WrOpcode, flags};
use hyv_abi::types::{Access, QpType};

use crate::common::Wr;
use crate::ends::{Kind, Message};
use crate::run::Sim;

/// `IBV_MW_TYPE_2`.
const TYPE_2: u32 = 2;
/// Windows of an end at a time.
const MOST: usize = 2;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// Its BIND_MW is posted.
    Binding,
    /// The other end may use it.
    Open,
    /// What invalidates it is posted.
    Closing,
    /// It opens nothing any more.
    Gone,
}

/// A window over one cell of what its owner lets the other end use.
#[derive(Clone, Copy, Debug)]
pub struct MemoryWindow {
    pub handle: u32,
    pub key: u32,
    pub cell: usize,
    pub state: State,
    /// A WRITE or READ by it is on its way.
    pub busy: bool,
    /// That is a READ.
    pub read: bool,
}

impl Sim {
    /// Binds a window, or invalidates one from either side. False if there was nothing to do.
    pub fn window(&mut self, e: usize) -> bool {
        if self.ends[e].link.ty != QpType::Rc || !self.is_whole(e) {
            return false;
        }
        match self.w.rng.below(3) {
            0 => self.bind(e),
            1 => self.invalidate_own(e),
            _ => self.invalidate_theirs(e),
        }
    }

    fn bind(&mut self, e: usize) -> bool {
        let end = &mut self.ends[e];
        let known = end.windows.iter().filter(|w| w.state != State::Gone);
        if known.count() >= MOST || end.room() == 0 || end.inn.dead {
            return false;
        }
        let Some(cell) = end.inn.take() else {
            return false;
        };
        let p = &self.w.people[end.person];
        let req = AllocMw {
            pd: p.pd,
            mw_type: TYPE_2,
        };
        let engine = &mut self.w.hosts[p.host].engine;
        let mw = engine.alloc_mw(p.user.id, &req).expect("alloc_mw");
        let key = mw.rkey & !0xff | (mw.rkey + 1 + self.w.rng.below(254) as u32) & 0xff;
        let access = Access::REMOTE_READ | Access::REMOTE_WRITE;
        let (id, at) = (self.w.id(), end.inn.cell * cell as u64);
        let wr = Wr::bind(id, mw.rkey, key, access, &end.inn.mr, at, end.inn.cell);
        let kind = Kind::Bind(end.windows.len());
        end.windows.push(MemoryWindow {
            handle: mw.handle,
            key,
            cell,
            state: State::Binding,
            busy: false,
            read: false,
        });
        self.put(e, wr, WcOpcode::BindMw, kind, (None, None), 0)
    }

    fn invalidate_own(&mut self, e: usize) -> bool {
        let end = &self.ends[e];
        let idle = |w: &MemoryWindow| w.state == State::Open && !w.busy;
        let Some(i) = end.windows.iter().position(idle) else {
            return false;
        };
        let key = end.windows[i].key;
        let wr = Wr::new(WrOpcode::LocalInv, self.w.id()).imm(key);
        let done = self.put(e, wr, WcOpcode::LocalInv, Kind::Unbind(i), (None, None), 0);
        if done {
            self.ends[e].windows[i].state = State::Closing;
        }
        done
    }

    /// SEND with invalidate, of a window of the other end.
    fn invalidate_theirs(&mut self, e: usize) -> bool {
        let peer = self.ends[e].peer;
        let open = |w: &MemoryWindow| w.state == State::Open;
        let Some(i) = self.ends[peer].windows.iter().position(open) else {
            return false;
        };
        let window = self.ends[peer].windows[i];
        let mut wr = Wr::new(WrOpcode::SendInv, self.w.id()).imm(window.key);
        if window.busy && window.read {
            // A READ's answer is gathered when it leaves.
            wr = wr.with(flags::FENCE);
        }
        let message = Message {
            seq: self.ends[e].seq,
            data: Some(std::rc::Rc::default()),
            len: 0,
            imm: None,
            invalidates: Some(window.key),
            from_qpn: self.ends[e].qp.qpn,
            from: self.gid(e),
        };
        let done = self.put(e, wr, WcOpcode::Send, Kind::Send, (None, None), 0);
        if done {
            self.ends[peer].windows[i].state = State::Closing;
            self.ends[peer].coming.push_back(message);
        }
        done
    }

    /// A window of an end that may be used for a WRITE or READ now: its place, cell and key.
    pub fn free_window(&self, e: usize) -> Option<(usize, usize, u32)> {
        let windows = self.ends[e].windows.iter();
        let free = |w: &MemoryWindow| w.state == State::Open && !w.busy;
        let (i, w) = windows.enumerate().find(|(_, w)| free(w))?;
        Some((i, w.cell, w.key))
    }

    /// A window is invalid: its key opens nothing, its cell is free.
    pub fn closed(&mut self, e: usize, i: usize) {
        let end = &mut self.ends[e];
        let window = &mut end.windows[i];
        assert_eq!(window.state, State::Closing, "end {e}: {window:?}");
        window.state = State::Gone;
        end.inn.give(window.cell);
        let (handle, p) = (window.handle, &self.w.people[end.person]);
        if p.gone.is_none() {
            let engine = &mut self.w.hosts[p.host].engine;
            engine.dealloc_mw(p.user.id, handle).expect("dealloc_mw");
        }
    }

    /// A WRITE or READ by a window is over.
    pub fn unused(&mut self, e: usize, window: Option<usize>) {
        if let Some(i) = window {
            self.ends[e].windows[i].busy = false;
        }
    }
}
