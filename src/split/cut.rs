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

    /// Reads the wire form of (batch·seq, width) back; `values` itself when it is f32.
    pub async fn download(
        &self,
        engine: &Engine,
        (batch, seq): (usize, usize),
        values: &Buffer,
    ) -> Result<WireTensor, Error> {
        let rows = batch * seq;
        let mut words = Vec::with_capacity(self.words(rows));
        for (buffer, count) in self.pieces(rows, values) {
            words.extend(engine.download::<u32>(buffer, 0, count).await?);
        }
        self.tensor((batch, seq), rows, &words)
    }

    /// Length in words of (rows, width).
    pub fn words(&self, rows: usize) -> usize {
        self.form
            .words(rows, self.width)
            .expect("as many as there are buffers for")
    }

    /// The buffers that hold the wire form of (rows, width), in its order, with their words.
    fn pieces<'a>(&'a self, rows: usize, values: &'a Buffer) -> Vec<(&'a Buffer, usize)> {
        match self.form {
            WireForm::F32 => vec![(values, rows * self.width)],
            WireForm::F16 => vec![(&self.packed, self.words(rows))],
            WireForm::Int8 => vec![(&self.scales, rows), (&self.packed, self.words(rows) - rows)],
        }
    }

    /// Records copying the wire form of (rows, width) to `reply`, from word `at` on.
    pub(crate) fn record_reply(
        &self,
        recording: &mut Recording,
        rows: usize,
        values: &Buffer,
        (reply, mut at): (&Buffer, usize),
    ) {
        for (buffer, count) in self.pieces(rows, values) {
            recording.copy((buffer, 0), (reply, at), count);
            at += count;
        }
    }

    /// The first `batch` sequences of the `rows` whose wire form is `words`.
    pub(crate) fn tensor(&self, (batch, seq): (usize, usize), rows: usize, words: &[u32]) -> Result<WireTensor, Error> {
        let own = batch * seq;
        let (scales, packed) = words.split_at(if self.form == WireForm::Int8 { rows } else { 0 });
        let own_scales = &scales[..own.min(scales.len())];
        let words = own_scales.iter().chain(&packed[..self.words(own) - own_scales.len()]);
        let layout = WireLayout {
            form: self.form,
            batch: batch as u32,
            seq: seq as u32,
            width: self.width as u32,
        };
        Ok(WireTensor::new(
            layout,
            words.flat_map(|word| word.to_le_bytes()).collect(),
        )?)
    }

    /// Uploads the wire form, or `values` itself when it is f32, of `rows` of which those past the tensor's are zero.
    pub fn upload(&self, engine: &Engine, tensor: &WireTensor, rows: usize, values: &Buffer) {
        let words = tensor.bytes().as_chunks::<4>().0;
        let mut words: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
        let mut packed = match self.form {
            WireForm::Int8 => words.split_off(tensor.rows()),
            WireForm::F32 | WireForm::F16 => std::mem::take(&mut words),
        };
        let mut scales = words;
        for ((buffer, count), words) in self
            .pieces(rows, values)
            .into_iter()
            .rev()
            .zip([&mut packed, &mut scales])
        {
            words.resize(count, 0);
            engine.upload(buffer, 0, words);
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
