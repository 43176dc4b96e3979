//! What crosses the cut, on the device: activations one way, their gradient the other, (batch, seq, width). The conversion to and
//! from the wire form runs there, so that only that form is read back or uploaded.

use super::{Error, check_length};
use crate::compute::{self, Buffer, Engine, Recording};
use crate::kernels::quantize;
use crate::terms::tensor::{WireForm, WireLayout, WireTensor};

/// The wire forms of one side's tensor on its device.
pub(super) struct CutBuffers {
    form: WireForm,
    width: usize,
    /// f16 pairs, or int8 rows.
    packed: Buffer,
    scales: Buffer, // (rows)
}

impl CutBuffers {
    pub fn new(engine: &Engine, form: WireForm, rows: usize, width: usize) -> Result<Self, compute::Error> {
        let (packed, scales) = match form {
            WireForm::F32 => (1, 1),
            WireForm::F16 => ((rows * width).div_ceil(2), 1),
            WireForm::Int8 => (rows * width.div_ceil(4), rows),
        };
        Ok(Self {
            form,
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
    pub(crate) fn record_pack(&self, recording: &mut Recording, rows: usize, values: &Buffer) {
        match self.form {
            WireForm::F32 => {}
            WireForm::F16 => quantize::forward_f16(recording, self.params(rows), values, &self.packed),
            WireForm::Int8 => quantize::forward_int8(recording, self.params(rows), values, &self.packed, &self.scales),
        }
    }

    /// Records the conversion of the uploaded wire form to `values` (rows, width).
    pub(crate) fn record_unpack(&self, recording: &mut Recording, rows: usize, values: &Buffer) {
        match self.form {
            WireForm::F32 => {}
            WireForm::F16 => quantize::inverse_f16(recording, self.params(rows), &self.packed, values),
            WireForm::Int8 => quantize::inverse_int8(recording, self.params(rows), &self.packed, &self.scales, values),
        }
    }

    /// Reads the wire form back; `values` itself when it is f32.
    pub async fn download(
        &self,
        engine: &Engine,
        (batch, seq): (usize, usize),
        values: &Buffer,
    ) -> Result<WireTensor, Error> {
        let rows = batch * seq;
        let words: Vec<u32> = match self.form {
            WireForm::F32 => engine.download(values, 0, rows * self.width).await?,
            WireForm::F16 => {
                engine
                    .download(&self.packed, 0, (rows * self.width).div_ceil(2))
                    .await?
            }
            WireForm::Int8 => {
                let mut words: Vec<u32> = engine.download(&self.scales, 0, rows).await?;
                words.extend(
                    engine
                        .download::<u32>(&self.packed, 0, rows * self.width.div_ceil(4))
                        .await?,
                );
                words
            }
        };
        let layout = WireLayout {
            form: self.form,
            batch: batch as u32,
            seq: seq as u32,
            width: self.width as u32,
        };
        let bytes = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        Ok(WireTensor::new(layout, bytes)?)
    }

    /// Uploads the wire form, or `values` itself when it is f32.
    pub fn upload(&self, engine: &Engine, tensor: &WireTensor, values: &Buffer) {
        let words = tensor.bytes().as_chunks::<4>().0;
        let words: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
        match self.form {
            WireForm::F32 => engine.upload(values, 0, &words),
            WireForm::F16 => engine.upload(&self.packed, 0, &words),
            WireForm::Int8 => {
                engine.upload(&self.scales, 0, &words[..tensor.rows()]);
                engine.upload(&self.packed, 0, &words[tensor.rows()..]);
            }
        }
    }

    /// That `tensor` has this side's width and form.
    pub(crate) fn accepts(&self, tensor: &WireTensor) -> Result<(), Error> {
        check_length("a row on the wire", tensor.width(), self.width)?;
        let found = tensor.layout().form;
        if found != self.form {
            return Err(Error::Form {
                expected: self.form,
                found,
            });
        }
        Ok(())
    }
}
