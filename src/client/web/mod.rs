//! An edge client in a browser's Worker: the machine, the model and the training loop behind one object. Its JavaScript side
//! (`web/worker.js`) owns what only a browser has (sockets, timers, fetches, the tokenizer) and is told what to do with it by
//! calls of `perform` with an action: an object with a `type` and that action's fields.

mod action;
mod data;
mod driver;
mod file;

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use action::{Trouble, endpoint_of, object};
pub use data::DataReader;
use driver::{Shared, State};
use file::File;
use js_sys::Function;
use wasm_bindgen::prelude::*;
use web_sys::FileSystemSyncAccessHandle;

use super::edge::{self, Edge};
use super::{Trainer, capabilities, verify};
use crate::compute::{Engine, Selection};
use crate::protocol::ClientConfig;

#[wasm_bindgen]
extern "C" {
    /// Milliseconds since the Worker began.
    #[wasm_bindgen(js_namespace = performance, js_name = now)]
    fn milliseconds() -> f64;
}

fn now() -> Duration {
    Duration::from_secs_f64(milliseconds().max(0.0) / 1000.0)
}

/// Where the page is from.
fn origin() -> String {
    let field = |object: &JsValue, name: &str| js_sys::Reflect::get(object, &name.into()).ok();
    let location = field(&js_sys::global(), "location");
    let origin = location.and_then(|location| field(&location, "origin")?.as_string());
    origin.unwrap_or_default()
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

/// What a client keeps of a run, for people: `{client, round}`; rounds count from 1.
///
/// # Errors
/// A JavaScript `Error`: nothing can be gone on with.
#[wasm_bindgen(js_name = readState)]
pub fn read_state(bytes: &[u8]) -> Result<js_sys::Object, JsError> {
    let state = edge::State::decode(bytes)?;
    let round = state.checkpoints.last().map_or(0, |checkpoint| checkpoint.round);
    Ok(object(&[
        ("client", (state.passport.client.0 as f64).into()),
        ("round", (round + 1).into()),
    ]))
}

/// A client of one run. No method may be called from within `perform`.
#[wasm_bindgen]
pub struct EdgeClient(Rc<Shared>);

#[wasm_bindgen]
impl EdgeClient {
    /// `name` and `device_name` are shown to people; `secret` is the join token, empty for none; `keeps` is whether `store` can be
    /// performed, and `kept` what was stored before, if it is to be gone on with.
    #[wasm_bindgen(constructor)]
    pub fn new(
        device: &Device,
        name: String,
        device_name: String,
        secret: String,
        keeps: bool,
        kept: Option<Vec<u8>>,
        perform: Function,
    ) -> Self {
        let client = ClientConfig {
            secret: (!secret.is_empty()).then_some(secret),
            seed: js_sys::Math::random().to_bits(),
            ..ClientConfig::new(name, capabilities(&device_name, 0))
        };
        let config = edge::Config {
            client,
            server: origin(),
            keeps,
            resume: kept.and_then(|kept| edge::State::decode(&kept).ok()),
        };
        Self(Rc::new(Shared {
            engine: device.0.clone(),
            perform,
            state: RefCell::new(State {
                edge: Edge::new(config, now()),
                trainer: Some(Trainer::new(&device.0, now)),
                fetch: 0,
                timer: None,
            }),
        }))
    }

    /// Begins: the first actions come from here.
    pub fn start(&self) {
        self.0.pump();
    }

    /// The socket asked for by `connect` is open. Endpoint 0 is the main server, 1 the federated server.
    pub fn connected(&self, endpoint: u8) {
        self.0.tell(|edge, now| edge.connected(endpoint_of(endpoint), now));
    }

    /// The socket closed, or could not be opened.
    pub fn disconnected(&self, endpoint: u8) {
        self.0
            .tell(|edge, now| edge.disconnected(endpoint_of(endpoint), now, None));
    }

    /// A binary message came.
    pub fn frame(&self, endpoint: u8, bytes: &[u8]) {
        self.0.tell(|edge, now| edge.frame(endpoint_of(endpoint), now, bytes));
    }

    /// The time told by `timer` has come.
    pub fn timeout(&self) {
        self.0.state.borrow_mut().timer = None;
        self.0.tell(|edge, now| edge.timeout(now));
    }

    /// Says goodbye; `finished` follows.
    pub fn leave(&self) {
        self.0.tell(|edge, now| edge.leave(now));
    }

    /// Takes the next part of the assigned weights to the device.
    ///
    /// # Errors
    /// A JavaScript `Error`; the bytes must then not be kept.
    #[wasm_bindgen(js_name = loadWeights)]
    pub fn load_weights(&self, bytes: Vec<u8>) -> Result<(), JsError> {
        let mut state = self.0.state.borrow_mut();
        if let Some(loader) = state.loading().and_then(Trainer::loader) {
            loader.add(bytes)?;
        }
        Ok(())
    }

    /// Takes the next part of the assigned weights from a file, in which the embedding stays: the handle must stay open until this
    /// client is freed.
    ///
    /// # Errors
    /// A JavaScript `Error`; the file must then not be kept.
    #[wasm_bindgen(js_name = loadStored)]
    pub fn load_stored(&self, handle: FileSystemSyncAccessHandle) -> Result<(), JsError> {
        let mut state = self.0.state.borrow_mut();
        if let Some(loader) = state.loading().and_then(Trainer::loader) {
            loader.add_stored(File::new(handle))?;
        }
        Ok(())
    }

    /// What the server gives weights for: for `Authorization: Bearer`; empty before this client is in.
    pub fn bearer(&self) -> String {
        self.0.state.borrow().edge.bearer().unwrap_or_default()
    }

    /// Bytes of the buffers on the device.
    #[wasm_bindgen(js_name = bufferBytes)]
    pub fn buffer_bytes(&self) -> f64 {
        self.0.engine.buffer_bytes() as f64
    }

    /// Checks a tokenizer before it is used.
    ///
    /// # Errors
    /// A JavaScript `Error`; the bytes must then not be kept.
    #[wasm_bindgen(js_name = checkTokenizer)]
    pub fn check_tokenizer(&self, bytes: &[u8]) -> Result<(), JsError> {
        let mut state = self.0.state.borrow_mut();
        let plan = state.loading().and_then(|trainer| trainer.plan());
        if let Some(blob) = plan.and_then(|plan| plan.tokenizer()) {
            verify(blob, bytes)?;
        }
        Ok(())
    }

    /// Begins to read a data file for this run.
    ///
    /// # Errors
    /// A JavaScript `Error` with file, line and reason.
    #[wasm_bindgen(js_name = readData)]
    pub fn read_data(&self, bytes: &[u8], name: &str) -> Result<DataReader, JsError> {
        let mut state = self.0.state.borrow_mut();
        let plan = state.loading().and_then(|trainer| trainer.plan());
        let options = plan.ok_or_else(not_wanted)?.data_options();
        DataReader::begin(bytes, name, &options)
    }

    /// Takes the examples that a reader has made.
    #[wasm_bindgen(js_name = takeData)]
    pub fn take_data(&self, reader: DataReader) {
        let mut state = self.0.state.borrow_mut();
        if let Some(loader) = state.loading().and_then(Trainer::loader) {
            loader.set_data(reader.into_examples());
        }
    }

    /// What was to be fetched is there.
    pub fn fetched(&self) {
        let number = self.0.state.borrow().fetch;
        self.0.tell(|edge, now| edge.fetched(now, number, Ok(())));
    }

    /// What was to be fetched could not be had; `may_pass` is whether trying again in a moment could help.
    #[wasm_bindgen(js_name = notFetched)]
    pub fn not_fetched(&self, reason: String, may_pass: bool) {
        let number = self.0.state.borrow().fetch;
        let trouble = Trouble::Fetch { reason, may_pass };
        self.0.tell(|edge, now| edge.fetched(now, number, Err(trouble)));
    }
}

fn not_wanted() -> JsError {
    JsError::new("it is not wanted any more")
}
