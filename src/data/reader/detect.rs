//! What a file holds, by its contents; its name counts where that says more.

use serde_json::value::RawValue;

use super::record::Columns;
use super::table::Table;
use super::{Format, text};

/// Lines looked at to tell the format.
const SAMPLE_LINES: usize = 64;

/// What a file holds, and its columns where it is a table.
pub(super) fn detect(content: &[u8], name: &str, columns: &Columns) -> (Format, Option<Table>) {
    let lower = name.to_ascii_lowercase();
    let named = |extensions: &[&str]| extensions.iter().any(|extension| lower.ends_with(extension));
    if is_json(content, named(&[".json"])) {
        return (Format::Json, None);
    }
    if named(&[".jsonl", ".ndjson"]) {
        return (Format::Jsonl, None);
    }
    let (mut sampled, mut json, mut e2e) = (0, 0, 0);
    for line in text::lines(content)
        .map(<[u8]>::trim_ascii)
        .filter(|line| !line.is_empty())
        .take(SAMPLE_LINES)
    {
        sampled += 1;
        let object = line.strip_prefix(b"{").map(<[u8]>::trim_ascii_start);
        json += usize::from(object.is_some_and(|inside| inside.starts_with(b"\"") || inside.starts_with(b"}")));
        let separator = line.windows(2).position(|pair| pair == b"||");
        e2e += usize::from(separator.is_some_and(|at| at > 0 && at + 2 < line.len()));
    }
    if sampled == 0 {
        return (Format::Text, None);
    }
    if 2 * json >= sampled {
        return (Format::Jsonl, None);
    }
    if let Some(table) = Table::find(content, name, columns) {
        return (Format::Table, Some(table));
    }
    match 2 * e2e >= sampled {
        true => (Format::E2e, None),
        false => (Format::Text, None),
    }
}

/// Whether a file is a JSON list, or JSON objects over several lines each. Text may begin with a bracket, too.
fn is_json(content: &[u8], named: bool) -> bool {
    let start = content.trim_ascii_start();
    let after = |bracket: &[u8]| start.strip_prefix(bracket).map(<[u8]>::trim_ascii_start);
    let whole = || serde_json::from_slice::<&RawValue>(content).is_ok();
    if let Some(inside) = after(b"[") {
        return match inside.first() {
            Some(b'{') => true,
            Some(b'"' | b'[' | b']' | b'0'..=b'9') => named || whole(),
            _ => named && whole(),
        };
    }
    if after(b"{").is_some_and(|inside| matches!(inside.first(), Some(b'"' | b'}'))) {
        let first_line = text::lines(start).next().unwrap_or_default();
        let Ok(start) = std::str::from_utf8(start) else {
            return false;
        };
        // A first object that ends on its own line makes JSON lines, unless the line is cut inside of a string.
        let mut objects = serde_json::Deserializer::from_str(start).into_iter::<&RawValue>();
        return match objects.next() {
            Some(Ok(first)) => first.get().len() > first_line.len(),
            Some(Err(error)) => first_line.trim_ascii().len() <= 1 || (named && error.line() > 1),
            None => false,
        };
    }
    false
}
