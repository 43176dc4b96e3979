//! Adapters as PEFT's files: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! It is separate from the adapter's values because only the ends of a run read and write files.

use std::collections::HashMap;
use std::ops::Range;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};

use super::adapter::{Adapter, AdapterEntry, AdapterError, AdapterLayout, LoraSpec, Target, targets_named};
use super::architecture::{Architecture, Family};
use super::archive::{Archive, ArchiveError};

const CONFIG_FILE: &str = "adapter_config.json";
const TENSOR_FILE: &str = "adapter_model.safetensors";

/// PEFT's files.
impl Adapter {
    /// The two files of a PEFT adapter, (name, bytes). `base_model` becomes `base_model_name_or_path`.
    /// An adapter of some blocks only says so in `layers_to_transform`.
    ///
    /// # Errors
    /// [`AdapterError::Length`] when `values` does not fit the layout.
    pub fn to_peft(&self, model: &Architecture, base_model: &str) -> Result<[(&'static str, Vec<u8>); 2], AdapterError> {
        if self.values.len() != self.layout.len() {
            return Err(AdapterError::Length {
                expected: self.layout.len(),
                found: self.values.len(),
            });
        }
        let blocks = self.layout.blocks();
        let mut description = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": self.spec.rank,
            "lora_alpha": number(self.spec.alpha),
            "lora_dropout": 0.0,
            "target_modules": Target::peft_names(&self.spec.targets),
            "fan_in_fan_out": !model.transposed(),
            "bias": "none",
            "inference_mode": true,
            "init_lora_weights": true,
            "use_rslora": self.spec.rank_stabilised,
            "use_dora": false,
            "modules_to_save": null,
        });
        if blocks != (0..model.blocks) {
            description["layers_to_transform"] = blocks.collect();
            description["layers_pattern"] = json!(names(model.family).1);
        }
        let mut text = serde_json::to_string_pretty(&description).expect("a JSON value has a text");
        text.push('\n');

        let bytes: Vec<u8> = self.values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let mut views = Vec::new();
        for entry in self.layout.entries() {
            for (matrix, range, shape) in [
                ("A", entry.range_a(), vec![entry.rank, entry.inputs]),
                ("B", entry.range_b(), vec![entry.outputs, entry.rank]),
            ] {
                let name = format!("base_model.model.{}", tensor_name(model, entry, matrix));
                let view = TensorView::new(Dtype::F32, shape, &bytes[4 * range.start..4 * range.end])
                    .expect("the layout gives each tensor as many bytes as its shape");
                views.push((name, view));
            }
        }
        let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let tensors = safetensors::serialize(views, Some(format)).expect("the header of an adapter is small");
        Ok([(TENSOR_FILE, tensors), (CONFIG_FILE, text.into_bytes())])
    }

    /// Reads the two files of a PEFT adapter of this model.
    ///
    /// `use_rslora` is taken into `alpha`, whose scale here is always α/rank.
    ///
    /// # Errors
    /// [`AdapterError`] names the setting or tensor that is missing, extra, mis-shaped or unsupported.
    pub fn from_peft(
        description: &str,
        tensors: impl super::archive::Source + 'static,
        model: &Architecture,
    ) -> Result<Self, AdapterError> {
        let description = Description::parse(description, model)?;
        let mut archive = Archive::open(TENSOR_FILE, tensors)?;
        let names = archive.names();
        let found: Vec<(usize, Target)> = names
            .iter()
            .map(|name| {
                parse_tensor_name(model, name).ok_or_else(|| AdapterError::Extra {
                    tensor: name.clone(),
                    blocks: model.blocks,
                })
            })
            .collect::<Result<_, _>>()?;
        // A pattern may mean anything: then the tensors themselves say what is adapted.
        let targets = description
            .targets
            .clone()
            .unwrap_or_else(|| found.iter().map(|&(_, target)| target).collect());
        let spec = LoraSpec::new(description.rank, description.alpha, targets)?;
        let layout = AdapterLayout::new(model, &spec, description.blocks.clone())?;
        if let Some(extra) = found
            .iter()
            .position(|&(block, target)| layout.entry(block, target).is_none())
        {
            return Err(AdapterError::Extra {
                tensor: names[extra].clone(),
                blocks: model.blocks,
            });
        }

        let mut by_canonical_name: HashMap<String, &String> = HashMap::with_capacity(names.len());
        for name in &names {
            let canonical = canonical_name(model, name).unwrap_or_default();
            if by_canonical_name.insert(canonical, name).is_some() {
                return Err(AdapterError::Extra {
                    tensor: name.clone(),
                    blocks: model.blocks,
                });
            }
        }
        // Every tensor is checked against the file's own size before room for its values is made.
        let mut order = Vec::with_capacity(2 * layout.entries().len());
        for entry in layout.entries() {
            for (matrix, shape) in [("A", [entry.rank, entry.inputs]), ("B", [entry.outputs, entry.rank])] {
                let wanted = tensor_name(model, entry, matrix);
                let Some(name) = by_canonical_name.get(&wanted) else {
                    return Err(ArchiveError::Missing {
                        file: TENSOR_FILE.to_owned(),
                        tensor: format!("base_model.model.{wanted}"),
                    }
                    .into());
                };
                archive.check(name, &shape)?;
                order.push((*name, shape));
            }
        }
        let mut values = Vec::with_capacity(layout.len());
        for (name, shape) in order {
            values.extend(archive.read(name, &shape)?);
        }
        Ok(Self { spec, layout, values })
    }

    /// Writes a PEFT directory. Each file is replaced atomically: a reader sees the old one or the new one.
    ///
    /// # Errors
    /// [`AdapterError::File`] with the path; as [`Adapter::to_peft`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn save(&self, dir: &std::path::Path, model: &Architecture, base_model: &str) -> Result<(), AdapterError> {
        use std::io::Write;

        let files = self.to_peft(model, base_model)?;
        let error = |action, path: &std::path::Path, source| AdapterError::File {
            action,
            path: path.display().to_string(),
            source,
        };
        std::fs::create_dir_all(dir).map_err(|source| error("create", dir, source))?;
        for (name, bytes) in files {
            let path = dir.join(name);
            let temporary = dir.join(format!(".{name}.{}.tmp", std::process::id()));
            let written = std::fs::File::create(&temporary)
                .and_then(|mut file| file.write_all(&bytes).and_then(|()| file.sync_all()))
                .and_then(|()| std::fs::rename(&temporary, &path));
            if let Err(source) = written {
                // The first error is the one to report, whether or not the leftover can be removed.
                let _ = std::fs::remove_file(&temporary);
                return Err(error("write", &path, source));
            }
        }
        Ok(())
    }

    /// Reads a PEFT directory.
    ///
    /// # Errors
    /// [`AdapterError::File`] with the path; as [`Adapter::from_peft`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn load(dir: &std::path::Path, model: &Architecture) -> Result<Self, AdapterError> {
        let path = dir.join(CONFIG_FILE);
        let read_error = |path: &std::path::Path, source| AdapterError::File {
            action: "read",
            path: path.display().to_string(),
            source,
        };
        let description = std::fs::read_to_string(&path).map_err(|source| read_error(&path, source))?;
        let path = dir.join(TENSOR_FILE);
        let tensors = std::fs::File::open(&path).map_err(|source| read_error(&path, source))?;
        Self::from_peft(&description, tensors, model)
    }
}

/// A number as a person would write it: 32, not 32.0.
fn number(value: f32) -> Value {
    if value.fract() == 0.0 && value < 1e9 {
        json!(value as u64)
    } else {
        json!(value)
    }
}

/// What a model of the family calls its body, and its list of blocks there.
fn names(family: Family) -> (&'static str, &'static str) {
    match family {
        Family::Gpt2 => ("transformer", "h"),
        Family::Llama | Family::Qwen2 | Family::Qwen3 => ("model", "layers"),
    }
}

/// A tensor's name without `base_model.model.`.
fn tensor_name(model: &Architecture, entry: &AdapterEntry, matrix: &str) -> String {
    let (body, blocks) = names(model.family);
    let (block, module) = (entry.block, entry.target.module());
    format!("{body}.{blocks}.{block}.{module}.lora_{matrix}.weight")
}

/// A tensor's name as [`tensor_name`] writes it, from the forms PEFT has written: with or without
/// `base_model.model.`, the body's name and the adapter's name `default`.
fn canonical_name(model: &Architecture, name: &str) -> Option<String> {
    let (body, _) = names(model.family);
    let name = name.strip_prefix("base_model.model.").unwrap_or(name);
    let name = name.strip_prefix(body).and_then(|rest| rest.strip_prefix('.')).unwrap_or(name);
    let (module, matrix) = name.rsplit_once(".lora_")?;
    let matrix = matrix.strip_suffix(".weight")?;
    let matrix = matrix.strip_suffix(".default").unwrap_or(matrix);
    matches!(matrix, "A" | "B").then(|| format!("{body}.{module}.lora_{matrix}.weight"))
}

fn parse_tensor_name(model: &Architecture, name: &str) -> Option<(usize, Target)> {
    let (body, blocks) = names(model.family);
    let name = canonical_name(model, name)?;
    let (module, _) = name.rsplit_once(".lora_")?;
    let (block, module) = module.strip_prefix(&format!("{body}.{blocks}."))?.split_once('.')?;
    let target = model.targets().iter().copied().find(|target| target.module() == module)?;
    let index: usize = block.parse().ok()?;
    (index.to_string() == block).then_some((index, target))
}

/// What an `adapter_config.json` asks for.
struct Description {
    rank: usize,
    alpha: f32,
    /// `None` when `target_modules` is a pattern.
    targets: Option<Vec<Target>>,
    blocks: Range<usize>,
}

impl Description {
    fn parse(text: &str, model: &Architecture) -> Result<Self, AdapterError> {
        let fields: Map<String, Value> =
            serde_json::from_str(text).map_err(|error| AdapterError::Description(error.to_string()))?;
        check_settings(&fields)?;
        let present = |field: &str| fields.get(field).filter(|value| !value.is_null());
        let bad = |field: &str, expected: &str| AdapterError::Description(format!("`{field}` must be {expected}"));

        let rank = present("r")
            .and_then(Value::as_u64)
            .ok_or_else(|| bad("r", "a whole number"))?;
        let rank = usize::try_from(rank).unwrap_or(usize::MAX);
        let alpha = match present("lora_alpha") {
            Some(alpha) => alpha.as_f64().ok_or_else(|| bad("lora_alpha", "a number"))?,
            None => return Err(bad("lora_alpha", "a number")),
        };
        let rank_stabilised = present("use_rslora").is_some_and(|value| *value == Value::Bool(true));
        // rsLoRA (arXiv 2312.03732) scales by α/√r.
        let alpha = if rank_stabilised {
            alpha * (rank as f64).sqrt()
        } else {
            alpha
        } as f32;

        let targets = match present("target_modules") {
            Some(Value::Array(names)) => {
                let mut targets = Vec::new();
                for name in names {
                    let name = name
                        .as_str()
                        .ok_or_else(|| bad("target_modules", "a list of module names"))?;
                    targets.extend(targets_named(model, name)?);
                }
                Some(targets)
            }
            Some(Value::String(name)) => targets_named(model, name).ok(),
            _ => return Err(bad("target_modules", "a list of module names, or one")),
        };
        let blocks = match present("layers_to_transform") {
            None => 0..model.blocks,
            Some(layers) => layer_range(layers)
                .filter(|blocks| blocks.end <= model.blocks)
                .ok_or_else(|| bad("layers_to_transform", "an ascending run of this model's blocks"))?,
        };
        Ok(Self {
            rank,
            alpha,
            targets,
            blocks,
        })
    }
}

/// `[2, 3, 4]` or `2` as a range.
fn layer_range(layers: &Value) -> Option<Range<usize>> {
    let layers: Vec<u64> = match layers {
        Value::Array(layers) => layers.iter().map(Value::as_u64).collect::<Option<_>>()?,
        layer => vec![layer.as_u64()?],
    };
    let consecutive = layers.windows(2).all(|pair| pair[0].checked_add(1) == Some(pair[1]));
    let (first, last) = (*layers.first()?, *layers.last()?);
    let end = usize::try_from(last).ok()?.checked_add(1)?;
    consecutive.then_some(first as usize..end)
}

/// Settings that change the mathematics: each must be absent, null or what this crate implements.
fn check_settings(fields: &Map<String, Value>) -> Result<(), AdapterError> {
    let unsupported = |field, value: &Value, supported| AdapterError::Unsupported {
        field,
        found: value.to_string().chars().take(80).collect(),
        supported,
    };
    match fields.get("peft_type") {
        Some(Value::String(peft_type)) if peft_type == "LORA" => {}
        Some(other) => return Err(unsupported("peft_type", other, "\"LORA\" is")),
        None => return Err(AdapterError::Description("`peft_type` is missing".to_owned())),
    }
    let empty = |value: &Value| match value {
        Value::Bool(value) => !value,
        Value::Array(items) => items.is_empty(),
        Value::Object(items) => items.is_empty(),
        _ => value.is_null(),
    };
    // Variants of LoRA, and things PEFT can train beside it: each must be off.
    const OFF: [(&str, &str); 17] = [
        ("alora_invocation_tokens", "plain LoRA is"),
        ("alpha_pattern", "one alpha for all modules is"),
        ("arrow_config", "plain LoRA is"),
        ("exclude_modules", "naming the adapted ones in target_modules is"),
        ("kasa_config", "plain LoRA is"),
        ("layer_replication", "a model as its files have it is"),
        ("lora_bias", "an adapter without biases is"),
        ("modules_to_save", "an adapter of LoRA matrices alone is"),
        ("monteclora_config", "plain LoRA is"),
        ("rank_pattern", "one rank for all modules is"),
        ("target_parameters", "naming the adapted modules in target_modules is"),
        ("trainable_token_indices", "an adapter of LoRA matrices alone is"),
        ("use_bdlora", "plain LoRA is"),
        ("use_dora", "plain LoRA is"),
        ("use_qalora", "plain LoRA is"),
        ("velora_config", "plain LoRA is"),
        ("megatron_config", "plain LoRA is"),
    ];
    for (field, supported) in OFF {
        if let Some(value) = fields.get(field).filter(|value| !empty(value)) {
            return Err(unsupported(field, value, supported));
        }
    }
    let present = |field: &str| fields.get(field).filter(|value| !value.is_null());
    for (field, accepted, supported) in [
        ("task_type", "CAUSAL_LM", "\"CAUSAL_LM\" is"),
        ("bias", "none", "\"none\" is"),
    ] {
        if let Some(value) = present(field).filter(|value| value.as_str() != Some(accepted)) {
            return Err(unsupported(field, value, supported));
        }
    }
    for field in ["use_rslora", "fan_in_fan_out"] {
        if let Some(value) = present(field).filter(|value| !value.is_boolean()) {
            return Err(unsupported(field, value, "true or false is"));
        }
    }
    // These initialisations change the frozen weights too, so their adapters fit no plain checkpoint.
    if let Some(value) = present("init_lora_weights")
        && let Some(method) = value.as_str()
        && ["pissa", "olora", "corda", "loftq", "lora_ga"]
            .iter()
            .any(|changing| method.starts_with(changing))
    {
        return Err(unsupported(
            "init_lora_weights",
            value,
            "one that leaves the base model as it is, such as true, is",
        ));
    }
    Ok(())
}
