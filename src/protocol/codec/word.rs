//! The words of a run in bytes: identities, formats, settings, moments and layouts.
//!
//! Separate from the messages because several of them share each.

use super::super::message::{Digest, LinkRates, Version};
use super::DecodeError;
use super::wire::{Reader, Wire, put_length, wire_checked, wire_enum, wire_list, wire_struct};
use crate::terms::adapter::Trained;
use crate::terms::format::Format;
use crate::terms::ids::{ClientId, RoundKey, RunId, StepKey};
use crate::terms::moments::{MomentPolicy, Moments};
use crate::terms::optimizer::{OptimizerSettings, Schedule};
use crate::terms::speed::Speed;
use crate::terms::tensor::{WireForm, WireLayout, WireTensor};

impl Wire for Digest {
    const MIN_BYTES: usize = 32;

    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Digest(Wire::take(reader)?))
    }
}

impl Wire for RunId {
    const MIN_BYTES: usize = 16;

    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(RunId(Wire::take(reader)?))
    }
}

impl Wire for ClientId {
    const MIN_BYTES: usize = 8;

    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(ClientId(u64::take(reader)?))
    }
}

wire_enum!(WireForm { F32 = 0, F16 = 1, Int8 = 2 });
wire_enum!(Format { F16 = 0, F32 = 1, Q8 = 2, Q4 = 3 });
wire_enum!(Schedule { Constant = 0, Linear = 1 });
wire_enum!(Trained { Both = 0, B = 1 });
wire_enum!(MomentPolicy { Keep = 0, Reset = 1 });
wire_list!(WireForm);

wire_struct!(Version { major: u16, minor: u16 });
wire_struct!(RoundKey {
    round: u32,
    attempt: u32
});
wire_struct!(StepKey {
    round: RoundKey,
    step: u32
});
wire_struct!(Moments { steps: u64, first: Vec<f32>, second: Vec<f32> });

/// Steps of a run as the wire has them: those past 32 bits are as many as fit.
struct Steps(u64);

impl Wire for Steps {
    const MIN_BYTES: usize = 4;

    fn put(&self, out: &mut Vec<u8>) {
        u32::try_from(self.0).unwrap_or(u32::MAX).put(out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Steps(u32::take(reader)?.into()))
    }
}

impl Wire for OptimizerSettings {
    const MIN_BYTES: usize = 4 + 4 + Schedule::MIN_BYTES + 2 * Steps::MIN_BYTES + Option::<f32>::MIN_BYTES;

    fn put(&self, out: &mut Vec<u8>) {
        self.lr.put(out);
        self.weight_decay.put(out);
        self.schedule.put(out);
        Steps(self.warmup).put(out);
        Steps(self.total_steps).put(out);
        self.clip.put(out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(OptimizerSettings {
            lr: Wire::take(reader)?,
            weight_decay: Wire::take(reader)?,
            schedule: Wire::take(reader)?,
            warmup: Steps::take(reader)?.0,
            total_steps: Steps::take(reader)?.0,
            clip: Wire::take(reader)?,
        })
    }
}

wire_checked!(Speed {
    forward_flops_per_s,
    backward_flops_per_s
});
wire_checked!(LinkRates {
    main_bits_per_s,
    federated_bits_per_s
});

/// The layout of a tensor, whose bytes come at the end of its message.
impl Wire for WireLayout {
    const MIN_BYTES: usize = 13;

    fn put(&self, out: &mut Vec<u8>) {
        self.batch.put(out);
        self.seq.put(out);
        self.width.put(out);
        self.form.put(out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(WireLayout {
            batch: Wire::take(reader)?,
            seq: Wire::take(reader)?,
            width: Wire::take(reader)?,
            form: Wire::take(reader)?,
        })
    }
}

pub(super) fn take_tensor(layout: WireLayout, reader: &mut Reader<'_>) -> Result<WireTensor, DecodeError> {
    Ok(WireTensor::new(layout, Vec::<u8>::take(reader)?)?)
}
