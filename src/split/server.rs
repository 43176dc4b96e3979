//! The main server's side: the blocks above the cut, the head and the loss, with their adapter and optimiser.

use std::collections::{BTreeMap, BTreeSet};

use crate::compute::{Buffer, Engine};
use crate::model::adapter::{Adapter, AdapterLayout};
use crate::model::architecture::Architecture;
use crate::model::central::{Central, Counted};
use crate::model::ends::head::HeadWeights;
use crate::model::stack::{Stack, StackWeights};
use crate::model::weights::UnitSource;
use crate::model::workspace::Extent;

use super::cut::CutBuffers;
use super::speed::{self, Clock};
use super::{Error, LaneError, Training, check_adapter, check_length, check_targets};
use crate::terms::ids::ClientId;
use crate::terms::moments::Moments;
use crate::terms::tensor::{IGNORED_TARGET, WireTensor};

/// One client's part in a step.
#[derive(Clone, Copy, Debug)]
pub struct Contribution<'a> {
    /// Blocks the client ran; no fewer than are below this part. The contribution enters at that block, and its gradient leaves
    /// there.
    pub cut: usize,
    /// (batch, seq, width): the output of block `cut - 1`.
    pub activations: &'a WireTensor,
    /// (batch, seq), [`IGNORED_TARGET`] where there is nothing to predict.
    pub targets: &'a [i32],
}

/// What one client gets back.
#[derive(Clone, Debug)]
pub struct Reply {
    /// Of the client's own mean loss.
    pub gradient: WireTensor,
    /// Mean over the client's targets.
    pub loss: f64,
    /// Targets the loss is averaged over.
    pub tokens: usize,
}

/// A step that the optimiser has taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Closed {
    /// Mean over the targets of all its lanes.
    pub loss: f64,
    /// Targets of all its lanes.
    pub tokens: usize,
}

/// A contribution to the open step that has been computed.
struct Lane {
    /// Which of the kept gradients is its own.
    slot: usize,
    /// Mean over its targets.
    loss: f64,
    tokens: usize,
}

/// The lanes of the open step, and the adapter gradients they are kept in from step to step.
#[derive(Default)]
struct Lanes {
    open: BTreeMap<ClientId, Lane>,
    gradients: Vec<Buffer>,
}

/// Loss and perplexity over a data set.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// Mean over targets.
    pub loss: f64,
    /// e to the loss.
    pub perplexity: f64,
    /// Targets.
    pub tokens: usize,
}

impl Evaluation {
    /// From summed losses.
    pub fn new(counted: Counted) -> Self {
        let loss = counted.loss_sum / counted.tokens.max(1) as f64;
        Self {
            loss,
            perplexity: loss.exp(),
            tokens: counted.tokens,
        }
    }
}

/// What the client's side is after the cut has moved.
#[derive(Clone, Debug, PartialEq)]
pub struct Moved {
    /// Its adapter's values.
    pub adapter: Vec<f32>,
    /// Of the blocks it gains, which are the last of its own; `None` where it gains none.
    pub moments: Option<Moments>,
}

/// The main server's part of a split model: the blocks above the cut, the head and the loss, with their adapter and optimiser.
pub struct ServerPart {
    stack: Stack,
    training: Training,
    cut: usize,
    activations: CutBuffers,
    gradient: CutBuffers,
    /// What one readback brings: the norm of the adapter gradient, the losses of the rows, the gradient's wire form.
    reply: Buffer,
    lanes: Lanes,
}

impl ServerPart {
    /// Uploads the blocks above the cut, the final norm and the head, and `adapter`, the flat LoRA values of those blocks.
    pub fn new(
        engine: &Engine,
        model: &Architecture,
        units: &mut dyn UnitSource,
        cut: usize,
        training: &Training,
        adapter: &[f32],
    ) -> Result<Self, Error> {
        let empty = StackWeights {
            embedding: None,
            blocks: Vec::new(),
            first_block: model.blocks,
            head: None,
        };
        Self::with_held(engine, model, units, empty, cut, training, adapter)
    }

    /// The same, taking what is on the device already from there.
    fn with_held(
        engine: &Engine,
        model: &Architecture,
        units: &mut dyn UnitSource,
        held: StackWeights,
        cut: usize,
        training: &Training,
        adapter: &[f32],
    ) -> Result<Self, Error> {
        if cut == 0 || cut >= model.blocks {
            return Err(Error::Split {
                cut,
                blocks: model.blocks,
            });
        }
        let StackWeights {
            blocks: mut own,
            first_block,
            head,
            ..
        } = held;
        let mut blocks = StackWeights::load_blocks(engine, model, units, cut..first_block)?;
        blocks.extend(own.drain(cut.saturating_sub(first_block)..));
        let weights = StackWeights {
            embedding: None,
            blocks,
            first_block: cut,
            head: Some(match head {
                Some(head) => head,
                None => HeadWeights::load(engine, model, units)?,
            }),
        };
        Self::with_weights(engine, model, weights, training, adapter)
    }

    /// The same on weights that are already on the device.
    ///
    /// # Panics
    /// If they lack the head.
    pub(crate) fn with_weights(
        engine: &Engine,
        model: &Architecture,
        weights: StackWeights,
        training: &Training,
        adapter: &[f32],
    ) -> Result<Self, Error> {
        assert!(weights.head.is_some(), "the server's weights");
        let cut = weights.first_block;
        if cut == 0 || weights.block_range() != (cut..model.blocks) || weights.blocks.is_empty() {
            return Err(Error::Split {
                cut,
                blocks: model.blocks,
            });
        }
        training.check(model)?;
        let layout = AdapterLayout::new(model, &training.spec, cut..model.blocks)?;
        check_adapter(&layout, adapter)?;
        let extent = Extent {
            batch: training.batch,
            seq: training.seq,
        };
        let rows = training.batch * training.seq;
        let gradient = CutBuffers::new(engine, training.wire, rows, model.width)?;
        Ok(Self {
            stack: Stack::new(engine, model, weights, Some((&layout, adapter)), extent, true)?,
            training: training.clone(),
            cut,
            activations: CutBuffers::new(engine, training.wire, rows, model.width)?,
            reply: engine.buffer("reply", 1 + rows + gradient.words(rows))?,
            gradient,
            lanes: Lanes::default(),
        })
    }

    /// That the server can use a contribution: of as many rows as were agreed, or fewer.
    pub fn check(&self, contribution: &Contribution<'_>) -> Result<(), Error> {
        let blocks = self.stack.model().blocks;
        if !(self.cut..blocks).contains(&contribution.cut) {
            return Err(Error::OtherCut {
                cut: self.cut,
                blocks,
                found: contribution.cut,
            });
        }
        let activations = contribution.activations;
        self.activations.accepts(activations)?;
        self.training.check_seq(activations.seq(), self.stack.model())?;
        if !(1..=self.training.batch).contains(&activations.batch()) {
            check_length("a batch", activations.batch(), self.training.batch)?;
        }
        check_length("a batch of targets", contribution.targets.len(), activations.rows())?;
        check_targets(contribution.targets, self.stack.model().vocab)
    }

    /// Begins a step. What was in the one before, if it was not closed, is dropped.
    pub fn open_step(&mut self) {
        self.lanes.open.clear();
    }

    /// Runs one client's contribution to the open step, forward and backward, in a lane of its own, and answers it. Fewer rows
    /// than agreed are as if the others had no target.
    ///
    /// # Errors
    /// [`LaneError`]; the step is as it was before.
    pub async fn contribute(&mut self, client: ClientId, contribution: &Contribution<'_>) -> Result<Reply, LaneError> {
        self.check(contribution).map_err(LaneError::Refused)?;
        if self.lanes.open.contains_key(&client) {
            return Err(LaneError::Again);
        }
        let given = contribution.activations;
        let (batch, seq) = (given.batch(), given.seq());
        let entry = contribution.cut - self.cut;
        let rows = self.training.batch * seq;
        let input = self.stack.input_of(entry);
        self.activations.upload(self.stack.engine(), given, rows, input);
        let mut targets = contribution.targets.to_vec();
        targets.resize(rows, IGNORED_TARGET);
        let tokens = self.stack.upload_targets(&targets, 1.0);
        let (activations, gradient, reply) = (&self.activations, &self.gradient, &self.reply);
        self.stack.run_from(("contribution", entry), seq, |stack, recording| {
            stack.record_clear_gradient(recording);
            activations.record_unpack(recording, rows, stack.input_of(entry));
            stack.record_blocks_from(recording, seq, entry);
            stack.record_loss(recording, seq, true);
            stack.record_backward_to(recording, seq, entry);
            gradient.record_pack(recording, rows, stack.d_x());
            stack.record_gradient_norm(recording);
            let at = stack.record_reply(recording, seq, reply);
            gradient.record_reply(recording, rows, stack.d_x(), (reply, at));
        })?;
        let words = 1 + rows + self.gradient.words(rows);
        let words: Vec<u32> = self.stack.engine().download(&self.reply, 0, words).await?;
        let (norm, losses) = (f32::from_bits(words[0]), &words[1..1 + rows]);
        let loss = losses.iter().map(|word| f64::from(f32::from_bits(*word))).sum::<f64>() / tokens.max(1) as f64;
        if !loss.is_finite() {
            return Err(LaneError::Loss(loss));
        }
        let gradient = self
            .gradient
            .tensor((batch, seq), rows, &words[1 + rows..])
            .map_err(LaneError::Refused)?;
        if !norm.is_finite() || !gradient.is_finite() {
            return Err(LaneError::Gradient);
        }
        let slot = self.keep_gradient()?;
        self.lanes.open.insert(client, Lane { slot, loss, tokens });
        Ok(Reply { gradient, loss, tokens })
    }

    /// Keeps the gradient of the last contribution until the step closes. Returns where.
    fn keep_gradient(&mut self) -> Result<usize, LaneError> {
        let is_free = |slot: &usize| self.lanes.open.values().all(|lane| lane.slot != *slot);
        let slot = (0..=self.lanes.gradients.len()).find(is_free).unwrap_or_default();
        if slot == self.lanes.gradients.len() {
            self.lanes
                .gradients
                .push(self.stack.gradient_buffer(format!("lane.{slot}"))?);
        }
        let kept = &self.lanes.gradients[slot];
        self.stack.run_from(("lane.keep", slot), 0, |stack, recording| {
            stack.record_keep_gradient(recording, kept);
        })?;
        Ok(slot)
    }

    /// Closes the step with these clients' lanes, in the order of the clients: one optimiser step on `Σ w_k loss_k`, `w_k = tokens_k / Σ tokens`.
    /// A block has the gradient of the contributions that passed it. The other lanes are dropped; without any there is no step.
    ///
    /// # Errors
    /// [`Error::NoLane`], before anything is changed; [`Error::Compute`].
    pub fn close(&mut self, lanes: &BTreeSet<ClientId>) -> Result<Closed, Error> {
        let closed = self.sum(lanes)?;
        if !lanes.is_empty() {
            let step = self.stack.steps();
            self.stack.begin_update(&self.training.optimizer, step, 1.0);
            self.stack
                .run("update", 0, |stack, recording| stack.record_update(recording))?;
        }
        Ok(closed)
    }

    /// Sums these lanes' adapter gradients, and ends the step.
    fn sum(&mut self, lanes: &BTreeSet<ClientId>) -> Result<Closed, Error> {
        let lane = |client: &ClientId| match self.lanes.open.get(client) {
            Some(lane) => Ok((lane.slot, lane.loss, lane.tokens)),
            None => Err(Error::NoLane { client: *client }),
        };
        let lanes = lanes.iter().map(lane).collect::<Result<Vec<_>, _>>()?;
        let tokens: usize = lanes.iter().map(|(.., tokens)| tokens).sum();
        self.stack.run("lane.clear", 0, |stack, recording| {
            stack.record_clear_gradient(recording)
        })?;
        let mut loss = 0.0;
        for (slot, own_loss, own_tokens) in lanes {
            let weight = own_tokens as f64 / tokens.max(1) as f64;
            loss += weight * own_loss;
            self.stack.set_weight(weight as f32);
            let kept = &self.lanes.gradients[slot];
            self.stack.run_from(("lane.add", slot), 0, |stack, recording| {
                stack.record_add_gradient(recording, kept);
            })?;
        }
        self.lanes.open.clear();
        Ok(Closed { loss, tokens })
    }

    /// A whole step: these contributions, and the optimiser's part. Returns the loss and the replies in the order of the
    /// contributions.
    ///
    /// # Errors
    /// The first [`LaneError`], without a step.
    pub async fn step(&mut self, contributions: &[Contribution<'_>]) -> Result<(f64, Vec<Reply>), LaneError> {
        let (lanes, replies) = self.contribute_all(contributions).await?;
        let closed = self.close(&lanes).map_err(LaneError::Refused)?;
        Ok((closed.loss, replies))
    }

    /// [`ServerPart::step`] without the optimiser's part: the adapter's gradient stays accumulated.
    ///
    /// # Errors
    /// As [`ServerPart::step`].
    pub async fn accumulate(&mut self, contributions: &[Contribution<'_>]) -> Result<(f64, Vec<Reply>), LaneError> {
        let (lanes, replies) = self.contribute_all(contributions).await?;
        let closed = self.sum(&lanes).map_err(LaneError::Refused)?;
        Ok((closed.loss, replies))
    }

    async fn contribute_all(
        &mut self,
        contributions: &[Contribution<'_>],
    ) -> Result<(BTreeSet<ClientId>, Vec<Reply>), LaneError> {
        self.open_step();
        let lanes: BTreeSet<ClientId> = (0..contributions.len() as u64).map(ClientId).collect();
        let mut replies = Vec::with_capacity(contributions.len());
        for (client, contribution) in lanes.iter().zip(contributions) {
            replies.push(self.contribute(*client, contribution).await?);
        }
        Ok((lanes, replies))
    }

    /// The accumulated gradient of the adapter, flat.
    pub async fn adapter_gradient(&self) -> Result<Vec<f32>, Error> {
        Ok(self.stack.adapter_gradient().await?)
    }

    /// Blocks below this part.
    pub fn cut(&self) -> usize {
        self.cut
    }

    /// What this device computes on the part's own blocks, head and loss, forward and backward, in FLOP/s, measured as
    /// [`ClientPart::measure`](super::ClientPart::measure) does.
    pub async fn measure(&mut self, clock: Clock) -> Result<Option<f64>, Error> {
        const STEP: &str = "speed.step";
        let Training { batch, seq, .. } = self.training;
        self.stack.upload_targets(&vec![0; batch * seq], 1.0);
        let rate = speed::rate(&mut self.stack, clock, (STEP, seq), |stack, seq| {
            stack.run(STEP, seq, |stack, recording| {
                stack.record_blocks(recording, seq);
                stack.record_loss(recording, seq, true);
                stack.record_backward(recording, seq, true);
                stack.record_clear_gradient(recording);
            })
        })
        .await?;
        Ok((rate.is_finite() && rate > 0.0).then_some(rate))
    }

    /// This part with another cut, before anything is trained: `adapter` is that of the blocks from `cut` on, of `training`'s
    /// rank. What is on the device stays there.
    pub fn replaced(
        self,
        units: &mut dyn UnitSource,
        cut: usize,
        training: &Training,
        adapter: &[f32],
    ) -> Result<Self, Error> {
        let (engine, model) = (self.stack.engine().clone(), self.stack.model().clone());
        let held = self.stack.weights().clone();
        // The old workspace goes before the new one comes.
        drop(self);
        Self::with_held(&engine, &model, units, held, cut, training, adapter)
    }

    /// This part with another cut, as if it had been there from the beginning. `client` is the client side's adapter at the
    /// present cut, `moments` the moments of those of its blocks that come to this side.
    pub async fn recut(
        self,
        units: &mut dyn UnitSource,
        cut: usize,
        client: &[f32],
        moments: Option<Moments>,
    ) -> Result<(Self, Moved), Error> {
        let (old, blocks) = (self.cut, self.stack.model().blocks);
        if cut == 0 || cut >= blocks {
            return Err(Error::Split { cut, blocks });
        }
        let own = self.stack.adapter().await?;
        let own_moments = self.stack.moments().await?;
        let whole = AdapterLayout::new(self.stack.model(), &self.training.spec, 0..blocks)?;
        let values = |blocks| whole.range(blocks).len();
        check_length("the client's adapter", client.len(), values(0..old))?;
        let (coming, going) = (values(cut.min(old)..old), values(old..cut.max(old)));
        let moments = moments.unwrap_or_default();
        check_length("the first moment of the blocks that come", moments.first.len(), coming)?;
        check_length(
            "the second moment of the blocks that come",
            moments.second.len(),
            coming,
        )?;
        let steps = own_moments.steps;
        let given = own_moments.slice(0..going);
        let kept = own_moments.slice(going..own_moments.len());
        let mut adapter = client.to_vec();
        adapter.extend(own);
        let above = adapter.split_off(values(0..cut));
        let training = self.training.clone();
        let mut part = self.replaced(units, cut, &training, &above)?;
        part.stack.set_moments(&moments.at(steps).followed_by(kept));
        let moved = Moved {
            adapter,
            moments: (going > 0).then_some(given),
        };
        Ok((part, moved))
    }

    /// The server's adapter values, flat in the order of [`AdapterLayout`] over blocks cut.. .
    pub async fn adapter(&self) -> Result<Vec<f32>, Error> {
        Ok(self.stack.adapter().await?)
    }

    /// Replaces the adapter's values; the optimiser keeps its moments.
    pub fn set_adapter(&mut self, values: &[f32]) -> Result<(), Error> {
        let layout = self.stack.layout().expect("a server part has an adapter");
        check_adapter(layout, values)?;
        self.stack.set_adapter(values);
        Ok(())
    }

    /// The optimiser's moments of the adapter's values, and the steps it has taken.
    pub async fn moments(&self) -> Result<Moments, Error> {
        Ok(self.stack.moments().await?)
    }

    /// Replaces the optimiser's moments and its number of steps.
    ///
    /// # Errors
    /// [`Error`] for moments of another number of values.
    pub fn set_moments(&mut self, moments: &Moments) -> Result<(), Error> {
        let layout = self.stack.layout().expect("a server part has an adapter");
        check_length("the first moment", moments.first.len(), layout.len())?;
        check_length("the second moment", moments.second.len(), layout.len())?;
        self.stack.set_moments(moments);
        Ok(())
    }

    /// Loss of the whole model, with `client_adapter` below the cut, over batches of (tokens, targets, seq). The client's blocks
    /// are loaded for the time of the call.
    pub async fn evaluate(
        &self,
        units: &mut dyn UnitSource,
        client_adapter: &[f32],
        batches: &mut dyn Iterator<Item = (Vec<u32>, Vec<i32>, usize)>,
    ) -> Result<Evaluation, Error> {
        let model = self.stack.model();
        let spec = &self.training.spec;
        let server_values = self.stack.adapter().await?;
        let adapter = Adapter::from_values(model, spec, 0..self.cut, client_adapter.to_vec())?.merge(
            model,
            &Adapter::from_values(model, spec, self.cut..model.blocks, server_values)?,
        )?;
        self.evaluate_with(units, &adapter, batches).await
    }

    /// Loss of the whole model with this adapter, whatever ranks it has, over batches of (tokens, targets, seq). The client's blocks are
    /// loaded for the time of the call.
    ///
    /// # Panics
    /// If it is not of the whole model.
    pub async fn evaluate_with(
        &self,
        units: &mut dyn UnitSource,
        adapter: &Adapter,
        batches: &mut dyn Iterator<Item = (Vec<u32>, Vec<i32>, usize)>,
    ) -> Result<Evaluation, Error> {
        let (engine, model) = (self.stack.engine(), self.stack.model());
        let own = self.stack.weights();
        let mut blocks = StackWeights::load_blocks(engine, model, units, 0..self.cut)?;
        blocks.extend(own.blocks.iter().cloned());
        let weights = StackWeights {
            embedding: Some(units.embedding()?),
            blocks,
            first_block: 0,
            head: own.head.clone(),
        };
        let mut whole = Central::new(engine, model, weights, Some(adapter), self.stack.extent(), None)?;
        let mut counted = Counted::default();
        for (tokens, targets, seq) in batches {
            counted += whole.loss(&tokens, &targets, seq).await?;
        }
        Ok(Evaluation::new(counted))
    }
}
