//! How a guest ended.

use std::fmt;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

use hyv_abi::window::UserState;

use super::qmp::Events;

/// Exit status of this program when a guest ended by a fault of its own or of its machine.
pub const EXIT_FAULT: i32 = 70;

/// Why a guest no longer runs.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ending {
    /// The application returned.
    Exited {
        /// Its code.
        code: i32,
    },
    /// A panic or an exception, reported by the guest itself.
    Panicked {
        /// Its code.
        code: i32,
    },
    /// The guest left by its exit port before it could say more.
    EarlyFailure {
        /// What it wrote to the port.
        value: i32,
    },
    /// An exception while an exception was being handled: the machine reset itself.
    TripleFault,
    /// The guest switched the machine off.
    PoweredOff,
    /// KVM could not go on.
    KvmInternalError,
    /// `main` did not run in time.
    Watchdog {
        /// The limit.
        limit: Duration,
        /// How far it came.
        state: Option<UserState>,
    },
    /// It did not end in time after it was asked to.
    ShutdownTimeout {
        /// The limit.
        limit: Duration,
    },
    /// This program ended it.
    Stopped,
    /// Somebody else ended QEMU.
    Killed {
        /// The signal.
        signal: i32,
    },
    /// QEMU itself failed.
    QemuFailed {
        /// Its status.
        status: String,
    },
}

/// The whole story of a guest that has ended.
#[derive(Clone, Debug)]
pub struct ExitReport {
    /// Why.
    pub ending: Ending,
    /// The end of what COM1 said, with the functions of backtraces.
    pub console: String,
    /// The end of what QEMU said on standard error.
    pub qemu_stderr: String,
    /// From the start of QEMU's process.
    pub lived: Duration,
}

impl ExitReport {
    /// The application returned 0, or this program stopped it.
    #[must_use]
    pub fn is_success(&self) -> bool {
        matches!(self.ending, Ending::Exited { code: 0 } | Ending::Stopped)
    }

    /// What this program should exit with: the application's own code where it gave one, and never 0 after a fault.
    #[must_use]
    pub fn exit_code(&self) -> i32 {
        match self.ending {
            Ending::Exited { code } => code,
            Ending::Stopped => 0,
            Ending::Panicked { code } if code != 0 => code,
            _ => EXIT_FAULT,
        }
    }
}

impl fmt::Display for ExitReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.ending)?;
        let quote = |f: &mut fmt::Formatter<'_>, who: &str, text: &str| {
            if text.is_empty() {
                return Ok(());
            }
            write!(f, "\n{who}:")?;
            text.lines().try_for_each(|l| write!(f, "\n  {l}"))
        };
        if self.is_success() || matches!(self.ending, Ending::Exited { .. }) {
            return Ok(());
        }
        quote(f, "the guest's last words on COM1", &self.console)?;
        quote(f, "QEMU said", &self.qemu_stderr)
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited { code } => write!(f, "the guest exited with code {code}"),
            Self::Panicked { code } => write!(f, "the guest panicked (code {code})"),
            Self::EarlyFailure { value } => {
                write!(f, "the guest failed before its application ran (exit port value {value})")
            }
            Self::TripleFault => {
                f.write_str("the guest caused a triple fault: an exception before, or inside, its own handler of exceptions")
            }
            Self::PoweredOff => f.write_str("the guest switched its machine off"),
            Self::KvmInternalError => {
                f.write_str("KVM cannot execute what the guest does (internal error); --accel tcg runs without it")
            }
            Self::Watchdog { limit, state } => {
                let far = match state {
                    Some(UserState::Off) => "nothing of it ran",
                    Some(UserState::Booting) => "its runtime was setting up",
                    Some(_) => "it was running",
                    None => "its state word is garbage",
                };
                write!(f, "the guest did not reach its main function within {limit:.0?}: {far}; ")?;
                f.write_str("leave it more of this machine's CPUs, or try --accel tcg")
            }
            Self::ShutdownTimeout { limit } => {
                write!(f, "the guest did not end within {limit:.0?} after it was asked to, and was killed")
            }
            Self::Stopped => f.write_str("the guest was stopped"),
            Self::Killed { signal } => {
                let why = if *signal == 9 { "; was memory short (see `dmesg`)?" } else { "" };
                write!(f, "QEMU was ended from outside by signal {signal}{why}")
            }
            Self::QemuFailed { status } => write!(f, "QEMU failed ({status})"),
        }
    }
}

/// Why this program itself ended QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Stopped,
    Watchdog {
        limit: Duration,
        state: Option<UserState>,
    },
    ShutdownTimeout {
        limit: Duration,
    },
    KvmInternalError,
    /// The guest said its last word in the window, and QEMU did not end.
    Lingering,
}

/// Puts together what is known. The window's words come from the guest, and only choose among a guest's own endings.
pub(crate) fn judge(
    status: ExitStatus,
    state: Option<UserState>,
    code: i32,
    events: &Events,
    verdict: Option<Verdict>,
) -> Ending {
    let own = match state {
        Some(UserState::Exited) => Some(Ending::Exited { code }),
        Some(UserState::Panicked) => Some(Ending::Panicked { code }),
        _ => None,
    };
    let failed = || Ending::QemuFailed {
        status: status.to_string(),
    };
    match verdict {
        Some(Verdict::Stopped) => return own.unwrap_or(Ending::Stopped),
        Some(Verdict::Watchdog { limit, state }) => return Ending::Watchdog { limit, state },
        Some(Verdict::ShutdownTimeout { limit }) => {
            return own.unwrap_or(Ending::ShutdownTimeout { limit });
        }
        Some(Verdict::KvmInternalError) => return Ending::KvmInternalError,
        Some(Verdict::Lingering) => return own.unwrap_or_else(failed),
        None => {}
    }
    if let Some(signal) = status.signal() {
        return Ending::Killed { signal };
    }
    match events.shutdown.as_deref() {
        Some("guest-reset") => return Ending::TripleFault,
        Some("guest-shutdown") => return own.unwrap_or(Ending::PoweredOff),
        Some("host-signal") => {
            return Ending::Killed {
                signal: libc::SIGTERM,
            };
        }
        Some("host-qmp-quit") => return own.unwrap_or(Ending::Stopped),
        _ => {}
    }
    match (own, status.code()) {
        (Some(own), _) => own,
        // isa-debug-exit ends QEMU with twice the value plus one. QEMU's own failures have status 1 as well, but a guest of ours
        // never writes 0 without a word in the window.
        (None, Some(c)) if c & 1 == 1 && c != 1 => Ending::EarlyFailure { value: c >> 1 },
        // QEMU says nothing of what happens before QMP's greeting is answered. Of its own accord it ends in order only
        // when the machine resets.
        (None, Some(0)) if events.shutdown.is_none() => Ending::TripleFault,
        _ => failed(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(code: i32) -> ExitStatus {
        ExitStatus::from_raw(code << 8)
    }

    fn shutdown(reason: &str) -> Events {
        Events {
            shutdown: Some(reason.into()),
            stopped: false,
        }
    }

    /// QEMU ends before QMP's handshake when a guest faults at once: no event then says why.
    #[test]
    fn an_orderly_end_without_a_word_is_a_reset() {
        let silent = Events {
            shutdown: None,
            stopped: false,
        };
        assert_eq!(
            judge(status(0), None, 0, &silent, None),
            Ending::TripleFault
        );
    }

    #[test]
    fn every_way_to_end() {
        let none = Events::default();
        let exited = Some(UserState::Exited);
        let s = Duration::from_secs(1);
        let table = [
            (
                judge(status(1), exited, 0, &none, None),
                Ending::Exited { code: 0 },
            ),
            (
                judge(status(3), exited, 7, &none, None),
                Ending::Exited { code: 7 },
            ),
            (
                judge(status(3), Some(UserState::Panicked), 101, &none, None),
                Ending::Panicked { code: 101 },
            ),
            (
                judge(status(43), Some(UserState::Off), 0, &none, None),
                Ending::EarlyFailure { value: 21 },
            ),
            (
                judge(
                    status(0),
                    Some(UserState::Ready),
                    0,
                    &shutdown("guest-reset"),
                    None,
                ),
                Ending::TripleFault,
            ),
            (
                judge(status(0), exited, 0, &shutdown("guest-reset"), None),
                Ending::TripleFault,
            ),
            (
                judge(status(0), None, 0, &shutdown("guest-shutdown"), None),
                Ending::PoweredOff,
            ),
            (
                judge(ExitStatus::from_raw(9), exited, 0, &none, None),
                Ending::Killed { signal: 9 },
            ),
            (
                judge(status(0), None, 0, &shutdown("host-signal"), None),
                Ending::Killed { signal: 15 },
            ),
            (
                judge(
                    ExitStatus::from_raw(9),
                    exited,
                    3,
                    &none,
                    Some(Verdict::Stopped),
                ),
                Ending::Exited { code: 3 },
            ),
            (
                judge(
                    ExitStatus::from_raw(9),
                    None,
                    3,
                    &none,
                    Some(Verdict::Stopped),
                ),
                Ending::Stopped,
            ),
            (
                judge(
                    ExitStatus::from_raw(9),
                    exited,
                    3,
                    &none,
                    Some(Verdict::Lingering),
                ),
                Ending::Exited { code: 3 },
            ),
            (
                judge(
                    ExitStatus::from_raw(9),
                    None,
                    0,
                    &none,
                    Some(Verdict::Watchdog {
                        limit: s,
                        state: None,
                    }),
                ),
                Ending::Watchdog {
                    limit: s,
                    state: None,
                },
            ),
            (
                judge(
                    ExitStatus::from_raw(9),
                    None,
                    0,
                    &none,
                    Some(Verdict::KvmInternalError),
                ),
                Ending::KvmInternalError,
            ),
        ];
        for (i, (got, wanted)) in table.into_iter().enumerate() {
            assert_eq!(got, wanted, "row {i}");
        }
        assert!(matches!(
            judge(status(1), Some(UserState::Off), 0, &none, None),
            Ending::QemuFailed { .. }
        ));
        assert!(matches!(
            judge(status(2), Some(UserState::Running), 0, &none, None),
            Ending::QemuFailed { .. }
        ));
    }

    #[test]
    fn no_fault_exits_with_zero() {
        let report = |ending| ExitReport {
            ending,
            console: "x".into(),
            qemu_stderr: String::new(),
            lived: Duration::ZERO,
        };
        assert_eq!(report(Ending::Exited { code: 5 }).exit_code(), 5);
        assert_eq!(report(Ending::Panicked { code: 0 }).exit_code(), EXIT_FAULT);
        assert_eq!(report(Ending::TripleFault).exit_code(), EXIT_FAULT);
        assert!(
            report(Ending::TripleFault)
                .to_string()
                .contains("last words on COM1:\n  x")
        );
        assert!(
            !report(Ending::Exited { code: 0 })
                .to_string()
                .contains("COM1")
        );
    }
}
