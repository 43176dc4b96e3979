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
//! These are the products; element-wise work (layer norms, GELU, the optimiser, packing for the wire) is left out. By the kernels'
//! own counts, which leave out softmax and GELU where they are part of a product's kernel, it is 0.2 % of a step at GPT-2 small's
//! width of 768 and 1.4 % at the demo's 128. `tests/cost.rs` holds the formulas against recorded steps, exactly.

use crate::kernels::{adamw, lora, scalar};

use super::adapter::Target;
use super::config::Config;
use super::stack::Extent;
use super::weights::Unit;
use crate::terms::format::Format;
use crate::terms::tensor::WireForm;

/// How attention's products are counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Convention {
    /// Every pair of positions and each product once: 4·b·s²·d forward, 8·b·s²·d backward. The useful work by the convention of the
    /// paper and of most FLOP counts.
    #[default]
    Dense,
    /// What this crate's kernels issue: only pairs that the causal mask leaves, and a backward pass that computes scores twice and
    /// their gradient twice rather than keep them: 2·b·s·(s+1)·d forward, 7·b·s·(s+1)·d backward. Tiles that the mask cuts are
    /// counted by what is left of them.
    Issued,
}

/// The work of split steps of one model on batches of one shape; cut ℓ and rank r are arguments, since they are what is chosen.
///
/// A `cut` counts the client's blocks; more than the model has are taken as all of them.
#[derive(Clone, Debug)]
pub struct Workload {
    config: Config,
    /// In the canonical order.
    targets: Vec<Target>,
    extent: Extent,
    convention: Convention,
}

impl Workload {
    /// `targets` are the matrices of each block that LoRA adapts; `extent` is one client's batch.
    pub fn new(config: &Config, targets: &[Target], extent: Extent, convention: Convention) -> Self {
        Self {
            config: config.clone(),
            targets: Target::ALL.into_iter().filter(|t| targets.contains(t)).collect(),
            extent,
            convention,
        }
    }

    /// The model's shape.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// One client's batch.
    pub fn extent(&self) -> Extent {
        self.extent
    }

    fn rows(&self) -> f64 {
        self.extent.batch as f64 * self.extent.seq as f64
    }

    fn width(&self) -> f64 {
        self.config.width as f64
    }

    fn client_blocks(&self, cut: usize) -> usize {
        cut.min(self.config.blocks)
    }

    /// (in, out) of a matrix.
    fn dimensions(&self, target: Target) -> (f64, f64) {
        let (inputs, outputs) = target.dimensions(&self.config);
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

    fn attention_flops(&self, dense_products: f64, issued_products: f64) -> f64 {
        let seq = self.extent.seq as f64;
        match self.convention {
            Convention::Dense => dense_products * 2.0 * self.rows() * seq * self.width(),
            Convention::Issued => issued_products * self.rows() * (seq + 1.0) * self.width(),
        }
    }

    fn attention_forward_flops(&self) -> f64 {
        self.attention_flops(2.0, 2.0)
    }

    fn attention_backward_flops(&self) -> f64 {
        self.attention_flops(4.0, 7.0)
    }

    /// F(r): a block's forward pass, in FLOP.
    pub fn block_forward_flops(&self, rank: usize) -> f64 {
        let linear: f64 = Target::ALL.into_iter().map(|t| self.linear_flops(t)).sum();
        linear + self.attention_forward_flops() + 2.0 * self.rows() * rank as f64 * self.adapted_dimensions()
    }

    /// B(r): a block's backward pass from the gradient of its output to that of its input, in FLOP.
    pub fn block_backward_flops(&self, rank: usize) -> f64 {
        let linear: f64 = Target::ALL.into_iter().map(|t| self.linear_flops(t)).sum();
        linear + self.attention_backward_flops() + 4.0 * self.rows() * rank as f64 * self.adapted_dimensions()
    }

    /// B₁(r): the backward pass of a block below which nothing is trained, in FLOP. It ends with the gradients of the lowest
    /// adapted map, whose own input needs none: for `c_attn` that saves the 6·b·s·d² of its dX and 2·b·s·r·d of its adapter's.
    pub fn lowest_block_backward_flops(&self, rank: usize) -> f64 {
        let Some(&lowest) = self.targets.first() else {
            return 0.0;
        };
        let above = Target::ALL.into_iter().filter(|&target| target > lowest);
        let linear: f64 = above.map(|target| self.linear_flops(target)).sum();
        let attention = if lowest == Target::AttnQkv {
            self.attention_backward_flops()
        } else {
            0.0
        };
        let (inputs, _) = self.dimensions(lowest);
        linear + attention + 2.0 * self.rows() * rank as f64 * (2.0 * self.adapted_dimensions() - inputs)
    }

    /// The head's forward pass, logits of every position, in FLOP.
    pub fn head_forward_flops(&self) -> f64 {
        2.0 * self.rows() * self.width() * self.config.vocab as f64
    }

    /// The head's backward pass, to the gradient of its input, in FLOP.
    pub fn head_backward_flops(&self) -> f64 {
        self.head_forward_flops()
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
        let blocks = self.config.blocks - self.client_blocks(cut);
        blocks as f64 * self.block_forward_flops(rank) + self.head_forward_flops()
    }

    /// The server's backward pass for one client, the head included, in FLOP. Its lowest block is a whole B(r): the client needs
    /// the gradient of that block's input.
    pub fn server_backward_flops(&self, cut: usize, rank: usize) -> f64 {
        let blocks = self.config.blocks - self.client_blocks(cut);
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
        wire.bits(self.extent.batch * self.extent.seq, self.config.width)
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

    /// Device memory of a client at a cut, in bytes: frozen weights with the embedding, what the forward pass keeps, the gradients of
    /// the backward pass, the adapter with gradient and moments, and the wire forms both ways. The allocations of
    /// [`Stack::new`](super::stack::Stack::new) for training, at the largest batch; a program's own memory comes on top.
    pub fn client_memory_bytes(&self, cut: usize, rank: usize, weights: Format, wire: WireForm) -> f64 {
        let blocks = self.client_blocks(cut);
        let units = std::iter::once(Unit::Embedding).chain((0..blocks).map(Unit::Block));
        let frozen: f64 = units.map(|unit| self.unit_bytes(unit, weights)).sum();
        let wire_bytes = match wire {
            WireForm::F32 => 0.0,
            packed => 2.0 * self.activation_bits(packed) / 8.0,
        };
        frozen + 4.0 * (self.activation_words(blocks, rank) + self.training_words(blocks, rank)) + wire_bytes
    }

    /// A unit's tensors on a device, in bytes.
    fn unit_bytes(&self, unit: Unit, dtype: Format) -> f64 {
        let words = |(_, shape): (&'static str, Vec<usize>)| {
            let elements: f64 = shape.iter().map(|&n| n as f64).product();
            match dtype {
                Format::F16 if shape.len() == 2 => (elements / 2.0).ceil(),
                _ => elements,
            }
        };
        4.0 * unit.tensors(&self.config).into_iter().map(words).sum::<f64>()
    }

    /// Words of tokens, block inputs and outputs and what the blocks keep. The inputs of maps without an adapter are kept once for
    /// all blocks.
    fn activation_words(&self, blocks: usize, rank: usize) -> f64 {
        let (width, ffn, heads) = (self.width(), self.config.ffn as f64, self.config.heads as f64);
        let copies = |target: Target| {
            if self.targets.contains(&target) {
                blocks as f64
            } else {
                blocks.min(1) as f64
            }
        };
        // out, o, y: width each; qkv; the statistics of two norms; lse; h; u.
        let a_block = 6.0 * width + 4.0 + heads + ffn + (self.targets.len() * rank) as f64;
        let inputs = copies(Target::AttnQkv) * width + copies(Target::MlpFc) * width + copies(Target::MlpProj) * ffn;
        self.rows() * (1.0 + width + blocks as f64 * a_block + inputs)
    }

    /// Words of the adapter with its gradient and moments, and of what the backward pass needs.
    fn training_words(&self, blocks: usize, rank: usize) -> f64 {
        let (width, ffn, heads) = (self.width(), self.config.ffn as f64, self.config.heads as f64);
        let values = self.adapter_values(blocks, rank);
        let widest = self.targets.iter().map(|target| {
            let (inputs, outputs) = target.dimensions(&self.config);
            inputs.max(outputs)
        });
        let rows = self.extent.batch * self.extent.seq;
        let partial = lora::partial_words(rows, widest.max().unwrap_or(1), rank) as f64;
        // d_x, d_norm, d_qkv; d_g, d_h; dot; v.
        let gradients = 5.0 * width + 2.0 * ffn + heads + rank as f64;
        4.0 * values
            + adamw::partial_words(values as usize) as f64
            + self.rows() * gradients
            + partial
            + scalar::COUNT as f64
    }
}
