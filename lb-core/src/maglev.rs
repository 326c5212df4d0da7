//! Maglev consistent hashing (Eisenbud et al., NSDI 2016, section 3.4), with weights.

/// Sizes that a ring may have: primes. A hundred places for each backend keep shares within about one in a hundred
/// (section 5.3 of the paper); beyond the largest, shares are coarser.
pub const RING_SIZES: [u32; 6] = [251, 1021, 4093, 16_381, 65_521, 131_071];

/// The size of a ring for so many backends.
pub const fn ring_size(backends: usize) -> u32 {
    let mut i = 0;
    while i < RING_SIZES.len() - 1 && (RING_SIZES[i] as usize) < backends.saturating_mul(100) {
        i += 1;
    }
    RING_SIZES[i]
}

/// The place of a flow in a ring of so many places.
#[inline(always)]
pub const fn place(hash: u64, places: u32) -> u32 {
    (((hash >> 32) * places as u64) >> 32) as u32
}

/// A place of a ring without a backend.
pub const NO_BACKEND: u32 = u32::MAX;

/// A backend as a candidate for places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Hash of the backend's name: its places depend on nothing else, on every load balancer alike.
    pub identity: u64,
    /// What the places will say.
    pub number: u32,
    /// Share beside the others; 0 takes no place.
    pub weight: u32,
}

/// Where a candidate is in its permutation of the places.
#[derive(Clone, Copy, Debug, Default)]
pub struct Turn {
    next: u32,
    skip: u32,
    credit: u64,
}

/// A 64-bit hash of a backend's name (FNV-1a, mixed).
pub fn identity(name: &str) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in name.bytes() {
        hash = (hash ^ byte as u64).wrapping_mul(0x0100_0000_01b3);
    }
    hash ^= hash >> 32;
    hash = hash.wrapping_mul(0xd6e8_feb8_6659_fd93);
    hash ^ hash >> 32
}

/// Fills a ring. Candidates should come in the same order everywhere, for example by name.
///
/// `turns` is scratch space of the candidates' length; the length of `ring` is one of [`RING_SIZES`] (any prime will do).
///
/// # Panics
/// If `turns` is shorter than `candidates`.
pub fn populate(ring: &mut [u32], candidates: &[Candidate], turns: &mut [Turn]) {
    ring.fill(NO_BACKEND);
    let places = ring.len() as u32;
    let heaviest = candidates.iter().map(|candidate| candidate.weight).max().unwrap_or(0) as u64;
    if heaviest == 0 || places < 2 {
        return;
    }
    for (turn, candidate) in turns.iter_mut().zip(candidates) {
        *turn = Turn {
            next: (candidate.identity >> 32) as u32 % places,
            skip: candidate.identity as u32 % (places - 1) + 1,
            credit: 0,
        };
    }
    let mut free = places;
    loop {
        for (turn, candidate) in turns[..candidates.len()].iter_mut().zip(candidates) {
            // The heaviest takes a place each round, the others as often as their weight says.
            turn.credit += candidate.weight as u64;
            if turn.credit < heaviest {
                continue;
            }
            turn.credit -= heaviest;
            while ring[turn.next as usize] != NO_BACKEND {
                turn.next = (turn.next + turn.skip) % places;
            }
            ring[turn.next as usize] = candidate.number;
            free -= 1;
            if free == 0 {
                return;
            }
        }
    }
}
