//! The frozen weights where they are kept: a Hugging Face directory, a GGUF file, or bytes in memory, read one unit at a time.
//!
//! Weights are separate from the forward pass because a server hands units out without ever running them,
//! and because a device loads only its own.

use std::io::Cursor;
#[cfg(not(target_arch = "wasm32"))]
use std::ops::Range;
use std::sync::{Arc, Mutex};

#[cfg(not(target_arch = "wasm32"))]
use safetensors::Dtype;

use super::architecture::{Architecture, ArchitectureError, Family};
use super::archive::{Archive, ArchiveError, Source};
use super::ends::embedding::{Embedding, RowSource, Rows};
#[cfg(not(target_arch = "wasm32"))]
use super::gguf::{GgufError, blocks::BlockType, model::GgufModel};
use super::unit::{HEAD, Tensor, Unit, UnitData, layout};
use crate::terms::format::{Encoder, Format, FormatError, Layout};

/// Why weights were refused.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[cfg(not(target_arch = "wasm32"))]
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error(transparent)]
    Architecture(#[from] ArchitectureError),
    #[error("tensor `{tensor}` cannot be held as {format}: {error}")]
    Format {
        tensor: String,
        format: Format,
        error: FormatError,
    },
    #[error(
        "tensor `{tensor}` holds {value}, which is beyond {format}'s largest value: hold the weights with --weights f32"
    )]
    Overflow { tensor: String, format: Format, value: f32 },
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
    #[error("cannot read model unit {unit}: {source}")]
    Read { unit: Unit, r#source: std::io::Error },
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
    fn given(self) -> Option<Format> {
        match self {
            Holding::Auto => None,
            Holding::As(format) => Some(format),
        }
    }

    /// Of one unit's matrices. Where the blocks are held in four bits the embedding and the head are held in eight, as files of
    /// four bits have them: on SmolLM2-135M four bits there cost 7.2 % of perplexity, more than all blocks together, and save a
    /// third of a client's download.
    pub(crate) fn of(self, unit: Unit) -> Self {
        match (self, unit) {
            (Holding::As(Format::Q4), Unit::Embedding | Unit::Final) => Holding::As(Format::Q8),
            _ => self,
        }
    }

    fn or(self, natural: Format) -> Format {
        self.given().unwrap_or(natural)
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

fn lock<T>(shared: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The weights of a model on disk or in memory, read one unit at a time.
#[derive(Debug)]
pub struct Weights {
    model: Architecture,
    store: Store,
}

#[derive(Debug)]
enum Store {
    Safetensors(Vec<Shared>),
    #[cfg(not(target_arch = "wasm32"))]
    Gguf(Arc<Mutex<GgufModel>>),
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
    pub(crate) fn from_source(
        file: &str,
        source: impl Source + 'static,
        model: &Architecture,
    ) -> Result<Self, WeightsError> {
        Self::from_archives(vec![Archive::open(file, source)?], model)
    }

    fn from_archives(archives: Vec<Archive>, model: &Architecture) -> Result<Self, WeightsError> {
        let archives: Vec<Shared> = archives
            .into_iter()
            .map(|archive| Arc::new(Mutex::new(archive)))
            .collect();
        let files = Files {
            model,
            archives: &archives,
        };
        for unit in Unit::all(model) {
            for (tensor, shape) in unit.tensors(model) {
                let (archive, name) = files.find(unit, tensor)?;
                lock(archive).check(&name, &shape)?;
            }
        }
        files.check_tied_head()?;
        Ok(Self {
            model: model.clone(),
            store: Store::Safetensors(archives),
        })
    }

    /// Takes a model in a GGUF file, whose metadata say its shape.
    ///
    /// # Errors
    /// [`WeightsError::Gguf`] names what is missing, [`WeightsError::Architecture`] what is not supported.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn from_gguf(gguf: GgufModel) -> Result<Self, WeightsError> {
        let mut model = Architecture::try_from(gguf.header().config(gguf.gguf().file())?)?;
        // GGUF has every matrix (outputs, inputs), GPT-2's too.
        model.transposed = true;
        for unit in Unit::all(&model) {
            for (tensor, shape) in unit.tensors(&model) {
                gguf.check(&unit.file_name(&model, tensor), &shape)?;
            }
        }
        Ok(Self {
            model,
            store: Store::Gguf(Arc::new(Mutex::new(gguf))),
        })
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
        let holding = holding.of(unit);
        let mut tensors = Vec::new();
        for (tensor, shape) in unit.tensors(&self.model) {
            let (format, words) = self.tensor(unit, tensor, &shape, holding)?;
            tensors.push(Tensor {
                name: tensor.to_owned(),
                shape,
                format,
                words,
            });
        }
        Ok(UnitData { unit, tensors })
    }

    fn tensor(
        &self,
        unit: Unit,
        tensor: &str,
        shape: &[usize],
        holding: Holding,
    ) -> Result<(Format, Vec<u32>), WeightsError> {
        match &self.store {
            Store::Safetensors(archives) => {
                let (archive, name) = self.files(archives).find(unit, tensor)?;
                let format = if shape.len() == 2 {
                    holding.or(Format::F16)
                } else {
                    Format::F32
                };
                Ok((format, read(&mut lock(archive), &name, shape, format)?))
            }
            #[cfg(not(target_arch = "wasm32"))]
            Store::Gguf(gguf) => {
                let name = unit.file_name(&self.model, tensor);
                let mut gguf = lock(gguf);
                match *shape {
                    [rows, columns] => {
                        let packed = gguf.matrix(&name, [rows, columns], holding.given())?.packed;
                        Ok((packed.layout().format, packed.into_words()))
                    }
                    _ => {
                        let values = gguf.vector(&name, shape.iter().product())?;
                        Ok((Format::F32, values.into_iter().map(f32::to_bits).collect()))
                    }
                }
            }
        }
    }

    /// How one matrix of a unit is held.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn matrix_format(&self, unit: Unit, tensor: &str, holding: Holding) -> Format {
        let holding = holding.of(unit);
        match &self.store {
            Store::Safetensors(_) => holding.or(Format::F16),
            Store::Gguf(gguf) => {
                let natural = lock(gguf).natural(&unit.file_name(&self.model, tensor));
                holding.or(natural.unwrap_or(Format::F16))
            }
        }
    }

    /// How matrices of blocks are held, most of them.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn format(&self, holding: Holding) -> Format {
        self.matrix_format(Unit::Block(0), self.model.targets()[0].weight(), holding)
    }

    /// The embedding, whose rows stay where they are kept until they are asked for. They are what [`Weights::unit`] gives for the
    /// same holding: rounded as the format rounds them.
    ///
    /// # Errors
    /// [`WeightsError::Archive`] when a tensor is missing.
    pub fn embedding(&self, holding: Holding) -> Result<Embedding, WeightsError> {
        let holding = holding.of(Unit::Embedding);
        let rows = Unit::Embedding
            .tensors(&self.model)
            .into_iter()
            .map(|(tensor, shape)| {
                let source: Arc<dyn RowSource> = match &self.store {
                    Store::Safetensors(archives) => {
                        let (archive, name) = self.files(archives).find(Unit::Embedding, tensor)?;
                        Arc::new(ArchiveRows {
                            archive: archive.clone(),
                            name,
                            layout: layout(&shape, holding.or(Format::F16)),
                        })
                    }
                    #[cfg(not(target_arch = "wasm32"))]
                    Store::Gguf(gguf) => {
                        let name = Unit::Embedding.file_name(&self.model, tensor);
                        let natural = lock(gguf).natural(&name).unwrap_or(Format::F16);
                        Arc::new(GgufRows {
                            gguf: gguf.clone(),
                            layout: layout(&shape, holding.or(natural)),
                            name,
                        })
                    }
                };
                Ok(Rows::Stored(source))
            })
            .collect::<Result<Vec<_>, WeightsError>>()?;
        Ok(Embedding::new(&self.model, rows))
    }

    /// Rows of a matrix, or a vector as the only row, in f32: what the file holds, in the order and orientation of
    /// [`Unit::tensors`].
    ///
    /// # Errors
    /// [`WeightsError::Archive`] and [`WeightsError::Gguf`] when reading fails or a value is not finite.
    ///
    /// # Panics
    /// When there are no such rows.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn rows(
        &self,
        unit: Unit,
        tensor: &str,
        shape: &[usize],
        rows: Range<usize>,
    ) -> Result<Vec<f32>, WeightsError> {
        match (&self.store, shape) {
            (Store::Safetensors(archives), shape) => {
                let (archive, name) = self.files(archives).find(unit, tensor)?;
                let mut archive = lock(archive);
                Ok(match *shape {
                    [count, columns] => archive.read_rows(&name, &[count, columns], rows)?,
                    _ => archive.read(&name, shape)?,
                })
            }
            (Store::Gguf(gguf), &[count, columns]) => {
                let mut values = vec![0.0; rows.len() * columns];
                let name = unit.file_name(&self.model, tensor);
                lock(gguf).rows(&name, [count, columns], rows, &mut values)?;
                Ok(values)
            }
            (Store::Gguf(gguf), shape) => {
                let name = unit.file_name(&self.model, tensor);
                Ok(lock(gguf).vector(&name, shape.iter().product())?)
            }
        }
    }

    /// The type in which the file stores the first projection, as most matrices.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn stored(&self) -> BlockType {
        let first = self.model.targets()[0].weight();
        let stored = match &self.store {
            Store::Safetensors(archives) => {
                self.files(archives)
                    .find(Unit::Block(0), first)
                    .ok()
                    .and_then(|(archive, name)| match lock(archive).dtype(&name)? {
                        Dtype::F16 => Some(BlockType::F16),
                        Dtype::BF16 => Some(BlockType::Bf16),
                        _ => None,
                    })
            }
            Store::Gguf(gguf) => lock(gguf).stored(&Unit::Block(0).file_name(&self.model, first)),
        };
        stored.unwrap_or(BlockType::F32)
    }

    fn files<'a>(&'a self, archives: &'a [Shared]) -> Files<'a> {
        Files {
            model: &self.model,
            archives,
        }
    }
}

/// Safetensors files with the model they hold.
struct Files<'a> {
    model: &'a Architecture,
    archives: &'a [Shared],
}

impl<'a> Files<'a> {
    /// The archive that holds a tensor, and its full name there. Files keep it with or without the name of the whole model before
    /// it; and a tied head, which is the embedding, under both names or either.
    fn find(&self, unit: Unit, tensor: &str) -> Result<(&'a Shared, String), ArchiveError> {
        let name = unit.file_name(self.model, tensor);
        let other = match self.model.family {
            Family::Gpt2 => format!("transformer.{name}"),
            _ => name.strip_prefix("model.").unwrap_or(&name).to_owned(),
        };
        let tied = (self.model.tied && tensor == Unit::token_embedding(self.model)).then(|| HEAD.to_owned());
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
        let embedding = Unit::token_embedding(self.model);
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
        values.copy_from_slice(&lock(&self.archive).read_rows(&self.name, &shape, row..row + 1)?);
        as_held(self.layout, &self.name, values)
    }
}

/// The rows of a matrix in a GGUF file.
#[cfg(not(target_arch = "wasm32"))]
#[derive(Debug)]
struct GgufRows {
    gguf: Arc<Mutex<GgufModel>>,
    name: String,
    /// What devices hold of it.
    layout: Layout,
}

#[cfg(not(target_arch = "wasm32"))]
impl RowSource for GgufRows {
    fn read(&self, row: usize, values: &mut [f32]) -> Result<(), WeightsError> {
        let shape = [self.layout.rows, self.layout.columns];
        let mut gguf = lock(&self.gguf);
        gguf.rows(&self.name, shape, row..row + 1, values)?;
        if gguf.keeps(&self.name, self.layout.format) {
            return Ok(());
        }
        as_held(self.layout, &self.name, values)
    }
}

/// Rounds a row as a matrix of this layout holds it. Groups lie within rows, so a row alone gives what the whole matrix gives.
fn as_held(layout: Layout, name: &str, values: &mut [f32]) -> Result<(), WeightsError> {
    if layout.format != Format::F32 {
        let of_row = layout.format.layout(1, layout.columns);
        let words = of_row
            .encode(values)
            .map_err(|error| refused(name, layout.format, error))?;
        of_row.decode_row(&words, 0, values);
    }
    Ok(())
}

/// File names of the shards in an index, each once, in order.
#[cfg(not(target_arch = "wasm32"))]
fn shard_names(index: &str) -> Result<Vec<String>, WeightsError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let index = index.trim_start_matches('\u{feff}');
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
