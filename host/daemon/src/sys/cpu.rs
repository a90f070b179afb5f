//! Which CPUs there are, and which thread runs where.

use std::io;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// A list of CPUs that could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CpuListError {
    /// Not of the form `0,2-3`.
    #[error("`{0}` is no list of CPUs; write it like 0,2-3")]
    Malformed(String),
    /// A CPU that this process may not use.
    #[error("CPU {cpu} is not one that may be used here; there are {allowed:?}")]
    NotAllowed {
        /// The CPU.
        cpu: usize,
        /// Those that may.
        allowed: Vec<usize>,
    },
}

/// CPUs that this process may run on, ascending.
///
/// # Errors
/// When the kernel does not say.
pub fn allowed() -> io::Result<Vec<usize>> {
    let set = sched_getaffinity(None)?;
    Ok((0..CpuSet::MAX_CPU).filter(|c| set.is_set(*c)).collect())
}

/// Reads a list like `0,2-3`, in its order, each CPU once; all of them must be in `allowed`.
///
/// # Errors
/// `Malformed`, `NotAllowed`.
pub fn parse_list(text: &str, allowed: &[usize]) -> Result<Vec<usize>, CpuListError> {
    let bad = || CpuListError::Malformed(text.to_owned());
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let first: usize = first.trim().parse().map_err(|_| bad())?;
        let last: usize = last.trim().parse().map_err(|_| bad())?;
        if last < first || last >= CpuSet::MAX_CPU {
            return Err(bad());
        }
        for cpu in first..=last {
            if !allowed.contains(&cpu) {
                return Err(CpuListError::NotAllowed {
                    cpu,
                    allowed: allowed.to_vec(),
                });
            }
            if !cpus.contains(&cpu) {
                cpus.push(cpu);
            }
        }
    }
    Ok(cpus)
}

fn set_of(cpus: &[usize]) -> io::Result<CpuSet> {
    let mut set = CpuSet::new();
    for cpu in cpus {
        if *cpu >= CpuSet::MAX_CPU {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("there is no CPU {cpu}"),
            ));
        }
        set.set(*cpu);
    }
    Ok(set)
}

/// Lets the calling thread run on `cpus` only.
///
/// # Errors
/// When none of them may be used.
pub fn pin_current(cpus: &[usize]) -> io::Result<()> {
    Ok(sched_setaffinity(None, &set_of(cpus)?)?)
}

/// Lets thread `tid` (of this or another process of the same user) run on `cpus` only.
///
/// # Errors
/// When the thread is gone or none of the CPUs may be used.
pub fn pin_thread(tid: i32, cpus: &[usize]) -> io::Result<()> {
    let tid = rustix::thread::Pid::from_raw(tid).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{tid} is no thread id"),
        )
    })?;
    Ok(sched_setaffinity(Some(tid), &set_of(cpus)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists() {
        let allowed = [0, 1, 2, 3];
        assert_eq!(parse_list("1", &allowed).unwrap(), [1]);
        assert_eq!(parse_list("2-3,0,2", &allowed).unwrap(), [2, 3, 0]);
        for bad in [
            "",
            "a",
            "1-",
            "3-1",
            "0,,1",
            "-1",
            "0-99999999999",
            "0-1000000",
        ] {
            assert!(
                matches!(parse_list(bad, &allowed), Err(CpuListError::Malformed(_))),
                "{bad}"
            );
        }
        assert!(matches!(
            parse_list("3-4", &allowed),
            Err(CpuListError::NotAllowed { cpu: 4, .. })
        ));
    }

    #[test]
    fn a_pinned_thread_runs_where_it_was_put() {
        let cpu = *allowed().unwrap().last().unwrap();
        std::thread::spawn(move || {
            pin_current(&[cpu]).unwrap();
            assert_eq!(rustix::thread::sched_getcpu(), cpu);
            assert_eq!(allowed().unwrap(), [cpu]);
            pin_thread(rustix::thread::gettid().as_raw_nonzero().get(), &[cpu]).unwrap();
        })
        .join()
        .unwrap();
        assert!(pin_current(&[1 << 20]).is_err());
        assert!(pin_thread(0, &[0]).is_err());
    }
}
