//! The client's side: embedding and the blocks below the cut, with their adapter and optimiser.

use crate::compute::Engine;
use crate::model::adapter::AdapterLayout;
use crate::model::architecture::Architecture;
use crate::model::block::BlockWeights;
use crate::model::ends::embedding::Embedding;
use crate::model::stack::{Stack, StackWeights};
use crate::model::unit::UnitData;
use crate::model::workspace::Extent;

use super::cut::CutBuffers;
use super::speed::{self, Clock};
use super::{Error, Training, check_adapter, check_length, check_tokens};
use crate::terms::moments::Moments;
use crate::terms::speed::Speed;
use crate::terms::tensor::WireTensor;

/// A client's part of a split model: the embedding and the blocks below the cut, with their adapter and optimiser.
pub struct ClientPart {
    stack: Stack,
    training: Training,
    activations: CutBuffers,
    gradient: CutBuffers,
    /// Sequence length of the forward pass whose gradient is awaited.
    pending: Option<usize>,
    /// Where the run stands, for the learning rate; the part's own steps where nobody says.
    run_step: Option<u64>,
}

impl ClientPart {
    /// Uploads `blocks`, which are blocks 0..cut of the model, and `adapter`, their flat LoRA values.
    pub fn new(
        engine: &Engine,
        model: &Architecture,
        embedding: Embedding,
        blocks: &[UnitData],
        training: &Training,
        adapter: &[f32],
    ) -> Result<Self, Error> {
        let weights = StackWeights {
            embedding: Some(embedding),
            blocks: blocks
                .iter()
                .map(|unit| BlockWeights::upload(engine, model, unit))
                .collect::<Result<_, _>>()?,
            first_block: 0,
            head: None,
        };
        Self::with_weights(engine, model, weights, training, adapter)
    }

    /// The same on weights that are already on the device.
    pub(crate) fn with_weights(
        engine: &Engine,
        model: &Architecture,
        weights: StackWeights,
        training: &Training,
        adapter: &[f32],
    ) -> Result<Self, Error> {
        let cut = weights.blocks.len();
        if cut == 0 || cut >= model.blocks {
            return Err(Error::Split {
                cut,
                blocks: model.blocks,
            });
        }
        training.check(model)?;
        let layout = AdapterLayout::new(model, &training.spec, 0..cut)?;
        check_adapter(&layout, adapter)?;
        let extent = Extent {
            batch: training.batch,
            seq: training.seq,
        };
        let rows = training.batch * training.seq;
        Ok(Self {
            stack: Stack::new(engine, model, weights, Some((&layout, adapter)), extent, true)?,
            activations: CutBuffers::new(engine, training.wire, rows, model.width)?,
            gradient: CutBuffers::new(engine, training.wire, rows, model.width)?,
            training: training.clone(),
            pending: None,
            run_step: None,
        })
    }

    /// The run's step, counted from 0, that the next optimiser step belongs to. A client that joins late, or that others went on
    /// without, then has the learning rate of its run; its moments' bias is corrected by its own steps.
    pub(crate) fn set_run_step(&mut self, step: u64) {
        self.run_step = Some(step);
    }

    /// Runs `tokens` (batch, seq) up to the cut and keeps what [`ClientPart::backward`] needs.
    pub async fn forward(&mut self, tokens: &[u32], seq: usize) -> Result<WireTensor, Error> {
        let batch = self.training.batch;
        self.training.check_seq(seq, self.stack.model())?;
        check_length("a batch of tokens", tokens.len(), batch * seq)?;
        check_tokens(tokens, self.stack.model().vocab)?;
        self.stack.upload_tokens(tokens, seq)?;
        let activations = &self.activations;
        self.stack.run("forward", seq, |stack, recording| {
            stack.record_blocks(recording, seq);
            activations.record_pack(recording, batch * seq, stack.output());
        })?;
        self.pending = Some(seq);
        self.activations
            .download(self.stack.engine(), (batch, seq), self.stack.output())
            .await
    }

    /// Takes the gradient of this client's own mean loss with respect to the activations of the last forward pass, and one
    /// optimiser step on the adapter.
    pub async fn backward(&mut self, gradient: &WireTensor) -> Result<(), Error> {
        let seq = self.pending.ok_or(Error::NoForward)?;
        let batch = self.training.batch;
        self.gradient.accepts(gradient)?;
        check_length("the rows of a gradient", gradient.rows(), batch * seq)?;
        self.pending = None;
        self.gradient
            .upload(self.stack.engine(), gradient, batch * seq, self.stack.d_x());
        let run_step = self.run_step.unwrap_or_else(|| self.stack.steps());
        self.stack.begin_update(&self.training.optimizer, run_step, 1.0);
        let gradient = &self.gradient;
        self.stack.run("backward", seq, |stack, recording| {
            gradient.record_unpack(recording, batch * seq, stack.d_x());
            stack.record_backward(recording, seq, false);
            stack.record_update(recording);
        })?;
        Ok(self.stack.engine().wait().await?)
    }

    /// Measures this device on the part's own recordings at the largest shape, or at shorter sequences where those would take too
    /// long, with tokens that mean nothing, for about a second. Nothing that training builds on is changed. `None` where the clock
    /// is too coarse to tell.
    pub async fn measure(&mut self, clock: Clock) -> Result<Option<Speed>, Error> {
        const FORWARD: &str = "speed.forward";
        const BACKWARD: &str = "speed.backward";
        let (batch, seq) = (self.training.batch, self.training.seq);
        self.stack.upload_tokens(&vec![0; batch * seq], seq)?;
        let forward = speed::rate(&mut self.stack, clock, (FORWARD, seq), |stack, seq| {
            stack.run(FORWARD, seq, |stack, recording| {
                stack.record_blocks(recording, seq);
            })
        })
        .await?;
        let backward = speed::rate(&mut self.stack, clock, (BACKWARD, seq), |stack, seq| {
            stack.run(BACKWARD, seq, |stack, recording| {
                stack.record_backward(recording, seq, false);
                stack.record_clear_gradient(recording);
            })
        })
        .await?;
        Ok(Speed::new(forward, backward))
    }

    /// The weights on the device, which another part can be made from.
    pub fn weights(&self) -> &StackWeights {
        self.stack.weights()
    }

    /// The optimiser's moments of the adapter's values.
    pub async fn moments(&self) -> Result<Moments, Error> {
        Ok(self.stack.moments().await?)
    }

    /// Replaces the optimiser's moments and its number of steps.
    pub(crate) fn set_moments(&mut self, moments: &Moments) -> Result<(), Error> {
        let layout = self.stack.layout().expect("a client part has an adapter");
        check_length("the first moment", moments.first.len(), layout.len())?;
        check_length("the second moment", moments.second.len(), layout.len())?;
        self.stack.set_moments(moments);
        Ok(())
    }

    /// The adapter's values, flat in the order of [`AdapterLayout`].
    pub async fn adapter(&self) -> Result<Vec<f32>, Error> {
        Ok(self.stack.adapter().await?)
    }

    /// Replaces the adapter's values; the optimiser keeps this client's own moments.
    pub fn set_adapter(&mut self, values: &[f32]) -> Result<(), Error> {
        let layout = self.stack.layout().expect("a client part has an adapter");
        check_adapter(layout, values)?;
        self.stack.set_adapter(values);
        Ok(())
    }
}
