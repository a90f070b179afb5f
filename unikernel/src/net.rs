//! TCP/IP over virtio-net. An appliance that does not call [`up`] has none of it: no device is looked for, and nothing runs.
//!
//! ```ignore
//! let net = net::up()?;
//! let mut listener = net::TcpListener::bind(&net, 7000)?;
//! rt::ready();
//! let mut stream = listener.accept(None)?;
//! ```
//!
//! Calls block the one thread there is; while one waits, all connections are served. A guest that waits for something else calls
//! [`Net::poll`] now and then.

use alloc::boxed::Box;
use alloc::rc::Rc;
use core::time::Duration;

pub use hyv_net::{Config, Error, IpAddress, IpCidr, IpEndpoint, Net, TcpListener, TcpStream};
use hyv_net::{Nic as _, Surroundings};

use crate::time::{Instant, now_ns};
use crate::{limits, pci, rt, time, virtio};

/// Time, sleep and the host of this guest.
struct Guest {
    max_sleep_ns: u64,
}

impl Surroundings for Guest {
    fn now_ns(&self) -> u64 {
        now_ns()
    }

    fn wake_seen(&self) -> u64 {
        rt::wake_count()
    }

    fn wait(&self, seen: u64, deadline_ns: u64) {
        let left = deadline_ns.saturating_sub(now_ns());
        rt::wait(seen, Some(Instant::now() + Duration::from_nanos(left)));
    }

    fn spin_ns(&self) -> u64 {
        // Where the host has one CPU for everything, polling keeps it from answering.
        if rt::window()
            .header
            .spin_hint
            .load(core::sync::atomic::Ordering::Relaxed)
            == 0
        {
            0
        } else {
            limits::NET_SPIN_NS
        }
    }

    fn max_sleep_ns(&self) -> u64 {
        self.max_sleep_ns
    }

    fn ending(&self) -> bool {
        rt::shutdown_requested()
    }
}

/// Brings the network up as the command line says in `hyv.net=` (see [`Config`]; DHCP if it does not), and waits for the lease. Once per
/// guest, and before all RAM is taken: buffers take 2 MiB. `hyv.nap=MS` is the longest sleep of a wait; a test that makes it long finds
/// wake-ups that are lost.
///
/// # Errors
/// [`Error::Device`], [`Error::Config`], [`Error::NoLease`] after 10 s.
pub fn up() -> Result<Net, Error> {
    let config = match rt::args().get("hyv.net") {
        Some(text) => text.parse()?,
        None => Config::default(),
    };
    let max_sleep_ns = match rt::args().get("hyv.nap") {
        Some(ms) => ms
            .parse::<u64>()
            .ok()
            .and_then(|ms| ms.checked_mul(1_000_000))
            .ok_or(Error::Device("hyv.nap is no number of milliseconds"))?,
        None => limits::NET_SLEEP_NS,
    };
    let start = Instant::now();
    let before = pci::accesses();
    let card = virtio::open().map_err(Error::Device)?;
    log::debug!(
        "network card {}, MTU {}, up in {} us, with {} accesses to configuration space and {} to its registers",
        hyv_net::EthernetAddress(card.mac()),
        card.mtu(),
        start.elapsed().as_micros(),
        pci::accesses() - before,
        virtio::accesses(),
    );
    let net = Net::new(
        Box::new(card),
        Rc::new(Guest { max_sleep_ns }),
        &config,
        time::tsc() ^ time::unix_ns(),
    )?;
    net.wait_configured(limits::LEASE_TIMEOUT)?;
    Ok(net)
}
