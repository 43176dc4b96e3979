//! The model parts that are handed to clients, by the hash of their contents.
//!
//! It is separate from the run so that they are written in one place.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use sha2::{Digest as _, Sha256};

use super::Error;
use crate::protocol::message::{Blob, Digest};

/// Files served by the hash of their content. More can be added while others are served.
#[derive(Debug, Default)]
pub struct Blobs {
    directory: PathBuf,
    files: Mutex<BTreeMap<Digest, PathBuf>>,
}

impl Blobs {
    /// Blobs to be written into `directory`, which is made if it does not exist.
    ///
    /// # Errors
    /// [`disk::Error::File`].
    pub fn create(directory: &Path) -> Result<Self, Error> {
        fs::create_dir_all(directory).map_err(|error| Error::file("create", directory, error))?;
        Ok(Self {
            directory: directory.to_owned(),
            files: Mutex::default(),
        })
    }

    /// Writes one blob, without holding it in memory. `write` gives the contents.
    ///
    /// # Errors
    /// [`disk::Error::File`].
    pub fn add(&self, name: &str, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<Blob, Error> {
        let temporary = self.directory.join(format!(".{name}.tmp"));
        let fail = |error| {
            let _ = fs::remove_file(&temporary);
            Error::file("write", &temporary, error)
        };
        let file = fs::File::create(&temporary).map_err(fail)?;
        let mut output = Hashing {
            inner: BufWriter::new(file),
            hash: Sha256::new(),
            bytes: 0,
        };
        write(&mut output).and_then(|()| output.inner.flush()).map_err(fail)?;
        let sha256 = Digest(output.hash.finalize().into());
        let path = self.directory.join(sha256.to_string());
        fs::rename(&temporary, &path).map_err(fail)?;
        self.files().insert(sha256, path);
        Ok(Blob {
            name: name.to_owned(),
            sha256,
            bytes: output.bytes,
        })
    }

    /// The file of a blob.
    pub fn path(&self, sha256: &Digest) -> Option<PathBuf> {
        self.files().get(sha256).cloned()
    }

    fn files(&self) -> std::sync::MutexGuard<'_, BTreeMap<Digest, PathBuf>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes the files, which can be made again from the model.
    pub fn remove(&self) {
        for path in self.files().values() {
            // A leftover costs disk space only.
            let _ = fs::remove_file(path);
        }
        let _ = fs::remove_dir(&self.directory);
    }
}

impl Drop for Blobs {
    fn drop(&mut self) {
        self.remove();
    }
}

struct Hashing<W> {
    inner: W,
    hash: Sha256,
    bytes: u64,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// SHA-256 of a file's contents.
///
/// # Errors
/// [`disk::Error::File`].
pub fn file_digest(path: &Path) -> Result<Digest, Error> {
    let fail = |error| Error::file("read", path, error);
    let mut file = fs::File::open(path).map_err(fail)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer).map_err(fail)? {
            0 => return Ok(Digest(hash.finalize().into())),
            read => hash.update(&buffer[..read]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blob_is_named_by_its_content() {
        let directory = tempfile::tempdir().unwrap();
        let blobs = Blobs::create(&directory.path().join("weights")).unwrap();
        let blob = blobs.add("block.0", |output| output.write_all(b"abc")).unwrap();
        assert_eq!(blob.sha256, Digest::of(b"abc"));
        assert_eq!(blob.bytes, 3);
        let path = blobs.path(&blob.sha256).unwrap();
        assert_eq!(file_digest(&path).unwrap(), blob.sha256);
        assert_eq!(blobs.path(&Digest::of(b"other")), None);
        drop(blobs);
        assert!(!path.exists());
    }
}
