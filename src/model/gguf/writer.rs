//! The writer: header, table and tensors streamed to any output.
//!
//! It is separate from the reader because it trusts its caller, and the reader nobody.

use std::io::{self, Write};

use super::blocks::BlockType;
use super::container::tensor_bytes;
use super::metadata::{Metadata, Value, write_string};
use super::{ALIGNMENT, ALIGNMENT_KEY, MAGIC};

/// The version written.
const VERSION: u32 = 3;

/// Writes a GGUF file forward, tensor after tensor, to any output.
#[derive(Debug)]
pub struct GgufWriter<W> {
    output: W,
    alignment: u64,
    /// Names and bytes of the tensors.
    tensors: Vec<(String, u64)>,
    /// The tensor being written, and how much of it has been.
    current: usize,
    written: u64,
}

impl<W: Write> GgufWriter<W> {
    /// Writes the header and the table: names, dimensions (the contiguous one first) and types in the order of the
    /// data.
    ///
    /// # Errors
    /// The output's.
    ///
    /// # Panics
    /// When a tensor's rows are no whole blocks of its type, or the metadata's alignment is no power of two.
    pub fn begin(mut output: W, metadata: &Metadata, table: &[(String, Vec<u64>, BlockType)]) -> io::Result<Self> {
        let alignment = match metadata.get(ALIGNMENT_KEY) {
            None => ALIGNMENT,
            Some(Value::U32(alignment)) if alignment.is_power_of_two() => *alignment,
            Some(other) => panic!("an alignment of {}", other.shown()),
        };
        let alignment = u64::from(alignment);
        let mut header = MAGIC.to_vec();
        header.extend(VERSION.to_le_bytes());
        header.extend((table.len() as u64).to_le_bytes());
        header.extend((metadata.len() as u64).to_le_bytes());
        for (key, value) in metadata.iter() {
            write_string(key, &mut header);
            header.extend(value.kind().to_le_bytes());
            value.write(&mut header);
        }
        let mut offset = 0;
        let mut tensors = Vec::with_capacity(table.len());
        for (name, dimensions, block) in table {
            write_string(name, &mut header);
            header.extend((dimensions.len() as u32).to_le_bytes());
            header.extend(dimensions.iter().flat_map(|size| size.to_le_bytes()));
            header.extend(block.stored().id.to_le_bytes());
            header.extend(u64::to_le_bytes(offset));
            let Some(bytes) = tensor_bytes(dimensions, block.stored()) else {
                panic!("`{name}` of {dimensions:?} in {block}");
            };
            tensors.push((name.clone(), bytes));
            offset = (offset + bytes).next_multiple_of(alignment);
        }
        header.resize(header.len().next_multiple_of(alignment as usize), 0);
        output.write_all(&header)?;
        Ok(Self {
            output,
            alignment,
            tensors,
            current: 0,
            written: 0,
        })
    }

    /// Writes the next bytes of the next tensor; a piece may end anywhere, but not in another tensor.
    ///
    /// # Errors
    /// The output's.
    ///
    /// # Panics
    /// When the bytes are more than the tensor still has.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some((name, size)) = self.tensors.get(self.current) else {
            panic!("{} bytes after the last tensor", bytes.len());
        };
        self.written += bytes.len() as u64;
        assert!(
            self.written <= *size,
            "{} bytes of `{name}`, which has {size}",
            self.written
        );
        self.output.write_all(bytes)?;
        if self.written == *size {
            let padding = size.next_multiple_of(self.alignment) - size;
            self.output.write_all(&vec![0; padding as usize])?;
            self.current += 1;
            self.written = 0;
        }
        Ok(())
    }

    /// Flushes the file when every tensor has been written.
    ///
    /// # Errors
    /// The output's.
    ///
    /// # Panics
    /// When tensors are missing.
    pub fn finish(mut self) -> io::Result<W> {
        if let Some((name, size)) = self.tensors.get(self.current) {
            panic!("`{name}` ends after {} of {size} bytes", self.written);
        }
        self.output.flush()?;
        Ok(self.output)
    }
}
