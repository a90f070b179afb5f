//! Every limit of the control backend, with its reason.

use std::time::Duration;

/// Entries of the largest control queue: the ABI says so, and a user has one request outstanding per thread.
pub const MAX_QUEUE_SIZE: u16 = 256;
/// Pieces that a reply may be spread over; drivers use one or two.
pub const MAX_REPLY_SEGMENTS: usize = 16;
/// Requests served for one user before the others have their turn.
pub const REQUESTS_PER_TURN: usize = 64;
/// Control requests per second and user. One takes some 2 us of the control thread, so one user can have a tenth of it.
pub const REQUESTS_PER_SECOND: u32 = 50_000;
/// Requests at once: 10,000 queue pairs made and connected take a dozen each.
pub const REQUEST_BURST: u32 = 200_000;

/// Period of the host's beat; the window promises 100 ms.
pub const BEAT: Duration = Duration::from_millis(50);
/// Longest wake-up a user can ask for; a longer one is shortened to it.
pub const MAX_WAKE: Duration = Duration::from_secs(24 * 3600);

/// Native sessions at once: each holds some ten descriptors of this process, whose usual limit is 1,024.
pub const MAX_SESSIONS: usize = 64;
/// Connections that have not said hello yet.
pub const MAX_PENDING: usize = 16;
/// Time for a hello: it is the first thing a process sends.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(2);
/// RAM of a session comes in whole 2 MiB pages.
pub const RAM_STEP: u64 = 2 << 20;
/// RAM of one session: as much as the largest guest.
pub const MAX_SESSION_RAM: u64 = crate::limits::MAX_GUEST_MEMORY;
/// RAM of all sessions together.
pub const MAX_TOTAL_SESSION_RAM: u64 = 2 * MAX_SESSION_RAM;
/// Pause of the listener when no descriptor is left.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// What one user, and all together, may take.
#[derive(Clone, Copy, Debug)]
pub struct Quotas {
    /// Control requests per second and user.
    pub requests_per_second: u32,
    /// Control requests at once.
    pub request_burst: u32,
    /// Native sessions at once.
    pub sessions: usize,
    /// RAM of one session, bytes.
    pub session_ram: u64,
    /// RAM of all sessions, bytes.
    pub total_session_ram: u64,
    /// Connection identifiers per user, time limits of connections.
    pub cm: crate::cm::CmConfig,
}

impl Default for Quotas {
    fn default() -> Self {
        Self {
            requests_per_second: REQUESTS_PER_SECOND,
            request_burst: REQUEST_BURST,
            sessions: MAX_SESSIONS,
            session_ram: MAX_SESSION_RAM,
            total_session_ram: MAX_TOTAL_SESSION_RAM,
            cm: crate::cm::CmConfig::default(),
        }
    }
}
