//! A `tokenizer.json` as the vocabulary in a GGUF file's metadata, the way back of `tokenizer`.
//!
//! llama.cpp knows the rules that split text by their names only, so a rule is written under the name of the known one
//! that it is, step by step, and any other is refused.

use serde_json::{Map, Value as Json};

use super::metadata::{Metadata, Value};
use super::tokenizer::{
    ADD_BOS_KEY, BOS_KEY, CONTROL, EOS_KEY, EOT_KEY, GgufTokenizer, KINDS_KEY, MERGES_KEY, MODEL_KEY, PRE_KEY, Pre,
    TEMPLATE_KEY, TOKENS_KEY, UNUSED, USER_DEFINED,
};
use super::{GgufError, shown};

/// What errors call the tokenizer.
const FILE: &str = "tokenizer.json";
const NORMAL: i64 = 1;

impl GgufTokenizer {
    /// Writes the tokenizer of a model with `rows` token embeddings; rows without a token get an unused one.
    ///
    /// # Errors
    /// [`GgufError::Unsupported`] names what llama.cpp's tokenizers do not have, [`GgufError::Damaged`] what is wrong.
    pub fn write(&self, rows: usize, metadata: &mut Metadata) -> Result<(), GgufError> {
        let json: Json = serde_json::from_str(&self.json).map_err(|error| damaged(error.to_string()))?;
        let model = &json["model"];
        let pre = check(&json)?;
        let (tokens, kinds) = tokens(&json, rows)?;
        metadata.set(MODEL_KEY, "gpt2");
        metadata.set(PRE_KEY, pre.name());
        metadata.set(TOKENS_KEY, tokens);
        metadata.set(KINDS_KEY, kinds);
        metadata.set(MERGES_KEY, merges(&model["merges"])?);
        // Without them llama.cpp takes token 11.
        let bos = self.bos.or(self.eos);
        let end_of_turn = self.stop.iter().copied().find(|&id| Some(id) != self.eos);
        for (key, id) in [(BOS_KEY, bos), (EOS_KEY, self.eos), (EOT_KEY, end_of_turn)] {
            if let Some(id) = id {
                metadata.set(key, id);
            }
        }
        metadata.set(ADD_BOS_KEY, self.add_bos && self.bos.is_some());
        if let Some(template) = &self.chat_template {
            metadata.set(TEMPLATE_KEY, template.as_str());
        }
        Ok(())
    }
}

fn damaged(reason: String) -> GgufError {
    GgufError::Damaged {
        file: FILE.to_owned(),
        reason,
    }
}

fn unsupported(what: String, supported: &'static str) -> GgufError {
    GgufError::Unsupported {
        file: FILE.to_owned(),
        what,
        supported,
    }
}

/// A step of splitting.
#[derive(Debug, PartialEq, Eq)]
enum Step<'a> {
    /// Every digit alone, or all that stand together.
    Digits { alone: bool },
    /// What the pattern matches, and what stands between.
    Split(&'a str),
    /// Bytes as letters, after GPT-2's pattern or without it.
    ByteLevel { pattern: bool },
}

/// `None` for a step that no rule of llama.cpp has.
fn steps(pre_tokenizer: &Json) -> Option<Vec<Step<'_>>> {
    let flag = |name: &str, default: bool| match &pre_tokenizer[name] {
        Json::Null => Some(default),
        value => value.as_bool(),
    };
    Some(match pre_tokenizer["type"].as_str()? {
        "Sequence" => {
            let parts = pre_tokenizer["pretokenizers"].as_array()?;
            let parts: Option<Vec<Vec<Step<'_>>>> = parts.iter().map(steps).collect();
            parts?.into_iter().flatten().collect()
        }
        "Digits" => vec![Step::Digits {
            alone: flag("individual_digits", false)?,
        }],
        "Split" => {
            let isolated = pre_tokenizer["behavior"].as_str() == Some("Isolated") && !flag("invert", false)?;
            let pattern = pre_tokenizer["pattern"]["Regex"].as_str().filter(|_| isolated)?;
            vec![Step::Split(pattern)]
        }
        "ByteLevel" if !flag("add_prefix_space", true)? => vec![Step::ByteLevel {
            pattern: flag("use_regex", true)?,
        }],
        _ => return None,
    })
}

/// Checks that llama.cpp's byte-level BPE does what this tokenizer does; the rule by which it splits.
fn check(json: &Json) -> Result<Pre, GgufError> {
    let model = &json["model"];
    if model["type"].as_str() != Some("BPE") {
        let what = format!("a tokenizer of the kind {}", shown(&model["type"].to_string()));
        return Err(unsupported(what, "byte-level BPE is"));
    }
    for field in ["continuing_subword_prefix", "end_of_word_suffix"] {
        if model[field].as_str().is_some_and(|text| !text.is_empty()) {
            let what = format!("`{field}` = {}", shown(&model[field].to_string()));
            return Err(unsupported(what, "a vocabulary without it is"));
        }
    }
    if model["byte_fallback"] == true {
        return Err(unsupported("`byte_fallback` = true".to_owned(), "byte-level BPE is"));
    }
    let normalizer = &json["normalizer"];
    if !normalizer.is_null() && normalizer["type"] != "NFC" {
        let what = format!("the normalizer {}", shown(&normalizer.to_string()));
        return Err(unsupported(what, "none, and NFC, are"));
    }
    let pre_tokenizer = &json["pre_tokenizer"];
    let found = steps(pre_tokenizer);
    let is = |pre: &Pre| found.is_some() && found == steps(&pre.pre_tokenizer());
    let pre = Pre::ALL.into_iter().find(is).ok_or_else(|| {
        unsupported(
            format!("the splitting rule {}", shown(&pre_tokenizer.to_string())),
            "those that llama.cpp calls gpt-2, smollm, llama-bpe and qwen2 are",
        )
    })?;
    let ignores = model["ignore_merges"] == true;
    if ignores != pre.ignores_merges() {
        return Err(unsupported(
            format!("`ignore_merges` = {ignores} with the splitting rule {}", pre.name()),
            "true with llama-bpe's rule, and false with others, is",
        ));
    }
    Ok(pre)
}

/// Every row's token, and its kind.
fn tokens(json: &Json, rows: usize) -> Result<(Vec<String>, Vec<i32>), GgufError> {
    let vocab = json["model"]["vocab"]
        .as_object()
        .ok_or_else(|| damaged("it has no vocabulary".to_owned()))?;
    let mut places: Vec<Option<(&str, i64)>> = vec![None; rows];
    let mut put = |token, id: &Json, kind| match id.as_u64().and_then(|id| places.get_mut(id as usize)) {
        Some(place) if place.is_none_or(|(before, _)| before == token) => {
            *place = Some((token, kind));
            Ok(())
        }
        Some(place) => Err(damaged(format!(
            "\"{}\" and \"{}\" are both token {id}",
            shown(place.map_or("", |(before, _)| before)),
            shown(token)
        ))),
        None => Err(damaged(format!(
            "\"{}\" is token {id}, and the model has {rows} rows",
            shown(token)
        ))),
    };
    for (token, id) in vocab {
        put(token, id, NORMAL)?;
    }
    let added = json["added_tokens"].as_array();
    for token in added.into_iter().flatten() {
        let content = token["content"]
            .as_str()
            .ok_or_else(|| damaged("an added token has no `content`".to_owned()))?;
        let kind = if token["special"] == true {
            CONTROL
        } else {
            USER_DEFINED
        };
        put(content, &token["id"], kind)?;
    }
    let mut tokens = Vec::with_capacity(rows);
    let mut kinds = Vec::with_capacity(rows);
    for (id, place) in places.into_iter().enumerate() {
        let (token, kind) = match place {
            Some((token, kind)) => (token.to_owned(), kind),
            None => (unused(id, vocab), UNUSED),
        };
        tokens.push(token);
        kinds.push(kind as i32);
    }
    Ok((tokens, kinds))
}

/// A text for a row that no token has. llama.cpp wants every text once.
fn unused(id: usize, vocab: &Map<String, Json>) -> String {
    let mut text = format!("[PAD{id}]");
    while vocab.contains_key(&text) {
        text.push('_');
    }
    text
}

/// The merges as GGUF has them: two parts and a space. Files have them so too, or as pairs.
fn merges(merges: &Json) -> Result<Value, GgufError> {
    let merges = merges
        .as_array()
        .ok_or_else(|| damaged("it has no merges".to_owned()))?;
    let text = |merge: &Json| {
        let text = match merge {
            Json::String(text) => text.clone(),
            pair => format!("{} {}", pair[0].as_str()?, pair[1].as_str()?),
        };
        (text.matches(' ').count() == 1).then_some(text)
    };
    let texts: Option<Vec<String>> = merges.iter().map(text).collect();
    texts
        .map(Value::from)
        .ok_or_else(|| damaged("a merge is not of two parts without spaces".to_owned()))
}
