//! How busy the machine was. Of what carries packets in the kernel most runs in soft interrupts, which count for no
//! process or for whichever one they interrupt; so the whole machine is looked at.

use std::time::Duration;

use super::LoadError;

const STAT: &str = "/proc/stat";

/// What all processors together have worked since the machine started, as `/proc/stat` has it (proc_stat(5)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Busy(Duration);

impl Busy {
    /// Until now.
    pub fn now() -> Result<Busy, LoadError> {
        let text = std::fs::read_to_string(STAT).map_err(LoadError::io(format!("read {STAT}")))?;
        let unknown = || std::io::Error::other("its first line is not `cpu` with eight numbers");
        parse(&text, ticks_per_s()).ok_or_else(unknown).map_err(LoadError::io(format!("understand {STAT}")))
    }

    /// Since then, in seconds of one processor.
    pub fn seconds_since(self, earlier: Busy) -> f64 {
        self.0.saturating_sub(earlier.0).as_secs_f64()
    }
}

fn ticks_per_s() -> u64 {
    let found = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK);
    found.ok().flatten().and_then(|ticks| ticks.try_into().ok()).unwrap_or(100)
}

/// User, nice, system, irq and softirq; not idle, not waiting for disks, not taken by other machines of the host.
fn parse(text: &str, ticks_per_s: u64) -> Option<Busy> {
    let mut words = text.lines().next()?.split_ascii_whitespace();
    let fields: Vec<u64> =
        (words.next() == Some("cpu")).then(|| words.map_while(|word| word.parse().ok()).collect())?;
    let [user, nice, system, _idle, _disk, irq, softirq, _stolen, ..] = fields[..] else { return None };
    let ticks = user + nice + system + irq + softirq;
    Some(Busy(Duration::from_nanos(ticks * (1_000_000_000 / ticks_per_s))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_disk_and_stolen_time_is_not_work() {
        let at = |text| parse(text, 100).unwrap();
        let before = at("cpu  100 10 50 1000 7 3 20 5 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n");
        let after = at("cpu  150 10 60 9000 8 4 40 9 0 0\n");
        assert_eq!(after.seconds_since(before), 0.81);
        assert_eq!(parse("cpu0 1 2 3 4 5 6 7 8", 100), None);
        assert_eq!(parse("cpu 1 2 3", 100), None);
    }

    #[test]
    fn this_machine_is_understood() {
        let before = Busy::now().unwrap();
        assert!(Busy::now().unwrap().seconds_since(before) < 1.0);
    }
}
