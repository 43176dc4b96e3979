//! A whole model as a GGUF file that llama.cpp runs.

use std::io::Write;

use super::merged::{Arrangement, Merged, Part};
use super::{ExportError, Storage};
use crate::model::architecture::{Architecture, Family};
use crate::model::gguf::GgufError;
use crate::model::gguf::blocks::BlockType;
use crate::model::gguf::container::Gguf;
use crate::model::gguf::header::{ModelHeader, ROPE_FACTORS, Rope, RopeScaling};
use crate::model::gguf::metadata::Metadata;
use crate::model::gguf::names::interleaved_rows;
use crate::model::gguf::tokenizer::GgufTokenizer;
use crate::model::gguf::writer::GgufWriter;
use crate::terms::format::GROUP;

/// What a GGUF file says of a model beside its weights.
#[derive(Clone, Debug)]
pub struct Description {
    metadata: Metadata,
    /// What each rotary frequency is divided by, where that is a tensor.
    rope_factors: Option<Vec<f32>>,
}

impl Description {
    /// That of a model in a GGUF file.
    ///
    /// # Errors
    /// As [`ModelHeader::read`].
    pub fn of_file(gguf: &mut Gguf) -> Result<Self, GgufError> {
        let header = ModelHeader::read(gguf)?;
        let rope_factors = match (&header.rope, gguf.tensor(ROPE_FACTORS)) {
            (Some(rope), Some(_)) => Some(rope.factors(header.head_size)),
            _ => None,
        };
        let mut metadata = Metadata::default();
        // What is said of the file's own quantisation is not true of another's.
        let of_its_blocks = |key: &str| key.starts_with("quantize.") || key.starts_with("split.");
        for (key, value) in gguf.metadata().iter().filter(|(key, _)| !of_its_blocks(key)) {
            metadata.set(key, value.clone());
        }
        Ok(Self { metadata, rope_factors })
    }

    /// That of a model from elsewhere.
    ///
    /// # Errors
    /// As [`GgufTokenizer::write`]; [`ExportError::Scaling`] for Llama 3's rotary scaling in another family.
    pub fn new(model: &Architecture, name: &str, tokenizer: &GgufTokenizer) -> Result<Self, ExportError> {
        let header = ModelHeader::of(model, name);
        let rope_factors = match &header.rope {
            Some(
                rope @ Rope {
                    scaling: RopeScaling::Llama3 { .. },
                    ..
                },
            ) if model.family == Family::Llama => Some(rope.factors(model.head_size)),
            Some(Rope {
                scaling: RopeScaling::Llama3 { .. },
                ..
            }) => {
                return Err(ExportError::Scaling {
                    family: model.family,
                    scaling: "llama3",
                });
            }
            _ => None,
        };
        let mut metadata = header.metadata();
        tokenizer.write(model.vocab, &mut metadata)?;
        Ok(Self { metadata, rope_factors })
    }
}

/// What came otherwise than asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Matrices that are F16 because their rows are no whole groups of 32.
    pub not_quantised: Vec<String>,
}

/// Writes the model, `file` in errors. Matrices are Out×In in `storage`, and learned positions, norms and biases F32, as llama.cpp's
/// own converter has them.
///
/// # Errors
/// [`ExportError`] names the tensor or the file.
pub fn write_model(
    merged: &Merged<'_>,
    description: &Description,
    storage: Storage,
    file: &str,
    output: impl Write,
) -> Result<Written, ExportError> {
    let model = merged.weights.model();
    let mut metadata = description.metadata.clone();
    metadata.set("general.file_type", file_type(storage));
    if storage == Storage::Q8_0 {
        metadata.set("general.quantization_version", 2u32);
    }
    let mut written = Written::default();
    let mut table = Vec::new();
    if let Some(factors) = &description.rope_factors {
        table.push((ROPE_FACTORS.to_owned(), vec![factors.len() as u64], BlockType::F32));
    }
    let mut order: Vec<(Part, Arrangement, Storage)> = Vec::new();
    for part in merged.parts() {
        let name = model
            .family
            .gguf_name(&part.unit.file_name(model, part.tensor))
            .unwrap_or_else(|| unreachable!("every tensor of a family has a name in GGUF"));
        let form = Arrangement {
            transposed: true,
            rows: match (part.target, model.family.is_interleaved(&name)) {
                (Some(target), true) => {
                    let (_, outputs) = model.dimensions(target);
                    Some(interleaved_rows(outputs / model.head_size, model.head_size))
                }
                _ => None,
            },
        };
        let mut dimensions: Vec<u64> = merged.shape(&part, &form).iter().map(|&size| size as u64).collect();
        dimensions.reverse();
        let is_matrix = dimensions.len() == 2 && name != "position_embd.weight";
        let own = match storage {
            _ if !is_matrix => Storage::F32,
            Storage::Q8_0 if !dimensions[0].is_multiple_of(GROUP as u64) => {
                written.not_quantised.push(name.clone());
                Storage::F16
            }
            storage => storage,
        };
        table.push((name, dimensions, own.block()));
        order.push((part, form, own));
    }
    let failed = ExportError::write(file);
    let mut writer = GgufWriter::begin(output, &metadata, &table).map_err(&failed)?;
    if let Some(factors) = &description.rope_factors {
        writer
            .write(&Storage::F32.encode(ROPE_FACTORS, factors)?)
            .map_err(&failed)?;
    }
    for (part, form, storage) in &order {
        merged.for_each_rows(part, form, |values| {
            let bytes = storage.encode(&part.unit.file_name(model, part.tensor), values)?;
            writer.write(&bytes).map_err(&failed)
        })?;
    }
    writer.finish().map_err(failed)?;
    Ok(written)
}

/// llama.cpp's number for what most matrices are.
fn file_type(storage: Storage) -> u32 {
    match storage {
        Storage::F32 => 0,
        Storage::F16 => 1,
        Storage::Q8_0 => 7,
        Storage::Bf16 => 32,
    }
}
