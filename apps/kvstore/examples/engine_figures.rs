//! What the engine alone costs: reads and writes without a network, overwriting at several utilisations, memory per object.
//!
//! `cargo run --release -p kvstore --example engine_figures [MIB] [overwrite]` (region of 1024 MiB unless told otherwise; with
//! `overwrite` that part alone). All throughputs of overwriting are taken in alternating slices of one run, so their ratios hold
//! on a noisy machine.

use std::hint::black_box;
use std::time::{Duration, Instant};

use memmap2::{Advice, MmapMut};

use kvstore::store::{Config, DEFAULT_TABLE, Store};

const VALUE: [u8; 100] = [0x5a; 100];
const KEY_BYTES: usize = 16;
/// Work that the cleaner may do between writes, as the server does it.
const CLEAN_BYTES: usize = 16 << 10;
/// Writes between two calls of the cleaner.
const CLEAN_EVERY: u32 = 4;
const UTILISATIONS: [u32; 3] = [30, 80, 90];
const ROUNDS: usize = 9;

type Plain = Store<MmapMut>;

fn key(i: u64) -> [u8; KEY_BYTES] {
    let mut key = *b"object:\0\0\0\0\0\0\0\0\0";
    key[8..].copy_from_slice(&i.to_le_bytes());
    key
}

/// A full-period sequence of 64-bit numbers (Steele et al., SplitMix).
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((u128::from(z ^ z >> 31) * u128::from(n)) >> 64) as u64
    }
}

fn empty(bytes: usize) -> Plain {
    let region = MmapMut::map_anon(bytes).expect("so much memory");
    // As a guest has it, and a process on large pages; where there are none it goes without.
    let _ = region.advise(Advice::HugePage);
    let config = Config {
        seed: 1,
        ..Config::default()
    };
    Store::new(region, config).expect("a region that is large enough")
}

/// Objects until the live bytes reach so many per cent of `bytes`.
fn fill(store: &mut Plain, percent: u32, bytes: u64) -> u64 {
    let mut objects = 0;
    while store.stats_live() * 100 < bytes * u64::from(percent) {
        for _ in 0..1024 {
            put(store, objects);
            objects += 1;
        }
    }
    objects
}

trait Live {
    fn stats_live(&self) -> u64;
}

impl Live for Plain {
    fn stats_live(&self) -> u64 {
        self.stats().bytes.live
    }
}

fn put(store: &mut Plain, object: u64) {
    store
        .put(DEFAULT_TABLE, &key(object), &VALUE, 0)
        .expect("room, because the cleaner keeps up");
}

/// Nanoseconds for each of `n` calls.
fn each(n: u32, mut call: impl FnMut()) -> f64 {
    let start = Instant::now();
    for _ in 0..n {
        call();
    }
    start.elapsed().as_nanos() as f64 / f64::from(n)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let mib = match std::env::args().nth(1).map(|text| text.parse()) {
        None => 1024,
        Some(Ok(mib @ 16..=1_000_000)) => mib,
        Some(_) => {
            eprintln!("error: the argument is the region's size in MiB, 16 or more");
            std::process::exit(2);
        }
    };
    let bytes = mib << 20;
    match std::env::args().nth(2).as_deref() {
        None => {
            reads_and_writes(bytes);
            memory_per_object(bytes);
        }
        Some("overwrite") => {}
        Some(other) => {
            eprintln!(
                "error: `{other}` is no part of the figures that can be asked for: `overwrite` is"
            );
            std::process::exit(2);
        }
    }
    overwriting(bytes);
}

fn reads_and_writes(bytes: usize) {
    let mut store = empty(bytes);
    let many = 1_000_000.min(bytes as u64 / 300);
    for i in 0..many {
        put(&mut store, i);
    }
    let mut random = Random(1);
    for (name, keys) in [("64 keys", 64), ("all keys at random", many)] {
        let read = median(
            (0..ROUNDS)
                .map(|_| {
                    each(200_000, || {
                        let key = key(random.below(keys));
                        let found = store.get(DEFAULT_TABLE, &key, 0).expect("it was put");
                        black_box(store.bytes(found.value())[0]);
                    })
                })
                .collect(),
        );
        let write = median(
            (0..ROUNDS)
                .map(|_| {
                    each(50_000, || {
                        let object = random.below(keys);
                        put(&mut store, object);
                    })
                })
                .collect(),
        );
        println!("{name:>20} of {many}: get {read:.0} ns, put {write:.0} ns");
    }
}

fn memory_per_object(bytes: usize) {
    let mut store = empty(bytes);
    let capacity = store.capacity();
    let objects = fill(&mut store, 95, capacity);
    let stats = store.stats();
    let payload = objects * (KEY_BYTES + VALUE.len()) as u64;
    let log = stats.bytes.live as f64 - payload as f64;
    let total = log + stats.table_bytes as f64;
    println!(
        "{objects} objects of {} B and keys of {KEY_BYTES} B: {:.1} B each beyond those ({:.1} in the log, {:.1} of hash table)",
        VALUE.len(),
        total / objects as f64,
        log / objects as f64,
        stats.table_bytes as f64 / objects as f64,
    );
}

/// What one slice of overwriting came to.
#[derive(Default)]
struct Figures {
    /// Overwrites a second.
    rates: Vec<f64>,
    /// Bytes that the cleaner moved for each byte written.
    moved: Vec<f64>,
    /// Nanoseconds in the cleaner for each object that it moved.
    move_ns: Vec<f64>,
}

fn overwriting(bytes: usize) {
    let mut stores: Vec<(Plain, u64, Random)> = UTILISATIONS
        .iter()
        .map(|percent| {
            let mut store = empty(bytes);
            let log = store.stats().log_bytes;
            let objects = fill(&mut store, *percent, log);
            // Until what is measured is the steady state.
            let mut random = Random(u64::from(*percent));
            for i in 0..4 * (bytes as u64 / 160) {
                put_and_clean(&mut store, random.below(objects), i as u32);
            }
            (store, objects, random)
        })
        .collect();
    let entry = stores[0].0.stats().bytes.live as f64 / stores[0].1 as f64;
    let mut figures: Vec<Figures> = stores.iter().map(|_| Figures::default()).collect();
    for _ in 0..ROUNDS {
        for ((store, objects, random), figures) in stores.iter_mut().zip(&mut figures) {
            let before = store.stats().cleaner.bytes_moved;
            let (start, mut n, mut cleaning) = (Instant::now(), 0u32, Duration::ZERO);
            while start.elapsed() < Duration::from_millis(300) {
                for _ in 0..1024 {
                    cleaning += put_and_clean(store, random.below(*objects), n);
                    n += 1;
                }
            }
            let took = start.elapsed().as_secs_f64();
            let moved = (store.stats().cleaner.bytes_moved - before) as f64 / entry;
            figures.rates.push(f64::from(n) / took);
            figures.moved.push(moved / f64::from(n));
            figures.move_ns.push(cleaning.as_nanos() as f64 / moved);
        }
    }
    let (first, fullest) = (&stores[0].0, stores[stores.len() - 1].0.stats());
    println!(
        "{} segments of {} MiB, {} of them turned into overflow buckets at {}%, of which {} are used beside {}",
        first.layout().segments,
        first.layout().segment_bytes() >> 20,
        first.layout().segments as u64 - fullest.segments,
        UTILISATIONS[UTILISATIONS.len() - 1],
        fullest.overflow_buckets,
        first.layout().buckets,
    );
    for (percent, own) in UTILISATIONS.iter().zip(&figures) {
        let pairs = own.rates.iter().zip(&figures[0].rates);
        println!(
            "overwriting at {percent}% of the log: {:.2} million a second, {:.0}% of that at {}%; {:.2} B moved for each written, {:.0} ns an object moved",
            median(own.rates.clone()) / 1e6,
            100.0 * median(pairs.map(|(a, b)| a / b).collect()),
            UTILISATIONS[0],
            median(own.moved.clone()),
            median(own.move_ns.clone()),
        );
    }
}

/// Returns the time that the cleaner took.
fn put_and_clean(store: &mut Plain, object: u64, n: u32) -> Duration {
    put(store, object);
    if !n.is_multiple_of(CLEAN_EVERY) || !store.wants_cleaning(0) {
        return Duration::ZERO;
    }
    let start = Instant::now();
    store.clean(CLEAN_BYTES, 0);
    start.elapsed()
}
