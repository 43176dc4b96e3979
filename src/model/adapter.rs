//! LoRA adapters: which matrices are adapted, the one flat order of their values, and PEFT's files.
//!
//! It is separate from the blocks because an adapter travels without them: it is averaged, sent, sliced at
//! the cut and exported as one flat vector whose order this file alone defines.
//!
//! LoRA (arXiv 2106.09685): for an adapted matrix W (in, out), `y = x·W + b + (α/r)·(x·Aᵀ)·Bᵀ`
//! with A (rank, in) and B (out, rank).

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::archive::{Archive, ArchiveError};
use super::config::Config;

/// The largest rank accepted.
pub const MAX_RANK: usize = 1 << 14;
/// Values an adapter may hold in all.
const MAX_VALUES: u64 = 1 << 29;

const CONFIG_FILE: &str = "adapter_config.json";
const TENSOR_FILE: &str = "adapter_model.safetensors";

/// A matrix of a block that LoRA can adapt, in the canonical order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// `attn.c_attn`: (width, 3·width).
    AttnQkv,
    /// `attn.c_proj`: (width, width).
    AttnProj,
    /// `mlp.c_fc`: (width, ffn).
    MlpFc,
    /// `mlp.c_proj`: (ffn, width).
    MlpProj,
}

impl Target {
    /// Every target, in the canonical order.
    pub const ALL: [Target; 4] = [Target::AttnQkv, Target::AttnProj, Target::MlpFc, Target::MlpProj];

    /// The module's name inside a block.
    pub fn module(self) -> &'static str {
        match self {
            Target::AttnQkv => "attn.c_attn",
            Target::AttnProj => "attn.c_proj",
            Target::MlpFc => "mlp.c_fc",
            Target::MlpProj => "mlp.c_proj",
        }
    }

    /// (in, out) of the adapted matrix.
    pub fn dimensions(self, config: &Config) -> (usize, usize) {
        match self {
            Target::AttnQkv => (config.width, 3 * config.width),
            Target::AttnProj => (config.width, config.width),
            Target::MlpFc => (config.width, config.ffn),
            Target::MlpProj => (config.ffn, config.width),
        }
    }

    /// Whether a name in a PEFT `target_modules` list means this target in every block: the whole module name
    /// or any trailing part of it, as PEFT matches.
    fn named_by(self, name: &str) -> bool {
        self.module() == name
            || self
                .module()
                .strip_suffix(name)
                .is_some_and(|rest| rest.ends_with('.') && !name.is_empty())
    }

    /// The shortest names that mean exactly these targets to PEFT.
    fn peft_names(targets: &[Target]) -> Vec<&'static str> {
        let both = targets.contains(&Target::AttnProj) && targets.contains(&Target::MlpProj);
        let mut names = Vec::new();
        for &target in targets {
            let name = match target {
                Target::AttnQkv => "c_attn",
                Target::MlpFc => "c_fc",
                Target::AttnProj | Target::MlpProj if both => "c_proj",
                Target::AttnProj | Target::MlpProj => target.module(),
            };
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }
}

/// Rank, scale and targets of an adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "LoraSpecFields")]
pub struct LoraSpec {
    pub rank: usize,
    /// α; the low-rank product is scaled by α/rank.
    pub alpha: f32,
    /// Distinct, in the canonical order.
    pub targets: Vec<Target>,
}

/// Fields of a [`LoraSpec`] from outside, not yet checked.
#[derive(Deserialize)]
struct LoraSpecFields {
    rank: usize,
    alpha: f32,
    targets: Vec<Target>,
}

impl TryFrom<LoraSpecFields> for LoraSpec {
    type Error = AdapterError;

    fn try_from(fields: LoraSpecFields) -> Result<Self, AdapterError> {
        Self::new(fields.rank, fields.alpha, fields.targets)
    }
}

/// Why an adapter or its description was refused.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error("LoRA rank {rank} is out of range: 1 to {MAX_RANK} can be used")]
    Rank { rank: usize },
    #[error("LoRA alpha {alpha} must be a finite number above zero")]
    Alpha { alpha: f32 },
    #[error("`{name}` is no LoRA target of a GPT-2 model: c_attn, c_proj and c_fc are")]
    Target { name: String },
    #[error("an adapter needs at least one target: c_attn, c_proj or c_fc")]
    NoTarget,
    #[error("blocks {start}..{end} are not blocks of this model, which has {blocks}")]
    Blocks { start: usize, end: usize, blocks: usize },
    #[error("an adapter of {values} values is too large")]
    TooLarge { values: u64 },
    #[error("the adapter has {found} values, expected {expected}")]
    Length { expected: usize, found: usize },
    #[error("the adapter holds a value that is not finite, at position {position}")]
    NotFinite { position: usize },
    #[error("adapters cannot be joined: {reason}")]
    Merge { reason: String },
    #[error("{CONFIG_FILE} is not valid: {0}")]
    Config(String),
    #[error("{CONFIG_FILE}: `{field}` = {found} is not supported; {supported}")]
    Unsupported {
        field: &'static str,
        found: String,
        supported: &'static str,
    },
    #[error(
        "{TENSOR_FILE} has the tensor `{tensor}`, which this adapter of a GPT-2 model with {blocks} blocks does not"
    )]
    Extra { tensor: String, blocks: usize },
    #[error("cannot {action} {path}: {source}")]
    File {
        action: &'static str,
        path: String,
        source: std::io::Error,
    },
}

impl LoraSpec {
    /// Checks the numbers, and sorts the targets into the canonical order without repetition.
    ///
    /// # Errors
    /// [`AdapterError::Rank`], [`AdapterError::Alpha`], [`AdapterError::NoTarget`].
    pub fn new(rank: usize, alpha: f32, targets: impl IntoIterator<Item = Target>) -> Result<Self, AdapterError> {
        if !(1..=MAX_RANK).contains(&rank) {
            return Err(AdapterError::Rank { rank });
        }
        if !alpha.is_finite() || alpha <= 0.0 {
            return Err(AdapterError::Alpha { alpha });
        }
        let mut targets: Vec<Target> = targets.into_iter().collect();
        targets.sort();
        targets.dedup();
        if targets.is_empty() {
            return Err(AdapterError::NoTarget);
        }
        Ok(Self { rank, alpha, targets })
    }

    /// Targets from names such as `c_attn,c_proj,c_fc`; `c_proj` means both the attention's and the mlp's,
    /// `attn.c_proj` and `mlp.c_proj` one of them.
    ///
    /// # Errors
    /// [`AdapterError::Target`] names the unknown one.
    pub fn parse_targets(names: &str) -> Result<Vec<Target>, AdapterError> {
        let mut targets = Vec::new();
        for name in names.split(',').map(str::trim).filter(|name| !name.is_empty()) {
            targets.extend(targets_named(name)?);
        }
        targets.sort();
        targets.dedup();
        if targets.is_empty() {
            Err(AdapterError::NoTarget)
        } else {
            Ok(targets)
        }
    }

    /// α/rank, the factor of the low-rank product.
    pub fn scale(&self) -> f32 {
        self.alpha / self.rank as f32
    }
}

fn targets_named(name: &str) -> Result<Vec<Target>, AdapterError> {
    let targets: Vec<Target> = Target::ALL.into_iter().filter(|target| target.named_by(name)).collect();
    if targets.is_empty() {
        Err(AdapterError::Target {
            name: name.chars().take(80).collect(),
        })
    } else {
        Ok(targets)
    }
}

/// Where one adapted matrix's A and B lie in the flat vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdapterEntry {
    /// Index in the whole model.
    pub block: usize,
    pub target: Target,
    pub rank: usize,
    /// Columns of A.
    pub inputs: usize,
    /// Rows of B.
    pub outputs: usize,
    /// Start of A (rank, inputs), row major.
    pub offset_a: usize,
    /// Start of B (outputs, rank), row major, right after A.
    pub offset_b: usize,
}

impl AdapterEntry {
    /// Where A lies.
    pub fn range_a(&self) -> Range<usize> {
        self.offset_a..self.offset_b
    }

    /// Where B lies.
    pub fn range_b(&self) -> Range<usize> {
        self.offset_b..self.offset_b + self.outputs * self.rank
    }
}

/// The canonical order of an adapter's values: blocks ascending, targets in the order of [`Target::ALL`],
/// A then B. The layouts of neighbouring ranges of blocks follow each other without a gap, so the client's
/// and the server's values one after the other are the whole model's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterLayout {
    blocks: Range<usize>,
    entries: Vec<AdapterEntry>,
    len: usize,
}

impl AdapterLayout {
    /// The layout for some blocks of a model.
    ///
    /// # Errors
    /// [`AdapterError::Blocks`] when the range is not within the model, [`AdapterError::TooLarge`].
    pub fn new(config: &Config, spec: &LoraSpec, blocks: Range<usize>) -> Result<Self, AdapterError> {
        if blocks.start > blocks.end || blocks.end > config.blocks {
            return Err(AdapterError::Blocks {
                start: blocks.start,
                end: blocks.end,
                blocks: config.blocks,
            });
        }
        let in_block: u64 = spec
            .targets
            .iter()
            .map(|target| target.dimensions(config))
            .map(|(inputs, outputs)| spec.rank as u64 * (inputs + outputs) as u64)
            .sum();
        let values = in_block * blocks.len() as u64;
        if values > MAX_VALUES {
            return Err(AdapterError::TooLarge { values });
        }
        let mut entries = Vec::with_capacity(blocks.len() * spec.targets.len());
        let mut len = 0;
        for block in blocks.clone() {
            for &target in &spec.targets {
                let (inputs, outputs) = target.dimensions(config);
                let offset_b = len + spec.rank * inputs;
                entries.push(AdapterEntry {
                    block,
                    target,
                    rank: spec.rank,
                    inputs,
                    outputs,
                    offset_a: len,
                    offset_b,
                });
                len = offset_b + outputs * spec.rank;
            }
        }
        Ok(Self { blocks, entries, len })
    }

    /// The blocks covered.
    pub fn blocks(&self) -> Range<usize> {
        self.blocks.clone()
    }

    /// One entry per adapted matrix, in order.
    pub fn entries(&self) -> &[AdapterEntry] {
        &self.entries
    }

    /// The entry of one matrix, if it is adapted.
    pub fn entry(&self, block: usize, target: Target) -> Option<&AdapterEntry> {
        self.entries
            .iter()
            .find(|entry| entry.block == block && entry.target == target)
    }

    /// Values in all.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no block is covered.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// The LoRA matrices of some blocks, as one flat vector.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    pub spec: LoraSpec,
    pub layout: AdapterLayout,
    /// In the order of `layout`.
    pub values: Vec<f32>,
}

impl Adapter {
    /// A fresh adapter, which changes nothing yet: A uniform in ±1/√in (Kaiming with a = √5), B zero.
    ///
    /// Each matrix draws from a stream of its own, so however the blocks are split the numbers are the same.
    ///
    /// # Errors
    /// As [`AdapterLayout::new`].
    pub fn init(config: &Config, spec: &LoraSpec, blocks: Range<usize>, seed: u64) -> Result<Self, AdapterError> {
        let layout = AdapterLayout::new(config, spec, blocks)?;
        let mut values = vec![0.0; layout.len()];
        for entry in layout.entries() {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream((entry.block * Target::ALL.len() + entry.target as usize) as u64);
            let bound = 1.0 / (entry.inputs as f32).sqrt();
            for value in &mut values[entry.range_a()] {
                let unit = (rng.next_u32() >> 8) as f32 / (1 << 24) as f32; // [0, 1)
                *value = (2.0 * unit - 1.0) * bound;
            }
        }
        Ok(Self {
            spec: spec.clone(),
            layout,
            values,
        })
    }

    /// An adapter from values in the canonical order, such as a peer sends.
    ///
    /// # Errors
    /// As [`AdapterLayout::new`]; [`AdapterError::Length`], [`AdapterError::NotFinite`].
    pub fn from_values(
        config: &Config,
        spec: &LoraSpec,
        blocks: Range<usize>,
        values: Vec<f32>,
    ) -> Result<Self, AdapterError> {
        let layout = AdapterLayout::new(config, spec, blocks)?;
        if values.len() != layout.len() {
            return Err(AdapterError::Length {
                expected: layout.len(),
                found: values.len(),
            });
        }
        if let Some(position) = values.iter().position(|value| !value.is_finite()) {
            return Err(AdapterError::NotFinite { position });
        }
        Ok(Self {
            spec: spec.clone(),
            layout,
            values,
        })
    }

    /// The part for some of this adapter's blocks.
    ///
    /// # Errors
    /// [`AdapterError::Blocks`] when the adapter does not cover them.
    pub fn slice(&self, config: &Config, blocks: Range<usize>) -> Result<Self, AdapterError> {
        let layout = AdapterLayout::new(config, &self.spec, blocks.clone())?;
        let own = self.layout.blocks();
        if blocks.start < own.start || blocks.end > own.end {
            return Err(AdapterError::Blocks {
                start: blocks.start,
                end: blocks.end,
                blocks: config.blocks,
            });
        }
        let start = match layout.entries().first() {
            Some(first) => match self.layout.entry(first.block, first.target) {
                Some(entry) => entry.offset_a,
                None => {
                    return Err(AdapterError::Blocks {
                        start: blocks.start,
                        end: blocks.end,
                        blocks: own.end,
                    });
                }
            },
            None => 0,
        };
        let values = match self.values.get(start..start + layout.len()) {
            Some(values) => values.to_vec(),
            None => {
                return Err(AdapterError::Length {
                    expected: self.layout.len(),
                    found: self.values.len(),
                });
            }
        };
        Ok(Self {
            spec: self.spec.clone(),
            layout,
            values,
        })
    }

    /// This adapter and the one of the blocks that follow, as one: the client's part and the server's.
    ///
    /// # Errors
    /// [`AdapterError::Merge`] when the specs differ or the blocks do not follow each other.
    pub fn merge(&self, config: &Config, next: &Self) -> Result<Self, AdapterError> {
        if self.spec != next.spec {
            return Err(AdapterError::Merge {
                reason: format!("{} and {}", self.spec, next.spec),
            });
        }
        let (first, second) = (self.layout.blocks(), next.layout.blocks());
        if first.end != second.start {
            return Err(AdapterError::Merge {
                reason: format!("blocks {first:?} are not followed by {second:?}"),
            });
        }
        let values = [&self.values[..], &next.values[..]].concat();
        Self::from_values(config, &self.spec, first.start..second.end, values)
    }
}

impl fmt::Display for LoraSpec {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = Target::peft_names(&self.targets).join(",");
        write!(formatter, "rank {}, alpha {}, targets {names}", self.rank, self.alpha)
    }
}

/// PEFT's files.
impl Adapter {
    /// The two files of a PEFT adapter, (name, bytes). `base_model` becomes `base_model_name_or_path`.
    /// An adapter of some blocks only says so in `layers_to_transform`.
    ///
    /// # Errors
    /// [`AdapterError::Length`] when `values` does not fit the layout.
    pub fn to_peft(&self, config: &Config, base_model: &str) -> Result<[(&'static str, Vec<u8>); 2], AdapterError> {
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
            "fan_in_fan_out": true,
            "bias": "none",
            "inference_mode": true,
            "init_lora_weights": true,
            "use_rslora": false,
            "use_dora": false,
            "modules_to_save": null,
        });
        if blocks != (0..config.blocks) {
            description["layers_to_transform"] = blocks.collect();
            description["layers_pattern"] = json!("h");
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
                let name = format!("base_model.model.transformer.{}", tensor_name(entry, matrix));
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
        config: &Config,
    ) -> Result<Self, AdapterError> {
        let description = Description::parse(description, config)?;
        let mut archive = Archive::open(TENSOR_FILE, tensors)?;
        let names = archive.names();
        let found: Vec<(usize, Target)> = names
            .iter()
            .map(|name| {
                parse_tensor_name(name).ok_or_else(|| AdapterError::Extra {
                    tensor: name.clone(),
                    blocks: config.blocks,
                })
            })
            .collect::<Result<_, _>>()?;
        // A pattern may mean anything: then the tensors themselves say what is adapted.
        let targets = description
            .targets
            .clone()
            .unwrap_or_else(|| found.iter().map(|&(_, target)| target).collect());
        let spec = LoraSpec::new(description.rank, description.alpha, targets)?;
        let layout = AdapterLayout::new(config, &spec, description.blocks.clone())?;
        if let Some(extra) = found
            .iter()
            .position(|&(block, target)| layout.entry(block, target).is_none())
        {
            return Err(AdapterError::Extra {
                tensor: names[extra].clone(),
                blocks: config.blocks,
            });
        }

        let mut by_canonical_name: HashMap<String, &String> = HashMap::with_capacity(names.len());
        for name in &names {
            let canonical = canonical_name(name).unwrap_or_default();
            if by_canonical_name.insert(canonical, name).is_some() {
                return Err(AdapterError::Extra {
                    tensor: name.clone(),
                    blocks: config.blocks,
                });
            }
        }
        // Every tensor is checked against the file's own size before room for its values is made.
        let mut order = Vec::with_capacity(2 * layout.entries().len());
        for entry in layout.entries() {
            for (matrix, shape) in [("A", [entry.rank, entry.inputs]), ("B", [entry.outputs, entry.rank])] {
                let wanted = tensor_name(entry, matrix);
                let Some(name) = by_canonical_name.get(&wanted) else {
                    return Err(ArchiveError::Missing {
                        file: TENSOR_FILE.to_owned(),
                        tensor: format!("base_model.model.transformer.{wanted}"),
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
    pub fn save(&self, dir: &std::path::Path, config: &Config, base_model: &str) -> Result<(), AdapterError> {
        use std::io::Write;

        let files = self.to_peft(config, base_model)?;
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
    pub fn load(dir: &std::path::Path, config: &Config) -> Result<Self, AdapterError> {
        let path = dir.join(CONFIG_FILE);
        let read_error = |path: &std::path::Path, source| AdapterError::File {
            action: "read",
            path: path.display().to_string(),
            source,
        };
        let description = std::fs::read_to_string(&path).map_err(|source| read_error(&path, source))?;
        let path = dir.join(TENSOR_FILE);
        let tensors = std::fs::File::open(&path).map_err(|source| read_error(&path, source))?;
        Self::from_peft(&description, tensors, config)
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

/// A tensor's name without `base_model.model.transformer.`.
fn tensor_name(entry: &AdapterEntry, matrix: &str) -> String {
    format!("h.{}.{}.lora_{matrix}.weight", entry.block, entry.target.module())
}

/// A tensor's name as [`tensor_name`] writes it, from the forms PEFT has written: with or without
/// `base_model.model.`, `transformer.` and the adapter's name `default`.
fn canonical_name(name: &str) -> Option<String> {
    let name = name.strip_prefix("base_model.model.").unwrap_or(name);
    let name = name.strip_prefix("transformer.").unwrap_or(name);
    let (module, matrix) = name.rsplit_once(".lora_")?;
    let matrix = matrix.strip_suffix(".weight")?;
    let matrix = matrix.strip_suffix(".default").unwrap_or(matrix);
    matches!(matrix, "A" | "B").then(|| format!("{module}.lora_{matrix}.weight"))
}

fn parse_tensor_name(name: &str) -> Option<(usize, Target)> {
    let name = canonical_name(name)?;
    let (module, _) = name.rsplit_once(".lora_")?;
    let (block, module) = module.strip_prefix("h.")?.split_once('.')?;
    let target = Target::ALL.into_iter().find(|target| target.module() == module)?;
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
    fn parse(text: &str, config: &Config) -> Result<Self, AdapterError> {
        let fields: Map<String, Value> =
            serde_json::from_str(text).map_err(|error| AdapterError::Config(error.to_string()))?;
        check_settings(&fields)?;
        let present = |field: &str| fields.get(field).filter(|value| !value.is_null());
        let bad = |field: &str, expected: &str| AdapterError::Config(format!("`{field}` must be {expected}"));

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
                    targets.extend(targets_named(name)?);
                }
                Some(targets)
            }
            Some(Value::String(name)) => targets_named(name).ok(),
            _ => return Err(bad("target_modules", "a list of module names, or one")),
        };
        let blocks = match present("layers_to_transform") {
            None => 0..config.blocks,
            Some(layers) => layer_range(layers)
                .filter(|blocks| blocks.end <= config.blocks)
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
        None => return Err(AdapterError::Config("`peft_type` is missing".to_owned())),
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
