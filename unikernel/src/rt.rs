//! What an application asks of the runtime while it lives.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use hyv_abi::window::{KICK_CONTROL, UserState, Window};

use crate::time::{Instant, now_ns};
use crate::{function, layout, limits, memory, nucleus, port};

/// Exit code of a guest that panicked, as of any Rust program.
pub const EXIT_PANIC: i32 = 101;
/// Exit code of a guest that an exception ended.
pub const EXIT_EXCEPTION: i32 = 102;
/// Exit code of a guest whose host stopped beating.
pub const EXIT_HOST_LOST: i32 = 103;
/// Exit code of a guest that could not be set up.
pub const EXIT_BOOT: i32 = 104;

/// The command line of the image: words separated by blanks. Words that begin with `hyv.` are the
/// runtime's: `hyv.log=LEVEL`, and
/// `hyv.rep=BYTES` (from how many bytes on copies use string instructions; else chosen by the CPU), `hyv.net=ADDRESSES` and `hyv.nap=MS`
/// ([`net::up`](crate::net::up)).
#[derive(Clone, Copy, Debug)]
pub struct Args {
    text: &'static str,
}

impl Args {
    pub(crate) const fn new(text: &'static str) -> Self {
        Self { text }
    }

    /// The whole line as given.
    #[must_use]
    pub const fn text(self) -> &'static str {
        self.text
    }

    /// The application's words.
    pub fn words(self) -> impl Iterator<Item = &'static str> {
        self.text
            .split_ascii_whitespace()
            .filter(|w| !w.starts_with("hyv."))
    }

    /// The value of the last `key=value` among all words.
    #[must_use]
    pub fn get(self, key: &str) -> Option<&'static str> {
        self.text
            .split_ascii_whitespace()
            .filter_map(|w| w.strip_prefix(key)?.strip_prefix('='))
            .next_back()
    }
}

/// Arguments: what `-append` said.
#[must_use]
pub fn args() -> Args {
    crate::start::args()
}

/// Bytes of RAM.
#[must_use]
pub fn ram_len() -> u64 {
    crate::start::ram_len()
}

/// The window.
///
/// # Panics
/// Before the runtime is set up; never in an application.
#[must_use]
pub fn window() -> &'static Window {
    function::get().expect("the runtime is set up").window()
}

/// Rings doorbell `vector` at the host; see [`function::Function::kick`].
pub fn kick(vector: u32) {
    if let Some(f) = function::get() {
        f.kick(vector);
    }
}

/// Tells the host that the application serves now.
pub fn ready() {
    let user = &window().user;
    user.overhead_bytes.store(memory::overhead(), Relaxed);
    user.state.store(
        UserState::Ready as u32,
        core::sync::atomic::Ordering::Release,
    );
    kick(KICK_CONTROL);
}

/// Whether the host asked this guest to end.
#[inline]
#[must_use]
pub fn shutdown_requested() -> bool {
    window().header.shutdown.load(Relaxed) != 0
}

/// Wake-ups from the host since boot. Read it, arm or look once more, then [`halt`] with it: no wake-up
/// is lost.
#[inline]
#[must_use]
pub fn wake_count() -> u64 {
    nucleus::wakes()
}

/// Sleeps until the host wakes this guest, or not at all if it did so since [`wake_count`] was `seen`.
pub fn halt(seen: u64) {
    nucleus::halt(seen);
}

/// When the wake-up that was asked of the host comes, on this guest's clock; 0 if none was asked.
static ARMED: AtomicU64 = AtomicU64::new(0);
/// The host's count of such wake-ups when it was asked.
static FIRED: AtomicU32 = AtomicU32::new(0);

/// Sleeps as [`halt`] does, but no longer than to `deadline`: the host's timer ends it. May return
/// early. Looks at the
/// host's heartbeat first.
pub fn wait(seen: u64, deadline: Option<Instant>) {
    check_host();
    if let Some(deadline) = deadline {
        let now = now_ns();
        let at = deadline.as_ns();
        if at <= now {
            return;
        }
        // An earlier wake-up that is still to come serves as well: its waiter comes back here. Where this guest's clock goes slower than
        // the host's (calibrated under TCG), one that has come seems to be still to come: the host's count tells.
        let (armed, fired) = (ARMED.load(Relaxed), FIRED.load(Relaxed));
        let window = window();
        let now_fired = window.header.timer_fired.load(Relaxed);
        if armed <= now || armed > at || fired != now_fired {
            ARMED.store(at, Relaxed);
            FIRED.store(now_fired, Relaxed);
            window
                .user
                .wake_in_ns
                .store(at - now, core::sync::atomic::Ordering::Release);
            kick(KICK_CONTROL);
        }
    }
    nucleus::halt(seen);
}

static NEXT_LOOK: AtomicU64 = AtomicU64::new(0);
static LAST_BEAT: AtomicU64 = AtomicU64::new(0);
static MISSES: AtomicU32 = AtomicU32::new(0);

/// Ends the guest if the host has stopped beating. Call it from polling loops: it costs a clock
/// reading, and looks
/// three times a second.
#[inline]
pub fn check_host() {
    let now = now_ns();
    if now >= NEXT_LOOK.load(Relaxed) {
        look_at_host(now);
    }
}

#[cold]
fn look_at_host(now: u64) {
    NEXT_LOOK.store(now + limits::HOST_BEAT_PERIOD_NS, Relaxed);
    let window = window();
    window
        .user
        .beat
        .store(window.user.beat.load(Relaxed) + 1, Relaxed);
    window
        .user
        .overhead_bytes
        .store(memory::overhead(), Relaxed);
    let beat = window.header.host_beat.load(Relaxed);
    if beat != LAST_BEAT.swap(beat, Relaxed) {
        MISSES.store(0, Relaxed);
        return;
    }
    let misses = MISSES.load(Relaxed) + 1;
    MISSES.store(misses, Relaxed);
    if misses >= limits::HOST_BEAT_MISSES {
        crate::com1::write(b"hyv: the host's heartbeat stopped: the guest ends\n");
        end(UserState::Exited, EXIT_HOST_LOST);
    }
}

/// Ends the guest with the application's exit code; 0 is success.
pub fn exit(code: i32) -> ! {
    end(UserState::Exited, code)
}

/// Leaves state and code in the window and turns the machine off.
pub(crate) fn end(state: UserState, code: i32) -> ! {
    if let Some(f) = function::get() {
        let user = &f.window().user;
        user.overhead_bytes.store(memory::overhead(), Relaxed);
        user.exit_code.store(code.cast_unsigned(), Relaxed);
        user.state
            .store(state as u32, core::sync::atomic::Ordering::Release);
    }
    let word = if code == 0 {
        layout::EXIT_SUCCESS
    } else {
        layout::EXIT_FAILURE
    };
    port::write32(layout::EXIT_PORT, word);
    // Without the exit device the host reads the state and ends QEMU.
    kick(KICK_CONTROL);
    loop {
        nucleus::halt(nucleus::wakes());
    }
}
