//! Memory: the functions that compiled code calls, the heap, and RAM in its whole length.
#![allow(
    unsafe_code,
    reason = "calls memory functions by symbol, and looks at RAM by address"
)]

use alloc::format;
use alloc::string::ToString;
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::AtomicU64;

use hyv_unikernel::log::info;
use hyv_unikernel::{memory, rt, time};

use crate::Verdict;

unsafe extern "C" {
    fn memcpy(to: *mut u8, from: *const u8, n: usize) -> *mut u8;
    fn memmove(to: *mut u8, from: *const u8, n: usize) -> *mut u8;
    fn memset(to: *mut u8, byte: i32, n: usize) -> *mut u8;
    fn memcmp(a: *const u8, b: *const u8, n: usize) -> i32;
    fn bcmp(a: *const u8, b: *const u8, n: usize) -> i32;
    fn strlen(s: *const u8) -> usize;
}

/// Words in RAM that the host updates too.
pub(crate) fn shared_words() -> &'static [AtomicU64; 8] {
    static WORDS: [AtomicU64; 8] = [const { AtomicU64::new(0) }; 8];
    &WORDS
}

/// A small generator, so that every run tests the same.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

const ARENA: usize = 64 << 10;

fn sizes() -> Vec<usize> {
    let mut all: Vec<usize> = (0..=530).collect();
    all.extend([
        1023, 1024, 1025, 2047, 2048, 4095, 4096, 4097, 5000, 8191, 8192, 8193, 16_384, 20_001,
    ]);
    all
}

/// A byte loop that the compiler cannot turn into a call of what is tested.
fn copy_naively(to: &mut [u8], from: &[u8]) {
    for (t, f) in to.iter_mut().zip(from) {
        // SAFETY: plain references.
        unsafe { core::ptr::write_volatile(t, core::ptr::read_volatile(f)) };
    }
}

/// The memory functions against byte loops: every size around every branch, every alignment, every overlap.
pub(crate) fn functions() -> Verdict {
    let mut rng = Random(0x9e37_79b9_7f4a_7c15);
    let mut source = vec![0_u8; ARENA];
    for b in &mut source {
        *b = rng.next() as u8;
    }
    let mut got = source.clone();
    let mut want = source.clone();
    for n in sizes() {
        for round in 0..24 {
            let from = rng.below(64);
            let to = ARENA / 2 + rng.below(64);
            // memcpy
            copy_naively(&mut want[to..to + n], &source[from..from + n]);
            // SAFETY: both ranges lie inside their arenas, which differ.
            let r = unsafe { memcpy(got.as_mut_ptr().add(to), source.as_ptr().add(from), n) };
            if r != got[to..].as_mut_ptr() || !same(&got, &want) {
                return Err(format!("memcpy of {n} from +{from} to +{to}"));
            }
            // memmove, overlapping by any distance, up and down
            let distance = rng.below(n + 40);
            let (a, b) = if round % 2 == 0 {
                (1000, 1000 + distance)
            } else {
                (1000 + distance, 1000)
            };
            let mut aside = vec![0; n];
            copy_naively(&mut aside, &want[a..a + n]);
            copy_naively(&mut want[b..b + n], &aside);
            // SAFETY: both ranges lie inside the arena.
            unsafe { memmove(got.as_mut_ptr().add(b), got.as_ptr().add(a), n) };
            if !same(&got, &want) {
                return Err(format!("memmove of {n} from {a} to {b}"));
            }
            // memset
            let byte = rng.next() as u8;
            for w in &mut want[to..to + n] {
                // SAFETY: a plain reference.
                unsafe { core::ptr::write_volatile(w, byte) };
            }
            // SAFETY: the range lies inside the arena. The upper bits of the byte argument do not count.
            unsafe { memset(got.as_mut_ptr().add(to), i32::from(byte) | 0x100, n) };
            if !same(&got, &want) {
                return Err(format!("memset of {n} at +{to}"));
            }
            compare(&mut got, to, n, &mut rng)?;
            copy_naively(&mut want[to..to + n], &got[to..to + n]);
        }
    }
    for n in 0..300 {
        let mut s = vec![b'x'; n];
        s.push(0);
        // SAFETY: ends with a zero.
        if unsafe { strlen(s.as_ptr()) } != n {
            return Err(format!("strlen of {n}"));
        }
    }
    Ok(())
}

fn same(a: &[u8], b: &[u8]) -> bool {
    a.as_chunks::<8>()
        .0
        .iter()
        .zip(b.as_chunks::<8>().0)
        .all(|(x, y)| u64::from_ne_bytes(*x) == u64::from_ne_bytes(*y))
}

/// memcmp and bcmp: equal, and with one difference anywhere.
fn compare(arena: &mut [u8], at: usize, n: usize, rng: &mut Random) -> Verdict {
    let mut other = vec![0; n];
    copy_naively(&mut other, &arena[at..at + n]);
    let run = |a: &[u8], b: &[u8]| {
        // SAFETY: both are `n` bytes long.
        unsafe {
            (
                memcmp(a.as_ptr(), b.as_ptr(), n),
                bcmp(a.as_ptr(), b.as_ptr(), n),
            )
        }
    };
    if run(&arena[at..at + n], &other) != (0, 0) {
        return Err(format!("memcmp of {n} equal bytes"));
    }
    if n > 0 {
        let i = rng.below(n);
        other[i] ^= 1 << rng.below(8);
        // What comes after the first difference must not matter.
        for b in &mut other[i + 1..] {
            *b = rng.next() as u8;
        }
        let (c, d) = run(&arena[at..at + n], &other);
        let below = arena[at + i] < other[i];
        if c == 0 || d == 0 || (c < 0) != below {
            return Err(format!("memcmp of {n}, difference at {i}: {c} and {d}"));
        }
        if (run(&other, &arena[at..at + n]).0 < 0) == below {
            return Err(format!("memcmp of {n} is not antisymmetric at {i}"));
        }
    }
    Ok(())
}

/// The heap under random load: contents stay, alignments hold, all comes back, and a refusal is an error.
pub(crate) fn heap() -> Verdict {
    let mut rng = Random(12345);
    let before = memory::heap_in_use();
    let mut held: Vec<(u8, Vec<u8>)> = Vec::with_capacity(512);
    for round in 0..20_000_u32 {
        if held.len() < 400 && rng.below(5) < 3 {
            let n = 1 + rng.below(if round % 50 == 0 { 60_000 } else { 700 });
            let tag = rng.next() as u8;
            held.push((tag, vec![tag; n]));
        } else if !held.is_empty() {
            let i = rng.below(held.len());
            let (tag, mut v) = held.swap_remove(i);
            if v.iter().any(|&b| b != tag) {
                return Err(format!("{} bytes were changed by somebody else", v.len()));
            }
            if rng.below(3) == 0 {
                v.resize(v.len() * 2, tag);
                held.push((tag, v));
            }
        }
    }
    drop(held);
    if memory::heap_in_use() != before {
        return Err(format!(
            "{before} bytes in use before, {} after",
            memory::heap_in_use()
        ));
    }
    for align in [1, 8, 64, 4096, 65_536] {
        let layout =
            alloc::alloc::Layout::from_size_align(100, align).map_err(|e| e.to_string())?;
        // SAFETY: the size is not zero; freed below with the same layout.
        let p = unsafe { alloc::alloc::alloc(layout) };
        if p.is_null() || !p.addr().is_multiple_of(align) {
            return Err(format!("alignment {align}: {p:?}"));
        }
        // SAFETY: from above.
        unsafe { alloc::alloc::dealloc(p, layout) };
    }
    let mut v: Vec<u8> = Vec::new();
    match v.try_reserve_exact(memory::heap_size() as usize * 2) {
        Err(_) => Ok(()),
        Ok(()) => Err("the heap gave more than it has".to_string()),
    }
}

/// Allocates until nothing is left: ends in a panic that says so, code 101.
pub(crate) fn exhaust() -> Verdict {
    let mut all: Vec<Vec<u8>> = Vec::new();
    for _ in 0..1_000_000 {
        all.push(vec![1; 100_000]);
    }
    Err(format!("{} allocations succeeded", all.len()))
}

/// All RAM beyond the heap is there once: writes its own offset to one word of every 2 MiB, reads all
/// back. The host may check
/// that each such word, at its offset in the RAM file, holds its offset: from `app[0]` on, `app[1]` bytes.
pub(crate) fn big() -> Verdict {
    let region = memory::take_rest();
    let (base, len) = (region.as_ptr().addr(), region.len());
    for o in (0..len).step_by(2 << 20) {
        let word = &mut region[o..o + 8];
        if word != [0; 8] {
            return Err(format!("RAM at {:#x} is not zero", base + o));
        }
        word.copy_from_slice(&((base + o) as u64).to_le_bytes());
    }
    for o in (0..len).step_by(2 << 20) {
        if region[o..o + 8] != ((base + o) as u64).to_le_bytes() {
            return Err(format!("RAM at {:#x} is also somewhere else", base + o));
        }
    }
    // The last word of all.
    region[len - 8..].copy_from_slice(&((base + len - 8) as u64).to_le_bytes());
    let app = &rt::window().user.app;
    app[0].store(base as u64, core::sync::atomic::Ordering::Relaxed);
    app[1].store(len as u64, core::sync::atomic::Ordering::Release);
    info!(
        "region at {base:#x}, {} MiB of {} MiB",
        len >> 20,
        rt::ram_len() >> 20
    );
    if (base + len) as u64 == rt::ram_len() & !((2 << 20) - 1) {
        Ok(())
    } else {
        Err("the region ends early".to_string())
    }
}

/// `take` gives aligned, zeroed, disjoint pieces and then nothing.
pub(crate) fn rest() -> Verdict {
    let total = memory::rest();
    let first = memory::take(3 << 20).ok_or("no first piece")?;
    let second = memory::take(1).ok_or("no second piece")?;
    if first.len() != 4 << 20 || second.len() != 2 << 20 {
        return Err(format!("pieces of {} and {}", first.len(), second.len()));
    }
    if first.as_ptr().addr() + first.len() != second.as_ptr().addr()
        || !second.as_ptr().addr().is_multiple_of(2 << 20)
    {
        return Err("pieces lie wrong".to_string());
    }
    if first.iter().chain(second.iter()).any(|&b| b != 0) {
        return Err("RAM is not zero".to_string());
    }
    if memory::take(usize::MAX).is_some() || memory::take(total).is_some() {
        return Err("more was given than there is".to_string());
    }
    let rest = memory::take_rest();
    if rest.len() + (6 << 20) != total || memory::rest() != 0 || !memory::take_rest().is_empty() {
        return Err("the rest is not the rest".to_string());
    }
    Ok(())
}

/// Logs what copies cost; for people, judges nothing.
pub(crate) fn speed() -> Verdict {
    let a = vec![1_u8; 1 << 20];
    let mut b = vec![2_u8; 1 << 20];
    for n in [
        8,
        24,
        64,
        100,
        256,
        512,
        1024,
        2048,
        4096,
        8192,
        65_536,
        1 << 20,
    ] {
        let rounds = (64 << 20) / (n + 64);
        let start = time::now_ns();
        for _ in 0..rounds {
            core::hint::black_box(&mut b)[..n].copy_from_slice(&core::hint::black_box(&a)[..n]);
        }
        let ps = (time::now_ns() - start) * 1000 / rounds as u64;
        info!("copy {n}: {}.{:03} ns", ps / 1000, ps % 1000);
    }
    Ok(())
}
