//! A model in a GGUF file: its tensors under Hugging Face's names, in Hugging Face's order of rows.
//!
//! It is separate from the container because it knows the families, and from `weights` because it knows no units.

use std::ops::Range;

use super::GgufError;
use super::blocks::{BlockType, Repacked};
use super::container::Gguf;
use super::header::ModelHeader;
use super::names::half_split_rows;
use crate::model::archive::Source;
use crate::terms::format::Format;

/// An open file and what its metadata says.
#[derive(Debug)]
pub struct GgufModel {
    gguf: Gguf,
    header: ModelHeader,
}

impl GgufModel {
    /// Opens a model from any seekable source; `file` names it in errors.
    ///
    /// # Errors
    /// [`GgufError`] names what is damaged or not supported.
    pub fn open(file: &str, source: impl Source + 'static) -> Result<Self, GgufError> {
        Self::new(Gguf::open(file, source)?)
    }

    /// Takes a file that has been opened.
    ///
    /// # Errors
    /// As [`ModelHeader::read`]; [`GgufError::Unsupported`] for a tensor that the family does not have,
    /// [`GgufError::Type`] for one that cannot be read.
    pub fn new(mut gguf: Gguf) -> Result<Self, GgufError> {
        let header = ModelHeader::read(&mut gguf)?;
        for info in gguf.tensors() {
            // The factors are in the header; the rotation that some converters stored is computed.
            if info.name == "rope_freqs.weight" || info.name.ends_with(".attn_rot_embd") {
                continue;
            }
            if header.family.hugging_face_name(&info.name).is_none() {
                return Err(GgufError::Unsupported {
                    file: gguf.file().to_owned(),
                    what: format!("tensor `{}` in a {} model", super::shown(&info.name), header.family),
                    supported: "the family's usual tensors are",
                });
            }
            gguf.block_type(info)?;
        }
        Ok(Self { gguf, header })
    }

    /// The model's shape.
    pub fn header(&self) -> &ModelHeader {
        &self.header
    }

    /// The file behind it.
    pub fn gguf(&self) -> &Gguf {
        &self.gguf
    }

    /// Whether the file has a tensor of this Hugging Face name.
    pub fn contains(&self, tensor: &str) -> bool {
        self.name(tensor).is_ok_and(|name| self.gguf.tensor(&name).is_some())
    }

    /// Whether [`GgufModel::matrix`] gives a matrix Out×In that is In×Out in Hugging Face's files, as GPT-2's
    /// projections are.
    pub fn is_transposed(&self, tensor: &str) -> bool {
        self.name(tensor)
            .is_ok_and(|name| self.header.family.is_transposed(&name))
    }

    /// Checks that a tensor is there with this shape, (rows, columns) or (length).
    ///
    /// # Errors
    /// As [`Gguf::check`]; [`GgufError::Type`] for a type that cannot be read.
    pub fn check(&self, tensor: &str, shape: &[usize]) -> Result<(), GgufError> {
        let info = self.gguf.check(&self.name(tensor)?, shape)?;
        self.gguf.block_type(info).map(drop)
    }

    /// The type in which a tensor is stored; `None` when the file has no such tensor.
    pub(crate) fn stored(&self, tensor: &str) -> Option<BlockType> {
        let name = self.name(tensor).ok()?;
        self.gguf.tensor(&name)?.stored.block
    }

    /// The format that holds a tensor best; `None` when the file has no such tensor.
    pub fn natural(&self, tensor: &str) -> Option<Format> {
        self.stored(tensor).map(BlockType::natural)
    }

    /// Whether a format holds a tensor's values as they are.
    pub fn keeps(&self, tensor: &str, format: Format) -> bool {
        format == Format::F32
            || matches!(
                (self.stored(tensor), format),
                (Some(BlockType::F16), Format::F16)
                    | (Some(BlockType::Q8_0), Format::Q8)
                    | (Some(BlockType::Q4_0 | BlockType::Q4_1), Format::Q4)
            )
    }

    /// Rows of a matrix as f32, in Hugging Face's order of rows.
    ///
    /// # Errors
    /// As [`Gguf::rows`].
    ///
    /// # Panics
    /// When `values` is not `rows.len() · columns` long, or there are no such rows.
    pub(crate) fn rows(
        &mut self,
        tensor: &str,
        shape: [usize; 2],
        rows: Range<usize>,
        values: &mut [f32],
    ) -> Result<(), GgufError> {
        let name = self.name(tensor)?;
        match self.row_order(&name, shape[0]) {
            Some(order) => self.gguf.rows(&name, shape, order[rows].iter().copied(), values),
            None => self.gguf.rows(&name, shape, rows, values),
        }
    }

    /// A matrix of `shape` (rows, columns) as GGUF holds it, Out×In, in the format that keeps its weights, or in `format`.
    ///
    /// # Errors
    /// As [`Gguf::packed`].
    pub fn matrix(&mut self, tensor: &str, shape: [usize; 2], format: Option<Format>) -> Result<Repacked, GgufError> {
        let name = self.name(tensor)?;
        let mut matrix = self.gguf.packed(&name, shape, format)?;
        if let Some(rows) = self.row_order(&name, shape[0]) {
            matrix.packed = matrix.packed.select_rows(&rows);
        }
        Ok(matrix)
    }

    /// A norm's weight or a bias, (length).
    ///
    /// # Errors
    /// As [`Gguf::read`].
    pub fn vector(&mut self, tensor: &str, length: usize) -> Result<Vec<f32>, GgufError> {
        let name = self.name(tensor)?;
        let values = self.gguf.read(&name, &[length])?;
        Ok(match self.row_order(&name, length) {
            Some(rows) => rows.iter().map(|&row| values[row]).collect(),
            None => values,
        })
    }

    /// Rows of the token embedding, (ids, width), read from the file one by one.
    ///
    /// # Errors
    /// As [`Gguf::rows`].
    ///
    /// # Panics
    /// When `values` is not `ids · width` long.
    pub fn embed(&mut self, ids: &[u32], values: &mut [f32]) -> Result<(), GgufError> {
        let shape = [self.header.vocab, self.header.width];
        self.gguf
            .rows("token_embd.weight", shape, ids.iter().map(|&id| id as usize), values)
    }

    fn name(&self, tensor: &str) -> Result<String, GgufError> {
        self.header.family.gguf_name(tensor).ok_or_else(|| GgufError::Missing {
            file: self.gguf.file().to_owned(),
            tensor: super::shown(tensor),
        })
    }

    /// For every row in Hugging Face's order the file's, where they differ.
    fn row_order(&self, name: &str, rows: usize) -> Option<Vec<usize>> {
        let head_size = self.header.head_size;
        (self.header.family.is_interleaved(name) && rows.is_multiple_of(head_size))
            .then(|| half_split_rows(rows / head_size, head_size))
    }
}
