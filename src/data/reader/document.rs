//! A file between its bytes and its examples: what is to be encoded, and how the ids go together.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::ops::Range;

use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use super::super::chat::{Conversation, Manner, Render, Transcript};
use super::super::{DataError, Example, Flaw};
use super::record::{Cell, Record, in_line};
use super::table::Table;
use super::{Dataset, Encoded, Format, Line, Marks, Options, Summary, bytes, detect, text};
use crate::terms::tensor::IGNORED_TARGET;

/// No vocabulary's tokens are longer than this on average over a sequence: what lies after so many bytes a token of
/// the longest sequence is cut away before it is encoded.
const BYTES_PER_TOKEN: usize = 256;

/// A parsed file whose texts are not encoded yet.
#[derive(Clone, Debug)]
pub struct Document {
    name: String,
    options: Options,
    format: Format,
    digest: String,
    /// Each distinct text once.
    texts: Vec<String>,
    /// Conversations as text.
    transcripts: Vec<String>,
    drafts: Vec<Draft>,
    /// The next draft that may be a conversation without its text.
    unrendered: usize,
    conversations: usize,
    manner: Option<Manner>,
    bad_lines: usize,
    /// With its number, which orders them.
    first_bad_line: Option<(usize, String)>,
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
    /// Not laid out as text yet; the line is for messages.
    Conversation { line: Place, conversation: Conversation },
    /// A conversation's text, learned on these bytes of it.
    Chat {
        transcript: usize,
        learned: Vec<Range<usize>>,
    },
    /// A conversation that turned out bad.
    Bad,
}

/// Where in a file something stands.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// From 1.
    line: usize,
    /// Of a JSON list, from 1; 0 where lines say enough.
    element: usize,
}

impl Document {
    /// Recognises the format and parses everything.
    ///
    /// JSON lines and `meaning||reference` are recognised when at least half of the first lines look like it,
    /// so that one bad line does not turn a data set into running text.
    ///
    /// # Errors
    /// [`DataError::BadLine`], [`DataError::NotText`] and [`DataError::Broken`] for files that cannot be read in
    /// parts either, [`DataError::NoExamples`] for an empty file, [`DataError::Option`] for a `seq` below 2 or columns
    /// that the file does not have.
    pub fn parse(bytes: &[u8], name: &str, options: &Options) -> Result<Self, DataError> {
        if options.seq < 2 {
            return Err(DataError::Option {
                option: "--seq",
                reason: "must be at least 2".to_owned(),
            });
        }
        let content = bytes::text(bytes, name)?;
        let (format, table) = detect(content, name, &options.columns);
        let mut document = Self {
            name: name.to_owned(),
            options: options.clone(),
            format,
            digest: Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect(),
            texts: Vec::new(),
            transcripts: Vec::new(),
            drafts: Vec::new(),
            unrendered: 0,
            conversations: 0,
            manner: None,
            bad_lines: 0,
            first_bad_line: None,
        };
        if !options.columns.is_empty() && matches!(format, Format::E2e | Format::Text) {
            return Err(DataError::Option {
                option: "--columns",
                reason: format!("{}: {name} is {format}, which has no columns", options.columns),
            });
        }
        match (format, table) {
            (Format::Table, Some(table)) => document.parse_table(content, &table)?,
            (Format::Json, _) => document.parse_json(content)?,
            (Format::Text, _) => document.parse_text(content)?,
            _ => document.parse_lines(content)?,
        }
        if document.drafts.is_empty() {
            return Err(DataError::NoExamples {
                name: document.name,
                why: document.first_bad_line.map(|(_, what)| what),
            });
        }
        Ok(document)
    }

    /// What the file is called in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The texts to encode, each without tokens added at its ends.
    pub fn texts(&self) -> &[String] {
        &self.texts
    }

    /// The texts of conversations, to encode with the places of their tokens; all of them only after
    /// [`Document::render`].
    pub fn transcripts(&self) -> &[String] {
        &self.transcripts
    }

    /// Conversations that the file holds.
    pub fn conversations(&self) -> usize {
        self.conversations
    }

    /// Whether there is text to encode, of conversations or other.
    pub(crate) fn needs_tokenizer(&self) -> bool {
        !self.texts.is_empty() || self.conversations > 0
    }

    /// Whether examples end with the end-of-text token.
    pub fn needs_eos(&self) -> bool {
        self.format != Format::Text && !self.texts.is_empty()
    }

    /// The recognised format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Lays all conversations out as text.
    ///
    /// # Errors
    /// As [`Document::render_next`].
    pub fn render(&mut self, template: Option<&dyn Render>) -> Result<(), DataError> {
        while self.render_next(template)? {}
        Ok(())
    }

    /// Lays the next conversation out as text; `false` when there is none left.
    ///
    /// # Errors
    /// [`DataError::NoTemplate`], [`DataError::Template`] when it cannot write any conversation,
    /// [`DataError::BadLine`] when it refuses this one.
    pub fn render_next(&mut self, template: Option<&dyn Render>) -> Result<bool, DataError> {
        let next = self.drafts[self.unrendered..]
            .iter()
            .position(|draft| matches!(draft, Draft::Conversation { .. }));
        let Some(next) = next else {
            self.unrendered = self.drafts.len();
            return Ok(false);
        };
        self.unrendered += next;
        let template = template.ok_or_else(|| DataError::NoTemplate {
            file: self.name.clone(),
            format: self.format,
        })?;
        let manner = match self.manner.take() {
            Some(manner) => manner,
            None => Manner::of(template).map_err(|flaw| DataError::Template {
                reason: flaw.to_string(),
            })?,
        };
        let draft = std::mem::replace(&mut self.drafts[self.unrendered], Draft::Bad);
        if let Draft::Conversation { line, conversation } = draft {
            let limit = self.limit();
            match manner.lay_out(template, conversation, limit) {
                Ok(Transcript { mut text, learned }) => {
                    text.truncate(text::floor_boundary(&text, limit));
                    text.shrink_to_fit();
                    self.drafts[self.unrendered] = Draft::Chat {
                        transcript: self.transcripts.len(),
                        learned,
                    };
                    self.transcripts.push(text);
                }
                Err(flaw) => self.bad_line(line, flaw)?,
            }
        }
        self.manner = Some(manner);
        self.unrendered += 1;
        Ok(true)
    }

    /// Builds the examples from the ids of [`Document::texts`] and of [`Document::transcripts`], in the same orders.
    ///
    /// # Errors
    /// [`DataError::TextCount`], [`DataError::Token`], [`DataError::NoEndToken`]; [`DataError::NoExamples`] when
    /// nothing is left to learn.
    pub fn assemble(self, ids: Vec<Vec<u32>>, chats: Vec<Encoded>, marks: &Marks) -> Result<Dataset, DataError> {
        let Options { seq, vocab, .. } = self.options;
        let counts = [(self.texts.len(), ids.len()), (self.transcripts.len(), chats.len())];
        let ends = chats.iter().map(|chat| (chat.ids.len(), chat.ends.len()));
        if let Some((expected, found)) = counts
            .into_iter()
            .chain(ends)
            .find(|(expected, found)| expected != found)
        {
            return Err(DataError::TextCount { expected, found });
        }
        // Labels are i32, so ids must also fit it.
        let largest = vocab.min(i32::MAX as usize);
        let mut all = ids
            .iter()
            .chain(chats.iter().map(|chat| &chat.ids))
            .flatten()
            .chain(&marks.begin)
            .chain(&marks.end);
        if let Some(&id) = all.find(|&&id| id as usize >= largest) {
            return Err(DataError::Token { id, vocab });
        }
        let eos = match marks.end {
            Some(eos) => eos,
            None if self.needs_eos() => return Err(DataError::NoEndToken),
            None => 0,
        };
        let label = |ids: &[u32]| ids.iter().map(|&id| id as i32).collect::<Vec<i32>>();
        let learned_after = |ignored: &[&[u32]], learned: &[&[u32]]| {
            let (mut all, learned) = (ignored.concat(), learned.concat());
            let labels = [vec![IGNORED_TARGET; all.len()], label(&learned)].concat();
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
            first_bad_line: self.first_bad_line.map(|(_, what)| what),
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
        let begin: &[u32] = &marks.begin;
        let mut chats: Vec<Option<Encoded>> = chats.into_iter().map(Some).collect();
        let mut running = Vec::new();
        for draft in self.drafts {
            match draft {
                Draft::Ready(example) => add(example),
                Draft::Completion { prompt, completion } => {
                    add(learned_after(&[begin, &ids[prompt]], &[&ids[completion], &[eos]]));
                }
                Draft::Reference { meaning, reference } => {
                    add(learned_after(
                        &[begin, &ids[meaning], &[eos]],
                        &[&ids[reference], &[eos]],
                    ));
                }
                Draft::Whole { text } => add(learned_after(&[begin], &[&ids[text], &[eos]])),
                Draft::Piece { text } => {
                    if running.is_empty() {
                        running.extend_from_slice(begin);
                    }
                    running.extend_from_slice(&ids[text]);
                }
                Draft::Chat { transcript, learned } => {
                    let Encoded { ids, ends } = chats[transcript].take().unwrap_or_default();
                    let labels = ids.iter().zip(&ends).map(|(&id, &end)| {
                        // A token belongs to what its last byte belongs to.
                        let in_answer = |range: &Range<usize>| range.start < end as usize && end as usize <= range.end;
                        if learned.iter().any(in_answer) {
                            id as i32
                        } else {
                            IGNORED_TARGET
                        }
                    });
                    add(Example {
                        labels: labels.collect(),
                        ids,
                    });
                }
                Draft::Conversation { .. } => {
                    return Err(DataError::TextCount {
                        expected: self.conversations,
                        found: chats.len(),
                    });
                }
                Draft::Bad => {}
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
            let why = match &summary.first_bad_line {
                Some(first) if summary.dropped == 0 => first.clone(),
                _ => format!(
                    "{} examples were dropped, {} of them cut to {seq} tokens",
                    summary.dropped, summary.truncated
                ),
            };
            return Err(DataError::NoExamples {
                name: self.name,
                why: Some(why),
            });
        }
        Ok(Dataset { examples, summary })
    }

    /// Bytes of a text that can be within the longest example.
    fn limit(&self) -> usize {
        (self.options.seq + 1).saturating_mul(BYTES_PER_TOKEN)
    }

    fn parse_lines(&mut self, content: &[u8]) -> Result<(), DataError> {
        let mut known = Known::default();
        for (index, line) in text::lines(content).enumerate() {
            let parsed = match text::utf8(line).map(str::trim) {
                Ok("") => continue,
                Ok(line) if self.format == Format::E2e => text::e2e(line),
                Ok(line) => self.json_line(line),
                Err(flaw) => Err(flaw),
            };
            let place = Place {
                line: index + 1,
                element: 0,
            };
            self.take(place, parsed, &mut known)?;
        }
        Ok(())
    }

    /// Elements of a list, or objects one after the other. Their syntax must be right throughout: after a fault
    /// nobody can tell where the next element begins.
    fn parse_json(&mut self, content: &[u8]) -> Result<(), DataError> {
        let broken = |line: usize, reason: String| DataError::Broken {
            file: self.name.clone(),
            line,
            reason,
        };
        let content = std::str::from_utf8(content).map_err(|error| {
            broken(
                line_at(content, error.valid_up_to()),
                "not UTF-8 text, and a JSON list must be right as a whole".to_owned(),
            )
        })?;
        let wrong = |error: serde_json::Error| {
            let reason = match error.is_eof() {
                true => "the JSON list ends in the middle: is the file complete?".to_owned(),
                false => {
                    let words = error.to_string();
                    let words = words
                        .rsplit_once(" at line ")
                        .map_or(words.as_str(), |(words, _)| words);
                    format!(
                        "this is no JSON list: {words} (column {}); put one object a line, or commas between objects and brackets around them",
                        error.column()
                    )
                }
            };
            broken(error.line(), reason)
        };
        let elements: Vec<&RawValue> = if content.trim_start().starts_with('[') {
            serde_json::from_str(content).map_err(wrong)?
        } else {
            serde_json::Deserializer::from_str(content)
                .into_iter()
                .collect::<Result<_, _>>()
                .map_err(wrong)?
        };
        let mut known = Known::default();
        let (mut counted_to, mut line) = (0, 1);
        for (index, element) in elements.into_iter().enumerate() {
            // Both are parts of one text.
            let at = element.get().as_ptr() as usize - content.as_ptr() as usize;
            line += line_at(&content.as_bytes()[counted_to..at], at - counted_to) - 1;
            counted_to = at;
            let place = Place {
                line,
                element: index + 1,
            };
            let parsed = self.json_element(element);
            self.take(place, parsed, &mut known)?;
        }
        Ok(())
    }

    fn parse_table(&mut self, content: &[u8], table: &Table) -> Result<(), DataError> {
        let columns = self.options.columns.clone();
        let missing = columns
            .names()
            .find(|&name| !table.names().iter().any(|known| known == name));
        let found = || {
            table
                .names()
                .iter()
                .map(|name| format!("`{name}`"))
                .collect::<Vec<_>>()
                .join(", ")
        };
        if let Some(missing) = missing {
            return Err(DataError::Option {
                option: "--columns",
                reason: format!("names `{missing}`; {} has the columns {}", self.name, found()),
            });
        }
        if columns.is_empty() && !table.is_known() {
            return Err(DataError::Broken {
                file: self.name.clone(),
                line: 1,
                reason: format!(
                    "this is a table with the columns {}; say what to learn from it with --columns text=NAME, or --columns prompt=NAME,completion=NAME",
                    found()
                ),
            });
        }
        let vocab = self.options.vocab;
        let mut known = Known::default();
        table.rows(content, |row| {
            let place = Place {
                line: row.line,
                element: 0,
            };
            let parsed = row.record.and_then(|record| record.line(&columns, vocab));
            self.take(place, parsed, &mut known)
        })
    }

    fn parse_text(&mut self, content: &[u8]) -> Result<(), DataError> {
        let mut pieces = text::Pieces::default();
        for (index, line) in content.split_inclusive(|&byte| byte == b'\n').enumerate() {
            match text::utf8(line) {
                Ok(line) => match line.strip_suffix("\r\n") {
                    Some(line) => {
                        pieces.push(line);
                        pieces.push("\n");
                    }
                    None => pieces.push(line),
                },
                Err(flaw) => self.bad_line(
                    Place {
                        line: index + 1,
                        element: 0,
                    },
                    flaw,
                )?,
            }
        }
        self.texts = pieces.finish();
        self.drafts = (0..self.texts.len()).map(|text| Draft::Piece { text }).collect();
        Ok(())
    }

    fn json_line(&self, line: &str) -> Result<Line, Flaw> {
        if !line.starts_with('{') {
            return Err(Flaw::new("expected a JSON object"));
        }
        let record: Record<'_> = serde_json::from_str(line).map_err(|error| {
            let comma = line.ends_with(',') && error.to_string().starts_with("trailing characters");
            let hint = match comma {
                true => "; lines of JSON have no commas between them: put brackets around all, or leave the commas out",
                false if error.is_eof() => "; each line must hold a whole object",
                false => "",
            };
            Flaw::new(format!("bad JSON: {}{hint}", in_line(&error)))
        })?;
        record.line(&self.options.columns, self.options.vocab)
    }

    fn json_element(&self, element: &RawValue) -> Result<Line, Flaw> {
        let json = element.get();
        let record = match json.as_bytes().first() {
            Some(b'{') => {
                serde_json::from_str(json).map_err(|error| Flaw::new(format!("bad JSON: {}", in_line(&error))))?
            }
            Some(b'"') if self.options.columns.is_empty() => Record(vec![("text".into(), Cell::Json(element))]),
            _ => return Err(Flaw::new("expected a JSON object")),
        };
        record.line(&self.options.columns, self.options.vocab)
    }

    fn take(&mut self, place: Place, parsed: Result<Line, Flaw>, known: &mut Known) -> Result<(), DataError> {
        match parsed {
            Ok(line) => {
                let draft = self.draft(place, line, known);
                self.drafts.push(draft);
                Ok(())
            }
            Err(flaw) => self.bad_line(place, flaw),
        }
    }

    fn draft(&mut self, line_at: Place, line: Line, known: &mut Known) -> Draft {
        let limit = self.limit();
        let texts = &mut self.texts;
        let mut intern = |mut text: String| {
            text.truncate(text::floor_boundary(&text, limit));
            known.index(texts, text)
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
            Line::Conversation(conversation) => {
                self.conversations += 1;
                Draft::Conversation {
                    line: line_at,
                    conversation,
                }
            }
        }
    }

    fn bad_line(&mut self, place: Place, flaw: Flaw) -> Result<(), DataError> {
        let Place { line, element } = place;
        let reason = match element {
            0 => flaw.to_string(),
            element => format!("element {element}: {flaw}"),
        };
        if !self.options.skip_bad_lines {
            return Err(DataError::BadLine {
                file: self.name.clone(),
                line,
                reason,
            });
        }
        self.bad_lines += 1;
        if self.first_bad_line.as_ref().is_none_or(|(first, _)| line < *first) {
            self.first_bad_line = Some((line, format!("line {line}: {reason}")));
        }
        Ok(())
    }
}

/// Finds texts that were there before, without holding them a second time.
#[derive(Default)]
struct Known {
    by_hash: HashMap<u64, usize>,
    hasher: RandomState,
}

impl Known {
    /// The number of `text` among `texts`, to which it is added if it is new.
    fn index(&mut self, texts: &mut Vec<String>, text: String) -> usize {
        let hash = self.hasher.hash_one(&text);
        if let Some(&index) = self.by_hash.get(&hash)
            && texts[index] == text
        {
            return index;
        }
        texts.push(text);
        self.by_hash.insert(hash, texts.len() - 1);
        texts.len() - 1
    }
}

/// The line, from 1, of the byte at `at`.
fn line_at(content: &[u8], at: usize) -> usize {
    1 + content[..at].iter().filter(|&&byte| byte == b'\n').count()
}
