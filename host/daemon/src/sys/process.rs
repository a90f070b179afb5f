//! Children that die with this process.
#![allow(unsafe_code, reason = "runs system calls between fork and exec")]

use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock};

type Job = (Command, Sender<io::Result<Child>>);

/// Starts `command` in a process group of its own (a terminal's Ctrl-C does not reach it), with no open descriptor but the
/// standard ones and `inherit` (under their own numbers), and has the kernel kill it when this process ends, however it ends.
///
/// # Errors
/// When the program cannot be started.
pub fn spawn_bound(mut command: Command, inherit: &[BorrowedFd<'_>]) -> io::Result<Child> {
    use std::os::fd::AsRawFd;
    let keep: Vec<RawFd> = inherit.iter().map(AsRawFd::as_raw_fd).collect();
    let parent = rustix::process::getpid();
    command.process_group(0);
    // SAFETY: the closure makes system calls only; it neither allocates nor takes a lock.
    unsafe {
        command.pre_exec(move || {
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
            // The parent may have ended before the line above.
            if rustix::process::getppid() != Some(parent) {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            // Descriptors that this process inherited without CLOEXEC. A sandbox may refuse the call; then only those leak.
            libc::syscall(
                libc::SYS_close_range,
                3u32,
                u32::MAX,
                libc::CLOSE_RANGE_CLOEXEC,
            );
            for fd in &keep {
                rustix::io::fcntl_setfd(BorrowedFd::borrow_raw(*fd), rustix::io::FdFlags::empty())?;
            }
            Ok(())
        });
    }
    on_spawner(command)
}

/// The kernel sends the death signal when the *thread* that forked ends, so one thread that never ends does all forking.
fn on_spawner(command: Command) -> io::Result<Child> {
    static SPAWNER: OnceLock<Mutex<Sender<Job>>> = OnceLock::new();
    let jobs = SPAWNER.get_or_init(|| {
        let (jobs, inbox) = channel::<Job>();
        // If no thread can be made, the inbox is dropped with the closure and the send below says so.
        let _ = std::thread::Builder::new()
            .name("hyv-spawner".into())
            .spawn(move || {
                for (mut command, reply) in inbox {
                    let _ = reply.send(command.spawn());
                }
            });
        Mutex::new(jobs)
    });
    let gone =
        || io::Error::other("no thread could be started to launch programs from (see `ulimit -u`)");
    let (reply, answer) = channel();
    jobs.lock()
        .map_err(|_| gone())?
        .send((command, reply))
        .map_err(|_| gone())?;
    answer.recv().map_err(|_| gone())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::event::EventFd;
    use std::os::fd::{AsFd, AsRawFd};
    use std::process::Stdio;

    #[test]
    fn only_what_is_named_is_inherited() {
        let (kept, lost) = (EventFd::new().unwrap(), EventFd::new().unwrap());
        rustix::io::fcntl_setfd(&lost, rustix::io::FdFlags::empty()).unwrap();
        let mut command = Command::new("sh");
        command
            .args(["-c", "ls /proc/$$/fd"])
            .stdout(Stdio::piped());
        let child = spawn_bound(command, &[kept.as_fd()]).unwrap();
        let out = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
        let fds: Vec<i32> = out.lines().map(|l| l.parse().unwrap()).collect();
        assert!(fds.contains(&kept.as_fd().as_raw_fd()), "{fds:?}");
        assert!(!fds.contains(&lost.as_fd().as_raw_fd()), "{fds:?}");
    }

    #[test]
    fn a_thread_that_ends_takes_no_child_with_it() {
        let mut child = std::thread::spawn(|| {
            let mut c = Command::new("sleep");
            c.arg("10");
            spawn_bound(c, &[]).unwrap()
        })
        .join()
        .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_missing_program_is_an_error() {
        let e = spawn_bound(Command::new("/nonexistent/program"), &[]).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::NotFound);
    }
}
