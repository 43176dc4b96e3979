//! Actions and their fields as JavaScript objects, and failures as sentences for the page.
//!
//! Separate because here is what `web/worker.js` must agree with, field by field.

use js_sys::{Array, Object, Reflect};
use wasm_bindgen::prelude::*;

use crate::protocol::message::{Blob, RefusalReason};
use crate::protocol::{ClientFailure, Endpoint};

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
