//! What clients and the two servers tell each other, in bytes.
//!
//! Separate from `control` because these come from and go to machines that nobody vouches for.

use std::time::Duration;

use super::super::message::*;
use super::DecodeError;
use super::wire::{Reader, Wire, put_bytes, put_length, wire_enum, wire_list, wire_struct};
use super::word::take_tensor;
use crate::terms::adapter::Trained;
use crate::terms::format::Format;
use crate::terms::ids::{RoundKey, RunId, StepKey};
use crate::terms::moments::{MomentPolicy, Moments};
use crate::terms::optimizer::OptimizerSettings;
use crate::terms::speed::Speed;
use crate::terms::tensor::{WireForm, WireLayout};

wire_struct!(Blob {
    name: String,
    sha256: Digest,
    bytes: u64
});
wire_list!(Blob, OwnAlpha);
wire_struct!(RunConfig {
    split: u32,
    rank: u32,
    alpha: f32,
    targets: Vec<String>,
    weights: Format,
    wire: WireForm,
    batch: u32,
    seq: u32,
    width: u32,
    vocab: u32,
    seed: u64,
    shuffle: bool,
    local_steps: u32,
    rounds: u32,
    optimizer: OptimizerSettings,
    moments: MomentPolicy,
});
wire_struct!(OwnAlpha {
    block: u32,
    target: String,
    alpha: f32
});

/// Without its alphas: they follow in a kind of message of their own, which came with protocol 3.1, where there are any. What is
/// trained follows them in another, which came with protocol 3.2, where that is not all.
impl Wire for Assignment {
    const MIN_BYTES: usize =
        <RunId as Wire>::MIN_BYTES + <u32 as Wire>::MIN_BYTES + <RunConfig as Wire>::MIN_BYTES + 3 * 4 + 8;

    fn put(&self, out: &mut Vec<u8>) {
        self.run.put(out);
        self.number.put(out);
        self.config.put(out);
        self.model_config.put(out);
        self.weights.put(out);
        self.tokenizer.put(out);
        self.adapter_len.put(out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Assignment {
            run: Wire::take(reader)?,
            number: Wire::take(reader)?,
            config: Wire::take(reader)?,
            model_config: Wire::take(reader)?,
            weights: Wire::take(reader)?,
            tokenizer: Wire::take(reader)?,
            adapter_len: Wire::take(reader)?,
            alphas: Vec::new(),
            trained: Trained::Both,
        })
    }
}

wire_struct!(RoundStart {
    round: RoundKey,
    base: Digest,
    members: u32,
    adapter: Option<Vec<f32>>,
    moments: Option<Moments>,
    rates: Option<LinkRates>,
});
wire_struct!(Ready { assignment: u32, speed: Option<Speed> });
wire_struct!(StepStart {
    key: StepKey,
    members: u32
});

impl Wire for Activations {
    const MIN_BYTES: usize = StepKey::MIN_BYTES + 4 + WireLayout::MIN_BYTES + 4 + Duration::MIN_BYTES + 4 + 4;

    fn put(&self, out: &mut Vec<u8>) {
        self.key.put(out);
        self.split.put(out);
        self.tensor.layout().put(out);
        self.examples.put(out);
        self.forward.put(out);
        self.targets.put(out);
        put_bytes(self.tensor.bytes(), out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let (key, split, layout) = (Wire::take(reader)?, Wire::take(reader)?, Wire::take(reader)?);
        Ok(Activations {
            key,
            split,
            examples: Wire::take(reader)?,
            forward: Wire::take(reader)?,
            targets: Wire::take(reader)?,
            tensor: take_tensor(layout, reader)?,
        })
    }
}

impl Wire for Gradient {
    const MIN_BYTES: usize = StepKey::MIN_BYTES + WireLayout::MIN_BYTES + Digest::MIN_BYTES + 4 + 8 + 4 + 4;

    fn put(&self, out: &mut Vec<u8>) {
        self.key.put(out);
        self.tensor.layout().put(out);
        self.activations.put(out);
        self.loss.put(out);
        self.tokens.put(out);
        self.mean_loss.put(out);
        put_bytes(self.tensor.bytes(), out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let (key, layout) = (Wire::take(reader)?, Wire::take(reader)?);
        Ok(Gradient {
            key,
            activations: Wire::take(reader)?,
            loss: Wire::take(reader)?,
            tokens: Wire::take(reader)?,
            mean_loss: Wire::take(reader)?,
            tensor: take_tensor(layout, reader)?,
        })
    }
}

wire_struct!(StepDone {
    key: StepKey,
    backward: Duration
});
wire_struct!(RoundEnd {
    round: RoundKey,
    split: u32,
    steps: u64
});
wire_struct!(AdapterUpdate {
    run: RunId,
    round: RoundKey,
    base: Digest,
    examples: u64,
    values: Vec<f32>,
    moments: Option<Moments>,
});
wire_struct!(Average { round: RoundKey, digest: Digest, values: Vec<f32> });
wire_struct!(UpdateDeclined { round: RoundKey, open: Option<RoundKey>, detail: String });
wire_struct!(RoundResult {
    round: u32,
    rounds: u32,
    included: u32,
    valid_loss: Option<f64>,
    steps: u32,
    total_steps: u32,
});
wire_enum!(StopReason { Completed = 0, Shutdown = 1, Unexpected = 2, BadUpdate = 3, Excluded = 4, Superseded = 5, Late = 6 });
wire_struct!(Stop { reason: StopReason, detail: String, return_after: Option<Duration> });
