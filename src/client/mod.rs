//! An edge client: its session, its side of the model and its data, put together.
//!
//! Here is what a native process and a browser tab share, without threads, sockets and files: what an assignment means
//! ([`Plan`]), loading the model part by part ([`Loader`]), and the answers to the session's events ([`Learner`]). A second
//! assignment starts from what the first left on the device ([`Held`]). `native` and `web` move bytes and time.

#[cfg(all(feature = "program", not(target_arch = "wasm32")))]
pub mod native;
#[cfg(target_arch = "wasm32")]
pub mod web;

use std::io::{self, Read};
use std::time::Duration;

use sha2::{Digest as _, Sha256};

use crate::compute::{self, Engine};
use crate::data::{self, Batches, Cursor, DataError, Example};
use crate::model::adapter::{Adapter, AdapterError, AdapterLayout, Exception, LoraSpec};
use crate::model::architecture::{Architecture, ArchitectureError};
use crate::model::archive::Source;
use crate::model::block::BlockWeights;
use crate::model::ends::embedding::Embedding;
use crate::model::stack::StackWeights;
use crate::model::unit::{Unit, UnitData};
use crate::model::weights::WeightsError;
use crate::protocol::message::{Assignment, Blob, Capabilities, Gradient, OwnAlpha};
use crate::protocol::{ActivationsInput, AdapterInput};
use crate::split::{self, ClientPart, Clock, Training};
use crate::terms::adapter::Trained;
use crate::terms::ids::{RoundKey, RunId, StepKey};
use crate::terms::moments::{MomentPolicy, Moments};
use crate::terms::speed::Speed;
use crate::terms::tensor::WireForm;

/// The largest `tokenizer.json` that is fetched.
const MAX_TOKENIZER_BYTES: u64 = 64 << 20;
/// Room in a model part for all but its tensors' values.
const UNIT_HEADER_BYTES: u64 = 4096;

/// Why this client cannot take part.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the server's assignment cannot be used: {0}")]
    Assignment(String),
    #[error("the server's model: {0}")]
    Config(ArchitectureError),
    #[error(
        "{name} from the server has another hash than announced; fetch it again, and if it stays tell the server's owner"
    )]
    Hash { name: String },
    #[error("cannot read what was fetched of {name}: {source}")]
    Read { name: String, r#source: io::Error },
    #[error(transparent)]
    Compute(#[from] compute::Error),
    #[error(transparent)]
    Weights(#[from] WeightsError),
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Split(#[from] split::Error),
}

impl From<ArchitectureError> for Error {
    fn from(error: ArchitectureError) -> Self {
        Self::Config(error)
    }
}

/// What this program can do on `device`, for the handshake.
pub fn capabilities(device: &str, memory_bytes: u64) -> Capabilities {
    Capabilities {
        forms: WireForm::ALL.to_vec(),
        memory_bytes,
        device: device.to_owned(),
    }
}

/// An assignment that has been checked.
#[derive(Clone, Debug)]
pub struct Plan {
    run: RunId,
    pub config: Architecture,
    pub training: Training,
    /// Blocks this client runs: `0..cut`.
    pub cut: usize,
    pub rounds: u32,
    pub local_steps: u32,
    seed: u64,
    shuffle: bool,
    moments: MomentPolicy,
    units: Vec<Blob>,
    tokenizer: Option<Blob>,
}

impl Plan {
    /// # Errors
    /// [`Error::Assignment`] names what contradicts itself.
    pub fn new(assignment: &Assignment) -> Result<Self, Error> {
        let run = &assignment.config;
        let fail = |reason: String| Err(Error::Assignment(reason));
        let config = Architecture::from_json(&assignment.model_config)?;
        let cut = run.split as usize;
        if cut == 0 || cut >= config.blocks {
            return Err(split::Error::Split {
                cut,
                blocks: config.blocks,
            }
            .into());
        }
        if (run.width as usize, run.vocab as usize) != (config.width, config.vocab) {
            return fail(format!(
                "width {} and vocabulary {} are not the model's {} and {}",
                run.width, run.vocab, config.width, config.vocab
            ));
        }
        if run.seq as usize > config.positions {
            return fail(format!(
                "sequences of {} in a model of {} positions",
                run.seq, config.positions
            ));
        }
        let training = training(&config, assignment)?;
        let layout = AdapterLayout::new(&config, &training.spec, 0..cut)?;
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
                .tensors(&config)
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
            config,
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

    /// The parts of the model to fetch, in the order in which [`Loader::add`] takes them.
    pub fn units(&self) -> &[Blob] {
        &self.units
    }

    /// The `tokenizer.json` to fetch; `None` when the run takes token ids only.
    pub fn tokenizer(&self) -> Option<&Blob> {
        self.tokenizer.as_ref()
    }

    /// How to read data for this run.
    pub fn data_options(&self) -> data::Options {
        data::Options::new(self.training.seq, self.config.vocab)
    }

    /// Whether examples made for `other` serve this plan as well.
    fn shares_data(&self, other: &Plan) -> bool {
        let same = |plan: &Plan| (plan.run, plan.training.seq, plan.config.vocab);
        same(self) == same(other) && self.tokenizer == other.tokenizer
    }

    /// The client side's adapter with these trained values; what is not trained is what the run's seed makes it.
    ///
    /// # Errors
    /// As [`Adapter::from_values`].
    pub fn adapter(&self, trained: &[f32]) -> Result<Adapter, AdapterError> {
        let (spec, blocks) = (&self.training.spec, 0..self.cut);
        match spec.trained {
            Trained::Both => Adapter::from_values(&self.config, spec, blocks, trained.to_vec()),
            Trained::B => {
                let mut adapter = Adapter::init(&self.config, spec, blocks, self.seed)?;
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

fn units(cut: usize) -> impl Iterator<Item = Unit> {
    std::iter::once(Unit::Embedding).chain((0..cut).map(Unit::Block))
}

fn training(model: &Architecture, assignment: &Assignment) -> Result<Training, Error> {
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

fn unreadable(blob: &Blob, source: io::Error) -> Error {
    Error::Read {
        name: blob.name.clone(),
        source,
    }
}

/// What an assignment leaves on a device for the next one.
pub struct Held {
    plan: Plan,
    weights: StackWeights,
    moments: Moments,
    examples: Vec<Example>,
    cursor: Cursor,
    speed: Option<Speed>,
}

/// Puts the client's part of the model on the device, one part after the other, so that never more than one is in memory twice.
/// Parts that are there already stay.
pub struct Loader {
    engine: Engine,
    plan: Plan,
    clock: Clock,
    embedding: Option<Embedding>,
    blocks: Vec<BlockWeights>,
    /// Of the first blocks, as far as they had any.
    moments: Moments,
    data: Option<Vec<Example>>,
    cursor: Option<Cursor>,
    speed: Option<Speed>,
}

impl Loader {
    /// `clock` is what the client measures itself by; `held` is what an earlier assignment left.
    ///
    /// # Errors
    /// [`Error::Adapter`] for an assignment without an adapter's layout.
    pub fn new(engine: &Engine, plan: &Plan, clock: Clock, held: Option<Held>) -> Result<Self, Error> {
        let mut loader = Self {
            engine: engine.clone(),
            plan: plan.clone(),
            clock,
            embedding: None,
            blocks: Vec::new(),
            moments: Moments::default(),
            data: None,
            cursor: None,
            speed: None,
        };
        // Of another model nothing is of use.
        let Some(held) = held.filter(|held| held.plan.config == plan.config) else {
            return Ok(loader);
        };
        let same = held
            .plan
            .units
            .iter()
            .zip(&plan.units)
            .take_while(|(old, new)| old == new);
        if let Some(blocks) = same.count().checked_sub(1) {
            loader.embedding = held.weights.embedding;
            loader.blocks.extend(held.weights.blocks.into_iter().take(blocks));
        }
        if held.plan.run == plan.run && held.plan.training.spec == plan.training.spec {
            let kept = AdapterLayout::new(&plan.config, &plan.training.spec, 0..held.plan.cut.min(plan.cut))?;
            loader.moments = held.moments.slice(0..kept.len().min(held.moments.len()));
        }
        loader.data = held.plan.shares_data(plan).then_some(held.examples);
        loader.cursor = Some(held.cursor);
        loader.speed = held.speed;
        Ok(loader)
    }

    /// The part that [`Loader::add`] takes next; `None` when all are there.
    pub fn next(&self) -> Option<&Blob> {
        self.missing().first()
    }

    /// The parts that are still to be added, in their order.
    pub fn missing(&self) -> &[Blob] {
        let loaded = usize::from(self.embedding.is_some()) + self.blocks.len();
        self.plan.units.get(loaded..).unwrap_or_default()
    }

    /// The examples of an earlier assignment, where they serve this one too.
    pub fn take_data(&mut self) -> Option<Vec<Example>> {
        self.data.take()
    }

    /// Takes the bytes of the next part, the embedding's into memory.
    ///
    /// # Errors
    /// [`Error::Hash`] when they are not what was announced; [`Error::Weights`], [`Error::Compute`].
    pub fn add(&mut self, bytes: Vec<u8>) -> Result<(), Error> {
        let Some(blob) = self.next() else { return Ok(()) };
        verify(blob, &bytes[..])?;
        let config = &self.plan.config;
        match self.embedding {
            None => {
                let unit = UnitData::decode(&bytes, Unit::Embedding, config)?;
                drop(bytes);
                self.embedding = Some(Embedding::held(config, unit));
            }
            Some(_) => {
                let unit = UnitData::decode(&bytes, Unit::Block(self.blocks.len()), config)?;
                drop(bytes);
                self.blocks.push(BlockWeights::upload(&self.engine, config, &unit)?);
            }
        }
        Ok(())
    }

    /// Takes the next part from where it is kept. The embedding stays there: its rows are read when they are needed, so `source`
    /// must stay as it is. Other parts are read whole.
    ///
    /// # Errors
    /// As [`Loader::add`]; [`Error::Read`].
    pub fn add_stored(&mut self, mut source: impl Source + 'static) -> Result<(), Error> {
        let Some(blob) = self.next() else { return Ok(()) };
        if self.embedding.is_some() {
            let mut bytes = Vec::new();
            let read = (&mut source).take(blob.bytes + 1).read_to_end(&mut bytes);
            read.map_err(|error| unreadable(blob, error))?;
            return self.add(bytes);
        }
        verify(blob, &mut source)?;
        self.embedding = Some(Embedding::stored(&self.plan.config, source)?);
        Ok(())
    }

    /// The loaded model with its data, which goes on where an earlier assignment stood. The adapter is zero until
    /// [`Learner::install`].
    ///
    /// # Errors
    /// [`Error::Assignment`] when a part is missing; [`Error::Data`], [`Error::Split`].
    pub fn finish(self, examples: Vec<Example>) -> Result<Learner, Error> {
        if let Some(missing) = self.next() {
            return Err(Error::Assignment(format!("{} was not loaded", missing.name)));
        }
        let Self {
            engine,
            plan,
            clock,
            embedding,
            blocks,
            moments,
            cursor,
            speed,
            ..
        } = self;
        let batches = plan.batches(examples, cursor)?;
        let weights = StackWeights {
            embedding,
            blocks,
            first_block: 0,
            head: None,
        };
        let layout = AdapterLayout::new(&plan.config, &plan.training.spec, 0..plan.cut)?;
        let Adapter { values, .. } = plan.adapter(&vec![0.0; layout.trained_len()])?;
        let len = layout.len();
        let mut part = ClientPart::with_weights(&engine, &plan.config, weights, &plan.training, &values)?;
        let unfilled = len - moments.len();
        part.set_moments(&moments.followed_by(Moments::zero(unfilled)))?;
        Ok(Learner {
            layout,
            values,
            part,
            plan,
            clock,
            batches,
            speed,
            unfilled,
            examples: 0,
            pending: 0,
            tokens: 0,
        })
    }
}

/// Computes what the session asks for.
pub struct Learner {
    part: ClientPart,
    layout: AdapterLayout,
    /// The adapter as it was installed; what of it is not trained is what it was from the beginning.
    values: Vec<f32>,
    plan: Plan,
    clock: Clock,
    batches: Batches,
    speed: Option<Speed>,
    /// Values, the last ones, whose moments are still to come.
    unfilled: usize,
    /// Trained on in the current round.
    examples: u64,
    /// Of the last forward pass, until its gradient has come.
    pending: u64,
    /// Targets of the last forward pass.
    tokens: usize,
}

impl Learner {
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What this device computes of the plan, measured the first time. Training is not touched.
    ///
    /// # Errors
    /// [`Error::Split`].
    pub async fn speed(&mut self) -> Result<Option<Speed>, Error> {
        if self.speed.is_none() {
            self.speed = self.part.measure(self.clock).await?;
        }
        Ok(self.speed)
    }

    /// Gives up the assignment for another.
    ///
    /// # Errors
    /// [`Error::Split`].
    pub async fn release(self) -> Result<Held, Error> {
        Ok(Held {
            weights: self.part.weights().clone(),
            moments: self.part.moments().await?,
            cursor: self.batches.cursor(),
            examples: self.batches.into_examples(),
            plan: self.plan,
            speed: self.speed,
        })
    }

    /// `RoundStarted`: counts this round's examples from zero.
    pub fn begin_round(&mut self) {
        self.examples = 0;
    }

    /// `InstallAdapter`: takes the trained values of the client's side, and the moments of blocks that are new to it. Where those
    /// do not come, because the blocks were moved while this client was away, or where the run's moments are of no use with other
    /// values, its optimiser begins anew.
    ///
    /// # Errors
    /// [`Error::Assignment`] for moments of other blocks, [`Error::Split`] for another length.
    pub async fn install(&mut self, values: &[f32], moments: Option<Moments>) -> Result<(), Error> {
        self.layout.scatter(values, &mut self.values)?;
        self.part.set_adapter(&self.values)?;
        let none = Moments::zero(self.layout.len());
        match moments {
            _ if self.plan.moments == MomentPolicy::Reset => self.part.set_moments(&none)?,
            Some(gained) => {
                let own = self.layout.gather_moments(&self.part.moments().await?);
                let Some(kept) = own.len().checked_sub(gained.len()) else {
                    return Err(Error::Assignment("moments of more blocks than there are".to_owned()));
                };
                let moments = own.slice(0..kept).followed_by(gained);
                self.part.set_moments(&self.layout.scatter_moments(&moments)?)?;
            }
            None if self.unfilled > 0 => self.part.set_moments(&none)?,
            None => {}
        }
        self.unfilled = 0;
        Ok(())
    }

    /// `ComputeForward`: the next batch up to the cut.
    ///
    /// # Errors
    /// [`Error::Split`].
    pub async fn forward(&mut self, key: StepKey) -> Result<ActivationsInput, Error> {
        let start = (self.clock)();
        let batch = self.batches.next_batch();
        let rounds = u64::from(key.round.round) * u64::from(self.plan.local_steps);
        self.part.set_run_step(rounds + u64::from(key.step));
        let tensor = self.part.forward(&batch.tokens, batch.seq).await?;
        self.pending = batch.examples as u64;
        self.tokens = batch.target_count;
        Ok(ActivationsInput {
            key,
            examples: batch.examples as u32,
            forward: (self.clock)().saturating_sub(start),
            targets: batch.targets,
            tensor,
        })
    }

    /// `ComputeBackward`: the gradient of this client's own loss, and one optimiser step. Returns what they took.
    ///
    /// # Errors
    /// [`Error::Split`].
    pub async fn backward(&mut self, gradient: Gradient) -> Result<Duration, Error> {
        let start = (self.clock)();
        self.part.backward(&gradient.tensor).await?;
        self.examples += std::mem::take(&mut self.pending);
        Ok((self.clock)().saturating_sub(start))
    }

    /// `UploadAdapter`: the adapter's trained values, flat, the examples it was trained on in this round, and the moments of the blocks from `split`
    /// on as after `steps` optimiser steps.
    ///
    /// # Errors
    /// [`Error::Split`].
    pub async fn adapter(&self, round: RoundKey, split: u32, steps: u64) -> Result<AdapterInput, Error> {
        let values = self.layout.gather(&self.part.adapter().await?);
        let stays = values.len() / self.plan.cut * (split as usize).min(self.plan.cut);
        let moments = if stays < values.len() {
            let moments = self.layout.gather_moments(&self.part.moments().await?);
            Some(moments.slice(stays..values.len()).at(steps))
        } else {
            None
        };
        Ok(AdapterInput {
            round,
            examples: self.examples,
            values,
            moments,
        })
    }

    /// Targets of the last forward pass.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Gives the data back, to go on with in another run.
    pub fn into_examples(self) -> Vec<Example> {
        self.batches.into_examples()
    }
}
