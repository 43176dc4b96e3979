//! A model as the directory that transformers' `from_pretrained` loads: safetensors, in shards where it is large, and a
//! `config.json` that says how they are stored.

use std::collections::BTreeMap;
use std::io::{self, Write};

use serde_json::{Map, Value, json};

use super::merged::{Arrangement, Merged, Part};
use super::{ExportError, Storage};
use crate::model::architecture::Family;
use crate::model::gguf::GgufError;
use crate::model::gguf::container::Gguf;
use crate::model::gguf::header::ModelHeader;
use crate::model::gguf::metadata::Value as Metadatum;
use crate::model::gguf::tokenizer::{GgufTokenizer, TOKENS_KEY};

/// Bytes of a shard, as transformers has them.
pub const SHARD: u64 = 5_000_000_000;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A tensor in its file.
struct Placed {
    name: String,
    part: Part,
    shape: Vec<usize>,
    bytes: u64,
}

/// Writes `model.safetensors`, or shards of at most `shard` bytes and their index, to the files that `create` makes. Matrices are
/// as the family's checkpoints have them: GPT-2's (inputs, outputs).
///
/// # Errors
/// [`ExportError`] names the tensor or the file.
///
/// # Panics
/// For [`Storage::Q8_0`], which safetensors do not have.
pub fn write_checkpoint<W: Write>(
    merged: &Merged<'_>,
    storage: Storage,
    shard: u64,
    mut create: impl FnMut(&str) -> io::Result<W>,
) -> Result<(), ExportError> {
    let element: u64 = match storage {
        Storage::F32 => 4,
        Storage::F16 | Storage::Bf16 => 2,
        Storage::Q8_0 => panic!("safetensors in {storage}"),
    };
    let model = merged.weights.model();
    let form = Arrangement {
        transposed: model.family != Family::Gpt2,
        rows: None,
    };
    let mut shards: Vec<Vec<Placed>> = vec![Vec::new()];
    let mut filled = 0;
    for part in merged.parts() {
        let shape = merged.shape(&part, &form);
        let bytes = element * shape.iter().product::<usize>() as u64;
        if filled > 0 && filled + bytes > shard {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        let prefix = if model.family == Family::Gpt2 {
            "transformer."
        } else {
            ""
        };
        let name = format!("{prefix}{}", part.unit.file_name(model, part.tensor));
        let placed = Placed {
            name,
            part,
            shape,
            bytes,
        };
        shards.last_mut().expect("there is one").push(placed);
    }
    let count = shards.len();
    let file_name = |index: usize| match count {
        1 => SINGLE.to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
    };
    for (index, tensors) in shards.iter().enumerate() {
        let file = file_name(index);
        let failed = ExportError::write(&file);
        let mut output = create(&file).map_err(&failed)?;
        output.write_all(&header(tensors, storage)).map_err(&failed)?;
        for tensor in tensors {
            merged.for_each_rows(&tensor.part, &form, |values| {
                let bytes = storage.encode(&tensor.name, values)?;
                output.write_all(&bytes).map_err(&failed)
            })?;
        }
        output.flush().map_err(failed)?;
    }
    if count > 1 {
        let files: BTreeMap<&str, String> = shards
            .iter()
            .enumerate()
            .flat_map(|(index, tensors)| {
                tensors
                    .iter()
                    .map(move |tensor| (tensor.name.as_str(), file_name(index)))
            })
            .collect();
        let total: u64 = shards.iter().flatten().map(|tensor| tensor.bytes).sum();
        let index = json!({"metadata": {"total_size": total}, "weight_map": files});
        let failed = ExportError::write(INDEX);
        let mut output = create(INDEX).map_err(&failed)?;
        writeln!(output, "{index:#}")
            .and_then(|()| output.flush())
            .map_err(failed)?;
    }
    Ok(())
}

/// The length and the text of a safetensors header.
fn header(tensors: &[Placed], storage: Storage) -> Vec<u8> {
    let dtype = match storage {
        Storage::F32 => "F32",
        Storage::Bf16 => "BF16",
        Storage::F16 | Storage::Q8_0 => "F16",
    };
    let mut table = Map::new();
    table.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut start = 0;
    for tensor in tensors {
        let end = start + tensor.bytes;
        let entry = json!({"dtype": dtype, "shape": tensor.shape, "data_offsets": [start, end]});
        table.insert(tensor.name.clone(), entry);
        start = end;
    }
    let mut text = Value::Object(table).to_string().into_bytes();
    // Data begins at a multiple of 8, and spaces belong to the text.
    text.resize(text.len().next_multiple_of(8), b' ');
    [&(text.len() as u64).to_le_bytes()[..], &text].concat()
}

/// What stands beside the weights of a model that comes from a GGUF file, as its header and tokenizer say: (name, contents).
///
/// # Errors
/// [`GgufError`] names what of the header or the tokenizer has no counterpart.
pub fn files_beside(gguf: &mut Gguf, storage: Storage) -> Result<Vec<(&'static str, String)>, GgufError> {
    let header = ModelHeader::read(gguf)?;
    let tokenizer = GgufTokenizer::read(gguf)?;
    let Value::Object(described) = header.config(gguf.file())? else {
        unreachable!("a configuration is an object")
    };
    let tokens = gguf
        .metadata()
        .get(TOKENS_KEY)
        .and_then(Metadatum::strings)
        .unwrap_or(&[]);
    let text = |id: Option<u32>| id.and_then(|id| tokens.get(id as usize));
    let tokenizer_config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": text(tokenizer.bos),
        "eos_token": text(tokenizer.eos),
        "add_bos_token": tokenizer.add_bos,
        "clean_up_tokenization_spaces": false,
        "model_max_length": header.positions,
        "chat_template": tokenizer.chat_template,
    });
    let generation = json!({"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.stop});
    Ok(vec![
        ("config.json", config(described, storage)),
        ("generation_config.json", format!("{generation:#}\n")),
        ("tokenizer_config.json", format!("{tokenizer_config:#}\n")),
        ("tokenizer.json", tokenizer.json),
    ])
}

/// The `config.json` of a model whose weights are stored otherwise than its base's were.
pub fn config(mut base: Map<String, Value>, storage: Storage) -> String {
    let dtype = match storage {
        Storage::F32 => "float32",
        Storage::Bf16 => "bfloat16",
        Storage::F16 | Storage::Q8_0 => "float16",
    };
    // transformers 5 writes `dtype`; all versions read the older name.
    let field = if base.contains_key("dtype") {
        "dtype"
    } else {
        "torch_dtype"
    };
    base.insert(field.to_owned(), json!(dtype));
    // Where whoever saved the base had it.
    base.remove("_name_or_path");
    format!("{:#}\n", Value::Object(base))
}
