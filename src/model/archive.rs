//! A safetensors file read tensor by tensor: its table, and ranges of its data converted to f32.
//!
//! It is separate from the model's weights because adapters come in the same container. Nothing is
//! allocated from a length in the file before that length is compared with the size of the file.

use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use super::thread::MaybeSend;

/// The longest header read, as in the format's reference implementation.
const MAX_HEADER: u64 = 100_000_000;
/// Elements converted at a time.
const CHUNK: usize = 1 << 15;

/// Why a safetensors file was refused. `file` is the name the archive was opened with.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    #[error("cannot read {file}: {source}")]
    Read { file: String, r#source: std::io::Error },
    #[error("{file} is not a safetensors file: {reason}")]
    Header { file: String, reason: String },
    #[error("{file} is truncated or damaged: its header describes {described} bytes and the file has {actual}")]
    Length { file: String, described: u64, actual: u64 },
    #[error("{file} has no tensor `{tensor}`")]
    Missing { file: String, tensor: String },
    #[error("{file}: tensor `{tensor}` has shape {found:?}, expected {expected:?}")]
    Shape {
        file: String,
        tensor: String,
        expected: Vec<usize>,
        found: Vec<usize>,
    },
    #[error("{file}: tensor `{tensor}` is stored as {found}; F32, F16 and BF16 can be read")]
    Dtype {
        file: String,
        tensor: String,
        found: String,
    },
    #[error("{file}: tensor `{tensor}` holds a value that is not finite")]
    NotFinite { file: String, tensor: String },
}

/// Where bytes are kept: a file, or a cursor over bytes in memory.
pub trait Source: Read + Seek + MaybeSend {}
impl<T: Read + Seek + MaybeSend> Source for T {}

/// An open safetensors file whose table has been checked against its length.
pub struct Archive {
    file: String,
    source: Box<dyn Source>,
    data_start: u64,
    metadata: Metadata,
}

impl std::fmt::Debug for Archive {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Archive")
            .field("file", &self.file)
            .finish_non_exhaustive()
    }
}

impl Archive {
    /// Reads and checks the header. `file` names the archive in errors.
    ///
    /// # Errors
    /// [`ArchiveError`] when the header is not valid or does not describe exactly the bytes that follow it.
    pub fn open(file: &str, source: impl Source + 'static) -> Result<Self, ArchiveError> {
        let mut source: Box<dyn Source> = Box::new(source);
        let read_error = |source| ArchiveError::Read {
            file: file.to_owned(),
            source,
        };
        let header_error = |reason: String| ArchiveError::Header {
            file: file.to_owned(),
            reason,
        };

        let actual = source.seek(SeekFrom::End(0)).map_err(read_error)?;
        source.seek(SeekFrom::Start(0)).map_err(read_error)?;
        if actual < 8 {
            return Err(header_error(format!("{actual} bytes are too few for a header")));
        }
        let mut length = [0; 8];
        source.read_exact(&mut length).map_err(read_error)?;
        let header_length = u64::from_le_bytes(length);
        if header_length > MAX_HEADER || header_length > actual - 8 {
            return Err(header_error(format!(
                "its header claims {header_length} bytes in a file of {actual}"
            )));
        }
        let mut header = vec![0; header_length as usize];
        source.read_exact(&mut header).map_err(read_error)?;
        let metadata: Metadata =
            serde_json::from_slice(&header).map_err(|error| header_error(format!("bad header: {error}")))?;
        let data_start = 8 + header_length;
        let described = data_start + metadata.data_len() as u64;
        if described != actual {
            return Err(ArchiveError::Length {
                file: file.to_owned(),
                described,
                actual,
            });
        }
        Ok(Self {
            file: file.to_owned(),
            source,
            data_start,
            metadata,
        })
    }

    /// The name the archive was opened with.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// Names of all tensors, in the order of their data.
    pub fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    pub fn contains(&self, tensor: &str) -> bool {
        self.metadata.info(tensor).is_some()
    }

    /// The shape of a tensor, if the archive has it.
    pub fn shape(&self, tensor: &str) -> Option<&[usize]> {
        self.metadata.info(tensor).map(|info| info.shape.as_slice())
    }

    /// Checks that a tensor is there, has this shape and a dtype that can be read.
    ///
    /// # Errors
    /// [`ArchiveError::Missing`], [`ArchiveError::Shape`] or [`ArchiveError::Dtype`].
    pub fn check(&self, tensor: &str, expected: &[usize]) -> Result<(), ArchiveError> {
        let info = self.info(tensor)?;
        if info.shape != expected {
            return Err(ArchiveError::Shape {
                file: self.file.clone(),
                tensor: tensor.to_owned(),
                expected: expected.to_vec(),
                found: info.shape.clone(),
            });
        }
        if !matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Err(ArchiveError::Dtype {
                file: self.file.clone(),
                tensor: tensor.to_owned(),
                found: format!("{:?}", info.dtype),
            });
        }
        Ok(())
    }

    /// Hands the values of a tensor to `consume` in order, some thousands at a time.
    ///
    /// # Errors
    /// As [`Archive::check`]; [`ArchiveError::Read`]; [`ArchiveError::NotFinite`]; whatever `consume` returns.
    pub fn for_each_chunk<E: From<ArchiveError>>(
        &mut self,
        tensor: &str,
        expected: &[usize],
        mut consume: impl FnMut(&[f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.check(tensor, expected)?;
        let elements: usize = expected.iter().product();
        let mut values = Vec::with_capacity(elements.min(CHUNK));
        for start in (0..elements).step_by(CHUNK) {
            self.read_range(tensor, start, CHUNK.min(elements - start), &mut values)?;
            consume(&values)?;
        }
        Ok(())
    }

    /// All values of a tensor.
    ///
    /// # Errors
    /// As [`Archive::for_each_chunk`].
    pub fn read(&mut self, tensor: &str, expected: &[usize]) -> Result<Vec<f32>, ArchiveError> {
        self.check(tensor, expected)?;
        // The check has compared the size with the file's, so this allocation is as long as the file at most (F16: twice).
        let mut all = Vec::with_capacity(expected.iter().product());
        self.for_each_chunk(tensor, expected, |values| {
            all.extend_from_slice(values);
            Ok::<(), ArchiveError>(())
        })?;
        Ok(all)
    }

    /// Rows of a matrix, row major.
    ///
    /// # Errors
    /// As [`Archive::check`]; [`ArchiveError::Read`]; [`ArchiveError::NotFinite`].
    ///
    /// # Panics
    /// If there are no such rows.
    pub(crate) fn read_rows(
        &mut self,
        tensor: &str,
        shape: &[usize; 2],
        rows: Range<usize>,
    ) -> Result<Vec<f32>, ArchiveError> {
        self.check(tensor, shape)?;
        assert!(
            rows.start <= rows.end && rows.end <= shape[0],
            "rows {rows:?} of {shape:?}"
        );
        let mut values = Vec::new();
        self.read_range(tensor, rows.start * shape[1], rows.len() * shape[1], &mut values)?;
        Ok(values)
    }

    /// How a tensor's elements are stored, if the archive has it.
    #[cfg(not(target_arch = "wasm32"))]
    pub(crate) fn dtype(&self, tensor: &str) -> Option<Dtype> {
        self.metadata.info(tensor).map(|info| info.dtype)
    }

    /// Whether two tensors, of this archive and of `other` or of this one when `other` is `None`, hold equal values.
    ///
    /// # Errors
    /// [`ArchiveError`] when one is missing, of another shape or cannot be read.
    pub fn equal(
        &mut self,
        tensor: &str,
        other: Option<&mut Archive>,
        other_tensor: &str,
        expected: &[usize],
    ) -> Result<bool, ArchiveError> {
        self.check(tensor, expected)?;
        let mut other = other;
        let (mut left, mut right) = (Vec::new(), Vec::new());
        let elements: usize = expected.iter().product();
        match &other {
            Some(archive) => archive.check(other_tensor, expected)?,
            None => self.check(other_tensor, expected)?,
        }
        for start in (0..elements).step_by(CHUNK) {
            let count = CHUNK.min(elements - start);
            self.read_range(tensor, start, count, &mut left)?;
            match &mut other {
                Some(archive) => archive.read_range(other_tensor, start, count, &mut right)?,
                None => self.read_range(other_tensor, start, count, &mut right)?,
            }
            if left != right {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn info(&self, tensor: &str) -> Result<&TensorInfo, ArchiveError> {
        self.metadata.info(tensor).ok_or_else(|| ArchiveError::Missing {
            file: self.file.clone(),
            tensor: tensor.to_owned(),
        })
    }

    /// Replaces `values` with `count` elements from `start`; the caller has checked the range and the dtype.
    fn read_range(
        &mut self,
        tensor: &str,
        start: usize,
        count: usize,
        values: &mut Vec<f32>,
    ) -> Result<(), ArchiveError> {
        let info = self.info(tensor)?;
        let (dtype, offset) = (info.dtype, info.data_offsets.0 as u64);
        let element = if dtype == Dtype::F32 { 4 } else { 2 };
        let mut bytes = vec![0; count * element];
        let at = self.data_start + offset + (start * element) as u64;
        self.source
            .seek(SeekFrom::Start(at))
            .and_then(|_| self.source.read_exact(&mut bytes))
            .map_err(|source| ArchiveError::Read {
                file: self.file.clone(),
                source,
            })?;
        values.clear();
        match dtype {
            Dtype::F32 => values.extend(bytes.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes))),
            Dtype::BF16 => {
                values.extend(
                    bytes
                        .as_chunks::<2>()
                        .0
                        .iter()
                        .map(|&bytes| bf16::from_le_bytes(bytes).to_f32()),
                );
            }
            _ => values.extend(
                bytes
                    .as_chunks::<2>()
                    .0
                    .iter()
                    .map(|&bytes| f16::from_le_bytes(bytes).to_f32()),
            ),
        }
        if values.iter().any(|value| !value.is_finite()) {
            return Err(ArchiveError::NotFinite {
                file: self.file.clone(),
                tensor: tensor.to_owned(),
            });
        }
        Ok(())
    }
}
