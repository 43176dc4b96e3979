//! Tables: lines of fields between commas, tabs or semicolons, under a line that names the columns.

use std::borrow::Cow;

use super::super::Flaw;
use super::record::{Cell, Columns, Record, learnable};

/// Rows looked at to tell a table from prose.
const SAMPLE_ROWS: usize = 32;
/// A table has at least so many rows, its names among them, unless they are known names.
const FEWEST_ROWS: usize = 3;
const LONGEST_NAME: usize = 40;

/// A table whose columns are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Table {
    delimiter: u8,
    names: Vec<String>,
}

/// One row: the line it begins on, and what it holds or what is wrong with it.
pub(super) struct Row<'t> {
    pub line: usize,
    pub record: Result<Record<'t>, Flaw>,
}

impl Table {
    /// Whether a file is a table: by its name, or by its first lines. Prose with commas is none: the first line must
    /// be made of names, which either say what is to be learned or stand above rows of just as many fields.
    pub fn find(content: &[u8], file: &str, columns: &Columns) -> Option<Self> {
        let file = file.to_ascii_lowercase();
        if let Some(extension) = ["csv", "tsv", "tab"].iter().find(|e| file.ends_with(&format!(".{e}"))) {
            let delimiters: &[u8] = if *extension == "csv" { b",;\t" } else { b"\t" };
            return delimiters
                .iter()
                .filter_map(|&delimiter| {
                    Some(Self {
                        delimiter,
                        names: names(content, delimiter)?,
                    })
                })
                .rev()
                .max_by_key(|table| table.names.len());
        }
        b"\t,;".iter().find_map(|&delimiter| {
            let table = Self {
                delimiter,
                names: names(content, delimiter)?,
            };
            let asked_for = !columns.is_empty() && columns.names().all(|name| table.names.iter().any(|n| n == name));
            let named = table.names.len() >= 2 && table.names.iter().all(|name| is_name(name));
            let first_line = content.split(|&byte| byte == b'\n').next().unwrap_or_default();
            let prose = first_line.windows(2).any(|pair| pair == [delimiter, b' ']);
            let fewest = if table.is_known() { 2 } else { FEWEST_ROWS };
            (asked_for || named && !prose && table.even_rows(content) >= fewest).then_some(table)
        })
    }

    /// The columns' names.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Whether the columns' names say what is to be learned.
    pub(crate) fn is_known(&self) -> bool {
        learnable(self.names.iter().map(String::as_str))
    }

    /// How many of the first rows there are, if all have as many fields as there are names; otherwise 0.
    fn even_rows(&self, content: &[u8]) -> usize {
        let mut reader = reader(content, self.delimiter);
        let mut row = csv::ByteRecord::new();
        let mut rows = 0;
        while rows < SAMPLE_ROWS && reader.read_byte_record(&mut row).unwrap_or(false) {
            if row.len() != self.names.len() {
                return 0;
            }
            rows += 1;
        }
        rows
    }

    /// Hands every row after the names to `each`, until that fails.
    pub fn rows<E>(&self, content: &[u8], mut each: impl FnMut(Row<'_>) -> Result<(), E>) -> Result<(), E> {
        let mut reader = reader(content, self.delimiter);
        let mut row = csv::ByteRecord::new();
        let mut first = true;
        while reader.read_byte_record(&mut row).unwrap_or(false) {
            if std::mem::take(&mut first) {
                continue;
            }
            let (line, from) = row
                .position()
                .map_or((1, 0), |at| (at.line() as usize, at.byte() as usize));
            let to = reader.position().byte() as usize;
            let written = content.get(from..to).unwrap_or_default();
            let last = to >= content.len();
            each(Row {
                line,
                record: self.record(&row, last && !quotes_close(written)),
            })?;
        }
        Ok(())
    }

    fn record<'t>(&'t self, row: &'t csv::ByteRecord, open: bool) -> Result<Record<'t>, Flaw> {
        if open {
            return Err(Flaw::new("a quotation mark opens a field and none closes it"));
        }
        if row.len() != self.names.len() {
            return Err(Flaw::new(format!(
                "{} fields, and the first line names {}",
                row.len(),
                self.names.len()
            )));
        }
        let mut fields = Vec::with_capacity(row.len());
        for (name, cell) in self.names.iter().zip(row) {
            let cell = std::str::from_utf8(cell).map_err(|_| Flaw::new(format!("`{name}` is not UTF-8 text")))?;
            if cell.contains('\0') {
                return Err(Flaw::new(format!("`{name}` holds a zero byte, which is no text")));
            }
            fields.push((Cow::Borrowed(name.as_str()), Cell::Text(cell)));
        }
        Ok(Record(fields))
    }
}

fn reader(content: &[u8], delimiter: u8) -> csv::Reader<&[u8]> {
    csv::ReaderBuilder::new()
        .delimiter(delimiter)
        .has_headers(false)
        .flexible(true)
        .from_reader(content)
}

/// The fields of the first line, if it has different ones and none is empty.
fn names(content: &[u8], delimiter: u8) -> Option<Vec<String>> {
    let mut row = csv::ByteRecord::new();
    if !reader(content, delimiter).read_byte_record(&mut row).ok()? {
        return None;
    }
    let mut names: Vec<String> = Vec::with_capacity(row.len());
    for name in &row {
        let name = std::str::from_utf8(name).ok()?.trim();
        if name.is_empty() || names.iter().any(|known| known == name) {
            return None;
        }
        names.push(name.to_owned());
    }
    Some(names)
}

/// Whether it reads as the name of a column and not as prose.
fn is_name(name: &str) -> bool {
    name.len() <= LONGEST_NAME
        && name.starts_with(|c: char| c.is_alphabetic() || c == '_')
        && name.split(' ').count() <= 3
        && name
            .chars()
            .all(|c| c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | ' ' | '/'))
        && !name.ends_with('.')
}

fn quotes_close(written: &[u8]) -> bool {
    written.iter().filter(|&&byte| byte == b'"').count() % 2 == 0
}
