//! The opened device: what it can do, its events, and who sleeps.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use core::sync::atomic::{AtomicBool, Ordering, fence};
use core::time::Duration;

use hyv_abi::ABI_VERSION;
use hyv_abi::control::{
    CounterScope, Counters, DeviceAttr, PortAttr, QueryCounters, QueryDevice, QueryGid, QueryPkey,
    QueryPort, Verb,
};
use hyv_abi::window::{MAGIC, summary};
use spin::mutex::SpinMutex;

use crate::channel::CqSet;
use crate::cm::IdShared;
use crate::control::{ControlQueue, Counter};
use crate::dma::WindowRef;
use crate::error::Error;
use crate::limits::{CLOCK_TURNS, CQ_SPIN_NS};
use crate::mr::{MrPool, Parked};
use crate::platform::Platform;

/// A GID: an IPv6 address, or an IPv4 one mapped into it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Gid(pub [u8; 16]);

impl Gid {
    /// Any of this device's own addresses.
    pub const LOCAL: Self = Self([0; 16]);

    /// An IPv4 address as a GID: `::ffff:a.b.c.d`.
    #[must_use]
    pub const fn from_ipv4(a: [u8; 4]) -> Self {
        Self([
            0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a[0], a[1], a[2], a[3],
        ])
    }
}

impl Gid {
    /// The address that it is.
    #[must_use]
    pub const fn ip(self) -> IpAddr {
        Ipv6Addr::from_octets(self.0).to_canonical()
    }
}

impl From<Ipv4Addr> for Gid {
    /// `0.0.0.0` is [`Gid::LOCAL`].
    fn from(a: Ipv4Addr) -> Self {
        if a.is_unspecified() {
            Self::LOCAL
        } else {
            Self::from_ipv4(a.octets())
        }
    }
}

impl From<Ipv6Addr> for Gid {
    fn from(a: Ipv6Addr) -> Self {
        Self(a.octets())
    }
}

impl From<IpAddr> for Gid {
    fn from(a: IpAddr) -> Self {
        match a {
            IpAddr::V4(a) => a.into(),
            IpAddr::V6(a) => a.into(),
        }
    }
}

impl fmt::Display for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Ipv6Addr::from(self.0).fmt(f)
    }
}

impl fmt::Debug for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What everything made on a context keeps alive.
pub(crate) struct ContextInner {
    pub(crate) control: ControlQueue,
    pub(crate) window: WindowRef,
    pub(crate) pool: MrPool,
    pub(crate) parked: Parked,
    /// Completion queues whose events go to channels.
    pub(crate) channels: CqSet,
    /// Connection identifiers, by handle.
    pub(crate) ids: SpinMutex<BTreeMap<u32, Arc<IdShared>>>,
    /// The host may have a connection event.
    pub(crate) cm_pending: AtomicBool,
    /// Held by whoever fetches a connection event, so that they are handed out in order.
    pub(crate) cm_fetch: SpinMutex<()>,
    pub(crate) names: Counter,
}

impl ContextInner {
    pub(crate) fn platform(&self) -> &Arc<dyn Platform> {
        self.window.platform()
    }

    pub(crate) fn call<V: Verb>(&self, verb: &V) -> Result<V::Reply, Error> {
        self.control.call(verb)
    }

    /// Waits until `ready` gives something: spins first, then sleeps with events `arm`ed. `None` after `timeout`.
    pub(crate) fn wait_until<T>(
        &self,
        timeout: Option<Duration>,
        longest_sleep_ns: u64,
        mut arm: impl FnMut(),
        mut ready: impl FnMut() -> Result<Option<T>, Error>,
    ) -> Result<Option<T>, Error> {
        let platform = self.platform();
        let start = platform.now_ns();
        let limit = timeout.map(|t| u64::try_from(t.as_nanos()).unwrap_or(u64::MAX));
        let spin = if self.window.header.spin_hint.load(Ordering::Relaxed) == 0 {
            0
        } else {
            CQ_SPIN_NS
        };
        let mut turns = 0u32;
        loop {
            if let Some(t) = ready()? {
                return Ok(Some(t));
            }
            platform.relax()?;
            turns = turns.wrapping_add(1);
            if turns > 1 && !turns.is_multiple_of(CLOCK_TURNS) {
                continue;
            }
            let passed = platform.now_ns().saturating_sub(start);
            let left = limit.map(|l| l.saturating_sub(passed));
            if left == Some(0) {
                return ready();
            }
            if passed < spin {
                continue;
            }
            let seen = platform.wake_seen();
            arm();
            fence(Ordering::SeqCst);
            if let Some(t) = ready()? {
                return Ok(Some(t));
            }
            platform.wait(seen, Some(left.unwrap_or(u64::MAX).min(longest_sleep_ns)))?;
            // What woke us is there now or was not for us: look once, then sleep again.
            turns = 0;
        }
    }
}

/// An opened device. Clones are the same device.
#[derive(Clone)]
pub struct Context {
    pub(crate) inner: Arc<ContextInner>,
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let generation = self.inner.window.header.generation.load(Ordering::Relaxed);
        f.debug_struct("Context")
            .field("generation", &generation)
            .finish_non_exhaustive()
    }
}

impl Context {
    /// Opens the device behind a platform: checks the window, lays out the control queue and asks the device
    /// what it can do, so that a host that does not serve shows itself here.
    ///
    /// # Errors
    /// [`Error::BadWindow`] for a window that is not set up or of another version, [`Error::AlreadyOpen`],
    /// [`Error::OutOfMemory`], and what the first verb may give.
    pub fn open(platform: Arc<dyn Platform>) -> Result<Self, Error> {
        let window = WindowRef::new(platform);
        if window.header.magic.load(Ordering::Acquire) != MAGIC {
            return Err(Error::BadWindow { version: 0 });
        }
        let version = window.header.version.load(Ordering::Relaxed);
        if version != ABI_VERSION {
            return Err(Error::BadWindow { version });
        }
        let inner = ContextInner {
            control: ControlQueue::new(window.clone())?,
            pool: MrPool::new(),
            parked: Parked::new(),
            channels: CqSet::new(),
            ids: SpinMutex::new(BTreeMap::new()),
            cm_pending: AtomicBool::new(true),
            cm_fetch: SpinMutex::new(()),
            names: Counter::new(),
            window,
        };
        let context = Self {
            inner: Arc::new(inner),
        };
        context.query_device()?;
        Ok(context)
    }

    /// The platform that it was opened on.
    #[must_use]
    pub fn platform(&self) -> &Arc<dyn Platform> {
        self.inner.platform()
    }

    /// What the device can do (`ibv_query_device`).
    ///
    /// # Errors
    /// As any control verb: the device's own, or the host is gone.
    pub fn query_device(&self) -> Result<DeviceAttr, Error> {
        self.inner.call(&QueryDevice {})
    }

    /// State of a port, counted from 1 (`ibv_query_port`).
    ///
    /// # Errors
    /// As any control verb; EINVAL for a port that does not exist.
    pub fn query_port(&self, port: u32) -> Result<PortAttr, Error> {
        self.inner.call(&QueryPort { port })
    }

    /// Entry `index` of a port's GID table (`ibv_query_gid`).
    ///
    /// # Errors
    /// As any control verb; EINVAL for an entry that does not exist.
    pub fn query_gid(&self, port: u32, index: u32) -> Result<Gid, Error> {
        self.inner
            .call(&QueryGid { port, index })
            .map(|r| Gid(r.gid))
    }

    /// Entry `index` of a port's P_Key table (`ibv_query_pkey`); 0xffff is the default partition.
    ///
    /// # Errors
    /// As any control verb; EINVAL for an entry that does not exist.
    pub fn query_pkey(&self, port: u32, index: u32) -> Result<u16, Error> {
        self.inner
            .call(&QueryPkey { port, index })
            .map(|r| r.pkey as u16)
    }

    /// What this program's queue pairs did and what went wrong on their way; see also [`crate::QueuePair::counters`].
    ///
    /// # Errors
    /// As any control verb.
    pub fn counters(&self) -> Result<Counters, Error> {
        self.count(CounterScope::User)
    }

    /// The same of the whole device: all programs and guests.
    ///
    /// # Errors
    /// As any control verb.
    pub fn device_counters(&self) -> Result<Counters, Error> {
        self.count(CounterScope::Device)
    }

    fn count(&self, scope: CounterScope) -> Result<Counters, Error> {
        let scope = scope as u32;
        self.inner.call(&QueryCounters { scope, handle: 0 })
    }

    /// Monotonic time of the platform, ns.
    #[must_use]
    pub fn now_ns(&self) -> u64 {
        self.inner.platform().now_ns()
    }

    /// A starting PSN (24 bits) that differs from one connection to the next, so that strays of an old one do not pass for
    /// packets of a new one.
    #[must_use]
    pub fn fresh_psn(&self) -> u32 {
        let seed = self.now_ns() ^ self.inner.names.next().rotate_left(32);
        // SplitMix64's finaliser: spreads neighbouring seeds.
        let x = (seed ^ seed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x >> 40) as u32
    }

    /// Takes the connection-manager bit, if the host set it.
    pub(crate) fn take_cm_bit(&self) {
        let word = &self.inner.window.events.summary;
        if word.load(Ordering::Relaxed) & summary::CM != 0 {
            word.fetch_and(!summary::CM, Ordering::AcqRel);
            self.inner.cm_pending.store(true, Ordering::Release);
        }
    }
}
