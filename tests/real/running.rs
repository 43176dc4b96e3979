//! A process of this program that never outlives its test.

use std::io::Read;
use std::process::{Child, ExitStatus};

/// A process that is ended with its test.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It has ended by itself unless the test failed.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    /// Waits for the end; gives what was written to stderr, if nobody has taken that.
    pub fn finish(mut self) -> (ExitStatus, String) {
        let mut said = String::new();
        if let Some(mut stderr) = self.0.stderr.take() {
            stderr.read_to_string(&mut said).unwrap();
        }
        (self.0.wait().unwrap(), said)
    }
}
