//! Claims about model directories, units of weights and PEFT adapters: what is read, and what is refused how.

use std::io::Cursor;

use half::{bf16, f16};
use proptest::prelude::*;
use serde_json::{Value, json};
use sflllm::model::adapter::{Adapter, AdapterError, AdapterLayout, LoraSpec, Target};
use sflllm::model::architecture::{Architecture, ArchitectureError};
use sflllm::model::archive::{Archive, ArchiveError};
use sflllm::model::ends::embedding::Embedding;
use sflllm::model::unit::{Tensor, Unit, UnitData};
use sflllm::model::weights::{Holding, Weights, WeightsError};
use sflllm::terms::format::Format;

/// Width 6 and vocabulary 7 with an odd number of ffn columns: nothing divides 4.
fn config_json() -> Value {
    json!({
        "model_type": "gpt2", "n_layer": 3, "n_embd": 6, "n_head": 3, "n_inner": 5, "vocab_size": 7,
        "n_positions": 9, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "eos_token_id": 6,
    })
}

fn config() -> Architecture {
    Architecture::from_json(&config_json().to_string()).unwrap()
}

fn with(field: &str, value: Value) -> String {
    let mut config = config_json();
    config[field] = value;
    config.to_string()
}

// ---- configuration

#[test]
fn a_hugging_face_config_is_read() {
    let config = config();
    assert_eq!((config.blocks, config.width, config.heads, config.ffn), (3, 6, 3, 5));
    assert_eq!((config.vocab, config.positions, config.eos), (7, 9, Some(6)));
    assert_eq!(config.norm_epsilon, 1e-5);
    let defaults = Architecture::from_json(&with("n_inner", Value::Null)).unwrap();
    assert_eq!(defaults.ffn, 24);
    // transformers writes 50256 whatever the vocabulary is.
    assert_eq!(
        Architecture::from_json(&with("eos_token_id", json!(50256)))
            .unwrap()
            .eos,
        None
    );
    let mut older = config_json();
    older.as_object_mut().unwrap().remove("n_positions");
    older["n_ctx"] = json!(12);
    assert_eq!(Architecture::from_json(&older.to_string()).unwrap().positions, 12);
}

#[test]
fn a_config_written_is_the_config_read() {
    for epsilon in [1e-5, 1e-12, 0.3] {
        let config = Architecture {
            norm_epsilon: epsilon,
            ..config()
        };
        assert_eq!(Architecture::from_json(&config.to_json()).unwrap(), config);
        let through_serde: Architecture = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(through_serde, config);
    }
}

#[test]
fn unsupported_configs_are_refused_by_name() {
    let cases = [
        ("model_type", json!("mistral"), "mistral"),
        ("activation_function", json!("relu"), "activation_function"),
        ("scale_attn_weights", json!(false), "scale_attn_weights"),
        (
            "scale_attn_by_inverse_layer_idx",
            json!(true),
            "scale_attn_by_inverse_layer_idx",
        ),
        ("tie_word_embeddings", json!(false), "tie_word_embeddings"),
        ("add_cross_attention", json!(true), "add_cross_attention"),
        ("n_layer", json!(0), "n_layer"),
        ("n_layer", json!(-1), "n_layer"),
        ("n_layer", json!(1e18), "n_layer"),
        ("n_head", json!(4), "multiple of n_head"),
        ("vocab_size", json!("many"), "vocab_size"),
        ("vocab_size", json!(u64::MAX), "vocab_size"),
        ("n_embd", json!(120_000), "n_embd"),
        ("n_positions", json!(1.5), "n_positions"),
        ("layer_norm_epsilon", json!(0), "layer_norm_epsilon"),
        ("layer_norm_epsilon", json!("x"), "layer_norm_epsilon"),
    ];
    for (field, value, named) in cases {
        let error = Architecture::from_json(&with(field, value.clone()))
            .unwrap_err()
            .to_string();
        assert!(error.contains(named), "{field} = {value}: {error}");
    }
    for field in ["model_type", "n_layer", "n_embd", "n_head", "vocab_size", "n_positions"] {
        let mut config = config_json();
        config.as_object_mut().unwrap().remove(field);
        let error = Architecture::from_json(&config.to_string()).unwrap_err();
        assert!(
            matches!(&error, ArchitectureError::Missing { field: found } if *found == field),
            "{field}: {error}"
        );
    }
    assert!(matches!(
        Architecture::from_json("[]"),
        Err(ArchitectureError::NotAnObject)
    ));
    assert!(matches!(Architecture::from_json("{"), Err(ArchitectureError::Json(_))));
}

fn any_json() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (1u64..200).prop_map(Value::from),
        ".{0,6}".prop_map(Value::from),
        prop::collection::vec(0u8..9, 0..4).prop_map(Value::from),
    ]
}

proptest! {
    #[test]
    fn any_config_is_read_soundly_or_refused(changes in prop::collection::vec((0usize..10, any_json()), 0..4)) {
        let mut fields = config_json();
        for (index, value) in changes {
            let name = fields.as_object().unwrap().keys().nth(index).unwrap().clone();
            fields[name.as_str()] = value;
        }
        if let Ok(config) = Architecture::from_json(&fields.to_string()) {
            prop_assert!(config.width % config.heads == 0 && config.blocks > 0);
            prop_assert_eq!(Architecture::from_json(&config.to_json()).unwrap(), config);
        }
    }
}

// ---- safetensors

#[derive(Clone)]
struct Stored {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    data: Vec<u8>,
}

fn f32_tensor(name: &str, shape: &[usize], values: &[f32]) -> Stored {
    let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Stored {
        name: name.to_owned(),
        dtype: "F32",
        shape: shape.to_vec(),
        data,
    }
}

/// A safetensors file written out by hand, so that it can also be written wrong.
fn safetensors(tensors: &[Stored]) -> Vec<u8> {
    let mut header = json!({ "__metadata__": { "format": "pt" } });
    let mut data = Vec::new();
    for tensor in tensors {
        let start = data.len();
        data.extend(&tensor.data);
        header[&tensor.name] =
            json!({ "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, data.len()] });
    }
    with_header(&header.to_string(), &data)
}

fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

/// Values that differ everywhere and are exact in f16 and bf16.
fn value(index: usize) -> f32 {
    ((index * 37 + 11) % 127) as f32 / 64.0 - 1.0
}

/// Every tensor of the model under the given prefix, numbered through.
fn stored_model(config: &Architecture, prefix: &str) -> Vec<Stored> {
    let mut index = 0;
    let mut tensors = Vec::new();
    for unit in Unit::all(config) {
        for (name, shape) in unit.tensors(config) {
            let block = if let Unit::Block(block) = unit {
                format!("h.{block}.")
            } else {
                String::new()
            };
            let elements: usize = shape.iter().product();
            let values: Vec<f32> = (index..index + elements).map(value).collect();
            index += elements;
            tensors.push(f32_tensor(&format!("{prefix}{block}{name}"), &shape, &values));
        }
    }
    tensors
}

fn in_dtype(tensors: &[Stored], dtype: &'static str) -> Vec<Stored> {
    let convert = |bytes: &[u8]| {
        let value = f32::from_le_bytes(bytes.try_into().unwrap());
        if dtype == "F16" {
            f16::from_f32(value).to_le_bytes()
        } else {
            bf16::from_f32(value).to_le_bytes()
        }
    };
    tensors
        .iter()
        .map(|tensor| Stored {
            dtype,
            data: tensor.data.chunks(4).flat_map(convert).collect(),
            ..tensor.clone()
        })
        .collect()
}

fn open(tensors: &[Stored]) -> Result<Weights, WeightsError> {
    Weights::from_bytes(safetensors(tensors), &config())
}

fn refused(tensors: &[Stored]) -> String {
    open(tensors).expect_err("these weights are not valid").to_string()
}

/// All units as f32 values, with the names of their tensors.
fn all_values(weights: &mut Weights, dtype: Format) -> Vec<(String, Vec<f32>)> {
    Unit::all(&config())
        .flat_map(|unit| weights.unit(unit, Holding::As(dtype)).unwrap().tensors)
        .map(|tensor| (tensor.name.clone(), tensor.to_f32()))
        .collect()
}

#[test]
fn every_stored_dtype_prefix_and_held_dtype_gives_the_same_values() {
    let expected: Vec<Vec<f32>> = stored_model(&config(), "")
        .iter()
        .map(|tensor| {
            tensor
                .data
                .chunks(4)
                .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
                .collect()
        })
        .collect();
    for prefix in ["", "transformer."] {
        let tensors = stored_model(&config(), prefix);
        for stored in [tensors.clone(), in_dtype(&tensors, "F16"), in_dtype(&tensors, "BF16")] {
            for dtype in [Format::F16, Format::F32] {
                let values = all_values(&mut open(&stored).unwrap(), dtype);
                assert_eq!(
                    values.iter().map(|(_, values)| values.clone()).collect::<Vec<_>>(),
                    expected
                );
            }
        }
    }
}

#[test]
fn matrices_are_packed_two_halves_a_word_and_vectors_stay_f32() {
    let weights = open(&stored_model(&config(), "")).unwrap();
    let block = weights.unit(Unit::Block(1), Holding::As(Format::F16)).unwrap();
    for tensor in &block.tensors {
        assert_eq!(tensor.format == Format::F16, tensor.shape.len() == 2, "{}", tensor.name);
    }
    // (7, 6) is even and mlp.c_fc (6, 5) too; an odd count needs an odd shape.
    let odd = Architecture {
        vocab: 7,
        width: 9,
        heads: 3,
        head_size: 3,
        ffn: 5,
        ..config()
    };
    let weights = Weights::from_bytes(safetensors(&stored_model(&odd, "")), &odd).unwrap();
    let embedding = weights.unit(Unit::Embedding, Holding::As(Format::F16)).unwrap();
    let words = &embedding.tensor("wte.weight").unwrap().words;
    assert_eq!(words.len(), 32);
    assert_eq!(
        words[0],
        u32::from(f16::from_f32(value(0)).to_bits()) | u32::from(f16::from_f32(value(1)).to_bits()) << 16
    );
    assert_eq!(
        words[31],
        u32::from(f16::from_f32(value(62)).to_bits()),
        "the padding half is zero"
    );
}

#[test]
fn four_bits_leave_eight_to_the_ends() {
    let config = config();
    let weights = open(&stored_model(&config, "")).unwrap();
    let holding = Holding::As(Format::Q4);
    let formats = |unit| -> Vec<Format> {
        let unit = weights.unit(unit, holding).unwrap();
        let matrices = unit.tensors.iter().filter(|tensor| tensor.shape.len() == 2);
        matrices.map(|tensor| tensor.format).collect()
    };
    assert_eq!(formats(Unit::Embedding), [Format::Q8, Format::Q8]);
    assert_eq!(formats(Unit::Block(0)), [Format::Q4; 4]);
    // The rows that are read one by one are those of the unit.
    let unit = weights.unit(Unit::Embedding, holding).unwrap();
    let (tokens, positions) = (unit.tensors[0].to_f32(), unit.tensors[1].to_f32());
    let rows = weights.embedding(holding).unwrap().gather(&[2, 0], 2, 1).unwrap();
    let width = config.width;
    let expected = [(2, 1), (0, 2)].map(|(token, position): (usize, usize)| {
        let row = |table: &[f32], row: usize| table[row * width..][..width].to_vec();
        let (token, position) = (row(&tokens, token), row(&positions, position));
        token.iter().zip(&position).map(|(a, b)| a + b).collect::<Vec<f32>>()
    });
    assert_eq!(rows, expected.concat());
}

#[test]
fn f16_rounds_to_nearest_even() {
    let mut tensors = stored_model(&config(), "");
    // Spacing is 2 between 2048 and 4096: 2049 lies between 2048 (even) and 2050, 2051 between 2050 and 2052 (even).
    let mut values = [0.0; 42];
    values[..4].copy_from_slice(&[2049.0, 2051.0, -2049.0, 1e-9]);
    tensors[0] = f32_tensor("wte.weight", &[7, 6], &values);
    let embedding = open(&tensors)
        .unwrap()
        .unit(Unit::Embedding, Holding::As(Format::F16))
        .unwrap();
    assert_eq!(
        embedding.tensor("wte.weight").unwrap().to_f32()[..4],
        [2048.0, 2052.0, -2048.0, 0.0]
    );
}

#[test]
fn a_value_beyond_f16_names_the_tensor_and_the_remedy() {
    let mut tensors = stored_model(&config(), "");
    let mut values = [0.0; 42];
    values[17] = 70000.0;
    tensors[0] = f32_tensor("wte.weight", &[7, 6], &values);
    let weights = open(&tensors).unwrap();
    let error = weights
        .unit(Unit::Embedding, Holding::As(Format::F16))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("wte.weight") && error.contains("70000") && error.contains("--weights f32"),
        "{error}"
    );
    assert!(weights.unit(Unit::Embedding, Holding::As(Format::F32)).is_ok());
    values[17] = f32::NAN;
    tensors[0] = f32_tensor("wte.weight", &[7, 6], &values);
    let error = open(&tensors)
        .unwrap()
        .unit(Unit::Embedding, Holding::As(Format::F32))
        .unwrap_err();
    assert!(
        matches!(error, WeightsError::Archive(ArchiveError::NotFinite { .. })),
        "{error}"
    );
}

#[test]
fn attention_masks_and_a_tied_head_are_ignored() {
    let mut tensors = stored_model(&config(), "transformer.");
    tensors.push(Stored {
        name: "transformer.h.0.attn.bias".into(),
        dtype: "BOOL",
        shape: vec![1, 1, 2, 2],
        data: vec![1; 4],
    });
    tensors.push(f32_tensor("transformer.h.0.attn.masked_bias", &[], &[-1e4]));
    tensors.push(Stored {
        name: "lm_head.weight".into(),
        ..tensors[0].clone()
    });
    assert!(open(&tensors).is_ok());

    let last = tensors.last_mut().unwrap();
    last.data[0] ^= 1;
    assert!(matches!(open(&tensors), Err(WeightsError::UntiedHead { .. })));
    *tensors.last_mut().unwrap() = f32_tensor("lm_head.weight", &[1, 6], &[0.0; 6]);
    assert!(matches!(open(&tensors), Err(WeightsError::UntiedHead { .. })));
}

/// huggingface/transformers#38870: safetensors' own `save_model` keeps one of two tied tensors, and for GPT-2 that is the head.
#[test]
fn a_tied_head_stored_alone_is_the_embedding() {
    for prefix in ["", "transformer."] {
        let tensors = stored_model(&config(), prefix);
        let expected = open(&tensors)
            .unwrap()
            .unit(Unit::Embedding, Holding::As(Format::F32))
            .unwrap();
        let mut head_only = tensors;
        head_only[0].name = "lm_head.weight".into();
        let found = open(&head_only)
            .unwrap()
            .unit(Unit::Embedding, Holding::As(Format::F32))
            .unwrap();
        assert_eq!(found, expected);
        head_only[0].shape.reverse();
        let error = refused(&head_only);
        assert!(error.contains("lm_head.weight") && error.contains("[6, 7]"), "{error}");
    }
}

#[test]
fn missing_and_misshapen_tensors_are_named() {
    let tensors = stored_model(&config(), "");
    for (index, tensor) in tensors.iter().enumerate() {
        let mut without = tensors.clone();
        without.remove(index);
        let error = refused(&without);
        assert!(error.contains("no tensor") && error.contains(&tensor.name), "{error}");
    }
    let mut turned = tensors.clone();
    turned[4].shape.reverse();
    let error = refused(&turned);
    assert!(
        error.contains("h.0.attn.c_attn.weight") && error.contains("[18, 6]") && error.contains("[6, 18]"),
        "{error}"
    );
    let mut whole_numbers = tensors;
    whole_numbers[3].dtype = "I32";
    let error = refused(&whole_numbers);
    assert!(
        error.contains("h.0.ln_1.bias") && error.contains("I32") && error.contains("BF16"),
        "{error}"
    );
}

#[test]
fn truncated_and_hostile_files_are_refused() {
    let file = safetensors(&stored_model(&config(), ""));
    for length in [0, 7, 8, 100, file.len() - 1] {
        assert!(
            Weights::from_bytes(file[..length].to_vec(), &config()).is_err(),
            "{length} bytes"
        );
    }
    assert!(
        Weights::from_bytes([&file[..], &[0]].concat(), &config()).is_err(),
        "bytes after the data"
    );
    let error = Weights::from_bytes(file[..file.len() - 1].to_vec(), &config())
        .unwrap_err()
        .to_string();
    assert!(error.contains("truncated"), "{error}");

    let huge = [&u64::MAX.to_le_bytes()[..], b"{}"].concat();
    let large = [&99_000_000u64.to_le_bytes()[..], b"{}"].concat();
    for bytes in [huge, large] {
        let error = Archive::open("f", Cursor::new(bytes)).unwrap_err();
        assert!(matches!(error, ArchiveError::Header { .. }), "{error}");
    }
    for header in [
        "[]",
        "{\"a\":1}",
        "\u{0}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[8,4]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296,4],\"data_offsets\":[0,0]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}}",
        "{\"a\":{\"dtype\":\"F99\",\"shape\":[1],\"data_offsets\":[0,4]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}",
    ] {
        assert!(
            Archive::open("f", Cursor::new(with_header(header, &[0; 4]))).is_err(),
            "{header}"
        );
    }
}

#[test]
fn shards_and_single_files_load_from_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    let error = Weights::open(dir.path(), &config()).unwrap_err();
    assert!(matches!(error, WeightsError::NoFile { .. }), "{error}");

    let mut tensors = stored_model(&config(), "transformer.");
    tensors.push(Stored {
        name: "lm_head.weight".into(),
        ..tensors[0].clone()
    });
    let (first, second) = tensors.split_at(9);
    std::fs::write(dir.path().join("model-1.safetensors"), safetensors(first)).unwrap();
    std::fs::write(dir.path().join("model-2.safetensors"), safetensors(second)).unwrap();
    let mut map = serde_json::Map::new();
    for (part, file) in [(first, "model-1.safetensors"), (second, "model-2.safetensors")] {
        map.extend(part.iter().map(|tensor| (tensor.name.clone(), json!(file))));
    }
    let index = dir.path().join("model.safetensors.index.json");
    std::fs::write(&index, json!({ "weight_map": map }).to_string()).unwrap();
    let sharded = all_values(&mut Weights::open(dir.path(), &config()).unwrap(), Format::F32);

    std::fs::write(dir.path().join("model.safetensors"), safetensors(&tensors)).unwrap();
    let single = all_values(&mut Weights::open(dir.path(), &config()).unwrap(), Format::F32);
    assert_eq!(sharded, single);

    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    for outside in ["../model-1.safetensors", "/etc/passwd", "notes.txt"] {
        std::fs::write(&index, json!({ "weight_map": { "a": outside } }).to_string()).unwrap();
        let error = Weights::open(dir.path(), &config()).unwrap_err().to_string();
        assert!(error.contains(outside), "{error}");
    }
}

proptest! {
    #[test]
    fn any_damage_to_a_safetensors_file_is_survived(
        changes in prop::collection::vec((0usize..400, any::<u8>()), 1..6), cut in 0usize..3000
    ) {
        let mut file = safetensors(&stored_model(&config(), ""));
        for (at, byte) in changes {
            file[at] = byte;
        }
        file.truncate(file.len() - cut.min(file.len()).saturating_sub(1500));
        if let Ok(weights) = Weights::from_bytes(file, &config()) {
            for unit in Unit::all(&config()) {
                let _ = weights.unit(unit, Holding::As(Format::F16));
            }
        }
    }

    #[test]
    fn any_header_is_read_or_refused(header in r#"[{}\[\]":,a0-9dtypesha_F32]{0,60}"#, data in prop::collection::vec(any::<u8>(), 0..16)) {
        let _ = Archive::open("f", Cursor::new(with_header(&header, &data)));
    }
}

// ---- units on the wire

fn encoded(unit: &UnitData) -> Vec<u8> {
    let mut bytes = Vec::new();
    unit.encode(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_unit_decoded_is_the_unit_encoded() {
    // Odd sizes, so that the padding half matters.
    let odd = Architecture {
        width: 9,
        head_size: 3,
        ..config()
    };
    let weights = Weights::from_bytes(safetensors(&stored_model(&odd, "")), &odd).unwrap();
    for unit in Unit::all(&odd) {
        for dtype in [Format::F16, Format::F32] {
            let data = weights.unit(unit, Holding::As(dtype)).unwrap();
            let bytes = encoded(&data);
            assert_eq!(bytes.len() as u64, data.encoded_length());
            assert_eq!(UnitData::decode(&bytes, unit, &odd).unwrap(), data);
            assert_eq!(
                encoded(&weights.unit(unit, Holding::As(dtype)).unwrap()),
                bytes,
                "the same unit has the same bytes"
            );
            use sha2::Digest;
            assert_eq!(data.digest()[..], sha2::Sha256::digest(&bytes)[..]);
        }
    }
}

#[test]
fn bytes_of_another_unit_or_model_are_refused() {
    let weights = open(&stored_model(&config(), "")).unwrap();
    let bytes = encoded(&weights.unit(Unit::Block(0), Holding::As(Format::F16)).unwrap());
    assert!(UnitData::decode(&bytes, Unit::Block(1), &config()).is_err());
    assert!(UnitData::decode(&bytes, Unit::Final, &config()).is_err());
    assert!(UnitData::decode(&bytes, Unit::Block(0), &Architecture { ffn: 6, ..config() }).is_err());
    assert!(matches!(
        UnitData::decode(&bytes, Unit::Block(3), &config()),
        Err(WeightsError::NoSuchBlock { block: 3, blocks: 3 })
    ));
    assert!(matches!(
        weights.unit(Unit::Block(3), Holding::As(Format::F16)),
        Err(WeightsError::NoSuchBlock { .. })
    ));
    for length in [0, 3, 20, bytes.len() - 4, bytes.len() - 1] {
        assert!(UnitData::decode(&bytes[..length], Unit::Block(0), &config()).is_err());
    }
    let mut infinite = bytes.clone();
    let end = infinite.len();
    infinite[end - 4..].copy_from_slice(&f32::INFINITY.to_le_bytes());
    let error = UnitData::decode(&infinite, Unit::Block(0), &config())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("mlp.c_proj.bias") && error.contains("not finite"),
        "{error}"
    );
}

/// An embedding of this width whose vocabulary and positions are odd, with its matrices in `format`.
fn embedding_unit(width: usize, format: Format) -> (Architecture, UnitData) {
    let model = Architecture {
        width,
        head_size: width,
        heads: 1,
        kv_heads: 1,
        ..config()
    };
    let tensors = Unit::Embedding.tensors(&model).into_iter().map(|(name, shape)| {
        let values: Vec<f32> = (0..shape[0] * shape[1]).map(value).collect();
        let words = format.encode(&values, shape[0], shape[1]).unwrap();
        Tensor {
            name: name.to_owned(),
            shape,
            format,
            words,
        }
    });
    let unit = UnitData {
        unit: Unit::Embedding,
        tensors: tensors.collect(),
    };
    (model, unit)
}

#[test]
fn rows_read_from_an_encoded_embedding_are_the_rows_held_in_memory() {
    for format in Format::ALL {
        // One column, primes, one below and above a group and two; odd numbers of groups.
        for width in [1, 3, 6, 31, 32, 33, 63, 65, 96] {
            let (model, unit) = embedding_unit(width, format);
            let stored = Embedding::stored(&model, Cursor::new(encoded(&unit))).unwrap();
            let held = Embedding::held(&model, unit);
            let tokens: Vec<u32> = (0..model.vocab as u32).rev().chain([0, 3, 3, 6, 1]).collect();
            // Sequences that reach the first position and the last, and tokens alone at each.
            for (seq, position) in [(9, 0), (4, 5), (1, 3), (1, 8)] {
                assert_eq!(
                    stored.gather(&tokens, seq, position).unwrap(),
                    held.gather(&tokens, seq, position).unwrap(),
                    "{format}, width {width}, {seq} from {position}"
                );
            }
        }
    }
}

#[test]
fn an_encoded_embedding_of_another_model_or_another_length_is_refused() {
    let (model, unit) = embedding_unit(33, Format::Q8);
    let bytes = encoded(&unit);
    let refused = |model: &Architecture, bytes: Vec<u8>| {
        let error = Embedding::stored(model, Cursor::new(bytes)).unwrap_err().to_string();
        assert!(error.contains("model unit embedding"), "{error}");
        error
    };
    for other in [
        Architecture {
            vocab: 8,
            ..model.clone()
        },
        Architecture {
            width: 34,
            ..model.clone()
        },
        Architecture {
            positions: 8,
            ..model.clone()
        },
    ] {
        assert!(refused(&other, bytes.clone()).contains("another model's"));
    }
    let block = open(&stored_model(&config(), ""))
        .unwrap()
        .unit(Unit::Block(0), Holding::As(Format::F16))
        .unwrap();
    assert!(refused(&config(), encoded(&block)).contains("another unit's"));
    for length in [0, 3, 4, 19, 40, bytes.len() - 1] {
        refused(&model, bytes[..length].to_vec());
    }
    let longer = refused(&model, [&bytes[..], &[0]].concat());
    assert!(longer.contains(&format!("{} bytes", bytes.len() + 1)), "{longer}");
}

#[test]
fn a_stored_row_that_is_not_finite_names_the_unit_and_leaves_the_others() {
    let (model, unit) = embedding_unit(3, Format::F32);
    let mut bytes = encoded(&unit);
    // The last value of the last row of the positions, of which there are nine.
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    let stored = Embedding::stored(&model, Cursor::new(bytes)).unwrap();
    let error = stored.gather(&[0], 1, 8).unwrap_err().to_string();
    assert!(
        error.contains("embedding") && error.contains("wpe.weight") && error.contains("not finite"),
        "{error}"
    );
    assert!(stored.gather(&[0, 1, 2], 3, 5).is_ok());
}

#[test]
fn a_file_that_was_cut_short_after_it_was_opened_is_an_error() {
    let (model, unit) = embedding_unit(33, Format::Q4);
    let mut file = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut file, &encoded(&unit)).unwrap();
    let stored = Embedding::stored(&model, file.try_clone().unwrap()).unwrap();
    assert!(stored.gather(&[6], 1, 0).is_ok());
    file.set_len(100).unwrap();
    let error = stored.gather(&[6], 1, 0).unwrap_err();
    assert!(
        matches!(
            error,
            WeightsError::Read {
                unit: Unit::Embedding,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn unit_names_read_back_and_have_one_spelling() {
    for unit in Unit::all(&config()) {
        assert_eq!(unit.to_string().parse::<Unit>().unwrap(), unit);
        assert_eq!(
            serde_json::from_str::<Unit>(&serde_json::to_string(&unit).unwrap()).unwrap(),
            unit
        );
    }
    for name in [
        "",
        "block",
        "block.",
        "block.-1",
        "block.01",
        "block.99999999999999999999",
        "Final",
    ] {
        assert!(name.parse::<Unit>().is_err(), "{name}");
    }
}

proptest! {
    #[test]
    fn any_bytes_are_a_unit_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(UnitData::decode(&bytes, Unit::Final, &config()).is_err());
        let begun = [b"SFLU\x01\0\0\0", &bytes[..]].concat();
        let _ = UnitData::decode(&begun, Unit::Embedding, &config());
        let _ = Embedding::stored(&config(), Cursor::new(begun));
    }

    #[test]
    fn a_unit_with_changed_bytes_is_the_same_unit_or_refused(at in 0usize..1000, byte: u8) {
        let weights = open(&stored_model(&config(), "")).unwrap();
        let mut bytes = encoded(&weights.unit(Unit::Block(0), Holding::As(Format::F16)).unwrap());
        let at = at % bytes.len();
        bytes[at] = byte;
        if let Ok(unit) = UnitData::decode(&bytes, Unit::Block(0), &config()) {
            prop_assert_eq!(encoded(&unit), bytes);
        }
    }
}

// ---- adapters

fn spec(targets: &str) -> LoraSpec {
    LoraSpec::new(2, 3.0, LoraSpec::parse_targets(&config(), targets).unwrap()).unwrap()
}

/// An adapter whose values all differ.
fn numbered(targets: &str, blocks: std::ops::Range<usize>) -> Adapter {
    let layout = AdapterLayout::new(&config(), &spec(targets), blocks.clone()).unwrap();
    let values = (0..layout.len()).map(|index| index as f32 * 0.5 - 3.0).collect();
    Adapter::from_values(&config(), &spec(targets), blocks, values).unwrap()
}

#[test]
fn targets_are_parsed_and_sorted() {
    use Target::{AttnProj, AttnQkv, MlpFc, MlpProj};
    let parse = |names| LoraSpec::parse_targets(&config(), names).unwrap();
    assert_eq!(parse("c_attn"), [AttnQkv]);
    assert_eq!(parse("c_fc, c_proj,c_attn"), [AttnQkv, AttnProj, MlpFc, MlpProj]);
    assert_eq!(parse("mlp.c_proj"), [MlpProj]);
    assert_eq!(parse("attn.c_proj,c_proj"), [AttnProj, MlpProj]);
    for (names, named) in [
        ("c_atn", "c_atn"),
        ("proj", "proj"),
        (".c_fc", ".c_fc"),
        ("", "at least one"),
    ] {
        let error = LoraSpec::parse_targets(&config(), names).unwrap_err().to_string();
        assert!(error.contains(named), "{names}: {error}");
    }
}

#[test]
fn impossible_specs_are_refused() {
    for (rank, alpha) in [(0, 1.0), (1 << 20, 1.0), (2, 0.0), (2, -1.0), (2, f32::NAN)] {
        assert!(LoraSpec::new(rank, alpha, [Target::AttnQkv]).is_err(), "{rank} {alpha}");
    }
    assert!(LoraSpec::new(2, 1.0, []).is_err());
    assert!(serde_json::from_str::<LoraSpec>(r#"{"rank":0,"alpha":1,"targets":["attn_qkv"]}"#).is_err());
    let spec = spec("c_attn,c_proj");
    assert_eq!(
        serde_json::from_str::<LoraSpec>(&serde_json::to_string(&spec).unwrap()).unwrap(),
        spec
    );
    let layout = AdapterLayout::new(&config(), &spec, 0..1).unwrap();
    assert!(layout.entries().iter().all(|entry| entry.scale == 1.5));
    assert!(matches!(
        AdapterLayout::new(&config(), &spec, 1..4),
        Err(AdapterError::Blocks { .. })
    ));
    assert!(matches!(
        Adapter::from_values(&config(), &spec, 0..1, vec![0.0; 3]),
        Err(AdapterError::Length { found: 3, .. })
    ));
}

#[test]
fn the_layout_is_blocks_then_targets_then_a_then_b() {
    let layout = AdapterLayout::new(&config(), &spec("c_attn,c_proj,c_fc"), 1..3).unwrap();
    let mut end = 0;
    let mut order = Vec::new();
    for entry in layout.entries() {
        assert_eq!(entry.range_a(), end..end + 2 * entry.inputs);
        assert_eq!(
            entry.range_b(),
            entry.range_a().end..entry.range_a().end + entry.outputs * 2
        );
        end = entry.range_b().end;
        order.push((entry.block, entry.target, entry.inputs, entry.outputs));
    }
    assert_eq!(end, layout.len());
    let in_block = |block| {
        [
            (block, Target::AttnQkv, 6, 18),
            (block, Target::AttnProj, 6, 6),
            (block, Target::MlpFc, 6, 5),
            (block, Target::MlpProj, 5, 6),
        ]
    };
    assert_eq!(order, [in_block(1), in_block(2)].concat());
}

#[test]
fn a_fresh_adapter_is_kaiming_uniform_a_and_zero_b() {
    let wide = Architecture {
        width: 600,
        head_size: 200,
        ..config()
    };
    let adapter = Adapter::init(&wide, &spec("c_attn"), 0..1, 5).unwrap();
    let entry = adapter.layout.entries()[0];
    let (a, b) = (&adapter.values[entry.range_a()], &adapter.values[entry.range_b()]);
    assert!(b.iter().all(|&value| value == 0.0));
    let bound = 1.0 / 600f32.sqrt();
    assert!(a.iter().all(|value| value.abs() <= bound));
    let mean = a.iter().sum::<f32>() / a.len() as f32;
    let variance = a.iter().map(|value| value * value).sum::<f32>() / a.len() as f32;
    assert!(mean.abs() < 0.1 * bound, "mean {mean}");
    assert!(
        (variance / (bound * bound / 3.0) - 1.0).abs() < 0.1,
        "variance {variance}"
    );
}

#[test]
fn any_split_of_a_fresh_adapter_has_the_numbers_of_the_whole() {
    let spec = spec("c_attn,c_proj,c_fc");
    let whole = Adapter::init(&config(), &spec, 0..3, 9).unwrap();
    for cut in 0..=3 {
        let client = Adapter::init(&config(), &spec, 0..cut, 9).unwrap();
        let server = Adapter::init(&config(), &spec, cut..3, 9).unwrap();
        assert_eq!(client.merge(&config(), &server).unwrap(), whole);
        assert_eq!(whole.slice(&config(), 0..cut).unwrap(), client);
        assert_eq!(whole.slice(&config(), cut..3).unwrap(), server);
    }
    assert_ne!(Adapter::init(&config(), &spec, 0..3, 10).unwrap(), whole);
    let blocks: Vec<_> = (0..3)
        .map(|block| whole.slice(&config(), block..block + 1).unwrap().values)
        .collect();
    assert!(blocks[0] != blocks[1] && blocks[1] != blocks[2]);
    let (first, last) = (
        whole.slice(&config(), 0..1).unwrap(),
        whole.slice(&config(), 2..3).unwrap(),
    );
    assert!(matches!(first.merge(&config(), &last), Err(AdapterError::Merge { .. })));
    assert!(matches!(first.slice(&config(), 0..2), Err(AdapterError::Blocks { .. })));
}

#[test]
fn an_adapter_saved_is_the_adapter_loaded() {
    let dir = tempfile::tempdir().unwrap();
    for targets in [
        "c_attn",
        "c_proj",
        "attn.c_proj,c_fc",
        "mlp.c_proj",
        "c_attn,c_proj,c_fc",
    ] {
        for blocks in [0..3, 0..2, 1..3] {
            let adapter = numbered(targets, blocks);
            adapter.save(&dir.path().join("a"), &config(), "gpt2").unwrap();
            assert_eq!(
                Adapter::load(&dir.path().join("a"), &config()).unwrap(),
                adapter,
                "{targets}"
            );
        }
    }
    let mut left: Vec<_> = std::fs::read_dir(dir.path().join("a"))
        .unwrap()
        .map(|file| file.unwrap().file_name())
        .collect();
    left.sort();
    // No temporary file is left.
    assert_eq!(left, ["README.md", "adapter_config.json", "adapter_model.safetensors"]);
    // Somebody's own words stay.
    let card = dir.path().join("a/README.md");
    std::fs::write(&card, "mine").unwrap();
    numbered("c_attn", 0..3)
        .save(&dir.path().join("a"), &config(), "gpt2")
        .unwrap();
    assert_eq!(std::fs::read_to_string(card).unwrap(), "mine");
}

#[test]
fn the_description_says_what_peft_expects() {
    let [(tensor_file, tensors), (config_file, description)] =
        numbered("c_attn,c_proj", 0..3).to_peft(&config(), "my/model").unwrap();
    assert_eq!(
        (tensor_file, config_file),
        ("adapter_model.safetensors", "adapter_config.json")
    );
    let description: Value = serde_json::from_slice(&description).unwrap();
    for (field, value) in [
        ("peft_type", json!("LORA")),
        ("task_type", json!("CAUSAL_LM")),
        ("base_model_name_or_path", json!("my/model")),
        ("r", json!(2)),
        ("lora_alpha", json!(3)),
        ("target_modules", json!(["c_attn", "c_proj"])),
        ("fan_in_fan_out", json!(true)),
        ("bias", json!("none")),
    ] {
        assert_eq!(description[field], value, "{field}");
    }
    let archive = Archive::open("a", Cursor::new(tensors)).unwrap();
    let shape = |name: &str| {
        archive
            .shape(&format!("base_model.model.transformer.h.2.{name}.weight"))
            .unwrap()
            .to_vec()
    };
    assert_eq!(shape("attn.c_attn.lora_A"), [2, 6]);
    assert_eq!(shape("attn.c_attn.lora_B"), [18, 2]);
    assert_eq!(shape("mlp.c_proj.lora_A"), [2, 5]);
    let description = &numbered("attn.c_proj", 1..3).to_peft(&config(), "m").unwrap()[1].1;
    let description: Value = serde_json::from_slice(description).unwrap();
    assert_eq!(description["target_modules"], json!(["attn.c_proj"]));
    assert_eq!(description["layers_to_transform"], json!([1, 2]));
}

/// The c_attn adapter of the whole model as stored tensors and description, to be changed and read back.
fn peft_parts() -> (Vec<Stored>, Value) {
    let adapter = numbered("c_attn", 0..3);
    let mut tensors = Vec::new();
    for entry in adapter.layout.entries() {
        let name = format!("base_model.model.transformer.h.{}.attn.c_attn.lora_", entry.block);
        tensors.push(f32_tensor(
            &format!("{name}A.weight"),
            &[2, 6],
            &adapter.values[entry.range_a()],
        ));
        tensors.push(f32_tensor(
            &format!("{name}B.weight"),
            &[18, 2],
            &adapter.values[entry.range_b()],
        ));
    }
    let description = json!({ "peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["c_attn"] });
    (tensors, description)
}

fn import(tensors: &[Stored], description: &Value) -> Result<Adapter, AdapterError> {
    Adapter::from_peft(&description.to_string(), Cursor::new(safetensors(tensors)), &config())
}

#[test]
fn every_form_peft_has_written_is_read() {
    let (tensors, description) = peft_parts();
    let expected = numbered("c_attn", 0..3);
    let renamed = |from: &str, to: &str| -> Vec<Stored> {
        tensors
            .iter()
            .map(|tensor| Stored {
                name: tensor.name.replace(from, to),
                ..tensor.clone()
            })
            .collect()
    };
    assert_eq!(import(&tensors, &description).unwrap(), expected);
    assert_eq!(
        import(&renamed(".weight", ".default.weight"), &description).unwrap(),
        expected
    );
    assert_eq!(import(&renamed("transformer.", ""), &description).unwrap(), expected);
    assert_eq!(
        import(&renamed("base_model.model.", ""), &description).unwrap(),
        expected
    );
    // Half-integers are exact in both.
    assert_eq!(import(&in_dtype(&tensors, "F16"), &description).unwrap(), expected);
    for names in [
        json!("c_attn"),
        json!(["attn.c_attn"]),
        json!(r".*\.attn\.c_attn"),
        json!("all-linear"),
    ] {
        let mut description = description.clone();
        description["target_modules"] = names.clone();
        assert_eq!(import(&tensors, &description).unwrap(), expected, "{names}");
    }
    let mut stabilised = description.clone();
    stabilised["use_rslora"] = json!(true);
    let scale = import(&tensors, &stabilised).unwrap().layout.entries()[0].scale;
    assert!((scale - 3.0 / 2f32.sqrt()).abs() < 1e-6, "{scale}");
}

#[test]
fn unsupported_adapters_are_refused_by_name() {
    let (tensors, description) = peft_parts();
    for (field, value) in [
        ("peft_type", json!("IA3")),
        ("peft_type", Value::Null),
        ("task_type", json!("SEQ_CLS")),
        ("use_dora", json!(true)),
        ("bias", json!("all")),
        ("rank_pattern", json!({ "c_attn": "many" })),
        ("alpha_pattern", json!({ "(": 8 })),
        ("modules_to_save", json!(["lm_head"])),
        ("init_lora_weights", json!("pissa_niter_4")),
        ("r", json!("two")),
        ("r", Value::Null),
        ("lora_alpha", Value::Null),
        ("target_modules", Value::Null),
        ("target_modules", json!([1])),
        ("layers_to_transform", json!([3])),
    ] {
        let mut description = description.clone();
        description[field] = value.clone();
        let error = import(&tensors, &description).unwrap_err().to_string();
        assert!(error.contains(field), "{field} = {value}: {error}");
    }
    let mut unknown = description.clone();
    unknown["target_modules"] = json!(["q_proj"]);
    assert!(import(&tensors, &unknown).unwrap_err().to_string().contains("q_proj"));
    for rank in [json!(0), json!(u64::MAX), json!(3)] {
        let mut description = description.clone();
        description["r"] = rank.clone();
        assert!(import(&tensors, &description).is_err(), "rank {rank}");
    }
    let missing = Adapter::load(std::path::Path::new("no-such-adapter"), &config())
        .unwrap_err()
        .to_string();
    assert!(missing.contains("adapter_config.json"), "{missing}");
}

#[test]
fn missing_extra_and_misshapen_adapter_tensors_are_named() {
    let (tensors, description) = peft_parts();
    for index in 0..tensors.len() {
        let mut without = tensors.clone();
        let name = without.remove(index).name;
        let error = import(&without, &description).unwrap_err().to_string();
        assert!(error.contains("no tensor") && error.contains(&name), "{error}");
    }
    for extra in [
        "base_model.model.transformer.h.0.mlp.c_fc.lora_A.weight",
        "base_model.model.transformer.h.3.attn.c_attn.lora_A.weight",
        "base_model.model.transformer.h.0.attn.c_attn.lora_A.default.weight",
        "base_model.model.transformer.wte.weight",
        "h.00.attn.c_attn.lora_A.weight",
    ] {
        let mut with_extra = tensors.clone();
        with_extra.push(f32_tensor(extra, &[2, 6], &[0.0; 12]));
        let error = import(&with_extra, &description).unwrap_err();
        assert!(matches!(error, AdapterError::Extra { .. }), "{extra}: {error}");
    }
    let mut turned = tensors.clone();
    turned[3].shape.reverse();
    let error = import(&turned, &description).unwrap_err().to_string();
    assert!(
        error.contains("h.1.attn.c_attn.lora_B") && error.contains("[2, 18]"),
        "{error}"
    );
    let mut infinite = tensors;
    infinite[0].data[..4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    assert!(import(&infinite, &description).is_err());
}

proptest! {
    #[test]
    fn any_adapter_description_is_read_or_refused(
        field in prop::sample::select(vec![
            "peft_type", "r", "lora_alpha", "target_modules", "layers_to_transform", "bias", "use_rslora", "task_type",
        ]),
        value in any_json(),
    ) {
        let (tensors, mut description) = peft_parts();
        description[field] = value;
        if let Ok(adapter) = import(&tensors, &description) {
            prop_assert_eq!(adapter.values.len(), adapter.layout.len());
        }
    }

    #[test]
    fn any_damage_to_an_adapter_file_is_survived(changes in prop::collection::vec((0usize..600, any::<u8>()), 1..5)) {
        let (tensors, description) = peft_parts();
        let mut file = safetensors(&tensors);
        for (at, byte) in changes {
            file[at] = byte;
        }
        if let Ok(adapter) = Adapter::from_peft(&description.to_string(), Cursor::new(file), &config()) {
            prop_assert!(adapter.values.iter().all(|value| value.is_finite()));
        }
    }
}
