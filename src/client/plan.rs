//! What an assignment means: which part of which model, trained how.
//!
//! Separate because here, and only here, what a server says is compared with itself.

use std::io::{self, Read};

use sha2::{Digest as _, Sha256};

use super::Error;
use crate::data::{self, Batches, Cursor, DataError, Example};
use crate::model::adapter::{Adapter, AdapterError, AdapterLayout, Exception, LoraSpec};
use crate::model::architecture::Architecture;
use crate::model::unit::Unit;
use crate::protocol::message::{Assignment, Blob, OwnAlpha};
use crate::split::{self, Training};
use crate::terms::adapter::Trained;
use crate::terms::ids::RunId;
use crate::terms::moments::MomentPolicy;

/// The largest `tokenizer.json` that is fetched.
const MAX_TOKENIZER_BYTES: u64 = 64 << 20;
/// Room in a model part for all but its tensors' values.
const UNIT_HEADER_BYTES: u64 = 4096;

/// An assignment that has been checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    pub(super) run: RunId,
    /// The whole model's shape.
    pub architecture: Architecture,
    /// What both sides of the cut do with it.
    pub training: Training,
    /// Blocks this client runs: `0..cut`.
    pub cut: usize,
    /// Rounds of the run.
    pub rounds: u32,
    /// Steps of a round.
    pub local_steps: u32,
    seed: u64,
    shuffle: bool,
    pub(super) moments: MomentPolicy,
    pub(super) units: Vec<Blob>,
    tokenizer: Option<Blob>,
}

impl Plan {
    /// # Errors
    /// [`Error::Assignment`] names what contradicts itself.
    pub fn new(assignment: &Assignment) -> Result<Self, Error> {
        let run = &assignment.config;
        let fail = |reason: String| Err(Error::Assignment(reason));
        let architecture = Architecture::from_json(&assignment.model_config)?;
        let cut = run.split as usize;
        if cut == 0 || cut >= architecture.blocks {
            return Err(split::Error::Split {
                cut,
                blocks: architecture.blocks,
            }
            .into());
        }
        if (run.width as usize, run.vocab as usize) != (architecture.width, architecture.vocab) {
            return fail(format!(
                "width {} and vocabulary {} are not the model's {} and {}",
                run.width, run.vocab, architecture.width, architecture.vocab
            ));
        }
        if run.seq as usize > architecture.positions {
            return fail(format!(
                "sequences of {} in a model of {} positions",
                run.seq, architecture.positions
            ));
        }
        let training = training(&architecture, assignment)?;
        let layout = AdapterLayout::new(&architecture, &training.spec, 0..cut)?;
        if layout.trained_len() as u64 != assignment.adapter_len {
            return fail(format!(
                "an adapter of {} values, expected {}",
                assignment.adapter_len,
                layout.trained_len()
            ));
        }
        let names: Vec<&str> = assignment.weights.iter().map(|blob| blob.name.as_str()).collect();
        let expected: Vec<String> = units(cut).map(|unit| unit.to_string()).collect();
        if names != expected {
            return fail(format!("model parts {names:?}, expected {expected:?}"));
        }
        for (blob, unit) in assignment.weights.iter().zip(units(cut)) {
            let values: u64 = unit
                .tensors(&architecture)
                .iter()
                .map(|(_, shape)| shape.iter().map(|&size| size as u64).product::<u64>())
                .sum();
            if blob.bytes > 4 * values + UNIT_HEADER_BYTES {
                return fail(format!(
                    "{} of {} bytes is larger than its tensors",
                    blob.name, blob.bytes
                ));
            }
        }
        let tokenizer = assignment.tokenizer.first().cloned();
        if let Some(blob) = &tokenizer
            && blob.bytes > MAX_TOKENIZER_BYTES
        {
            return fail(format!("a tokenizer of {} bytes", blob.bytes));
        }
        Ok(Self {
            run: assignment.run,
            architecture,
            training,
            cut,
            rounds: run.rounds,
            local_steps: run.local_steps,
            seed: run.seed,
            shuffle: run.shuffle,
            moments: run.moments,
            units: assignment.weights.clone(),
            tokenizer,
        })
    }

    /// The parts of the model to fetch, in the order in which [`Loader::add`](super::Loader::add) takes them.
    pub fn units(&self) -> &[Blob] {
        &self.units
    }

    /// The `tokenizer.json` to fetch; `None` when the run takes token ids only.
    pub fn tokenizer(&self) -> Option<&Blob> {
        self.tokenizer.as_ref()
    }

    /// How to read data for this run.
    pub fn data_options(&self) -> data::Options {
        data::Options::new(self.training.seq, self.architecture.vocab)
    }

    /// Whether examples made for `other` serve this plan as well.
    pub(super) fn shares_data(&self, other: &Plan) -> bool {
        let same = |plan: &Plan| (plan.run, plan.training.seq, plan.architecture.vocab);
        same(self) == same(other) && self.tokenizer == other.tokenizer
    }

    /// The client side's adapter with these trained values; what is not trained is what the run's seed makes it.
    ///
    /// # Errors
    /// As [`Adapter::from_values`].
    pub fn adapter(&self, trained: &[f32]) -> Result<Adapter, AdapterError> {
        let (spec, blocks) = (&self.training.spec, 0..self.cut);
        match spec.trained {
            Trained::Both => Adapter::from_values(&self.architecture, spec, blocks, trained.to_vec()),
            Trained::B => {
                let mut adapter = Adapter::init(&self.architecture, spec, blocks, self.seed)?;
                adapter.layout.scatter(trained, &mut adapter.values)?;
                Ok(adapter)
            }
        }
    }

    /// The endless batches of this client, from its first example or from `cursor`.
    ///
    /// # Errors
    /// [`DataError`].
    pub fn batches(&self, examples: Vec<Example>, cursor: Option<Cursor>) -> Result<Batches, DataError> {
        let shuffle = self.shuffle.then_some(self.seed);
        let mut batches = Batches::new(examples, self.training.batch, self.training.seq, shuffle)?;
        if let Some(cursor) = cursor {
            batches.restore(cursor)?;
        }
        Ok(batches)
    }
}

pub(super) fn units(cut: usize) -> impl Iterator<Item = Unit> {
    std::iter::once(Unit::Embedding).chain((0..cut).map(Unit::Block))
}

pub(super) fn training(model: &Architecture, assignment: &Assignment) -> Result<Training, Error> {
    let run = &assignment.config;
    let targets = LoraSpec::parse_targets(model, &run.targets.join(","))?;
    if let Some((name, number)) = run.optimizer.impossible() {
        return Err(Error::Assignment(format!("a {name} of {number}")));
    }
    let rank = run.rank as usize;
    let exception = |own: &OwnAlpha| {
        let [target] = LoraSpec::parse_targets(model, &own.target)?[..] else {
            return Err(Error::Assignment(format!(
                "an alpha of the targets `{}`, not of one",
                own.target
            )));
        };
        Ok(Exception {
            block: own.block as usize,
            target,
            rank,
            alpha: own.alpha,
        })
    };
    let exceptions = assignment.alphas.iter().map(exception).collect::<Result<_, _>>()?;
    let mut spec = LoraSpec::new(rank, run.alpha, targets)?.with_exceptions(exceptions)?;
    spec.trained = assignment.trained;
    Ok(Training {
        spec,
        optimizer: run.optimizer,
        batch: run.batch as usize,
        seq: run.seq as usize,
        wire: run.wire,
    })
}

/// That `source` has what `blob` announced, and nothing after it. It is read in pieces and never held whole.
///
/// # Errors
/// [`Error::Hash`] with the blob's name; [`Error::Read`].
pub fn verify(blob: &Blob, mut source: impl Read) -> Result<(), Error> {
    let (mut hash, mut length) = (Sha256::new(), 0);
    let mut piece = vec![0; 1 << 16];
    // A source that does not end is not what was announced either.
    while length <= blob.bytes {
        match source.read(&mut piece) {
            Ok(0) => break,
            Ok(count) => {
                hash.update(&piece[..count]);
                length += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(unreadable(blob, error)),
        }
    }
    let digest: [u8; 32] = hash.finalize().into();
    if length != blob.bytes || digest != blob.sha256.0 {
        return Err(Error::Hash {
            name: blob.name.clone(),
        });
    }
    Ok(())
}

pub(super) fn unreadable(blob: &Blob, source: io::Error) -> Error {
    Error::Read {
        name: blob.name.clone(),
        source,
    }
}
