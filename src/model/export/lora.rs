//! An adapter as the GGUF file that llama.cpp's `--lora` and Ollama's `ADAPTER` take.
//!
//! Beside the tensor `T` of the base stand `T.lora_a` (rank, inputs) and `T.lora_b` (outputs, rank), and llama.cpp adds
//! α/rank · B·(A·x) with one α for the whole file. The outputs are in the base's order of rows, so those of Llama's
//! queries and keys are in llama.cpp's rotary order. GPT-2's projections are Out×In in GGUF as all others are, and A and
//! B mean the same in every orientation of W: nothing of them is transposed.

use std::io::Write;

use super::ExportError;
use crate::model::adapter::{Adapter, AdapterEntry};
use crate::model::architecture::Architecture;
use crate::model::gguf::blocks::BlockType;
use crate::model::gguf::metadata::Metadata;
use crate::model::gguf::names::interleaved_rows;
use crate::model::gguf::writer::GgufWriter;
use crate::model::unit::Unit;

/// Writes the adapter; `name` is that of the base model. Where an α or rank of its own, or a rank-stabilised scale, makes a
/// projection's scale another than the file's α/rank, the rest is in its B.
///
/// # Errors
/// [`ExportError::Write`] with `file`; [`ExportError::NotFinite`] when a B cannot take its scale.
///
/// # Panics
/// When the adapter is not of this model.
pub fn write_lora(
    adapter: &Adapter,
    model: &Architecture,
    name: &str,
    file: &str,
    output: impl Write,
) -> Result<(), ExportError> {
    let mut metadata = Metadata::default();
    metadata.set("general.type", "adapter");
    metadata.set("general.architecture", model.family.model_type());
    metadata.set("general.name", format!("{name} LoRA"));
    metadata.set("general.base_model.count", 1u32);
    metadata.set("general.base_model.0.name", name);
    metadata.set("adapter.type", "lora");
    metadata.set("adapter.lora.alpha", adapter.spec.alpha);

    let mut table = Vec::new();
    let mut values = Vec::new();
    for entry in adapter.layout.entries() {
        let hugging_face = Unit::Block(entry.block).file_name(model, entry.target.weight());
        let base = model
            .family
            .gguf_name(&hugging_face)
            .unwrap_or_else(|| unreachable!("every projection has a name in GGUF"));
        let [inputs, rank, outputs] = [entry.inputs, entry.rank, entry.outputs].map(|size| size as u64);
        table.push((format!("{base}.lora_a"), vec![inputs, rank], BlockType::F32));
        values.push(adapter.values[entry.range_a()].to_vec());
        table.push((format!("{base}.lora_b"), vec![rank, outputs], BlockType::F32));
        values.push(b(adapter, entry, model, &base));
    }
    if let Some(((tensor, ..), _)) = table
        .iter()
        .zip(&values)
        .find(|(_, values)| values.iter().any(|value| !value.is_finite()))
    {
        return Err(ExportError::NotFinite { tensor: tensor.clone() });
    }
    let failed = ExportError::write(file);
    let mut writer = GgufWriter::begin(output, &metadata, &table).map_err(&failed)?;
    for values in values {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        writer.write(&bytes).map_err(&failed)?;
    }
    writer.finish().map_err(failed)?;
    Ok(())
}

/// B of a projection, with what the file's α/rank lacks of its scale, in the base's order of rows.
fn b(adapter: &Adapter, entry: &AdapterEntry, model: &Architecture, base: &str) -> Vec<f32> {
    let of_file = adapter.spec.alpha / entry.rank as f32;
    // Exactly 1 where nothing differs: both are the same division.
    let factor = f64::from(entry.scale) / f64::from(of_file);
    let scaled: Vec<f32> = adapter.values[entry.range_b()]
        .iter()
        .map(|&value| (f64::from(value) * factor) as f32)
        .collect();
    if !model.family.is_interleaved(base) {
        return scaled;
    }
    let rows = interleaved_rows(entry.outputs / model.head_size, model.head_size);
    rows.iter()
        .flat_map(|&row| &scaled[row * entry.rank..][..entry.rank])
        .copied()
        .collect()
}
