//! A model with its adapter in the forms that other programs load.
//!
//! `merged` gives the tensors of a model with the adapter in them, one at a time; `checkpoint` writes them as a
//! safetensors directory and `gguf` as a GGUF file. `lora` writes the adapter alone as GGUF, `card` a model card. PEFT's
//! own files are `peft`'s. It is separate from the readers because it decides what is written, and is native only.

pub(crate) mod card;
#[doc(hidden)]
pub mod checkpoint;
pub mod gguf;
pub mod lora;
pub mod merged;

use std::io;

use super::gguf::GgufError;
use super::gguf::blocks::BlockType;
use super::weights::WeightsError;
use crate::terms::format::FormatError;

/// How the matrices of an exported model are stored; norms and biases of GGUF files are F32 whatever it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    F32,
    F16,
    Bf16,
    /// 8 bits in groups of 32 with a scale; in GGUF files only.
    Q8_0,
}

impl Storage {
    /// Every one.
    pub const ALL: [Storage; 4] = [Storage::F32, Storage::F16, Storage::Bf16, Storage::Q8_0];

    /// As the command line spells it.
    pub fn name(self) -> &'static str {
        match self {
            Storage::F32 => "f32",
            Storage::F16 => "f16",
            Storage::Bf16 => "bf16",
            Storage::Q8_0 => "q8_0",
        }
    }

    fn block(self) -> BlockType {
        match self {
            Storage::F32 => BlockType::F32,
            Storage::F16 => BlockType::F16,
            Storage::Bf16 => BlockType::Bf16,
            Storage::Q8_0 => BlockType::Q8_0,
        }
    }

    /// What this many values take.
    pub fn bytes_of(self, values: u64) -> u64 {
        let stored = self.block().stored();
        values.div_ceil(stored.elements) * stored.bytes
    }

    /// The bytes of whole rows of `tensor`.
    fn encode(self, tensor: &str, values: &[f32]) -> Result<Vec<u8>, ExportError> {
        self.block().encode(values).map_err(|error| match error {
            FormatError::Overflow { value, .. } => ExportError::Overflow {
                tensor: tensor.to_owned(),
                storage: self,
                value,
            },
            _ => ExportError::NotFinite {
                tensor: tensor.to_owned(),
            },
        })
    }
}

impl std::fmt::Display for Storage {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.pad(self.name())
    }
}

impl std::str::FromStr for Storage {
    type Err = ExportError;

    fn from_str(name: &str) -> Result<Self, ExportError> {
        let found = Self::ALL.into_iter().find(|storage| storage.name() == name);
        found.ok_or_else(|| ExportError::Storage {
            name: name.chars().take(80).collect(),
        })
    }
}

/// Why an export failed.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    #[error(transparent)]
    Weights(#[from] WeightsError),
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error("`{name}` is no type of exported weights: f32, f16, bf16 and q8_0 are")]
    Storage { name: String },
    #[error("tensor `{tensor}` holds {value}, which is beyond {storage}'s largest value: give --type f32 or bf16")]
    Overflow {
        tensor: String,
        storage: Storage,
        value: f32,
    },
    #[error("tensor `{tensor}` holds a value that is not finite with the adapter in it: the adapter has diverged")]
    NotFinite { tensor: String },
    #[error(
        "a {family} model cannot have the rotary scaling {scaling} in a GGUF file: llama.cpp reads it for llama only"
    )]
    Scaling {
        family: super::architecture::Family,
        scaling: &'static str,
    },
    #[error("cannot write {file}: {source}")]
    Write { file: String, r#source: io::Error },
}

impl ExportError {
    fn write(file: &str) -> impl Fn(io::Error) -> Self {
        let file = file.to_owned();
        move |source| Self::Write {
            file: file.clone(),
            source,
        }
    }
}
