use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hyv_abi::control::{AllocPd, DeallocPd};
use hyv_abi::window::{WINDOW_LEN, Window};

use super::*;
use crate::backend::testing::{AnyWindow, Driver, FAKE_USERS, Fake, PATIENCE, small_quotas};
use crate::backend::{Backend, BackendConfig};
use crate::sys::memory::check_sealed;

/// Descriptors are counted per process, so tests that open them take turns.
static TURN: Mutex<()> = Mutex::new(());

struct Host {
    backend: Backend,
    fake: Arc<Fake>,
    dir: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let fake = Arc::new(Fake::default());
        let config = BackendConfig {
            runtime_dir: Some(dir.path().into()),
            quotas: small_quotas(),
            ..BackendConfig::default()
        };
        Self {
            backend: Backend::spawn(config, fake.clone()).unwrap(),
            fake,
            dir,
        }
    }

    fn connect(&self) -> OwnedFd {
        socket::connect(&self.dir.path().join(SOCKET_NAME)).unwrap()
    }

    fn wait(&self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let start = Instant::now();
        while !done(self) {
            assert!(start.elapsed() < PATIENCE, "waited in vain for {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn hello(ram_len: u64, name: &str) -> Hello {
    let mut n = [0; 32];
    n[..name.len()].copy_from_slice(name.as_bytes());
    Hello {
        magic: HELLO_MAGIC,
        version: hyv_abi::ABI_VERSION,
        ram_len,
        name: n,
    }
}

fn answer(socket: &OwnedFd) -> (Welcome, Vec<OwnedFd>) {
    let mut buf = [0; 64];
    let (n, fds) = socket::recv_with_fds(socket, &mut buf).unwrap();
    let welcome = Welcome::read_from_bytes(&buf[..n]).unwrap();
    assert_eq!(
        (welcome.magic, welcome.version),
        (HELLO_MAGIC, hyv_abi::ABI_VERSION)
    );
    (welcome, fds)
}

fn refusal(host: &Host, message: &[u8]) -> (u32, u32) {
    let socket = host.connect();
    socket::send_with_fds(&socket, message, &[]).unwrap();
    let (w, fds) = answer(&socket);
    assert!(fds.is_empty() && w.status != 0 && w.ram_len == 0);
    assert_eq!(
        socket::recv_with_fds(&socket, &mut [0; 8]).unwrap().0,
        0,
        "closed after the refusal"
    );
    (w.status, w.reason)
}

/// What a process makes of its descriptors.
fn take(fds: Vec<OwnedFd>, ram_len: u64) -> Driver {
    let [window, ram_fd, kick_control, kick_data, wake]: [OwnedFd; NUM_FDS] =
        fds.try_into().unwrap();
    check_sealed(window.as_fd(), WINDOW_LEN as u64).unwrap();
    check_sealed(ram_fd.as_fd(), ram_len).unwrap();
    let window = Mapping::new(&window, WINDOW_LEN as u64).unwrap();
    let ram = Mapping::new(&ram_fd, ram_len).unwrap();
    drop(kick_data);
    Driver::over(
        AnyWindow::Received(Arc::new(window)),
        Arc::new(ram),
        kick_control.into(),
        wake.into(),
    )
}

fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn a_process_gets_a_device_and_its_end_is_noticed() {
    let _turn = TURN.lock().unwrap();
    let host = Host::new();
    let socket = host.connect();
    socket::send_with_fds(&socket, hello(1, "client\n").as_bytes(), &[]).unwrap();
    let (w, fds) = answer(&socket);
    assert_eq!((w.status, w.ram_len), (0, 2 << 20));
    let mut d = take(fds, w.ram_len);
    let window: &Window = &d.window;
    let h = &window.header;
    assert_eq!(
        (
            h.magic.load(Ordering::Acquire),
            h.ram_len.load(Ordering::Relaxed)
        ),
        (hyv_abi::window::MAGIC, 2 << 20)
    );
    assert_eq!(
        (
            h.num_regions.load(Ordering::Relaxed),
            h.regions[0].len.load(Ordering::Relaxed)
        ),
        (1, 2 << 20)
    );
    assert_eq!(
        h.tsc_hz.load(Ordering::Relaxed),
        crate::sys::clock::steady_tsc_hz()
    );
    assert_ne!(h.generation.load(Ordering::Relaxed), 0);
    let pd = d.call(AllocPd {}).unwrap().handle;
    d.call(DeallocPd { pd }).unwrap();
    let users = host.backend.users();
    assert_eq!(
        (users[0].name.as_str(), users[0].kind),
        ("client?", UserKind::Process)
    );
    drop(socket);
    host.wait("the end to be noticed", |h| {
        h.backend.users().is_empty() && h.fake.users() == 0
    });
    assert_eq!(
        (
            host.backend.stats().sessions,
            host.backend.stats().refused_sessions
        ),
        (1, 0)
    );
}

#[test]
fn bad_hellos_are_refused_with_the_reason() {
    let _turn = TURN.lock().unwrap();
    let host = Host::new();
    let good = hello(1 << 20, "x");
    let refuse = |e: Errno, r: Reason| (e as u32, r as u32);
    let cases: Vec<(Vec<u8>, (u32, u32))> = vec![
        (vec![1], refuse(Errno::Inval, Reason::BadLength)),
        (
            good.as_bytes()[..40].to_vec(),
            refuse(Errno::Inval, Reason::BadLength),
        ),
        (
            [good.as_bytes(), &[0]].concat(),
            refuse(Errno::Inval, Reason::BadLength),
        ),
        (
            [good.as_bytes(), &[0; 100]].concat(),
            refuse(Errno::Inval, Reason::BadLength),
        ),
        (
            Hello { magic: 7, ..good }.as_bytes().to_vec(),
            refuse(Errno::Inval, Reason::None),
        ),
        (
            Hello {
                version: good.version + 1,
                ..good
            }
            .as_bytes()
            .to_vec(),
            refuse(Errno::ProtoNoSupport, Reason::BadVersion),
        ),
        // A later version may say more, or less.
        (
            Hello {
                version: good.version + 1,
                ..good
            }
            .as_bytes()[..8]
                .to_vec(),
            refuse(Errno::ProtoNoSupport, Reason::BadVersion),
        ),
        (
            Hello { ram_len: 0, ..good }.as_bytes().to_vec(),
            refuse(Errno::Inval, Reason::ZeroLength),
        ),
        (
            Hello {
                ram_len: 9 << 20,
                ..good
            }
            .as_bytes()
            .to_vec(),
            refuse(Errno::NoMem, Reason::QuotaMemory),
        ),
        (
            Hello {
                ram_len: u64::MAX,
                ..good
            }
            .as_bytes()
            .to_vec(),
            refuse(Errno::NoMem, Reason::QuotaMemory),
        ),
    ];
    let n = cases.len() as u64;
    for (message, expected) in cases {
        assert_eq!(refusal(&host, &message), expected, "{message:?}");
    }
    assert_eq!(
        (
            host.backend.stats().refused_sessions,
            host.backend.users().len()
        ),
        (n, 0)
    );
    // Descriptors that nobody asked for are closed; the hello counts.
    let socket = host.connect();
    let extra = EventFd::new().unwrap();
    socket::send_with_fds(&socket, good.as_bytes(), &[extra.as_fd(), extra.as_fd()]).unwrap();
    assert_eq!(answer(&socket).0.status, 0);
}

#[test]
fn quotas_of_sessions_and_of_their_ram() {
    let _turn = TURN.lock().unwrap();
    let host = Host::new();
    let open = |ram: u64| {
        let socket = host.connect();
        socket::send_with_fds(&socket, hello(ram, "x").as_bytes(), &[]).unwrap();
        let (w, fds) = answer(&socket);
        (w.status, w.reason, (socket, fds))
    };
    let (s, _, first) = open(8 << 20);
    assert_eq!(s, 0);
    let (s, r, _) = open(6 << 20);
    assert_eq!((s, r), (Errno::NoMem as u32, Reason::QuotaMemory as u32));
    let (s, _, second) = open(4 << 20);
    assert_eq!(s, 0);
    let (s, r, _) = open(1);
    assert_eq!((s, r), (Errno::NoMem as u32, Reason::QuotaObjects as u32));
    drop(first);
    host.wait("a session to end", |h| h.backend.users().len() == 1);
    assert_eq!(open(8 << 20).0, 0);
    drop(second);
    // The fake provider has room for more: it was the quota of sessions that refused.
    const { assert!(FAKE_USERS > 2) };
}

#[test]
fn whoever_says_nothing_or_too_much_is_cut_off() {
    let _turn = TURN.lock().unwrap();
    let host = Host::new();
    let silent = host.connect();
    let (w, _) = answer(&silent);
    assert_eq!(w.status, Errno::Again as u32);
    let gone = host.connect();
    drop(gone);
    // A message after the welcome breaks the protocol.
    let chatty = host.connect();
    socket::send_with_fds(&chatty, hello(1, "x").as_bytes(), &[]).unwrap();
    assert_eq!(answer(&chatty).0.status, 0);
    socket::send_with_fds(&chatty, b"more", &[]).unwrap();
    host.wait("the session to end", |h| h.backend.users().is_empty());
    // Connections that never say hello do not keep others out for long.
    let idle: Vec<OwnedFd> = (0..40).map(|_| host.connect()).collect();
    host.wait("the surplus to be refused", |h| {
        h.backend.stats().refused_sessions >= 25
    });
    drop(idle);
    host.wait("a session", |h| {
        let s = h.connect();
        socket::send_with_fds(&s, hello(1, "x").as_bytes(), &[]).is_ok() && answer(&s).0.status == 0
    });
}

#[test]
fn nothing_leaks() {
    let _turn = TURN.lock().unwrap();
    let host = Host::new();
    let round = |abandon: bool| {
        let socket = host.connect();
        socket::send_with_fds(&socket, hello(1, "x").as_bytes(), &[]).unwrap();
        if !abandon {
            let (w, fds) = answer(&socket);
            let mut d = take(fds, w.ram_len);
            d.call(AllocPd {}).unwrap();
        }
        drop(socket);
        let served = host.backend.stats().sessions;
        let _ = refusal(&host, b"?");
        host.wait("the session to end", |h| {
            h.fake.users() == 0 && h.backend.stats().sessions >= served
        });
    };
    let settle = || {
        // Other tests of this process open and close descriptors too; take the calmest of a few looks.
        (0..20)
            .map(|_| {
                std::thread::sleep(Duration::from_millis(5));
                open_fds()
            })
            .min()
            .unwrap()
    };
    round(false);
    let (before, maps) = (settle(), mappings());
    for i in 0..150 {
        round(i % 2 == 0);
    }
    let (after, maps_after) = (settle(), mappings());
    assert!(after < before + 75, "{before} descriptors, then {after}");
    assert!(
        maps_after < maps + 75,
        "{maps} mappings of sessions, then {maps_after}"
    );
}

fn mappings() -> usize {
    std::fs::read_to_string("/proc/self/maps")
        .unwrap()
        .lines()
        .filter(|l| l.contains("hyv-"))
        .count()
}

#[test]
fn stopping_ends_sessions_and_removes_the_socket() {
    let _turn = TURN.lock().unwrap();
    let mut host = Host::new();
    let socket = host.connect();
    socket::send_with_fds(&socket, hello(1, "x").as_bytes(), &[]).unwrap();
    let (w, fds) = answer(&socket);
    let d = take(fds, w.ram_len);
    host.backend.stop();
    assert_eq!(socket::recv_with_fds(&socket, &mut [0; 8]).unwrap().0, 0);
    assert_eq!(d.window.header.shutdown.load(Ordering::Acquire), 1);
    assert!(!host.dir.path().join(SOCKET_NAME).exists());
}

#[test]
fn a_stale_socket_is_replaced_and_anything_else_is_not() {
    let _turn = TURN.lock().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(SOCKET_NAME);
    std::mem::forget(Listener::bind(dir.path()).unwrap());
    let l = Listener::bind(dir.path()).unwrap();
    assert!(l.accept().unwrap().is_none());
    drop(socket::connect(&path).unwrap());
    drop(l);
    std::fs::write(&path, "precious").unwrap();
    let e = Listener::bind(dir.path()).unwrap_err().to_string();
    assert!(e.contains(SOCKET_NAME), "{e}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
}

#[test]
fn only_the_same_user_and_root_may_connect() {
    assert!(may_connect(1000, 1000) && may_connect(0, 1000) && may_connect(0, 0));
    assert!(!may_connect(1000, 0) && !may_connect(1001, 1000));
}

#[test]
fn names_are_printable() {
    let name = |bytes: &[u8]| {
        let mut h = hello(1, "");
        h.name[..bytes.len()].copy_from_slice(bytes);
        judge(h.as_bytes(), &Quotas::default()).unwrap().name
    };
    assert_eq!(name(b"kv bench"), "kv bench");
    assert_eq!(name(b""), "process");
    assert_eq!(name(b"\x1b[31mred\0junk"), "?[31mred");
    assert_eq!(name(&[0xff; 32]).chars().count(), 32);
}

#[test]
fn the_descriptors_of_parts_are_distinct() {
    let p = Parts::create(RAM_STEP).unwrap();
    let mut fds = [
        p.memory.window.as_fd().as_raw_fd(),
        p.ram_fd.as_raw_fd(),
        p.kick_control.as_fd().as_raw_fd(),
        p.kick_data.as_fd().as_raw_fd(),
        p.wake.as_fd().as_raw_fd(),
    ];
    fds.sort_unstable();
    assert!(fds.windows(2).all(|w| w[0] != w[1]));
}
