//! Which files of a repository a model is made of.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::error::Error;
use super::name::{FileName, Name};

pub(super) const CONFIG: &str = "config.json";
pub(super) const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// What stands beside the weights: configuration, and what the tokenizer is made of.
pub(super) const BESIDE: [&str; 9] = [
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
];
/// More shards than any model has.
const MAX_SHARDS: usize = 4096;

/// Everything of a model whose name is known beforehand.
pub(super) fn known_names() -> impl Iterator<Item = FileName> {
    [SINGLE, INDEX].into_iter().chain(BESIDE).map(FileName::known)
}

/// In what form a model's weights are there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Weights {
    /// One safetensors file.
    Single,
    /// Several, named in an index.
    Sharded,
    Gguf(FileName),
}

/// What a server says of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub name: FileName,
    pub bytes: Option<u64>,
    /// In hexadecimal, of files that git does not hold itself.
    pub sha256: Option<String>,
}

/// Chooses among the files of a commit.
pub(super) fn weights(name: &Name, entries: &[Entry]) -> Result<Weights, Error> {
    let repository = name.repository().to_owned();
    let has = |file: &str| entries.iter().any(|entry| entry.name.as_str() == file);
    let names = |kept: &dyn Fn(&FileName) -> bool| -> Vec<String> {
        let names = entries.iter().map(|entry| &entry.name);
        names.filter(|name| kept(name)).map(FileName::to_string).collect()
    };
    if let Some(file) = name.file() {
        return match has(file.as_str()) {
            true => gguf(file),
            false => Err(Error::NoFile {
                repository,
                file: file.to_string(),
                others: names(&FileName::is_gguf),
            }),
        };
    }
    let weights = match (has(SINGLE), has(INDEX)) {
        (true, _) => Weights::Single,
        (false, true) => Weights::Sharded,
        (false, false) => {
            let files: Vec<&Entry> = entries.iter().filter(|entry| entry.name.is_gguf()).collect();
            return match files[..] {
                [] => Err(Error::NoWeights {
                    repository,
                    found: names(&|name| {
                        let name = name.as_str();
                        [".bin", ".safetensors", ".pth", ".pt", ".h5", ".msgpack", ".onnx"]
                            .iter()
                            .any(|extension| name.ends_with(extension))
                    }),
                }),
                [file] => gguf(&file.name),
                _ => Err(Error::Several {
                    repository,
                    files: names(&FileName::is_gguf),
                }),
            };
        }
    };
    match has(CONFIG) {
        true => Ok(weights),
        false => Err(Error::NoConfig { repository }),
    }
}

fn gguf(file: &FileName) -> Result<Weights, Error> {
    match file.is_gguf_part() {
        true => Err(Error::Part { file: file.to_string() }),
        false => Ok(Weights::Gguf(file.clone())),
    }
}

/// The files that an index of shards names, each once. They lie beside it.
///
/// # Errors
/// [`Error::Index`] says what is wrong with it.
pub(super) fn shards(repository: &str, index: &[u8]) -> Result<Vec<FileName>, Error> {
    let fail = |reason: String| Error::Index {
        repository: repository.to_owned(),
        reason,
    };
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_slice(index).map_err(|error| fail(error.to_string()))?;
    let mut shards: Vec<FileName> = Vec::new();
    for name in index.weight_map.into_values() {
        let shard = FileName::parse(&name).filter(|shard| shard.is_at_top() && name.ends_with(".safetensors"));
        let shown: String = name.chars().take(100).flat_map(char::escape_debug).collect();
        shards.push(shard.ok_or_else(|| fail(format!("`{shown}` is no name of a shard beside it")))?);
    }
    shards.sort();
    shards.dedup();
    match shards.len() {
        1..=MAX_SHARDS => Ok(shards),
        count => Err(fail(format!("it names {count} shards"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(name: &str, files: &[&str]) -> Result<Weights, Error> {
        let entries: Vec<Entry> = files
            .iter()
            .map(|file| Entry {
                name: FileName::parse(file).unwrap(),
                bytes: None,
                sha256: None,
            })
            .collect();
        weights(&name.parse().unwrap(), &entries)
    }

    fn file(name: &str) -> Weights {
        Weights::Gguf(FileName::parse(name).unwrap())
    }

    #[test]
    fn safetensors_come_before_gguf_and_one_file_before_shards() {
        assert_eq!(
            choose("hf:a/b", &[CONFIG, SINGLE, INDEX, "m.gguf"]).unwrap(),
            Weights::Single
        );
        assert_eq!(choose("hf:a/b", &[CONFIG, INDEX, "m.gguf"]).unwrap(), Weights::Sharded);
        assert_eq!(choose("hf:a/b", &["README.md", "m.gguf"]).unwrap(), file("m.gguf"));
        assert_eq!(
            choose("hf:a/b:q/m.gguf", &[CONFIG, SINGLE, "q/m.gguf"]).unwrap(),
            file("q/m.gguf")
        );
    }

    #[test]
    fn what_cannot_be_chosen_is_said_with_what_is_there() {
        for (name, files, expected) in [
            (
                "hf:a/b",
                &["m-Q4.gguf", "m-Q8.gguf"][..],
                "hf:a/b:FILE, of m-Q4.gguf, m-Q8.gguf",
            ),
            (
                "hf:a/b:x.gguf",
                &["m-Q4.gguf", CONFIG][..],
                "no file x.gguf; its GGUF files are m-Q4.gguf",
            ),
            ("hf:a/b", &[CONFIG, "pytorch_model.bin"][..], "it has pytorch_model.bin"),
            (
                "hf:a/b",
                &["adapter_model.safetensors"][..],
                "it has adapter_model.safetensors",
            ),
            ("hf:a/b", &[][..], "no weights that can be read"),
            ("hf:a/b", &[SINGLE][..], "no config.json"),
            (
                "hf:a/b:m-00001-of-00002.gguf",
                &["m-00001-of-00002.gguf"][..],
                "one part of a model",
            ),
        ] {
            let error = choose(name, files).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn an_index_names_shards_beside_it_and_nothing_else() {
        let index = br#"{"weight_map": {"a": "m-2.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}}"#;
        let names: Vec<String> = shards("a/b", index).unwrap().iter().map(FileName::to_string).collect();
        assert_eq!(names, ["m-1.safetensors", "m-2.safetensors"]);
        for bad in [
            r#"{"weight_map": {"a": "../m.safetensors"}}"#,
            r#"{"weight_map": {"a": "/etc/m.safetensors"}}"#,
            r#"{"weight_map": {"a": "x/m.safetensors"}}"#,
            r#"{"weight_map": {"a": "..\\m.safetensors"}}"#,
            r#"{"weight_map": {"a": "pytorch_model.bin"}}"#,
            r#"{"weight_map": {}}"#,
            r#"{}"#,
            "<html>",
        ] {
            assert!(shards("a/b", bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
