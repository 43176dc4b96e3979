//! What crosses the cut: activations one way, their gradient the other, (batch, seq, width), in one of three wire forms. The
//! conversion runs on the device, so that only the wire form is read back or uploaded.

use serde::{Deserialize, Serialize};

use crate::compute::{self, Buffer, Engine, Recording};
use crate::kernels::quantize;

use super::{Error, check_length};

/// How values are held on the wire.
///
/// | form | bytes of (rows, width) |
/// |---|---|
/// | `F32` | four a value |
/// | `F16` | halves, two a 32-bit word over the whole tensor |
/// | `Int8` | an f32 scale a row, then each row's int8 padded to whole words |
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wire {
    F32,
    #[default]
    F16,
    Int8,
}

impl Wire {
    /// Length in 32-bit words of (rows, width) values.
    fn words(self, rows: usize, width: usize) -> usize {
        match self {
            Wire::F32 => rows * width,
            Wire::F16 => (rows * width).div_ceil(2),
            Wire::Int8 => rows + rows * width.div_ceil(4),
        }
    }
}

/// A tensor (batch, seq, width) in its wire form.
#[derive(Clone, Debug, PartialEq)]
pub struct Cut {
    pub wire: Wire,
    pub batch: usize,
    pub seq: usize,
    pub width: usize,
    /// Little-endian words.
    pub bytes: Vec<u8>,
}

impl Cut {
    /// Bytes of a tensor's wire form.
    pub fn byte_length(wire: Wire, batch: usize, seq: usize, width: usize) -> usize {
        4 * wire.words(batch * seq, width)
    }

    /// That the bytes are as many as the shape says.
    pub fn check(&self) -> Result<(), Error> {
        check_length(
            "a tensor on the wire",
            self.bytes.len(),
            Self::byte_length(self.wire, self.batch, self.seq, self.width),
        )
    }
}

/// The wire forms of one side's tensor on its device.
pub(super) struct CutBuffers {
    wire: Wire,
    width: usize,
    /// f16 pairs, or int8 rows.
    packed: Buffer,
    scales: Buffer, // (rows)
}

impl CutBuffers {
    pub fn new(engine: &Engine, wire: Wire, rows: usize, width: usize) -> Result<Self, compute::Error> {
        let (packed, scales) = match wire {
            Wire::F32 => (1, 1),
            Wire::F16 => ((rows * width).div_ceil(2), 1),
            Wire::Int8 => (rows * width.div_ceil(4), rows),
        };
        Ok(Self {
            wire,
            width,
            packed: engine.buffer("wire.packed", packed)?,
            scales: engine.buffer("wire.scales", scales)?,
        })
    }

    fn params(&self, rows: usize) -> quantize::Params {
        quantize::Params {
            rows: rows as u32,
            width: self.width as u32,
        }
    }

    /// Records the conversion of `values` (rows, width) to the wire form.
    pub fn record_pack(&self, recording: &mut Recording, rows: usize, values: &Buffer) {
        match self.wire {
            Wire::F32 => {}
            Wire::F16 => quantize::forward_f16(recording, self.params(rows), values, &self.packed),
            Wire::Int8 => quantize::forward_int8(recording, self.params(rows), values, &self.packed, &self.scales),
        }
    }

    /// Records the conversion of the uploaded wire form to `values` (rows, width).
    pub fn record_unpack(&self, recording: &mut Recording, rows: usize, values: &Buffer) {
        match self.wire {
            Wire::F32 => {}
            Wire::F16 => quantize::inverse_f16(recording, self.params(rows), &self.packed, values),
            Wire::Int8 => quantize::inverse_int8(recording, self.params(rows), &self.packed, &self.scales, values),
        }
    }

    /// Reads the wire form back; `values` itself when it is f32.
    pub async fn download(
        &self,
        engine: &Engine,
        (batch, seq): (usize, usize),
        values: &Buffer,
    ) -> Result<Cut, compute::Error> {
        let rows = batch * seq;
        let words: Vec<u32> = match self.wire {
            Wire::F32 => engine.download(values, 0, rows * self.width).await?,
            Wire::F16 => {
                engine
                    .download(&self.packed, 0, (rows * self.width).div_ceil(2))
                    .await?
            }
            Wire::Int8 => {
                let mut words: Vec<u32> = engine.download(&self.scales, 0, rows).await?;
                words.extend(
                    engine
                        .download::<u32>(&self.packed, 0, rows * self.width.div_ceil(4))
                        .await?,
                );
                words
            }
        };
        Ok(Cut {
            wire: self.wire,
            batch,
            seq,
            width: self.width,
            bytes: words.iter().flat_map(|word| word.to_le_bytes()).collect(),
        })
    }

    /// Uploads the wire form, or `values` itself when it is f32.
    pub fn upload(&self, engine: &Engine, cut: &Cut, values: &Buffer) -> Result<(), Error> {
        cut.check()?;
        let rows = cut.batch * cut.seq;
        let words: Vec<u32> = cut
            .bytes
            .chunks_exact(4)
            .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
            .collect();
        match self.wire {
            Wire::F32 => engine.upload(values, 0, &words),
            Wire::F16 => engine.upload(&self.packed, 0, &words),
            Wire::Int8 => {
                engine.upload(&self.scales, 0, &words[..rows]);
                engine.upload(&self.packed, 0, &words[rows..]);
            }
        }
        Ok(())
    }

    /// That `cut` has this side's width and wire form.
    pub fn accepts(&self, cut: &Cut) -> Result<(), Error> {
        check_length("a row on the wire", cut.width, self.width)?;
        if cut.wire != self.wire {
            return Err(Error::Length {
                what: "a tensor in another wire form",
                expected: self.wire.words(cut.batch * cut.seq, cut.width) * 4,
                found: cut.bytes.len(),
            });
        }
        cut.check()
    }
}
