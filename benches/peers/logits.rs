//! Logits of this program for given token ids, as the `.npy` file that `llama_cpp_lora.py` writes of llama.cpp's: float32
//! `(tokens, vocab)`, on the CPU engine.
//!
//!     cargo run --release --example logits -- MODEL IDS.json OUT.npy [ADAPTER]
//!
//! `MODEL` is what `--model` takes. Weights are f32 where the file does not quantise them.

use anyhow::{Context, ensure};
use sflllm::cli::source::{ModelName, Source};
use sflllm::compute::Engine;
use sflllm::model::central::Central;
use sflllm::model::weights::Holding;
use sflllm::model::workspace::Extent;
use sflllm::terms::format::Format;

fn main() -> anyhow::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let (model, ids, out) = match &words[..] {
        [model, ids, out] | [model, ids, out, _] => (model, ids, out),
        _ => anyhow::bail!("usage: logits MODEL IDS.json OUT.npy [ADAPTER]"),
    };
    let model: ModelName = model.parse()?;
    let mut source = Source::open(&model, Holding::Auto, true)?;
    if !source.weights.format(Holding::Auto).is_quantised() {
        source.holding = Holding::As(Format::F32);
    }
    let ids: Vec<u32> = serde_json::from_slice(&std::fs::read(ids).with_context(|| ids.clone())?)?;
    ensure!(
        !ids.is_empty() && ids.iter().all(|&id| (id as usize) < source.architecture.vocab),
        "token ids below {}",
        source.architecture.vocab
    );
    let adapter = words.get(3).map(|dir| source.adapter(dir.as_ref())).transpose()?;
    let engine = Engine::cpu();
    let extent = Extent {
        batch: 1,
        seq: ids.len(),
    };
    let weights = source.load(&engine)?;
    let mut model = Central::new(&engine, &source.architecture, weights, adapter.as_ref(), extent, None)?;
    let rows = pollster::block_on(model.logits(&ids, ids.len(), 0..ids.len()))?;

    // The format's first version: its magic, the header's length, and a dictionary padded to a multiple of 64.
    let mut header = format!(
        "{{'descr': '<f4', 'fortran_order': False, 'shape': ({}, {}), }}",
        rows.len(),
        source.architecture.vocab
    );
    while !(10 + header.len() + 1).is_multiple_of(64) {
        header.push(' ');
    }
    header.push('\n');
    let mut file = b"\x93NUMPY\x01\x00".to_vec();
    file.extend((header.len() as u16).to_le_bytes());
    file.extend(header.bytes());
    file.extend(rows.concat().iter().flat_map(|value| value.to_le_bytes()));
    std::fs::write(out, file).with_context(|| out.clone())
}
