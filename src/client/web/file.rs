//! A file of the browser's private file system, read as native code reads one.
//!
//! Separate because here JavaScript's numbers and errors become Rust's.

use std::io::{self, Read, Seek, SeekFrom};

use wasm_bindgen::JsValue;
use web_sys::{FileSystemReadWriteOptions, FileSystemSyncAccessHandle};

/// An open file with a position. Whoever opened it closes it: reading fails from then on.
pub(super) struct File {
    handle: FileSystemSyncAccessHandle,
    at: u64,
}

impl File {
    pub fn new(handle: FileSystemSyncAccessHandle) -> Self {
        Self { handle, at: 0 }
    }
}

impl Read for File {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let options = FileSystemReadWriteOptions::new();
        options.set_at(self.at as f64);
        let count = (self.handle)
            .read_with_u8_array_and_options(bytes, &options)
            .map_err(failure)?;
        self.at += count as u64;
        Ok(count as usize)
    }
}

impl Seek for File {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        let (from, by) = match position {
            SeekFrom::Start(at) => (at, 0),
            SeekFrom::End(by) => (self.handle.get_size().map_err(failure)? as u64, by),
            SeekFrom::Current(by) => (self.at, by),
        };
        self.at = from
            .checked_add_signed(by)
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(self.at)
    }
}

fn failure(error: JsValue) -> io::Error {
    let message = js_sys::Error::from(error).message();
    io::Error::other(String::from(message))
}
