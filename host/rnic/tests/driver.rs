//! Who drives the engine, in real threads and real time: the engine's own thread that sleeps and is kicked,
//! control in between, and a client that drives inline.

mod common;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use common::*;
use hyv_abi::queue::Cqe;
use hyv_rnic::thread::{EngineThread, Kicks};
use hyv_rnic::{Engine, EngineCell, EngineConfig};
use rustix::event::{EventfdFlags, eventfd};

const LEN: u64 = 1 << 20;
/// A machine that is busy with other tests is slow; one that hangs is longer silent than this.
const PATIENCE: Duration = Duration::from_secs(20);

/// An engine with real time and its thread, and two users that kick.
struct Rig {
    cell: Arc<EngineCell>,
    kicks: Arc<Kicks>,
    thread: Option<EngineThread>,
    a: Client,
    b: Client,
}

struct Client {
    side: Side,
    kick: OwnedFd,
    kicked: u64,
}

impl Rig {
    fn new(spin: Duration) -> Self {
        let start = Instant::now();
        let mut e = Engine::new(EngineConfig {
            clock: Box::new(move || start.elapsed().as_nanos() as u64),
            gid: GID,
            node_guid: 1,
            carrier: None,
            mad_bell: Box::new(|| {}),
        });
        let kicks = Kicks::new().expect("kicks");
        let client = |e: &mut Engine, key| {
            let kick = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).expect("eventfd");
            let theirs = kick.try_clone().expect("dup");
            kicks.add(key, theirs).expect("add");
            let side = Side::new(e, LEN, Cap::default());
            Client {
                side,
                kick,
                kicked: 0,
            }
        };
        let (a, b) = (client(&mut e, 1), client(&mut e, 2));
        connect(&mut e, &a.side.qp, &b.side.qp, &Conn::default());
        let cell = EngineCell::new(e);
        let set_up = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&set_up);
        let thread = EngineThread::spawn(Arc::clone(&cell), Arc::clone(&kicks), spin, move || {
            flag.store(true, Ordering::SeqCst);
        })
        .expect("a thread");
        wait_for("the thread's set-up", || set_up.load(Ordering::SeqCst));
        Self {
            cell,
            kicks,
            thread: Some(thread),
            a,
            b,
        }
    }

    fn exchange(&mut self, i: u64) {
        self.b.side.qp.post_recv(i, &[self.b.side.mr.sge(0, 64)]);
        self.a
            .post(&Wr::new(WrOpcode::Send, i).inline(&i.to_le_bytes()));
        assert_eq!(done(&mut self.a.side.scq).wr_id, i);
        assert_eq!(done(&mut self.b.side.rcq).data[0], i);
    }

    /// Stops the thread, which must not take long.
    fn stop(&mut self) {
        let thread = self.thread.take().expect("running");
        let (tx, rx) = mpsc::channel();
        std::thread::spawn(move || {
            drop(thread);
            let _ = tx.send(());
        });
        rx.recv_timeout(PATIENCE)
            .expect("the engine's thread does not stop");
    }
}

impl Client {
    fn post(&mut self, wr: &Wr) {
        self.side.qp.post_silently(wr);
        self.ring();
    }

    fn ring(&mut self) {
        if self.side.qp.ring() == Ring::Kick {
            self.kicked += 1;
            rustix::io::write(&self.kick, &1u64.to_ne_bytes()).expect("kick");
        }
    }
}

fn wait_for(what: &str, mut cond: impl FnMut() -> bool) {
    let start = Instant::now();
    while !cond() {
        assert!(start.elapsed() < PATIENCE, "waited too long for {what}");
        std::thread::yield_now();
    }
}

fn done(cq: &mut Cq) -> Cqe {
    let mut got = None;
    wait_for("a completion", || {
        got = cq.poll();
        got.is_some()
    });
    let c = got.expect("waited for");
    assert_eq!(c.status, 0);
    c
}

#[test]
fn a_thread_that_sleeps_is_kicked_and_misses_nothing() {
    let mut r = Rig::new(Duration::from_micros(20));
    let mut rng = Rng(21);
    for i in 0..1_500 {
        r.exchange(i);
        match rng.below(4) {
            // Around the time when it falls asleep.
            0 => {
                let until = Instant::now() + Duration::from_micros(rng.below(120));
                while Instant::now() < until {
                    std::hint::spin_loop();
                }
            }
            1 if i % 20 == 0 => std::thread::sleep(Duration::from_millis(1)),
            _ => {}
        }
    }
    assert!(r.a.kicked > 5, "it slept {} times only", r.a.kicked);
    r.stop();
}

#[test]
fn asleep_it_is_asleep_and_awake_nobody_kicks() {
    let mut r = Rig::new(Duration::from_micros(20));
    r.exchange(0);
    let asleep = |r: &Rig| {
        let d = &r.a.side.user.ram.window().doorbells;
        d.need_wakeup.load(Ordering::SeqCst) == 1
            && d.polled[r.a.side.qp.index()].load(Ordering::SeqCst) == 0
    };
    // A nudge left over from the set-up may wake it between the look and the doorbell: then the next sleep counts.
    let mut rounds = 0;
    while r.a.kicked == 0 {
        wait_for("sleep", || asleep(&r));
        rounds += 1;
        r.exchange(rounds);
        assert!(rounds < 1_000, "nobody had to kick in {rounds} sleeps");
    }
    r.stop();

    let mut r = Rig::new(Duration::from_secs(60));
    for i in 0..100 {
        r.exchange(i);
    }
    assert_eq!(r.a.kicked, 0, "it spins: nobody needs to kick");
    r.stop();
}

/// An RNR wait ends although the device sleeps and the receive rings no doorbell.
#[test]
fn a_sleeping_thread_keeps_time() {
    let mut r = Rig::new(Duration::ZERO);
    r.a.post(&Wr::new(WrOpcode::Send, 1).inline(b"early"));
    std::thread::sleep(Duration::from_millis(20));
    assert!(r.a.side.scq.poll().is_none());
    r.b.side.qp.post_recv(2, &[r.b.side.mr.sge(0, 64)]);
    assert_eq!(done(&mut r.a.side.scq).wr_id, 1);
    assert_eq!(done(&mut r.b.side.rcq).byte_len, 5);
    // Receives posted to a queue in error flush, without a doorbell.
    r.cell
        .control(|e| r.b.side.qp.go(e, QpState::Err))
        .expect("ERR");
    r.b.side.qp.post_recv(3, &[]);
    wait_for("the flush", || {
        r.b.side.rcq.poll().is_some_and(|c| c.wr_id == 3)
    });
    r.stop();
}

#[test]
fn control_gets_in_while_the_engine_is_busy() {
    let mut r = Rig::new(Duration::from_secs(60));
    let stop = AtomicBool::new(false);
    let cell = Arc::clone(&r.cell);
    let moved = AtomicU64::new(0);
    std::thread::scope(|s| {
        let (a, b, stop, moved) = (&mut r.a, &r.b, &stop, &moved);
        s.spawn(move || {
            let mut i = 0;
            while !stop.load(Ordering::Relaxed) {
                a.post(
                    &Wr::new(WrOpcode::Write, i)
                        .inline(&[7; 8])
                        .to(&b.side.mr, 0),
                );
                assert_eq!(done(&mut a.side.scq).wr_id, i);
                i += 1;
                moved.store(i, Ordering::SeqCst);
            }
        });
        let (start, mut controls) = (Instant::now(), 0);
        while controls < 300 || moved.load(Ordering::SeqCst) < 300 {
            assert!(start.elapsed() < PATIENCE, "control or data starves");
            // Objects made and dropped while data moves.
            cell.control(|e| {
                let u = User::new(e, 8192);
                let pd = u.pd(e);
                u.mr_at(e, pd, 0, 4096, FULL);
                e.remove_user(u.id);
            });
            controls += 1;
        }
        stop.store(true, Ordering::SeqCst);
    });
    r.stop();
}

#[test]
fn inline_driving_and_back() {
    for spin in [Duration::ZERO, Duration::from_secs(60)] {
        let mut r = Rig::new(spin);
        for round in 0..20 {
            r.exchange(round);
            let cell = Arc::clone(&r.cell);
            let mut inline = cell.drive_inline();
            assert!(
                !inline.driver().engine().is_dozing(),
                "whoever polls says so"
            );
            let (a, b) = (&mut r.a.side, &mut r.b.side);
            for i in 0..50u64 {
                b.qp.post_recv(i, &[b.mr.sge(0, 64)]);
                a.qp.post(&Wr::new(WrOpcode::Send, i).inline(&i.to_le_bytes()));
                if i == 7 && round == 0 {
                    std::thread::sleep(Duration::from_millis(20));
                    assert!(a.scq.poll().is_none(), "nobody else drives");
                }
                let mut turns = 0;
                while a.scq.head < b.rcq.head + 1 && a.scq.poll().is_none() {
                    inline.driver().poll();
                    turns += 1;
                    assert!(turns < 10, "inline, a turn does what there is to do");
                }
                assert_eq!(b.rcq.one().data[0], i);
                assert_eq!(a.scq.drain().len(), 0);
            }
            drop(inline);
        }
        r.exchange(99);
        r.stop();
    }
}

#[test]
fn control_gets_in_while_a_client_drives_inline() {
    let mut r = Rig::new(Duration::ZERO);
    let cell = Arc::clone(&r.cell);
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        let (cell, stop) = (&cell, &stop);
        let (ready, go) = mpsc::channel();
        s.spawn(move || {
            let mut inline = cell.drive_inline();
            ready.send(()).expect("somebody waits");
            while !stop.load(Ordering::Relaxed) {
                inline.driver().poll();
            }
        });
        go.recv().expect("inline");
        for _ in 0..200 {
            let dozing = cell.control(|e| {
                assert!(
                    e.alloc_pd(r.a.side.user.id)
                        .is_ok_and(|pd| { e.dealloc_pd(r.a.side.user.id, pd).is_ok() })
                );
                e.is_dozing()
            });
            assert!(!dozing);
        }
        for i in 0..50 {
            r.exchange(i);
        }
        stop.store(true, Ordering::SeqCst);
    });
    r.exchange(50);
    r.stop();
}

/// Two clients take turns, against the thread and each other; each sees only its own turns' work.
#[test]
fn clients_take_turns() {
    let r = Rig::new(Duration::from_micros(50));
    let cell = &r.cell;
    let turns = AtomicU64::new(0);
    let inside = AtomicBool::new(false);
    std::thread::scope(|s| {
        for _ in 0..2 {
            s.spawn(|| {
                for _ in 0..100 {
                    let mut inline = cell.drive_inline();
                    assert!(!inside.swap(true, Ordering::SeqCst), "two drive at once");
                    for _ in 0..20 {
                        inline.driver().poll();
                    }
                    turns.fetch_add(1, Ordering::SeqCst);
                    inside.store(false, Ordering::SeqCst);
                }
            });
        }
    });
    assert_eq!(turns.load(Ordering::SeqCst), 200);
    let mut r = r;
    r.exchange(1);
    r.stop();
}

/// A user that always has work for the device holds neither a client off nor the end.
#[test]
fn endless_work_does_not_keep_the_engine() {
    let mut r = Rig::new(Duration::from_secs(60));
    let stop = Arc::new(AtomicBool::new(false));
    let cell = Arc::clone(&r.cell);
    std::thread::scope(|s| {
        let (a, b, flag) = (&mut r.a.side, &r.b.side, Arc::clone(&stop));
        let worker = s.spawn(move || {
            // A ring that is never empty: slots are filled again before the device comes round.
            let mut i = 0;
            while !flag.load(Ordering::Relaxed) {
                if a.qp.sq_tail.wrapping_sub(a.scq.head) < 30 {
                    let wr = Wr::new(WrOpcode::Write, i).sge(a.mr.sge(0, LEN as u32));
                    a.qp.post_silently(&wr.to(&b.mr, 0));
                    let _ = a.qp.ring();
                    i += 1;
                }
                while let Some(c) = a.scq.poll() {
                    assert_eq!(c.status, 0);
                }
            }
        });
        for _ in 0..20 {
            let mut inline = cell.drive_inline();
            inline.driver().poll();
            drop(inline);
            std::thread::sleep(Duration::from_micros(200));
        }
        let thread = r.thread.take().expect("running");
        let (tx, rx) = mpsc::channel();
        s.spawn(move || {
            drop(thread);
            let _ = tx.send(());
        });
        let stopped = rx.recv_timeout(PATIENCE);
        stop.store(true, Ordering::SeqCst);
        worker.join().expect("the worker");
        stopped.expect("the engine's thread does not stop while there is work");
    });
}

#[test]
fn stopping_asleep_and_users_that_go() {
    let mut r = Rig::new(Duration::ZERO);
    wait_for("sleep", || r.cell.control(|e| e.is_dozing()));
    r.kicks.remove(2);
    r.kicks.remove(2);
    r.kicks.remove(77);
    r.cell.control(|e| e.remove_user(r.b.side.user.id));
    r.kicks.nudge();
    r.cell.nudge();
    // The one that is left: its peer is gone, its QP in error, its sends flush.
    r.a.post(&Wr::new(WrOpcode::Send, 5));
    let mut got = None;
    wait_for("the flush", || {
        got = r.a.side.scq.poll();
        got.is_some()
    });
    assert_eq!(status(&got.expect("waited for")), WcStatus::WrFlushErr);
    r.stop();
    // Without a thread, whoever likes drives.
    let mut d = r.cell.driver();
    for _ in 0..10 {
        d.poll();
    }
}

/// A user that sleeps until it is woken, the device asleep too now and then: nobody waits for ever.
#[test]
fn armed_users_are_woken() {
    let mut r = Rig::new(Duration::from_micros(30));
    let mut rng = Rng(22);
    let (a, b) = (&mut r.a, &mut r.b.side);
    let total = 1_000u64;
    std::thread::scope(|s| {
        s.spawn(move || {
            for i in 0..total {
                a.post(&Wr::new(WrOpcode::Send, i).inline(&i.to_le_bytes()));
                assert_eq!(done(&mut a.side.scq).wr_id, i);
                if rng.below(3) == 0 {
                    std::thread::sleep(Duration::from_micros(rng.below(150)));
                }
            }
        });
        let (mut got, mut posted, mut sleeps) = (0, 0, 0);
        while got < total {
            while posted < total && posted - got < 16 {
                b.qp.post_recv(posted, &[b.mr.sge(0, 64)]);
                posted += 1;
            }
            let woken = b.user.wakes.0.load(Ordering::SeqCst);
            b.rcq.arm(arm::ANY);
            let mut any = false;
            while let Some(c) = b.rcq.poll() {
                assert_eq!((c.status, c.data[0]), (0, got));
                got += 1;
                any = true;
            }
            if !any && got < total {
                sleeps += 1;
                wait_for("a wake-up", || {
                    b.user.wakes.0.load(Ordering::SeqCst) > woken
                });
            }
        }
        assert!(sleeps > 20, "{sleeps} sleeps only");
    });
    r.stop();
}
