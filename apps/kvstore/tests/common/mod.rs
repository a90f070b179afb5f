//! A host, servers and clients in one process: the software RNIC, its control thread, and a server on a thread of its own.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use hyv_host::backend::soft::SoftRnic;
use hyv_host::backend::{Backend, BackendConfig, Quotas};
use hyv_host::sys::clock::{monotonic_ns, realtime_ns};
use hyv_rnic::thread::{EngineThread, Kicks};
use hyv_rnic::{Engine, EngineCell, EngineConfig};
use hyv_verbs::{Context, Gid, Process};
use kvstore::client::{Client, ClientConfig};
use kvstore::proto::StatsReply;
use kvstore::server::serve::{ServeOptions, Surroundings};
use kvstore::server::{Server, ServerConfig};

pub const PORT: u16 = 7070;
pub const PATIENCE: Duration = Duration::from_secs(20);
const GID: [u8; 16] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 9, 8, 7];
const CLIENT_RAM: u64 = 16 << 20;

/// A device and its control thread.
pub struct Host {
    _backend: Backend,
    _engine: EngineThread,
    dir: tempfile::TempDir,
}

impl Host {
    pub fn new() -> Self {
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
            quotas: Quotas {
                sessions: 256,
                ..Quotas::default()
            },
            ..BackendConfig::default()
        };
        let backend = Backend::spawn(config, Arc::new(SoftRnic::new(cell, kicks))).unwrap();
        Self {
            _backend: backend,
            _engine: engine,
            dir,
        }
    }

    /// A user of the device: what a process is to it.
    pub fn user(&self, name: &str, ram: u64) -> Context {
        Context::open(self.process(name, ram)).unwrap()
    }

    /// A session, for a platform of the test's own.
    pub fn process(&self, name: &str, ram: u64) -> Arc<Process> {
        Process::connect(self.dir.path(), ram, name).unwrap()
    }

    /// A client of the server on [`PORT`].
    pub fn client(&self) -> Client {
        self.client_with(ClientConfig {
            timeout: PATIENCE,
            ..ClientConfig::default()
        })
    }

    pub fn client_with(&self, config: ClientConfig) -> Client {
        let context = self.user("client", CLIENT_RAM);
        Client::connect_with(&context, Gid::LOCAL, PORT, config).unwrap()
    }

    /// A server of its own process, which nobody drives yet.
    pub fn server(&self, config: ServerConfig) -> Server {
        Server::new(&self.user("server", memory_for(&config)), config).unwrap()
    }

    /// A server of its own process, serving.
    pub fn serve(&self, config: ServerConfig) -> Running {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::new(Seen::default());
        let server = self.server(config);
        let mut surroundings = Outside {
            stop: Arc::clone(&stop),
            seen: Arc::clone(&seen),
        };
        let thread = std::thread::Builder::new()
            .name("server".into())
            .spawn(move || {
                let mut server = server;
                let options = ServeOptions { spin_ns: 50_000 };
                server.serve(options, &mut surroundings).unwrap();
                server.store().audit().unwrap();
                let stats = server.stats();
                server.close().unwrap();
                stats
            })
            .unwrap();
        Running {
            stop,
            seen,
            thread: Some(thread),
        }
    }

    pub fn serve_usual(&self) -> Running {
        self.serve(config())
    }
}

/// Memory of a server's process.
pub fn memory_for(config: &ServerConfig) -> u64 {
    let beside = kvstore::server::limits::memory_for(config.max_connections) + (8 << 20);
    (config.store_bytes + beside).next_multiple_of(2 << 20) as u64
}

/// A small server.
pub fn config() -> ServerConfig {
    ServerConfig {
        port: PORT,
        store_bytes: 32 << 20,
        seed: 1,
        max_connections: 64,
        unix_ns: realtime_ns(),
        one_sided: true,
    }
}

/// What a server showed last.
#[derive(Default)]
pub struct Seen {
    pub connected: AtomicU64,
    pub expelled: AtomicU64,
    pub objects: AtomicU64,
}

struct Outside {
    stop: Arc<AtomicBool>,
    seen: Arc<Seen>,
}

impl Surroundings for Outside {
    fn should_stop(&mut self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn publish(&mut self, server: &Server) {
        let seen = &self.seen;
        seen.connected
            .store(server.connected() as u64, Ordering::Relaxed);
        seen.expelled
            .store(server.counters().expelled, Ordering::Relaxed);
        seen.objects.store(server.store().len(), Ordering::Relaxed);
    }
}

/// A server that serves.
pub struct Running {
    stop: Arc<AtomicBool>,
    pub seen: Arc<Seen>,
    thread: Option<JoinHandle<StatsReply>>,
}

impl Running {
    /// Ends it; its store was audited. Gives its last statistics.
    pub fn stop(mut self) -> StatsReply {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && let Err(panic) = thread.join()
            && !std::thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}

/// Does something that waits for the server, which meanwhile works as a serving loop would have it.
pub fn served<T: Send>(server: &mut Server, what: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(what);
        while !thread.is_finished() {
            if server.poll() == 0 {
                server.poll_connections().unwrap();
                server.clean();
                std::thread::yield_now();
            }
        }
        thread.join().unwrap()
    })
}

/// Waits until something is so.
pub fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !so() {
        assert!(
            start.elapsed() < PATIENCE,
            "not within {PATIENCE:?}: {what}"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A connection that says what it likes: no window, no manners.
pub struct Raw {
    // Before the memory it uses.
    pub qp: hyv_verbs::QueuePair,
    pub cq: hyv_verbs::CompletionQueue,
    pub mr: hyv_verbs::MemoryRegion,
    pub welcome: kvstore::proto::Welcome,
    connection: hyv_verbs::cm::Connection,
    receives: u32,
    /// Which of its two send buffers is next.
    turn: u32,
}

/// Bytes of one of its buffers.
const RAW_BUFFER: usize = 8192;

impl Raw {
    /// Connects with so many receives.
    pub fn connect(
        context: &Context,
        hello: &[u8],
        receives: u32,
    ) -> Result<Self, hyv_verbs::Error> {
        use hyv_verbs::{Access, QpCaps};
        let pd = context.alloc_pd()?;
        let cq = context.create_cq(256)?;
        let access = Access::LOCAL_WRITE | Access::REMOTE_READ | Access::REMOTE_WRITE;
        let mr = pd.alloc_mr((receives as usize + 2) * RAW_BUFFER, access)?;
        let options = hyv_verbs::cm::ConnectOptions {
            caps: QpCaps {
                max_recv_wr: receives.max(1),
                max_inline_data: 0,
                ..QpCaps::default()
            },
            param: hyv_verbs::cm::ConnParam {
                private_data: hello,
                ..hyv_verbs::cm::ConnParam::default()
            },
            timeout: PATIENCE,
        };
        let prepare = |qp: &mut hyv_verbs::QueuePair| {
            (0..receives).for_each(|i| post(qp, &mr, i));
            Ok::<_, hyv_verbs::Error>(())
        };
        let to = (Gid::LOCAL, PORT);
        let mut connection =
            hyv_verbs::cm::connect(context, to, &pd, (&cq, &cq), &options, prepare)?;
        let welcome = kvstore::proto::Welcome::parse(&connection.private_data).unwrap();
        Ok(Self {
            qp: connection.id.take_qp().unwrap(),
            cq,
            mr,
            welcome,
            connection,
            receives,
            turn: 0,
        })
    }

    pub fn new(context: &Context) -> Self {
        let hello = kvstore::proto::Hello {
            lease: true,
            client: 0,
        };
        Self::connect(context, &hello.to_bytes(), 4).unwrap()
    }

    /// Sends bytes as a request, the second last of which must have arrived.
    pub fn send(&mut self, bytes: &[u8]) {
        use hyv_verbs::{Payload, SendOp, SendWr};
        self.turn ^= 1;
        let at = (self.receives + self.turn) as usize * RAW_BUFFER;
        self.mr.write(at, bytes).unwrap();
        let sges = [self.mr.sge(at as u64, bytes.len() as u32)];
        // What cannot be posted goes to a connection that has ended already.
        let _ = self
            .qp
            .post_send(&SendWr::new(u64::MAX, SendOp::Send, Payload::Sges(&sges)));
    }

    pub fn request(&mut self, tag: u16, request: &kvstore::proto::Request<'_>) {
        let mut out = [0; kvstore::proto::MAX_REQUEST_BYTES];
        let len = request.emit(tag, &mut out).unwrap();
        self.send(&out[..len]);
    }

    /// The next reply: immediate and payload; none if the connection has ended. Send completions are passed over.
    pub fn reply(&mut self) -> Option<(u32, Vec<u8>)> {
        let mut wcs = [hyv_verbs::WorkCompletion::EMPTY];
        loop {
            let n = self.cq.wait(&mut wcs, Some(PATIENCE)).unwrap();
            assert_eq!(n, 1, "no completion within {PATIENCE:?}");
            let wc = wcs[0];
            if !wc.is_ok() {
                return None;
            }
            if wc.is_recv() {
                let mut bytes = vec![0; wc.byte_len as usize];
                let buffer = wc.wr_id as u32;
                self.mr
                    .read(buffer as usize * RAW_BUFFER, &mut bytes)
                    .unwrap();
                post(&mut self.qp, &self.mr, buffer);
                return Some((wc.imm.unwrap(), bytes));
            }
        }
    }

    /// Waits until what was sent last lies with the server, which must not have answered it yet.
    pub fn delivered(&mut self) {
        let mut wcs = [hyv_verbs::WorkCompletion::EMPTY];
        let n = self.cq.wait(&mut wcs, Some(PATIENCE)).unwrap();
        assert_eq!(n, 1, "no completion within {PATIENCE:?}");
        assert!(wcs[0].is_ok() && !wcs[0].is_recv(), "{:?}", wcs[0]);
    }

    pub fn ended(&self) -> bool {
        self.connection.ended().unwrap()
    }
}

fn post(qp: &mut hyv_verbs::QueuePair, mr: &hyv_verbs::MemoryRegion, buffer: u32) {
    let sge = mr.sge(u64::from(buffer) * RAW_BUFFER as u64, RAW_BUFFER as u32);
    qp.post_recv(&hyv_verbs::RecvWr {
        wr_id: u64::from(buffer),
        sges: &[sge],
    })
    .unwrap();
}
