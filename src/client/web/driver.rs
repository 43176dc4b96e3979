//! The machine's outputs carried out: actions for JavaScript, and tasks for the trainer.
//!
//! Separate from `EdgeClient`, whose methods JavaScript calls: here nothing is called from outside, and nothing is decided.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use js_sys::{Function, Reflect, Uint8Array};
use wasm_bindgen::prelude::*;
use wasm_bindgen_futures::spawn_local;

use super::super::Trainer;
use super::super::edge::{Edge, Failure, Fetch, Output, Report, Task};
use super::action::{Trouble, blobs, explain, number_of, object, waiting};
use super::now;
use crate::compute::Engine;
use crate::protocol::message::RoundResult;
use crate::protocol::{ClientFailure, FinishReason};

pub(super) struct State {
    pub edge: Edge<Trouble>,
    /// Taken out while it works.
    pub trainer: Option<Trainer>,
    /// The number of what JavaScript was last told to fetch.
    pub fetch: u64,
    /// The timeout JavaScript was last told.
    pub timer: Option<Duration>,
}

impl State {
    /// The trainer, if what JavaScript was told to fetch is still wanted.
    pub fn loading(&mut self) -> Option<&mut Trainer> {
        match self.edge.is_fetching(self.fetch) {
            true => self.trainer.as_mut(),
            false => None,
        }
    }
}

pub(super) struct Shared {
    pub engine: Engine,
    pub perform: Function,
    pub state: RefCell<State>,
}

impl Shared {
    /// What JavaScript has to say to it.
    fn perform(&self, action: &str, fields: &[(&str, JsValue)]) -> JsValue {
        let object = object(fields);
        let _ = Reflect::set(&object, &"type".into(), &action.into());
        match self.perform.call1(&JsValue::NULL, &object) {
            Ok(answer) => answer,
            Err(error) => wasm_bindgen::throw_val(error),
        }
    }

    pub fn tell(self: &Rc<Self>, call: impl FnOnce(&mut Edge<Trouble>, Duration)) {
        call(&mut self.state.borrow_mut().edge, now());
        self.pump();
    }

    /// Carries out all that the machine asks for, then sees to the timer.
    pub fn pump(self: &Rc<Self>) {
        loop {
            // Two statements: the borrow must end before JavaScript is called.
            let output = self.state.borrow_mut().edge.poll();
            match output {
                Some(output) => self.carry_out(output),
                None => break,
            }
        }
        let timer = {
            let mut state = self.state.borrow_mut();
            let due = state.edge.poll_timeout();
            let changed = due != state.timer;
            state.timer = due;
            due.filter(|_| changed)
        };
        if let Some(due) = timer {
            let wait = due.saturating_sub(now()).as_secs_f64() * 1000.0;
            self.perform("timer", &[("milliseconds", wait.ceil().into())]);
        }
    }

    fn carry_out(self: &Rc<Self>, output: Output<Trouble>) {
        match output {
            Output::Connect { endpoint, url } => {
                let url = url.map_or(JsValue::NULL, |url| url.into());
                self.perform("connect", &[("endpoint", number_of(endpoint)), ("url", url)]);
            }
            Output::Transmit { endpoint, bytes } => {
                let bytes = Uint8Array::from(&bytes[..]);
                self.perform("send", &[("endpoint", number_of(endpoint)), ("bytes", bytes.into())]);
            }
            Output::Close { endpoint } => {
                self.perform("close", &[("endpoint", number_of(endpoint))]);
            }
            Output::Fetch(fetch) => self.fetch(&fetch),
            Output::Compute(task) => self.compute(task),
            Output::Store(bytes) => {
                let bytes = Uint8Array::from(&bytes[..]);
                let fault = self.perform("store", &[("bytes", bytes.into())]).as_string();
                let stored = fault.map_or(Ok(()), Err);
                self.state.borrow_mut().edge.stored(now(), stored);
            }
            Output::Forget => {
                self.perform("forget", &[]);
            }
            Output::Show(report) => self.show(&report),
            Output::End(Ok(reason)) => self.finish(&reason),
            Output::End(Err(failure)) => self.fail(&failure),
        }
    }

    fn fetch(&self, fetch: &Fetch) {
        let (needs_data, missing, end_token) = {
            let mut state = self.state.borrow_mut();
            state.fetch = fetch.number;
            let Some(loader) = state.trainer.as_mut().and_then(Trainer::loader) else {
                return;
            };
            // Of a fetch that broke off a part may be there.
            let missing = blobs(loader.missing());
            (loader.needs_data(), missing, loader.plan().architecture.eos)
        };
        let tokenizer = fetch.wanted.tokenizer.as_slice();
        self.perform(
            "fetch",
            &[
                ("weights", missing),
                ("tokenizer", blobs(if needs_data { tokenizer } else { &[] })),
                ("needsText", needs_data.into()),
                ("endToken", end_token.map_or(JsValue::UNDEFINED, JsValue::from)),
            ],
        );
    }

    fn compute(self: &Rc<Self>, task: Task) {
        let shared = Rc::clone(self);
        spawn_local(async move {
            // Frames are handled meanwhile.
            let trainer = shared.state.borrow_mut().trainer.take();
            // There is one task at a time.
            let Some(mut trainer) = trainer else { return };
            let done = trainer.run(task).await.map_err(Trouble::from);
            shared.state.borrow_mut().trainer = Some(trainer);
            shared.tell(|edge, now| edge.done(now, done));
        });
    }

    fn show(&self, report: &Report) {
        match report {
            Report::Connected | Report::Fetching { .. } => {}
            Report::Admitted { client, again } => {
                let client = client.0 as f64;
                self.perform("admitted", &[("client", client.into()), ("again", (*again).into())]);
            }
            Report::OtherRun => {
                self.perform("otherRun", &[]);
            }
            Report::Unknown => self.note("The server does not know this page any more; it joins as a new one"),
            Report::OtherData => self.note("The text is not what it was; it begins anew"),
            Report::Waiting {
                what,
                reason,
                again_in,
                passed,
                ..
            } => {
                let message = waiting(*what, reason.as_deref(), *again_in, *passed);
                self.perform("lost", &[("message", message.into())]);
            }
            Report::Assigned { rounds, local_steps } => {
                self.perform(
                    "plan",
                    &[("rounds", (*rounds).into()), ("localSteps", (*local_steps).into())],
                );
            }
            Report::Loaded { .. } => {
                self.perform("waiting", &[]);
            }
            Report::RoundStarted { round, members, .. } => {
                self.perform("round", &[("round", (*round).into()), ("members", (*members).into())]);
            }
            Report::Step {
                round,
                step,
                loss,
                tokens,
                ..
            } => {
                self.perform(
                    "step",
                    &[
                        ("round", (*round).into()),
                        ("step", (*step).into()),
                        ("loss", (*loss).into()),
                        ("tokens", (*tokens as f64).into()),
                    ],
                );
            }
            Report::Round(result) => self.result(result),
            Report::Unsaved { detail } => {
                self.note(&format!(
                    "This page would not find its way back after a reload: {detail}"
                ));
            }
            Report::Saved => self.note(""),
        }
    }

    fn note(&self, message: &str) {
        self.perform("note", &[("message", message.into())]);
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
        let (completed, message) = match reason {
            FinishReason::Completed => (true, "The run is complete; the server has the adapter."),
            FinishReason::Left => (false, "You left the run; it goes on without this device."),
            FinishReason::Stopped { detail } => {
                let remedy = format!("{detail}. It keeps what was learned up to the last full round.");
                return self.failed("The server ended the run early", &remedy, true);
            }
        };
        self.perform(
            "finished",
            &[("completed", completed.into()), ("message", message.into())],
        );
    }

    fn fail(&self, failure: &Failure<Trouble>) {
        let keeps = matches!(
            failure,
            Failure::Session(ClientFailure::Unreachable { .. }) | Failure::Driver(_)
        );
        let (title, remedy) = match failure {
            Failure::Session(failure) => explain(failure),
            Failure::Answer(error) => ("This page and the server do not agree".to_owned(), error.to_string()),
            Failure::Driver(Trouble::DeviceLost(message)) => {
                self.perform("deviceLost", &[("message", message.into())]);
                return;
            }
            Failure::Driver(Trouble::Device(reason)) => ("Training stopped on this device".to_owned(), reason.clone()),
            Failure::Driver(Trouble::Fetch { reason, .. }) => {
                ("The model or the text could not be loaded".to_owned(), reason.clone())
            }
        };
        self.failed(&title, &remedy, keeps);
    }

    /// `keeps` is whether what is kept may be of use again.
    fn failed(&self, title: &str, remedy: &str, keeps: bool) {
        let fields = [
            ("title", title.into()),
            ("remedy", remedy.into()),
            ("keeps", keeps.into()),
        ];
        self.perform("failed", &fields);
    }
}
