//! The client's part of the model on its way to the device.
//!
//! Separate from training, because what is there already is used again, and the rest comes piece by piece.

use std::io::Read;

use super::Error;
use super::learner::Learner;
use super::plan::{Plan, unreadable, verify};
use crate::compute::Engine;
use crate::data::{Cursor, Example};
use crate::model::adapter::AdapterLayout;
use crate::model::archive::Source;
use crate::model::block::BlockWeights;
use crate::model::ends::embedding::Embedding;
use crate::model::stack::StackWeights;
use crate::model::unit::{Unit, UnitData};
use crate::protocol::message::Blob;
use crate::split::{ClientPart, Clock};
use crate::terms::moments::Moments;
use crate::terms::speed::Speed;

/// What an assignment leaves on a device for the next one.
pub struct Held {
    pub(super) plan: Plan,
    pub(super) embedding: Option<Embedding>,
    pub(super) blocks: Vec<BlockWeights>,
    /// Of the first blocks, as far as they had any.
    pub(super) moments: Moments,
    pub(super) examples: Option<Vec<Example>>,
    pub(super) cursor: Option<Cursor>,
    pub(super) speed: Option<Speed>,
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
        let Some(held) = held.filter(|held| held.plan.architecture == plan.architecture) else {
            return Ok(loader);
        };
        let same = held
            .plan
            .units
            .iter()
            .zip(&plan.units)
            .take_while(|(old, new)| old == new);
        if let Some(blocks) = same.count().checked_sub(1) {
            loader.embedding = held.embedding;
            loader.blocks.extend(held.blocks.into_iter().take(blocks));
        }
        if held.plan.run == plan.run && held.plan.training.spec == plan.training.spec {
            let kept = AdapterLayout::new(&plan.architecture, &plan.training.spec, 0..held.plan.cut.min(plan.cut))?;
            loader.moments = held.moments.slice(0..kept.len().min(held.moments.len()));
        }
        loader.data = held.examples.filter(|_| held.plan.shares_data(plan));
        loader.cursor = held.cursor;
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

    /// What it is loading.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Whether there are no examples yet: those of an earlier assignment may serve this one too.
    pub fn needs_data(&self) -> bool {
        self.data.is_none()
    }

    /// Takes the examples that [`Loader::needs_data`] asks for.
    pub fn set_data(&mut self, examples: Vec<Example>) {
        self.data = Some(examples);
    }

    /// The examples.
    pub fn take_data(&mut self) -> Option<Vec<Example>> {
        self.data.take()
    }

    /// Gives the assignment up for another, with what has been loaded of it.
    pub(super) fn release(self) -> Held {
        Held {
            plan: self.plan,
            embedding: self.embedding,
            blocks: self.blocks,
            moments: self.moments,
            examples: self.data,
            cursor: self.cursor,
            speed: self.speed,
        }
    }

    /// Takes the bytes of the next part, the embedding's into memory.
    ///
    /// # Errors
    /// [`Error::Hash`] when they are not what was announced; [`Error::Weights`], [`Error::Compute`].
    pub fn add(&mut self, bytes: Vec<u8>) -> Result<(), Error> {
        let Some(blob) = self.next() else { return Ok(()) };
        verify(blob, &bytes[..])?;
        let model = &self.plan.architecture;
        match self.embedding {
            None => {
                let unit = UnitData::decode(&bytes, Unit::Embedding, model)?;
                drop(bytes);
                self.embedding = Some(Embedding::held(model, unit));
            }
            Some(_) => {
                let unit = UnitData::decode(&bytes, Unit::Block(self.blocks.len()), model)?;
                drop(bytes);
                self.blocks.push(BlockWeights::upload(&self.engine, model, &unit)?);
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
        self.embedding = Some(Embedding::stored(&self.plan.architecture, source)?);
        Ok(())
    }

    /// The loaded model with its data, which goes on where an earlier assignment stood. What is trained of the adapter is zero until
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
        let layout = AdapterLayout::new(&plan.architecture, &plan.training.spec, 0..plan.cut)?;
        let adapter = plan.adapter(&vec![0.0; layout.trained_len()])?;
        let mut part = ClientPart::with_weights(&engine, &plan.architecture, weights, &plan.training, &adapter.values)?;
        let unfilled = layout.len() - moments.len();
        part.set_moments(&moments.followed_by(Moments::zero(unfilled)))?;
        Ok(Learner::new(part, adapter, plan, clock, batches, speed, unfilled))
    }
}
