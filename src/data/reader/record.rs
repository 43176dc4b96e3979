//! One record, a JSON object or a row of a table, into what is learned from it.
//!
//! Fields are judged by their use: one that nothing is taken from may hold anything, and one that changes what a model
//! would see (a mask, positions) is honoured or named.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::super::chat::{ASSISTANT, Conversation, Message};
use super::super::json::Json;
use super::super::{Example, Flaw};
use super::Line;
use crate::terms::tensor::IGNORED_TARGET;

/// A field's contents.
#[derive(Clone, Copy, Debug)]
pub(super) enum Cell<'a> {
    /// As it stands in the file.
    Json(&'a RawValue),
    /// Of a table.
    Text(&'a str),
}

/// A record's fields in their order.
#[derive(Debug)]
pub(super) struct Record<'a>(pub Vec<(Cow<'a, str>, Cell<'a>)>);

impl<'de: 'a, 'a> Deserialize<'de> for Record<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(serde::Deserialize)]
        struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

        struct Fields;

        impl<'de> Visitor<'de> for Fields {
            type Value = Vec<(Cow<'de, str>, Cell<'de>)>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields = Vec::new();
                while let Some((Name(name), value)) = map.next_entry::<Name<'de>, &'de RawValue>()? {
                    fields.push((name, Cell::Json(value)));
                }
                Ok(fields)
            }
        }

        deserializer.deserialize_map(Fields).map(Record)
    }
}

/// What a column can be.
const ROLES: [&str; 8] = [
    "text",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "system",
    "messages",
];
/// What a record must have, by any of these.
const SETS: [&[&str]; 5] = [
    &["text"],
    &["prompt", "completion"],
    &["instruction", "output"],
    &["messages"],
    &["conversations"],
];

/// Which fields are what, where their names do not say it: pairs of what is learned and the name in the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Columns(Vec<(String, String)>);

impl Columns {
    /// Whether names in the file are taken as they are.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The names in the file.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(_, name)| name.as_str())
    }
}

/// Why `--columns` cannot be meant so.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ColumnsError {
    #[error("`{0}` is none of {roles}; write prompt=NAME,completion=NAME, or text=NAME", roles = ROLES.join(", "))]
    Role(String),
    #[error("`{0}` is given twice")]
    Twice(String),
    #[error(
        "`{0}` is not enough to learn from; give text, or prompt and completion, or instruction and output, or messages"
    )]
    Incomplete(String),
}

impl FromStr for Columns {
    type Err = ColumnsError;

    /// `prompt=question,completion=answer`; a single name is the text's.
    fn from_str(list: &str) -> Result<Self, ColumnsError> {
        let mut columns: Vec<(String, String)> = Vec::new();
        for part in list.split(',') {
            let (role, name) = match part.split_once('=') {
                Some((role, name)) => (role.trim(), name.trim()),
                None if list.contains([',', '=']) => (part.trim(), part.trim()),
                None => ("text", part.trim()),
            };
            if !ROLES.contains(&role) || name.is_empty() {
                return Err(ColumnsError::Role(part.trim().to_owned()));
            }
            if columns.iter().any(|(known, _)| known == role) {
                return Err(ColumnsError::Twice(role.to_owned()));
            }
            columns.push((role.to_owned(), name.to_owned()));
        }
        if !learnable(columns.iter().map(|(role, _)| role.as_str())) {
            return Err(ColumnsError::Incomplete(list.to_owned()));
        }
        Ok(Self(columns))
    }
}

impl fmt::Display for Columns {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (role, name)) in self.0.iter().enumerate() {
            let comma = if index > 0 { "," } else { "" };
            write!(formatter, "{comma}{role}={name}")?;
        }
        Ok(())
    }
}

/// Whether something can be learned from records with these fields.
pub(super) fn learnable<'a>(names: impl Iterator<Item = &'a str> + Clone) -> bool {
    SETS.iter()
        .any(|set| set.iter().all(|&wanted| names.clone().any(|name| name == wanted)))
}

impl<'a> Record<'a> {
    /// What is learned from it.
    pub(super) fn line(mut self, columns: &Columns, vocab: usize) -> Result<Line, Flaw> {
        if !columns.is_empty() {
            self = self.renamed(columns)?;
        }
        if let Some(ids) = self.get("input_ids") {
            return self.ids(ids, vocab);
        }
        for field in ["messages", "conversations"] {
            if let Some(cell) = self.get(field) {
                return self.conversation(messages(field, cell, true)?);
            }
        }
        if let (Some(prompt), Some(completion)) = (self.get("prompt"), self.get("completion")) {
            return self.completion(prompt, completion);
        }
        if let (Some(instruction), Some(output)) = (self.get("instruction"), self.get("output")) {
            return self.instruction(instruction, output);
        }
        if let Some(text) = self.get("text") {
            let text = text.text("text")?;
            return match text.is_empty() {
                true => Err(Flaw::new("`text` is empty")),
                false => Ok(Line::Whole(text.into_owned())),
            };
        }
        Err(self.unknown())
    }

    /// The last field of that name, unless it is null.
    fn get(&self, name: &str) -> Option<Cell<'a>> {
        let (_, cell) = self.0.iter().rev().find(|(field, _)| field == name)?;
        match cell {
            Cell::Json(raw) if raw.get() == "null" => None,
            cell => Some(*cell),
        }
    }

    fn renamed(&self, columns: &Columns) -> Result<Self, Flaw> {
        let mut fields = Vec::with_capacity(columns.0.len());
        for (role, name) in &columns.0 {
            match self.get(name) {
                Some(cell) => fields.push((Cow::Owned(role.clone()), cell)),
                // An instruction may do without.
                None if role == "input" || role == "system" => {}
                None => return Err(Flaw::new(format!("`{name}` is missing"))),
            }
        }
        Ok(Self(fields))
    }

    fn unknown(&self) -> Flaw {
        for (half, other) in [
            ("prompt", "completion"),
            ("completion", "prompt"),
            ("instruction", "output"),
            ("output", "instruction"),
            ("labels", "input_ids"),
        ] {
            if self.get(half).is_some() {
                return Flaw::new(format!("`{half}` without `{other}`"));
            }
        }
        if self.get("role").is_some() && self.get("content").is_some() {
            return Flaw::new(
                "expected a whole conversation, found one message of it: put the messages into {\"messages\": [...]}",
            );
        }
        let expected = "expected `input_ids`, or `messages`, or `prompt` and `completion`, or `instruction` and `output`, or `text`";
        let mut found: Vec<String> = self.0.iter().map(|(name, _)| format!("`{name}`")).collect();
        if found.len() > 8 {
            found.truncate(8);
            found.push("…".to_owned());
        }
        let found = match found.is_empty() {
            true => "nothing".to_owned(),
            false => found.join(", "),
        };
        Flaw::new(format!(
            "{expected}; found {found} (--columns prompt=NAME,completion=NAME says which fields are meant)"
        ))
    }

    fn completion(&self, prompt: Cell<'a>, completion: Cell<'a>) -> Result<Line, Flaw> {
        if prompt.is_list() && completion.is_list() {
            let mut all = messages("prompt", prompt, false)?;
            all.extend(messages("completion", completion, true)?);
            return self.conversation(all);
        }
        let completion = completion.text("completion")?;
        if completion.is_empty() {
            return Err(Flaw::new("`completion` is empty"));
        }
        Ok(Line::Completion {
            prompt: prompt.text("prompt")?.into_owned(),
            completion: completion.into_owned(),
        })
    }

    fn instruction(&self, instruction: Cell<'a>, output: Cell<'a>) -> Result<Line, Flaw> {
        let mut question = instruction.text("instruction")?.into_owned();
        if let Some(input) = self.get("input") {
            let input = input.text("input")?;
            if !input.is_empty() {
                if !question.is_empty() {
                    question.push_str("\n\n");
                }
                question.push_str(&input);
            }
        }
        let output = output.text("output")?.into_owned();
        if output.is_empty() {
            return Err(Flaw::new("`output` is empty"));
        }
        self.conversation(vec![Message::new("user", question), Message::new(ASSISTANT, output)])
    }

    fn conversation(&self, mut messages: Vec<Message>) -> Result<Line, Flaw> {
        if let Some(system) = self.get("system") {
            let system = system.text("system")?;
            if !system.is_empty() && messages.first().is_none_or(|first| first.role != "system") {
                messages.insert(0, Message::new("system", system));
            }
        }
        if !messages.iter().any(|message| message.learned) {
            return Err(Flaw::new("no message of the assistant to learn"));
        }
        let tools = match self.get("tools") {
            Some(tools) => Some(tools.json("tools")?).filter(|tools| !tools.is_empty()),
            None => None,
        };
        Ok(Line::Conversation(Conversation { messages, tools }))
    }

    /// Token ids, without what a mask takes away.
    fn ids(&self, ids: Cell<'a>, vocab: usize) -> Result<Line, Flaw> {
        let given = ids.numbers("input_ids", "a list of token ids")?;
        if given.is_empty() {
            return Err(Flaw::new("`input_ids` is empty"));
        }
        // Labels are i32, so ids must also fit it.
        let largest = vocab.min(i32::MAX as usize);
        let known = |id: i64| usize::try_from(id).is_ok_and(|id| id < largest);
        if let Some(id) = given.iter().find(|&&id| !known(id)) {
            return Err(Flaw::new(format!(
                "`input_ids` holds {id}: the model's vocabulary has {vocab} entries"
            )));
        }
        let mut ids: Vec<u32> = given.iter().map(|&id| id as u32).collect();
        let count = ids.len();
        let as_long = |name: &str, length: usize| match length == count {
            true => Ok(()),
            false => Err(Flaw::new(format!(
                "`{name}` has {length} entries and `input_ids` {count}"
            ))),
        };
        let given = match self.get("labels") {
            Some(labels) => labels.numbers("labels", "a list of token ids and -100")?,
            None => given,
        };
        as_long("labels", given.len())?;
        if let Some(label) = given.iter().find(|&&id| id != i64::from(IGNORED_TARGET) && !known(id)) {
            return Err(Flaw::new(format!(
                "`labels` holds {label}: neither {IGNORED_TARGET} (not learned) nor an entry of the model's vocabulary of {vocab}"
            )));
        }
        let mut labels: Vec<i32> = given.iter().map(|&id| id as i32).collect();
        // Masks of what is learned, which stand in for labels.
        for name in ["completion_mask", "assistant_masks"] {
            let Some(mask) = self.get(name).filter(|_| self.get("labels").is_none()) else {
                continue;
            };
            let mask = mask.bits(name)?;
            as_long(name, mask.len())?;
            for (label, learned) in labels.iter_mut().zip(mask) {
                if !learned {
                    *label = IGNORED_TARGET;
                }
            }
        }
        let mut seen = 0..count;
        if let Some(mask) = self.get("attention_mask") {
            let mask = mask.bits("attention_mask")?;
            as_long("attention_mask", mask.len())?;
            seen = match (mask.iter().position(|&bit| bit), mask.iter().rposition(|&bit| bit)) {
                (Some(first), Some(last)) => first..last + 1,
                _ => return Err(Flaw::new("`attention_mask` leaves nothing to see")),
            };
            if mask[seen.clone()].contains(&false) {
                return Err(Flaw::new(
                    "`attention_mask` hides tokens in the middle, which cannot be done here: only padding at the ends can be masked",
                ));
            }
        }
        if let Some(positions) = self.get("position_ids") {
            let positions = positions.numbers("position_ids", "a list of whole numbers")?;
            as_long("position_ids", positions.len())?;
            let counts_up = |from: i64| {
                positions[seen.clone()]
                    .iter()
                    .copied()
                    .eq(from..from + seen.len() as i64)
            };
            if !counts_up(0) {
                return Err(Flaw::new(
                    "`position_ids` do not count 0, 1, 2, … over the tokens that are seen: packed or shifted sequences cannot be read; give each sequence a line of its own",
                ));
            }
        }
        if let Some(types) = self.get("token_type_ids")
            && !types.numbers("token_type_ids", "a list of whole numbers")?.is_empty()
        {
            return Err(Flaw::new(
                "`token_type_ids` would be added to what the model sees, which cannot be done here: leave the field out",
            ));
        }
        ids.truncate(seen.end);
        ids.drain(..seen.start);
        labels.truncate(seen.end);
        labels.drain(..seen.start);
        Ok(Line::Ids(Example { ids, labels }))
    }
}

impl<'a> Cell<'a> {
    fn is_list(self) -> bool {
        matches!(self, Cell::Json(raw) if raw.get().starts_with('['))
    }

    fn text(self, name: &str) -> Result<Cow<'a, str>, Flaw> {
        match self {
            Cell::Text(text) => Ok(Cow::Borrowed(text)),
            Cell::Json(raw) => match self.json_start() {
                "a string" => serde_json::from_str(raw.get())
                    .map(Cow::Owned)
                    .map_err(|_| Flaw::new(format!("`{name}` holds half of a character"))),
                kind => Err(Flaw::new(format!("`{name}` must be a string, found {kind}"))),
            },
        }
    }

    fn written(self) -> &'a str {
        match self {
            Cell::Json(raw) => raw.get(),
            Cell::Text(text) => text,
        }
    }

    /// A list of whole numbers; `what` says what they must be.
    fn numbers(self, name: &str, what: &str) -> Result<Vec<i64>, Flaw> {
        serde_json::from_str(self.written()).map_err(|_| Flaw::new(format!("`{name}` must be {what}")))
    }

    fn json(self, name: &str) -> Result<Json, Flaw> {
        // A string that holds JSON, as tables of published sets have it.
        let json = match self.json_start() {
            "a string" => self.text(name)?,
            _ => Cow::Borrowed(self.written()),
        };
        serde_json::from_str(&json).map_err(|_| Flaw::new(format!("`{name}` must be JSON")))
    }

    /// A mask of zeros and ones.
    fn bits(self, name: &str) -> Result<Vec<bool>, Flaw> {
        let wrong = || Flaw::new(format!("`{name}` must be a list of 0 and 1"));
        let Json::List(values) = self.json(name)? else {
            return Err(wrong());
        };
        values
            .iter()
            .map(|value| match value {
                Json::Bool(bit) => Ok(*bit),
                Json::Number(number) if number.as_f64() == Some(0.0) => Ok(false),
                Json::Number(number) if number.as_f64() == Some(1.0) => Ok(true),
                _ => Err(wrong()),
            })
            .collect()
    }

    fn json_start(self) -> &'static str {
        match self {
            Cell::Text(_) => "a string",
            Cell::Json(raw) => match raw.get().as_bytes().first() {
                Some(b'"') => "a string",
                Some(b'[') => "a list",
                Some(b'{') => "an object",
                Some(b't' | b'f') => "a truth value",
                Some(b'n') => "null",
                _ => "a number",
            },
        }
    }
}

/// A parser's words for a value that stands on one line of its own.
pub(super) fn in_line(error: &serde_json::Error) -> String {
    error.to_string().replace(" at line 1 column ", " at column ")
}

// ---- conversations

/// The messages in `cell`, the assistant's to be learned if `learned`.
fn messages(field: &str, cell: Cell<'_>, learned: bool) -> Result<Vec<Message>, Flaw> {
    let Json::List(list) = cell.json(field)? else {
        return Err(Flaw::new(format!("`{field}` must be a list of messages")));
    };
    if list.is_empty() {
        return Err(Flaw::new(format!("`{field}` is empty")));
    }
    list.into_iter()
        .enumerate()
        .map(|(index, json)| {
            message(json, learned).map_err(|flaw| Flaw::new(format!("`{field}`, message {}: {flaw}", index + 1)))
        })
        .collect()
}

/// The messages of a JSON text: a list of them, or an object with `messages` or `conversations`.
///
/// # Errors
/// A [`Flaw`] that says which message is wrong.
pub fn conversation(text: &str) -> Result<Conversation, Flaw> {
    let text = text.trim_start_matches('\u{feff}').trim();
    let raw: &RawValue =
        serde_json::from_str(text).map_err(|error| Flaw::new(format!("it is not JSON: {}", in_line(&error))))?;
    let record = match raw.get().starts_with('{') {
        true => serde_json::from_str::<Record<'_>>(raw.get()).map_err(|error| Flaw::new(in_line(&error)))?,
        false => Record(vec![(Cow::Borrowed("messages"), Cell::Json(raw))]),
    };
    let field = ["messages", "conversations"]
        .into_iter()
        .find_map(|field| Some((field, record.get(field)?)));
    let (field, cell) = field.ok_or_else(|| Flaw::new("expected a list of messages, or an object with `messages`"))?;
    let tools = record.get("tools").map(|tools| tools.json("tools")).transpose()?;
    Ok(Conversation {
        messages: messages(field, cell, false)?,
        tools: tools.filter(|tools| !tools.is_empty()),
    })
}

fn message(json: Json, learned: bool) -> Result<Message, Flaw> {
    let Json::Object(fields) = json else {
        return Err(Flaw::new(format!(
            "expected an object with `role` and `content`, found {}",
            json.kind()
        )));
    };
    let (mut role, mut content, mut weight) = (None, None, None);
    let mut others: Vec<(String, Json)> = Vec::new();
    for (name, value) in fields {
        match name.as_str() {
            "role" | "from" => role = Some(value),
            "content" | "value" => content = Some(value),
            "weight" => weight = Some(value),
            _ => others.push((name, value)),
        }
    }
    let role = match role {
        Some(Json::Text(role)) if !role.is_empty() => known_role(role),
        _ => return Err(Flaw::new("`role` (or `from`) must say who speaks")),
    };
    let says_otherwise = ["tool_calls", "reasoning_content", "thinking", "reasoning"];
    let content = match content {
        Some(content) if content != Json::Null => Some(spoken(content)?),
        _ if others
            .iter()
            .any(|(name, value)| says_otherwise.contains(&name.as_str()) && !value.is_empty()) =>
        {
            None
        }
        _ => return Err(Flaw::new("`content` (or `value`) is missing")),
    };
    let weighed = match weight {
        None | Some(Json::Null) => true,
        Some(Json::Bool(weight)) => weight,
        Some(Json::Number(weight)) if weight.as_f64() == Some(0.0) => false,
        Some(Json::Number(weight)) if weight.as_f64() == Some(1.0) => true,
        Some(_) => return Err(Flaw::new("`weight` must be 0 (not learned) or 1")),
    };
    name_reasoning(&mut others);
    Ok(Message {
        learned: learned && weighed && role == ASSISTANT,
        role,
        content,
        fields: others,
    })
}

/// The names that templates know for those of other collections.
fn known_role(role: String) -> String {
    match role.as_str() {
        "human" => "user".to_owned(),
        "gpt" | "model" | "bot" | "chatgpt" | "ai" | "bard" | "bing" => ASSISTANT.to_owned(),
        "observation" | "function_response" => "tool".to_owned(),
        _ => role,
    }
}

/// What a message says: a string, or a list of parts of text.
fn spoken(content: Json) -> Result<String, Flaw> {
    let parts = match content {
        Json::Text(text) => return Ok(text),
        Json::List(parts) => parts,
        other => return Err(Flaw::new(format!("`content` must be a string, found {}", other.kind()))),
    };
    let mut text = String::new();
    for part in parts {
        let fields = match part {
            Json::Text(part) => {
                text.push_str(&part);
                continue;
            }
            Json::Object(fields) => fields,
            other => return Err(Flaw::new(format!("`content` holds {}", other.kind()))),
        };
        let field = |wanted: &str| fields.iter().find(|(name, _)| name == wanted).map(|(_, value)| value);
        match (field("type"), field("text")) {
            (Some(Json::Text(kind)), _) if !matches!(kind.as_str(), "text" | "input_text" | "output_text") => {
                return Err(Flaw::new(format!(
                    "`content` holds a part of type `{kind}`: only text can be learned"
                )));
            }
            (_, Some(Json::Text(part))) => text.push_str(part),
            _ => return Err(Flaw::new("`content` holds a part without `text`")),
        }
    }
    Ok(text)
}

/// Reasoning goes by three names; templates read the first, or `thinking`.
fn name_reasoning(fields: &mut Vec<(String, Json)>) {
    let given = ["reasoning_content", "thinking", "reasoning"]
        .into_iter()
        .find_map(|name| {
            let (_, value) = fields
                .iter()
                .find(|(field, value)| field == name && *value != Json::Null)?;
            Some(value.clone())
        });
    let Some(reasoning) = given else { return };
    fields.retain(|(name, _)| name != "reasoning_content");
    if !fields.iter().any(|(name, _)| name == "thinking") {
        fields.push(("thinking".to_owned(), reasoning.clone()));
    }
    fields.push(("reasoning_content".to_owned(), reasoning));
}
