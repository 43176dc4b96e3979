//! What a tokenizer file may not ask for: files come from strangers, and the library that runs them trusts them.

use std::borrow::Cow;
use std::collections::HashMap;

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::super::Flaw;

/// Text may grow to so many times its bytes before it is cut into tokens. Unicode's own forms make up to 11 of one.
const MOST_GROWTH: u64 = 64;
/// Text that may be put before or after a text.
const MOST_ADDED: usize = 256;

/// The parts of a `tokenizer.json` that are checked. The vocabulary may be large: it is read in place.
#[derive(Deserialize)]
struct Parts<'a> {
    #[serde(borrow, default)]
    model: Option<Model<'a>>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    decoder: Value,
}

#[derive(Deserialize)]
struct Model<'a> {
    #[serde(borrow, default)]
    vocab: Option<&'a RawValue>,
    #[serde(borrow, default)]
    merges: Option<&'a RawValue>,
    #[serde(default)]
    continuing_subword_prefix: Option<String>,
}

#[derive(Deserialize, PartialEq, Eq, Hash)]
struct Token<'a>(#[serde(borrow)] Cow<'a, str>);

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge<'a> {
    Pair(#[serde(borrow)] Cow<'a, str>, #[serde(borrow)] Cow<'a, str>),
    Joined(#[serde(borrow)] Cow<'a, str>),
}

/// Refuses what the library would panic on or blow up with; the reason says what.
pub(super) fn check(json: &[u8]) -> Result<(), Flaw> {
    let parts: Parts<'_> = serde_json::from_slice(json)
        .map_err(|error| Flaw::new(format!("it is not the JSON of a tokenizer: {error}")))?;
    if let Some(model) = &parts.model {
        check_merges(model)?;
    }
    for (what, part) in [("normalizer", &parts.normalizer), ("decoder", &parts.decoder)] {
        let growth = growth(part, what)?;
        if growth > MOST_GROWTH {
            return Err(Flaw::new(format!(
                "its {what} makes text up to {growth} times as long, and at most {MOST_GROWTH} times is allowed"
            )));
        }
    }
    Ok(())
}

/// The library indexes by the length of a merged token before it looks the token up, so a merge that is not in the
/// vocabulary has to be found first.
fn check_merges(model: &Model<'_>) -> Result<(), Flaw> {
    let (Some(vocab), Some(merges)) = (model.vocab, model.merges) else {
        return Ok(());
    };
    // Other kinds of model have lists here.
    let Ok(vocab) = serde_json::from_str::<HashMap<Token<'_>, u64>>(vocab.get()) else {
        return Ok(());
    };
    let merges: Vec<Merge<'_>> =
        serde_json::from_str(merges.get()).map_err(|_| Flaw::new("its merges are not pairs of tokens"))?;
    let prefix = model.continuing_subword_prefix.as_deref().unwrap_or("");
    for merge in &merges {
        let (left, right) = match merge {
            Merge::Pair(left, right) => (left.as_ref(), right.as_ref()),
            Merge::Joined(both) => both
                .split_once(' ')
                .ok_or_else(|| Flaw::new(format!("{both:?} is not a merge")))?,
        };
        let joined = format!("{left}{}", right.strip_prefix(prefix).unwrap_or(right));
        if !vocab.contains_key(&Token(joined.into())) || right.len() < prefix.len() {
            return Err(Flaw::new(format!(
                "the merge of {left:?} and {right:?} is not in its vocabulary"
            )));
        }
    }
    Ok(())
}

/// How many times longer a normalizer or decoder can make a text.
pub(super) fn growth(part: &Value, what: &str) -> Result<u64, Flaw> {
    let Some(kind) = part["type"].as_str() else {
        return Ok(1);
    };
    let length = |text: &Value| text.as_str().map_or(0, str::len);
    Ok(match kind {
        "Sequence" => {
            let list = part["normalizers"].as_array().or_else(|| part["decoders"].as_array());
            let mut product = 1u64;
            for item in list.into_iter().flatten() {
                product = product.saturating_mul(growth(item, what)?);
            }
            product
        }
        "Replace" => {
            let content = length(&part["content"]);
            let shortest = match &part["pattern"] {
                pattern if pattern["String"].is_string() => length(&pattern["String"]),
                // What a regular expression matches may be as short as nothing.
                _ => 0,
            };
            match shortest {
                0 => 1 + content as u64,
                shortest => (content.div_ceil(shortest) as u64).max(1),
            }
        }
        "Prepend" | "WordPiece" | "Metaspace" | "BPEDecoder" | "CTC" => {
            let added = [
                "prepend",
                "prefix",
                "replacement",
                "suffix",
                "word_delimiter_token",
                "pad_token",
            ]
            .iter()
            .map(|field| length(&part[*field]))
            .max()
            .unwrap_or(0);
            if added > MOST_ADDED {
                return Err(Flaw::new(format!("its {what} adds a text of {added} bytes")));
            }
            // Decoders add it to every token.
            if what == "decoder" { 1 + added as u64 } else { 1 }
        }
        "NFC" | "NFD" => 3,
        "NFKC" | "NFKD" => 11,
        // Decomposes, writes small, and puts spaces around Chinese characters.
        "BertNormalizer" => 12,
        "ByteLevel" | "Lowercase" => 2,
        "Precompiled" => {
            return Err(Flaw::new(format!(
                "its {what} is a SentencePiece table, which is not read here"
            )));
        }
        _ => 1,
    })
}
