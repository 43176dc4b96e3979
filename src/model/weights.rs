//! The frozen weights: read from Hugging Face safetensors into units, and units written as bytes for other devices.
//!
//! A *unit* is what one side of the cut either holds or does not: the embedding, one block, the final norm.
//! Weights are separate from the forward pass because a server hands units out without ever running them,
//! and because a device loads only its own.

use std::fmt;
use std::io::{self, Cursor, Write};

use half::f16;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::archive::{Archive, ArchiveError, Source};
use super::config::Config;
use crate::terms::format::Format;

const MAGIC: [u8; 4] = *b"SFLU";
const VERSION: u32 = 1;

/// A separately loaded part of the model. The head is tied to the embedding's `wte.weight`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Unit {
    /// `wte.weight` (vocab, width) and `wpe.weight` (positions, width).
    Embedding,
    /// One transformer block, named as in Hugging Face files without the `h.{i}.` prefix.
    Block(usize),
    /// `ln_f.weight` and `ln_f.bias`, (width).
    Final,
}

/// Values of one tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum TensorData {
    /// Two halves a word, the earlier in the low bits; an odd count is padded with a zero half.
    F16(Vec<u32>),
    F32(Vec<f32>),
}

/// One named tensor, row major. A weight matrix has shape (in, out).
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub data: TensorData,
}

/// The tensors of one unit, in the order of [`Unit::tensors`].
#[derive(Clone, Debug, PartialEq)]
pub struct UnitData {
    pub unit: Unit,
    pub tensors: Vec<Tensor>,
}

/// Why weights were refused.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error(
        "tensor `{tensor}` holds {value}, which is beyond f16's largest value 65504: hold the weights with --weights f32"
    )]
    Overflow { tensor: String, value: f32 },
    #[error(
        "the model's head `lm_head.weight` differs from `wte.weight`: untied heads are not supported, only tied ones"
    )]
    UntiedHead,
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

impl Unit {
    /// All units of a model, in the order of the forward pass.
    pub fn all(config: &Config) -> impl Iterator<Item = Unit> {
        std::iter::once(Unit::Embedding)
            .chain((0..config.blocks).map(Unit::Block))
            .chain([Unit::Final])
    }

    /// Names and shapes of the unit's tensors; two-dimensional ones are matrices held as [`Format`] says.
    pub fn tensors(self, config: &Config) -> Vec<(&'static str, Vec<usize>)> {
        let (width, ffn) = (config.width, config.ffn);
        match self {
            Unit::Embedding => {
                vec![
                    ("wte.weight", vec![config.vocab, width]),
                    ("wpe.weight", vec![config.positions, width]),
                ]
            }
            Unit::Block(_) => vec![
                ("ln_1.weight", vec![width]),
                ("ln_1.bias", vec![width]),
                ("attn.c_attn.weight", vec![width, 3 * width]),
                ("attn.c_attn.bias", vec![3 * width]),
                ("attn.c_proj.weight", vec![width, width]),
                ("attn.c_proj.bias", vec![width]),
                ("ln_2.weight", vec![width]),
                ("ln_2.bias", vec![width]),
                ("mlp.c_fc.weight", vec![width, ffn]),
                ("mlp.c_fc.bias", vec![ffn]),
                ("mlp.c_proj.weight", vec![ffn, width]),
                ("mlp.c_proj.bias", vec![width]),
            ],
            Unit::Final => vec![("ln_f.weight", vec![width]), ("ln_f.bias", vec![width])],
        }
    }

    /// The Hugging Face name of one of the unit's tensors, without the optional `transformer.` prefix.
    fn file_name(self, tensor: &str) -> String {
        match self {
            Unit::Block(block) => format!("h.{block}.{tensor}"),
            Unit::Embedding | Unit::Final => tensor.to_owned(),
        }
    }

    fn check(self, config: &Config) -> Result<(), WeightsError> {
        match self {
            Unit::Block(block) if block >= config.blocks => Err(WeightsError::NoSuchBlock {
                block,
                blocks: config.blocks,
            }),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Unit {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unit::Embedding => formatter.write_str("embedding"),
            Unit::Block(block) => write!(formatter, "block.{block}"),
            Unit::Final => formatter.write_str("final"),
        }
    }
}

impl std::str::FromStr for Unit {
    type Err = WeightsError;

    fn from_str(name: &str) -> Result<Self, WeightsError> {
        let unit = match name {
            "embedding" => Some(Unit::Embedding),
            "final" => Some(Unit::Final),
            _ => name
                .strip_prefix("block.")
                .and_then(|block| block.parse().ok())
                .map(Unit::Block),
        };
        // Only the canonical spelling: `block.01` is no second name of block 1.
        unit.filter(|unit| unit.to_string() == name)
            .ok_or_else(|| WeightsError::UnitName(name.chars().take(80).collect()))
    }
}

impl From<Unit> for String {
    fn from(unit: Unit) -> Self {
        unit.to_string()
    }
}

impl TryFrom<String> for Unit {
    type Error = WeightsError;

    fn try_from(name: String) -> Result<Self, WeightsError> {
        name.parse()
    }
}

impl TensorData {
    pub fn dtype(&self) -> Format {
        match self {
            TensorData::F16(_) => Format::F16,
            TensorData::F32(_) => Format::F32,
        }
    }

    /// Bytes held, with the padding half of an odd count.
    pub fn byte_length(&self) -> usize {
        match self {
            TensorData::F16(words) => 4 * words.len(),
            TensorData::F32(values) => 4 * values.len(),
        }
    }
}

impl Tensor {
    /// Number of values: the product of the shape.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The values as f32, in a new allocation when they are held as halves.
    pub fn to_f32(&self) -> Vec<f32> {
        match &self.data {
            TensorData::F32(values) => values.clone(),
            TensorData::F16(words) => words
                .iter()
                .flat_map(|word| [*word as u16, (word >> 16) as u16])
                .take(self.elements())
                .map(|bits| f16::from_bits(bits).to_f32())
                .collect(),
        }
    }
}

/// The weights of a model on disk or in memory, read one unit at a time.
#[derive(Debug)]
pub struct Weights {
    config: Config,
    archives: Vec<Archive>,
}

impl Weights {
    /// Opens `model.safetensors`, or the shards of `model.safetensors.index.json`, in a Hugging Face directory
    /// and checks that every tensor is there with its shape. Values are read by [`Weights::unit`].
    ///
    /// # Errors
    /// [`WeightsError`] names the file and tensor.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn open(dir: &std::path::Path, config: &Config) -> Result<Self, WeightsError> {
        let open = |path: &std::path::Path| {
            let file = path.display().to_string();
            match std::fs::File::open(path) {
                Ok(source) => Archive::open(&file, source),
                Err(source) => Err(ArchiveError::Read { file, source }),
            }
        };
        let single = dir.join("model.safetensors");
        if single.is_file() {
            return Self::from_archives(vec![open(&single)?], config);
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
        Self::from_archives(archives, config)
    }

    /// Opens a `model.safetensors` held in memory, such as an embedded model.
    ///
    /// # Errors
    /// [`WeightsError`] names the tensor.
    pub fn from_bytes(bytes: impl AsRef<[u8]> + Send + 'static, config: &Config) -> Result<Self, WeightsError> {
        Self::from_source("model.safetensors", Cursor::new(bytes), config)
    }

    /// Opens a safetensors file from any seekable source; `file` names it in errors.
    ///
    /// # Errors
    /// [`WeightsError`] names the tensor.
    pub fn from_source(file: &str, source: impl Source + 'static, config: &Config) -> Result<Self, WeightsError> {
        Self::from_archives(vec![Archive::open(file, source)?], config)
    }

    fn from_archives(archives: Vec<Archive>, config: &Config) -> Result<Self, WeightsError> {
        let mut weights = Self {
            config: config.clone(),
            archives,
        };
        for unit in Unit::all(config) {
            for (tensor, shape) in unit.tensors(config) {
                let (archive, name) = weights.find(&unit.file_name(tensor))?;
                weights.archives[archive].check(&name, &shape)?;
            }
        }
        weights.check_tied_head()?;
        Ok(weights)
    }

    /// The shape the weights were checked against.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Reads one unit, converting its matrices to `dtype` chunk by chunk.
    ///
    /// # Errors
    /// [`WeightsError::Overflow`] when a value has no f16, [`WeightsError::Archive`] when reading fails or a
    /// value is not finite, [`WeightsError::NoSuchBlock`].
    pub fn unit(&mut self, unit: Unit, dtype: Format) -> Result<UnitData, WeightsError> {
        unit.check(&self.config)?;
        let mut tensors = Vec::new();
        for (tensor, shape) in unit.tensors(&self.config) {
            let (archive, name) = self.find(&unit.file_name(tensor))?;
            let archive = &mut self.archives[archive];
            let data = if shape.len() == 2 && dtype == Format::F16 {
                TensorData::F16(read_f16(archive, &name, &shape)?)
            } else {
                TensorData::F32(archive.read(&name, &shape)?)
            };
            tensors.push(Tensor {
                name: tensor.to_owned(),
                shape,
                data,
            });
        }
        Ok(UnitData { unit, tensors })
    }

    /// The archive that holds a tensor, and its full name there.
    fn find(&self, tensor: &str) -> Result<(usize, String), ArchiveError> {
        let prefixed = format!("transformer.{tensor}");
        for name in [tensor, &prefixed] {
            if let Some(archive) = self.archives.iter().position(|archive| archive.contains(name)) {
                return Ok((archive, name.to_owned()));
            }
        }
        let files: Vec<&str> = self.archives.iter().map(Archive::file).collect();
        Err(ArchiveError::Missing {
            file: files.join(", "),
            tensor: tensor.to_owned(),
        })
    }

    /// A file may carry the tied head a second time; it must then be the same matrix.
    fn check_tied_head(&mut self) -> Result<(), WeightsError> {
        let shape = [self.config.vocab, self.config.width];
        let Ok((head, head_name)) = self.find("lm_head.weight") else {
            return Ok(());
        };
        let (wte, wte_name) = self.find("wte.weight")?;
        if self.archives[head].shape(&head_name) != Some(&shape) {
            return Err(WeightsError::UntiedHead);
        }
        let equal = if head == wte {
            self.archives[head].equal(&head_name, None, &wte_name, &shape)?
        } else {
            let (low, high) = self.archives.split_at_mut(head.max(wte));
            let (first, second) = (&mut low[head.min(wte)], &mut high[0]);
            let (first_name, second_name) = if head < wte {
                (&head_name, &wte_name)
            } else {
                (&wte_name, &head_name)
            };
            first.equal(first_name, Some(second), second_name, &shape)?
        };
        if equal { Ok(()) } else { Err(WeightsError::UntiedHead) }
    }
}

/// Reads a matrix as packed halves, rounded to nearest even.
fn read_f16(archive: &mut Archive, name: &str, shape: &[usize]) -> Result<Vec<u32>, WeightsError> {
    let elements: usize = shape.iter().product();
    let mut words = Vec::with_capacity(elements.div_ceil(2));
    archive.for_each_chunk(name, shape, |values| {
        // Chunks have an even length except the last one.
        for pair in values.chunks(2) {
            let mut word = 0;
            for (index, &value) in pair.iter().enumerate() {
                let rounded = f16::from_f32(value);
                if !rounded.is_finite() {
                    return Err(WeightsError::Overflow {
                        tensor: name.to_owned(),
                        value,
                    });
                }
                word |= u32::from(rounded.to_bits()) << (16 * index);
            }
            words.push(word);
        }
        Ok(())
    })?;
    Ok(words)
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

/// The bytes of a unit as other devices get them, little endian:
/// magic `SFLU`, version, unit kind and block index, tensor count; for each tensor the length of its name, the
/// name padded with zeros to four bytes, dtype (0 = f32, 1 = packed f16), dimensions, their sizes; then the data
/// of all tensors in the same order. Every number is a `u32`, so all data is aligned to four bytes.
///
/// The same unit, dtype and values always give the same bytes, so their SHA-256 names them.
impl UnitData {
    /// A tensor by its name in [`Unit::tensors`].
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    /// How the matrices are held; f32 for the final norm, which has none.
    pub fn dtype(&self) -> Format {
        if self.tensors.iter().any(|tensor| tensor.data.dtype() == Format::F16) {
            Format::F16
        } else {
            Format::F32
        }
    }

    /// Length of [`UnitData::encode`]'s output in bytes.
    pub fn encoded_length(&self) -> u64 {
        let data: u64 = self.tensors.iter().map(|tensor| tensor.data.byte_length() as u64).sum();
        encode_header(
            self.unit,
            self.tensors
                .iter()
                .map(|t| (t.name.as_str(), &t.shape[..], t.data.dtype())),
        )
        .len() as u64
            + data
    }

    /// Writes the unit without holding a second copy of it.
    ///
    /// # Errors
    /// Those of `output`.
    pub fn encode(&self, output: &mut impl Write) -> io::Result<()> {
        let table = self
            .tensors
            .iter()
            .map(|t| (t.name.as_str(), &t.shape[..], t.data.dtype()));
        output.write_all(&encode_header(self.unit, table))?;
        let mut bytes = Vec::with_capacity(1 << 16);
        for tensor in &self.tensors {
            match &tensor.data {
                TensorData::F16(words) => write_words(output, words, |word| word.to_le_bytes(), &mut bytes)?,
                TensorData::F32(values) => write_words(output, values, |value| value.to_le_bytes(), &mut bytes)?,
            }
        }
        Ok(())
    }

    /// SHA-256 of the encoded bytes, by which the unit is served.
    pub fn digest(&self) -> [u8; 32] {
        struct Hash(Sha256);
        impl Write for Hash {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.update(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut hash = Hash(Sha256::new());
        self.encode(&mut hash).expect("hashing does not fail");
        hash.0.finalize().into()
    }

    /// Reads encoded bytes that must be exactly this unit of this model, with matrices in either dtype.
    ///
    /// # Errors
    /// [`WeightsError::Unit`] says what differs; [`WeightsError::NoSuchBlock`].
    pub fn decode(bytes: &[u8], unit: Unit, config: &Config) -> Result<Self, WeightsError> {
        unit.check(config)?;
        let fail = |reason: String| WeightsError::Unit { unit, reason };
        let table = unit.tensors(config);
        let header = |dtype: Format| {
            encode_header(
                unit,
                table
                    .iter()
                    .map(|(name, shape)| (*name, &shape[..], if shape.len() == 2 { dtype } else { Format::F32 })),
            )
        };
        // What the header must be is known from the configuration, so it is compared instead of parsed.
        let Some((dtype, header)) = [Format::F16, Format::F32]
            .into_iter()
            .map(|dtype| (dtype, header(dtype)))
            .find(|(_, header)| bytes.starts_with(header))
        else {
            return Err(fail(
                if bytes.starts_with(&MAGIC) {
                    "its table is another unit's or another model's"
                } else {
                    "it does not begin as a model unit"
                }
                .to_owned(),
            ));
        };
        let lengths: Vec<usize> = table
            .iter()
            .map(|(_, shape)| {
                let elements: usize = shape.iter().product();
                if shape.len() == 2 && dtype == Format::F16 {
                    elements.div_ceil(2)
                } else {
                    elements
                }
            })
            .collect();
        let expected = header.len() as u64 + lengths.iter().map(|&length| 4 * length as u64).sum::<u64>();
        if bytes.len() as u64 != expected {
            return Err(fail(format!("it has {} bytes, expected {expected}", bytes.len())));
        }
        let mut rest = &bytes[header.len()..];
        let mut tensors = Vec::with_capacity(table.len());
        for ((name, shape), length) in table.into_iter().zip(lengths) {
            let (data, after) = rest.split_at(4 * length);
            rest = after;
            let words = data.as_chunks::<4>().0.iter().copied();
            let data = if shape.len() == 2 && dtype == Format::F16 {
                let words: Vec<u32> = words.map(u32::from_le_bytes).collect();
                let infinite = |bits: u32| bits & 0x7c00 == 0x7c00;
                if words.iter().any(|&word| infinite(word) || infinite(word >> 16)) {
                    return Err(fail(format!("tensor `{name}` holds a value that is not finite")));
                }
                let elements: usize = shape.iter().product();
                if elements % 2 == 1 && words.last().is_some_and(|word| word >> 16 != 0) {
                    return Err(fail(format!("the padding after tensor `{name}` is not zero")));
                }
                TensorData::F16(words)
            } else {
                let values: Vec<f32> = words.map(f32::from_le_bytes).collect();
                if values.iter().any(|value| !value.is_finite()) {
                    return Err(fail(format!("tensor `{name}` holds a value that is not finite")));
                }
                TensorData::F32(values)
            };
            tensors.push(Tensor {
                name: name.to_owned(),
                shape,
                data,
            });
        }
        Ok(Self { unit, tensors })
    }
}

fn encode_header<'a>(unit: Unit, tensors: impl Iterator<Item = (&'a str, &'a [usize], Format)>) -> Vec<u8> {
    let (kind, block) = match unit {
        Unit::Embedding => (0, 0),
        Unit::Block(block) => (1, block as u32),
        Unit::Final => (2, 0),
    };
    let mut table = Vec::new();
    let mut count: u32 = 0;
    for (name, shape, dtype) in tensors {
        count += 1;
        table.extend((name.len() as u32).to_le_bytes());
        table.extend(name.as_bytes());
        table.resize(table.len().next_multiple_of(4), 0);
        table.extend(u32::from(dtype == Format::F16).to_le_bytes());
        table.extend((shape.len() as u32).to_le_bytes());
        for &size in shape {
            table.extend((size as u32).to_le_bytes());
        }
    }
    let mut header = MAGIC.to_vec();
    for number in [VERSION, kind, block, count] {
        header.extend(number.to_le_bytes());
    }
    header.extend(table);
    header
}

fn write_words<T: Copy>(
    output: &mut impl Write,
    words: &[T],
    to_bytes: impl Fn(T) -> [u8; 4],
    bytes: &mut Vec<u8>,
) -> io::Result<()> {
    for chunk in words.chunks(1 << 14) {
        bytes.clear();
        bytes.extend(chunk.iter().flat_map(|&word| to_bytes(word)));
        output.write_all(bytes)?;
    }
    Ok(())
}
