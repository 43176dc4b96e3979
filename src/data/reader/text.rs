//! Lines and running text.

use super::super::Flaw;
use super::Line;

/// Running text is encoded in pieces of about this many bytes.
const PIECE_BYTES: usize = 1 << 16;
/// A piece ends here at the latest, wherever that is: no input makes a tokenizer hold more at once.
const LONGEST_PIECE: usize = 1 << 20;

/// Lines without their ends; the last one need not have any.
pub(super) fn lines(content: &[u8]) -> impl Iterator<Item = &[u8]> {
    content
        .split_inclusive(|&byte| byte == b'\n')
        .map(|line| line.strip_suffix(b"\n").unwrap_or(line))
        .map(|line| line.strip_suffix(b"\r").unwrap_or(line))
}

/// A line as text.
pub(super) fn utf8(line: &[u8]) -> Result<&str, Flaw> {
    if let Some(at) = line.iter().position(|&byte| byte == 0) {
        return Err(Flaw::new(format!("a zero byte, which is no text (byte {})", at + 1)));
    }
    std::str::from_utf8(line).map_err(|error| Flaw::new(format!("not UTF-8 text (byte {})", error.valid_up_to() + 1)))
}

/// `meaning||reference`.
pub(super) fn e2e(line: &str) -> Result<Line, Flaw> {
    let Some((meaning, reference)) = line.split_once("||") else {
        return Err(Flaw::new("expected `meaning||reference`, found no `||`"));
    };
    let (meaning, reference) = (meaning.trim(), reference.trim());
    if meaning.is_empty() || reference.is_empty() {
        let empty = if meaning.is_empty() { "before" } else { "after" };
        return Err(Flaw::new(format!(
            "expected `meaning||reference`, found nothing {empty} `||`"
        )));
    }
    // The space makes the reference's first word the token it is in running text.
    Ok(Line::Reference {
        meaning: meaning.to_owned(),
        reference: format!(" {reference}"),
    })
}

/// Joins lines of running text to pieces that have the ids of the whole.
///
/// A piece ends after a line end that stands between two characters other than white space, where no pre-tokenizer
/// of the known families joins what is before and after. Text without such a place is cut before a word, or anywhere.
#[derive(Default)]
pub(super) struct Pieces {
    done: Vec<String>,
    piece: String,
}

impl Pieces {
    /// Adds a line with its end.
    pub fn push(&mut self, mut line: &str) {
        if self.piece.len() >= PIECE_BYTES && self.may_end() && line.starts_with(|c: char| !c.is_whitespace()) {
            self.finish_piece();
        }
        while self.piece.len() + line.len() > LONGEST_PIECE {
            let (now, later) = line.split_at(cut(line, LONGEST_PIECE.saturating_sub(self.piece.len())));
            self.piece.push_str(now);
            self.finish_piece();
            line = later;
        }
        self.piece.push_str(line);
    }

    /// The pieces; none if they hold white space only.
    pub fn finish(mut self) -> Vec<String> {
        self.finish_piece();
        if self.done.iter().all(|piece| piece.trim().is_empty()) {
            return Vec::new();
        }
        self.done
    }

    fn may_end(&self) -> bool {
        self.piece
            .strip_suffix('\n')
            .is_some_and(|text| text.ends_with(|c: char| !c.is_whitespace()))
    }

    fn finish_piece(&mut self) {
        if !self.piece.is_empty() {
            self.done.push(std::mem::take(&mut self.piece));
        }
    }
}

/// Where to cut a line that is too long: before the last word that begins within `room` bytes, or else at `room`.
fn cut(line: &str, room: usize) -> usize {
    let room = floor_boundary(line, room);
    let head = &line[..room];
    let word = head
        .rfind(' ')
        .filter(|&at| at > 0 && !head[..at].ends_with(char::is_whitespace));
    word.unwrap_or(room)
}

/// The last boundary of a character at or before `at`.
pub(super) fn floor_boundary(text: &str, at: usize) -> usize {
    let mut at = at.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}
