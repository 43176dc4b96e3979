//! The frozen weights where they are kept: a Hugging Face directory, or bytes in memory, read one unit at a time.
//!
//! Weights are separate from the forward pass because a server hands units out without ever running them,
//! and because a device loads only its own.

use std::io::Cursor;
use std::sync::{Arc, Mutex};

use serde::Deserialize;

use super::architecture::{Architecture, Family};
use super::archive::{Archive, ArchiveError, Source};
use super::ends::embedding::{Embedding, RowSource, Rows};
use super::unit::{HEAD, Tensor, Unit, UnitData, layout};
use crate::terms::format::{Encoder, Format, FormatError, Layout};

/// Why weights were refused.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error("tensor `{tensor}` cannot be held as {format}: {error}")]
    Format {
        tensor: String,
        format: Format,
        error: FormatError,
    },
    #[error(
        "tensor `{tensor}` holds {value}, which is beyond {format}'s largest value: hold the weights with --weights f32"
    )]
    Overflow {
        tensor: String,
        format: Format,
        value: f32,
    },
    #[error(
        "the model's head `lm_head.weight` differs from `{embedding}`: this model's config.json says that they are one (tie_word_embeddings)"
    )]
    UntiedHead { embedding: &'static str },
    #[error("block {block} does not exist: the model has {blocks}")]
    NoSuchBlock { block: usize, blocks: usize },
    #[error("no model.safetensors in {dir}: save the model in safetensors form (save_pretrained does)")]
    NoFile { dir: String },
    #[error("model.safetensors.index.json: {0}")]
    Index(String),
    #[error("the bytes of model unit {unit} are not valid: {reason}")]
    Unit { unit: Unit, reason: String },
    #[error("`{0}` names no part of a model: embedding, block.<index> and final do")]
    UnitName(String),
}

/// How a device is to hold matrices: `--weights`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Holding {
    /// As the file has them where it quantises, else f16.
    #[default]
    Auto,
    As(Format),
}

impl Holding {
    /// The format for a matrix of a safetensors file.
    fn format(self) -> Format {
        match self {
            Holding::Auto => Format::F16,
            Holding::As(format) => format,
        }
    }
}

impl std::str::FromStr for Holding {
    type Err = FormatError;

    fn from_str(text: &str) -> Result<Self, FormatError> {
        Ok(match text {
            "auto" => Holding::Auto,
            name => Holding::As(name.parse()?),
        })
    }
}

impl std::fmt::Display for Holding {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Holding::Auto => formatter.write_str("auto"),
            Holding::As(format) => format.fmt(formatter),
        }
    }
}

/// Gives the parts of a model to whoever puts them on a device.
pub trait UnitSource {
    /// One unit, as devices hold it.
    ///
    /// # Errors
    /// [`WeightsError`] when it cannot be read.
    fn unit(&mut self, unit: Unit) -> Result<UnitData, WeightsError>;

    /// The embedding on the host, rows of which are read when they are needed.
    ///
    /// # Errors
    /// [`WeightsError`] when it cannot be read.
    fn embedding(&mut self) -> Result<Embedding, WeightsError>;
}

/// Units and embedding of some weights in one holding.
pub struct HeldUnits<'a> {
    pub weights: &'a Weights,
    pub holding: Holding,
}

impl UnitSource for HeldUnits<'_> {
    fn unit(&mut self, unit: Unit) -> Result<UnitData, WeightsError> {
        self.weights.unit(unit, self.holding)
    }

    fn embedding(&mut self) -> Result<Embedding, WeightsError> {
        self.weights.embedding(self.holding)
    }
}

/// A safetensors file that several readers share.
type Shared = Arc<Mutex<Archive>>;

fn lock(archive: &Shared) -> std::sync::MutexGuard<'_, Archive> {
    archive.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The weights of a model on disk or in memory, read one unit at a time.
#[derive(Debug)]
pub struct Weights {
    model: Architecture,
    archives: Vec<Shared>,
}

impl Weights {
    /// Opens `model.safetensors`, or the shards of `model.safetensors.index.json`, in a Hugging Face directory
    /// and checks that every tensor is there with its shape. Values are read by [`Weights::unit`].
    ///
    /// # Errors
    /// [`WeightsError`] names the file and tensor.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn open(dir: &std::path::Path, model: &Architecture) -> Result<Self, WeightsError> {
        let open = |path: &std::path::Path| {
            let file = path.display().to_string();
            match std::fs::File::open(path) {
                Ok(source) => Archive::open(&file, source),
                Err(source) => Err(ArchiveError::Read { file, source }),
            }
        };
        let single = dir.join("model.safetensors");
        if single.is_file() {
            return Self::from_archives(vec![open(&single)?], model);
        }
        let index = dir.join("model.safetensors.index.json");
        if !index.is_file() {
            return Err(WeightsError::NoFile {
                dir: dir.display().to_string(),
            });
        }
        let text = std::fs::read_to_string(&index).map_err(|source| ArchiveError::Read {
            file: index.display().to_string(),
            source,
        })?;
        let shards = shard_names(&text)?;
        let archives = shards
            .iter()
            .map(|shard| open(&dir.join(shard)))
            .collect::<Result<_, _>>()?;
        Self::from_archives(archives, model)
    }

    /// Opens a `model.safetensors` held in memory, such as an embedded model.
    ///
    /// # Errors
    /// [`WeightsError`] names the tensor.
    pub fn from_bytes(bytes: impl AsRef<[u8]> + Send + 'static, model: &Architecture) -> Result<Self, WeightsError> {
        Self::from_source("model.safetensors", Cursor::new(bytes), model)
    }

    /// Opens a safetensors file from any seekable source; `file` names it in errors.
    ///
    /// # Errors
    /// [`WeightsError`] names the tensor.
    pub fn from_source(file: &str, source: impl Source + 'static, model: &Architecture) -> Result<Self, WeightsError> {
        Self::from_archives(vec![Archive::open(file, source)?], model)
    }

    fn from_archives(archives: Vec<Archive>, model: &Architecture) -> Result<Self, WeightsError> {
        let weights = Self {
            model: model.clone(),
            archives: archives
                .into_iter()
                .map(|archive| Arc::new(Mutex::new(archive)))
                .collect(),
        };
        for unit in Unit::all(model) {
            for (tensor, shape) in unit.tensors(model) {
                let (archive, name) = weights.find(unit, tensor)?;
                lock(archive).check(&name, &shape)?;
            }
        }
        weights.check_tied_head()?;
        Ok(weights)
    }

    /// The shape the weights were checked against.
    pub fn model(&self) -> &Architecture {
        &self.model
    }

    /// Reads one unit, converting its matrices chunk by chunk.
    ///
    /// # Errors
    /// [`WeightsError::Overflow`] when a value is too large for its format, [`WeightsError::Archive`] when reading fails or a
    /// value is not finite, [`WeightsError::NoSuchBlock`].
    pub fn unit(&self, unit: Unit, holding: Holding) -> Result<UnitData, WeightsError> {
        unit.check(&self.model)?;
        let mut tensors = Vec::new();
        for (tensor, shape) in unit.tensors(&self.model) {
            let (archive, name) = self.find(unit, tensor)?;
            let format = if shape.len() == 2 { holding.format() } else { Format::F32 };
            let words = read(&mut lock(archive), &name, &shape, format)?;
            tensors.push(Tensor {
                name: tensor.to_owned(),
                shape,
                format,
                words,
            });
        }
        Ok(UnitData { unit, tensors })
    }

    /// How matrices of blocks are held, most of them.
    pub fn format(&self, holding: Holding) -> Format {
        holding.format()
    }

    /// The embedding, whose rows stay where they are kept until they are asked for. They are what [`Weights::unit`] gives for the
    /// same holding: rounded as the format rounds them.
    ///
    /// # Errors
    /// [`WeightsError::Archive`] when a tensor is missing.
    pub fn embedding(&self, holding: Holding) -> Result<Embedding, WeightsError> {
        let rows = Unit::Embedding
            .tensors(&self.model)
            .into_iter()
            .map(|(tensor, shape)| {
                let (archive, name) = self.find(Unit::Embedding, tensor)?;
                let format = holding.format();
                Ok(Rows::Stored(Arc::new(ArchiveRows {
                    archive: archive.clone(),
                    name,
                    layout: layout(&shape, format),
                })))
            })
            .collect::<Result<Vec<_>, WeightsError>>()?;
        Ok(Embedding::new(&self.model, rows))
    }

    /// The archive that holds a tensor, and its full name there. Files keep it with or without the name of the whole model before
    /// it; and a tied head, which is the embedding, under both names or either.
    fn find(&self, unit: Unit, tensor: &str) -> Result<(&Shared, String), ArchiveError> {
        let name = unit.file_name(&self.model, tensor);
        let other = match self.model.family {
            Family::Gpt2 => format!("transformer.{name}"),
            _ => name.strip_prefix("model.").unwrap_or(&name).to_owned(),
        };
        let tied = (self.model.tied && tensor == Unit::token_embedding(&self.model)).then(|| HEAD.to_owned());
        for name in [name.clone(), other].into_iter().chain(tied) {
            if let Some(archive) = self.archives.iter().find(|archive| lock(archive).contains(&name)) {
                return Ok((archive, name));
            }
        }
        let files: Vec<String> = self
            .archives
            .iter()
            .map(|archive| lock(archive).file().to_owned())
            .collect();
        Err(ArchiveError::Missing {
            file: files.join(", "),
            tensor: name,
        })
    }

    /// A file may carry a tied head a second time; it must then be the same matrix.
    fn check_tied_head(&self) -> Result<(), WeightsError> {
        let embedding = Unit::token_embedding(&self.model);
        let Some(head) = self.archives.iter().find(|archive| lock(archive).contains(HEAD)) else {
            return Ok(());
        };
        let (table, name) = self.find(Unit::Embedding, embedding)?;
        if !self.model.tied || name == HEAD {
            return Ok(());
        }
        let shape = [self.model.vocab, self.model.width];
        if lock(head).shape(HEAD) != Some(&shape) {
            return Err(WeightsError::UntiedHead { embedding });
        }
        let equal = if Arc::ptr_eq(head, table) {
            lock(head).equal(HEAD, None, &name, &shape)?
        } else {
            lock(head).equal(HEAD, Some(&mut lock(table)), &name, &shape)?
        };
        if equal {
            Ok(())
        } else {
            Err(WeightsError::UntiedHead { embedding })
        }
    }
}

/// Reads a tensor into a format without holding it as f32.
fn read(archive: &mut Archive, name: &str, shape: &[usize], format: Format) -> Result<Vec<u32>, WeightsError> {
    // The shape is compared with the file before room is made for the words.
    archive.check(name, shape)?;
    let refused = |error| refused(name, format, error);
    let mut encoder = Encoder::new(layout(shape, format));
    archive.for_each_chunk(name, shape, |values| encoder.push(values).map_err(refused))?;
    encoder.finish().map_err(refused)
}

fn refused(tensor: &str, format: Format, error: FormatError) -> WeightsError {
    let tensor = tensor.to_owned();
    match error {
        FormatError::Overflow { value, .. } => WeightsError::Overflow { tensor, format, value },
        error => WeightsError::Format { tensor, format, error },
    }
}

/// The rows of a matrix in a safetensors file.
#[derive(Debug)]
struct ArchiveRows {
    archive: Shared,
    name: String,
    /// What devices hold of it.
    layout: Layout,
}

impl RowSource for ArchiveRows {
    fn read(&self, row: usize, values: &mut [f32]) -> Result<(), WeightsError> {
        let shape = [self.layout.rows, self.layout.columns];
        lock(&self.archive).read_row(&self.name, &shape, row, values)?;
        if self.layout.format != Format::F32 {
            // As the devices have it.
            let of_row = self.layout.format.layout(1, self.layout.columns);
            let words = of_row
                .encode(values)
                .map_err(|error| refused(&self.name, self.layout.format, error))?;
            of_row.decode_row(&words, 0, values);
        }
        Ok(())
    }
}

/// File names of the shards in an index, each once, in order.
#[cfg(not(target_arch = "wasm32"))]
fn shard_names(index: &str) -> Result<Vec<String>, WeightsError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_str(index).map_err(|error| WeightsError::Index(error.to_string()))?;
    let mut shards: Vec<String> = index.weight_map.into_values().collect();
    shards.sort();
    shards.dedup();
    for shard in &shards {
        if shard.contains(['/', '\\']) || !shard.ends_with(".safetensors") {
            return Err(WeightsError::Index(format!(
                "`{shard}` is not the name of a shard in the same directory"
            )));
        }
    }
    if shards.is_empty() || shards.len() > 4096 {
        return Err(WeightsError::Index(format!("it names {} shards", shards.len())));
    }
    Ok(shards)
}
