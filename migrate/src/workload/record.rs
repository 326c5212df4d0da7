//! What an agent leaves behind so that the next one finds its workloads: small files in the state folder. A workload's
//! record is there exactly as long as it is to outlive the agent; its mark of having left, from before its images leave
//! until a copy that is here again is confirmed.

use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::holder::HolderPid;
use super::processes::{self, Process};

/// What is written of a workload that may run at another site.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    /// Its memory, where it has not taken all of it along.
    pub debt: Option<Debt>,
}

/// Memory that is still to be fetched. What is here of the workload may not be killed before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Debt {
    /// The migration.
    pub migration: String,
    /// The site that fetches it.
    pub to: String,
}

/// The records of one agent.
#[derive(Clone, Debug)]
pub struct Records {
    folder: PathBuf,
}

impl Records {
    /// In `folder`, which is made if need be.
    pub fn open(folder: PathBuf) -> io::Result<Self> {
        std::fs::create_dir_all(&folder)?;
        Ok(Self { folder })
    }

    /// The holder of a workload, if its record is there and the holder is alive; a stale record is removed.
    pub fn find(&self, workload: &str, is_alive: impl Fn(HolderPid) -> bool) -> Option<HolderPid> {
        let path = self.path(workload);
        let holder = serde_json::from_slice::<HolderPid>(&std::fs::read(&path).ok()?);
        match holder {
            Ok(holder) if is_alive(holder) => Some(holder),
            _ => {
                self.remove(workload);
                None
            }
        }
    }

    /// Writes a record, at once or not at all.
    pub fn write(&self, workload: &str, holder: HolderPid) -> io::Result<()> {
        let path = self.path(workload);
        let new = path.with_extension("new");
        std::fs::write(&new, serde_json::to_vec(&holder)?)?;
        std::fs::rename(new, path)
    }

    /// Whether the workload may run at another site: then it must not be started here because of its configuration.
    pub fn has_left(&self, workload: &str) -> bool {
        self.left_path(workload).exists()
    }

    /// The memory that a workload which has left has not taken along yet.
    pub fn debt(&self, workload: &str) -> Option<Debt> {
        serde_json::from_slice::<Left>(&std::fs::read(self.left_path(workload)).ok()?).ok()?.debt
    }

    /// Marks a workload as one that may run at another site, or takes the mark off (`None`). Not flushed to the disk:
    /// what that takes would be added to a freeze.
    pub fn set_left(&self, workload: &str, left: Option<&Left>) -> io::Result<()> {
        let path = self.left_path(workload);
        match left {
            Some(left) => std::fs::write(path, serde_json::to_vec(left)?),
            None => match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            },
        }
    }

    /// The number of a workload's next offer, greater than all before, whichever agent made them.
    pub fn next_offer(&self, workload: &str, first: u32) -> io::Result<u32> {
        let path = self.folder.join(format!("{workload}.offer"));
        let last = std::fs::read_to_string(&path).ok().and_then(|text| text.parse::<u32>().ok());
        let next = last.map_or(first, |last| last + 1);
        std::fs::write(path, next.to_string())?;
        Ok(next)
    }

    /// Removes a record; one that is not there is removed already.
    pub fn remove(&self, workload: &str) {
        if let Err(error) = std::fs::remove_file(self.path(workload))
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(workload, %error, "a workload's record could not be removed");
        }
    }

    fn left_path(&self, workload: &str) -> PathBuf {
        self.folder.join(format!("{workload}.left"))
    }

    fn path(&self, workload: &str) -> PathBuf {
        self.folder.join(format!("{workload}.json"))
    }
}

/// The root of a holder's workload: of the children of its pid 1 the first that is no helper of ours. (The
/// others are orphans that the workload left.) A container's is the first process of another pid namespace.
pub fn root_of(holder: HolderPid) -> Option<Process> {
    let depth = Process::read(holder.pid)?.depth;
    if processes::is_monitor(holder.pid) {
        let mut tasks = processes::kept_by(holder.pid).into_iter().filter_map(Process::read);
        return tasks.find(|task| task.is_alive() && task.inner_pid == 1 && task.depth == depth + 1);
    }
    let children = processes::children(holder.pid).into_iter().filter_map(Process::read);
    let (inside, below): (Vec<_>, Vec<_>) =
        children.filter(Process::is_alive).partition(|process| process.depth == depth);
    let first = inside.into_iter().filter(|process| process.inner_pid >= FIRST_DUMPED_PID);
    let container = below.into_iter().find(|process| process.inner_pid == 1);
    first.min_by_key(|process| process.inner_pid).or(container)
}

/// CRIU and a container's runtime, where they were stopped together with what they had just restored.
pub fn stopped_helpers(holder: HolderPid) -> Vec<Process> {
    let Some(depth) = Process::read(holder.pid).map(|process| process.depth) else { return Vec::new() };
    let is_monitor = processes::is_monitor(holder.pid);
    let kept = processes::kept_by(holder.pid);
    let inside = processes::around(holder.pid).into_iter().filter(|pid| !kept.contains(pid));
    let is_one = |process: &Process| {
        process.depth == depth && process.state == 'T' && (is_monitor || process.inner_pid < FIRST_DUMPED_PID)
    };
    inside.filter_map(Process::read).filter(is_one).collect()
}

/// CRIU and its helpers have the low pids of a fresh namespace.
const FIRST_DUMPED_PID: i32 = super::holder::FIRST_WORKLOAD_PID as i32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_a_holder_that_is_gone_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let records = Records::open(folder.path().join("workloads")).unwrap();
        let pid = i32::try_from(std::process::id()).unwrap();
        let alive = HolderPid { pid, start_ticks: processes::start_ticks(pid).unwrap() };
        records.write("chat-1", alive).unwrap();
        assert_eq!(records.find("chat-1", |holder| holder.is_alive()), Some(alive));
        records.write("chat-1", HolderPid { start_ticks: 1, ..alive }).unwrap();
        assert_eq!(records.find("chat-1", |holder| holder.is_alive()), None);
        assert!(!folder.path().join("workloads/chat-1.json").exists());
        records.remove("chat-1");
    }

    #[test]
    fn an_offers_number_never_comes_again() {
        let folder = tempfile::tempdir().unwrap();
        let next = || Records::open(folder.path().to_owned()).unwrap().next_offer("chat-1", 7).unwrap();
        assert_eq!([next(), next(), next()], [7, 8, 9]);
    }

    #[test]
    fn a_workload_has_left_until_it_is_here_again() {
        let folder = tempfile::tempdir().unwrap();
        let records = Records::open(folder.path().to_owned()).unwrap();
        assert!(!records.has_left("chat-1"));
        let debt = Debt { migration: "m-1".into(), to: "fra".into() };
        records.set_left("chat-1", Some(&Left { debt: Some(debt.clone()) })).unwrap();
        assert_eq!(records.debt("chat-1"), Some(debt));
        records.set_left("chat-1", Some(&Left::default())).unwrap();
        assert_eq!(records.debt("chat-1"), None);
        records.remove("chat-1");
        assert!(Records::open(folder.path().to_owned()).unwrap().has_left("chat-1"));
        assert!(!records.has_left("chat-2"));
        // A copy that is here on a lease may be lost yet.
        records.write("chat-1", HolderPid { pid: 1, start_ticks: 1 }).unwrap();
        assert!(records.has_left("chat-1"));
        records.set_left("chat-1", None).unwrap();
        assert!(!records.has_left("chat-1"));
        records.set_left("chat-1", None).unwrap();
    }
}
