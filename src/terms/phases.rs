//! The four parts of a client's local step, in the order in which they happen.
//!
//! What is asked, measured, predicted, planned and logged of a step has the same parts; only what is known of each differs: a time,
//! a sum of times, a number of seconds, a number for each client.

use std::ops::AddAssign;
use std::time::Duration;

use serde::Serialize;

/// The parts of a local step of one client, or of each client where `T` is a list. Numbers are seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Phases<T> {
    /// The client's forward pass to the cut.
    #[serde(rename = "forward_s")]
    pub forward: T,
    /// Activations on their way to the server.
    #[serde(rename = "upload_s")]
    pub upload: T,
    /// Their gradient on its way back.
    #[serde(rename = "download_s")]
    pub download: T,
    /// The client's backward pass, with its optimiser step.
    #[serde(rename = "backward_s")]
    pub backward: T,
}

impl<T> Phases<T> {
    /// What `of` makes of each phase.
    pub fn map<U>(self, mut of: impl FnMut(T) -> U) -> Phases<U> {
        Phases {
            forward: of(self.forward),
            upload: of(self.upload),
            download: of(self.download),
            backward: of(self.backward),
        }
    }

    /// The phases by reference.
    pub fn as_ref(&self) -> Phases<&T> {
        Phases {
            forward: &self.forward,
            upload: &self.upload,
            download: &self.download,
            backward: &self.backward,
        }
    }
}

impl<T: AddAssign> AddAssign for Phases<T> {
    fn add_assign(&mut self, other: Self) {
        self.forward += other.forward;
        self.upload += other.upload;
        self.download += other.download;
        self.backward += other.backward;
    }
}

impl Phases<Duration> {
    /// The phases in seconds.
    pub fn as_secs_f64(self) -> Phases<f64> {
        self.map(|time| time.as_secs_f64())
    }
}

impl<T: Copy> Phases<Vec<T>> {
    /// Those of one client.
    ///
    /// # Panics
    /// If a list has no such client.
    pub fn of(&self, client: usize) -> Phases<T> {
        self.as_ref().map(|of_clients| of_clients[client])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_are_written_in_seconds() {
        let mut times = Phases {
            forward: Duration::from_millis(500),
            ..Phases::default()
        };
        times += times;
        assert_eq!(
            serde_json::to_value(times.as_secs_f64()).unwrap(),
            serde_json::json!({ "forward_s": 1.0, "upload_s": 0.0, "download_s": 0.0, "backward_s": 0.0 })
        );
    }
}
