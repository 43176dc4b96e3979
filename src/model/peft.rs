//! Adapters as PEFT's files: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! It is separate from the adapter's values because only the ends of a run read and write files.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use fancy_regex::Regex;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};

use super::adapter::{Adapter, AdapterEntry, AdapterError, AdapterLayout, Exception, LoraSpec, Target, no_target};
use super::architecture::{Architecture, Family};
use super::archive::{Archive, ArchiveError};
use super::export::card::{CARD_FILE, card};

/// The files of a PEFT directory.
pub(crate) const CONFIG_FILE: &str = "adapter_config.json";
pub(crate) const TENSOR_FILE: &str = "adapter_model.safetensors";

/// PEFT's files.
impl Adapter {
    /// The two files of a PEFT adapter, (name, bytes). `base_model` becomes `base_model_name_or_path`.
    /// An adapter of some blocks only says so in `layers_to_transform`.
    ///
    /// # Errors
    /// [`AdapterError::Length`] when `values` does not fit the layout.
    pub fn to_peft(
        &self,
        model: &Architecture,
        base_model: &str,
    ) -> Result<[(&'static str, Vec<u8>); 2], AdapterError> {
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
            "target_modules": self.target_modules(model),
            "fan_in_fan_out": model.family == Family::Gpt2,
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
        let (ranks, alphas) = self.patterns(model);
        description["rank_pattern"] = ranks;
        description["alpha_pattern"] = alphas;
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

    /// The shortest names where every target is adapted in every block, else those of the adapted modules.
    fn target_modules(&self, model: &Architecture) -> Vec<String> {
        if self.spec.exceptions.iter().any(|exception| exception.rank == 0) {
            let entries = self.layout.entries().iter();
            return entries
                .map(|entry| module_name(model, entry.block, entry.target))
                .collect();
        }
        let names = Target::peft_names(&self.spec.targets).into_iter();
        names.map(str::to_owned).collect()
    }

    /// `rank_pattern` and `alpha_pattern` of the exceptions.
    fn patterns(&self, model: &Architecture) -> (Value, Value) {
        let (mut ranks, mut alphas) = (Map::new(), Map::new());
        for exception in self.spec.exceptions.iter().filter(|exception| exception.rank > 0) {
            let module = module_name(model, exception.block, exception.target).replace('.', r"\.");
            if exception.rank != self.spec.rank {
                ranks.insert(module.clone(), json!(exception.rank));
            }
            if exception.alpha != self.spec.alpha {
                alphas.insert(module, number(exception.alpha));
            }
        }
        (Value::Object(ranks), Value::Object(alphas))
    }

    /// Reads the two files of a PEFT adapter of this model. What is adapted, and how, is found as PEFT finds it, module by module;
    /// the tensors must be exactly those. Projections whose rank or alpha is their own become
    /// [exceptions](LoraSpec::exceptions).
    ///
    /// # Errors
    /// [`AdapterError`] names the setting or tensor that is missing, extra, mis-shaped or unsupported.
    pub fn from_peft(
        description: &str,
        tensors: impl super::archive::Source + 'static,
        model: &Architecture,
    ) -> Result<Self, AdapterError> {
        let description = Description::parse(description)?;
        let mut archive = Archive::open(TENSOR_FILE, tensors)?;
        let names = archive.names();
        let found = names.iter().filter_map(|name| parse_tensor_name(model, name)).collect();
        let (spec, blocks) = description.spec(model, &found)?;
        let layout = AdapterLayout::new(model, &spec, blocks)?;
        let mut by_canonical_name: HashMap<String, &String> = HashMap::with_capacity(names.len());
        for name in &names {
            let extra = || AdapterError::Extra {
                tensor: name.clone(),
                blocks: model.blocks,
            };
            let (block, target) = parse_tensor_name(model, name).ok_or_else(extra)?;
            layout.entry(block, target).ok_or_else(extra)?;
            let canonical = canonical_name(model, name).ok_or_else(extra)?;
            if by_canonical_name.insert(canonical, name).is_some() {
                return Err(extra());
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

    /// Writes a PEFT directory. Each file is replaced atomically: a reader sees the old one or the new one. A model card is put
    /// beside them where there is none.
    ///
    /// # Errors
    /// [`AdapterError::File`] with the path; as [`Adapter::to_peft`].
    pub fn save(&self, dir: &std::path::Path, model: &Architecture, base_model: &str) -> Result<(), AdapterError> {
        let files = self.to_peft(model, base_model)?;
        std::fs::create_dir_all(dir).map_err(|error| crate::disk::Error::file("create", dir, error))?;
        for (name, bytes) in &files {
            crate::disk::replace(&dir.join(name), bytes)?;
        }
        let readme = dir.join(CARD_FILE);
        if std::fs::symlink_metadata(&readme).is_err() {
            let [_, (_, description)] = &files;
            let description: Value = serde_json::from_slice(description).expect("it was written just now");
            crate::disk::replace(&readme, card(&description, None).as_bytes())?;
        }
        Ok(())
    }

    /// Reads a PEFT directory.
    ///
    /// # Errors
    /// [`AdapterError::File`] with the path; as [`Adapter::from_peft`].
    pub fn load(dir: &std::path::Path, model: &Architecture) -> Result<Self, AdapterError> {
        let path = dir.join(CONFIG_FILE);
        let read_error = |path: &std::path::Path, error| crate::disk::Error::file("read", path, error);
        let description = std::fs::read_to_string(&path).map_err(|source| read_error(&path, source))?;
        let path = dir.join(TENSOR_FILE);
        let tensors = match std::fs::File::open(&path) {
            Ok(tensors) => tensors,
            Err(_) if !path.exists() && dir.join("adapter_model.bin").exists() => {
                return Err(AdapterError::Unsupported {
                    field: "adapter_model.bin",
                    found: "a pickle".to_owned(),
                    supported: "adapter_model.safetensors is: save the adapter with save_pretrained(..., safe_serialization=True)",
                });
            }
            Err(error) => return Err(read_error(&path, error).into()),
        };
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
    let name = name
        .strip_prefix(body)
        .and_then(|rest| rest.strip_prefix('.'))
        .unwrap_or(name);
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
    let target = model
        .targets()
        .iter()
        .copied()
        .find(|target| target.module() == module)?;
    let index: usize = block.parse().ok()?;
    (index.to_string() == block).then_some((index, target))
}

/// A module's name as PEFT matches it, within the base model.
fn module_name(model: &Architecture, block: usize, target: Target) -> String {
    let (body, blocks) = names(model.family);
    format!("{body}.{blocks}.{block}.{}", target.module())
}

/// Which modules a setting of an `adapter_config.json` means.
enum Modules {
    /// `"all-linear"`: every projection.
    All,
    /// A regular expression for a whole name.
    Pattern(Regex),
    /// Names, or ends of names.
    Names(Vec<String>),
}

impl Modules {
    fn parse(field: &'static str, value: &Value) -> Result<Self, AdapterError> {
        match value {
            Value::String(all) if all == "all-linear" => Ok(Modules::All),
            // A plain name in place of a list of one; as a pattern it would mean no module.
            Value::String(name) if name.chars().all(|c| c.is_alphanumeric() || c == '_') => {
                Ok(Modules::Names(vec![name.clone()]))
            }
            Value::String(pattern) => Ok(Modules::Pattern(regex(field, &format!("^(?:{pattern})$"))?)),
            Value::Array(names) => names
                .iter()
                .map(|name| name.as_str().map(str::to_owned))
                .collect::<Option<_>>()
                .map(Modules::Names)
                .ok_or_else(|| bad(field, "a list of module names, or one pattern")),
            _ => Err(bad(field, "a list of module names, or one pattern")),
        }
    }

    /// Whether a module is meant, and whether by its whole name.
    fn match_of(&self, module: &str) -> Option<Match> {
        let ends = |name: &String| {
            module
                .strip_suffix(name.as_str())
                .is_some_and(|rest| rest.ends_with('.'))
        };
        match self {
            Modules::All => Some(Match::End),
            Modules::Pattern(pattern) => pattern.is_match(module).unwrap_or(false).then_some(Match::Whole),
            Modules::Names(names) if names.iter().any(|name| name == module) => Some(Match::Whole),
            Modules::Names(names) => names.iter().any(ends).then_some(Match::End),
        }
    }
}

/// How a module was found. `layers_to_transform` restricts those found by the end of their name.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Match {
    Whole,
    End,
}

/// Numbers for modules whose names end with a pattern, the first that fits counting.
struct Patterns(Vec<(Regex, f64)>);

impl Patterns {
    fn parse(field: &'static str, ordered: Ordered) -> Result<Self, AdapterError> {
        ordered
            .0
            .into_iter()
            .map(|(pattern, number)| Ok((regex(field, &format!(r"^(?:.*\.)?(?:{pattern})$"))?, number)))
            .collect::<Result<_, _>>()
            .map(Self)
    }

    fn find(&self, module: &str) -> Option<f64> {
        let fits = |(pattern, _): &&(Regex, f64)| pattern.is_match(module).unwrap_or(false);
        self.0.iter().find(fits).map(|(_, number)| *number)
    }
}

/// An object of numbers in the order of the file, which decides between patterns.
#[derive(Default)]
struct Ordered(Vec<(String, f64)>);

impl<'de> serde::Deserialize<'de> for Ordered {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> serde::de::Visitor<'de> for Entries {
            type Value = Ordered;

            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("an object whose values are numbers")
            }

            fn visit_unit<E>(self) -> Result<Ordered, E> {
                Ok(Ordered::default())
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Ordered, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Ordered(entries))
            }
        }
        deserializer.deserialize_any(Entries)
    }
}

fn regex(field: &'static str, pattern: &str) -> Result<Regex, AdapterError> {
    Regex::new(pattern).map_err(|_| AdapterError::Unsupported {
        field,
        found: pattern.chars().take(80).collect(),
        supported: "a regular expression that is valid in Rust too is",
    })
}

fn bad(field: &str, expected: &str) -> AdapterError {
    AdapterError::Description(format!("`{field}` must be {expected}"))
}

/// What an `adapter_config.json` asks for.
struct Description {
    rank: usize,
    alpha: f32,
    rank_stabilised: bool,
    modules: Modules,
    excluded: Option<Modules>,
    /// `None` for all.
    layers: Option<Vec<u64>>,
    ranks: Patterns,
    alphas: Patterns,
}

impl Description {
    fn parse(text: &str) -> Result<Self, AdapterError> {
        /// The two settings whose order counts.
        #[derive(serde::Deserialize)]
        struct InOrder {
            #[serde(default)]
            rank_pattern: Ordered,
            #[serde(default)]
            alpha_pattern: Ordered,
        }
        let text = text.trim_start_matches('\u{feff}');
        let json = |error: serde_json::Error| AdapterError::Description(error.to_string());
        let fields: Map<String, Value> = serde_json::from_str(text).map_err(json)?;
        check_settings(&fields)?;
        for field in ["rank_pattern", "alpha_pattern"] {
            let numbers = |value: &Value| match value {
                Value::Object(entries) => entries.values().all(Value::is_number),
                value => value.is_null(),
            };
            if !fields.get(field).is_none_or(numbers) {
                return Err(bad(field, "an object whose values are numbers"));
            }
        }
        let ordered: InOrder = serde_json::from_str(text).map_err(json)?;
        let present = |field: &str| fields.get(field).filter(|value| !value.is_null());
        let rank = present("r")
            .and_then(Value::as_u64)
            .ok_or_else(|| bad("r", "a whole number"))?;
        let alpha = present("lora_alpha")
            .and_then(Value::as_f64)
            .ok_or_else(|| bad("lora_alpha", "a number"))?;
        let modules =
            present("target_modules").ok_or_else(|| bad("target_modules", "a list of module names, or one"))?;
        let layers = match present("layers_to_transform") {
            None => None,
            Some(layers) => {
                let several = match layers {
                    Value::Array(layers) => layers.iter().map(Value::as_u64).collect::<Option<Vec<_>>>(),
                    one => one.as_u64().map(|layer| vec![layer]),
                };
                Some(several.ok_or_else(|| bad("layers_to_transform", "a block's number, or a list of them"))?)
            }
        };
        Ok(Self {
            rank: usize::try_from(rank).unwrap_or(usize::MAX),
            alpha: alpha as f32,
            rank_stabilised: present("use_rslora").is_some_and(|value| *value == Value::Bool(true)),
            modules: Modules::parse("target_modules", modules)?,
            excluded: present("exclude_modules")
                .map(|excluded| Modules::parse("exclude_modules", excluded))
                .transpose()?,
            layers,
            ranks: Patterns::parse("rank_pattern", ordered.rank_pattern)?,
            alphas: Patterns::parse("alpha_pattern", ordered.alpha_pattern)?,
        })
    }

    /// Rank and alpha of a module; `None` where it is not adapted. What is not listed by name is adapted where there are tensors.
    fn of(
        &self,
        model: &Architecture,
        place: (usize, Target),
        found: &HashSet<(usize, Target)>,
    ) -> Option<(usize, f32)> {
        let (block, target) = place;
        let module = module_name(model, block, target);
        if self
            .excluded
            .as_ref()
            .is_some_and(|excluded| excluded.match_of(&module).is_some())
        {
            return None;
        }
        let matched = self.modules.match_of(&module)?;
        if !matches!(self.modules, Modules::Names(_)) && !found.contains(&place) {
            return None;
        }
        let listed = |layers: &Vec<u64>| layers.contains(&(block as u64));
        if matched == Match::End && !self.layers.as_ref().is_none_or(listed) {
            return None;
        }
        let rank = self.ranks.find(&module).map_or(self.rank, |rank| rank as usize);
        let alpha = self.alphas.find(&module).map_or(self.alpha, |alpha| alpha as f32);
        Some((rank, alpha))
    }

    /// The spec, and the blocks it is for: a run of `layers_to_transform`, else all.
    fn spec(
        &self,
        model: &Architecture,
        found: &HashSet<(usize, Target)>,
    ) -> Result<(LoraSpec, Range<usize>), AdapterError> {
        let blocks = self.blocks(model)?;
        self.check_names(model)?;
        let all = blocks
            .clone()
            .flat_map(|block| model.targets().iter().map(move |&target| (block, target)));
        let adapted: Vec<_> = all.map(|place| (place, self.of(model, place, found))).collect();
        let targets: Vec<Target> = adapted
            .iter()
            .filter(|(_, of)| of.is_some())
            .map(|&((_, target), _)| target)
            .collect();
        let spec = LoraSpec::new(self.rank, self.alpha, targets)?;
        let exceptions = adapted
            .into_iter()
            .filter(|((_, target), of)| spec.targets.contains(target) && *of != Some((self.rank, self.alpha)))
            .map(|((block, target), of)| {
                let (rank, alpha) = of.unwrap_or((0, self.alpha));
                Exception {
                    block,
                    target,
                    rank,
                    alpha,
                }
            })
            .collect();
        let mut spec = spec.with_exceptions(exceptions)?;
        spec.rank_stabilised = self.rank_stabilised;
        Ok((spec, blocks))
    }

    fn blocks(&self, model: &Architecture) -> Result<Range<usize>, AdapterError> {
        let Some(layers) = &self.layers else {
            return Ok(0..model.blocks);
        };
        if let Some(layer) = layers.iter().find(|&&layer| layer >= model.blocks as u64) {
            return Err(AdapterError::Unsupported {
                field: "layers_to_transform",
                found: layer.to_string(),
                supported: "a block of this model is",
            });
        }
        let consecutive = layers.windows(2).all(|pair| pair[0] + 1 == pair[1]);
        Ok(match (layers.first(), layers.last()) {
            (Some(&first), Some(&last)) if consecutive => first as usize..last as usize + 1,
            _ => 0..model.blocks,
        })
    }

    /// A listed name that means no module is a mistake in the list, or another model's.
    fn check_names(&self, model: &Architecture) -> Result<(), AdapterError> {
        let Modules::Names(names) = &self.modules else {
            return Ok(());
        };
        for name in names {
            let means = |block: usize, target: Target| {
                let module = module_name(model, block, target);
                Modules::Names(vec![name.clone()]).match_of(&module).is_some()
            };
            let any = (0..model.blocks).any(|block| model.targets().iter().any(|&target| means(block, target)));
            if !any {
                return Err(no_target(model, name));
            }
        }
        Ok(())
    }
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
    const OFF: [(&str, &str); 14] = [
        ("alora_invocation_tokens", "plain LoRA is"),
        ("arrow_config", "plain LoRA is"),
        ("kasa_config", "plain LoRA is"),
        ("layer_replication", "a model as its files have it is"),
        ("lora_bias", "an adapter without biases is"),
        ("modules_to_save", "an adapter of LoRA matrices alone is"),
        ("monteclora_config", "plain LoRA is"),
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
