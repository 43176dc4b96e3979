//! The session between JavaScript and the learner: actions out, work done piece by piece.
//!
//! Separate from `EdgeClient`, whose methods JavaScript calls: here nothing is called from outside.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use js_sys::{Function, Reflect, Uint8Array};
use wasm_bindgen::prelude::*;
use wasm_bindgen_futures::spawn_local;

use super::super::{Error, Learner, Loader, Plan};
use super::action::{blobs, explain, number_of, object};
use super::now;
use crate::compute::{self, Engine};
use crate::data::Example;
use crate::protocol::message::{Assignment, Blob, Gradient, RoundResult};
use crate::protocol::{ActivationsInput, AdapterInput, ClientEvent, ClientSession, Endpoint, FinishReason, Transmit};
use crate::split;
use crate::terms::ids::{RoundKey, StepKey};
use crate::terms::moments::Moments;
use crate::terms::speed::Speed;

/// What the session wants computed, in order.
pub(super) enum Work {
    Measure,
    BeginRound,
    Install { values: Vec<f32>, moments: Option<Moments> },
    Forward(StepKey),
    Backward(Gradient),
    Upload { round: RoundKey, split: u32, steps: u64 },
}

/// What was computed.
enum Done {
    Nothing,
    Measure(Option<Speed>),
    Forward(ActivationsInput),
    Backward {
        key: StepKey,
        loss: f32,
        tokens: u64,
        took: Duration,
    },
    Upload(AdapterInput),
}

pub(super) struct State {
    pub session: ClientSession,
    /// Grows with every assignment, so that work for an old one is recognised when it ends.
    pub generation: u64,
    pub plan: Option<Plan>,
    /// With the generation it is for.
    pub loader: Option<(u64, Loader)>,
    pub examples: Option<Vec<Example>>,
    pub learner: Option<Learner>,
    pub work: VecDeque<Work>,
    pub working: bool,
    /// Waits for the learner to be free.
    pub next_assignment: Option<Box<Plan>>,
    /// The timeout JavaScript was last told.
    pub timer: Option<Duration>,
    pub over: bool,
}

pub(super) struct Shared {
    pub engine: Engine,
    pub perform: Function,
    pub state: RefCell<State>,
}

impl Shared {
    fn perform(&self, action: &str, fields: &[(&str, JsValue)]) {
        let object = object(fields);
        let _ = Reflect::set(&object, &"type".into(), &action.into());
        if let Err(error) = self.perform.call1(&JsValue::NULL, &object) {
            wasm_bindgen::throw_val(error);
        }
    }

    pub fn with_session(self: &Rc<Self>, call: impl FnOnce(&mut ClientSession, Duration)) {
        call(&mut self.state.borrow_mut().session, now());
        self.pump();
    }

    /// Drains what the session gives out, then sees to the timer and the work.
    pub fn pump(self: &Rc<Self>) {
        loop {
            // Two statements: the borrow must end before JavaScript is called.
            let transmit = self.state.borrow_mut().session.poll_transmit();
            if let Some(transmit) = transmit {
                self.transmit(transmit);
                continue;
            }
            let event = self.state.borrow_mut().session.poll_event();
            match event {
                Some(event) => self.handle(event),
                None => break,
            }
        }
        let timer = {
            let mut state = self.state.borrow_mut();
            let due = state.session.poll_timeout().filter(|_| !state.over);
            let changed = due != state.timer;
            state.timer = due;
            due.filter(|_| changed)
        };
        if let Some(due) = timer {
            let wait = due.saturating_sub(now()).as_secs_f64() * 1000.0;
            self.perform("timer", &[("milliseconds", wait.ceil().into())]);
        }
        self.work();
    }

    fn transmit(&self, transmit: Transmit<Endpoint>) {
        match transmit {
            Transmit::Frame { to, bytes } => {
                let bytes = Uint8Array::from(&bytes[..]);
                self.perform("send", &[("endpoint", number_of(to)), ("bytes", bytes.into())]);
            }
            Transmit::Close { to } => self.perform("close", &[("endpoint", number_of(to))]),
        }
    }

    fn handle(self: &Rc<Self>, event: ClientEvent) {
        match event {
            ClientEvent::Connect { endpoint, url } => self.perform(
                "connect",
                &[
                    ("endpoint", number_of(endpoint)),
                    ("url", url.map_or(JsValue::NULL, |url| url.into())),
                ],
            ),
            ClientEvent::ConnectionLost { endpoint, retry_at, .. } => {
                let wait = retry_at.saturating_sub(now()).as_secs_f64() * 1000.0;
                self.perform(
                    "lost",
                    &[("endpoint", number_of(endpoint)), ("milliseconds", wait.into())],
                );
            }
            ClientEvent::Assigned(assignment) => self.assigned(&assignment),
            ClientEvent::InstallAdapter { values, moments, .. } => self.queue(Work::Install { values, moments }),
            ClientEvent::RoundStarted { round, members } => {
                self.queue(Work::BeginRound);
                self.perform(
                    "round",
                    &[("round", (round.round + 1).into()), ("members", members.into())],
                );
            }
            ClientEvent::ComputeForward { key } => self.queue(Work::Forward(key)),
            ClientEvent::ComputeBackward { gradient, .. } => self.queue(Work::Backward(gradient)),
            ClientEvent::UploadAdapter { round, split, steps } => self.queue(Work::Upload { round, split, steps }),
            ClientEvent::RoundResult(result) => self.result(&result),
            ClientEvent::Finished(reason) => self.finish(&reason),
            ClientEvent::Failed(failure) => {
                let (title, remedy) = explain(&failure);
                self.fail(&title, &remedy);
            }
        }
    }

    fn assigned(self: &Rc<Self>, assignment: &Assignment) {
        match Plan::new(assignment) {
            Ok(plan) => {
                let mut state = self.state.borrow_mut();
                // What is being loaded goes on until `assigned` is performed, and is then of no use.
                state.generation += 1;
                state.work.clear();
                state.next_assignment = Some(Box::new(plan));
            }
            Err(error) => self.fail("This run needs something this page cannot do", &error.to_string()),
        }
    }

    /// Begins to load an assignment. What the learner of the last one leaves on the device is used again.
    async fn assign(self: &Rc<Self>, plan: Plan, learner: Option<Learner>) -> Result<(), Error> {
        let generation = self.state.borrow().generation;
        let held = match learner {
            Some(learner) => Some(learner.release().await?),
            None => None,
        };
        let mut loader = Loader::new(&self.engine, &plan, now, held)?;
        let examples = loader.take_data();
        let tokenizer: Vec<Blob> = plan
            .tokenizer()
            .filter(|_| examples.is_none())
            .into_iter()
            .cloned()
            .collect();
        let fields = [
            ("weights", blobs(loader.missing())),
            ("tokenizer", blobs(&tokenizer)),
            ("needsText", examples.is_none().into()),
            (
                "endToken",
                plan.architecture.eos.map_or(JsValue::UNDEFINED, JsValue::from),
            ),
            ("rounds", plan.rounds.into()),
            ("localSteps", plan.local_steps.into()),
        ];
        {
            let mut state = self.state.borrow_mut();
            if state.generation != generation {
                // Yet another one came; everything is loaded afresh for that.
                return Ok(());
            }
            state.loader = Some((generation, loader));
            state.examples = examples;
            state.plan = Some(plan);
        }
        self.perform("assigned", &fields);
        Ok(())
    }

    fn result(&self, result: &RoundResult) {
        let loss = result.valid_loss.unwrap_or(f64::NAN);
        self.perform(
            "result",
            &[
                ("round", (result.round + 1).into()),
                ("step", result.steps.into()),
                ("members", result.included.into()),
                ("validLoss", loss.into()),
                ("validPerplexity", loss.exp().into()),
            ],
        );
    }

    fn finish(&self, reason: &FinishReason) {
        self.state.borrow_mut().over = true;
        let (completed, message) = match reason {
            FinishReason::Completed => (true, "The run is complete; the server has the adapter.".to_owned()),
            FinishReason::Left => (false, "You left the run; it goes on without this device.".to_owned()),
            FinishReason::Stopped { detail, .. } => {
                return self.fail(
                    "The server ended the run early",
                    &format!("{detail}. It keeps what was learned up to the last full round."),
                );
            }
        };
        self.perform(
            "finished",
            &[("completed", completed.into()), ("message", message.into())],
        );
    }

    fn fail(&self, title: &str, remedy: &str) {
        self.state.borrow_mut().over = true;
        self.perform("failed", &[("title", title.into()), ("remedy", remedy.into())]);
    }

    fn queue(&self, work: Work) {
        self.state.borrow_mut().work.push_back(work);
    }

    /// Starts the work that waits, one piece after the other, unless that is under way.
    pub fn work(self: &Rc<Self>) {
        {
            let mut state = self.state.borrow_mut();
            let idle = state.next_assignment.is_none() && (state.learner.is_none() || state.work.is_empty());
            if state.working || state.over || idle {
                return;
            }
            state.working = true;
        }
        let shared = Rc::clone(self);
        spawn_local(async move {
            shared.work_off().await;
            shared.state.borrow_mut().working = false;
            // Another assignment's work may have come meanwhile.
            shared.work();
        });
    }

    async fn work_off(self: &Rc<Self>) {
        loop {
            // The learner is taken out for the time of the work: frames are handled meanwhile.
            let (plan, learner) = {
                let mut state = self.state.borrow_mut();
                if state.over {
                    return;
                }
                (state.next_assignment.take(), state.learner.take())
            };
            if let Some(plan) = plan {
                if let Err(error) = self.assign(*plan, learner).await {
                    return self.give_up(&error);
                }
                continue;
            }
            let Some(mut learner) = learner else { return };
            let work = self.state.borrow_mut().work.pop_front();
            let Some(work) = work else {
                self.state.borrow_mut().learner = Some(learner);
                return;
            };
            let generation = self.state.borrow().generation;
            let done = run(&mut learner, work).await;
            let outdated = {
                let mut state = self.state.borrow_mut();
                // Kept in any case: the next assignment goes on from it.
                state.learner = Some(learner);
                state.generation != generation
            };
            match done {
                Ok(_) if outdated => {}
                Ok(done) => self.answer(done),
                Err(error) => return self.give_up(&error),
            }
        }
    }

    fn answer(self: &Rc<Self>, done: Done) {
        if matches!(done, Done::Measure(_)) {
            self.perform("waiting", &[]);
        }
        let refused = {
            let mut state = self.state.borrow_mut();
            let local_steps = state.plan.as_ref().map_or(0, |plan| plan.local_steps);
            let session = &mut state.session;
            match done {
                Done::Nothing => Ok(None),
                Done::Measure(speed) => {
                    session.ready(now(), speed);
                    Ok(None)
                }
                Done::Forward(input) => session.activations(now(), input).map(|()| None),
                Done::Backward {
                    key,
                    loss,
                    tokens,
                    took,
                } => {
                    session.step_done(now(), key, took);
                    let step = key.round.round * local_steps + key.step + 1;
                    Ok(Some((key, step, loss, tokens)))
                }
                Done::Upload(input) => session.adapter(now(), input).map(|()| None),
            }
        };
        match refused {
            Ok(Some((key, step, loss, tokens))) => self.perform(
                "step",
                &[
                    ("round", (key.round.round + 1).into()),
                    ("step", step.into()),
                    ("loss", loss.into()),
                    ("tokens", (tokens as f64).into()),
                ],
            ),
            Ok(None) => {}
            Err(error) => self.fail("This page and the server do not agree", &error.to_string()),
        }
        self.pump();
    }

    /// Leaves the run because the device or the server's data failed.
    fn give_up(self: &Rc<Self>, error: &Error) {
        self.state.borrow_mut().session.leave(now());
        loop {
            let transmit = self.state.borrow_mut().session.poll_transmit();
            match transmit {
                Some(transmit) => self.transmit(transmit),
                None => break,
            }
        }
        self.state.borrow_mut().over = true;
        let lost = matches!(
            error,
            Error::Split(split::Error::Compute(compute::Error::DeviceLost(_)))
        );
        if lost {
            self.perform("deviceLost", &[("message", error.to_string().into())]);
        } else {
            self.fail("Training stopped on this device", &error.to_string());
        }
    }
}

async fn run(learner: &mut Learner, work: Work) -> Result<Done, Error> {
    Ok(match work {
        Work::BeginRound => {
            learner.begin_round();
            Done::Nothing
        }
        Work::Measure => Done::Measure(learner.speed().await?),
        Work::Install { values, moments } => {
            learner.install(&values, moments).await?;
            Done::Nothing
        }
        Work::Forward(key) => Done::Forward(learner.forward(key).await?),
        Work::Backward(gradient) => {
            let (key, loss, tokens) = (gradient.key, gradient.loss, gradient.tokens);
            let took = learner.backward(gradient).await?;
            Done::Backward {
                key,
                loss,
                tokens,
                took,
            }
        }
        Work::Upload { round, split, steps } => Done::Upload(learner.adapter(round, split, steps).await?),
    })
}
