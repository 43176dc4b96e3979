//! Data files: recognising the format by content, and turning lines into examples.
//!
//! Reading has two phases so that every tokenizer fits: [`Document::parse`] lists the texts to encode and
//! how their ids go together, [`Document::assemble`] builds the examples from the ids. Natively both happen in
//! [`Dataset::read`]; in a browser the ids are made by JavaScript in between.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{DataError, Example, IGNORED};

/// Lines looked at to tell the format.
const SAMPLE_LINES: usize = 64;
/// Plain text is encoded in pieces of about this many bytes.
const PIECE_BYTES: usize = 1 << 16;

/// What a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// One JSON object a line: `{"input_ids", "labels"?}`, `{"prompt", "completion"}` or `{"text"}`.
    Jsonl,
    /// `meaning||reference` a line, learned on the reference only.
    E2e,
    /// Running text, cut into windows.
    Text,
}

/// How to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// The longest example in tokens; also the window of plain text.
    pub seq: usize,
    /// Size of the model's vocabulary: every id must be below it.
    pub vocab: usize,
    /// Count and leave out bad lines instead of stopping at the first.
    pub skip_bad_lines: bool,
}

/// Turns text into ids.
pub trait Tokenize {
    /// Ids of `text`, without tokens added at its ends.
    ///
    /// # Errors
    /// [`DataError::Encode`].
    fn encode(&self, text: &str) -> Result<Vec<u32>, DataError>;

    /// The end-of-text token.
    ///
    /// # Errors
    /// [`DataError::NoEndToken`].
    fn eos(&self) -> Result<u32, DataError>;

    /// Ids of each of `texts`.
    ///
    /// # Errors
    /// [`DataError::Encode`].
    fn encode_all(&self, texts: &[String]) -> Result<Vec<Vec<u32>>, DataError> {
        texts.iter().map(|text| self.encode(text)).collect()
    }
}

/// What was read, and what was left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    pub format: Format,
    /// SHA-256 of the file, in hexadecimal.
    pub digest: String,
    pub examples: usize,
    /// Tokens of all examples.
    pub tokens: u64,
    /// Tokens the loss is taken on.
    pub targets: u64,
    /// Examples cut to the longest length.
    pub truncated: usize,
    /// Examples left out because nothing of them is learned, often after being cut.
    pub dropped: usize,
    /// Lines left out by `--skip-bad-lines`.
    pub bad_lines: usize,
    /// What is wrong with the first of them.
    pub first_bad_line: Option<String>,
}

impl std::fmt::Display for Summary {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let format = match self.format {
            Format::Jsonl => "JSON lines",
            Format::E2e => "meaning||reference lines",
            Format::Text => "plain text",
        };
        write!(
            formatter,
            "{} examples from {format}, {} tokens of which {} are learned",
            self.examples, self.tokens, self.targets
        )?;
        if self.truncated > 0 {
            write!(formatter, ", {} cut to the longest length", self.truncated)?;
        }
        if self.dropped > 0 {
            write!(formatter, ", {} dropped with nothing to learn", self.dropped)?;
        }
        if let Some(first) = &self.first_bad_line {
            write!(formatter, ", {} bad lines skipped (first: {first})", self.bad_lines)?;
        }
        Ok(())
    }
}

/// The examples of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dataset {
    pub examples: Vec<Example>,
    pub summary: Summary,
}

impl Dataset {
    /// Reads a whole file's bytes; `name` names it in errors. Files of token ids need no tokenizer.
    ///
    /// # Errors
    /// [`DataError`] with the file, the line and what to do.
    pub fn read(
        bytes: &[u8],
        name: &str,
        tokenizer: Option<&dyn Tokenize>,
        options: &Options,
    ) -> Result<Self, DataError> {
        let document = Document::parse(bytes, name, options)?;
        if document.texts().is_empty() {
            return document.assemble(Vec::new(), None);
        }
        let tokenizer = tokenizer.ok_or_else(|| DataError::NoTokenizer { file: name.to_owned() })?;
        let ids = tokenizer.encode_all(document.texts())?;
        let eos = if document.needs_eos() {
            Some(tokenizer.eos()?)
        } else {
            None
        };
        document.assemble(ids, eos)
    }

    /// Reads a file.
    ///
    /// # Errors
    /// As [`Dataset::read`]; [`DataError::Read`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn load(
        path: &std::path::Path,
        tokenizer: Option<&dyn Tokenize>,
        options: &Options,
    ) -> Result<Self, DataError> {
        let name = path.display().to_string();
        let bytes = std::fs::read(path).map_err(|source| DataError::Read {
            path: name.clone(),
            source,
        })?;
        Self::read(&bytes, &name, tokenizer, options)
    }
}

/// A parsed file whose texts are not encoded yet.
#[derive(Clone, Debug)]
pub struct Document {
    name: String,
    options: Options,
    format: Format,
    digest: String,
    /// Each distinct text once.
    texts: Vec<String>,
    drafts: Vec<Draft>,
    bad_lines: usize,
    first_bad_line: Option<String>,
}

/// How one example is put together; numbers index the document's texts.
#[derive(Clone, Debug)]
enum Draft {
    /// From a file of ids.
    Ready(Example),
    /// `prompt` + `completion` + end-of-text, learned after the prompt.
    Completion { prompt: usize, completion: usize },
    /// `meaning` + end-of-text + `reference` + end-of-text, learned on the reference and its end.
    Reference { meaning: usize, reference: usize },
    /// A text and its end.
    Whole { text: usize },
    /// A stretch of running text: not an example of its own.
    Piece { text: usize },
}

impl Document {
    /// Recognises the format and parses every line.
    ///
    /// JSON lines and `meaning||reference` are recognised when at least half of the first lines look like it,
    /// so that one bad line does not turn a data set into running text.
    ///
    /// # Errors
    /// [`DataError::BadLine`], [`DataError::NoExamples`] for an empty file, [`DataError::Option`] for a `seq` below 2.
    pub fn parse(bytes: &[u8], name: &str, options: &Options) -> Result<Self, DataError> {
        if options.seq < 2 {
            return Err(DataError::Option {
                option: "--seq",
                reason: "must be at least 2".to_owned(),
            });
        }
        let content = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes);
        let mut document = Self {
            name: name.to_owned(),
            options: *options,
            format: detect(content, name),
            digest: Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect(),
            texts: Vec::new(),
            drafts: Vec::new(),
            bad_lines: 0,
            first_bad_line: None,
        };
        match document.format {
            Format::Text => document.parse_text(content)?,
            Format::Jsonl | Format::E2e => document.parse_lines(content)?,
        }
        if document.drafts.is_empty() {
            return Err(DataError::NoExamples {
                name: document.name,
                why: document.first_bad_line,
            });
        }
        Ok(document)
    }

    /// The texts to encode, each without tokens added at its ends.
    pub fn texts(&self) -> &[String] {
        &self.texts
    }

    /// Whether examples end with the end-of-text token.
    pub fn needs_eos(&self) -> bool {
        self.format != Format::Text && !self.texts.is_empty()
    }

    /// The recognised format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Builds the examples from the ids of [`Document::texts`], in the same order.
    ///
    /// # Errors
    /// [`DataError::TextCount`], [`DataError::Token`], [`DataError::NoEndToken`]; [`DataError::NoExamples`] when
    /// nothing is left to learn.
    pub fn assemble(self, ids: Vec<Vec<u32>>, eos: Option<u32>) -> Result<Dataset, DataError> {
        let Options { seq, vocab, .. } = self.options;
        if ids.len() != self.texts.len() {
            return Err(DataError::TextCount {
                expected: self.texts.len(),
                found: ids.len(),
            });
        }
        // Labels are i32, so ids must also fit it.
        let largest = vocab.min(i32::MAX as usize);
        if let Some(&id) = ids.iter().flatten().chain(&eos).find(|&&id| id as usize >= largest) {
            return Err(DataError::Token { id, vocab });
        }
        let eos = match eos {
            Some(eos) => eos,
            None if self.needs_eos() => return Err(DataError::NoEndToken),
            None => 0,
        };
        let label = |ids: &[u32]| ids.iter().map(|&id| id as i32).collect::<Vec<i32>>();
        let learned_after = |ignored: &[&[u32]], learned: &[&[u32]]| {
            let (mut all, learned) = (ignored.concat(), learned.concat());
            let labels = [vec![IGNORED; all.len()], label(&learned)].concat();
            all.extend(learned);
            Example { ids: all, labels }
        };

        let mut summary = Summary {
            format: self.format,
            digest: self.digest,
            examples: 0,
            tokens: 0,
            targets: 0,
            truncated: 0,
            dropped: 0,
            bad_lines: self.bad_lines,
            first_bad_line: self.first_bad_line,
        };
        let mut examples = Vec::with_capacity(self.drafts.len());
        let mut add = |mut example: Example| {
            if example.ids.len() > seq {
                example.ids.truncate(seq);
                example.labels.truncate(seq);
                summary.truncated += 1;
            }
            if example.target_count() == 0 {
                summary.dropped += 1;
                return;
            }
            summary.tokens += example.ids.len() as u64;
            summary.targets += example.target_count() as u64;
            examples.push(example);
        };
        let mut running = Vec::new();
        for draft in self.drafts {
            match draft {
                Draft::Ready(example) => add(example),
                Draft::Completion { prompt, completion } => {
                    add(learned_after(&[&ids[prompt]], &[&ids[completion], &[eos]]));
                }
                Draft::Reference { meaning, reference } => {
                    add(learned_after(&[&ids[meaning], &[eos]], &[&ids[reference], &[eos]]));
                }
                Draft::Whole { text } => add(learned_after(&[], &[&ids[text], &[eos]])),
                Draft::Piece { text } => running.extend_from_slice(&ids[text]),
            }
        }
        for window in running.chunks(seq) {
            add(Example {
                ids: window.to_vec(),
                labels: label(window),
            });
        }
        summary.examples = examples.len();
        if examples.is_empty() {
            let why = format!(
                "{} examples were dropped, {} of them cut to {seq} tokens",
                summary.dropped, summary.truncated
            );
            return Err(DataError::NoExamples {
                name: self.name,
                why: Some(why),
            });
        }
        Ok(Dataset { examples, summary })
    }

    fn parse_lines(&mut self, content: &[u8]) -> Result<(), DataError> {
        let mut known = HashMap::new();
        for (index, line) in lines(content).enumerate() {
            let parsed = match std::str::from_utf8(line).map(str::trim) {
                Ok("") => continue,
                Ok(line) => match self.format {
                    Format::E2e => parse_e2e(line),
                    _ => parse_json(line, &self.options),
                },
                Err(error) => Err(not_utf8(error)),
            };
            match parsed {
                Ok(line) => {
                    let draft = self.draft(line, &mut known);
                    self.drafts.push(draft);
                }
                Err(reason) => self.bad_line(index, reason)?,
            }
        }
        Ok(())
    }

    fn parse_text(&mut self, content: &[u8]) -> Result<(), DataError> {
        let mut text = String::with_capacity(content.len());
        for (index, line) in content.split_inclusive(|&byte| byte == b'\n').enumerate() {
            match std::str::from_utf8(line) {
                Ok(line) => text.push_str(line),
                Err(error) => self.bad_line(index, not_utf8(error))?,
            }
        }
        if text.trim().is_empty() {
            return Ok(());
        }
        for piece in pieces(&text) {
            self.drafts.push(Draft::Piece { text: self.texts.len() });
            self.texts.push(piece.to_owned());
        }
        Ok(())
    }

    fn draft(&mut self, line: Line, known: &mut HashMap<String, usize>) -> Draft {
        let mut intern = |text: String| {
            *known.entry(text).or_insert_with_key(|text| {
                self.texts.push(text.clone());
                self.texts.len() - 1
            })
        };
        match line {
            Line::Ids(example) => Draft::Ready(example),
            Line::Completion { prompt, completion } => Draft::Completion {
                prompt: intern(prompt),
                completion: intern(completion),
            },
            Line::Reference { meaning, reference } => Draft::Reference {
                meaning: intern(meaning),
                reference: intern(reference),
            },
            Line::Whole(text) => Draft::Whole { text: intern(text) },
        }
    }

    fn bad_line(&mut self, index: usize, reason: String) -> Result<(), DataError> {
        let line = index + 1;
        if !self.options.skip_bad_lines {
            return Err(DataError::BadLine {
                file: self.name.clone(),
                line,
                reason,
            });
        }
        self.bad_lines += 1;
        self.first_bad_line
            .get_or_insert_with(|| format!("line {line}: {reason}"));
        Ok(())
    }
}

/// One parsed line.
enum Line {
    Ids(Example),
    Completion { prompt: String, completion: String },
    Reference { meaning: String, reference: String },
    Whole(String),
}

/// Lines without their ends; the last one need not have any.
fn lines(content: &[u8]) -> impl Iterator<Item = &[u8]> {
    content
        .split_inclusive(|&byte| byte == b'\n')
        .map(|line| line.strip_suffix(b"\n").unwrap_or(line))
        .map(|line| line.strip_suffix(b"\r").unwrap_or(line))
}

fn not_utf8(error: std::str::Utf8Error) -> String {
    format!("not UTF-8 text (byte {})", error.valid_up_to() + 1)
}

fn detect(content: &[u8], name: &str) -> Format {
    if name.to_ascii_lowercase().ends_with(".jsonl") {
        return Format::Jsonl;
    }
    let (mut sampled, mut json, mut e2e) = (0, 0, 0);
    for line in lines(content)
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
        Format::Text
    } else if 2 * json >= sampled {
        Format::Jsonl
    } else if 2 * e2e >= sampled {
        Format::E2e
    } else {
        Format::Text
    }
}

fn parse_e2e(line: &str) -> Result<Line, String> {
    let Some((meaning, reference)) = line.split_once("||") else {
        return Err("expected `meaning||reference`, found no `||`".to_owned());
    };
    let (meaning, reference) = (meaning.trim(), reference.trim());
    if meaning.is_empty() || reference.is_empty() {
        let empty = if meaning.is_empty() { "before" } else { "after" };
        return Err(format!("expected `meaning||reference`, found nothing {empty} `||`"));
    }
    // The space makes the reference's first word the token it is in running text.
    Ok(Line::Reference {
        meaning: meaning.to_owned(),
        reference: format!(" {reference}"),
    })
}

#[derive(Deserialize)]
struct JsonLine {
    input_ids: Option<Vec<u32>>,
    labels: Option<Vec<i32>>,
    prompt: Option<String>,
    completion: Option<String>,
    text: Option<String>,
}

fn parse_json(line: &str, options: &Options) -> Result<Line, String> {
    if !line.starts_with('{') {
        return Err("expected a JSON object".to_owned());
    }
    let line: JsonLine = serde_json::from_str(line).map_err(|error| {
        format!(
            "bad JSON: {}",
            error.to_string().replace(" at line 1 column ", " at column ")
        )
    })?;
    match line {
        JsonLine {
            input_ids: Some(ids),
            labels,
            ..
        } => parse_ids(ids, labels, options.vocab),
        JsonLine { labels: Some(_), .. } => Err("`labels` without `input_ids`".to_owned()),
        JsonLine {
            prompt: Some(_),
            completion: Some(completion),
            ..
        } if completion.is_empty() => Err("`completion` is empty".to_owned()),
        JsonLine {
            prompt: Some(prompt),
            completion: Some(completion),
            ..
        } => Ok(Line::Completion { prompt, completion }),
        JsonLine { prompt: Some(_), .. } => Err("`prompt` without `completion`".to_owned()),
        JsonLine {
            completion: Some(_), ..
        } => Err("`completion` without `prompt`".to_owned()),
        JsonLine { text: Some(text), .. } if text.is_empty() => Err("`text` is empty".to_owned()),
        JsonLine { text: Some(text), .. } => Ok(Line::Whole(text)),
        _ => Err("expected `input_ids`, or `prompt` and `completion`, or `text`".to_owned()),
    }
}

fn parse_ids(ids: Vec<u32>, labels: Option<Vec<i32>>, vocab: usize) -> Result<Line, String> {
    let largest = vocab.min(i32::MAX as usize);
    if ids.is_empty() {
        return Err("`input_ids` is empty".to_owned());
    }
    if let Some(id) = ids.iter().find(|&&id| id as usize >= largest) {
        return Err(format!(
            "`input_ids` holds {id}, the model's vocabulary has {vocab} entries"
        ));
    }
    let labels = labels.unwrap_or_else(|| ids.iter().map(|&id| id as i32).collect());
    if labels.len() != ids.len() {
        return Err(format!(
            "`labels` has {} entries and `input_ids` {}",
            labels.len(),
            ids.len()
        ));
    }
    let known = |label: i32| label == IGNORED || usize::try_from(label).is_ok_and(|label| label < largest);
    if let Some(label) = labels.iter().find(|&&label| !known(label)) {
        return Err(format!(
            "`labels` holds {label}: neither {IGNORED} (not learned) nor an entry of the model's vocabulary of {vocab}"
        ));
    }
    Ok(Line::Ids(Example { ids, labels }))
}

/// Cuts running text after line ends that stand between two characters other than white space. GPT-2's
/// pre-tokenizer never joins across those, so the pieces have the ids of the whole.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let bytes = rest.as_bytes();
        let cut = (PIECE_BYTES..bytes.len().saturating_sub(1))
            .find(|&at| {
                bytes[at] == b'\n'
                    && rest[..at]
                        .chars()
                        .next_back()
                        .is_some_and(|before| !before.is_whitespace())
                    && rest[at + 1..]
                        .chars()
                        .next()
                        .is_some_and(|after| !after.is_whitespace())
            })
            .map_or(bytes.len(), |at| at + 1);
        let (piece, after) = rest.split_at(cut);
        rest = after;
        Some(piece)
    })
}
