//! Conversations: what their text is under a chat template, and which parts of it are learned.
//!
//! A template is a program that turns messages into one text; who runs it is left open ([`Render`]): natively a Jinja
//! interpreter in this process, in a browser one in JavaScript. What the assistant says is found by asking the template
//! again with one message replaced, so nothing here knows any model's way of writing a conversation.

use std::ops::Range;

use serde::ser::{Serialize, SerializeMap, Serializer};

use super::Flaw;
use super::json::Json;

/// The ChatML template, for models that bring none.
pub const CHATML: &str = "\
{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// The role whose words are learned.
pub(crate) const ASSISTANT: &str = "assistant";

/// Stands for what a message says while its place is looked for. Upper and lower case, digits and no white space: no
/// template is known to change it.
const PROBE: &str = "Qx7sflllmProbe9Zk";

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool`, or what else the template knows.
    pub role: String,
    /// `None` where a message only calls tools.
    pub content: Option<String>,
    /// Whether it is learned; only the assistant's words can be.
    pub learned: bool,
    /// Further fields that a template may read, such as `tool_calls`.
    pub fields: Vec<(String, Json)>,
}

impl Message {
    /// A message of text alone, learned if it is the assistant's.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        let role = role.into();
        Self {
            learned: role == ASSISTANT,
            role,
            content: Some(content.into()),
            fields: Vec::new(),
        }
    }

    fn bytes(&self) -> usize {
        self.content.as_ref().map_or(0, String::len)
    }

    fn calls_tools(&self) -> bool {
        self.fields
            .iter()
            .any(|(name, value)| name == "tool_calls" && !value.is_empty())
    }

    fn probe_content(&mut self) -> bool {
        self.content = Some(PROBE.to_owned());
        true
    }

    /// Puts the probe for the name of the first tool that is called, if one is.
    fn probe_call(&mut self) -> bool {
        let calls = self.fields.iter_mut().find(|(name, _)| name == "tool_calls");
        let Some((_, Json::List(calls))) = calls else {
            return false;
        };
        let Some(call) = calls.first_mut() else { return false };
        let function = match call.field_mut("function") {
            Some(_) => call.field_mut("function"),
            None => Some(call),
        };
        match function.and_then(|function| function.field_mut("name")) {
            Some(name) => {
                *name = Json::Text(PROBE.to_owned());
                true
            }
            None => false,
        }
    }
}

/// Messages, and the tools they may call.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conversation {
    pub messages: Vec<Message>,
    pub tools: Option<Json>,
}

impl Serialize for Message {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("role", &self.role)?;
        map.serialize_entry("content", &self.content)?;
        for (name, value) in &self.fields {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

impl Serialize for Conversation {
    /// The variables of a template: `messages` and `tools`.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(2))?;
        map.serialize_entry("messages", &self.messages)?;
        map.serialize_entry("tools", &self.tools)?;
        map.end()
    }
}

/// A chat template that can be run.
pub trait Render {
    /// The text of a conversation, with the beginning of an answer after it if `add_generation_prompt`.
    ///
    /// # Errors
    /// A [`Flaw`] when the template refuses the conversation, or fails.
    fn render(&self, conversation: &Conversation, add_generation_prompt: bool) -> Result<String, Flaw>;

    /// Tokens of the vocabulary that stand for no text, such as the one that ends a turn.
    fn special_tokens(&self) -> &[String];
}

/// A conversation as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transcript {
    pub text: String,
    /// Byte ranges of `text`, in order: what the assistant says, each with the token that ends its turn.
    pub learned: Vec<Range<usize>>,
}

/// What a template writes around every answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manner {
    /// Written before an answer, and in a prompt for one; empty where a template has no such beginning.
    opening: String,
    /// Written after an answer: as far as the first special token, else all of it.
    closing: String,
}

impl Manner {
    /// Finds it out from a conversation of one question and one answer.
    ///
    /// # Errors
    /// A [`Flaw`] when the template fails, or does not show what the assistant says.
    pub fn of(template: &dyn Render) -> Result<Self, Flaw> {
        let mut conversation = Conversation {
            messages: vec![Message::new("user", "x")],
            tools: None,
        };
        let asked = template.render(&conversation, false)?;
        let prompt = template.render(&conversation, true)?;
        let opening = prompt.strip_prefix(&asked).unwrap_or_default().to_owned();
        conversation.messages.push(Message::new(ASSISTANT, PROBE));
        let answered = template.render(&conversation, false)?;
        let (_, after) = answered
            .split_once(PROBE)
            .ok_or_else(|| Flaw::new("the chat template does not show what the assistant says"))?;
        let closing = first_special(after, template.special_tokens()).map_or(after, |end| &after[..end]);
        Ok(Self {
            opening,
            closing: closing.to_owned(),
        })
    }

    /// What follows an answer and ends its turn.
    pub fn closing(&self) -> &str {
        &self.closing
    }

    /// The text of `conversation`, and what of it is learned. `limit` is the number of bytes that matter: messages
    /// after them are left out.
    ///
    /// Each answer's place is where the text changes when that answer is replaced. That holds for templates that
    /// strip what is said, put system prompts in front, or leave earlier reasoning out. What a template writes between
    /// the beginning of a turn, as a prompt ends with it, and the answer is learned with the answer, since the model
    /// has to write it: reasoning, or the empty mark of it.
    ///
    /// # Errors
    /// A [`Flaw`] when the template refuses the conversation, or does not show what is to be learned.
    pub fn lay_out(
        &self,
        template: &dyn Render,
        mut conversation: Conversation,
        limit: usize,
    ) -> Result<Transcript, Flaw> {
        shorten(&mut conversation.messages, limit);
        let text = template.render(&conversation, false)?;
        let mut learned = Vec::new();
        let mut turn_from = 0;
        for index in 0..conversation.messages.len() {
            let message = &conversation.messages[index];
            if message.role != ASSISTANT || (!message.learned && self.opening.is_empty()) {
                continue;
            }
            let calls_tools = message.calls_tools();
            let Some((before, after)) = self.around(template, &mut conversation, index)? else {
                return Err(Flaw::new(format!(
                    "message {}: the chat template does not show what the assistant says there",
                    index + 1
                )));
            };
            let from = common_prefix(&text, &before);
            let to = text.len() - common_suffix(&text[from..], &after);
            if from > limit {
                break;
            }
            let from = self.turn_start(&text, turn_from, from);
            let to = self.turn_end(&text, to, calls_tools);
            turn_from = to;
            let message = &conversation.messages[index];
            let said = text[from..to].strip_suffix(&self.closing).unwrap_or(&text[from..to]);
            if calls_tools && said == message.content.as_deref().unwrap_or_default() {
                return Err(Flaw::new(format!(
                    "message {}: the chat template does not write calls of tools",
                    index + 1
                )));
            }
            if message.learned {
                learned.push(from..to);
            }
        }
        Ok(Transcript { text, learned })
    }

    /// What stands before and after the answer of message `index`, or before and after the name of the tool it calls.
    fn around(
        &self,
        template: &dyn Render,
        conversation: &mut Conversation,
        index: usize,
    ) -> Result<Option<(String, String)>, Flaw> {
        let message = conversation.messages[index].clone();
        let mut found = None;
        let probes: [fn(&mut Message) -> bool; 2] = [Message::probe_content, Message::probe_call];
        for probe in probes {
            if !probe(&mut conversation.messages[index]) {
                continue;
            }
            let probed = template.render(conversation, false);
            conversation.messages[index] = message.clone();
            if let Some((before, after)) = probed?.split_once(PROBE) {
                found = Some((before.to_owned(), after.to_owned()));
                break;
            }
        }
        Ok(found)
    }

    /// Where a turn begins whose answer is at `answer`, not before `after`.
    fn turn_start(&self, text: &str, after: usize, answer: usize) -> usize {
        if self.opening.is_empty() || after >= answer {
            return answer;
        }
        text[after..answer]
            .rfind(&self.opening)
            .map_or(answer, |at| after + at + self.opening.len())
    }

    /// Where a turn ends whose answer ends at `answer`. Calls of tools stand between the answer and its end.
    fn turn_end(&self, text: &str, answer: usize, calls_tools: bool) -> usize {
        let rest = &text[answer..];
        if rest.starts_with(&self.closing) {
            return answer + self.closing.len();
        }
        match rest.find(&self.closing) {
            Some(at) if calls_tools => answer + at + self.closing.len(),
            _ => answer,
        }
    }
}

/// Leaves messages out that begin after `limit` bytes, except for the one that follows: whether an answer is the last
/// one is of account to some templates.
fn shorten(messages: &mut Vec<Message>, limit: usize) {
    let mut bytes = 0usize;
    let past = messages.iter().position(|message| {
        bytes = bytes.saturating_add(message.bytes());
        bytes > limit
    });
    if let Some(past) = past {
        messages.truncate(past + 2);
    }
}

/// The end of the first special token in `text`.
fn first_special(text: &str, special_tokens: &[String]) -> Option<usize> {
    special_tokens
        .iter()
        .filter(|token| !token.is_empty())
        .filter_map(|token| Some((text.find(token.as_str())?, token.len())))
        // The longest of those that begin together.
        .min_by_key(|&(at, length)| (at, usize::MAX - length))
        .map(|(at, length)| at + length)
}

/// Bytes that both begin with, a whole number of `a`'s characters.
fn common_prefix(a: &str, b: &str) -> usize {
    let mut length = a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    while !a.is_char_boundary(length) {
        length -= 1;
    }
    length
}

/// Bytes that both end with, a whole number of `a`'s characters.
fn common_suffix(a: &str, b: &str) -> usize {
    let mut length = a.bytes().rev().zip(b.bytes().rev()).take_while(|(a, b)| a == b).count();
    while !a.is_char_boundary(a.len() - length) {
        length -= 1;
    }
    length
}
