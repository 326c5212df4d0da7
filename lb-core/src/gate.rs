//! The gate word: what happens to a backend's packets, and where it runs, in one aligned `u64`.
//!
//! A cutover changes nothing but this word, so a flip is one store whatever the number of flows.
//!
//! ```text
//!  63                              32 31                4   3    2   1   0
//! +----------------------------------+-------------------+----+----+-------+
//! |            generation            |       zero        |new |slot| gate  |
//! +----------------------------------+-------------------+----+----+-------+
//! ```
//!
//! The bit `new` makes [`Gate::HoldNew`] of [`Gate::Forward`]: for packets of flows that are known both are the same two
//! bits, so that the path of nearly every packet asks nothing more.

/// What happens to packets for a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Gate {
    /// Dropped and counted. Zero, so that a record nobody wrote yet lets nothing through.
    Drop = 0,
    /// Sent to the active location.
    Forward = 1,
    /// Kept in the hold queue.
    Hold = 2,
    /// The hold queue is being sent; new packets still queue behind it until it is empty.
    Replay = 3,
    /// Packets that open a connection are kept in the hold queue, all others are sent to the active location: what is
    /// in the middle of its handshake can finish it.
    HoldNew = 0b1001,
}

/// Which of a backend's two prepared locations is the active one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Slot {
    /// The first location.
    A = 0,
    /// The second location.
    B = 1,
}

impl Slot {
    /// The slot that is not this one: where the next location is written before a flip.
    #[inline(always)]
    pub const fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }
}

/// Gate, active location slot and generation of a backend, as one word.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct GateWord(u64);

const GATE_MASK: u64 = 0b11;
const NEW: u64 = 0b1000;
const SLOT_SHIFT: u32 = 2;
const GENERATION_SHIFT: u32 = 32;

impl GateWord {
    /// Puts a word together.
    #[inline(always)]
    pub const fn new(gate: Gate, slot: Slot, generation: u32) -> Self {
        Self(gate as u64 | (slot as u64) << SLOT_SHIFT | (generation as u64) << GENERATION_SHIFT)
    }

    /// The word as it is stored in the backend's record.
    #[inline(always)]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The bits to store in the backend's record.
    #[inline(always)]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// What happens to packets for the backend.
    #[inline(always)]
    pub const fn gate(self) -> Gate {
        match self.gate_of_known() {
            Gate::Forward if self.holds_new() => Gate::HoldNew,
            gate => gate,
        }
    }

    /// Whether packets that open a connection are kept while others pass.
    #[inline(always)]
    pub const fn holds_new(self) -> bool {
        self.0 & NEW != 0
    }

    /// What happens to packets that open no connection; never [`Gate::HoldNew`].
    #[inline(always)]
    pub const fn gate_of_known(self) -> Gate {
        match self.0 & GATE_MASK {
            1 => Gate::Forward,
            2 => Gate::Hold,
            3 => Gate::Replay,
            _ => Gate::Drop,
        }
    }

    /// The active location.
    #[inline(always)]
    pub const fn slot(self) -> Slot {
        if self.0 >> SLOT_SHIFT & 1 == 0 { Slot::A } else { Slot::B }
    }

    /// Grows with each change of the gate or the location.
    #[inline(always)]
    pub const fn generation(self) -> u32 {
        (self.0 >> GENERATION_SHIFT) as u32
    }

    /// The next generation of this word with another gate, at the same location.
    #[inline(always)]
    pub const fn with_gate(self, gate: Gate) -> Self {
        Self::new(gate, self.slot(), self.generation().wrapping_add(1))
    }

    /// The next generation of this word with another gate, at the other location.
    #[inline(always)]
    pub const fn flipped(self, gate: Gate) -> Self {
        Self::new(gate, self.slot().other(), self.generation().wrapping_add(1))
    }
}

impl core::fmt::Debug for GateWord {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{:?}@{:?} generation {}", self.gate(), self.slot(), self.generation())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GATES: [Gate; 5] = [Gate::Drop, Gate::Forward, Gate::Hold, Gate::Replay, Gate::HoldNew];

    #[test]
    fn every_word_comes_apart_as_it_was_put_together() {
        for gate in GATES {
            for slot in [Slot::A, Slot::B] {
                for generation in [0, 1, 7, u32::MAX] {
                    let word = GateWord::from_bits(GateWord::new(gate, slot, generation).bits());
                    assert_eq!((word.gate(), word.slot(), word.generation()), (gate, slot, generation));
                }
            }
        }
    }

    #[test]
    fn known_flows_pass_where_new_ones_are_held() {
        let word = GateWord::new(Gate::HoldNew, Slot::B, 3);
        assert_eq!((word.gate_of_known(), word.holds_new()), (Gate::Forward, true));
        let closed = word.with_gate(Gate::Hold);
        assert_eq!(
            (closed.gate(), closed.gate_of_known(), closed.holds_new()),
            (Gate::Hold, Gate::Hold, false)
        );
    }

    #[test]
    fn a_flip_changes_the_slot_and_every_change_the_generation() {
        let word = GateWord::new(Gate::Hold, Slot::A, 8);
        assert_eq!(word.flipped(Gate::Replay), GateWord::new(Gate::Replay, Slot::B, 9));
        assert_eq!(word.with_gate(Gate::Replay), GateWord::new(Gate::Replay, Slot::A, 9));
    }

    #[test]
    fn a_record_of_zeroes_forwards_nothing() {
        assert_eq!(GateWord::from_bits(0).gate(), Gate::Drop);
    }
}
