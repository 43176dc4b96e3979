//! The frozen weights in parts: a *unit* is what one side of the cut either holds or does not (the embedding, one block, the
//! final norm with an untied head), with the names and shapes of its tensors, and its bytes as other devices get them.
//!
//! It is separate from the files weights are read from because a client gets units from a server and never sees a file.

use std::fmt;
use std::io::{self, Write};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::adapter::Target;
use super::architecture::{Architecture, Family};
use super::encoded::{check_words, encode_header, parse, words_of};
use super::weights::WeightsError;
use crate::terms::format::{Format, Layout};

/// The head's matrix, in files and in the last unit of a model whose head is not tied.
pub const HEAD: &str = "lm_head.weight";

/// A separately loaded part of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Unit {
    /// The token embedding (vocab, width) and, where positions are learned, theirs (positions, width).
    Embedding,
    /// One transformer block, its tensors named as in Hugging Face files without what names the block.
    Block(usize),
    /// The final norm and, where it is not the embedding, the head (vocab, width).
    Final,
}

/// A tensor of a unit: its name there and its shape. Two-dimensional ones are matrices, held in a [`Format`]; others are f32.
pub type TensorShape = (&'static str, Vec<usize>);

impl Unit {
    /// All units of a model, in the order of the forward pass.
    pub fn all(model: &Architecture) -> impl Iterator<Item = Unit> {
        std::iter::once(Unit::Embedding)
            .chain((0..model.blocks).map(Unit::Block))
            .chain([Unit::Final])
    }

    /// The name of the token embedding in [`Unit::Embedding`].
    pub(crate) fn token_embedding(model: &Architecture) -> &'static str {
        match model.family {
            Family::Gpt2 => "wte.weight",
            _ => "embed_tokens.weight",
        }
    }

    /// Names and shapes of the unit's tensors.
    pub fn tensors(self, model: &Architecture) -> Vec<TensorShape> {
        let width = model.width;
        let gpt2 = model.family == Family::Gpt2;
        match self {
            Unit::Embedding => {
                let mut tensors = vec![(Self::token_embedding(model), vec![model.vocab, width])];
                if model.rotary.is_none() {
                    tensors.push(("wpe.weight", vec![model.positions, width]));
                }
                tensors
            }
            Unit::Block(_) => {
                let mut tensors = Vec::new();
                let norm = |tensors: &mut Vec<TensorShape>, weight, bias: Option<&'static str>| {
                    tensors.push((weight, vec![width]));
                    tensors.extend(bias.map(|bias| (bias, vec![width])));
                };
                let (first, second) = block_norms(model.family);
                for &target in model.targets() {
                    match target {
                        Target::AttnQkv | Target::QProj => norm(&mut tensors, first.0, first.1),
                        Target::MlpFc | Target::GateProj => norm(&mut tensors, second.0, second.1),
                        _ => {}
                    }
                    let (inputs, outputs) = model.dimensions(target);
                    let shape = if model.transposed {
                        vec![outputs, inputs]
                    } else {
                        vec![inputs, outputs]
                    };
                    tensors.push((target.weight(), shape));
                    if model.biased(target) {
                        tensors.push((target.bias(), vec![outputs]));
                    }
                    if target == Target::VProj && model.qk_norm() {
                        tensors.push(("self_attn.q_norm.weight", vec![model.head_size]));
                        tensors.push(("self_attn.k_norm.weight", vec![model.head_size]));
                    }
                }
                tensors
            }
            Unit::Final if gpt2 => vec![("ln_f.weight", vec![width]), ("ln_f.bias", vec![width])],
            Unit::Final => {
                let mut tensors = vec![("norm.weight", vec![width])];
                if !model.tied {
                    tensors.push((HEAD, vec![model.vocab, width]));
                }
                tensors
            }
        }
    }

    /// The Hugging Face name of one of the unit's tensors. GPT-2's come without the optional `transformer.`.
    pub fn file_name(self, model: &Architecture, tensor: &str) -> String {
        match (model.family, self) {
            (Family::Gpt2, Unit::Block(block)) => format!("h.{block}.{tensor}"),
            (Family::Gpt2, Unit::Embedding | Unit::Final) => tensor.to_owned(),
            _ if tensor == HEAD => tensor.to_owned(),
            (_, Unit::Block(block)) => format!("model.layers.{block}.{tensor}"),
            (_, Unit::Embedding | Unit::Final) => format!("model.{tensor}"),
        }
    }

    pub(super) fn check(self, model: &Architecture) -> Result<(), WeightsError> {
        match self {
            Unit::Block(block) if block >= model.blocks => Err(WeightsError::NoSuchBlock {
                block,
                blocks: model.blocks,
            }),
            _ => Ok(()),
        }
    }
}

/// A norm's tensors in a block: scale, and shift where there is one.
type NormNames = (&'static str, Option<&'static str>);

/// The names of a block's two norms.
pub(super) fn block_norms(family: Family) -> (NormNames, NormNames) {
    match family {
        Family::Gpt2 => (("ln_1.weight", Some("ln_1.bias")), ("ln_2.weight", Some("ln_2.bias"))),
        _ => (
            ("input_layernorm.weight", None),
            ("post_attention_layernorm.weight", None),
        ),
    }
}

/// The names of the final norm.
pub(super) fn final_norm(family: Family) -> NormNames {
    match family {
        Family::Gpt2 => ("ln_f.weight", Some("ln_f.bias")),
        _ => ("norm.weight", None),
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

/// One named tensor, row major, as it is held on devices.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub name: String,
    pub shape: Vec<usize>,
    /// F32 but for matrices.
    pub format: Format,
    /// Laid out as [`Layout`] says.
    pub words: Vec<u32>,
}

/// The layout of a tensor of this shape: a vector is a matrix of one row.
pub fn layout(shape: &[usize], format: Format) -> Layout {
    match *shape {
        [rows, columns] => format.layout(rows, columns),
        _ => Format::F32.layout(1, shape.iter().product()),
    }
}

impl Tensor {
    /// How its words are laid out.
    pub fn layout(&self) -> Layout {
        layout(&self.shape, self.format)
    }

    /// Number of values: the product of the shape.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The values as f32.
    pub fn to_f32(&self) -> Vec<f32> {
        self.layout().decode(&self.words)
    }
}

/// The tensors of one unit, in the order of [`Unit::tensors`].
///
/// Its bytes, as other devices get them, little endian: magic `SFLU`, version, unit kind and block index, tensor count; for each
/// tensor the length of its name, the name padded with zeros to four bytes, format (0 = f32, 1 = f16, 2 = q8, 3 = q4), dimensions, their sizes; then the words
/// of all tensors in the same order. Every number is a `u32`, so all data is aligned to four bytes. The version is 1 where
/// every tensor is f32 or f16, and 2 where one is quantised.
///
/// One unit in one set of formats and values always gives one string of bytes, so their SHA-256 names it.
#[derive(Clone, Debug, PartialEq)]
pub struct UnitData {
    pub unit: Unit,
    pub tensors: Vec<Tensor>,
}

impl UnitData {
    /// A tensor by its name in [`Unit::tensors`].
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    /// Takes a tensor out of the unit.
    pub fn take(&mut self, name: &str) -> Option<Tensor> {
        let position = self.tensors.iter().position(|tensor| tensor.name == name)?;
        Some(self.tensors.swap_remove(position))
    }

    /// Length of [`UnitData::encode`]'s output in bytes.
    pub fn encoded_length(&self) -> u64 {
        let data: u64 = self.tensors.iter().map(|tensor| 4 * tensor.words.len() as u64).sum();
        self.header().len() as u64 + data
    }

    fn header(&self) -> Vec<u8> {
        encode_header(
            self.unit,
            self.tensors.iter().map(|t| (t.name.as_str(), &t.shape[..], t.format)),
        )
    }

    /// Writes the unit without holding a second copy of it.
    ///
    /// # Errors
    /// Those of `output`.
    pub fn encode(&self, output: &mut impl Write) -> io::Result<()> {
        output.write_all(&self.header())?;
        let mut bytes = Vec::with_capacity(1 << 16);
        for tensor in &self.tensors {
            for chunk in tensor.words.chunks(1 << 14) {
                bytes.clear();
                bytes.extend(chunk.iter().flat_map(|word| word.to_le_bytes()));
                output.write_all(&bytes)?;
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

    /// Reads encoded bytes that must be exactly this unit of this model, with matrices in any format.
    ///
    /// # Errors
    /// [`WeightsError::Unit`] says what differs; [`WeightsError::NoSuchBlock`].
    pub fn decode(bytes: &[u8], unit: Unit, model: &Architecture) -> Result<Self, WeightsError> {
        let table = parse(bytes, bytes.len() as u64, unit, model)?;
        let tensors = table.into_iter().map(|tensor| {
            let layout = tensor.layout();
            let words = words_of(&bytes[tensor.at as usize..][..4 * layout.words()]);
            check_words(unit, tensor.name, layout, &words)?;
            Ok(Tensor {
                name: tensor.name.to_owned(),
                shape: tensor.shape,
                format: tensor.format,
                words,
            })
        });
        let tensors = tensors.collect::<Result<_, WeightsError>>()?;
        Ok(Self { unit, tensors })
    }
}
