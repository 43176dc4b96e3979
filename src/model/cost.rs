//! What a split training step costs before anything runs: floating-point operations, bits on the network, bytes of memory, as
//! functions of the model's shape, the batch, the cut ℓ and the LoRA rank r. It is what the delay model of SflLLM (arXiv 2504.14667)
//! is fed with, and it is separate from the recordings because whoever chooses cut and rank compares many without holding a model.
//!
//! Units: FLOP with one multiply-add as two, bits, bytes. With batch b, sequence s, width d, feed-forward width f, vocabulary V,
//! blocks L, and S = Σ (in + out) over the adapted matrices of a block:
//!
//! | quantity | FLOP |
//! |---|---|
//! | linear maps of a block, forward; backward likewise, as frozen weights need no gradient | 2·b·s·(4d² + 2df) = 24·b·s·d² for f = 4d |
//! | attention of a block | [`Convention`] |
//! | LoRA of a block, forward / backward (dA, dB and dX) | 2·b·s·r·S / 4·b·s·r·S |
//! | lowest block backward | nothing is trained below its lowest adapted map: no dX into that map, and nothing under it |
//! | head, forward / backward (tied to the frozen embedding) | 2·b·s·d·V each |
//! | embedding (a lookup) | 0 |
//!
//! By [`Convention::Dense`] these are the products, and element-wise work is left out, as in the paper. By
//! [`Convention::Issued`] all of it is read off recordings on an engine that computes nothing, and so is memory.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use crate::compute::{Cost, Engine, Error, Recording};
use crate::terms::format::Format;
use crate::terms::tensor::WireForm;

use super::ModelError;
use super::adapter::{AdapterLayout, LoraSpec, Target};
use super::architecture::Architecture;
use super::ends::embedding::Embedding;
use super::ends::head::HeadWeights;
use super::stack::{Stack, StackWeights};
use super::unit::{Tensor, Unit, UnitData, layout};
use super::weights::{UnitSource, WeightsError};
use super::workspace::Extent;

/// How attention's products are counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Convention {
    /// Every pair of positions and each product once: 4·b·s²·d forward, 8·b·s²·d backward. The useful work by the convention of the
    /// paper and of most FLOP counts.
    #[default]
    Dense,
    /// What this crate's recordings issue, element-wise work included: only pairs that the causal mask leaves, and a backward pass
    /// that computes scores twice and their gradient twice rather than keep them.
    Issued,
}

/// The work of split steps of one model on batches of one shape; cut ℓ and rank r are arguments, since they are what is chosen.
///
/// A `cut` counts the client's blocks; more than the model has are taken as all of them.
#[derive(Clone, Debug)]
pub struct Workload {
    model: Architecture,
    /// In the canonical order.
    targets: Vec<Target>,
    extent: Extent,
    convention: Convention,
    /// What was read off recordings, by rank.
    recorded: Arc<Mutex<BTreeMap<usize, Passes>>>,
}

/// What one side of the cut holds on its device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceBytes {
    /// Frozen weights.
    pub weights: u64,
    /// For a batch: what the forward pass keeps, the gradients, the adapter with gradient and moments, the wire forms both ways.
    pub training: u64,
}

impl DeviceBytes {
    /// Both.
    pub fn total(&self) -> u64 {
        self.weights + self.training
    }
}

/// In which format a matrix of a unit is held, by its name.
pub type Formats<'a> = &'a dyn Fn(Unit, &str) -> Format;

/// FLOP of the passes of one block and of the head.
#[derive(Clone, Copy, Debug, Default)]
struct Passes {
    forward: f64,
    /// To the gradient of the block's input.
    backward: f64,
    /// Of a block below which nothing is trained.
    lowest_backward: f64,
    head_forward: f64,
    head_backward: f64,
}

impl Workload {
    /// `targets` are the matrices of each block that LoRA adapts; `extent` is one client's batch.
    pub fn new(model: &Architecture, targets: &[Target], extent: Extent, convention: Convention) -> Self {
        Self {
            model: model.clone(),
            targets: model
                .targets()
                .iter()
                .copied()
                .filter(|t| targets.contains(t))
                .collect(),
            extent,
            convention,
            recorded: Arc::default(),
        }
    }

    /// The model's shape.
    pub fn model(&self) -> &Architecture {
        &self.model
    }

    /// One client's batch.
    pub fn extent(&self) -> Extent {
        self.extent
    }

    fn passes(&self, rank: usize) -> Passes {
        match self.convention {
            Convention::Dense => self.dense(rank),
            Convention::Issued => {
                let mut recorded = self.recorded.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                *recorded.entry(rank).or_insert_with(|| self.record(rank))
            }
        }
    }

    fn dense(&self, rank: usize) -> Passes {
        let linear: f64 = self.model.targets().iter().map(|&t| self.linear_flops(t)).sum();
        let lora = 2.0 * self.rows() * rank as f64 * self.adapted_dimensions();
        let attention = 2.0 * self.rows() * self.extent.seq as f64 * self.model.attention_width() as f64;
        let head = 2.0 * self.rows() * self.model.width as f64 * self.model.vocab as f64;
        let lowest_backward = match self.targets.first().map(|target| target.level()) {
            None => 0.0,
            Some(level) => {
                let above = self.model.targets().iter().filter(|target| target.level() > level);
                let linear: f64 = above.map(|&target| self.linear_flops(target)).sum();
                // The gradients of the lowest adapted maps end the pass: their inputs need none.
                let lowest = self.targets.iter().filter(|target| target.level() == level);
                let inputs: f64 = lowest.map(|&target| self.dimensions(target).0).sum();
                let attention = if level == 0 { 4.0 * attention } else { 0.0 };
                linear + attention + 2.0 * lora - 2.0 * self.rows() * rank as f64 * inputs
            }
        };
        Passes {
            forward: linear + 2.0 * attention + lora,
            backward: linear + 4.0 * attention + 2.0 * lora,
            lowest_backward,
            head_forward: head,
            head_backward: head,
        }
    }

    /// Records one block with the head on paper.
    fn record(&self, rank: usize) -> Passes {
        let stack = self.on_paper(0..1, rank, &|_, _| Format::F16, true);
        let Ok((stack, _)) = stack else {
            // Paper has room for anything; a rank beyond what adapters can have is refused where it is chosen.
            return Passes::default();
        };
        let seq = self.extent.seq;
        let flops = |record: &dyn Fn(&mut Recording)| {
            let mut recording = stack.engine().recording();
            record(&mut recording);
            let Cost { flops, .. } = recording.cost();
            flops
        };
        let head_forward = flops(&|recording| stack.record_loss(recording, seq, false));
        Passes {
            forward: flops(&|recording| stack.record_blocks(recording, seq)),
            backward: flops(&|recording| stack.record_backward(recording, seq, true)),
            lowest_backward: flops(&|recording| stack.record_backward(recording, seq, false)),
            head_forward,
            head_backward: flops(&|recording| stack.record_loss(recording, seq, true)) - head_forward,
        }
    }

    /// Some blocks ready for training on an engine that computes nothing, and what they hold.
    fn on_paper(
        &self,
        blocks: Range<usize>,
        rank: usize,
        formats: Formats<'_>,
        head: bool,
    ) -> Result<(Stack, DeviceBytes), ModelError> {
        let engine = Engine::paper();
        let mut units = Blank {
            model: &self.model,
            formats,
        };
        let weights = StackWeights {
            embedding: None,
            blocks: StackWeights::load_blocks(&engine, &self.model, &mut units, blocks.clone())?,
            first_block: blocks.start,
            head: head
                .then(|| HeadWeights::load(&engine, &self.model, &mut units))
                .transpose()?,
        };
        let weight_bytes = engine.buffer_bytes();
        let layout = LoraSpec::new(rank, 1.0, self.targets.iter().copied())
            .and_then(|spec| AdapterLayout::new(&self.model, &spec, blocks.clone()))
            .map_err(|_| Error::LimitTooSmall {
                limit: "values in an adapter",
                needed: self.adapter_values(blocks.len(), rank) as u64,
                had: 1 << 29,
                advice: "; take a smaller rank",
            })?;
        let values = vec![0.0; layout.len()];
        let stack = Stack::new(
            &engine,
            &self.model,
            weights,
            Some((&layout, &values)),
            self.extent,
            true,
        )?;
        let held = DeviceBytes {
            weights: weight_bytes,
            training: engine.buffer_bytes() - weight_bytes,
        };
        Ok((stack, held))
    }

    fn rows(&self) -> f64 {
        self.extent.batch as f64 * self.extent.seq as f64
    }

    fn client_blocks(&self, cut: usize) -> usize {
        cut.min(self.model.blocks)
    }

    /// (in, out) of a matrix.
    fn dimensions(&self, target: Target) -> (f64, f64) {
        let (inputs, outputs) = self.model.dimensions(target);
        (inputs as f64, outputs as f64)
    }

    /// One product of a batch with a frozen matrix or its transpose.
    fn linear_flops(&self, target: Target) -> f64 {
        let (inputs, outputs) = self.dimensions(target);
        2.0 * self.rows() * inputs * outputs
    }

    /// S: in + out, summed over a block's adapted matrices.
    fn adapted_dimensions(&self) -> f64 {
        let sum = |&target| {
            let (inputs, outputs) = self.dimensions(target);
            inputs + outputs
        };
        self.targets.iter().map(sum).sum()
    }

    /// F(r): a block's forward pass, in FLOP.
    pub fn block_forward_flops(&self, rank: usize) -> f64 {
        self.passes(rank).forward
    }

    /// B(r): a block's backward pass from the gradient of its output to that of its input, in FLOP.
    pub fn block_backward_flops(&self, rank: usize) -> f64 {
        self.passes(rank).backward
    }

    /// B₁(r): the backward pass of a block below which nothing is trained, in FLOP. It ends with the gradients of the lowest
    /// adapted maps, whose own input needs none.
    pub fn lowest_block_backward_flops(&self, rank: usize) -> f64 {
        self.passes(rank).lowest_backward
    }

    /// The head's forward pass, logits of every position, in FLOP.
    pub(crate) fn head_forward_flops(&self) -> f64 {
        self.passes(1).head_forward
    }

    /// The head's backward pass, to the gradient of its input, in FLOP.
    pub(crate) fn head_backward_flops(&self) -> f64 {
        self.passes(1).head_backward
    }

    /// A client's forward pass to the cut, in FLOP.
    pub fn client_forward_flops(&self, cut: usize, rank: usize) -> f64 {
        self.client_blocks(cut) as f64 * self.block_forward_flops(rank)
    }

    /// A client's backward pass from the gradient at the cut, in FLOP.
    pub fn client_backward_flops(&self, cut: usize, rank: usize) -> f64 {
        match self.client_blocks(cut) {
            0 => 0.0,
            blocks => self.lowest_block_backward_flops(rank) + (blocks - 1) as f64 * self.block_backward_flops(rank),
        }
    }

    /// The server's forward pass for one client, the head included, in FLOP.
    pub fn server_forward_flops(&self, cut: usize, rank: usize) -> f64 {
        let blocks = self.model.blocks - self.client_blocks(cut);
        blocks as f64 * self.block_forward_flops(rank) + self.head_forward_flops()
    }

    /// The server's backward pass for one client, the head included, in FLOP. Its lowest block is a whole B(r): the client needs
    /// the gradient of that block's input.
    pub(crate) fn server_backward_flops(&self, cut: usize, rank: usize) -> f64 {
        let blocks = self.model.blocks - self.client_blocks(cut);
        blocks as f64 * self.block_backward_flops(rank) + self.head_backward_flops()
    }

    /// The server's work for one client, both ways, in FLOP.
    pub fn server_flops(&self, cut: usize, rank: usize) -> f64 {
        self.server_forward_flops(cut, rank) + self.server_backward_flops(cut, rank)
    }

    /// One client's step on both sides of the cut, in FLOP. With the cut above all blocks it is a centralised step.
    pub fn step_flops(&self, cut: usize, rank: usize) -> f64 {
        self.client_forward_flops(cut, rank) + self.client_backward_flops(cut, rank) + self.server_flops(cut, rank)
    }

    /// The activations of one client's step, in bits; the gradient that comes back has as many. Neither depends on the cut.
    pub fn activation_bits(&self, wire: WireForm) -> f64 {
        wire.bits(self.extent.batch * self.extent.seq, self.model.width)
    }

    /// The targets that go with the activations, 32 bits each.
    pub fn label_bits(&self) -> f64 {
        32.0 * self.rows()
    }

    /// LoRA values of `blocks` blocks.
    pub fn adapter_values(&self, blocks: usize, rank: usize) -> f64 {
        self.client_blocks(blocks) as f64 * rank as f64 * self.adapted_dimensions()
    }

    /// The adapter of `blocks` blocks on the network, in bits: f32, as clients and federated server exchange it.
    pub fn adapter_bits(&self, blocks: usize, rank: usize) -> f64 {
        32.0 * self.adapter_values(blocks, rank)
    }

    /// Memory of a client at a cut, in bytes: on the device frozen weights, what the forward pass keeps, the gradients of the
    /// backward pass, the adapter with gradient and moments, and the wire forms both ways; on the host the embedding. A program's
    /// own memory comes on top.
    pub fn client_memory_bytes(&self, cut: usize, rank: usize, weights: Format, wire: WireForm) -> f64 {
        match self.client_bytes(cut, rank, &|_, _| weights, wire) {
            Ok(held) => held.total() as f64 + self.unit_bytes(Unit::Embedding, weights),
            Err(_) => f64::INFINITY,
        }
    }

    /// What a client's device holds at a cut.
    ///
    /// # Errors
    /// When an adapter of this rank cannot be.
    pub fn client_bytes(
        &self,
        cut: usize,
        rank: usize,
        formats: Formats<'_>,
        wire: WireForm,
    ) -> Result<DeviceBytes, ModelError> {
        self.side_bytes(0..self.client_blocks(cut).max(1), rank, formats, (wire, false))
    }

    /// What the server's device holds at a cut, however many clients there are: they are computed one after the other.
    ///
    /// # Errors
    /// As [`Workload::client_bytes`].
    pub fn server_bytes(
        &self,
        cut: usize,
        rank: usize,
        formats: Formats<'_>,
        wire: WireForm,
    ) -> Result<DeviceBytes, ModelError> {
        let cut = self.client_blocks(cut).min(self.model.blocks.saturating_sub(1));
        self.side_bytes(cut..self.model.blocks, rank, formats, (wire, true))
    }

    fn side_bytes(
        &self,
        blocks: Range<usize>,
        rank: usize,
        formats: Formats<'_>,
        (wire, head): (WireForm, bool),
    ) -> Result<DeviceBytes, ModelError> {
        let (_, mut held) = self.on_paper(blocks, rank, formats, head)?;
        held.training += match wire {
            WireForm::F32 => 0,
            packed => 2 * self.activation_bits(packed) as u64 / 8,
        };
        Ok(held)
    }

    /// A unit's tensors, in bytes.
    pub fn unit_bytes(&self, unit: Unit, weights: Format) -> f64 {
        self.held_unit_bytes(unit, &|_, _| weights) as f64
    }

    /// A unit's tensors as they are held and sent, in bytes.
    pub fn held_unit_bytes(&self, unit: Unit, formats: Formats<'_>) -> u64 {
        let words = |(name, shape): (&'static str, Vec<usize>)| layout(&shape, formats(unit, name)).words() as u64;
        4 * unit.tensors(&self.model).into_iter().map(words).sum::<u64>()
    }
}

/// Units that have shapes and no values, for [`Engine::paper`].
struct Blank<'a> {
    model: &'a Architecture,
    formats: Formats<'a>,
}

impl UnitSource for Blank<'_> {
    fn unit(&mut self, unit: Unit) -> Result<UnitData, WeightsError> {
        let tensors = unit.tensors(self.model).into_iter().map(|(name, shape)| Tensor {
            name: name.to_owned(),
            format: if shape.len() == 2 {
                (self.formats)(unit, name)
            } else {
                Format::F32
            },
            shape,
            words: Vec::new(),
        });
        Ok(UnitData {
            unit,
            tensors: tensors.collect(),
        })
    }

    fn embedding(&mut self) -> Result<Embedding, WeightsError> {
        unreachable!("paper reads no embedding")
    }
}
