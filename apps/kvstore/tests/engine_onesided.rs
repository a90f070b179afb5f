//! Readers that only READ the region, word by word, in any order, while the store is changed and its cleaner never rests.
//!
//! The region ticks each time the engine reaches for it, so words are read in the middle of operations. A checker knows for each key
//! between which ticks each value can have been current. A reader that ignores state words must be caught by it.

mod engine_common;

use engine_common::{Random, seeds};
use kvstore::store::onesided::{Verdict, View, candidates, verify_entry};
use kvstore::store::{
    Config, DEFAULT_TABLE, NEVER, RejectRules, SUPERBLOCK_BYTES, Store, StoreError, Write,
};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ops::Range;

const KEYS: u64 = 60;
const QUARANTINE: u64 = 10_000;
const READERS: usize = 6;

/// A READ under way: words come one by one, in an order of their own.
struct Read {
    at: usize,
    order: Vec<usize>,
    bytes: Vec<u8>,
}

impl Read {
    fn new(range: Range<u64>, random: &mut Random) -> Self {
        let bytes = vec![0; (range.end - range.start) as usize];
        let mut order: Vec<usize> = (0..bytes.len().div_ceil(8)).collect();
        match random.below(3) {
            0 => {}
            1 => order.reverse(),
            _ => (1..order.len()).for_each(|n| order.swap(n, random.below(n as u64 + 1) as usize)),
        }
        Self {
            at: range.start as usize,
            order,
            bytes,
        }
    }

    /// Reads a word. True: it was the last.
    fn step(&mut self, region: &[u8]) -> bool {
        if let Some(word) = self.order.pop() {
            let range = 8 * word..self.bytes.len().min(8 * word + 8);
            self.bytes[range.clone()]
                .copy_from_slice(&region[self.at + range.start..self.at + range.end]);
        }
        self.order.is_empty()
    }
}

enum Stage {
    Bucket,
    Entry { generation: Option<u64> },
}

struct Reader {
    key: u64,
    started: u64,
    hash: u64,
    read: Read,
    stage: Stage,
    /// Candidates not looked at yet.
    left: Vec<u64>,
    overflow: Option<u64>,
}

/// What a reader concluded.
#[derive(Debug)]
struct Seen {
    key: u64,
    from: u64,
    to: u64,
    found: Option<(u64, Vec<u8>)>,
}

struct World {
    view: Option<View>,
    random: Random,
    readers: Vec<Reader>,
    seen: Vec<Seen>,
    /// Places where keys were found.
    cache: BTreeMap<u64, (u64, u64, usize)>,
    doubts: u64,
    late: u64,
    cached_hits: u64,
    ignore_state: bool,
    idle: bool,
}

impl World {
    fn tick(&mut self, region: &[u8], now: u64) {
        let Some(view) = self.view else {
            return;
        };
        while self.readers.len() < READERS {
            let reader = self.begin(&view, now);
            self.readers.push(reader);
        }
        // Now and then a reader is stopped for so long that it must not believe what it reads.
        self.idle = match self.idle {
            true => self.random.below(20_000) != 0,
            false => self.random.below(50_000) == 0,
        };
        if self.idle {
            return;
        }
        for _ in 0..1 + self.random.below(3) {
            let which = self.random.below(READERS as u64) as usize;
            if self.readers[which].read.step(region) {
                let reader = self.readers.swap_remove(which);
                if let Some(reader) = self.advance(&view, reader, now) {
                    self.readers.push(reader);
                } else {
                    let next = self.begin(&view, now);
                    self.readers.push(next);
                }
            }
        }
    }

    fn begin(&mut self, view: &View, now: u64) -> Reader {
        let key = self.random.below(KEYS);
        let hash = view.hash(DEFAULT_TABLE, &key.to_le_bytes());
        let cached = self
            .cache
            .get(&key)
            .copied()
            .filter(|_| self.random.below(2) == 0);
        let (range, stage) = match cached {
            Some((offset, generation, bytes)) => {
                let generation = Some(generation);
                (
                    view.entry_range(offset, bytes).unwrap(),
                    Stage::Entry { generation },
                )
            }
            None => (view.bucket_range(hash), Stage::Bucket),
        };
        Reader {
            key,
            started: now,
            hash,
            read: Read::new(range, &mut self.random),
            stage,
            left: Vec::new(),
            overflow: None,
        }
    }

    /// Goes on after a READ. None: the lookup has ended.
    fn advance(&mut self, view: &View, mut reader: Reader, now: u64) -> Option<Reader> {
        if !view.in_time(reader.started, now) {
            self.late += 1;
            return None;
        }
        match reader.stage {
            Stage::Bucket => {
                let bucket: &[u8; 64] = reader.read.bytes[..].try_into().unwrap();
                let Some(found) = candidates(bucket, reader.hash) else {
                    self.doubts += 1;
                    return None;
                };
                reader.left = found.offsets().to_vec();
                reader.overflow = found.overflow;
            }
            Stage::Entry { generation } => {
                let mut bytes = reader.read.bytes.clone();
                if self.ignore_state {
                    bytes[0] |= 1;
                }
                let key = reader.key.to_le_bytes();
                match verify_entry(&bytes, DEFAULT_TABLE, &key, generation, || now) {
                    Verdict::Hit(hit) => {
                        self.cached_hits += u64::from(generation.is_some());
                        let place = (reader.read.at as u64, hit.generation, hit.bytes);
                        self.cache.insert(reader.key, place);
                        let found = Some((hit.version, hit.value.to_vec()));
                        self.conclude(&reader, now, found);
                        return None;
                    }
                    Verdict::Longer { bytes } => {
                        let range = view.entry_range(reader.read.at as u64, bytes)?;
                        reader.read = Read::new(range, &mut self.random);
                        return Some(reader);
                    }
                    Verdict::Other => {}
                    Verdict::Doubt => {
                        self.cache.remove(&reader.key);
                        self.doubts += 1;
                        return None;
                    }
                }
            }
        }
        let range = if let Some(offset) = reader.left.pop() {
            reader.stage = Stage::Entry { generation: None };
            view.entry_range(offset, 100)?
        } else if let Some(offset) = reader.overflow.take() {
            reader.stage = Stage::Bucket;
            view.overflow_range(offset)?
        } else {
            self.conclude(&reader, now, None);
            return None;
        };
        reader.read = Read::new(range, &mut self.random);
        Some(reader)
    }

    fn conclude(&mut self, reader: &Reader, now: u64, found: Option<(u64, Vec<u8>)>) {
        self.seen.push(Seen {
            key: reader.key,
            from: reader.started,
            to: now,
            found,
        });
    }
}

/// A region that ticks.
struct Region {
    bytes: Vec<u8>,
    world: RefCell<World>,
    now: Cell<u64>,
}

impl Region {
    fn tick(&self) {
        self.now.set(self.now.get() + 1);
        self.world.borrow_mut().tick(&self.bytes, self.now.get());
    }
}

impl AsRef<[u8]> for Region {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl AsMut<[u8]> for Region {
    fn as_mut(&mut self) -> &mut [u8] {
        self.tick();
        &mut self.bytes
    }
}

/// What a key was between two ticks: made not before `from`, unmade not after `to`.
struct Span {
    what: Option<(u64, Vec<u8>)>,
    expires: u64,
    from: u64,
    to: u64,
}

impl Span {
    /// Whether it can have been current at an instant from `from` to `to`.
    fn can_be(&self, from: u64, to: u64) -> bool {
        let end = match self.expires {
            NEVER => self.to,
            expires => self.to.min(expires),
        };
        self.from <= to && from <= end
    }

    fn can_be_absent(&self, from: u64, to: u64) -> bool {
        match (&self.what, self.expires) {
            (None, _) => self.can_be(from, to),
            (Some(_), NEVER) => false,
            (Some(_), expires) => expires <= to && from <= self.to,
        }
    }
}

struct Checker {
    history: BTreeMap<u64, Vec<Span>>,
    /// Highest version that a lookup has returned that ended by then.
    returned: BTreeMap<u64, Vec<(u64, u64)>>,
    hits: u64,
    misses: u64,
}

impl Checker {
    fn changed(
        &mut self,
        key: u64,
        what: Option<(u64, Vec<u8>)>,
        expires: u64,
        from: u64,
        to: u64,
    ) {
        let spans = self.history.entry(key).or_default();
        if let Some(last) = spans.last_mut() {
            last.to = to;
        }
        spans.push(Span {
            what,
            expires,
            from,
            to: u64::MAX,
        });
    }

    /// Errors: what a reader concluded cannot have been so.
    fn check(&mut self, seen: &Seen) -> Result<(), String> {
        let spans = &self.history[&seen.key];
        let Some(found) = &seen.found else {
            self.misses += 1;
            let absent = spans
                .iter()
                .any(|span| span.can_be_absent(seen.from, seen.to));
            return absent
                .then_some(())
                .ok_or(format!("never absent: {seen:?}"));
        };
        self.hits += 1;
        let current = spans
            .iter()
            .any(|span| span.what.as_ref() == Some(found) && span.can_be(seen.from, seen.to));
        if !current {
            return Err(format!("not current: {seen:?}"));
        }
        let returned = self.returned.entry(seen.key).or_default();
        let newer = returned
            .iter()
            .any(|(ended, version)| *ended < seen.from && *version > found.0);
        if newer {
            return Err(format!("older than what was read before: {seen:?}"));
        }
        returned.push((seen.to, found.0));
        Ok(())
    }

    /// Forgets what no lookup can refer to any more.
    fn forget_before(&mut self, tick: u64) {
        for spans in self.history.values_mut() {
            spans.retain(|span| span.to >= tick);
        }
        for returned in self.returned.values_mut() {
            let newest = returned.iter().map(|seen| seen.1).max().unwrap_or(0);
            returned.retain(|(ended, version)| *ended >= tick || *version == newest);
        }
    }
}

/// What happened in some histories.
#[derive(Debug, Default)]
struct Tally {
    steps: u64,
    hits: u64,
    cached_hits: u64,
    misses: u64,
    doubts: u64,
    late: u64,
    cleaned: u64,
    expired: u64,
    overflow_buckets: u64,
}

impl Tally {
    fn add(&mut self, other: &Self) {
        for (sum, n) in [
            (&mut self.steps, other.steps),
            (&mut self.hits, other.hits),
            (&mut self.cached_hits, other.cached_hits),
            (&mut self.misses, other.misses),
            (&mut self.doubts, other.doubts),
            (&mut self.late, other.late),
            (&mut self.cleaned, other.cleaned),
            (&mut self.expired, other.expired),
            (&mut self.overflow_buckets, other.overflow_buckets),
        ] {
            *sum += n;
        }
    }

    /// Everything that can go wrong had a chance to.
    fn assert_enough(&self) {
        let steps = self.steps;
        assert!(self.hits > steps / 20, "{self:?}");
        assert!(self.misses > steps / 100, "{self:?}");
        assert!(self.cached_hits > steps / 50, "{self:?}");
        assert!(self.doubts > steps / 200, "{self:?}");
        assert!(self.cleaned > steps / 400, "{self:?}");
    }
}

/// Runs a history. Errors: what the checker rejected first.
fn run(seed: u64, steps: u64, ignore_state: bool, buckets_chain: bool) -> Result<Tally, String> {
    let mut random = Random(seed | 1);
    let world = World {
        view: None,
        random: Random(random.next() | 1),
        readers: Vec::new(),
        seen: Vec::new(),
        cache: BTreeMap::new(),
        doubts: 0,
        late: 0,
        cached_hits: 0,
        ignore_state,
        idle: false,
    };
    let region = Region {
        bytes: vec![0; 256 << 10],
        world: RefCell::new(world),
        now: Cell::new(1),
    };
    let config = Config {
        seed: random.next(),
        segment_bytes: Some(4 << 10),
        quarantine_ns: QUARANTINE,
        clean_for_write: None,
        incarnation: 9,
    };
    let mut store = Store::new(region, config).unwrap();
    let view = View::parse(&store.region().bytes[..SUPERBLOCK_BYTES]).unwrap();
    assert_eq!((view.incarnation(), view.quarantine_ns()), (9, QUARANTINE));
    store.region().world.borrow_mut().view = Some(view);
    let mut checker = Checker {
        history: BTreeMap::new(),
        returned: BTreeMap::new(),
        hits: 0,
        misses: 0,
    };
    for key in 0..KEYS {
        checker.changed(key, None, NEVER, 0, 0);
    }
    // Keys that nobody reads fill buckets, so that chains grow and shrink.
    let fillers = if buckets_chain { 3500 } else { 40 };
    let mut longest = 0;
    for step in 0..steps {
        let from = store.region().now.get();
        let key = random.below(KEYS);
        let bytes = key.to_le_bytes();
        match random.below(12) {
            0..=4 => {
                let len = if random.below(9) == 0 {
                    300
                } else {
                    random.below(60)
                };
                let value: Vec<u8> = (0..len).map(|n| (step * 7 + n) as u8).collect();
                let expires = match random.below(4) {
                    0 => from + 1 + random.below(30_000),
                    _ => NEVER,
                };
                let write = Write {
                    expires,
                    ..Write::new(DEFAULT_TABLE, &bytes, &value)
                };
                match store.write(&write, from) {
                    Ok(version) => {
                        let to = store.region().now.get();
                        checker.changed(key, Some((version, value)), expires, from, to);
                    }
                    Err(StoreError::Busy | StoreError::Full { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
            5 | 6 => match store.remove(DEFAULT_TABLE, &bytes, &RejectRules::NONE, None, from) {
                Ok(Some(_)) => {
                    let to = store.region().now.get();
                    checker.changed(key, None, NEVER, from, to);
                }
                Ok(None) | Err(StoreError::Busy) => {}
                Err(error) => panic!("{error}"),
            },
            7..=9 => {
                let filler = (1000 + random.below(fillers)).to_le_bytes();
                if random.below(3) == 0 {
                    let _ = store.remove(DEFAULT_TABLE, &filler, &RejectRules::NONE, None, from);
                } else {
                    let _ = store.put(DEFAULT_TABLE, &filler, &[step as u8; 4], from);
                }
            }
            _ => {
                let _ = store.clean(512, from);
            }
        }
        longest = longest.max(store.region().now.get() - from);
        for _ in 0..random.below(16) {
            store.region().tick();
        }
        let seen = std::mem::take(&mut store.region().world.borrow_mut().seen);
        for seen in seen {
            checker.check(&seen)?;
        }
        if step % 256 == 0 {
            store.audit().unwrap();
            checker.forget_before(from.saturating_sub(2 * QUARANTINE));
        }
    }
    // The engine is told the time once a call; the quarantine's margin is for that.
    assert!(longest < QUARANTINE / 16, "a call of {longest} ticks");
    let world = store.region().world.borrow();
    let stats = store.stats();
    Ok(Tally {
        steps,
        hits: checker.hits,
        cached_hits: world.cached_hits,
        misses: checker.misses,
        doubts: world.doubts,
        late: world.late,
        cleaned: stats.cleaner.segments_cleaned,
        expired: stats.cleaner.objects_expired,
        overflow_buckets: stats.overflow_buckets as u64,
    })
}

#[test]
fn fresh_seeds_give_readers_that_return_only_what_was_current_during_their_read() {
    let (mut all, mut runs, mut chains, mut chained) = (Tally::default(), 0, 0, 0);
    for seed in seeds(6) {
        // Every second one; by the seed, so that it can be run again.
        let buckets_chain = seed & 2 == 0;
        let tally = run(seed, 20_000, false, buckets_chain)
            .unwrap_or_else(|error| panic!("HYV_STORE_SEED={seed}: {error}"));
        println!("{tally:?}");
        runs += 1;
        chains += u32::from(buckets_chain);
        chained += u32::from(tally.overflow_buckets > 0);
        all.add(&tally);
    }
    // What a few seeds show, one of them need not.
    if runs >= 3 {
        all.assert_enough();
        assert!(all.late > 0, "{all:?}");
    }
    assert!(chained > 0 || chains < 2, "no chain in {chains} runs");
}

#[test]
fn a_reader_that_ignores_state_words_is_caught() {
    let caught = (1..6).any(|seed| run(seed * 77, 20_000, true, false).is_err());
    assert!(caught);
}

#[test]
fn what_cannot_be_a_store_or_a_place_in_one_is_refused() {
    assert!(View::parse(&[0; SUPERBLOCK_BYTES]).is_err());
    let store = Store::new(
        vec![0; 64 << 10],
        Config {
            segment_bytes: Some(4 << 10),
            ..Config::default()
        },
    )
    .unwrap();
    let view = View::parse(store.region()).unwrap();
    let layout = store.layout();
    let end = (layout.log + layout.segments * layout.segment_bytes()) as u64;
    assert_eq!(view.entry_range(0, 100), None);
    assert_eq!(view.entry_range(layout.log as u64 + 4, 100), None);
    assert_eq!(view.entry_range(end, 100), None);
    assert_eq!(view.entry_range(end - 16, 100), None);
    assert_eq!(view.entry_range(end - 64, 100), Some(end - 64..end));
    assert_eq!(view.overflow_range(64), None);
    assert_eq!(view.overflow_range(end + 64), None);
    assert_eq!(
        candidates(&[0; 64], 5).map(|found| found.offsets().len()),
        Some(0)
    );
    // A link of the free list, and a chain bit where none can be.
    let mut bucket = [0; 64];
    bucket[..8].copy_from_slice(&0x4000u64.to_le_bytes());
    assert_eq!(candidates(&bucket, 5), None);
    bucket[..8].copy_from_slice(&(1u64 << 47 | 0x4000).to_le_bytes());
    assert_eq!(candidates(&bucket, 5), None);
    for len in 0..64 {
        assert_eq!(
            verify_entry(&vec![255; len], 0, b"k", None, || 0),
            Verdict::Doubt
        );
    }
}
