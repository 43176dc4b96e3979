//! A data file on its way to examples, with what only JavaScript has: the tokenizer and the chat template's engine.
//!
//! Separate from the client because the page reads a file before it joins, to show what is in it.

use js_sys::{Array, Function, Int32Array, Uint32Array};
use wasm_bindgen::prelude::*;

use crate::data::json::Json;
use crate::data::reader::Document;
use crate::data::{Conversation, DataError, Encoded, Example, Flaw, Marks, Options, Render};

/// A data file on its way to examples. Chat templates are run and texts are tokenised by JavaScript: first
/// `renderNext` until there is no conversation left, then `takeTranscript` for each of `transcripts`, then `assemble` with
/// the ids of `texts`.
#[wasm_bindgen]
pub struct DataReader {
    document: Option<Document>,
    chats: Vec<Encoded>,
    examples: Vec<Example>,
}

#[wasm_bindgen]
impl DataReader {
    /// Recognises what a file holds and parses it; `seq` and `vocab` are the longest example and the vocabulary's size.
    ///
    /// # Errors
    /// A JavaScript `Error` with file, line and reason.
    #[wasm_bindgen(constructor)]
    pub fn new(bytes: &[u8], name: &str, seq: usize, vocab: usize) -> Result<DataReader, JsError> {
        Self::begin(bytes, name, &Options::new(seq, vocab))
    }

    /// Conversations that the file holds.
    pub fn conversations(&self) -> usize {
        self.document.as_ref().map_or(0, Document::conversations)
    }

    /// Lays the next conversation out as text; `false` when there is none left. `render` is given the template's
    /// variables as JSON and whether the beginning of an answer is wanted, and gives back the text; no value where the
    /// model has no chat template. `special_tokens` are those that stand for no text.
    ///
    /// # Errors
    /// A JavaScript `Error` with file, line and reason.
    #[wasm_bindgen(js_name = renderNext)]
    pub fn render_next(&mut self, render: Option<Function>, special_tokens: Vec<String>) -> Result<bool, JsError> {
        let template = render.map(|render| Template { render, special_tokens });
        let template = template.as_ref().map(|template| template as &dyn Render);
        match &mut self.document {
            Some(document) => Ok(document.render_next(template)?),
            None => Ok(false),
        }
    }

    /// The texts to tokenise.
    pub fn texts(&self) -> Vec<String> {
        self.document
            .as_ref()
            .map_or_else(Vec::new, |document| document.texts().to_vec())
    }

    /// The texts of conversations, to tokenise with the byte at which each token ends.
    pub fn transcripts(&self) -> Vec<String> {
        self.document
            .as_ref()
            .map_or_else(Vec::new, |document| document.transcripts().to_vec())
    }

    /// Takes the ids of the next transcript, and the byte of it at which each of them ends.
    #[wasm_bindgen(js_name = takeTranscript)]
    pub fn take_transcript(&mut self, ids: Vec<u32>, ends: Vec<u32>) {
        self.chats.push(Encoded { ids, ends });
    }

    /// Makes the examples, of the ids of all texts, one after the other, and how many each text has; `begin` and `end`
    /// are put around texts.
    ///
    /// # Errors
    /// A JavaScript `Error`, when they do not fit the texts or the model.
    pub fn assemble(&mut self, ids: &[u32], lengths: &[u32], begin: Vec<u32>, end: Option<u32>) -> Result<(), JsError> {
        let Some(document) = self.document.take() else {
            return Ok(());
        };
        let mut rest = ids;
        let mut texts = Vec::with_capacity(lengths.len());
        for &length in lengths {
            let (text, after) = rest.split_at_checked(length as usize).ok_or(DataError::TextCount {
                expected: lengths.len(),
                found: texts.len(),
            })?;
            texts.push(text.to_vec());
            rest = after;
        }
        let chats = std::mem::take(&mut self.chats);
        self.examples = document.assemble(texts, chats, &Marks { begin, end })?.examples;
        Ok(())
    }

    /// Ids and labels of example `index` as `[ids, labels]`; nothing beyond the last.
    pub fn example(&self, index: usize) -> Option<Array> {
        let example = self.examples.get(index)?;
        Some(Array::of2(
            &Uint32Array::from(&example.ids[..]).into(),
            &Int32Array::from(&example.labels[..]).into(),
        ))
    }
}

impl DataReader {
    /// What has been made.
    pub(super) fn into_examples(self) -> Vec<Example> {
        self.examples
    }

    pub(super) fn begin(bytes: &[u8], name: &str, options: &Options) -> Result<Self, JsError> {
        Ok(Self {
            document: Some(Document::parse(bytes, name, options)?),
            chats: Vec::new(),
            examples: Vec::new(),
        })
    }
}

/// A chat template that JavaScript runs.
struct Template {
    render: Function,
    special_tokens: Vec<String>,
}

impl Render for Template {
    fn render(&self, conversation: &Conversation, add_generation_prompt: bool) -> Result<String, Flaw> {
        let fields = conversation.messages.iter().flat_map(|message| &message.fields);
        let mut values = fields.map(|(_, value)| value).chain(&conversation.tools);
        if values.any(Json::has_whole_float) {
            return Err(Flaw::new(
                "a number like 1.0 in it is written as 1 in a browser; write 1, or use the native client (sflllm join)",
            ));
        }
        let variables = serde_json::to_string(conversation).map_err(|error| Flaw::new(error.to_string()))?;
        let text = self
            .render
            .call2(&JsValue::NULL, &variables.into(), &add_generation_prompt.into())
            .map_err(|error| {
                let message = error
                    .dyn_into::<js_sys::Error>()
                    .map(|error| String::from(error.message()));
                Flaw::new(format!(
                    "the chat template refuses it: {}",
                    message.unwrap_or_else(|_| "no reason given".to_owned())
                ))
            })?;
        text.as_string()
            .ok_or_else(|| Flaw::new("the chat template writes no text"))
    }

    fn special_tokens(&self) -> &[String] {
        &self.special_tokens
    }
}
