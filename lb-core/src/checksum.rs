//! Incremental Internet checksums (RFC 1624).
//!
//! A flow's addresses and ports change the same way in each of its packets, so the difference is summed
//! once, when the flow is made, and each packet adds one number. The reply direction's is its complement.

/// Folds a sum of 16-bit words to 16 bits with end-around carry.
#[inline(always)]
pub const fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// The checksum after the words it covers changed by `delta` (RFC 1624, equation 3: `~(~HC + delta)`).
#[inline(always)]
pub const fn update(checksum: u16, delta: u16) -> u16 {
    let sum = !checksum as u32 + delta as u32;
    !((sum & 0xffff) + (sum >> 16)) as u16
}

/// Sum of an address's words.
#[inline(always)]
pub(crate) fn sum<const W: usize>(words: &[u32; W]) -> u64 {
    let mut sum = 0;
    let mut i = 0;
    while i < W {
        sum += words[i] as u64;
        i += 1;
    }
    sum
}

/// Sum of the complements of an address's words: what taking it out of a checksum adds.
#[inline(always)]
pub(crate) fn sum_complement<const W: usize>(words: &[u32; W]) -> u64 {
    let mut sum = 0;
    let mut i = 0;
    while i < W {
        sum += !words[i] as u64;
        i += 1;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full(words: &[u16]) -> u16 {
        !fold(words.iter().map(|&word| word as u64).sum())
    }

    #[test]
    fn an_update_equals_a_full_sum() {
        let mut words = [0x4500, 0x0054, 0x0001, 0x4000, 0x4006, 0x0a01, 0x0203, 0xc0a8, 0xffff];
        for (i, new) in [(5, 0xac10), (6, 0x0000), (8, 0x0001), (7, 0xffff)] {
            let before = full(&words);
            let delta = fold(!words[i] as u64 + new as u64);
            words[i] = new;
            assert_eq!(update(before, delta), full(&words), "word {i} to {new:#x}");
        }
    }
}
