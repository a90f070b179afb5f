//! What a server shows to its host while it runs: words in the window's user page ([`hyv_abi::window::UserPage::app`]).
//!
//! They are for people (the live line, the report), not for programs that decide anything: the writer is a guest.

use core::sync::atomic::Ordering::Relaxed;

use hyv_abi::window::UserPage;

use crate::proto::Class;
use crate::server::Server;

/// What the words say.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Status {
    /// Requests answered since the start.
    pub requests: u64,
    /// Keys.
    pub objects: u64,
    /// Bytes of live entries.
    pub live_bytes: u64,
    /// Bytes that may be live.
    pub capacity_bytes: u64,
    /// Service time in ns, from a read's completion to its reply's work request, median of sampled reads; 0 for none yet.
    pub service_p50_ns: u64,
    /// The same, 99th percentile.
    pub service_p99_ns: u64,
    /// Clients connected.
    pub connections: u64,
    /// Requests refused.
    pub errors: u64,
    /// RAM offset of the store's region.
    pub store_offset: u64,
    /// Its bytes.
    pub store_bytes: u64,
}

const WORDS: usize = 10;

impl Status {
    /// What `server` has to show.
    #[must_use]
    pub fn of(server: &Server) -> Self {
        let (c, stats) = (server.counters(), server.store().stats());
        let times = server.times(Class::Read);
        let (service_p50_ns, service_p99_ns) = (times.quantile(500), times.quantile(990));
        let (store_offset, store_bytes) = server.store_range();
        Self {
            requests: c.gets + c.puts + c.dels + c.increments + c.others + c.rejects + c.errors,
            objects: stats.objects,
            live_bytes: stats.bytes.live,
            capacity_bytes: stats.capacity,
            service_p50_ns,
            service_p99_ns,
            connections: server.connected() as u64,
            errors: c.errors,
            store_offset,
            store_bytes,
        }
    }

    const fn words(&self) -> [u64; WORDS] {
        [
            self.requests,
            self.objects,
            self.live_bytes,
            self.capacity_bytes,
            self.service_p50_ns,
            self.service_p99_ns,
            self.connections,
            self.errors,
            self.store_offset,
            self.store_bytes,
        ]
    }

    /// Shows it.
    pub fn publish(&self, page: &UserPage) {
        for (to, from) in page.app.iter().zip(self.words()) {
            to.store(from, Relaxed);
        }
    }

    /// Reads what a user shows; any numbers at all.
    #[must_use]
    pub fn read(page: &UserPage) -> Self {
        let w: [u64; WORDS] = core::array::from_fn(|i| page.app[i].load(Relaxed));
        Self {
            requests: w[0],
            objects: w[1],
            live_bytes: w[2],
            capacity_bytes: w[3],
            service_p50_ns: w[4],
            service_p99_ns: w[5],
            connections: w[6],
            errors: w[7],
            store_offset: w[8],
            store_bytes: w[9],
        }
    }
}
