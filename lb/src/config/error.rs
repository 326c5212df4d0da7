//! What is wrong with a configuration file: every place at once, each with its line and field.

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;
use std::path::PathBuf;

/// Why no configuration came out of a file.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file could not be read.
    #[error("cannot read the configuration file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// The file says something that cannot be meant.
    #[error(transparent)]
    Invalid(#[from] ConfigErrors),
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ConfigError {
    /// Line in the file, from 1.
    pub line: usize,
    /// The field, as a path: `backends[0].site`. Empty where the file is not TOML.
    pub field: String,
    /// What is wrong and what would be right.
    pub message: String,
}

/// Everything that is wrong with one file, in the order of its lines; never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors {
    /// The file's name, as it was given.
    pub file: String,
    /// The errors.
    pub errors: Vec<ConfigError>,
}

impl std::error::Error for ConfigErrors {}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, error) in self.errors.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            write!(f, "{}:{}: ", self.file, error.line)?;
            if !error.field.is_empty() {
                write!(f, "{}: ", error.field)?;
            }
            write!(f, "{}", error.message)?;
        }
        Ok(())
    }
}

/// Collects errors while a file is read; knows the text, so that a byte offset becomes a line.
pub(super) struct Collector {
    /// Where each line but the first begins: a file of ten thousand backends asks for lines often.
    lines: Vec<usize>,
    errors: Vec<ConfigError>,
}

impl Collector {
    pub(super) fn new(text: &str) -> Self {
        let lines = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at + 1);
        Self { lines: lines.collect(), errors: Vec::new() }
    }

    pub(super) fn line(&self, at: &Range<usize>) -> usize {
        self.lines.partition_point(|begin| *begin <= at.start) + 1
    }

    pub(super) fn push(&mut self, at: &Range<usize>, field: impl Into<String>, message: impl Into<String>) {
        let line = self.line(at);
        self.errors.push(ConfigError { line, field: field.into(), message: message.into() });
    }

    pub(super) fn is_empty(&self) -> bool {
        self.errors.is_empty()
    }

    pub(super) fn into_errors(mut self, file: &str) -> ConfigErrors {
        self.errors.sort_by_key(|error| error.line);
        // A check that several backends share is looked at with each.
        let mut said = HashSet::new();
        self.errors.retain(|error| said.insert(error.clone()));
        ConfigErrors { file: file.to_owned(), errors: self.errors }
    }
}
