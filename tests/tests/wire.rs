//! Two hosts in network namespaces of their own, joined by a cable: native processes connect, use the connection and part.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use hyv_e2e::{PATIENCE, Running, Sandbox, programs};
use hyv_verbs::cm::{self, CmEvent, ConnParam, ConnectOptions, EventChannel};
use hyv_verbs::{
    Access, CmEventKind, CompletionQueue, Context, Error, Gid, MemoryRegion, Payload, Process,
    ProtectionDomain, QpCaps, RecvWr, SendOp, SendWr, WcStatus,
};

const PORT: u16 = 7471;
const RAM: u64 = 8 << 20;
/// Messages of several packets, and no multiple of any path MTU.
const LEN: u32 = 20_001;

/// The addresses of both ends, IPv4 and IPv6.
const ADDRESSES: [[&str; 2]; 2] = [["10.88.0.1", "10.88.0.2"], ["fd00:88::1", "fd00:88::2"]];

fn ip(args: &[&str]) -> Result<(), String> {
    let output = Command::new("ip")
        .args(args)
        .output()
        .map_err(|e| e.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("ip {}: {}", args.join(" "), said.trim()))
}

/// Two namespaces and the cable between them.
struct Cable {
    names: [String; 2],
}

impl Cable {
    /// None, with the reason on standard error, where this user may not make one.
    fn new(mtu: &str) -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Relaxed);
        let names = ["a", "b"].map(|end| format!("hyv-cm-{}-{n}{end}", std::process::id()));
        if let Err(e) = ip(&["netns", "add", &names[0]]) {
            eprintln!("skipped: no network namespace can be made: {e}");
            return None;
        }
        let cable = Self { names };
        let [a, b] = &cable.names;
        let must = |args: &[&str]| ip(args).unwrap_or_else(|e| panic!("{e}"));
        must(&["netns", "add", b]);
        let link = ["link", "add", "eth0", "mtu", mtu, "netns", a];
        let peer = ["type", "veth", "peer", "eth0", "mtu", mtu, "netns", b];
        must(&[&link[..], &peer[..]].concat());
        for (i, name) in cable.names.iter().enumerate() {
            let [v4, v6] = ADDRESSES;
            must(&["-n", name, "link", "set", "lo", "up"]);
            must(&["-n", name, "link", "set", "eth0", "up"]);
            let v4 = format!("{}/24", v4[i]);
            must(&["-n", name, "addr", "add", &v4, "dev", "eth0"]);
            let v6 = format!("{}/64", v6[i]);
            must(&["-n", name, "addr", "add", &v6, "dev", "eth0", "nodad"]);
        }
        Some(cable)
    }

    /// Starts a host at one end.
    fn host(&self, sandbox: &Sandbox, end: usize, address: &str, more: &[&str]) -> Host {
        let name = ["a", "b"][end];
        let mut command = sandbox.command("ip");
        command
            .args(["netns", "exec", &self.names[end]])
            .arg(programs::hyv_host())
            .args(["--name", name, "--listen", address, "--log", "debug"])
            .args(more);
        let mut running = sandbox.spawn(command);
        running.until(PATIENCE, |err| err.contains("RoCEv2 on").then_some(()));
        let folder = sandbox.instance(name);
        hyv_e2e::eventually("the host offers sessions", || {
            folder.join("verbs.sock").exists()
        });
        let process = Process::connect(&folder, RAM, name).expect("a session");
        let context = Context::open(process).expect("a device");
        let pd = context.alloc_pd().expect("a protection domain");
        let access = Access::LOCAL_WRITE
            | Access::REMOTE_READ
            | Access::REMOTE_WRITE
            | Access::REMOTE_ATOMIC;
        Host {
            running,
            cq: context.create_cq(64).expect("a completion queue"),
            mr: pd.alloc_mr(1 << 20, access).expect("memory"),
            pd,
            context,
        }
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        for name in &self.names {
            if let Err(e) = ip(&["netns", "delete", name]) {
                eprintln!("{e}");
            }
        }
    }
}

/// A host and a process of it.
struct Host {
    running: Running,
    context: Context,
    pd: ProtectionDomain,
    cq: CompletionQueue,
    mr: MemoryRegion,
}

impl Host {
    fn complete(&mut self, what: &str) -> hyv_verbs::WorkCompletion {
        let mut found = None;
        hyv_e2e::eventually(what, || {
            found = self.cq.poll_one();
            found.is_some()
        });
        found.expect("it came")
    }

    fn fill(&self, at: usize, seed: u8) {
        let bytes: Vec<u8> = (0..LEN)
            .map(|i| (i as u8).wrapping_mul(31) ^ seed)
            .collect();
        self.mr.write(at, &bytes).expect("it fits");
    }

    fn holds(&self, at: usize, seed: u8) -> bool {
        let mut bytes = vec![0; LEN as usize];
        self.mr.read(at, &mut bytes).expect("it is there");
        (0..LEN).all(|i| bytes[i as usize] == (i as u8).wrapping_mul(31) ^ seed)
    }
}

fn gid(address: &str) -> Gid {
    let ip: std::net::IpAddr = address.parse().expect("an address");
    Gid(match ip {
        std::net::IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        std::net::IpAddr::V6(v6) => v6.octets(),
    })
}

fn next(channel: &EventChannel) -> CmEvent {
    let event = channel
        .get_event(Some(PATIENCE))
        .expect("the host is there");
    event.expect("an event in time")
}

fn expect(channel: &EventChannel, kind: CmEventKind) -> CmEvent {
    let event = next(channel);
    assert_eq!(event.kind, kind, "status {}", event.status);
    event
}

/// The client's steps up to asking, since one thread plays both sides.
fn dial(host: &Host, to: Gid, port: u16, private: &[u8]) -> (cm::CmId, EventChannel) {
    let channel = EventChannel::new(&host.context);
    let mut id = channel.create_id().expect("an identifier");
    id.resolve_addr(to, port, Duration::from_secs(1))
        .expect("resolve_addr");
    expect(&channel, CmEventKind::AddrResolved);
    id.resolve_route(Duration::from_secs(1))
        .expect("resolve_route");
    expect(&channel, CmEventKind::RouteResolved);
    id.create_qp(&host.pd, &host.cq, &host.cq, &QpCaps::default())
        .expect("a queue pair");
    let param = ConnParam {
        private_data: private,
        initiator_depth: 4,
        ..ConnParam::default()
    };
    id.connect(&param).expect("connect");
    (id, channel)
}

fn connect_use_and_part(addresses: [&str; 2], carrier: &str) {
    let Some(cable) = Cable::new("1500") else {
        return;
    };
    let sandbox = Sandbox::new();
    let mut b = cable.host(&sandbox, 1, addresses[1], &["--carrier", carrier]);
    let mut a = cable.host(&sandbox, 0, addresses[0], &["--carrier", carrier]);
    let (listener, incoming) = cm::listen(&b.context, (Gid::LOCAL, PORT), 8).expect("listen");
    let (from, to) = (gid(addresses[0]), gid(addresses[1]));

    // Nobody listens there.
    let (_id, outgoing) = dial(&a, to, PORT + 1, b"");
    assert_eq!(expect(&outgoing, CmEventKind::Rejected).status, 8);
    // Refused with words.
    let (_id, outgoing) = dial(&a, to, PORT, b"");
    let mut request = expect(&incoming, CmEventKind::ConnectRequest);
    request
        .take_request()
        .expect("an identifier")
        .reject(b"busy")
        .expect("reject");
    let event = expect(&outgoing, CmEventKind::Rejected);
    assert_eq!(event.status, 28);
    assert!(event.private_data().starts_with(b"busy\0"));

    // Accepted.
    let (mut here, outgoing) = dial(&a, to, PORT, b"hello");
    let mut request = expect(&incoming, CmEventKind::ConnectRequest);
    assert!(request.private_data().starts_with(b"hello\0"));
    assert_eq!(request.peer, from);
    let mut there = request.take_request().expect("an identifier");
    let qp = there
        .create_qp(&b.pd, &b.cq, &b.cq, &QpCaps::default())
        .expect("a queue pair");
    for i in 0..2 {
        let sge = b.mr.sge(i * 65_536, 65_536);
        qp.post_recv(&RecvWr {
            wr_id: i,
            sges: &[sge],
        })
        .expect("a receive");
    }
    let param = ConnParam {
        private_data: b"welcome",
        responder_resources: 2,
        ..ConnParam::default()
    };
    there.accept(&param).expect("accept");
    let event = expect(&outgoing, CmEventKind::Established);
    assert!(event.private_data().starts_with(b"welcome\0"));
    assert_eq!(event.peer, to);
    expect(&incoming, CmEventKind::Established);

    let (mine, yours) = (
        here.qp().expect("mine").query().expect("query"),
        there.qp().expect("yours").query().expect("query"),
    );
    assert_eq!((mine.dest_gid, yours.dest_gid), (to.0, from.0));
    assert_eq!((mine.sq_psn, yours.sq_psn), (yours.rq_psn, mine.rq_psn));
    assert_eq!((mine.path_mtu, yours.path_mtu), (1024, 1024));
    assert_eq!((mine.max_rd_atomic, yours.max_dest_rd_atomic), (2, 2));

    // SEND, WRITE and READ, each of many packets.
    a.fill(0, 1);
    let sge = a.mr.sge(0, LEN);
    let qp = here.qp_mut().expect("a queue pair");
    qp.post_send(&SendWr::new(1, SendOp::Send, Payload::Sges(&[sge])))
        .expect("SEND");
    let received = b.complete("the message");
    assert_eq!(
        (received.status, received.byte_len),
        (WcStatus::Success, LEN)
    );
    assert!(b.holds(0, 1));
    assert!(a.complete("the SEND").is_ok());
    let write = SendOp::Write(b.mr.remote(200_000));
    let qp = here.qp_mut().expect("a queue pair");
    qp.post_send(&SendWr::new(2, write, Payload::Sges(&[sge])))
        .expect("WRITE");
    assert!(a.complete("the WRITE").is_ok());
    assert!(b.holds(200_000, 1));
    b.fill(300_000, 2);
    let read = SendOp::Read(b.mr.remote(300_000));
    let into = a.mr.sge(400_000, LEN);
    let qp = here.qp_mut().expect("a queue pair");
    qp.post_send(&SendWr::new(3, read, Payload::Sges(&[into])))
        .expect("READ");
    assert!(a.complete("the READ").is_ok());
    assert!(a.holds(400_000, 2));

    // The server's side ends it.
    there.disconnect().expect("disconnect");
    expect(&incoming, CmEventKind::Disconnected);
    expect(&outgoing, CmEventKind::Disconnected);
    assert_eq!(
        b.complete("the receive that is left").status,
        WcStatus::WrFlushErr
    );
    drop((here, there, listener));
}

macro_rules! cases {
    ($($name:ident: $family:expr, $carrier:expr;)*) => {
        $(#[test]
        fn $name() {
            connect_use_and_part(ADDRESSES[$family], $carrier);
        })*
    };
}

cases! {
    over_udp_and_ipv4: 0, "udp";
    over_udp_and_ipv6: 1, "udp";
    over_packets_and_ipv4: 0, "packet";
    over_packets_and_ipv6: 1, "packet";
}

#[test]
fn a_host_that_dies_is_given_up_and_one_that_comes_back_is_met_anew() {
    let Some(cable) = Cable::new("4300") else {
        return;
    };
    let sandbox = Sandbox::new();
    let [from, to] = ADDRESSES[0];
    let b = cable.host(&sandbox, 1, to, &[]);
    let a = cable.host(&sandbox, 0, from, &[]);
    let options = ConnectOptions::default();
    let connect = |host: &Host| {
        cm::connect(
            &host.context,
            (gid(to), PORT),
            &host.pd,
            (&host.cq, &host.cq),
            &options,
            |_| Ok::<_, Error>(()),
        )
    };
    // No way at all.
    let nowhere = cm::connect(
        &a.context,
        (gid("203.0.113.1"), PORT),
        &a.pd,
        (&a.cq, &a.cq),
        &options,
        |_| Ok::<_, Error>(()),
    );
    let nowhere = nowhere.expect_err("there is no route");
    assert!(
        matches!(
            nowhere,
            Error::Connection {
                event: CmEventKind::AddrError,
                ..
            }
        ),
        "{nowhere:?}"
    );
    let (_listener, incoming) = cm::listen(&b.context, (Gid::LOCAL, PORT), 8).expect("listen");
    let (mut here, outgoing) = dial(&a, gid(to), PORT, b"");
    let mut request = expect(&incoming, CmEventKind::ConnectRequest);
    let mut there = request.take_request().expect("an identifier");
    there
        .create_qp(&b.pd, &b.cq, &b.cq, &QpCaps::default())
        .expect("a queue pair");
    there.accept(&ConnParam::default()).expect("accept");
    expect(&outgoing, CmEventKind::Established);
    assert_eq!(
        here.qp().expect("mine").query().expect("query").path_mtu,
        4096
    );
    // The other host dies without a word.
    b.running.kill();
    drop((there, request, incoming, b.context));
    here.disconnect().expect("disconnect");
    // Nobody answers; after all retries that is the end.
    expect(&outgoing, CmEventKind::Disconnected);
    drop(here);
    // Nobody is there: a short patience ends sooner than the retries.
    assert_eq!(connect(&a).expect_err("nobody is there"), Error::Timeout);
    // It comes back, and knows nothing of before.
    let b = cable.host(&sandbox, 1, to, &[]);
    let (_listener, incoming) = cm::listen(&b.context, (Gid::LOCAL, PORT), 8).expect("listen");
    let (_here, outgoing) = dial(&a, gid(to), PORT, b"again");
    let mut request = expect(&incoming, CmEventKind::ConnectRequest);
    let mut there = request.take_request().expect("an identifier");
    there
        .create_qp(&b.pd, &b.cq, &b.cq, &QpCaps::default())
        .expect("a queue pair");
    there.accept(&ConnParam::default()).expect("accept");
    expect(&outgoing, CmEventKind::Established);
    expect(&incoming, CmEventKind::Established);
    // This time it ends in order, and says so.
    let mut running = b.running;
    running.signal(rustix::process::Signal::INT);
    let _ = running.wait(PATIENCE).code(0);
    expect(&outgoing, CmEventKind::Disconnected);
}
