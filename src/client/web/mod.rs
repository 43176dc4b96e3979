//! An edge client in a browser's Worker: the session, the model and the training loop behind one object. Its JavaScript side
//! (`web/worker.js`) owns what only a browser has (sockets, timers, fetches, the tokenizer) and is told what to do with it by
//! calls of `perform` with an action: an object with a `type` and that action's fields.

mod action;
mod data;
mod driver;
mod file;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use action::endpoint_of;
pub use data::DataReader;
use driver::{Shared, State, Work};
use file::File;
use js_sys::Function;
use wasm_bindgen::prelude::*;
use web_sys::FileSystemSyncAccessHandle;

use super::{Plan, capabilities, verify};
use crate::compute::{Engine, Selection};
use crate::protocol::message::PROTOCOL_VERSION;
use crate::protocol::{ClientConfig, ClientSession};

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

    /// Takes the next part of the assigned weights from a file, in which the embedding stays: the handle must stay open until this
    /// client is freed.
    ///
    /// # Errors
    /// A JavaScript `Error`; the file must then not be kept.
    #[wasm_bindgen(js_name = loadStored)]
    pub fn load_stored(&self, handle: FileSystemSyncAccessHandle) -> Result<(), JsError> {
        let mut state = self.0.state.borrow_mut();
        let (_, loader) = state.loader.as_mut().ok_or_else(no_assignment)?;
        Ok(loader.add_stored(File::new(handle))?)
    }

    /// What the server gives weights for: for `Authorization: Bearer`; empty before this client is in.
    pub fn bearer(&self) -> String {
        self.0.state.borrow().session.bearer().unwrap_or_default()
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
        self.0.state.borrow_mut().examples = Some(reader.into_examples());
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

fn no_assignment() -> JsError {
    JsError::new("the server has not assigned anything yet")
}
