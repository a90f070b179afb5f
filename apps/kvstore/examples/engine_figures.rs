//! What the engine alone costs: reads and writes without a network, overwriting at several utilisations, memory per object.
//!
//! `cargo run --release -p kvstore --example engine_figures [MIB]` (region of 1024 MiB unless told otherwise). All
//! throughputs of overwriting are taken in alternating slices of one run, so their ratios hold on a noisy machine.

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

/// Objects until the live bytes reach so many per cent of the capacity.
fn fill(store: &mut Plain, percent: u32) -> u64 {
    let mut objects = 0;
    while store.stats_live() * 100 < store.capacity() * u64::from(percent) {
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
    reads_and_writes(bytes);
    memory_per_object(bytes);
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
    let objects = fill(&mut store, 95);
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

fn overwriting(bytes: usize) {
    let mut stores: Vec<(Plain, u64, Random)> = UTILISATIONS
        .iter()
        .map(|percent| {
            let mut store = empty(bytes);
            let objects = fill(&mut store, *percent);
            // Until what is measured is the steady state.
            let mut random = Random(u64::from(*percent));
            for i in 0..4 * (bytes as u64 / 160) {
                put_and_clean(&mut store, random.below(objects), i as u32);
            }
            (store, objects, random)
        })
        .collect();
    let mut rates = vec![Vec::new(); stores.len()];
    let mut moved = vec![0.0; stores.len()];
    for _ in 0..ROUNDS {
        for (i, (store, objects, random)) in stores.iter_mut().enumerate() {
            let before = store.stats().cleaner.bytes_moved;
            let (start, mut n) = (Instant::now(), 0u32);
            while start.elapsed() < Duration::from_millis(300) {
                for _ in 0..1024 {
                    put_and_clean(store, random.below(*objects), n);
                    n += 1;
                }
            }
            rates[i].push(f64::from(n) / start.elapsed().as_secs_f64());
            moved[i] = (store.stats().cleaner.bytes_moved - before) as f64 / f64::from(n);
        }
    }
    for (i, percent) in UTILISATIONS.iter().enumerate() {
        let ratios: Vec<f64> = rates[i].iter().zip(&rates[0]).map(|(a, b)| a / b).collect();
        println!(
            "overwriting at {percent}% of the capacity: {:.2} million a second, {:.0}% of that at {}%; {:.0} B moved for each",
            median(rates[i].clone()) / 1e6,
            100.0 * median(ratios),
            UTILISATIONS[0],
            moved[i],
        );
    }
}

fn put_and_clean(store: &mut Plain, object: u64, n: u32) {
    put(store, object);
    if n.is_multiple_of(CLEAN_EVERY) {
        store.clean(CLEAN_BYTES, 0);
    }
}
