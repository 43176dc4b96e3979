//! Claims about exported models and adapters: each holds the adapter exactly, in the order and orientation of its file, and nothing
//! half-made is left.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use pollster::block_on;
use serde_json::{Value, json};
use sflllm::compute::Engine;
use sflllm::data::{Dataset, Options, pass};
use sflllm::model::adapter::{Adapter, LoraSpec};
use sflllm::model::architecture::{Architecture, Family};
use sflllm::model::central::{Central, Counted};
use sflllm::model::export::checkpoint::{SHARD, config, files_beside, write_checkpoint};
use sflllm::model::export::gguf::{Description, write_model};
use sflllm::model::export::lora::write_lora;
use sflllm::model::export::merged::Merged;
use sflllm::model::export::{ExportError, Storage};
use sflllm::model::gguf::GgufError;
use sflllm::model::gguf::container::Gguf;
use sflllm::model::gguf::metadata::{Metadata, Value as Metadatum};
use sflllm::model::gguf::model::GgufModel;
use sflllm::model::gguf::tokenizer::GgufTokenizer;
use sflllm::model::gguf::writer::GgufWriter;
use sflllm::model::stack::StackWeights;
use sflllm::model::weights::{HeldUnits, Holding, Weights};
use sflllm::model::workspace::Extent;
use sflllm::terms::format::Format;

const F32: Holding = Holding::As(Format::F32);

/// Folders of `fixtures` with a model, an adapter and data. The adapters are on every projection of some family.
const CASES: [&str; 6] = [
    "gpt2_peft/narrow",
    "gpt2_peft/legacy",
    "families/llama",
    "families/llama3",
    "families/qwen2",
    "families/qwen3",
];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

struct Case {
    weights: Weights,
    adapter: Adapter,
    data: Dataset,
}

impl Case {
    fn load(name: &str) -> Self {
        let directory = fixture(name);
        let config = Architecture::load(&directory.join("model")).unwrap();
        Self {
            weights: Weights::open(&directory.join("model"), &config).unwrap(),
            adapter: everywhere(&config),
            data: Dataset::load(
                &directory.join("data.jsonl"),
                None,
                &Options::new(config.positions, config.vocab),
            )
            .unwrap(),
        }
    }

    /// Mean loss over the case's data.
    fn loss(&self, weights: &Weights, adapter: Option<&Adapter>) -> f64 {
        let (engine, model) = (Engine::cpu(), weights.model());
        let mut units = HeldUnits { weights, holding: F32 };
        let loaded = StackWeights::load(&engine, model, &mut units).unwrap();
        let extent = Extent {
            batch: 3,
            seq: model.positions,
        };
        let mut central = Central::new(&engine, model, loaded, adapter, extent, None).unwrap();
        let mut sum = Counted::default();
        for batch in pass(&self.data.examples, 3, model.positions).unwrap() {
            sum += block_on(central.loss(&batch.tokens, &batch.targets, batch.seq)).unwrap();
        }
        sum.loss_sum / sum.tokens as f64
    }

    #[track_caller]
    fn assert_holds_the_adapter(&self, merged: &Weights, what: &str) {
        let (base, expected) = (
            self.loss(&self.weights, None),
            self.loss(&self.weights, Some(&self.adapter)),
        );
        let found = self.loss(merged, None);
        assert!(
            (expected - base).abs() > 1e-3 * base,
            "{what}: {base} without the adapter, {expected} with it"
        );
        assert!(
            (found - expected).abs() <= 1e-6 * expected,
            "{what}: {found}, expected {expected}"
        );
    }

    fn merged(&self) -> Merged<'_> {
        Merged {
            weights: &self.weights,
            adapter: Some(&self.adapter),
        }
    }
}

/// An adapter on every projection, with a B that changes the loss.
fn everywhere(model: &Architecture) -> Adapter {
    let spec = LoraSpec::new(3, 10.0, model.targets().iter().copied()).unwrap();
    let mut adapter = Adapter::init(model, &spec, 0..model.blocks, 5).unwrap();
    let other = Adapter::init(model, &spec, 0..model.blocks, 6).unwrap();
    for entry in adapter.layout.entries().to_vec() {
        let source = other.values[entry.offset_a..].iter().cycle();
        for (value, noise) in adapter.values[entry.range_b()].iter_mut().zip(source) {
            *value = 5.0 * noise;
        }
    }
    adapter
}

/// Files in memory, as an export makes them.
#[derive(Clone, Default)]
struct Files(Arc<Mutex<BTreeMap<String, Vec<u8>>>>);

struct Open(Files, String);

impl Files {
    fn create(&self, name: &str) -> std::io::Result<Open> {
        self.0.lock().unwrap().insert(name.to_owned(), Vec::new());
        Ok(Open(self.clone(), name.to_owned()))
    }

    fn take(&self) -> BTreeMap<String, Vec<u8>> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl std::io::Write for Open {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let mut files = self.0.0.lock().unwrap();
        files.get_mut(&self.1).unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn checkpoint(merged: &Merged<'_>, storage: Storage, shard: u64) -> BTreeMap<String, Vec<u8>> {
    let files = Files::default();
    write_checkpoint(merged, storage, shard, |name| files.create(name)).unwrap();
    files.take()
}

/// A vocabulary of the 256 bytes and the end of a text, for models that have none.
fn bytes_only() -> GgufTokenizer {
    // GPT-2's letters for bytes: the printable ones are themselves, the others follow from 256 on.
    let printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut next = 256..;
    let letters = (0..256u32).map(|byte| match printable(byte) {
        true => byte,
        false => next.next().unwrap(),
    });
    let vocab: serde_json::Map<String, Value> = letters
        .enumerate()
        .map(|(id, letter)| (char::from_u32(letter).unwrap().to_string(), json!(id)))
        .collect();
    let json = json!({
        "added_tokens": [{"id": 256, "content": "<|endoftext|>", "special": true}],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    GgufTokenizer {
        json: json.to_string(),
        vocab: 257,
        bos: None,
        eos: Some(256),
        add_bos: false,
        stop: vec![256],
        chat_template: None,
        notices: Vec::new(),
    }
}

fn gguf(merged: &Merged<'_>, storage: Storage) -> Vec<u8> {
    let description = Description::new(merged.weights.model(), "tiny", &bytes_only()).unwrap();
    let mut file = Vec::new();
    write_model(merged, &description, storage, "model.gguf", &mut file).unwrap();
    file
}

fn opened(file: &[u8]) -> Gguf {
    Gguf::open("model.gguf", Cursor::new(file.to_vec())).unwrap()
}

fn weights_of(file: &[u8]) -> Weights {
    Weights::from_gguf(GgufModel::new(opened(file)).unwrap()).unwrap()
}

// ---- merged weights

#[test]
fn merged_safetensors_are_the_model_with_the_adapter() {
    for name in CASES {
        let case = Case::load(name);
        let mut files = checkpoint(&case.merged(), Storage::F32, SHARD);
        let file = files.remove("model.safetensors").unwrap();
        assert!(files.is_empty());
        let merged = Weights::from_bytes(file, case.weights.model()).unwrap();
        case.assert_holds_the_adapter(&merged, name);
    }
}

#[test]
fn merged_ggufs_are_the_model_with_the_adapter() {
    for name in CASES {
        let case = Case::load(name);
        let file = gguf(&case.merged(), Storage::F32);
        case.assert_holds_the_adapter(&weights_of(&file), name);
    }
}

/// GPT-2's matrices change their orientation on the way, and Llama's queries and keys the order of their rows.
#[test]
fn models_from_gguf_files_are_merged_into_both_forms() {
    for name in CASES {
        let mut case = Case::load(name);
        let base = gguf(
            &Merged {
                weights: &case.weights,
                adapter: None,
            },
            Storage::F32,
        );
        case.weights = weights_of(&base);

        let description = Description::of_file(&mut opened(&base)).unwrap();
        let mut file = Vec::new();
        write_model(&case.merged(), &description, Storage::F32, "model.gguf", &mut file).unwrap();
        case.assert_holds_the_adapter(&weights_of(&file), name);
        let kept: Vec<(String, Metadatum)> = pairs(opened(&base).metadata());
        assert_eq!(pairs(opened(&file).metadata()), kept, "{name}");

        let beside = files_beside(&mut opened(&base), Storage::F32).unwrap();
        let text = |name: &str| &beside.iter().find(|(file, _)| *file == name).unwrap().1;
        let architecture = Architecture::from_json(text("config.json")).unwrap();
        let file = checkpoint(&case.merged(), Storage::F32, SHARD)
            .remove("model.safetensors")
            .unwrap();
        let merged = Weights::from_bytes(file, &architecture).unwrap();
        case.assert_holds_the_adapter(&merged, name);
        assert!(text("config.json").contains("\"torch_dtype\": \"float32\""));
        assert!(text("tokenizer_config.json").contains("<|endoftext|>"));
        assert!(text("generation_config.json").contains("256"));
        assert_eq!(
            serde_json::from_str::<Value>(text("tokenizer.json")).unwrap()["model"]["type"],
            "BPE"
        );
    }
}

fn pairs(metadata: &Metadata) -> Vec<(String, Metadatum)> {
    metadata
        .iter()
        .map(|(key, value)| (key.to_owned(), value.clone()))
        .collect()
}

/// Ranks, alphas and blocks of their own, rank-stabilised scales.
#[test]
fn every_variant_of_peft_is_merged() {
    let mut case = Case::load("families/llama");
    let model = case.weights.model().clone();
    let engine = Engine::cpu();
    for entry in std::fs::read_dir(fixture("families/llama/adapters")).unwrap() {
        let path = entry.unwrap().path();
        case.adapter = Adapter::load(&path, &model).unwrap();
        let file = checkpoint(&case.merged(), Storage::F32, SHARD)
            .remove("model.safetensors")
            .unwrap();
        let merged = Weights::from_bytes(file, &model).unwrap();
        let adapter = case.adapter.clone().over_all_blocks(&model).unwrap();
        let [expected, found] = [(&case.weights, Some(&adapter)), (&merged, None)].map(|(weights, adapter)| {
            let mut units = HeldUnits { weights, holding: F32 };
            let loaded = StackWeights::load(&engine, &model, &mut units).unwrap();
            let extent = Extent { batch: 1, seq: 40 };
            let mut central = Central::new(&engine, &model, loaded, adapter, extent, None).unwrap();
            let ids = &case.data.examples[0].ids[..40];
            block_on(central.logits(ids, 40, 0..40)).unwrap().concat()
        });
        let largest = expected.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        for (found, expected) in found.iter().zip(&expected) {
            assert!(
                (found - expected).abs() <= 5e-6 * largest,
                "{}: {found}, expected {expected}",
                path.display()
            );
        }
    }
}

#[test]
fn a_large_checkpoint_is_written_in_shards_that_are_read_as_one() {
    let case = Case::load("families/llama");
    let directory = tempfile::tempdir().unwrap();
    let files = checkpoint(&case.merged(), Storage::F32, 100_000);
    for (name, bytes) in &files {
        assert!(
            bytes.len() < 110_000 || name.ends_with(".json"),
            "{name}: {}",
            bytes.len()
        );
        std::fs::write(directory.path().join(name), bytes).unwrap();
    }
    assert!(files.len() > 3 && !files.contains_key("model.safetensors"));
    let merged = Weights::open(directory.path(), case.weights.model()).unwrap();
    case.assert_holds_the_adapter(&merged, "shards");
    let index: Value = serde_json::from_slice(&files["model.safetensors.index.json"]).unwrap();
    let values: usize = case
        .merged()
        .parts()
        .iter()
        .map(|part| part.shape.iter().product::<usize>())
        .sum();
    assert_eq!(index["metadata"]["total_size"], 4 * values);
}

#[test]
fn halves_are_the_rounded_values_and_what_they_cannot_hold_is_named() {
    let case = Case::load("families/qwen2");
    let model = case.weights.model();
    let values = |storage| {
        let file = checkpoint(&case.merged(), storage, SHARD)
            .remove("model.safetensors")
            .unwrap();
        let weights = Weights::from_bytes(file, model).unwrap();
        let parts = Merged {
            weights: &weights,
            adapter: None,
        }
        .parts();
        let all: Vec<f32> = parts
            .iter()
            .flat_map(|part| {
                let rows = if part.shape.len() == 2 { part.shape[0] } else { 1 };
                weights.rows(part.unit, part.tensor, &part.shape, 0..rows).unwrap()
            })
            .collect();
        all
    };
    let exact = values(Storage::F32);
    assert_eq!(
        values(Storage::F16),
        exact
            .iter()
            .map(|&value| half::f16::from_f32(value).to_f32())
            .collect::<Vec<_>>()
    );
    assert_eq!(
        values(Storage::Bf16),
        exact
            .iter()
            .map(|&value| half::bf16::from_f32(value).to_f32())
            .collect::<Vec<_>>()
    );

    let mut huge = everywhere(model);
    huge.values.iter_mut().for_each(|value| *value *= 1e3);
    let refused = |adapter: &Adapter, storage| {
        let merged = Merged {
            weights: &case.weights,
            adapter: Some(adapter),
        };
        write_checkpoint(&merged, storage, SHARD, |_| Ok(Vec::new())).unwrap_err()
    };
    let error = refused(&huge, Storage::F16);
    assert!(
        matches!(error, ExportError::Overflow { .. }) && error.to_string().contains("--type f32"),
        "{error}"
    );
    huge.values.iter_mut().for_each(|value| *value *= 1e20);
    let error = refused(&huge, Storage::F32);
    assert!(
        matches!(&error, ExportError::NotFinite { tensor } if tensor == "model.layers.0.self_attn.q_proj.weight"),
        "{error}"
    );
}

#[test]
fn a_configuration_says_how_the_weights_are_stored_and_not_where_they_came_from() {
    let fields = |value: Value| value.as_object().unwrap().clone();
    let old = json!({"model_type": "llama", "torch_dtype": "float32", "_name_or_path": "/home/someone/model"});
    let written: Value = serde_json::from_str(&config(fields(old), Storage::Bf16)).unwrap();
    assert_eq!(written, json!({"model_type": "llama", "torch_dtype": "bfloat16"}));
    let new = json!({"model_type": "llama", "dtype": "float32"});
    let written: Value = serde_json::from_str(&config(fields(new), Storage::F16)).unwrap();
    assert_eq!(written, json!({"model_type": "llama", "dtype": "float16"}));
}

// ---- adapters

/// Every projection of the file against scale · B · A of the adapter, row by row in the order that llama.cpp has them.
#[track_caller]
fn assert_lora(adapter: &Adapter, model: &Architecture, what: &str) {
    let mut bytes = Vec::new();
    write_lora(adapter, model, "tiny", "adapter.gguf", &mut bytes).unwrap();
    let mut file = opened(&bytes);
    let text = |key: &str| {
        file.metadata()
            .get(key)
            .and_then(Metadatum::string)
            .map(str::to_owned)
            .unwrap()
    };
    assert_eq!(text("general.type"), "adapter");
    assert_eq!(text("adapter.type"), "lora");
    assert_eq!(text("general.architecture"), model.family.model_type());
    let Some(&Metadatum::F32(alpha)) = file.metadata().get("adapter.lora.alpha") else {
        panic!("{what}: no alpha");
    };
    assert_eq!(file.tensors().len(), 2 * adapter.layout.entries().len(), "{what}");
    for entry in adapter.layout.entries() {
        let (rank, inputs, outputs) = (entry.rank, entry.inputs, entry.outputs);
        let hugging_face = sflllm::model::unit::Unit::Block(entry.block).file_name(model, entry.target.weight());
        let name = model.family.gguf_name(&hugging_face).unwrap();
        let a = file.read(&format!("{name}.lora_a"), &[rank, inputs]).unwrap();
        let b = file.read(&format!("{name}.lora_b"), &[outputs, rank]).unwrap();
        let (own_a, own_b) = (&adapter.values[entry.range_a()], &adapter.values[entry.range_b()]);
        let is_rotary =
            model.family == Family::Llama && ["self_attn.q_proj", "self_attn.k_proj"].contains(&entry.target.module());
        let product = |a: &[f32], b: &[f32], scale: f64, row: usize, column: usize| {
            let terms = (0..rank).map(|k| f64::from(b[row * rank + k]) * f64::from(a[k * inputs + column]));
            scale * terms.sum::<f64>()
        };
        for row in 0..outputs {
            // Neighbours in llama.cpp are the two halves' lanes.
            let in_file = match is_rotary {
                false => row,
                true => {
                    let (head, lane) = (row / model.head_size, row % model.head_size);
                    let half = model.head_size / 2;
                    head * model.head_size + 2 * (lane % half) + lane / half
                }
            };
            for column in (0..inputs).step_by(7) {
                let expected = product(own_a, own_b, f64::from(entry.scale), row, column);
                let found = product(&a, &b, f64::from(alpha) / rank as f64, in_file, column);
                assert!(
                    (found - expected).abs() <= 1e-6 * (1.0 + expected.abs()),
                    "{what} {name} ({row}, {column}): {found}, expected {expected}"
                );
            }
        }
    }
}

#[test]
fn a_gguf_lora_changes_every_projection_as_the_adapter_does() {
    for name in CASES {
        let model = Architecture::load(&fixture(name).join("model")).unwrap();
        assert_lora(&everywhere(&model), &model, name);
        let stored = Adapter::load(&fixture(name).join("adapter"), &model).unwrap();
        assert_lora(&stored, &model, name);
    }
}

/// llama.cpp has one alpha for a file and α/rank alone: the rest of each scale is in B.
#[test]
fn a_gguf_lora_holds_every_variant_of_peft() {
    for case in ["llama", "qwen3"] {
        let model = Architecture::load(&fixture("families").join(case).join("model")).unwrap();
        let variants = fixture("families").join(case).join("adapters");
        let mut count = 0;
        for entry in std::fs::read_dir(variants).unwrap() {
            let path = entry.unwrap().path();
            let adapter = Adapter::load(&path, &model).unwrap();
            assert_lora(&adapter, &model, &path.display().to_string());
            count += 1;
        }
        assert!(count > 0);
    }
}

// ---- vocabularies

#[test]
fn a_vocabulary_written_is_the_vocabulary_read() {
    for family in Family::ALL {
        let gguf = Gguf::open_path(&fixture("gguf").join(format!("{family}.gguf"))).unwrap();
        let mut read = GgufTokenizer::read(&gguf).unwrap();
        let mut metadata = Metadata::default();
        read.write(368, &mut metadata).unwrap();
        for key in ["tokens", "token_type", "merges", "pre", "model"] {
            let key = format!("tokenizer.ggml.{key}");
            assert_eq!(metadata.get(&key), gguf.metadata().get(&key), "{family} {key}");
        }
        let mut file = Vec::new();
        GgufWriter::begin(&mut file, &metadata, &[]).unwrap().finish().unwrap();
        let again = GgufTokenizer::read(&opened(&file)).unwrap();
        // Whether a text is begun, which the fixtures leave to the rule, is said now.
        read.notices.clear();
        assert_eq!(again, read, "{family}");
    }
}

#[test]
fn tokenizers_that_llama_cpp_does_not_have_are_refused_by_name() {
    let plain = bytes_only();
    let json: Value = serde_json::from_str(&plain.json).unwrap();
    let refused = |change: &dyn Fn(&mut Value), rows: usize| {
        let mut json = json.clone();
        change(&mut json);
        let tokenizer = GgufTokenizer {
            json: json.to_string(),
            ..plain.clone()
        };
        tokenizer.write(rows, &mut Metadata::default())
    };
    assert!(refused(&|_| {}, 257).is_ok());
    type Change<'a> = &'a dyn Fn(&mut Value);
    let cases: [(Change<'_>, &str); 8] = [
        (&|json| json["model"]["type"] = json!("Unigram"), "Unigram"),
        (
            &|json| json["pre_tokenizer"]["add_prefix_space"] = json!(true),
            "add_prefix_space",
        ),
        (
            &|json| json["pre_tokenizer"] = json!({"type": "Whitespace"}),
            "Whitespace",
        ),
        (&|json| json["model"]["ignore_merges"] = json!(true), "ignore_merges"),
        (&|json| json["model"]["byte_fallback"] = json!(true), "byte_fallback"),
        (&|json| json["normalizer"] = json!({"type": "Lowercase"}), "Lowercase"),
        (&|json| json["added_tokens"][0]["id"] = json!(3), "both token 3"),
        (&|json| json["model"]["merges"] = json!(["a b c"]), "merge"),
    ];
    for (change, named) in cases {
        let error = refused(change, 257).unwrap_err();
        assert!(
            matches!(error, GgufError::Unsupported { .. } | GgufError::Damaged { .. }),
            "{error}"
        );
        assert!(error.to_string().contains(named), "{named}: {error}");
    }
    let error = refused(&|_| {}, 200).unwrap_err().to_string();
    assert!(error.contains("the model has 200 rows"), "{error}");
}

#[test]
fn rotary_scaling_that_llama_cpp_does_not_read_is_refused_by_name() {
    let mut model = Architecture::load(&fixture("families/llama3/model")).unwrap();
    assert!(Description::new(&model, "tiny", &bytes_only()).is_ok());
    model.family = Family::Qwen3;
    let error = Description::new(&model, "tiny", &bytes_only()).unwrap_err();
    assert!(matches!(error, ExportError::Scaling { .. }), "{error}");
}

// ---- the command

fn sflllm(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sflllm"))
        .env("NODEVICE_SELECT", "1")
        .args(words)
        .output()
        .unwrap()
}

#[track_caller]
fn succeed(words: &[&str]) -> String {
    let output = sflllm(words);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn failure(words: &[&str]) -> (i32, String) {
    let output = sflllm(words);
    assert!(output.stdout.is_empty(), "{words:?}");
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The demo's architecture, and a PEFT directory with an adapter of it.
fn demo_adapter(directory: &Path) -> (Architecture, PathBuf) {
    let config = include_str!("../../assets/demo/config.json");
    let model = Architecture::from_json(config).unwrap();
    let path = directory.join("adapter-of-demo");
    everywhere(&model).save(&path, &model, "demo").unwrap();
    (model, path)
}

#[test]
fn a_run_is_exported_for_peft_as_it_wrote_it() {
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name);
    std::fs::write(
        at("data.txt"),
        "name : Blue Spice||The Blue Spice is by the river.\n".repeat(8),
    )
    .unwrap();
    let (data, run, out) = (at("data.txt"), at("run"), at("out"));
    succeed(&[
        "train",
        "--data",
        text(&data),
        "--steps",
        "2",
        "--lr",
        "1e-2",
        "--device",
        "cpu",
        "--out",
        text(&run),
    ]);
    // The model is known from the run.
    let printed = succeed(&["export", text(&run), "--format", "peft", "--out", text(&out), "--json"]);
    let model = Architecture::from_json(include_str!("../../assets/demo/config.json")).unwrap();
    let [before, after] = [run.join("adapter"), out.clone()].map(|path| Adapter::load(&path, &model).unwrap());
    assert_eq!(before, after);
    assert!(before.values.iter().any(|&value| value != 0.0));
    let expected = ["README.md", "adapter_config.json", "adapter_model.safetensors"];
    assert_eq!(names(&out), expected);
    let printed: Value = serde_json::from_str(&printed).unwrap();
    assert_eq!(
        (&printed["format"], &printed["base_model"]),
        (&json!("peft"), &json!("demo"))
    );
    let listed: Vec<&str> = (printed["files"].as_array().unwrap().iter())
        .map(|file| file["name"].as_str().unwrap())
        .collect();
    assert_eq!(listed, expected);
    for directory in [&out, &run.join("adapter")] {
        let card = std::fs::read_to_string(directory.join("README.md")).unwrap();
        for line in [
            "library_name: peft",
            "base_model: \"demo\"",
            "pipeline_tag: text-generation",
            "- lora",
            "| steps | 2 |",
            "| learning rate | 0.01 |",
        ] {
            assert!(card.lines().any(|found| found == line), "{line} in {card}");
        }
        assert!(!card.contains(text(place.path())), "{card}");
    }
}

/// A base that is a directory or a file of this machine is called by its name.
#[test]
fn no_path_of_this_machine_is_in_an_exported_adapter() {
    let place = tempfile::tempdir().unwrap();
    let model = fixture("families/qwen2/model");
    let adapter = fixture("families/qwen2/adapter");
    let out = place.path().join("out");
    succeed(&[
        "export",
        text(&adapter),
        "--model",
        text(&model),
        "--format",
        "peft",
        "--out",
        text(&out),
    ]);
    let description = std::fs::read_to_string(out.join("adapter_config.json")).unwrap();
    let description: Value = serde_json::from_str(&description).unwrap();
    assert_eq!(description["base_model_name_or_path"], "model");
    let card = std::fs::read_to_string(out.join("README.md")).unwrap();
    assert!(!card.contains(env!("CARGO_MANIFEST_DIR")), "{card}");
}

#[test]
fn the_demo_is_exported_to_llama_cpp_and_transformers() {
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name);
    let (model, adapter) = demo_adapter(place.path());
    let export = |format: &str, options: &[&str], out: &str| {
        let out = at(out);
        let mut words = vec!["export", text(&adapter), "--format", format, "--out", text(&out)];
        words.extend(options);
        succeed(&words);
        out
    };
    let lora = export("gguf", &[], "lora");
    let file = Gguf::open_path(&lora.join("adapter.gguf")).unwrap();
    assert_eq!(file.tensors().len(), 2 * 4 * model.blocks);

    for (storage, stored) in [("f32", "F32"), ("f16", "F16"), ("bf16", "BF16"), ("q8_0", "Q8_0")] {
        let merged = export("gguf-merged", &["--type", storage], storage);
        let gguf = Gguf::open_path(&merged.join("model.gguf")).unwrap();
        let tensor = gguf.tensor("blk.0.attn_qkv.weight").unwrap();
        assert_eq!(tensor.stored.name, stored);
        assert_eq!(gguf.tensor("position_embd.weight").unwrap().stored.name, "F32");
        assert_eq!(gguf.tensor("blk.0.attn_qkv.bias").unwrap().stored.name, "F32");
        assert_eq!(GgufTokenizer::read(&gguf).unwrap().eos, Some(1535));
        Weights::from_gguf(GgufModel::new(gguf).unwrap()).unwrap();
    }
    let merged = export("merged", &[], "merged");
    assert_eq!(names(&merged), ["config.json", "model.safetensors", "tokenizer.json"]);
    let read = Architecture::load(&merged).unwrap();
    assert_eq!(read, model);
    Weights::open(&merged, &read).unwrap();
}

#[test]
fn an_ollama_directory_has_all_that_its_modelfile_names() {
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name);
    let (_, adapter) = demo_adapter(place.path());
    for (options, files) in [
        (vec![], vec!["Modelfile", "model.gguf"]),
        (vec!["--adapter-only"], vec!["Modelfile", "adapter.gguf", "base.gguf"]),
    ] {
        let out = at(&format!("ollama{}", options.len()));
        let mut words = vec!["export", text(&adapter), "--format", "ollama", "--out", text(&out)];
        words.extend(options);
        let printed = succeed(&words);
        assert!(printed.contains("ollama create demo-tuned"), "{printed}");
        assert_eq!(names(&out), files);
        let modelfile = std::fs::read_to_string(out.join("Modelfile")).unwrap();
        let named: Vec<&str> = modelfile
            .lines()
            .filter_map(|line| line.strip_prefix("FROM ./").or(line.strip_prefix("ADAPTER ./")))
            .collect();
        assert_eq!(named.len(), files.len() - 1, "{modelfile}");
        assert!(named.iter().all(|name| out.join(name).is_file()), "{modelfile}");
        assert!(modelfile.contains("PARAMETER stop \"<|endoftext|>\""), "{modelfile}");
    }
    // The base beside its adapter is the file as it was given.
    let base = fixture("gguf/llama.gguf");
    let model = Weights::from_gguf(GgufModel::new(Gguf::open_path(&base).unwrap()).unwrap()).unwrap();
    let adapter = at("adapter-of-llama");
    everywhere(model.model())
        .save(&adapter, model.model(), "llama")
        .unwrap();
    let out = at("of-gguf");
    succeed(&[
        "export",
        text(&adapter),
        "--model",
        text(&base),
        "--format",
        "ollama",
        "--adapter-only",
        "--out",
        text(&out),
    ]);
    assert_eq!(
        std::fs::read(out.join("base.gguf")).unwrap(),
        std::fs::read(&base).unwrap()
    );
}

#[test]
fn what_cannot_be_exported_is_refused_and_leaves_nothing() {
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name);
    let (_, adapter) = demo_adapter(place.path());
    std::fs::create_dir(at("taken")).unwrap();
    let out = at("out");
    let before = names(place.path());
    let refused = |words: &[&str], code: i32, named: &[&str]| {
        let (status, stderr) = failure(&[&["export"], words].concat());
        assert_eq!(status, code, "{words:?}: {stderr}");
        for text in named {
            assert!(stderr.contains(text), "{words:?}: {text} in {stderr}");
        }
        assert_eq!(names(place.path()), before, "{words:?}");
    };
    let adapter = text(&adapter);
    let model = fixture("families/qwen2/model");
    let no_tokenizer = fixture("families/qwen2/adapter");
    let (taken, out, nothing) = (at("taken"), text(&out), at("nothing"));
    refused(
        &[adapter, "--format", "peft", "--out", text(&taken)],
        1,
        &[text(&taken), "another --out"],
    );
    refused(
        &[adapter, "--model", text(&model), "--format", "gguf", "--out", out],
        1,
        &["does not fit the model", "c_attn"],
    );
    refused(
        &[
            text(&no_tokenizer),
            "--model",
            text(&model),
            "--format",
            "gguf-merged",
            "--out",
            out,
        ],
        1,
        &["no tokenizer"],
    );
    refused(
        &[text(&nothing), "--format", "peft", "--out", out],
        1,
        &["neither a run directory", "adapter_config.json"],
    );
    refused(
        &[adapter, "--format", "merged", "--type", "q8_0", "--out", out],
        2,
        &["q8_0 is for GGUF files"],
    );
    refused(
        &[adapter, "--format", "gguf", "--type", "f16", "--out", out],
        2,
        &["--type"],
    );
    refused(
        &[adapter, "--format", "gguf", "--adapter-only", "--out", out],
        2,
        &["--format ollama"],
    );
    refused(
        &[adapter, "--format", "gguf-merged", "--type", "q4", "--out", out],
        2,
        &["`q4`", "q8_0"],
    );
    refused(&[adapter, "--format", "onnx", "--out", out], 2, &["onnx", "ollama"]);
}

#[test]
fn an_adapter_whose_model_is_not_known_asks_for_it() {
    let place = tempfile::tempdir().unwrap();
    let model = Architecture::load(&fixture("families/qwen2/model")).unwrap();
    let adapter = place.path().join("adapter");
    everywhere(&model).save(&adapter, &model, "somewhere").unwrap();
    let out = place.path().join("out");
    let (code, stderr) = failure(&["export", text(&adapter), "--format", "gguf", "--out", text(&out)]);
    assert_eq!(code, 1);
    assert!(
        stderr.contains("\"somewhere\"") && stderr.contains("--model"),
        "{stderr}"
    );
    assert!(!out.exists());
}
