//! What is measured: a server's memory, its connections, how much of its memory it rewrites, and the link between the
//! sites.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// One case, for every system alike.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Case {
    /// Memory that the server has filled, in 2^20 bytes.
    pub resident_mb: u32,
    /// Connections to it.
    pub connections: u32,
    /// Share of its pages that it rewrites each second, in percent.
    pub dirty_pct: f64,
    /// One-way delay between the sites.
    pub delay_ms: u32,
    /// The link's rate between the sites; none: whatever the machine carries.
    pub rate_mbit: Option<u32>,
}

/// A small, idle server on a short, fast link: what a filter leaves out is as it is here.
pub const SMALL: Case =
    Case { resident_mb: 10, connections: 1, dirty_pct: 0.0, delay_ms: 0, rate_mbit: None };

/// All that a figure is wanted for, by axis.
const SIZES_MB: [u32; 3] = [10, 100, 1000];
const CONNECTIONS: [u32; 3] = [1, 1000, 5000];
const DIRTY_PCT: [f64; 3] = [0.0, 5.0, 20.0];
const DELAYS_MS: [u32; 2] = [0, 40];
const RATES_MBIT: [Option<u32>; 3] = [None, Some(1000), Some(100)];

impl Case {
    /// What is measured unless told otherwise: each axis by itself, and what of it takes minutes left out.
    pub fn default_set() -> Vec<Case> {
        let sized = |resident_mb| Case { resident_mb, ..SMALL };
        let mut cases = SIZES_MB.map(sized).to_vec();
        cases.extend([1000, 5000].map(|connections| Case { connections, ..SMALL }));
        for resident_mb in [100, 1000] {
            cases.extend([5.0, 20.0].map(|dirty_pct| Case { dirty_pct, ..sized(resident_mb) }));
        }
        cases.extend([10, 100].map(|resident_mb| Case { delay_ms: 40, ..sized(resident_mb) }));
        cases.push(Case { rate_mbit: Some(1000), ..sized(100) });
        cases.push(Case { rate_mbit: Some(100), ..SMALL });
        cases.push(Case { rate_mbit: Some(100), delay_ms: 40, ..SMALL });
        cases
    }

    /// As little as shows that everything works.
    pub fn quick_set() -> Vec<Case> {
        vec![SMALL, Case { connections: 50, dirty_pct: 20.0, delay_ms: 2, rate_mbit: Some(1000), ..SMALL }]
    }

    /// In few words: what is not as in [`SMALL`], after the size.
    pub fn label(&self) -> String {
        let mut words = vec![format!("{} MB", self.resident_mb)];
        if self.connections != 1 {
            words.push(format!("{} connections", self.connections));
        }
        if self.dirty_pct > 0.0 {
            words.push(format!("{} %/s", self.dirty_pct));
        }
        if self.delay_ms > 0 {
            words.push(format!("{} ms", self.delay_ms));
        }
        words.extend(self.rate_mbit.map(|rate| format!("{rate} Mb/s")));
        words.join(", ")
    }

    /// Whether only its size tells it from [`SMALL`].
    pub fn is_idle_and_near(&self) -> bool {
        Case { resident_mb: SMALL.resident_mb, ..*self } == SMALL
    }
}

/// A wish for cases: `size=100,dirty=5/20`. What is left out is as in [`SMALL`]; `*` is every value that a figure is
/// wanted for.
#[derive(Clone, Debug, PartialEq)]
pub struct Wish {
    /// Names of systems; empty: all.
    pub systems: Vec<String>,
    /// The cases.
    pub cases: Vec<Case>,
}

impl FromStr for Wish {
    type Err = String;

    fn from_str(text: &str) -> Result<Wish, String> {
        let mut wish = Wish { systems: Vec::new(), cases: vec![SMALL] };
        for part in text.split(',') {
            let (axis, values) =
                part.split_once('=').ok_or(format!("expected AXIS=VALUE, found {part:?}"))?;
            match axis {
                "system" => wish.systems.extend(values.split('/').map(str::to_owned)),
                "size" => {
                    let sizes = numbers(values, &SIZES_MB, 1..=65_536)?;
                    wish.vary(&sizes, |case, resident_mb| Case { resident_mb, ..case });
                }
                "connections" => {
                    let counts = numbers(values, &CONNECTIONS, 1..=9_000)?;
                    wish.vary(&counts, |case, connections| Case { connections, ..case });
                }
                "dirty" => {
                    let shares = shares(values)?;
                    wish.vary(&shares, |case, dirty_pct| Case { dirty_pct, ..case });
                }
                "delay" => {
                    let delays = numbers(values, &DELAYS_MS, 0..=1_000)?;
                    wish.vary(&delays, |case, delay_ms| Case { delay_ms, ..case });
                }
                "rate" => {
                    let rates = rates(values)?;
                    wish.vary(&rates, |case, rate_mbit| Case { rate_mbit, ..case });
                }
                _ => {
                    return Err(format!(
                        "there is no axis {axis:?}: expected system, size, connections, dirty, delay or rate"
                    ));
                }
            }
        }
        Ok(wish)
    }
}

impl Wish {
    fn vary<T: Copy>(&mut self, values: &[T], with: impl Fn(Case, T) -> Case) {
        let varied = values.iter().flat_map(|value| self.cases.iter().map(|case| with(*case, *value)));
        self.cases = varied.collect();
    }
}

fn numbers(text: &str, all: &[u32], bounds: std::ops::RangeInclusive<u32>) -> Result<Vec<u32>, String> {
    if text == "*" {
        return Ok(all.to_vec());
    }
    let number = |word: &str| word.parse().ok().filter(|number| bounds.contains(number));
    let refused =
        |word| format!("{word:?} is no whole number from {} to {}, nor \"*\"", bounds.start(), bounds.end());
    text.split('/').map(|word| number(word).ok_or_else(|| refused(word))).collect()
}

fn shares(text: &str) -> Result<Vec<f64>, String> {
    if text == "*" {
        return Ok(DIRTY_PCT.to_vec());
    }
    let share = |word: &str| word.parse().ok().filter(|share| (0.0..=100.0).contains(share));
    let refused = |word| format!("{word:?} is no share in percent from 0 to 100, nor \"*\"");
    text.split('/').map(|word| share(word).ok_or_else(|| refused(word))).collect()
}

fn rates(text: &str) -> Result<Vec<Option<u32>>, String> {
    if text == "*" {
        return Ok(RATES_MBIT.to_vec());
    }
    let rate = |word: &str| match word {
        "unlimited" => Ok(None),
        _ => numbers(word, &[], 1..=100_000)
            .map(|rates| rates.first().copied())
            .map_err(|problem| format!("{problem}, nor \"unlimited\"")),
    };
    text.split('/').map(rate).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_set_has_every_value_of_every_axis() {
        let cases = Case::default_set();
        let has = |is_it: &dyn Fn(&Case) -> bool| cases.iter().any(is_it);
        assert!(
            SIZES_MB.iter().all(|size| has(&|case| case.resident_mb == *size && case.is_idle_and_near()))
        );
        assert!(CONNECTIONS.iter().all(|count| has(&|case| case.connections == *count)));
        assert!(DIRTY_PCT.iter().all(|share| has(&|case| case.dirty_pct == *share)));
        assert!(DELAYS_MS.iter().all(|delay| has(&|case| case.delay_ms == *delay)));
        assert!(RATES_MBIT.iter().all(|rate| has(&|case| case.rate_mbit == *rate)));
        for (index, case) in cases.iter().enumerate() {
            assert!(!cases[..index].contains(case), "{} is measured twice", case.label());
        }
    }

    #[test]
    fn what_a_wish_leaves_out_is_small() {
        let wish: Wish = "size=100,system=drover/runc,dirty=5".parse().unwrap();
        assert_eq!(wish.systems, ["drover", "runc"]);
        assert_eq!(wish.cases, [Case { resident_mb: 100, dirty_pct: 5.0, ..SMALL }]);
    }

    #[test]
    fn alternatives_and_stars_are_combined() {
        let wish: Wish = "size=10/250,rate=*,delay=*".parse().unwrap();
        assert_eq!(wish.cases.len(), 12);
        assert!(wish.cases.contains(&Case { resident_mb: 250, delay_ms: 40, rate_mbit: Some(100), ..SMALL }));
        let wish: Wish = "rate=unlimited/10".parse().unwrap();
        assert_eq!(wish.cases.iter().map(|case| case.rate_mbit).collect::<Vec<_>>(), [None, Some(10)]);
        let all: Wish = "size=*,connections=*,dirty=*,delay=*,rate=*".parse().unwrap();
        assert_eq!(all.cases.len(), 3 * 3 * 3 * 2 * 3);
    }

    #[test]
    fn a_wish_that_makes_no_sense_says_what_would() {
        for (text, word) in [
            ("size", "AXIS=VALUE"),
            ("colour=red", "connections"),
            ("size=0", "1 to 65536"),
            ("connections=many", "9000"),
            ("dirty=101", "0 to 100"),
            ("dirty=NaN", "0 to 100"),
            ("delay=-1", "0 to 1000"),
            ("rate=fast", "unlimited"),
        ] {
            let problem = text.parse::<Wish>().unwrap_err();
            assert!(problem.contains(word), "{text}: {problem}");
        }
    }

    #[test]
    fn a_label_says_what_is_not_small() {
        assert_eq!(SMALL.label(), "10 MB");
        let case =
            Case { resident_mb: 100, connections: 1000, dirty_pct: 5.0, delay_ms: 40, rate_mbit: Some(100) };
        assert_eq!(case.label(), "100 MB, 1000 connections, 5 %/s, 40 ms, 100 Mb/s");
    }
}
