//! Processes as they are: the verbs library over a session, connection management and the engine's own thread.

use std::sync::Arc;
use std::time::Duration;

use hyv_rnic::thread::{EngineThread, Kicks};
use hyv_rnic::{Engine, EngineCell, EngineConfig};
use hyv_verbs::cm::{CmId, ConnParam, ConnectOptions, EventChannel, RejectReason, connect, listen};
use hyv_verbs::{
    Access, CmEventKind, CompletionQueue, Context, Error, Gid, MemoryRegion, Payload, Process,
    QpCaps, RecvWr, SendOp, SendWr, WcStatus, WorkCompletion,
};

use crate::backend::soft::SoftRnic;
use crate::backend::testing::PATIENCE;
use crate::backend::{Backend, BackendConfig};
use crate::sys::clock::monotonic_ns;

const RAM: u64 = 8 << 20;
const PORT: u16 = 7471;
const GID: [u8; 16] = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9];

struct Host {
    backend: Backend,
    _engine: EngineThread,
    dir: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        let config = EngineConfig {
            clock: Box::new(monotonic_ns),
            gid: GID,
            node_guid: 1,
            carrier: None,
            mad_bell: Box::new(|| {}),
        };
        let cell = EngineCell::new(Engine::new(config));
        let kicks = Kicks::new().unwrap();
        let spin = Duration::from_micros(50);
        let engine = EngineThread::spawn(cell.clone(), kicks.clone(), spin, || {}).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let config = BackendConfig {
            runtime_dir: Some(dir.path().into()),
            ..BackendConfig::default()
        };
        let backend = Backend::spawn(config, Arc::new(SoftRnic::new(cell, kicks))).unwrap();
        Self {
            backend,
            _engine: engine,
            dir,
        }
    }

    fn open(&self, name: &str) -> Context {
        let process = Process::connect(self.dir.path(), RAM, name).unwrap();
        Context::open(process).unwrap()
    }
}

fn take(cq: &mut CompletionQueue, what: &str) -> WorkCompletion {
    let mut out = [WorkCompletion::EMPTY];
    assert_eq!(cq.wait(&mut out, Some(PATIENCE)).unwrap(), 1, "no {what}");
    out[0]
}

fn next(channel: &EventChannel, kind: CmEventKind) -> hyv_verbs::cm::CmEvent {
    let event = channel
        .get_event(Some(PATIENCE))
        .unwrap()
        .unwrap_or_else(|| panic!("no {kind:?}"));
    assert_eq!(event.kind, kind);
    event
}

/// Accepts one connection with one receive of `mr` posted.
fn accept(
    channel: &EventChannel,
    cq: &CompletionQueue,
    pd: &hyv_verbs::ProtectionDomain,
    mr: &MemoryRegion,
) -> CmId {
    let mut request = next(channel, CmEventKind::ConnectRequest);
    assert!(request.private_data().starts_with(b"please\0"));
    let mut id = request.take_request().unwrap();
    let qp = id.create_qp(pd, cq, cq, &QpCaps::default()).unwrap();
    qp.post_recv(&RecvWr {
        wr_id: 1,
        sges: &[mr.sge(0, 256)],
    })
    .unwrap();
    let param = ConnParam {
        private_data: b"welcome",
        ..ConnParam::default()
    };
    id.accept(&param).unwrap();
    id
}

#[test]
fn two_processes_connect_talk_and_one_dies() {
    let host = Host::new();
    let server = host.open("server");
    let (listener, channel) = listen(&server, (Gid::LOCAL, PORT), 4).unwrap();
    let serving = std::thread::spawn(move || {
        let pd = server.alloc_pd().unwrap();
        let mut cq = server.create_cq(16).unwrap();
        let mr = pd.alloc_mr(4096, Access::LOCAL_WRITE).unwrap();
        for _ in 0..2 {
            let mut id = accept(&channel, &cq, &pd, &mr);
            next(&channel, CmEventKind::Established);
            let got = take(&mut cq, "request");
            assert_eq!((got.status, got.byte_len), (WcStatus::Success, 100));
            let mut text = [0; 100];
            mr.read(0, &mut text).unwrap();
            assert_eq!(text, [b'q'; 100]);
            let qp = id.qp_mut().unwrap();
            qp.post_recv(&RecvWr {
                wr_id: 2,
                sges: &[mr.sge(0, 256)],
            })
            .unwrap();
            qp.post_send(&SendWr::new(3, SendOp::Send, Payload::Inline(b"answer")))
                .unwrap();
            assert_eq!(take(&mut cq, "send").status, WcStatus::Success);
            // The client dies: what is posted flushes, and connection management says so.
            let flushed = take(&mut cq, "flush");
            assert_eq!((flushed.wr_id, flushed.status), (2, WcStatus::WrFlushErr));
            next(&channel, CmEventKind::Disconnected);
        }
        drop(listener);
    });
    for name in ["first", "second"] {
        let client = host.open(name);
        let pd = client.alloc_pd().unwrap();
        let mut cq = client.create_cq(16).unwrap();
        let mr = pd.alloc_mr(4096, Access::LOCAL_WRITE).unwrap();
        mr.write(1000, &[b'q'; 100]).unwrap();
        let options = ConnectOptions {
            param: ConnParam {
                private_data: b"please",
                ..ConnParam::default()
            },
            ..ConnectOptions::default()
        };
        let prepare = |qp: &mut hyv_verbs::QueuePair| {
            let sges = [mr.sge(0, 256)];
            qp.post_recv(&RecvWr {
                wr_id: 7,
                sges: &sges,
            })
            .unwrap();
            Ok::<(), Error>(())
        };
        let mut c = connect(
            &client,
            (Gid(GID), PORT),
            &pd,
            (&cq, &cq),
            &options,
            prepare,
        )
        .unwrap();
        assert!(c.private_data.starts_with(b"welcome\0"));
        let sges = [mr.sge(1000, 100)];
        let wr = SendWr::new(8, SendOp::Send, Payload::Sges(&sges)).unsignaled();
        c.id.qp_mut().unwrap().post_send(&wr).unwrap();
        let got = take(&mut cq, "answer");
        assert_eq!((got.wr_id, got.inline_data()), (7, Some(&b"answer"[..])));
        assert_eq!(c.ended(), Ok(false));
        // Dies without a word: none of the library's drops runs.
        let key = host.backend.users().last().unwrap().key;
        assert!(host.backend.remove_user(key).unwrap());
        std::mem::forget((c, cq, mr, pd));
    }
    serving.join().unwrap();
}

#[test]
fn refusals_reach_the_connecting_side() {
    let host = Host::new();
    let client = host.open("client");
    let pd = client.alloc_pd().unwrap();
    let cq = client.create_cq(4).unwrap();
    let try_port = |port| {
        connect::<Error>(
            &client,
            (Gid::LOCAL, port),
            &pd,
            (&cq, &cq),
            &ConnectOptions::default(),
            |_| Ok(()),
        )
        .unwrap_err()
    };
    let e = try_port(PORT);
    assert!(
        matches!(
            e,
            Error::Rejected {
                reason: RejectReason::NoListener,
                ..
            }
        ),
        "{e}"
    );
    let server = host.open("server");
    let (_listener, channel) = listen(&server, (Gid::LOCAL, PORT), 1).unwrap();
    let rejecting = std::thread::spawn(move || {
        let mut request = next(&channel, CmEventKind::ConnectRequest);
        request.take_request().unwrap().reject(b"busy").unwrap();
        // The second request is dropped with its event, which refuses it too.
        drop(next(&channel, CmEventKind::ConnectRequest));
    });
    let e = try_port(PORT);
    assert!(
        matches!(e, Error::Rejected { reason: RejectReason::Consumer, private } if private.starts_with(b"busy")),
        "{e}"
    );
    let e = try_port(PORT);
    assert!(
        matches!(
            e,
            Error::Rejected {
                reason: RejectReason::Consumer,
                ..
            }
        ),
        "{e}"
    );
    rejecting.join().unwrap();
    // One context a session at a time; then another one, whose queue lies elsewhere.
    let process = client.platform().clone();
    assert!(matches!(
        Context::open(process.clone()),
        Err(Error::AlreadyOpen)
    ));
    client.query_device().unwrap();
    drop((cq, pd, client));
    for _ in 0..20 {
        Context::open(process.clone())
            .unwrap()
            .query_device()
            .unwrap();
    }
    assert_eq!(host.backend.stats().broken_queues, 0);
}

#[test]
fn a_host_that_stops_is_noticed() {
    let mut host = Host::new();
    let client = host.open("client");
    client.query_port(1).unwrap();
    host.backend.stop();
    assert!(client.query_port(1).is_err());
}
