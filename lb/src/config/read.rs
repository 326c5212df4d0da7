//! Reads TOML tables field by field, so that one wrong field does not hide the next.
//!
//! Serde's derived readers stop at the first error; an operator wants all of them. Each value still goes
//! through serde, only the walk over a table's keys is ours.

use std::ops::Range;

use serde::de::{DeserializeOwned, IntoDeserializer as _};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::Collector;

/// A value with its place in the file.
#[derive(Clone, Debug)]
pub(super) struct Field<T> {
    pub(super) value: T,
    /// Bytes of the file.
    pub(super) at: Range<usize>,
    /// Path of the field, for messages.
    pub(super) path: String,
}

/// One table of the file, being read.
pub(super) struct Reader<'i> {
    /// Path of the table, empty at the top.
    pub(super) path: String,
    /// The table's place: its header, or its braces.
    pub(super) at: Range<usize>,
    left: Vec<(Spanned<String>, Spanned<DeValue<'i>>)>,
    known: Vec<&'static str>,
}

impl<'i> Reader<'i> {
    pub(super) fn new(path: String, at: Range<usize>, table: DeTable<'i>) -> Self {
        let left = table
            .into_iter()
            .map(|(key, value)| (Spanned::new(key.span(), key.into_inner().into_owned()), value));
        Self { path, at, left: left.collect(), known: Vec::new() }
    }

    fn path_of(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    fn take(&mut self, key: &'static str) -> Option<Spanned<DeValue<'i>>> {
        self.known.push(key);
        let position = self.left.iter().position(|(name, _)| name.get_ref() == key)?;
        Some(self.left.swap_remove(position).1)
    }

    /// A value that may be absent; of the wrong type it is reported and absent.
    pub(super) fn optional<T: DeserializeOwned>(
        &mut self,
        key: &'static str,
        errors: &mut Collector,
    ) -> Option<Field<T>> {
        let value = self.take(key)?;
        let at = value.span();
        let path = self.path_of(key);
        match T::deserialize(value.into_deserializer()) {
            Ok(value) => Some(Field { value, at, path }),
            Err(error) => {
                errors.push(&error.span().unwrap_or(at), path, error.message().trim_end());
                None
            }
        }
    }

    /// A value that must be there.
    pub(super) fn required<T: DeserializeOwned>(
        &mut self,
        key: &'static str,
        errors: &mut Collector,
    ) -> Option<Field<T>> {
        if !self.left.iter().any(|(name, _)| name.get_ref() == key) {
            self.known.push(key);
            errors.push(&self.at, self.path_of(key), "is missing");
            return None;
        }
        self.optional(key, errors)
    }

    /// A table that may be absent.
    pub(super) fn table(&mut self, key: &'static str, errors: &mut Collector) -> Option<Reader<'i>> {
        let value = self.take(key)?;
        let (at, path) = (value.span(), self.path_of(key));
        match value.into_inner() {
            DeValue::Table(table) => Some(Reader::new(path, at, table)),
            other => {
                errors.push(&at, path, format!("expected a table, found {}", other.type_str()));
                None
            }
        }
    }

    /// A list of tables, empty when absent.
    pub(super) fn tables(&mut self, key: &'static str, errors: &mut Collector) -> Vec<Reader<'i>> {
        let Some(value) = self.take(key) else { return Vec::new() };
        let (at, path) = (value.span(), self.path_of(key));
        let DeValue::Array(list) = value.into_inner() else {
            errors.push(&at, &path, format!("expected tables: write [[{path}]] instead of [{path}]"));
            return Vec::new();
        };
        let mut readers = Vec::new();
        for (i, element) in list.into_iter().enumerate() {
            let (at, path) = (element.span(), format!("{path}[{i}]"));
            match element.into_inner() {
                DeValue::Table(table) => readers.push(Reader::new(path, at, table)),
                other => errors.push(&at, path, format!("expected a table, found {}", other.type_str())),
            }
        }
        readers
    }

    /// Reports what nobody asked for.
    pub(super) fn finish(self, errors: &mut Collector) {
        for (key, _) in &self.left {
            let known = self.known.join(", ");
            errors.push(
                &key.span(),
                self.path_of(key.get_ref()),
                format!("unknown field; here may stand: {known}"),
            );
        }
    }
}
