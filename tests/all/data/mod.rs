//! Claims about data files, chat templates, the native tokenizer, batches and sharding.

mod batches;
mod chat;
mod formats;
mod reader;
mod tokenizer;

use sflllm::data::{DataError, Dataset, Encoded, Options, Tokenize};

/// Of the tokenizer [`Bytes`], with some ids to spare.
const VOCAB: usize = 300;

/// One id per byte, and 256 for end-of-text: enough to see how texts are put together.
struct Bytes;

const EOS: u32 = 256;

impl Tokenize for Bytes {
    fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        Ok(bytes(text))
    }

    fn eos(&self) -> Result<u32, DataError> {
        Ok(EOS)
    }

    fn encode_with_ends(&self, texts: &[String]) -> Result<Vec<Encoded>, DataError> {
        let encode = |text: &String| Encoded {
            ids: bytes(text),
            ends: (1..=text.len() as u32).collect(),
        };
        Ok(texts.iter().map(encode).collect())
    }
}

fn bytes(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

fn options(seq: usize) -> Options {
    Options::new(seq, VOCAB)
}

fn read(text: &str, name: &str, options: &Options) -> Result<Dataset, DataError> {
    Dataset::read(text.as_bytes(), name, Some(&Bytes), options)
}

fn learned(ids: &[u32]) -> Vec<i32> {
    ids.iter().map(|&id| id as i32).collect()
}
