//! Keeper of the main server's side of the model: work goes in, what has become of it comes out.
//!
//! It has the blocks above the cut with their adapter and optimiser, the planner, and the beginning of the round, to which it goes back when
//! a round is lost. It is separate from the thread that drives it, and has neither channel nor clock, so that a simulation can
//! drive the same.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use super::Error;
use super::inbox::{Done, Side, Work};
use super::planner::{Decision, Facts, Planner};
use super::store::Blobs;
use crate::compute::Engine;
use crate::data::{self, Example};
use crate::federated::Exact;
use crate::federated::Rule;
use crate::model::adapter::{Adapter, AdapterLayout, LoraSpec};
use crate::model::architecture::Architecture;
use crate::model::unit::Unit;
use crate::model::weights::{HeldUnits, Holding, UnitSource, Weights};
use crate::protocol::message::{Assignment, Blob, RunConfig};
use crate::protocol::{Contribution, GradientOutput, Placement};
use crate::runs::directory;
use crate::split::{self, Evaluation, LaneError, Moved, ServerPart, Training};
use crate::terms::aggregation::Aggregation;
use crate::terms::ids::{ClientId, StepKey};
use crate::terms::moments::Moments;

/// What the keeper starts from.
pub struct KeeperSettings {
    pub engine: Engine,
    pub architecture: Architecture,
    pub weights: Weights,
    pub holding: Holding,
    pub cut: usize,
    pub training: Training,
    /// The whole model's adapter at the start.
    pub initial: Adapter,
    /// What the first round begins from.
    pub beginning: Beginning,
    /// The clients' first assignment, and where the parts of the model for them lie.
    pub assignment: Assignment,
    /// All that were written so far, in order.
    pub parts: Vec<Blob>,
    pub blobs: Arc<Blobs>,
    pub planner: Option<Box<dyn Planner>>,
    pub aggregation: Aggregation,
    /// Clients' own ranks, in turn.
    pub ranks: Vec<u32>,
    pub validation: Option<Vec<Example>>,
    /// Where the whole model's adapter is saved, and what it says it belongs to.
    pub adapter_directory: PathBuf,
    pub base_model: String,
}

/// This side of a round's beginning, and what of the other side it has to know.
pub struct Beginning {
    pub side: Arc<Side>,
    /// The client side's whole adapter, what is not trained as well, as far as the largest cut, and clients' own cuts where they differ.
    pub client_values: Vec<f32>,
    pub cuts: BTreeMap<ClientId, usize>,
}

impl KeeperSettings {
    fn units(&self) -> HeldUnits<'_> {
        HeldUnits {
            weights: &self.weights,
            holding: self.holding,
        }
    }
}

/// How adapters of this layout are aggregated. Adapters whose blocks differ have a mean, and nothing else.
pub fn rule(aggregation: Aggregation, layout: &AdapterLayout) -> Result<Option<Rule>, Error> {
    match layout.shape().and_then(|shape| Rule::new(aggregation, shape)) {
        None if aggregation != Aggregation::Mean => Err(Error::Aggregation(aggregation)),
        rule => Ok(rule),
    }
}

/// What the server measures itself by.
fn clock() -> Duration {
    static ORIGIN: LazyLock<Instant> = LazyLock::new(Instant::now);
    ORIGIN.elapsed()
}

/// Writes the parts of the model that a client with blocks 0..`cut` needs, unless they are there.
pub fn parts(units: &mut dyn UnitSource, blobs: &Blobs, known: &[Blob], cut: usize) -> Result<Vec<Blob>, Error> {
    std::iter::once(Unit::Embedding)
        .chain((0..cut).map(Unit::Block))
        .map(|unit| {
            let name = unit.to_string();
            if let Some(blob) = known.iter().find(|blob| blob.name == name) {
                return Ok(blob.clone());
            }
            let data = units.unit(unit)?;
            blobs.add(&name, |mut output| data.encode(&mut output))
        })
        .collect()
}

pub struct Keeper {
    part: ServerPart,
    settings: KeeperSettings,
    /// The beginning of the round: the adapter below this side's blocks, and this side.
    client_values: Vec<f32>,
    side: Arc<Side>,
    /// Clients' own cuts, where they differ.
    cuts: BTreeMap<ClientId, usize>,
    /// How many of this side's values some clients have too: they are the first.
    shared: usize,
    saved: bool,
    /// The open step, and what it has taken so far.
    step: Option<(StepKey, Duration)>,
}

impl Keeper {
    /// Loads the model, and says that it is ready.
    ///
    /// # Errors
    /// [`Error`].
    pub fn load(settings: KeeperSettings) -> Result<(Self, Option<Done>), Error> {
        let KeeperSettings {
            engine,
            architecture,
            cut,
            training,
            beginning,
            weights,
            holding,
            ..
        } = &settings;
        let Beginning {
            side,
            client_values,
            cuts,
        } = beginning;
        let below = AdapterLayout::new(architecture, &training.spec, 0..*cut)?
            .len()
            .min(client_values.len());
        let mut units = HeldUnits {
            weights,
            holding: *holding,
        };
        let mut part = ServerPart::new(engine, architecture, &mut units, *cut, training, &side.values)?;
        part.set_moments(&side.moments)?;
        let keeper = Self {
            part,
            client_values: client_values[..below].to_vec(),
            side: side.clone(),
            cuts: cuts.clone(),
            shared: client_values.len() - below,
            saved: false,
            step: None,
            settings,
        };
        Ok((keeper, Some(Done::Ready)))
    }

    /// Does a piece of work. What has become of it, where there is an answer.
    ///
    /// # Errors
    /// [`Error`]; the keeper is gone then.
    pub async fn handle(mut self, work: Work) -> Result<(Self, Option<Done>), Error> {
        let done = match work {
            Work::Baseline => Done::Baseline(self.evaluate(&self.side.values, self.side.exact.as_ref()).await?),
            Work::Contribute { key, contribution } => self.contribute(key, contribution).await?,
            Work::CloseStep { key, lanes } => self.close_step(key, &lanes)?,
            Work::Restore => {
                self.restore()?;
                return Ok((self, None));
            }
            Work::Plan(facts) => {
                let done;
                (self, done) = self.plan(*facts).await?;
                done
            }
            Work::Copy { round } => {
                let mut values = self.part.adapter().await?;
                values.truncate(self.shared);
                let values = self.layout(self.part.cut()..self.largest())?.gather(&values);
                Done::Copied { round, values }
            }
            Work::Close {
                round,
                average,
                exact,
                moments,
                split,
            } => {
                let (saved, evaluation) = self.close(&average, exact).await?;
                let mut placement = None;
                if evaluation.is_none_or(|evaluation| evaluation.loss.is_finite()) {
                    (self, placement) = self.recut(split, moments).await?;
                }
                Done::Closed {
                    round,
                    evaluation,
                    placement: placement.map(Box::new),
                    side: self.side.clone(),
                    saved,
                }
            }
            Work::Finish => {
                self.save_at_last()?;
                Done::Finished
            }
        };
        Ok((self, Some(done)))
    }

    async fn contribute(&mut self, key: StepKey, contribution: Contribution) -> Result<Done, Error> {
        let start = Instant::now();
        if self.step.is_none_or(|(open, _)| open != key) {
            self.part.open_step();
            self.step = Some((key, Duration::ZERO));
        }
        let client = contribution.client;
        let given = split::Contribution {
            cut: contribution.split as usize,
            activations: &contribution.activations,
            targets: &contribution.targets,
        };
        let output = match self.part.contribute(client, &given).await {
            Ok(reply) => Ok(GradientOutput {
                client,
                loss: reply.loss as f32,
                gradient: reply.gradient,
            }),
            Err(LaneError::Device(error)) => return Err(split::Error::from(error).into()),
            Err(error) => Err(error),
        };
        if let Some((_, elapsed)) = &mut self.step {
            *elapsed += start.elapsed();
        }
        Ok(Done::Contributed { key, client, output })
    }

    fn close_step(&mut self, key: StepKey, lanes: &BTreeSet<ClientId>) -> Result<Done, Error> {
        let start = Instant::now();
        let closed = self.part.close(lanes)?;
        let computed = self.step.take().map_or(Duration::ZERO, |(_, elapsed)| elapsed);
        Ok(Done::StepClosed {
            key,
            loss: closed.loss,
            tokens: closed.tokens as u64,
            elapsed: computed + start.elapsed(),
        })
    }

    /// Back to the beginning of the round, adapter, moments and steps; what is open of a step is void.
    fn restore(&mut self) -> Result<(), Error> {
        self.step = None;
        self.part.open_step();
        self.part.set_adapter(&self.side.values)?;
        Ok(self.part.set_moments(&self.side.moments)?)
    }

    /// Blocks of the client that holds the most.
    fn largest(&self) -> usize {
        self.cuts.values().copied().max().unwrap_or_else(|| self.part.cut())
    }

    fn layout(&self, blocks: Range<usize>) -> Result<AdapterLayout, Error> {
        let KeeperSettings {
            architecture, training, ..
        } = &self.settings;
        Ok(AdapterLayout::new(architecture, &training.spec, blocks)?)
    }

    /// Takes a round's average in; whether it could be saved, and its validation. A round whose validation loss is not finite is
    /// as if it had not been.
    async fn close(
        &mut self,
        average: &[f32],
        exact: Option<Exact>,
    ) -> Result<(Result<(), Error>, Option<Evaluation>), Error> {
        let mut values = self.part.adapter().await?;
        let mut whole = self.client_values.clone();
        whole.extend_from_slice(&values[..self.shared]);
        self.layout(0..self.largest())?.scatter(average, &mut whole)?;
        let above = whole.split_off(self.client_values.len());
        if self.shared > 0 {
            values[..self.shared].copy_from_slice(&above);
            self.part.set_adapter(&values)?;
        }
        let client_values = std::mem::replace(&mut self.client_values, whole);
        let evaluation = self.evaluate(&values, exact.as_ref()).await?;
        if evaluation.is_some_and(|evaluation| !evaluation.loss.is_finite()) {
            self.client_values = client_values;
            self.restore()?;
            return Ok((Ok(()), evaluation));
        }
        let moments = self.part.moments().await?;
        self.side = Arc::new(Side { values, moments, exact });
        self.saved = false;
        Ok((self.save(), evaluation))
    }

    /// Asks the planner. Nothing is trained before the start, so cut and rank are changed there and then.
    async fn plan(mut self, mut facts: Facts) -> Result<(Self, Done), Error> {
        if let Facts::Start(facts) = &mut facts {
            facts.server_flops_per_s = self.part.measure(clock).await?;
        }
        let decision = match &mut self.settings.planner {
            Some(planner) => facts
                .ask(planner.as_mut(), self.settings.architecture.blocks)
                .map_err(Error::Planner)?,
            None => None,
        };
        let placement = match (&facts, &decision) {
            (Facts::Start(start), Some(decision)) if !start.is_resumed => {
                let placement;
                (self, placement) = self.place(decision)?;
                placement
            }
            _ => None,
        };
        let placement = placement.map(Box::new);
        let side = self.side.clone();
        Ok((
            self,
            Done::Planned {
                decision,
                placement,
                side,
            },
        ))
    }

    /// Other cuts and rank, from the beginning.
    fn place(mut self, decision: &Decision) -> Result<(Self, Option<Placement>), Error> {
        let (cut, rank) = (decision.cut, decision.rank);
        let mut cuts = decision.cuts.clone();
        let largest = cuts.values().copied().max().unwrap_or(cut);
        if largest == cut {
            cuts.clear();
        }
        let KeeperSettings {
            architecture,
            training,
            initial,
            assignment,
            weights,
            holding,
            ..
        } = &mut self.settings;
        if (cut, rank) == (self.part.cut(), training.spec.rank) && cuts.is_empty() {
            return Ok((self, None));
        }
        if rank != training.spec.rank {
            let seed = assignment.config.seed;
            let fresh = |spec: &LoraSpec| Adapter::init(architecture, spec, 0..architecture.blocks, seed);
            if !training.spec.exceptions.is_empty() || fresh(&training.spec)? != *initial {
                return Err(Error::Planner(format!(
                    "the plan's rank is {rank}, but the run starts from an adapter of rank {}",
                    training.spec.rank
                )));
            }
            let spec = &training.spec;
            training.spec = LoraSpec {
                trained: spec.trained,
                ..LoraSpec::new(rank, spec.alpha / spec.rank as f32 * rank as f32, spec.targets.clone())?
            };
            *initial = fresh(&training.spec)?;
        }
        self.client_values = initial.slice(architecture, 0..cut)?.values;
        self.side = Arc::new(Side::new(initial.slice(architecture, cut..architecture.blocks)?.values));
        self.shared = initial.slice(architecture, cut..largest)?.values.len();
        self.cuts = cuts;
        let mut units = HeldUnits {
            weights,
            holding: *holding,
        };
        self.part = self.part.replaced(&mut units, cut, training, &self.side.values)?;
        self.saved = false;
        let placement = self.placement(None)?;
        Ok((self, Some(placement)))
    }

    /// Moves the cut between rounds.
    async fn recut(mut self, cut: usize, moments: Option<Moments>) -> Result<(Self, Option<Placement>), Error> {
        if cut == self.part.cut() {
            return Ok((self, None));
        }
        let old = self.part.cut();
        let moments = match moments {
            Some(moments) => Some(self.layout(cut.min(old)..old)?.scatter_moments(&moments)?),
            None => None,
        };
        let mut units = self.settings.units();
        let moved;
        (self.part, moved) = self.part.recut(&mut units, cut, &self.client_values, moments).await?;
        let Moved { adapter, moments } = moved;
        self.client_values = adapter;
        self.side = Arc::new(Side {
            values: self.part.adapter().await?,
            moments: self.part.moments().await?,
            exact: self.side.exact.clone(),
        });
        let moments = match moments {
            Some(moments) => Some(self.layout(old..cut)?.gather_moments(&moments)),
            None => None,
        };
        let placement = self.placement(moments)?;
        Ok((self, Some(placement)))
    }

    /// What clients get of the model as it is now cut.
    fn placement(&mut self, moments: Option<Moments>) -> Result<Placement, Error> {
        let largest = self.largest();
        let layout = self.layout(0..largest)?;
        let rule = rule(self.settings.aggregation, &layout)?;
        let KeeperSettings {
            training,
            assignment,
            ranks,
            blobs,
            weights,
            holding,
            parts: known,
            ..
        } = &mut self.settings;
        let mut units = HeldUnits {
            weights,
            holding: *holding,
        };
        let parts = parts(&mut units, blobs, known, largest)?;
        known.extend(parts.iter().skip(known.len()).cloned());
        let size = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
        let shared = self.side.values.iter().take(self.shared);
        let adapter: Vec<f32> = self.client_values.iter().chain(shared).copied().collect();
        let adapter = layout.gather(&adapter);
        Ok(Placement {
            assignment: Assignment {
                config: RunConfig {
                    split: size(largest),
                    rank: size(training.spec.rank),
                    alpha: training.spec.alpha,
                    ..assignment.config.clone()
                },
                weights: parts,
                adapter_len: adapter.len() as u64,
                ..assignment.clone()
            },
            adapter,
            moments,
            cuts: self.cuts.iter().map(|(client, cut)| (*client, size(*cut))).collect(),
            rule,
            ranks: ranks.clone(),
        })
    }

    /// Writes the whole model's adapter.
    fn save(&mut self) -> Result<(), Error> {
        if !self.saved {
            let settings = &self.settings;
            self.adapter()?.save(
                &settings.adapter_directory,
                &settings.architecture,
                &settings.base_model,
            )?;
            self.saved = true;
        }
        Ok(())
    }

    /// Saves the adapter at the end of the run, when there is no next time: rather elsewhere than nowhere.
    fn save_at_last(&self) -> Result<(), Error> {
        if self.saved {
            return Ok(());
        }
        let KeeperSettings {
            architecture,
            adapter_directory,
            base_model,
            ..
        } = &self.settings;
        let adapter = self.adapter()?;
        Ok(directory::save_at_last(adapter_directory, &|directory| {
            adapter.save(directory, architecture, base_model)
        })?)
    }

    /// The whole model's adapter at the end of the last closed round.
    fn adapter(&self) -> Result<Adapter, Error> {
        self.adapter_with(&self.side.values, self.side.exact.as_ref())
    }

    /// The whole model's adapter with these values on this side; with `exact`, its matrices have those products.
    fn adapter_with(&self, values: &[f32], exact: Option<&Exact>) -> Result<Adapter, Error> {
        let cut = self.part.cut();
        let KeeperSettings {
            architecture, training, ..
        } = &self.settings;
        let client = Adapter::from_values(architecture, &training.spec, 0..cut, self.client_values.clone())?;
        let server = Adapter::from_values(architecture, &training.spec, cut..architecture.blocks, values.to_vec())?;
        let adapter = client.merge(architecture, &server)?;
        match exact {
            Some(Exact { ranks, values }) => Ok(adapter.with_products(architecture, ranks, values)?),
            None => Ok(adapter),
        }
    }

    async fn evaluate(&self, values: &[f32], exact: Option<&Exact>) -> Result<Option<Evaluation>, Error> {
        let Some(examples) = &self.settings.validation else {
            return Ok(None);
        };
        let Training { batch, seq, .. } = self.settings.training;
        let mut batches = data::pass(examples, batch, seq)?.map(|batch| (batch.tokens, batch.targets, batch.seq));
        let adapter = self.adapter_with(values, exact)?;
        let mut units = self.settings.units();
        Ok(Some(self.part.evaluate_with(&mut units, &adapter, &mut batches).await?))
    }
}
