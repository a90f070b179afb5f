//! The platform of a native process, against a socket that plays hyv-host's side of the greeting.
#![cfg(all(not(loom), feature = "std", target_os = "linux"))]
#![allow(unsafe_code, reason = "gives memory back to a platform")]

use std::alloc::Layout;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use hyv_abi::ABI_VERSION;
use hyv_abi::session::{HELLO_MAGIC, Hello, Welcome};
use hyv_abi::types::{Errno, Reason};
use hyv_abi::window::{KICK_CONTROL, KICK_DATA, MAGIC, WINDOW_LEN};
use hyv_verbs::{ConnectError, HostGone, Platform, Process};
use rustix::event::EventfdFlags;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};
use tempfile::TempDir;
use zerocopy::{FromBytes, IntoBytes};

const RAM: u64 = 8 << 20;

/// What the host answers.
#[derive(Clone, Copy)]
struct Answer {
    welcome: Welcome,
    seals: SealFlags,
    ram_len: u64,
    fds: usize,
    window_magic: u64,
    /// The process stops and goes on before there is an answer.
    stopped: bool,
}

fn good() -> Answer {
    let welcome = Welcome {
        magic: HELLO_MAGIC,
        version: ABI_VERSION,
        status: 0,
        reason: 0,
        ram_len: RAM,
    };
    Answer {
        welcome,
        seals: SealFlags::SHRINK,
        ram_len: RAM,
        fds: 5,
        window_magic: MAGIC,
        stopped: false,
    }
}

struct Host {
    socket: Option<OwnedFd>,
    window: OwnedFd,
    kicks: [OwnedFd; 2],
    wake: OwnedFd,
    hello: Hello,
}

fn memfd(len: u64, seals: SealFlags) -> OwnedFd {
    let fd =
        rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&fd, len).unwrap();
    rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
    fd
}

fn eventfd() -> OwnedFd {
    rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

/// Serves one session in a folder.
fn host(dir: &Path, answer: Answer) -> JoinHandle<Host> {
    let listener = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    rustix::net::bind(
        &listener,
        &SocketAddrUnix::new(dir.join("verbs.sock")).unwrap(),
    )
    .unwrap();
    rustix::net::listen(&listener, 1).unwrap();
    thread::spawn(move || {
        let socket = rustix::net::accept_with(&listener, SocketFlags::CLOEXEC).unwrap();
        let mut hello = [0; size_of::<Hello>()];
        if answer.stopped {
            stop_and_go_on();
        }
        let (len, _) = rustix::net::recv(&socket, &mut hello, RecvFlags::empty()).unwrap();
        assert_eq!(len, size_of::<Hello>());
        let window = memfd(WINDOW_LEN as u64, answer.seals);
        rustix::io::pwrite(&window, &answer.window_magic.to_le_bytes(), 0).unwrap();
        let ram = memfd(answer.ram_len, answer.seals);
        let (kicks, wake) = ([eventfd(), eventfd()], eventfd());
        let fds = [
            window.as_fd(),
            ram.as_fd(),
            kicks[0].as_fd(),
            kicks[1].as_fd(),
            wake.as_fd(),
        ];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(5))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if answer.fds > 0 {
            assert!(control.push(SendAncillaryMessage::ScmRights(&fds[..answer.fds])));
        }
        let welcome = answer.welcome;
        let io = [IoSlice::new(welcome.as_bytes())];
        rustix::net::sendmsg(&socket, &io, &mut control, SendFlags::empty()).unwrap();
        let hello = Hello::read_from_bytes(&hello).unwrap();
        Host {
            socket: Some(socket),
            window,
            kicks,
            wake,
            hello,
        }
    })
}

/// Has this process stopped by a signal and continued by another, as Ctrl-Z and `fg` do.
fn stop_and_go_on() {
    let pid = std::process::id();
    let done = std::process::Command::new("sh")
        .args([
            "-c",
            &format!("kill -STOP {pid}; sleep 0.05; kill -CONT {pid}; sleep 0.05"),
        ])
        .status()
        .unwrap();
    assert!(done.success());
}

fn count(fd: &OwnedFd) -> u64 {
    let mut n = [0; 8];
    rustix::io::read(fd, &mut n).unwrap();
    u64::from_ne_bytes(n)
}

#[test]
fn a_session_shares_memory_kicks_and_wakes() {
    let dir = TempDir::new().unwrap();
    let served = host(dir.path(), good());
    let process = Process::connect(
        dir.path(),
        RAM,
        "a name that is longer than thirty-two bytes, ä",
    )
    .unwrap();
    let host = served.join().unwrap();
    assert_eq!(
        (host.hello.magic, host.hello.version, host.hello.ram_len),
        (HELLO_MAGIC, ABI_VERSION, RAM)
    );
    assert_eq!(&host.hello.name, b"a name that is longer than thirt");
    assert_eq!(process.ram_len() as u64, RAM);

    process.window().user.app[0].store(0x1234, Ordering::Relaxed);
    let mut word = [0; 8];
    rustix::io::pread(&host.window, &mut word, 4096 + 64).unwrap();
    assert_eq!(u64::from_le_bytes(word), 0x1234);

    let layout = Layout::from_size_align(1000, 4096).unwrap();
    let a = process.alloc_dma(layout).unwrap();
    let b = process.alloc_dma(layout).unwrap();
    let [at_a, at_b] = [a, b].map(|p| process.ram_offset(p.as_ptr(), 1000).unwrap());
    assert!(at_a.abs_diff(at_b) >= 1000 && at_a % 4096 == 0);
    assert_eq!(process.ram_offset(a.as_ptr(), RAM as usize), None);
    assert_eq!(process.ram_offset(std::ptr::dangling(), 1), None);
    // SAFETY: 1000 bytes of our own.
    unsafe { a.write_bytes(7, 1000) };
    // SAFETY: from `alloc_dma`, not used any more.
    unsafe { process.free_dma(a, layout) };
    let again = process.alloc_dma(layout).unwrap();
    // SAFETY: 1000 bytes of our own.
    let bytes = unsafe { std::slice::from_raw_parts(again.as_ptr(), 1000) };
    assert!(bytes.iter().all(|b| *b == 0));
    assert!(
        process
            .alloc_dma(Layout::from_size_align(RAM as usize, 64).unwrap())
            .is_none()
    );

    process.kick(KICK_CONTROL);
    process.kick(KICK_DATA);
    process.kick(KICK_DATA);
    assert_eq!((count(&host.kicks[0]), count(&host.kicks[1])), (1, 2));

    let seen = process.wake_seen();
    let start = Instant::now();
    process.wait(seen, Some(20_000_000)).unwrap();
    assert!(start.elapsed() >= Duration::from_millis(20));
    rustix::io::write(&host.wake, &1u64.to_ne_bytes()).unwrap();
    process.wait(seen, None).unwrap();
    assert_ne!(process.wake_seen(), seen);
    process.wait(seen, None).unwrap();
}

#[test]
fn a_process_that_is_stopped_while_it_waits_for_the_host_goes_on() {
    let dir = TempDir::new().unwrap();
    let answer = Answer {
        stopped: true,
        ..good()
    };
    let served = host(dir.path(), answer);
    Process::connect(dir.path(), RAM, "stopped").unwrap();
    served.join().unwrap();
}

#[test]
fn one_wake_wakes_all_who_sleep() {
    let dir = TempDir::new().unwrap();
    let served = host(dir.path(), good());
    let process = Process::connect(dir.path(), RAM, "many").unwrap();
    let host = served.join().unwrap();
    let seen = process.wake_seen();
    let sleepers: Vec<_> = (0..4)
        .map(|_| {
            let process = process.clone();
            thread::spawn(move || {
                while process.wake_seen() == seen {
                    process.wait(seen, Some(60_000_000_000)).unwrap();
                }
            })
        })
        .collect();
    thread::sleep(Duration::from_millis(30));
    let start = Instant::now();
    rustix::io::write(&host.wake, &1u64.to_ne_bytes()).unwrap();
    for s in sleepers {
        s.join().unwrap();
    }
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_host_that_ends_is_noticed_asleep_and_awake() {
    for asleep in [true, false] {
        let dir = TempDir::new().unwrap();
        let served = host(dir.path(), good());
        let process = Process::connect(dir.path(), RAM, "left").unwrap();
        let mut host = served.join().unwrap();
        process.wait(process.wake_seen(), Some(1)).unwrap();
        let end = thread::spawn(move || {
            thread::sleep(Duration::from_millis(20));
            host.socket.take();
            host
        });
        let start = Instant::now();
        loop {
            let turn = if asleep {
                process.wait(process.wake_seen(), None)
            } else {
                process.relax()
            };
            if turn == Err(HostGone) {
                break;
            }
            assert!(start.elapsed() < Duration::from_secs(20));
        }
        end.join().unwrap();
        assert_eq!(process.wait(process.wake_seen(), None), Err(HostGone));
    }
}

fn refused(answer: Answer) -> ConnectError {
    let dir = TempDir::new().unwrap();
    let served = host(dir.path(), answer);
    let error = Process::connect(dir.path(), RAM, "x").unwrap_err();
    served.join().unwrap();
    error
}

#[test]
fn greetings_that_are_none_are_refused() {
    let mut other = good();
    other.welcome.version = ABI_VERSION + 1;
    other.fds = 0;
    assert!(matches!(refused(other), ConnectError::Version { host } if host == ABI_VERSION + 1));
    let mut quota = good();
    (quota.welcome.status, quota.welcome.reason, quota.fds) =
        (Errno::NoMem as u32, Reason::QuotaMemory as u32, 0);
    let error = refused(quota);
    assert!(
        matches!(error, ConnectError::Refused(e) if e.errno == Errno::NoMem),
        "{error}"
    );
    assert!(error.to_string().contains("quota"), "{error}");
    let mut magic = good();
    magic.welcome.magic = 1;
    assert!(matches!(refused(magic), ConnectError::Protocol(_)));
    assert!(
        refused(Answer { fds: 4, ..good() })
            .to_string()
            .contains("file descriptors")
    );
    assert!(
        refused(Answer {
            seals: SealFlags::GROW,
            ..good()
        })
        .to_string()
        .contains("sealed")
    );
    assert!(
        refused(Answer {
            ram_len: RAM - 4096,
            ..good()
        })
        .to_string()
        .contains("shorter")
    );
    assert!(
        refused(Answer {
            window_magic: 0,
            ..good()
        })
        .to_string()
        .contains("window")
    );
}

#[test]
fn nobody_there_says_what_to_start() {
    let dir = TempDir::new().unwrap();
    for path in [
        dir.path().to_path_buf(),
        dir.path().join("missing/verbs.sock"),
    ] {
        let error = Process::connect(&path, RAM, "x").unwrap_err();
        assert!(matches!(error, ConnectError::NotRunning { .. }), "{error}");
        assert!(error.to_string().contains("./run.sh kvstore"), "{error}");
    }
    let stale = dir.path().join("verbs.sock");
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    rustix::net::bind(&socket, &SocketAddrUnix::new(&stale).unwrap()).unwrap();
    drop(socket);
    assert!(matches!(
        Process::connect(&stale, RAM, "x"),
        Err(ConnectError::NotRunning { .. })
    ));
    let long = dir.path().join("x".repeat(200));
    assert!(matches!(
        Process::connect(&long, RAM, "x"),
        Err(ConnectError::System { .. })
    ));
}
