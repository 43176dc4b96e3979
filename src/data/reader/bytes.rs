//! Whether a file holds text at all, before anything is looked for in it; what holds none is refused by its name.
//!
//! It is separate because what it refuses must be refused whole: of an archive or a picture some scraps are valid
//! lines, and leaving the others out would train on those.

use super::super::DataError;

/// Bytes looked at to tell text from what is none.
const SAMPLE_BYTES: usize = 1 << 16;
const SAMPLE_LINES: usize = 64;

const UNPACK: &str = "unpack it first";
const EXPORT: &str = "export it as JSON lines or CSV";
const COPY_TEXT: &str = "save its text as UTF-8";
const CONVERT_UTF16: &str =
    "save it as UTF-8 (`iconv -f UTF-16 -t UTF-8 FILE > NEW`; in PowerShell, Out-File -Encoding utf8)";
const CONVERT: &str = "save it as UTF-8 (`iconv -t UTF-8 -f ENCODING FILE > NEW`)";

/// How files of known kinds begin, what they are, and what to do with them.
const KINDS: &[(&[u8], &str, &str)] = &[
    (b"\x1f\x8b", "compressed (gzip)", UNPACK),
    (b"\x28\xb5\x2f\xfd", "compressed (zstd)", UNPACK),
    (b"BZh", "compressed (bzip2)", UNPACK),
    (b"\xfd7zXZ\0", "compressed (xz)", UNPACK),
    (b"\x04\x22\x4d\x18", "compressed (lz4)", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", UNPACK),
    (
        b"PK\x03\x04",
        "a ZIP archive or an office document",
        "unpack it, or save a document's text as UTF-8 or a sheet as CSV",
    ),
    (b"PAR1", "a Parquet file", EXPORT),
    (b"ARROW1", "an Arrow file", EXPORT),
    (b"\xff\xff\xff\xff", "an Arrow stream or another binary file", EXPORT),
    (b"Obj\x01", "an Avro file", EXPORT),
    (b"ORC", "an ORC file", EXPORT),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", EXPORT),
    (b"SQLite format 3\0", "an SQLite database", EXPORT),
    (b"\x93NUMPY", "a NumPy file", EXPORT),
    (b"GGUF", "a GGUF model", "give it as --model"),
    (b"%PDF-", "a PDF document", COPY_TEXT),
    (b"{\\rtf", "a Rich Text document", COPY_TEXT),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an office document", COPY_TEXT),
    (b"\x89PNG", "a picture", COPY_TEXT),
    (b"\xff\xd8\xff", "a picture", COPY_TEXT),
    (b"GIF8", "a picture", COPY_TEXT),
    (b"RIFF", "a sound, a film or a picture", COPY_TEXT),
    (b"ID3", "a sound", COPY_TEXT),
    (b"OggS", "a sound", COPY_TEXT),
    (b"fLaC", "a sound", COPY_TEXT),
    (b"\x7fELF", "a program", COPY_TEXT),
    (b"MZ\x90", "a program", COPY_TEXT),
];

/// The text of a file without a byte order mark. Bytes that are no UTF-8 may be left in it: each line is checked for
/// itself.
pub(super) fn text<'a>(bytes: &'a [u8], name: &str) -> Result<&'a [u8], DataError> {
    let text = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes);
    match kind(text) {
        None => Ok(text),
        Some((what, advice)) => Err(DataError::NotText {
            file: name.to_owned(),
            what,
            advice,
        }),
    }
}

/// What bytes are and what to do with them, if they do not look like text in UTF-8.
fn kind(bytes: &[u8]) -> Option<(&'static str, &'static str)> {
    if bytes.starts_with(b"\xff\xfe\0\0") || bytes.starts_with(b"\0\0\xfe\xff") {
        return Some(("UTF-32 text", CONVERT));
    }
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") {
        return Some(("UTF-16 text", CONVERT_UTF16));
    }
    if let Some(&(_, what, advice)) = KINDS.iter().find(|(start, ..)| bytes.starts_with(start)) {
        // Words may begin like that, binary files do not go on like words.
        if start_is_no_word(bytes) {
            return Some((what, advice));
        }
    }
    if bytes.get(257..262) == Some(b"ustar") {
        return Some(("a tar archive", UNPACK));
    }
    let sample = &bytes[..bytes.len().min(SAMPLE_BYTES)];
    let zeros = |first: usize| sample.iter().skip(first).step_by(2).filter(|&&byte| byte == 0).count();
    let (even, odd) = (zeros(0), zeros(1));
    let pairs = sample.len() / 2;
    // Latin text in UTF-16 has a zero in nearly every other byte; other scripts have them for spaces and line ends.
    if even.max(odd) >= 4 && even.max(odd) * 10 > pairs && even.min(odd) * 10 < even.max(odd) {
        return Some(("UTF-16 text without the mark that says so", CONVERT_UTF16));
    }
    let controls = sample
        .iter()
        .filter(|&&byte| matches!(byte, 0..=7 | 14..=26 | 28..=31 | 0x7f))
        .count();
    if controls * 100 > sample.len() {
        return Some(("a binary file", "give a text file, JSON lines or CSV"));
    }
    let lines: Vec<&[u8]> = sample.split(|&byte| byte == b'\n').take(SAMPLE_LINES).collect();
    let foreign = lines.iter().filter(|line| !is_utf8_start(line)).count();
    if lines.len() >= 8 && 2 * foreign > lines.len() {
        return Some(("text in another encoding than UTF-8", CONVERT));
    }
    None
}

/// Whether what follows the first letters of a file is other than a line of text.
fn start_is_no_word(bytes: &[u8]) -> bool {
    let start = &bytes[..bytes.len().min(64)];
    start.starts_with(b"%PDF-")
        || start.starts_with(b"{\\rtf")
        || !is_utf8_start(start)
        || start
            .iter()
            .any(|byte| byte.is_ascii_control() && !matches!(byte, b'\t' | b'\n' | b'\r'))
}

/// Whether a line, which a sample may have cut, is UTF-8.
fn is_utf8_start(line: &[u8]) -> bool {
    match std::str::from_utf8(line) {
        Ok(_) => true,
        Err(error) => error.error_len().is_none(),
    }
}
