//! An edge client in a browser's Worker: the session, the model and the training loop behind one object. Its JavaScript side
//! (`web/worker.js`) owns what only a browser has (sockets, timers, fetches, the tokenizer) and is told what to do with it by
//! calls of `perform` with an action: an object with a `type` and that action's fields.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use js_sys::{Array, Function, Int32Array, Object, Reflect, Uint8Array, Uint32Array};
use wasm_bindgen::prelude::*;
use wasm_bindgen_futures::spawn_local;

use super::{Error, Learner, Loader, Plan, capabilities, verify};
use crate::compute::{self, Engine, Selection};
use crate::data::json::Json;
use crate::data::reader::Document;
use crate::data::{Conversation, DataError, Encoded, Example, Flaw, Marks, Options, Render};
use crate::protocol::message::{Assignment, Blob, Gradient, PROTOCOL_VERSION, RefusalReason, RoundResult};
use crate::protocol::{
    ActivationsInput, AdapterInput, ClientConfig, ClientEvent, ClientFailure, ClientSession, Endpoint, FinishReason,
    Transmit,
};
use crate::split;
use crate::terms::ids::{RoundKey, StepKey};
use crate::terms::moments::Moments;
use crate::terms::speed::Speed;

/// Attempts to reach a server again before giving up.
const RETRIES: u32 = 12;

#[wasm_bindgen]
extern "C" {
    /// Milliseconds since the Worker began.
    #[wasm_bindgen(js_namespace = performance, js_name = now)]
    fn milliseconds() -> f64;
}

fn now() -> Duration {
    Duration::from_secs_f64(milliseconds().max(0.0) / 1000.0)
}

/// Makes a panic readable in the browser's console.
#[wasm_bindgen(start)]
pub fn start() {
    console_error_panic_hook::set_once();
}

/// An opened device.
#[wasm_bindgen]
pub struct Device(Engine);

/// Opens a device, named as for `--device`.
///
/// # Errors
/// A JavaScript `Error` that says what is missing.
#[wasm_bindgen(js_name = openDevice)]
pub async fn open_device(selection: String) -> Result<Device, JsError> {
    let selection = match selection.parse::<Selection>() {
        Ok(selection) => selection,
        Err(never) => match never {},
    };
    Ok(Device(Engine::open(&selection).await?))
}

/// What the session wants computed, in order.
enum Work {
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

struct State {
    session: ClientSession,
    /// Grows with every assignment, so that work for an old one is recognised when it ends.
    generation: u64,
    plan: Option<Plan>,
    /// With the generation it is for.
    loader: Option<(u64, Loader)>,
    examples: Option<Vec<Example>>,
    learner: Option<Learner>,
    work: VecDeque<Work>,
    working: bool,
    /// Waits for the learner to be free.
    next_assignment: Option<Box<Plan>>,
    /// The timeout JavaScript was last told.
    timer: Option<Duration>,
    over: bool,
}

struct Shared {
    engine: Engine,
    perform: Function,
    state: RefCell<State>,
}

/// A client of one run. No method may be called from within `perform`.
#[wasm_bindgen]
pub struct EdgeClient(Rc<Shared>);

#[wasm_bindgen]
impl EdgeClient {
    /// `name` and `device_name` are shown to people; `secret` is the join token, empty for none.
    #[wasm_bindgen(constructor)]
    pub fn new(device: &Device, name: String, device_name: String, secret: String, perform: Function) -> Self {
        let config = ClientConfig {
            version: PROTOCOL_VERSION,
            name,
            capabilities: capabilities(&device_name, 0),
            model: None,
            tokenizer: None,
            secret: (!secret.is_empty()).then_some(secret),
            retries: RETRIES,
        };
        Self(Rc::new(Shared {
            engine: device.0.clone(),
            perform,
            state: RefCell::new(State {
                session: ClientSession::new(config, now()),
                generation: 0,
                plan: None,
                loader: None,
                examples: None,
                learner: None,
                work: VecDeque::new(),
                working: false,
                next_assignment: None,
                timer: None,
                over: false,
            }),
        }))
    }

    /// Begins: the first actions come from here.
    pub fn start(&self) {
        self.0.pump();
    }

    /// The socket asked for by `connect` is open. Endpoint 0 is the main server, 1 the federated server.
    pub fn connected(&self, endpoint: u8) {
        self.0
            .with_session(|session, now| session.connected(endpoint_of(endpoint), now));
    }

    /// The socket closed, or could not be opened.
    pub fn disconnected(&self, endpoint: u8) {
        self.0
            .with_session(|session, now| session.disconnected(endpoint_of(endpoint), now));
    }

    /// A binary message came.
    pub fn frame(&self, endpoint: u8, bytes: &[u8]) {
        self.0
            .with_session(|session, now| session.handle_frame(endpoint_of(endpoint), now, bytes));
    }

    /// The time told by `timer` has come.
    pub fn timeout(&self) {
        self.0.state.borrow_mut().timer = None;
        self.0.with_session(|session, now| session.handle_timeout(now));
    }

    /// Says goodbye; `finished` follows.
    pub fn leave(&self) {
        self.0.with_session(|session, now| session.leave(now));
    }

    /// Takes the next part of the assigned weights to the device.
    ///
    /// # Errors
    /// A JavaScript `Error`; the bytes must then not be kept.
    #[wasm_bindgen(js_name = loadWeights)]
    pub fn load_weights(&self, bytes: Vec<u8>) -> Result<(), JsError> {
        let mut state = self.0.state.borrow_mut();
        let (_, loader) = state.loader.as_mut().ok_or_else(no_assignment)?;
        Ok(loader.add(bytes)?)
    }

    /// Checks a tokenizer before it is used.
    ///
    /// # Errors
    /// A JavaScript `Error`; the bytes must then not be kept.
    #[wasm_bindgen(js_name = checkTokenizer)]
    pub fn check_tokenizer(&self, bytes: &[u8]) -> Result<(), JsError> {
        let state = self.0.state.borrow();
        let blob = state
            .plan
            .as_ref()
            .and_then(Plan::tokenizer)
            .ok_or_else(no_assignment)?;
        Ok(verify(blob, bytes)?)
    }

    /// Begins to read a data file for this run.
    ///
    /// # Errors
    /// A JavaScript `Error` with file, line and reason.
    #[wasm_bindgen(js_name = readData)]
    pub fn read_data(&self, bytes: &[u8], name: &str) -> Result<DataReader, JsError> {
        let state = self.0.state.borrow();
        let options = state.plan.as_ref().ok_or_else(no_assignment)?.data_options();
        DataReader::begin(bytes, name, &options)
    }

    /// Takes the examples that a reader has made.
    #[wasm_bindgen(js_name = takeData)]
    pub fn take_data(&self, reader: DataReader) {
        self.0.state.borrow_mut().examples = Some(reader.examples);
    }

    /// Puts weights and data together, measures the device and reports ready.
    ///
    /// # Errors
    /// A JavaScript `Error` that names what is missing or does not fit the device.
    pub fn prepare(&self) -> Result<(), JsError> {
        {
            let mut state = self.0.state.borrow_mut();
            let state = &mut *state;
            let current = state.generation;
            if state
                .loader
                .as_ref()
                .is_some_and(|(generation, _)| *generation != current)
            {
                // Word of the next assignment is on its way.
                return Ok(());
            }
            let (_, loader) = state.loader.take().ok_or_else(no_assignment)?;
            let examples = state.examples.take().ok_or_else(no_assignment)?;
            state.learner = Some(loader.finish(examples)?);
            state.work.push_back(Work::Measure);
        }
        self.0.work();
        Ok(())
    }
}

/// A data file on its way to examples. Chat templates are run and texts are tokenised by JavaScript: first
/// `renderNext` until there is no conversation left, then `takeTranscript` for each of `transcripts`, then `assemble` with
/// the ids of `texts`.
#[wasm_bindgen]
pub struct DataReader {
    document: Option<Document>,
    chats: Vec<Encoded>,
    examples: Vec<Example>,
}

#[wasm_bindgen]
impl DataReader {
    /// Recognises what a file holds and parses it; `seq` and `vocab` are the longest example and the vocabulary's size.
    ///
    /// # Errors
    /// A JavaScript `Error` with file, line and reason.
    #[wasm_bindgen(constructor)]
    pub fn new(bytes: &[u8], name: &str, seq: usize, vocab: usize) -> Result<DataReader, JsError> {
        Self::begin(bytes, name, &Options::new(seq, vocab))
    }

    /// Conversations that the file holds.
    pub fn conversations(&self) -> usize {
        self.document.as_ref().map_or(0, Document::conversations)
    }

    /// Lays the next conversation out as text; `false` when there is none left. `render` is given the template's
    /// variables as JSON and whether the beginning of an answer is wanted, and gives back the text; no value where the
    /// model has no chat template. `special_tokens` are those that stand for no text.
    ///
    /// # Errors
    /// A JavaScript `Error` with file, line and reason.
    #[wasm_bindgen(js_name = renderNext)]
    pub fn render_next(&mut self, render: Option<Function>, special_tokens: Vec<String>) -> Result<bool, JsError> {
        let template = render.map(|render| Template { render, special_tokens });
        let template = template.as_ref().map(|template| template as &dyn Render);
        match &mut self.document {
            Some(document) => Ok(document.render_next(template)?),
            None => Ok(false),
        }
    }

    /// The texts to tokenise.
    pub fn texts(&self) -> Vec<String> {
        self.document
            .as_ref()
            .map_or_else(Vec::new, |document| document.texts().to_vec())
    }

    /// The texts of conversations, to tokenise with the byte at which each token ends.
    pub fn transcripts(&self) -> Vec<String> {
        self.document
            .as_ref()
            .map_or_else(Vec::new, |document| document.transcripts().to_vec())
    }

    /// Takes the ids of the next transcript, and the byte of it at which each of them ends.
    #[wasm_bindgen(js_name = takeTranscript)]
    pub fn take_transcript(&mut self, ids: Vec<u32>, ends: Vec<u32>) {
        self.chats.push(Encoded { ids, ends });
    }

    /// Makes the examples, of the ids of all texts, one after the other, and how many each text has; `begin` and `end`
    /// are put around texts.
    ///
    /// # Errors
    /// A JavaScript `Error`, when they do not fit the texts or the model.
    pub fn assemble(&mut self, ids: &[u32], lengths: &[u32], begin: Vec<u32>, end: Option<u32>) -> Result<(), JsError> {
        let Some(document) = self.document.take() else {
            return Ok(());
        };
        let mut rest = ids;
        let mut texts = Vec::with_capacity(lengths.len());
        for &length in lengths {
            let (text, after) = rest.split_at_checked(length as usize).ok_or(DataError::TextCount {
                expected: lengths.len(),
                found: texts.len(),
            })?;
            texts.push(text.to_vec());
            rest = after;
        }
        let chats = std::mem::take(&mut self.chats);
        self.examples = document.assemble(texts, chats, &Marks { begin, end })?.examples;
        Ok(())
    }

    /// Ids and labels of example `index` as `[ids, labels]`; nothing beyond the last.
    pub fn example(&self, index: usize) -> Option<Array> {
        let example = self.examples.get(index)?;
        Some(Array::of2(
            &Uint32Array::from(&example.ids[..]).into(),
            &Int32Array::from(&example.labels[..]).into(),
        ))
    }
}

impl DataReader {
    fn begin(bytes: &[u8], name: &str, options: &Options) -> Result<Self, JsError> {
        Ok(Self {
            document: Some(Document::parse(bytes, name, options)?),
            chats: Vec::new(),
            examples: Vec::new(),
        })
    }
}

/// A chat template that JavaScript runs.
struct Template {
    render: Function,
    special_tokens: Vec<String>,
}

impl Render for Template {
    fn render(&self, conversation: &Conversation, add_generation_prompt: bool) -> Result<String, Flaw> {
        let fields = conversation.messages.iter().flat_map(|message| &message.fields);
        let mut values = fields.map(|(_, value)| value).chain(&conversation.tools);
        if values.any(Json::has_whole_float) {
            return Err(Flaw::new(
                "a number like 1.0 in it is written as 1 in a browser; write 1, or use the native client (sflllm join)",
            ));
        }
        let variables = serde_json::to_string(conversation).map_err(|error| Flaw::new(error.to_string()))?;
        let text = self
            .render
            .call2(&JsValue::NULL, &variables.into(), &add_generation_prompt.into())
            .map_err(|error| {
                let message = error
                    .dyn_into::<js_sys::Error>()
                    .map(|error| String::from(error.message()));
                Flaw::new(format!(
                    "the chat template refuses it: {}",
                    message.unwrap_or_else(|_| "no reason given".to_owned())
                ))
            })?;
        text.as_string()
            .ok_or_else(|| Flaw::new("the chat template writes no text"))
    }

    fn special_tokens(&self) -> &[String] {
        &self.special_tokens
    }
}

fn no_assignment() -> JsError {
    JsError::new("the server has not assigned anything yet")
}

fn endpoint_of(number: u8) -> Endpoint {
    if number == 0 {
        Endpoint::Main
    } else {
        Endpoint::Federated
    }
}

fn number_of(endpoint: Endpoint) -> JsValue {
    match endpoint {
        Endpoint::Main => 0.into(),
        Endpoint::Federated => 1.into(),
    }
}

fn object(fields: &[(&str, JsValue)]) -> Object {
    let object = Object::new();
    for (key, value) in fields {
        // Setting a field of a plain object cannot fail.
        let _ = Reflect::set(&object, &JsValue::from_str(key), value);
    }
    object
}

fn blobs(blobs: &[Blob]) -> JsValue {
    let list = Array::new();
    for blob in blobs {
        list.push(&object(&[
            ("name", blob.name.as_str().into()),
            ("sha256", blob.sha256.to_string().into()),
            ("bytes", (blob.bytes as f64).into()),
        ]));
    }
    list.into()
}

impl Shared {
    fn perform(&self, action: &str, fields: &[(&str, JsValue)]) {
        let object = object(fields);
        let _ = Reflect::set(&object, &"type".into(), &action.into());
        if let Err(error) = self.perform.call1(&JsValue::NULL, &object) {
            wasm_bindgen::throw_val(error);
        }
    }

    fn with_session(self: &Rc<Self>, call: impl FnOnce(&mut ClientSession, Duration)) {
        call(&mut self.state.borrow_mut().session, now());
        self.pump();
    }

    /// Drains what the session gives out, then sees to the timer and the work.
    fn pump(self: &Rc<Self>) {
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
            ("endToken", plan.config.eos.map_or(JsValue::UNDEFINED, JsValue::from)),
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
    fn work(self: &Rc<Self>) {
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

/// What went wrong, and what to do on the page about it.
fn explain(failure: &ClientFailure) -> (String, String) {
    let (title, remedy) = match failure {
        ClientFailure::Refused { refused, .. } => match refused.reason {
            RefusalReason::SecretMissing | RefusalReason::SecretWrong => (
                "The join code is missing or wrong",
                "Scan the server's QR code again, or open its whole join link, with the part after #.".to_owned(),
            ),
            RefusalReason::Version => (
                "This page is older or newer than the server",
                "Reload the page, without the browser's cache.".to_owned(),
            ),
            reason => (
                "The server did not let this page in",
                format!("{reason}. {}", refused.detail),
            ),
        },
        ClientFailure::Unreachable { .. } => (
            "The server is out of reach",
            "See that it still runs and that this device is on its network, then join again.".to_owned(),
        ),
        other => ("The server ended this page's part in the run", other.to_string()),
    };
    (title.to_owned(), remedy)
}
