//! What has to be known of migrations by a daemon that comes after this one, and what it may like to know.
//!
//! Each migration is written down before anything is done for it; so is what the gate does not show and the agents
//! may not be able to tell ([`Decision`]), before it is said. At its end its report is added, and the oldest ones are
//! forgotten.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use migrate::coordinator::Decision;
use redb::{Database, ReadableDatabase as _, ReadableTable as _, TableDefinition};
use serde::{Deserialize, Serialize};

use super::migration::ReportView;

/// Entries by id, as JSON.
const MIGRATIONS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("migrations");

/// Why the journal cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("the journal {} cannot be {doing} (config: migrations.journal)", .file.display())]
pub struct JournalError {
    file: PathBuf,
    doing: &'static str,
    source: Box<dyn std::error::Error + Send + Sync>,
}

/// What is written of a migration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Its id.
    pub id: String,
    /// The backend that moves.
    pub backend: String,
    /// From this site.
    pub from: String,
    /// To this one.
    pub to: String,
    /// When it began, microseconds since the Unix epoch.
    pub started_at_unix_us: u64,
    /// How far it came.
    pub step: Step,
    /// What it came to.
    pub report: Option<ReportView>,
}

/// How far a migration has come, beside what the gate says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// It may have begun.
    Begun,
    /// The target may know that it is the one.
    Confirming,
    /// An operator said that the source's copy counts.
    Returning,
    /// It is over.
    Ended,
}

impl From<Decision> for Step {
    fn from(decision: Decision) -> Self {
        match decision {
            Decision::Confirm => Self::Confirming,
            Decision::Return => Self::Returning,
        }
    }
}

/// The journal. Its file is made when the first migration begins.
pub struct Journal {
    file: PathBuf,
    database: Mutex<Option<Database>>,
}

impl Journal {
    /// The journal at a path; nothing is opened yet.
    pub fn at(file: &Path) -> Self {
        Self { file: file.to_owned(), database: Mutex::default() }
    }

    /// Opens the file, or makes it and its folder; so it is known early whether that can be done.
    pub fn open(&self) -> Result<(), JournalError> {
        self.with("opened", |_| Ok(()))
    }

    /// All entries, the oldest first.
    pub fn entries(&self) -> Result<Vec<Entry>, JournalError> {
        if !self.file.exists() {
            return Ok(Vec::new());
        }
        self.with("read", |database| {
            let table = match database.begin_read()?.open_table(MIGRATIONS) {
                Ok(table) => table,
                Err(redb::TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
                Err(error) => return Err(error.into()),
            };
            table.iter()?.map(|entry| parse(entry?.1.value())).collect()
        })
    }

    /// Writes a migration down before anything is done for it.
    pub fn begin(&self, entry: &Entry) -> Result<(), JournalError> {
        self.write(|table| put(table, entry))
    }

    /// Writes down how far a migration comes, before it does.
    pub fn reach(&self, id: &str, step: Step) -> Result<(), JournalError> {
        self.write(|table| {
            let entry = table.get(id)?.map(|entry| parse(entry.value())).transpose()?;
            let mut entry = entry.ok_or_else(|| format!("it has no migration {id:?}"))?;
            entry.step = step;
            put(table, &entry)
        })
    }

    /// Writes down how a migration ended, and forgets the oldest that ended before the last `remembered`.
    pub fn end(&self, entry: &Entry, remembered: usize) -> Result<(), JournalError> {
        self.write(|table| {
            put(table, entry)?;
            let mut ended = Vec::new();
            for found in table.iter()? {
                let (id, entry) = found?;
                if parse(entry.value())?.step == Step::Ended {
                    ended.push(id.value().to_owned());
                }
            }
            let excess = ended.len().saturating_sub(remembered);
            for id in &ended[..excess] {
                table.remove(id.as_str())?;
            }
            Ok(())
        })
    }

    fn write(&self, change: impl FnOnce(&mut Table<'_>) -> Result<(), Trouble>) -> Result<(), JournalError> {
        self.with("written", |database| {
            let transaction = database.begin_write()?;
            change(&mut transaction.open_table(MIGRATIONS)?)?;
            // On the disk when this returns.
            Ok(transaction.commit()?)
        })
    }

    fn with<T>(
        &self,
        doing: &'static str,
        work: impl FnOnce(&Database) -> Result<T, Trouble>,
    ) -> Result<T, JournalError> {
        let failed = |source| JournalError { file: self.file.clone(), doing, source };
        let mut database: MutexGuard<'_, _> = self.database.lock().unwrap_or_else(PoisonError::into_inner);
        if database.is_none() {
            *database = Some(create(&self.file).map_err(failed)?);
        }
        work(database.as_ref().expect("it was opened above")).map_err(failed)
    }
}

type Trouble = Box<dyn std::error::Error + Send + Sync>;
type Table<'t> = redb::Table<'t, &'static str, &'static [u8]>;

fn create(file: &Path) -> Result<Database, Trouble> {
    if let Some(folder) = file.parent() {
        std::fs::create_dir_all(folder)
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", folder.display())))?;
    }
    Ok(Database::create(file)?)
}

fn put(table: &mut Table<'_>, entry: &Entry) -> Result<(), Trouble> {
    table.insert(entry.id.as_str(), serde_json::to_vec(entry)?.as_slice())?;
    Ok(())
}

fn parse(entry: &[u8]) -> Result<Entry, Trouble> {
    serde_json::from_slice(entry).map_err(|error| format!("an entry is not this version's: {error}").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(id: &str, step: Step) -> Entry {
        let (backend, from, to) = ("chat-1".to_owned(), "ams".to_owned(), "fra".to_owned());
        Entry { id: id.to_owned(), backend, from, to, started_at_unix_us: 7, step, report: None }
    }

    #[test]
    fn what_was_written_is_there_for_the_next_daemon() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("new/journal.redb");
        assert!(Journal::at(&file).entries().unwrap().is_empty());
        assert!(!file.exists(), "reading makes no file");
        let journal = Journal::at(&file);
        journal.begin(&entry("m-1", Step::Begun)).unwrap();
        journal.begin(&entry("m-2", Step::Begun)).unwrap();
        journal.reach("m-2", Step::Confirming).unwrap();
        drop(journal);
        let found = Journal::at(&file).entries().unwrap();
        assert_eq!(found, [entry("m-1", Step::Begun), entry("m-2", Step::Confirming)]);
    }

    #[test]
    fn only_the_oldest_that_ended_are_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::at(&folder.path().join("journal.redb"));
        journal.begin(&entry("m-0", Step::Confirming)).unwrap();
        for id in ["m-1", "m-2", "m-3"] {
            journal.begin(&entry(id, Step::Begun)).unwrap();
            journal.end(&entry(id, Step::Ended), 2).unwrap();
        }
        let ids: Vec<String> = journal.entries().unwrap().into_iter().map(|entry| entry.id).collect();
        assert_eq!(ids, ["m-0", "m-2", "m-3"]);
    }

    #[test]
    fn errors_name_the_file_and_the_key() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("journal.redb");
        std::fs::write(&file, "something else").unwrap();
        let error = Journal::at(&file).open().unwrap_err().to_string();
        assert!(error.contains("journal.redb") && error.contains("migrations.journal"), "{error}");
        let journal = Journal::at(&folder.path().join("other.redb"));
        assert!(journal.reach("m-1", Step::Confirming).is_err(), "what never began reaches nothing");
        // Two daemons do not share one.
        journal.open().unwrap();
        assert!(Journal::at(&folder.path().join("other.redb")).open().is_err());
    }
}
