//! Actions and their fields as JavaScript objects, and failures as sentences for the page.
//!
//! Separate because here is what `web/worker.js` must agree with, field by field.

use std::fmt;
use std::time::Duration;

use js_sys::{Array, Object, Reflect};
use wasm_bindgen::prelude::*;

use super::super::Error;
use super::super::edge::{Awaited, Cause};
use crate::compute;
use crate::protocol::message::{Blob, RefusalReason};
use crate::protocol::{ClientFailure, Endpoint};
use crate::split;

/// Why this page could not do something.
#[derive(Debug)]
pub(super) enum Trouble {
    DeviceLost(String),
    Device(String),
    Fetch { reason: String, may_pass: bool },
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Trouble::DeviceLost(reason) | Trouble::Device(reason) | Trouble::Fetch { reason, .. }) = self;
        f.write_str(reason)
    }
}

impl Cause for Trouble {
    fn may_pass(&self) -> bool {
        matches!(self, Trouble::Fetch { may_pass: true, .. })
    }
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        let reason = error.to_string();
        match error {
            Error::Split(split::Error::Compute(compute::Error::DeviceLost(_)))
            | Error::Compute(compute::Error::DeviceLost(_)) => Trouble::DeviceLost(reason),
            _ => Trouble::Device(reason),
        }
    }
}

/// What is being waited for, and until when.
pub(super) fn waiting(what: Awaited, reason: Option<&str>, again_in: Duration, passed: Duration) -> String {
    let reason = reason.map(|reason| format!(" ({reason})")).unwrap_or_default();
    let what = match what {
        Awaited::Return => {
            return format!("The server is away{reason}; it is back in {}", passing(again_in));
        }
        Awaited::Server(Endpoint::Main) => "The server is out of reach",
        Awaited::Server(Endpoint::Federated) => "The federated server is out of reach",
        Awaited::Weights => "The model cannot be fetched",
    };
    let since = if passed < Duration::from_secs(1) {
        String::new()
    } else {
        format!(" (since {})", passing(passed))
    };
    format!("{what}{reason}; trying again in {}{since}", passing(again_in))
}

/// A time that passes, in whole seconds.
fn passing(time: Duration) -> String {
    let seconds = (time.as_secs_f64().ceil() as u64).max(1);
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

pub(super) fn endpoint_of(number: u8) -> Endpoint {
    if number == 0 {
        Endpoint::Main
    } else {
        Endpoint::Federated
    }
}

pub(super) fn number_of(endpoint: Endpoint) -> JsValue {
    match endpoint {
        Endpoint::Main => 0.into(),
        Endpoint::Federated => 1.into(),
    }
}

pub(super) fn object(fields: &[(&str, JsValue)]) -> Object {
    let object = Object::new();
    for (key, value) in fields {
        // Setting a field of a plain object cannot fail.
        let _ = Reflect::set(&object, &JsValue::from_str(key), value);
    }
    object
}

pub(super) fn blobs(blobs: &[Blob]) -> JsValue {
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

/// What went wrong, and what to do on the page about it.
pub(super) fn explain(failure: &ClientFailure) -> (String, String) {
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
