//! LoRA adapters: which matrices are adapted, and the one flat order of their values.
//!
//! It is separate from the blocks because an adapter travels without them: it is averaged, sent, sliced at
//! the cut and exported as one flat vector whose order this file alone defines.
//!
//! LoRA (arXiv 2106.09685): for an adapted matrix W (in, out), `y = x·W + b + (α/r)·(x·Aᵀ)·Bᵀ`
//! with A (rank, in) and B (out, rank).

use std::fmt;
use std::ops::Range;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use super::architecture::Architecture;
use super::archive::ArchiveError;
use crate::terms::adapter::{AdapterShape, MatrixShape, Trained};
use crate::terms::moments::Moments;

/// The largest rank accepted.
pub(crate) const MAX_RANK: usize = 1 << 14;
/// Values an adapter may hold in all.
const MAX_VALUES: u64 = 1 << 29;

/// A projection of a block that LoRA can adapt. Which a model has, and their canonical order, says
/// [`Architecture::targets`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// `attn.c_attn`: query, key and value in one.
    AttnQkv,
    /// `attn.c_proj`.
    AttnProj,
    /// `mlp.c_fc`.
    MlpFc,
    /// `mlp.c_proj`.
    MlpProj,
    QProj,
    KProj,
    VProj,
    OProj,
    GateProj,
    UpProj,
    DownProj,
}

/// Module, weight and bias of a projection in Hugging Face files.
type TargetNames = (&'static str, &'static str, &'static str);

impl Target {
    /// Every projection of every family.
    pub const ALL: [Target; 11] = [
        Target::AttnQkv,
        Target::AttnProj,
        Target::MlpFc,
        Target::MlpProj,
        Target::QProj,
        Target::KProj,
        Target::VProj,
        Target::OProj,
        Target::GateProj,
        Target::UpProj,
        Target::DownProj,
    ];

    fn names(self) -> TargetNames {
        macro_rules! names {
            ($module:literal) => {
                ($module, concat!($module, ".weight"), concat!($module, ".bias"))
            };
        }
        match self {
            Target::AttnQkv => names!("attn.c_attn"),
            Target::AttnProj => names!("attn.c_proj"),
            Target::MlpFc => names!("mlp.c_fc"),
            Target::MlpProj => names!("mlp.c_proj"),
            Target::QProj => names!("self_attn.q_proj"),
            Target::KProj => names!("self_attn.k_proj"),
            Target::VProj => names!("self_attn.v_proj"),
            Target::OProj => names!("self_attn.o_proj"),
            Target::GateProj => names!("mlp.gate_proj"),
            Target::UpProj => names!("mlp.up_proj"),
            Target::DownProj => names!("mlp.down_proj"),
        }
    }

    /// The module's name inside a block.
    pub fn module(self) -> &'static str {
        self.names().0
    }

    /// The name of its matrix inside a block.
    pub fn weight(self) -> &'static str {
        self.names().1
    }

    /// The name of its bias inside a block.
    pub fn bias(self) -> &'static str {
        self.names().2
    }

    /// The last part of the module's name: `c_attn`, `q_proj`. Both of GPT-2's output projections are `c_proj`.
    pub fn short(self) -> &'static str {
        self.module().rsplit_once('.').map_or(self.module(), |(_, last)| last)
    }

    /// How far up a block it stands: projections of one level read the same input, and the lower level feeds the higher.
    pub fn level(self) -> usize {
        match self {
            Target::AttnQkv | Target::QProj | Target::KProj | Target::VProj => 0,
            Target::AttnProj | Target::OProj => 1,
            Target::MlpFc | Target::GateProj | Target::UpProj => 2,
            Target::MlpProj | Target::DownProj => 3,
        }
    }

    /// Whether a name in a PEFT `target_modules` list means this target in every block: the whole module name
    /// or any trailing part of it, as PEFT matches.
    pub(super) fn named_by(self, name: &str) -> bool {
        self.module() == name
            || self
                .module()
                .strip_suffix(name)
                .is_some_and(|rest| rest.ends_with('.') && !name.is_empty())
    }

    /// The shortest names that mean exactly these targets to PEFT.
    pub(super) fn peft_names(targets: &[Target]) -> Vec<&'static str> {
        let both = targets.contains(&Target::AttnProj) && targets.contains(&Target::MlpProj);
        let mut names = Vec::new();
        for &target in targets {
            let name = match target {
                Target::AttnProj | Target::MlpProj if !both => target.module(),
                _ => target.short(),
            };
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }
}

/// Rank, scale and targets of an adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "LoraSpecFields")]
pub struct LoraSpec {
    pub rank: usize,
    /// α; the low-rank product is scaled by α/rank.
    pub alpha: f32,
    /// Distinct, in the canonical order.
    pub targets: Vec<Target>,
    /// The scale is α/√rank (rsLoRA, arXiv 2312.03732).
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub rank_stabilised: bool,
    /// Projections whose rank or α is another; ordered by block and target, each at most once.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exceptions: Vec<Exception>,
    /// Which matrices are trained; the others keep what [`Adapter::init`] gave them, or what a file has.
    #[serde(skip_serializing_if = "is_both")]
    pub trained: Trained,
}

fn is_both(trained: &Trained) -> bool {
    *trained == Trained::Both
}

/// A projection of one block whose adapter differs from what the spec says of its target.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Exception {
    pub block: usize,
    pub target: Target,
    /// 0: it is not adapted.
    pub rank: usize,
    pub alpha: f32,
}

/// Fields of a [`LoraSpec`] from outside, not yet checked.
#[derive(Deserialize)]
struct LoraSpecFields {
    rank: usize,
    alpha: f32,
    targets: Vec<Target>,
    #[serde(default)]
    rank_stabilised: bool,
    #[serde(default)]
    exceptions: Vec<Exception>,
    #[serde(default)]
    trained: Trained,
}

impl TryFrom<LoraSpecFields> for LoraSpec {
    type Error = AdapterError;

    fn try_from(fields: LoraSpecFields) -> Result<Self, AdapterError> {
        let mut spec = Self::new(fields.rank, fields.alpha, fields.targets)?.with_exceptions(fields.exceptions)?;
        spec.rank_stabilised = fields.rank_stabilised;
        spec.trained = fields.trained;
        Ok(spec)
    }
}

/// Why an adapter or its description was refused.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error("LoRA rank {rank} is out of range: 1 to {MAX_RANK} can be used")]
    Rank { rank: usize },
    #[error("LoRA alpha {alpha} must be a finite number above zero")]
    Alpha { alpha: f32 },
    #[error("`{name}` is no LoRA target of this model: {targets} are")]
    Target { name: String, targets: String },
    #[error("an adapter needs at least one target, such as c_attn of a GPT-2 model, or q_proj of others")]
    NoTarget,
    #[error("the exceptions of an adapter must be ordered by block and target, each named once")]
    Exceptions,
    #[error("blocks {start}..{end} are not blocks of this model, which has {blocks}")]
    Blocks { start: usize, end: usize, blocks: usize },
    #[error("an adapter of {values} values is too large")]
    TooLarge { values: u64 },
    #[error("the adapter has {found} values, expected {expected}")]
    Length { expected: usize, found: usize },
    #[error("the adapter holds a value that is not finite, at position {position}")]
    NotFinite { position: usize },
    #[error("adapters cannot be joined: {reason}")]
    Merge { reason: String },
    #[error("adapter_config.json is not valid: {0}")]
    Description(String),
    #[error("adapter_config.json: `{field}` = {found} is not supported; {supported}")]
    Unsupported {
        field: &'static str,
        found: String,
        supported: &'static str,
    },
    #[error(
        "adapter_model.safetensors has the tensor `{tensor}`, which this adapter of a model with {blocks} blocks does not"
    )]
    Extra { tensor: String, blocks: usize },
    #[cfg(not(target_arch = "wasm32"))]
    #[error(transparent)]
    File(#[from] crate::disk::Error),
}

impl LoraSpec {
    /// Checks the numbers, and sorts the targets into the canonical order without repetition.
    ///
    /// # Errors
    /// [`AdapterError::Rank`], [`AdapterError::Alpha`], [`AdapterError::NoTarget`].
    pub fn new(rank: usize, alpha: f32, targets: impl IntoIterator<Item = Target>) -> Result<Self, AdapterError> {
        if !(1..=MAX_RANK).contains(&rank) {
            return Err(AdapterError::Rank { rank });
        }
        if !alpha.is_finite() || alpha <= 0.0 {
            return Err(AdapterError::Alpha { alpha });
        }
        let mut targets: Vec<Target> = targets.into_iter().collect();
        targets.sort();
        targets.dedup();
        if targets.is_empty() {
            return Err(AdapterError::NoTarget);
        }
        Ok(Self {
            rank,
            alpha,
            targets,
            rank_stabilised: false,
            exceptions: Vec::new(),
            trained: Trained::Both,
        })
    }

    /// This spec with projections that differ from it.
    ///
    /// # Errors
    /// [`AdapterError::Exceptions`] when they are not in order; [`AdapterError::Rank`], [`AdapterError::Alpha`].
    pub fn with_exceptions(mut self, exceptions: Vec<Exception>) -> Result<Self, AdapterError> {
        let ordered = exceptions
            .windows(2)
            .all(|pair| (pair[0].block, pair[0].target) < (pair[1].block, pair[1].target));
        if !ordered {
            return Err(AdapterError::Exceptions);
        }
        for exception in &exceptions {
            if exception.rank > MAX_RANK {
                return Err(AdapterError::Rank { rank: exception.rank });
            }
            if !exception.alpha.is_finite() || exception.alpha <= 0.0 {
                return Err(AdapterError::Alpha { alpha: exception.alpha });
            }
        }
        self.exceptions = exceptions;
        Ok(self)
    }

    /// Targets from names such as `c_attn,c_proj` or `q_proj,v_proj`: the last part of a module's name or more of it. GPT-2's
    /// `c_proj` means both the attention's and the mlp's. `all` are all that the model has.
    ///
    /// # Errors
    /// [`AdapterError::Target`] names the unknown one.
    pub fn parse_targets(model: &Architecture, names: &str) -> Result<Vec<Target>, AdapterError> {
        let mut targets = Vec::new();
        for name in names.split(',').map(str::trim).filter(|name| !name.is_empty()) {
            match name {
                "all" | "all-linear" => targets.extend(model.targets()),
                name => targets.extend(targets_named(model, name)?),
            }
        }
        targets.sort();
        targets.dedup();
        if targets.is_empty() {
            Err(AdapterError::NoTarget)
        } else {
            Ok(targets)
        }
    }

    /// The targets by the names that PEFT takes: `c_attn,mlp.c_proj`.
    pub(crate) fn target_names(&self) -> String {
        Target::peft_names(&self.targets).join(",")
    }

    /// Rank and α of a projection; `None` where it is not adapted.
    fn of(&self, block: usize, target: Target) -> Option<(usize, f32)> {
        let exception = self
            .exceptions
            .binary_search_by_key(&(block, target), |exception| (exception.block, exception.target));
        match exception {
            Ok(position) => {
                let exception = self.exceptions[position];
                (exception.rank > 0).then_some((exception.rank, exception.alpha))
            }
            Err(_) => self.targets.contains(&target).then_some((self.rank, self.alpha)),
        }
    }

    /// The factor of a low-rank product.
    fn scale(&self, rank: usize, alpha: f32) -> f32 {
        if self.rank_stabilised {
            alpha / (rank as f32).sqrt()
        } else {
            alpha / rank as f32
        }
    }
}

/// The targets that a name in a list means.
fn targets_named(model: &Architecture, name: &str) -> Result<Vec<Target>, AdapterError> {
    let named = |target: &Target| target.named_by(name);
    let targets: Vec<Target> = model.targets().iter().copied().filter(named).collect();
    if targets.is_empty() {
        Err(no_target(model, name))
    } else {
        Ok(targets)
    }
}

pub(super) fn no_target(model: &Architecture, name: &str) -> AdapterError {
    let mut names: Vec<&str> = model.targets().iter().map(|target| target.short()).collect();
    names.dedup();
    AdapterError::Target {
        name: name.chars().take(80).collect(),
        targets: names.join(", "),
    }
}

/// Where one adapted matrix's A and B lie in the flat vector.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdapterEntry {
    /// Index in the whole model.
    pub block: usize,
    pub target: Target,
    pub rank: usize,
    /// The factor of the low-rank product.
    pub scale: f32,
    /// Columns of A.
    pub inputs: usize,
    /// Rows of B.
    pub outputs: usize,
    /// Start of A (rank, inputs), row major.
    pub offset_a: usize,
    /// Start of B (outputs, rank), row major, right after A.
    pub offset_b: usize,
}

impl AdapterEntry {
    /// Where A lies.
    pub fn range_a(&self) -> Range<usize> {
        self.offset_a..self.offset_b
    }

    /// Where B lies.
    pub fn range_b(&self) -> Range<usize> {
        self.offset_b..self.offset_b + self.outputs * self.rank
    }
}

/// The canonical order of an adapter's values: blocks ascending, targets in the order of [`Architecture::targets`],
/// A then B. The layouts of neighbouring ranges of blocks follow each other without a gap, so the client's
/// and the server's values one after the other are the whole model's.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterLayout {
    blocks: Range<usize>,
    entries: Vec<AdapterEntry>,
    len: usize,
    trained: Trained,
}

impl AdapterLayout {
    /// The layout for some blocks of a model.
    ///
    /// # Errors
    /// [`AdapterError::Blocks`] when the range is not within the model, [`AdapterError::TooLarge`].
    pub fn new(model: &Architecture, spec: &LoraSpec, blocks: Range<usize>) -> Result<Self, AdapterError> {
        if blocks.start > blocks.end || blocks.end > model.blocks {
            return Err(AdapterError::Blocks {
                start: blocks.start,
                end: blocks.end,
                blocks: model.blocks,
            });
        }
        if let Some(foreign) = spec.targets.iter().find(|target| !model.targets().contains(target)) {
            return Err(no_target(model, foreign.short()));
        }
        let adapted = blocks.clone().flat_map(|block| {
            let of = move |&target: &Target| spec.of(block, target).map(|(rank, alpha)| (block, target, rank, alpha));
            model.targets().iter().filter_map(of)
        });
        // Counted before room is made: a spec may come from a peer.
        let values: u64 = adapted
            .clone()
            .map(|(_, target, rank, _)| {
                let (inputs, outputs) = model.dimensions(target);
                rank as u64 * (inputs + outputs) as u64
            })
            .sum();
        if values > MAX_VALUES {
            return Err(AdapterError::TooLarge { values });
        }
        let mut entries = Vec::with_capacity(blocks.len() * spec.targets.len());
        let mut len = 0;
        for (block, target, rank, alpha) in adapted {
            let (inputs, outputs) = model.dimensions(target);
            let offset_b = len + rank * inputs;
            entries.push(AdapterEntry {
                block,
                target,
                rank,
                scale: spec.scale(rank, alpha),
                inputs,
                outputs,
                offset_a: len,
                offset_b,
            });
            len = offset_b + outputs * rank;
        }
        Ok(Self {
            blocks,
            entries,
            len,
            trained: spec.trained,
        })
    }

    /// The blocks covered.
    pub fn blocks(&self) -> Range<usize> {
        self.blocks.clone()
    }

    /// One entry per adapted matrix, in order.
    pub fn entries(&self) -> &[AdapterEntry] {
        &self.entries
    }

    /// The entry of one matrix, if it is adapted.
    pub fn entry(&self, block: usize, target: Target) -> Option<&AdapterEntry> {
        self.entries
            .iter()
            .find(|entry| entry.block == block && entry.target == target)
    }

    /// Where the values of some of the blocks lie.
    ///
    /// # Panics
    /// If the layout does not cover them.
    pub fn range(&self, blocks: Range<usize>) -> Range<usize> {
        assert!(
            self.blocks.start <= blocks.start && blocks.end <= self.blocks.end,
            "blocks {blocks:?} of {:?}",
            self.blocks
        );
        let start = |block: usize| {
            let entry = self.entries.iter().find(|entry| entry.block >= block);
            entry.map_or(self.len, |entry| entry.offset_a)
        };
        start(blocks.start)..start(blocks.end)
    }

    /// Which matrices are trained.
    pub fn trained(&self) -> Trained {
        self.trained
    }

    /// Values of the trained matrices: what of an adapter travels.
    pub fn trained_len(&self) -> usize {
        self.trained_ranges().map(|range| range.len()).sum()
    }

    /// Where they lie.
    fn trained_ranges(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        self.entries.iter().map(|entry| match self.trained {
            Trained::Both => entry.offset_a..entry.range_b().end,
            Trained::B => entry.range_b(),
        })
    }

    /// Takes the trained values out of a whole adapter's.
    ///
    /// # Panics
    /// If `whole` is not of this layout.
    pub fn gather(&self, whole: &[f32]) -> Vec<f32> {
        assert_eq!(whole.len(), self.len, "adapter values");
        self.trained_ranges().flat_map(|range| &whole[range]).copied().collect()
    }

    /// Puts trained values where they belong in a whole adapter's, whose others stay.
    ///
    /// # Errors
    /// [`AdapterError::Length`] when they are not as many as there are.
    pub fn scatter(&self, trained: &[f32], whole: &mut [f32]) -> Result<(), AdapterError> {
        let fail = |expected, found| Err(AdapterError::Length { expected, found });
        if whole.len() != self.len {
            return fail(self.len, whole.len());
        }
        if trained.len() != self.trained_len() {
            return fail(self.trained_len(), trained.len());
        }
        let mut rest = trained;
        for range in self.trained_ranges() {
            let (own, further) = rest.split_at(range.len());
            whole[range].copy_from_slice(own);
            rest = further;
        }
        Ok(())
    }

    /// The moments of the trained values.
    ///
    /// # Panics
    /// If they are not of this layout.
    pub fn gather_moments(&self, moments: &Moments) -> Moments {
        Moments {
            steps: moments.steps,
            first: self.gather(&moments.first),
            second: self.gather(&moments.second),
        }
    }

    /// The moments of a whole adapter whose trained values have these: the others, which have no gradient, have none.
    ///
    /// # Errors
    /// As [`AdapterLayout::scatter`].
    pub fn scatter_moments(&self, moments: &Moments) -> Result<Moments, AdapterError> {
        let mut whole = Moments {
            steps: moments.steps,
            ..Moments::zero(self.len)
        };
        self.scatter(&moments.first, &mut whole.first)?;
        self.scatter(&moments.second, &mut whole.second)?;
        Ok(whole)
    }

    /// The matrices of a block as who aggregates adapters knows them; `None` where the blocks or the ranks differ, or there are none.
    pub fn shape(&self) -> Option<AdapterShape> {
        let first = self.entries.first()?;
        let of_block = self
            .entries
            .iter()
            .take_while(|entry| entry.block == first.block)
            .count();
        let sides = |entry: &AdapterEntry| (entry.inputs, entry.outputs, entry.rank);
        let is_even = self.entries.len() == of_block * self.blocks.len()
            && (self.entries.iter().zip(self.entries.iter().take(of_block).cycle()))
                .all(|(entry, of_first)| sides(entry) == sides(of_first) && entry.rank == first.rank);
        let matrix = |entry: &AdapterEntry| {
            Some(MatrixShape {
                inputs: u32::try_from(entry.inputs).ok()?,
                outputs: u32::try_from(entry.outputs).ok()?,
            })
        };
        let matrices = self.entries[..of_block].iter().map(matrix).collect::<Option<_>>()?;
        AdapterShape::new(first.rank, self.trained, matrices).filter(|_| is_even)
    }

    /// Values in all.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no block is covered.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// The LoRA matrices of some blocks, as one flat vector.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    pub spec: LoraSpec,
    pub layout: AdapterLayout,
    /// In the order of `layout`.
    pub values: Vec<f32>,
}

impl Adapter {
    /// A fresh adapter, which changes nothing yet: A uniform in ±1/√in (Kaiming with a = √5), B zero.
    ///
    /// Each matrix draws from a stream of its own, so however the blocks are split the numbers are the same.
    ///
    /// # Errors
    /// As [`AdapterLayout::new`].
    pub fn init(model: &Architecture, spec: &LoraSpec, blocks: Range<usize>, seed: u64) -> Result<Self, AdapterError> {
        let layout = AdapterLayout::new(model, spec, blocks)?;
        let mut values = vec![0.0; layout.len()];
        for entry in layout.entries() {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let targets = model.targets();
            let position = targets.iter().position(|&target| target == entry.target).unwrap_or(0);
            rng.set_stream((entry.block * targets.len() + position) as u64);
            let bound = 1.0 / (entry.inputs as f32).sqrt();
            for value in &mut values[entry.range_a()] {
                let unit = (rng.next_u32() >> 8) as f32 / (1 << 24) as f32; // [0, 1)
                *value = (2.0 * unit - 1.0) * bound;
            }
        }
        Ok(Self {
            spec: spec.clone(),
            layout,
            values,
        })
    }

    /// An adapter from values in the canonical order, such as a peer sends.
    ///
    /// # Errors
    /// As [`AdapterLayout::new`]; [`AdapterError::Length`], [`AdapterError::NotFinite`].
    pub fn from_values(
        model: &Architecture,
        spec: &LoraSpec,
        blocks: Range<usize>,
        values: Vec<f32>,
    ) -> Result<Self, AdapterError> {
        let layout = AdapterLayout::new(model, spec, blocks)?;
        if values.len() != layout.len() {
            return Err(AdapterError::Length {
                expected: layout.len(),
                found: values.len(),
            });
        }
        if let Some(position) = values.iter().position(|value| !value.is_finite()) {
            return Err(AdapterError::NotFinite { position });
        }
        Ok(Self {
            spec: spec.clone(),
            layout,
            values,
        })
    }

    /// The part for some of this adapter's blocks.
    ///
    /// # Errors
    /// [`AdapterError::Blocks`] when the adapter does not cover them.
    pub fn slice(&self, model: &Architecture, blocks: Range<usize>) -> Result<Self, AdapterError> {
        let layout = AdapterLayout::new(model, &self.spec, blocks.clone())?;
        let own = self.layout.blocks();
        if blocks.start < own.start || blocks.end > own.end {
            return Err(AdapterError::Blocks {
                start: blocks.start,
                end: blocks.end,
                blocks: model.blocks,
            });
        }
        let values = match self.values.get(self.layout.range(blocks)) {
            Some(values) => values.to_vec(),
            None => {
                return Err(AdapterError::Length {
                    expected: self.layout.len(),
                    found: self.values.len(),
                });
            }
        };
        Ok(Self {
            spec: self.spec.clone(),
            layout,
            values,
        })
    }

    /// This adapter as one of the whole model, in which the blocks it does not cover are not adapted.
    ///
    /// # Errors
    /// As [`AdapterLayout::new`].
    pub fn over_all_blocks(mut self, model: &Architecture) -> Result<Self, AdapterError> {
        let own = self.layout.blocks();
        let left_out = (0..model.blocks).filter(|block| !own.contains(block));
        let (targets, alpha) = (self.spec.targets.clone(), self.spec.alpha);
        let mut exceptions = self.spec.exceptions.clone();
        exceptions.extend(left_out.flat_map(|block| {
            targets.iter().map(move |&target| Exception {
                block,
                target,
                rank: 0,
                alpha,
            })
        }));
        exceptions.sort_by_key(|exception| (exception.block, exception.target));
        self.spec = self.spec.with_exceptions(exceptions)?;
        self.layout = AdapterLayout::new(model, &self.spec, 0..model.blocks)?;
        Ok(self)
    }

    /// This adapter with one rank for all projections, as devices exchange it: blocks then have equally many values. It computes the
    /// same and trains the same. A projection of a smaller rank, or none, gets rows of A and columns of B that are zero, and they stay
    /// zero: the gradient of each has the other as a factor. What is left of the spec's exceptions are alphas.
    ///
    /// # Errors
    /// As [`AdapterLayout::new`].
    pub fn with_one_rank(self, model: &Architecture) -> Result<Self, AdapterError> {
        if self.spec.exceptions.is_empty() && !self.spec.rank_stabilised {
            return Ok(self);
        }
        let entries = self.layout.entries();
        let rank = entries.iter().map(|entry| entry.rank).max().unwrap_or(self.spec.rank);
        let scale = self.spec.scale(self.spec.rank, self.spec.alpha);
        let adapted = entries.iter().map(|entry| entry.target);
        let exceptions = entries
            .iter()
            .filter(|entry| entry.scale != scale)
            .map(|entry| Exception {
                block: entry.block,
                target: entry.target,
                rank,
                alpha: entry.scale * rank as f32,
            });
        let spec = LoraSpec::new(
            rank,
            scale * rank as f32,
            adapted.chain(self.spec.targets.iter().copied()),
        )?
        .with_exceptions(exceptions.collect())?;
        let layout = AdapterLayout::new(model, &spec, self.layout.blocks())?;
        let mut values = vec![0.0; layout.len()];
        let old = |block, target| {
            entries
                .iter()
                .find(|entry| (entry.block, entry.target) == (block, target))
        };
        for to in layout.entries() {
            let Some(from) = old(to.block, to.target) else {
                continue;
            };
            let a = &self.values[from.range_a()];
            values[to.range_a()][..a.len()].copy_from_slice(a);
            let b = self.values[from.range_b()].chunks_exact(from.rank);
            for (row, b) in values[to.range_b()].chunks_exact_mut(rank).zip(b) {
                row[..from.rank].copy_from_slice(b);
            }
        }
        Ok(Self { spec, layout, values })
    }

    /// This adapter with other products in its first blocks: `ranks` of their matrices, in the order of the layout, and the matrices,
    /// which are scaled as this adapter's are. A matrix of rank 0 is not adapted.
    ///
    /// # Errors
    /// As [`AdapterLayout::new`]; [`AdapterError::Length`] when there are more ranks than matrices, or the values are not as many.
    pub fn with_products(&self, model: &Architecture, ranks: &[u32], values: &[f32]) -> Result<Self, AdapterError> {
        let entries = self.layout.entries();
        let (Some(replaced), Some(kept)) = (entries.get(..ranks.len()), entries.get(ranks.len()..)) else {
            return Err(AdapterError::Length {
                expected: entries.len(),
                found: ranks.len(),
            });
        };
        let mut exceptions: Vec<Exception> = (replaced.iter().zip(ranks))
            .map(|(entry, &rank)| Exception {
                block: entry.block,
                target: entry.target,
                rank: rank as usize,
                alpha: match (rank, self.spec.rank_stabilised) {
                    (0, _) => self.spec.alpha,
                    (rank, false) => entry.scale * rank as f32,
                    (rank, true) => entry.scale * (rank as f32).sqrt(),
                },
            })
            .collect();
        let is_replaced = |exception: &&Exception| {
            let same = |entry: &AdapterEntry| (entry.block, entry.target) == (exception.block, exception.target);
            replaced.iter().any(same)
        };
        exceptions.extend(self.spec.exceptions.iter().filter(|exception| !is_replaced(exception)));
        exceptions.sort_by_key(|exception| (exception.block, exception.target));
        let spec = self.spec.clone().with_exceptions(exceptions)?;
        let start = kept.first().map_or(self.values.len(), |entry| entry.offset_a);
        let whole = [values, &self.values[start..]].concat();
        Self::from_values(model, &spec, self.layout.blocks(), whole)
    }

    /// This adapter and the one of the blocks that follow, as one: the client's part and the server's.
    ///
    /// # Errors
    /// [`AdapterError::Merge`] when the specs differ or the blocks do not follow each other.
    pub fn merge(&self, model: &Architecture, next: &Self) -> Result<Self, AdapterError> {
        if self.spec != next.spec {
            return Err(AdapterError::Merge {
                reason: format!("{} and {}", self.spec, next.spec),
            });
        }
        let (first, second) = (self.layout.blocks(), next.layout.blocks());
        if first.end != second.start {
            return Err(AdapterError::Merge {
                reason: format!("blocks {first:?} are not followed by {second:?}"),
            });
        }
        let values = [&self.values[..], &next.values[..]].concat();
        Self::from_values(model, &self.spec, first.start..second.end, values)
    }
}

impl fmt::Display for LoraSpec {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.target_names();
        write!(formatter, "rank {}, alpha {}, targets {names}", self.rank, self.alpha)
    }
}
