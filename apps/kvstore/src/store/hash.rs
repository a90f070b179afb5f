//! The key hash: a seeded 64-bit multiply-and-fold hash.
//!
//! Each step multiplies two 64-bit words to 128 bits and folds the halves together, so every input bit reaches every
//! output bit in two steps. Both factors depend on the seed, which is chosen per store: who does not know it can neither
//! make a factor zero nor make keys collide on purpose.

/// First 64-bit words of the fraction of pi, made odd: any constants with balanced bits will do.
const K: [u64; 4] = [
    0x243f_6a88_85a3_08d3,
    0x1319_8a2e_0370_7345,
    0xa409_3822_299f_31d1,
    0x082e_fa98_ec4e_6c89,
];

#[inline(always)]
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    (product as u64) ^ ((product >> 64) as u64)
}

/// Takes 16 bytes of key into `state`.
#[inline(always)]
fn absorb(state: u64, a: u64, b: u64, constant: u64) -> u64 {
    fold(a ^ state, b ^ state.rotate_left(32) ^ constant)
}

#[inline(always)]
fn word(bytes: &[u8], at: usize) -> u64 {
    super::mem::load_u64(bytes, at)
}

#[inline(always)]
fn half(bytes: &[u8], at: usize) -> u64 {
    u64::from(super::mem::load_u32(bytes, at))
}

/// The seed of `table`'s keys in a store with `seed`: equal keys of different tables have nothing in common. That of the default
/// table (0) is the store's.
#[must_use]
#[inline(always)]
pub const fn table_seed(seed: u64, table: u32) -> u64 {
    seed ^ (table as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// The 64-bit hash of `key` under `seed`.
#[must_use]
#[inline]
pub fn hash64(seed: u64, key: &[u8]) -> u64 {
    let length = key.len();
    let seed = seed ^ fold(seed ^ K[0], K[1] ^ length as u64);
    let (state, a, b) = match length {
        // Overlapping reads cover every byte of 4 to 16 without a loop.
        8..=16 => (seed, word(key, 0), word(key, length - 8)),
        4..8 => (seed, half(key, 0), half(key, length - 4)),
        1..4 => {
            let packed = u64::from(key[0]) << 16
                | u64::from(key[length / 2]) << 8
                | u64::from(key[length - 1]);
            (seed, packed, 0)
        }
        0 => (seed, 0, 0),
        _ => long(seed, key),
    };
    let mixed = absorb(state, a, b, K[2]);
    fold(mixed ^ K[0] ^ length as u64, state ^ K[3])
}

/// Everything but the last 16 bytes, then those as two words (which may overlap what was read before).
#[inline]
fn long(seed: u64, key: &[u8]) -> (u64, u64, u64) {
    let mut state = seed;
    let mut rest = key;
    if rest.len() > 48 {
        let mut lanes = [seed, seed ^ K[2], seed ^ K[3]];
        while rest.len() > 48 {
            lanes[0] = absorb(lanes[0], word(rest, 0), word(rest, 8), K[0]);
            lanes[1] = absorb(lanes[1], word(rest, 16), word(rest, 24), K[1]);
            lanes[2] = absorb(lanes[2], word(rest, 32), word(rest, 40), K[2]);
            rest = &rest[48..];
        }
        state = lanes[0] ^ lanes[1].rotate_left(23) ^ lanes[2].rotate_left(41);
    }
    while rest.len() > 16 {
        state = absorb(state, word(rest, 0), word(rest, 8), K[1]);
        rest = &rest[16..];
    }
    (state, word(key, key.len() - 16), word(key, key.len() - 8))
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::BTreeSet;
    use alloc::vec;
    use alloc::vec::Vec;

    #[test]
    fn every_byte_of_every_length_matters() {
        for length in 1..200 {
            let key: Vec<u8> = (0..length).map(|n| n as u8).collect();
            let base = hash64(7, &key);
            for position in 0..length {
                for bit in 0..8 {
                    let mut other = key.clone();
                    other[position] ^= 1 << bit;
                    assert_ne!(hash64(7, &other), base, "length {length}, byte {position}");
                }
            }
        }
    }

    #[test]
    fn one_flipped_bit_changes_half_of_the_output() {
        for length in [1, 3, 4, 8, 11, 16, 17, 30, 48, 49, 100, 1000] {
            let key = vec![0x5a; length];
            let (mut changed, mut trials) = (0, 0);
            for seed in 0..32 {
                let base = hash64(seed, &key);
                for position in 0..length {
                    for bit in 0..8 {
                        let mut other = key.clone();
                        other[position] ^= 1 << bit;
                        changed += (hash64(seed, &other) ^ base).count_ones();
                        trials += 1;
                    }
                }
            }
            let mean = f64::from(changed) / f64::from(trials);
            assert!((31.0..33.0).contains(&mean), "length {length}: {mean} bits");
        }
    }

    #[test]
    fn counters_as_keys_fill_buckets_evenly_and_never_collide() {
        let (mut buckets, mut tags) = (vec![0u32; 1024], vec![0u32; 1024]);
        let mut seen = BTreeSet::new();
        for n in 0..102_400u64 {
            let hash = hash64(3, &n.to_le_bytes());
            assert!(seen.insert(hash));
            buckets[(hash >> 54) as usize] += 1;
            tags[(hash & 1023) as usize] += 1;
        }
        for counts in [buckets, tags] {
            // Mean 100, standard deviation 10: five of them either way.
            assert!(counts.iter().all(|count| (50..=150).contains(count)));
        }
    }

    #[test]
    fn the_seed_matters_and_zeros_of_different_length_differ() {
        let zeros = [0; 100];
        let hashes: BTreeSet<u64> = (0..=100).map(|n| hash64(0, &zeros[..n])).collect();
        assert_eq!(hashes.len(), 101);
        assert_ne!(hash64(0, b"key"), hash64(1, b"key"));
    }
}
