//! Claims about weight formats and GGUF files: what is held without loss, what is read, and what is refused how.

use std::alloc::{GlobalAlloc, Layout as Allocation, System};
use std::cell::Cell;
use std::io::Cursor;
use std::path::PathBuf;

use half::f16;
use proptest::prelude::*;
use serde_json::{Value as Json, json};
use sflllm::model::architecture::Family;
use sflllm::model::gguf::GgufError;
use sflllm::model::gguf::blocks::{BlockType, Repacker, blocks_of};
use sflllm::model::gguf::container::Gguf;
use sflllm::model::gguf::header::{ModelHeader, Rope, RopeScaling};
use sflllm::model::gguf::metadata::{Array, Metadata, Value};
use sflllm::model::gguf::model::GgufModel;
use sflllm::model::gguf::names::{half_split_rows, interleaved_rows};
use sflllm::model::gguf::tokenizer::GgufTokenizer;
use sflllm::model::gguf::writer::GgufWriter;
use sflllm::terms::format::{Encoder, Format, FormatError, GROUP, Layout, Packed};

/// A reproducible sequence of numbers from a standard normal distribution.
fn gaussian(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    };
    (0..count)
        .map(|_| ((-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32)
        .collect()
}

fn relative_rms(found: &[f32], expected: &[f32]) -> f64 {
    let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>();
    let error = squares(
        &mut found
            .iter()
            .zip(expected)
            .map(|(found, expected)| f64::from(found - expected)),
    );
    (error / squares(&mut expected.iter().map(|&value| f64::from(value)))).sqrt()
}

// ---- formats

#[test]
fn formats_are_named_as_they_are_spelled() {
    for format in Format::ALL {
        assert_eq!(format.to_string().parse(), Ok(format));
        assert_eq!(serde_json::to_value(format).unwrap(), format.name());
        assert_eq!(serde_json::from_value::<Format>(format.name().into()).unwrap(), format);
    }
    for wrong in ["", "F16", "q5", "int8"] {
        assert!(
            matches!(wrong.parse::<Format>(), Err(FormatError::Name { .. })),
            "{wrong}"
        );
    }
}

#[test]
fn gaussian_weights_lose_as_little_as_promised() {
    let values: Vec<f32> = gaussian(7, 1 << 16).iter().map(|value| 0.02 * value).collect();
    for (format, bound) in [
        (Format::F32, 0.0),
        (Format::F16, 3e-4),
        (Format::Q8, 0.0056),
        (Format::Q4, 0.074),
    ] {
        let words = format.encode(&values, 128, 512).unwrap();
        let error = relative_rms(&format.decode(&words, 128, 512), &values);
        assert!(error <= bound, "{format}: {error}");
        let bits = words.len() as f64 * 32.0 / values.len() as f64;
        assert_eq!(bits, format.bits_per_weight());
    }
}

#[test]
fn the_layout_is_the_documented_one() {
    // Two rows of 34: a whole group and one of two.
    let values: Vec<f32> = (0..68).map(|i| i as f32).collect();
    let f16_words = Format::F16.encode(&values[..3], 1, 3).unwrap();
    let half = |value: f32| u32::from(f16::from_f32(value).to_bits());
    assert_eq!(f16_words, [half(0.0) | half(1.0) << 16, half(2.0)]);

    let layout = Format::Q8.layout(2, 34);
    let q8 = layout.encode(&values).unwrap();
    assert_eq!((layout.groups(), layout.scales_at(), layout.words()), (2, 32, 34));
    let scale = |group: usize| f16::from_bits((q8[32 + group / 2] >> (16 * (group % 2))) as u16).to_f32();
    let code = |word: usize, byte: usize| f32::from(q8[word].to_le_bytes()[byte] as i8);
    assert_eq!(code(7, 3), 127.0);
    for (value, word, byte, group) in [(31.0f32, 7, 3, 0), (33.0, 8, 1, 1), (34.0, 16, 0, 2), (67.0, 24, 1, 3)] {
        assert_eq!(
            scale(group),
            f16::from_f32(value.max([31.0, 33.0, 65.0, 67.0][group]) / 127.0).to_f32()
        );
        assert!((code(word, byte) * scale(group) - value).abs() <= 0.51 * scale(group));
    }
    assert!(q8[8] >> 16 == 0 && q8[9..16].iter().all(|&word| word == 0));

    // Codes, scale and minimum that 4 bits hold exactly.
    let exact: Vec<f32> = (0..68).map(|i| 0.5 * (i % 34 % 16) as f32 - 3.0).collect();
    let layout = Format::Q4.layout(2, 34);
    let q4 = layout.encode(&exact).unwrap();
    assert_eq!((layout.scales_at(), layout.words()), (16, 20));
    assert_eq!(q4[..4], [0x7654_3210, 0xfedc_ba98, 0x7654_3210, 0xfedc_ba98]);
    assert_eq!(q4[16], half(0.5) | half(-3.0) << 16);
    // The short group holds 0 · 0.5 − 3 and 1 · 0.5 − 3, as the ends of its range.
    assert_eq!(q4[4..8], [0xf0, 0, 0, 0]);
    assert_eq!(layout.decode(&q4)[..32], exact[..32]);
}

/// A format and a shape, mostly of awkward sizes.
fn layouts() -> impl Strategy<Value = Layout> {
    let columns = prop_oneof![1usize..9, 28usize..37, 62usize..70, Just(0usize)];
    (prop::sample::select(Format::ALL.to_vec()), 0usize..6, columns)
        .prop_map(|(format, rows, columns)| format.layout(rows, columns))
}

proptest! {
    #[test]
    fn values_come_back_within_the_formats_step(layout in layouts(), seed: u64, exponent in -4i32..4) {
        let scale = 10f32.powi(exponent);
        let values: Vec<f32> = gaussian(seed, layout.elements()).iter().map(|value| scale * value).collect();
        let words = layout.encode(&values).unwrap();
        prop_assert_eq!(words.len(), layout.words());
        prop_assert_eq!(layout.check(&words), Ok(()));
        let decoded = layout.decode(&words);
        let width = layout.columns.max(1);
        for (row, (found, expected)) in decoded.chunks(width).zip(values.chunks(width)).enumerate() {
            let mut one = vec![0.0; layout.columns];
            layout.decode_row(&words, row, &mut one);
            prop_assert_eq!(&one[..], found);
            for (group, (found, expected)) in found.chunks(GROUP).zip(expected.chunks(GROUP)).enumerate() {
                let mut one = [f32::NAN; GROUP];
                layout.decode_group(&words, row, group, &mut one);
                prop_assert_eq!(&one[..found.len()], found);
                prop_assert!(one[found.len()..].iter().all(|&value| value == 0.0));
                let largest = expected.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
                let bound = match layout.format {
                    Format::F32 => 0.0,
                    Format::F16 => largest / 2048.0 + 3e-8,
                    Format::Q8 => 0.51 * largest / 127.0 + 4e-6,
                    Format::Q4 => 0.2 * 2.0 * largest + 1e-6,
                };
                for (found, expected) in found.iter().zip(expected) {
                    prop_assert!((found - expected).abs() <= bound, "{} {} {:?}", found, expected, layout);
                }
            }
        }
        if !layout.format.is_quantised() {
            prop_assert_eq!(layout.decode(&layout.encode(&decoded).unwrap()), decoded);
        }
    }

    #[test]
    fn pieces_of_any_length_encode_as_the_whole(layout in layouts(), seed: u64, piece in 1usize..80) {
        let values = gaussian(seed, layout.elements());
        let mut encoder = Encoder::new(layout);
        for piece in values.chunks(piece) {
            encoder.push(piece).unwrap();
        }
        prop_assert_eq!(encoder.finish().unwrap(), layout.encode(&values).unwrap());
    }

    #[test]
    fn selected_rows_are_the_rows(layout in layouts(), seed: u64, order in prop::collection::vec(0usize..6, 0..9)) {
        let order: Vec<usize> = order.into_iter().filter(|&row| row < layout.rows).collect();
        let packed = Packed::encode(layout, &gaussian(seed, layout.elements())).unwrap();
        let all = packed.decode();
        let selected = packed.select_rows(&order);
        prop_assert_eq!(selected.layout().check(selected.words()), Ok(()));
        let rows = order.iter().flat_map(|&row| &all[row * layout.columns..][..layout.columns]);
        let expected: Vec<f32> = rows.copied().collect();
        prop_assert_eq!(selected.decode(), expected);
    }

    #[test]
    fn words_from_outside_are_taken_or_refused(
        layout in layouts(), words in prop::collection::vec(any::<u32>(), 0..200), fit: bool,
    ) {
        let mut words = words;
        if fit {
            words.resize(layout.words(), 0);
        }
        if let Ok(packed) = Packed::new(layout, words) {
            prop_assert!(packed.decode().iter().all(|value| value.is_finite()));
        }
    }
}

#[test]
fn values_that_a_format_cannot_hold_are_named() {
    let mut values = vec![1.0f32; 2 * 40];
    values[75] = -7e4;
    for format in [Format::F16, Format::Q4] {
        let error = format.encode(&values, 2, 40).unwrap_err();
        let expected = FormatError::Overflow {
            format,
            row: 1,
            column: 35,
            value: -7e4,
        };
        assert_eq!(error, expected);
        assert!(error.to_string().contains("-70000"), "{error}");
    }
    let q8 = Format::Q8.encode(&values, 2, 40).unwrap();
    assert!((Format::Q8.decode(&q8, 2, 40)[75] + 7e4).abs() < 40.0);
    values[75] = 1e7;
    assert!(matches!(
        Format::Q8.encode(&values, 2, 40),
        Err(FormatError::Overflow { row: 1, column: 35, .. })
    ));
    values[75] = f32::NAN;
    for format in Format::ALL {
        assert_eq!(
            format.encode(&values, 2, 40),
            Err(FormatError::NotFinite { row: 1 }),
            "{format}"
        );
        assert!(
            matches!(format.encode(&values, 2, 39), Err(FormatError::Length { .. })),
            "{format}"
        );
        assert!(
            matches!(format.encode(&values, 2, 41), Err(FormatError::Length { .. })),
            "{format}"
        );
    }
}

#[test]
fn constant_and_tiny_groups_are_held() {
    for value in [0.0f32, 1.0, -0.37, 3e-5, 1e-7] {
        let values = [value; 45];
        for format in Format::ALL {
            let decoded = format.decode(&format.encode(&values, 1, 45).unwrap(), 1, 45);
            for found in decoded {
                assert!(
                    (found - value).abs() <= value.abs() / 200.0 + 6e-8,
                    "{format}: {found} for {value}"
                );
            }
        }
    }
}

#[test]
fn words_with_dirty_padding_are_refused() {
    for format in [Format::F16, Format::Q8, Format::Q4] {
        let layout = format.layout(3, 33);
        let words = layout.encode(&gaussian(3, layout.elements())).unwrap();
        let mut refused = 0;
        for word in 0..words.len() {
            for bit in 0..32 {
                let mut changed = words.clone();
                changed[word] ^= 1 << bit;
                refused += usize::from(matches!(layout.check(&changed), Err(FormatError::Padding { .. })));
            }
        }
        let expected = match format {
            Format::F16 => 16,
            // In each row all bits of the second group but those of its one code.
            Format::Q8 => 3 * (8 * 32 - 8),
            _ => 3 * (4 * 32 - 4),
        };
        assert_eq!(refused, expected, "{format}");
    }
}

// ---- the container

fn fixture(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/gguf")
        .join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn open(name: &str) -> Gguf {
    Gguf::open(name, Cursor::new(fixture(name))).unwrap()
}

fn open_bytes(bytes: &[u8]) -> Result<Gguf, GgufError> {
    Gguf::open("a.gguf", Cursor::new(bytes.to_vec()))
}

#[test]
fn every_kind_of_metadata_is_read() {
    let gguf = open("metadata.gguf");
    let expected: Vec<(&str, Value, Value)> = vec![
        ("u8", 255u8.into(), vec![0u8, 255].into()),
        ("i8", 127i8.into(), vec![-128i8, 127].into()),
        ("u16", 65535u16.into(), vec![0u16, 65535].into()),
        ("i16", 32767i16.into(), vec![i16::MIN, i16::MAX].into()),
        ("u32", u32::MAX.into(), vec![0, u32::MAX].into()),
        ("i32", i32::MAX.into(), vec![i32::MIN, i32::MAX].into()),
        ("f32", (-1.25f32).into(), vec![0.5f32, -1.25].into()),
        ("u64", u64::MAX.into(), vec![0, u64::MAX].into()),
        ("i64", i64::MAX.into(), vec![i64::MIN, i64::MAX].into()),
        ("f64", (-1e300f64).into(), vec![0.1f64, -1e300].into()),
        ("bool", true.into(), Value::Array(Array::Bool(vec![false, true]))),
        (
            "string",
            "naïve 🙂 text".into(),
            vec![String::new(), "naïve 🙂 text".to_owned()].into(),
        ),
    ];
    for (name, one, many) in expected {
        assert_eq!(gguf.metadata().get(&format!("one.{name}")), Some(&one));
        assert_eq!(gguf.metadata().get(&format!("many.{name}")), Some(&many));
    }
    let texts = |texts: &[&str]| Array::String(texts.iter().map(|&text| text.to_owned()).collect());
    let nested = Array::Array(vec![texts(&["a", "b"]), texts(&["c"])]);
    assert_eq!(gguf.metadata().get("nested"), Some(&Value::Array(nested)));
    let inner = |values: &[i32]| Array::I32(values.to_vec());
    let deeper = Array::Array(vec![
        Array::Array(vec![inner(&[1, 2]), inner(&[3])]),
        Array::Array(vec![inner(&[4])]),
    ]);
    assert_eq!(gguf.metadata().get("deeper"), Some(&Value::Array(deeper)));
    assert_eq!(gguf.metadata().get("none"), None);
}

#[test]
fn tensors_are_found_at_their_alignment() {
    let mut gguf = open("metadata.gguf");
    assert_eq!(gguf.tensors()[1].range.start - gguf.tensors()[0].range.start, 64);
    assert_eq!(gguf.read("odd", &[3]).unwrap(), [0.0, 1.0, 2.0]);
    assert_eq!(
        gguf.read("after", &[2, 5]).unwrap(),
        (0..10).map(|i| i as f32).collect::<Vec<_>>()
    );
    let mut rows = [0.0; 15];
    gguf.rows("after", [2, 5], [1, 0, 1].into_iter(), &mut rows).unwrap();
    assert_eq!(
        rows.map(|value| value as usize),
        [5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    );
    let mut rows = [0.0; 5];
    assert!(matches!(
        gguf.rows("after", [2, 5], [2].into_iter(), &mut rows),
        Err(GgufError::Row { row: 2, rows: 2, .. })
    ));
    assert!(matches!(gguf.read("after", &[5, 2]), Err(GgufError::Shape { .. })));
    assert!(matches!(gguf.read("before", &[5, 2]), Err(GgufError::Missing { .. })));
}

/// Metadata and tensors of a file, written again.
fn rewritten(gguf: &mut Gguf) -> Vec<u8> {
    let tensors = gguf.tensors().to_vec();
    let table: Vec<_> = tensors
        .iter()
        .map(|info| (info.name.clone(), info.dimensions.clone(), info.stored.block.unwrap()))
        .collect();
    let mut writer = GgufWriter::begin(Vec::new(), gguf.metadata(), &table).unwrap();
    for info in &tensors {
        gguf.for_each_chunk(info, |bytes| {
            writer.write(bytes).unwrap();
            Ok(())
        })
        .unwrap();
    }
    writer.finish().unwrap()
}

#[test]
fn a_file_written_again_is_the_same_file() {
    for name in ["metadata.gguf", "llama.gguf", "gpt2.gguf", "qwen2.gguf", "qwen3.gguf"] {
        assert!(rewritten(&mut open(name)) == fixture(name), "{name}");
    }
}

#[test]
fn empty_arrays_and_files_without_tensors_are_written_and_read() {
    let mut metadata = Metadata::default();
    metadata.set("empty", Vec::<f32>::new());
    metadata.set("texts", Vec::<String>::new());
    metadata.set("empty", vec![1.0f32]);
    metadata.set("empty", Vec::<f32>::new());
    let bytes = GgufWriter::begin(Vec::new(), &metadata, &[]).unwrap().finish().unwrap();
    let read = open_bytes(&bytes).unwrap();
    assert!(read.metadata().iter().eq(metadata.iter()));
    assert!(read.tensors().is_empty());
}

/// A header of a version with counts, and what follows.
fn file(version: u32, tensors: u64, keys: u64, rest: &[&[u8]]) -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(version.to_le_bytes());
    bytes.extend(tensors.to_le_bytes());
    bytes.extend(keys.to_le_bytes());
    bytes.extend(rest.concat());
    bytes
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// An entry of the table.
fn entry(name: &str, dimensions: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut bytes = text(name);
    bytes.extend((dimensions.len() as u32).to_le_bytes());
    bytes.extend(dimensions.iter().flat_map(|size| size.to_le_bytes()));
    bytes.extend(kind.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}

#[test]
fn versions_two_and_three_are_read_and_others_refused_by_name() {
    let mut bytes = fixture("metadata.gguf");
    bytes[4] = 2;
    assert!(open_bytes(&bytes).is_ok());
    for version in [0, 1, 4] {
        bytes[4] = version;
        let error = open_bytes(&bytes).unwrap_err();
        assert!(
            matches!(error, GgufError::Version { found, .. } if found == u32::from(version)),
            "{error}"
        );
    }
    bytes[4..8].copy_from_slice(&3u32.to_be_bytes());
    assert!(matches!(open_bytes(&bytes), Err(GgufError::BigEndian { .. })));
    assert!(matches!(open_bytes(b"GGML"), Err(GgufError::Magic { .. })));
    assert!(matches!(open_bytes(b""), Err(GgufError::Magic { .. })));
}

#[test]
fn damaged_tables_are_refused_by_name() {
    let data = [0; 256];
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (file(3, u64::MAX, 0, &[]), "the table of tensors"),
        (file(3, 0, u64::MAX, &[]), "the metadata"),
        (
            file(3, 0, 1, &[&text("k"), &8u32.to_le_bytes(), &u64::MAX.to_le_bytes()]),
            "k takes",
        ),
        (
            file(
                3,
                0,
                1,
                &[
                    &text("k"),
                    &9u32.to_le_bytes(),
                    &8u32.to_le_bytes(),
                    &(1u64 << 60).to_le_bytes(),
                ],
            ),
            "k takes",
        ),
        (
            file(
                3,
                0,
                1,
                &[
                    &text("k"),
                    &9u32.to_le_bytes(),
                    &12u32.to_le_bytes(),
                    &(1u64 << 61).to_le_bytes(),
                ],
            ),
            "k takes",
        ),
        (
            file(3, 0, 1, &[&text("k"), &13u32.to_le_bytes(), &[0; 8]]),
            "unknown kind 13",
        ),
        (
            file(3, 0, 1, &[&text("k"), &7u32.to_le_bytes(), &[2]]),
            "neither 0 nor 1",
        ),
        (
            file(
                3,
                0,
                2,
                &[
                    &text("k"),
                    &0u32.to_le_bytes(),
                    &[1],
                    &text("k"),
                    &0u32.to_le_bytes(),
                    &[1],
                ],
            ),
            "`k` is there twice",
        ),
        (
            file(3, 0, 1, &[&8u64.to_le_bytes(), &[0xff; 8], &0u32.to_le_bytes(), &[1]]),
            "not UTF-8",
        ),
        (file(3, 1, 0, &[&entry("t", &[4; 5], 0, 0), &data]), "5 dimensions"),
        (file(3, 1, 0, &[&entry("t", &[4], 5, 0), &data]), "unknown type 5"),
        (file(3, 1, 0, &[&entry("t", &[0], 0, 0), &data]), "dimensions [0]"),
        (file(3, 1, 0, &[&entry("t", &[u64::MAX, 2], 0, 0), &data]), "dimensions"),
        (file(3, 1, 0, &[&entry("t", &[1 << 62], 0, 0), &data]), "dimensions"),
        (
            file(3, 1, 0, &[&entry("t", &[16, 2], 8, 0), &data]),
            "Q8_0 comes in blocks of 32",
        ),
        (file(3, 1, 0, &[&entry("t", &[4], 0, 8), &data]), "no multiple of 32"),
        (
            file(3, 1, 0, &[&entry("t", &[16], 0, u64::MAX - 31), &data]),
            "any file",
        ),
        (
            file(3, 1, 0, &[&entry("t", &[4], 0, 1 << 40), &data]),
            "tensor `t`, up to its end,",
        ),
        (
            file(3, 1, 0, &[&entry("t", &[400], 0, 0), &data]),
            "tensor `t`, up to its end,",
        ),
        (
            file(3, 2, 0, &[&entry("t", &[4], 0, 0), &entry("t", &[4], 0, 32), &data]),
            "`t` is there twice",
        ),
        (
            file(3, 2, 0, &[&entry("t", &[9], 0, 0), &entry("u", &[4], 0, 32), &data]),
            "`t` and `u` overlap",
        ),
        (
            file(
                3,
                0,
                1,
                &[&text("general.alignment"), &4u32.to_le_bytes(), &24u32.to_le_bytes()],
            ),
            "power of two",
        ),
    ];
    for (bytes, named) in cases {
        let error = open_bytes(&bytes).unwrap_err().to_string();
        assert!(error.starts_with("a.gguf") && error.contains(named), "{named}: {error}");
    }
    // Arrays nested without end.
    let level = [9u32.to_le_bytes().as_slice(), &1u64.to_le_bytes()].concat();
    let bytes = file(3, 0, 1, &[&text("k"), &9u32.to_le_bytes(), &level.repeat(100_000)]);
    assert!(open_bytes(&bytes).unwrap_err().to_string().contains("nested deeper"));
}

/// Counts what each thread has allocated, and the most it held at once.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    // A thread that is ending has no counters any more.
    let _ = HELD.try_with(|held| {
        held.set(held.get() + bytes);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(held.get())));
    });
}

// SAFETY: every call is handed on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Allocation) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller keeps to the contract of `GlobalAlloc`, which is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Allocation) {
        count(-(layout.size() as isize));
        // SAFETY: the caller keeps to the contract of `GlobalAlloc`, which is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most bytes that were held at once while `work` ran, beyond those before it.
fn peak_of(work: impl FnOnce()) -> usize {
    let before = HELD.get();
    PEAK.set(before);
    work();
    (PEAK.get() - before) as usize
}

/// Reads all that can be read of a file, whatever it claims.
fn read_everything(bytes: Vec<u8>) {
    let Ok(mut gguf) = Gguf::open("a.gguf", Cursor::new(bytes)) else {
        return;
    };
    for info in gguf.tensors().to_vec() {
        let (columns, rows) = info.columns_and_rows();
        let shape: Vec<usize> = info.dimensions.iter().rev().map(|&size| size as usize).collect();
        let _ = gguf.read(&info.name, &shape);
        if let &[rows, columns] = &shape[..] {
            let _ = gguf.packed(&info.name, [rows, columns], None);
        }
        assert!(columns * rows > 0);
    }
    let _ = GgufTokenizer::read(&gguf);
    if let Ok(mut model) = GgufModel::new(gguf) {
        let header = model.header().clone();
        let _ = header.config("a.gguf");
        let _ = model.matrix("model.layers.0.self_attn.q_proj.weight", [24, 24], None);
        let _ = model.embed(&[0, 3, u32::MAX], &mut vec![0.0; 3 * header.width]);
    }
}

proptest! {
    #[test]
    fn any_damage_is_refused_or_read_without_large_allocations(
        name in prop::sample::select(vec!["metadata.gguf", "llama.gguf", "gpt2.gguf", "blocks.gguf"]),
        changes in prop::collection::vec((0.0f64..1.0, any::<u8>(), 0u8..4), 0..6),
        length in prop_oneof![3 => Just(1.0f64), 1 => 0.0f64..1.0],
    ) {
        let mut bytes = fixture(name);
        bytes.truncate((length * bytes.len() as f64) as usize);
        for (position, byte, how) in changes {
            if bytes.is_empty() {
                break;
            }
            // Most of a file is data, so half of the changes are made among the first bytes.
            let span = if how % 2 == 0 { bytes.len() } else { bytes.len().min(1500) };
            let at = (position * span as f64) as usize;
            match how {
                0 | 1 => bytes[at] = byte,
                _ => {
                    let end = bytes.len().min(at + 8);
                    bytes[at..end].fill(byte);
                }
            }
        }
        // Texts, pairs of merges and their JSON take more room than their bytes in the file; values take four bytes for
        // one.
        let bound = 64 * bytes.len() + (1 << 18);
        let peak = peak_of(|| read_everything(bytes));
        prop_assert!(peak < bound, "{} bytes held, {} allowed", peak, bound);
    }
}

// ---- block types

#[test]
fn blocks_decode_to_ggmls_values_bit_for_bit() {
    let mut gguf = open("blocks.gguf");
    for block in BlockType::ALL {
        let info = gguf.tensor(&format!("{block}.blocks")).unwrap();
        let (columns, rows) = info.columns_and_rows();
        let shape = [rows as usize, columns as usize];
        let expected = gguf.read(&format!("{block}.values"), &shape).unwrap();
        let found = gguf.read(&format!("{block}.blocks"), &shape).unwrap();
        assert_eq!(found.len(), expected.len());
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert!(
                found.to_bits() == expected.to_bits(),
                "{block} {i}: {found} for {expected}"
            );
        }
        let mut rows = vec![0.0; 2 * shape[1]];
        gguf.rows(&format!("{block}.blocks"), shape, [2, 1].into_iter(), &mut rows)
            .unwrap();
        assert_eq!(rows[..shape[1]], expected[2 * shape[1]..]);
        assert_eq!(rows[shape[1]..], expected[shape[1]..2 * shape[1]]);
    }
}

#[test]
fn types_that_are_not_decoded_are_refused_by_name() {
    let mut gguf = open("blocks.gguf");
    let error = gguf.read("IQ4_NL.blocks", &[1, 32]).unwrap_err().to_string();
    assert!(error.contains("stored as IQ4_NL; F32, F16, BF16, Q8_0"), "{error}");
    assert!(matches!(
        gguf.packed("IQ4_NL.blocks", [1, 32], None),
        Err(GgufError::Type { .. })
    ));
}

#[test]
fn blocks_come_into_formats_without_loss_where_there_is_one() {
    let mut gguf = open("blocks.gguf");
    for block in BlockType::ALL {
        let name = format!("{block}.blocks");
        let (columns, rows) = gguf.tensor(&name).unwrap().columns_and_rows();
        let shape = [rows as usize, columns as usize];
        let expected = gguf.read(&name, &shape).unwrap();
        let repacked = gguf.packed(&name, shape, None).unwrap();
        assert_eq!(
            (repacked.block, repacked.packed.layout().format),
            (block, block.natural())
        );
        let exact = repacked.packed.decode() == expected;
        assert_eq!(repacked.rounded, !exact, "{block}");
        assert_eq!(
            exact,
            !matches!(block.name(), "Q4_K" | "Q5_0" | "Q5_1" | "Q5_K" | "Q6_K"),
            "{block}"
        );
        let bound = match block {
            BlockType::Q4K => 5e-4,
            // Uniform codes leave less than Gaussian weights.
            _ => 0.006,
        };
        let error = relative_rms(&repacked.packed.decode(), &expected);
        assert!(exact || error < bound, "{block}: {error}");
        for format in Format::ALL {
            let repacked = gguf.packed(&name, shape, Some(format)).unwrap();
            let same = repacked.packed.decode() == expected;
            assert!(same || repacked.rounded, "{block} in {format}");
            assert!(
                !same || !repacked.rounded || format.is_quantised(),
                "{block} in {format}"
            );
            assert!(
                relative_rms(&repacked.packed.decode(), &expected) < 0.1,
                "{block} in {format}"
            );
        }
    }
}

fn repacked(block: BlockType, bytes: &[u8], rows: usize, columns: usize) -> Result<Packed, FormatError> {
    let mut repacker = Repacker::new(block, rows, columns, None);
    repacker.push(bytes)?;
    Ok(repacker.finish()?.packed)
}

proptest! {
    #[test]
    fn formats_and_their_block_types_change_places_without_loss(
        rows in 1usize..4, groups in 1usize..4, seed: u64, format in prop::sample::select(Format::ALL.to_vec()),
    ) {
        let layout = format.layout(rows, 32 * groups);
        let packed = Packed::encode(layout, &gaussian(seed, layout.elements())).unwrap();
        let (block, bytes) = blocks_of(&packed).unwrap();
        let mut values = Vec::new();
        block.decode_into(&bytes, &mut values);
        prop_assert_eq!(&values, &packed.decode());
        prop_assert_eq!(repacked(block, &bytes, rows, 32 * groups).unwrap(), packed);
    }
}

#[test]
fn every_scale_of_q4_0_has_its_minimum_in_q4() {
    let scales: Vec<f16> = (0..=u16::MAX)
        .map(f16::from_bits)
        .filter(|scale| scale.is_finite() && 8.0 * scale.to_f32().abs() <= 65504.0)
        .collect();
    let mut bytes = Vec::new();
    for scale in &scales {
        bytes.extend(scale.to_le_bytes());
        bytes.extend((0..16).map(|i| 17 * i));
    }
    let mut expected = Vec::new();
    BlockType::Q4_0.decode_into(&bytes, &mut expected);
    let packed = repacked(BlockType::Q4_0, &bytes, scales.len(), 32).unwrap();
    assert_eq!(packed.layout().format, Format::Q4);
    assert!(packed.decode() == expected);
}

#[test]
fn matrices_that_gguf_cannot_hold_are_told_apart() {
    for format in Format::ALL {
        let packed = Packed::encode(format.layout(2, 33), &gaussian(1, 66)).unwrap();
        assert_eq!(blocks_of(&packed).is_none(), format.is_quantised());
    }
    let (block, bytes) = blocks_of(&Packed::encode(Format::F16.layout(1, 3), &[1.0, 2.0, 3.0]).unwrap()).unwrap();
    assert_eq!((block, bytes.len()), (BlockType::F16, 6));
}

#[test]
fn q8_0_is_quantised_as_ggml_does() {
    let mut gguf = open("blocks.gguf");
    let numbers = gguf.read("F32.values", &[3, 96]).unwrap();
    let info = gguf.tensor("Q8_0.quantised").unwrap().clone();
    let mut expected = Vec::new();
    gguf.for_each_chunk(&info, |bytes| {
        expected.extend_from_slice(bytes);
        Ok(())
    })
    .unwrap();
    assert_eq!(BlockType::Q8_0.encode(&numbers).unwrap(), expected);
    let halves = BlockType::F16.encode(&numbers).unwrap();
    let mut decoded = Vec::new();
    BlockType::F16.decode_into(&halves, &mut decoded);
    assert!(
        decoded
            .iter()
            .zip(&numbers)
            .all(|(half, &number)| *half == f16::from_f32(number).to_f32())
    );
    assert_eq!(BlockType::F32.encode(&numbers).unwrap().len(), 4 * 288);
    for block in [BlockType::F16, BlockType::Q8_0] {
        let mut values = [0.0f32; 64];
        values[40] = 1e9;
        assert!(
            matches!(block.encode(&values), Err(FormatError::Overflow { .. })),
            "{block}"
        );
        values[40] = f32::INFINITY;
        assert!(
            matches!(block.encode(&values), Err(FormatError::NotFinite { .. })),
            "{block}"
        );
    }
}

/// A file of one tensor.
fn one_tensor(block: BlockType, dimensions: &[u64], bytes: &[u8]) -> Gguf {
    let table = [("t".to_owned(), dimensions.to_vec(), block)];
    let mut writer = GgufWriter::begin(Vec::new(), &Metadata::default(), &table).unwrap();
    writer.write(bytes).unwrap();
    open_bytes(&writer.finish().unwrap()).unwrap()
}

#[test]
fn values_too_large_for_the_natural_format_take_a_wider_one() {
    // A scale of 10000 has a minimum of -80000, which is no half.
    let mut q4_0 = f16::from_f32(10_000.0).to_le_bytes().to_vec();
    q4_0.extend([0x9f; 16]);
    let repacked = one_tensor(BlockType::Q4_0, &[32], &q4_0).packed("t", [1, 32], None);
    assert!(matches!(repacked, Err(GgufError::Shape { .. })));
    let mut gguf = one_tensor(BlockType::Q4_0, &[32, 1], &q4_0);
    let repacked = gguf.packed("t", [1, 32], None).unwrap();
    assert_eq!(repacked.packed.layout().format, Format::Q8);
    assert!((repacked.packed.decode()[0] - 70_000.0).abs() < 300.0 && repacked.rounded);
    assert!(matches!(
        gguf.packed("t", [1, 32], Some(Format::Q4)),
        Err(GgufError::Format {
            source: FormatError::Overflow { .. },
            ..
        })
    ));

    let bf16 = half::bf16::from_f32(1e30).to_le_bytes();
    let repacked = one_tensor(BlockType::Bf16, &[1, 1], &bf16)
        .packed("t", [1, 1], None)
        .unwrap();
    assert_eq!(repacked.packed.layout().format, Format::F32);
    assert!(!repacked.rounded && repacked.packed.decode()[0] > 9e29);
    let bf16 = half::bf16::from_f32(1e-9).to_le_bytes();
    let repacked = one_tensor(BlockType::Bf16, &[1, 1], &bf16)
        .packed("t", [1, 1], None)
        .unwrap();
    assert_eq!(repacked.packed.layout().format, Format::F16);
    assert!(repacked.rounded && repacked.packed.decode()[0] == 0.0);
}

#[test]
fn values_that_are_not_finite_are_refused() {
    for block in BlockType::ALL {
        let stored = block.stored();
        let bytes = vec![0xff; stored.bytes as usize];
        let mut gguf = one_tensor(block, &[stored.elements, 1], &bytes);
        let shape = [1, stored.elements as usize];
        let refused = |error: GgufError| {
            let GgufError::Format { tensor, source, .. } = &error else {
                panic!("{block}: {error}");
            };
            let not_finite = *source == FormatError::NotFinite { row: 0 };
            assert!(
                tensor == "t" && (not_finite || block == BlockType::Q4K),
                "{block}: {error}"
            );
        };
        refused(gguf.read("t", &shape).unwrap_err());
        refused(gguf.packed("t", shape, None).unwrap_err());
        refused(
            gguf.rows("t", shape, [0].into_iter(), &mut vec![0.0; shape[1]])
                .unwrap_err(),
        );
    }
}

// ---- models

/// The weight that the fixtures hold at a place of a Hugging Face tensor.
fn weight(name: &str, row: usize, column: usize) -> f32 {
    let letters: usize = name.bytes().map(usize::from).sum();
    ((7 * letters + 31 * row + 17 * column) % 251) as f32 / 64.0 - 125.0 / 64.0
}

/// Names and shapes, (rows, columns) as in Hugging Face's files or (length).
fn tensors(header: &ModelHeader) -> Vec<(String, Vec<usize>)> {
    let (width, ffn, vocab) = (header.width, header.ffn, header.vocab);
    let (queries, keys) = (header.heads * header.head_size, header.kv_heads * header.head_size);
    let mut all: Vec<(&str, Vec<usize>)> = match header.family {
        Family::Gpt2 => vec![
            ("wte.weight", vec![vocab, width]),
            ("wpe.weight", vec![header.positions, width]),
            ("h.0.ln_1.weight", vec![width]),
            ("h.0.ln_1.bias", vec![width]),
            ("h.0.attn.c_attn.weight", vec![width, 3 * width]),
            ("h.0.attn.c_attn.bias", vec![3 * width]),
            ("h.0.attn.c_proj.weight", vec![width, width]),
            ("h.0.attn.c_proj.bias", vec![width]),
            ("h.0.ln_2.weight", vec![width]),
            ("h.0.ln_2.bias", vec![width]),
            ("h.0.mlp.c_fc.weight", vec![width, ffn]),
            ("h.0.mlp.c_fc.bias", vec![ffn]),
            ("h.0.mlp.c_proj.weight", vec![ffn, width]),
            ("h.0.mlp.c_proj.bias", vec![width]),
            ("ln_f.weight", vec![width]),
            ("ln_f.bias", vec![width]),
        ],
        _ => vec![
            ("model.embed_tokens.weight", vec![vocab, width]),
            ("model.layers.0.input_layernorm.weight", vec![width]),
            ("model.layers.0.self_attn.q_proj.weight", vec![queries, width]),
            ("model.layers.0.self_attn.k_proj.weight", vec![keys, width]),
            ("model.layers.0.self_attn.v_proj.weight", vec![keys, width]),
            ("model.layers.0.self_attn.o_proj.weight", vec![width, queries]),
            ("model.layers.0.post_attention_layernorm.weight", vec![width]),
            ("model.layers.0.mlp.gate_proj.weight", vec![ffn, width]),
            ("model.layers.0.mlp.up_proj.weight", vec![ffn, width]),
            ("model.layers.0.mlp.down_proj.weight", vec![width, ffn]),
            ("model.norm.weight", vec![width]),
        ],
    };
    match header.family {
        Family::Qwen2 => all.extend([
            ("model.layers.0.self_attn.q_proj.bias", vec![queries]),
            ("model.layers.0.self_attn.k_proj.bias", vec![keys]),
            ("model.layers.0.self_attn.v_proj.bias", vec![keys]),
            ("lm_head.weight", vec![vocab, width]),
        ]),
        Family::Qwen3 => all.extend([
            ("model.layers.0.self_attn.q_norm.weight", vec![header.head_size]),
            ("model.layers.0.self_attn.k_norm.weight", vec![header.head_size]),
        ]),
        Family::Gpt2 | Family::Llama => {}
    }
    all.into_iter().map(|(name, shape)| (name.to_owned(), shape)).collect()
}

fn model(family: Family) -> GgufModel {
    GgufModel::new(open(&format!("{family}.gguf"))).unwrap()
}

#[test]
fn every_familys_weights_are_those_of_hugging_face() {
    for family in Family::ALL {
        let mut model = model(family);
        let tensors = tensors(&model.header().clone());
        assert_eq!(tensors.len(), model.gguf().tensors().len(), "{family}");
        for (name, shape) in tensors {
            assert!(model.contains(&name), "{name}");
            let expected = |row: usize, column: usize| weight(&name, row, column);
            match shape[..] {
                [length] => {
                    let found = model.vector(&name, length).unwrap();
                    assert!(
                        (0..length).all(|column| found[column] == expected(0, column)),
                        "{family} {name}"
                    );
                }
                [rows, columns] => {
                    let transposed = model.is_transposed(&name);
                    let stored = if transposed { [columns, rows] } else { [rows, columns] };
                    let matrix = model.matrix(&name, stored, None).unwrap();
                    assert_eq!((matrix.packed.layout().format, matrix.rounded), (Format::F16, false));
                    let found = matrix.packed.decode();
                    for row in 0..rows {
                        for column in 0..columns {
                            let at = if transposed {
                                column * rows + row
                            } else {
                                row * columns + column
                            };
                            assert_eq!(found[at], expected(row, column), "{family} {name} {row} {column}");
                        }
                    }
                }
                _ => unreachable!(),
            }
        }
        let width = model.header().width;
        let name = if family == Family::Gpt2 {
            "wte.weight"
        } else {
            "model.embed_tokens.weight"
        };
        let mut found = vec![0.0; 2 * width];
        model.embed(&[7, 0], &mut found).unwrap();
        assert!((0..width).all(|column| found[column] == weight(name, 7, column)));
        assert!((0..width).all(|column| found[width + column] == weight(name, 0, column)));
    }
}

#[test]
fn headers_give_the_config_of_the_model() {
    let rotary = |config: &mut Json, theta: f64| {
        config["rope_theta"] = json!(theta);
        config["rope_scaling"] = Json::Null;
        config["hidden_act"] = json!("silu");
        config["num_hidden_layers"] = json!(1);
        config["intermediate_size"] = json!(40);
        config["max_position_embeddings"] = json!(64);
    };
    let gpt2 = json!({
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 1, "n_embd": 20, "n_head": 2,
        "n_inner": 48, "n_positions": 16, "vocab_size": 368, "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "tie_word_embeddings": true, "bos_token_id": 360, "eos_token_id": 361,
    });
    let mut llama = json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 24, "num_attention_heads": 3,
        "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 368, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
        "attention_bias": false, "mlp_bias": false, "bos_token_id": 360, "eos_token_id": 361,
    });
    rotary(&mut llama, 1e5);
    let mut qwen2 = json!({
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 16, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 368, "rms_norm_eps": 1e-6, "tie_word_embeddings": false,
        "use_sliding_window": false, "bos_token_id": 360, "eos_token_id": 361,
    });
    rotary(&mut qwen2, 1e6);
    let mut qwen3 = json!({
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 16, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 368, "rms_norm_eps": 1e-6, "tie_word_embeddings": true,
        "use_sliding_window": false, "attention_bias": false, "bos_token_id": 360, "eos_token_id": 361,
    });
    rotary(&mut qwen3, 1e6);
    for (family, expected) in Family::ALL.into_iter().zip([gpt2, llama, qwen2, qwen3]) {
        let model = model(family);
        assert_eq!(model.header().config("a.gguf").unwrap(), expected);
        assert_eq!(model.header().name.as_deref(), Some(format!("tiny {family}").as_str()));
        assert!(model.header().chat_template.as_ref().unwrap().contains("messages"));
    }
}

/// The bytes of the fixture `name` with changed metadata.
fn with_metadata(name: &str, change: impl FnOnce(&mut Metadata)) -> Vec<u8> {
    let mut gguf = open(name);
    let mut metadata = gguf.metadata().clone();
    change(&mut metadata);
    let tensors = gguf.tensors().to_vec();
    let table: Vec<_> = tensors
        .iter()
        .map(|info| (info.name.clone(), info.dimensions.clone(), info.stored.block.unwrap()))
        .collect();
    let mut writer = GgufWriter::begin(Vec::new(), &metadata, &table).unwrap();
    for info in &tensors {
        gguf.for_each_chunk(info, |bytes| {
            writer.write(bytes).unwrap();
            Ok(())
        })
        .unwrap();
    }
    writer.finish().unwrap()
}

#[test]
fn a_header_written_is_the_header_read() {
    for family in Family::ALL {
        let name = format!("{family}.gguf");
        let mut header = model(family).header().clone();
        let bytes = with_metadata(&name, |metadata| *metadata = header.metadata());
        (header.bos, header.eos, header.chat_template) = (None, None, None);
        assert_eq!(ModelHeader::read(&mut open_bytes(&bytes).unwrap()).unwrap(), header);
    }
}

#[test]
fn unsupported_headers_are_refused_by_name() {
    let cases: Vec<(&str, Value, &str)> = vec![
        ("general.architecture", "gemma3".into(), "the architecture \"gemma3\""),
        ("general.type", "adapter".into(), "a file of type \"adapter\""),
        ("split.count", 3u16.into(), "one of 3 parts"),
        ("llama.block_count", 0u32.into(), "llama.block_count"),
        ("llama.block_count", (-1i32).into(), "llama.block_count"),
        ("llama.embedding_length", 25u32.into(), "attention.key_length"),
        ("llama.attention.head_count", "three".into(), "head_count"),
        ("llama.attention.head_count_kv", 2u32.into(), "divisor of the 3 heads"),
        (
            "llama.attention.head_count_kv",
            vec![1u32, 3].into(),
            "blocks are all alike",
        ),
        ("llama.attention.value_length", 16u32.into(), "value_length"),
        ("llama.attention.layer_norm_rms_epsilon", 0.0f32.into(), "positive"),
        ("llama.rope.dimension_count", 4u32.into(), "rotation of the whole head"),
        ("llama.rope.scaling.type", "yarn".into(), "none, linear and Llama 3's"),
        ("llama.expert_count", 8u32.into(), "without experts"),
        ("llama.attention.sliding_window", 4096u32.into(), "sliding_window"),
        ("llama.attention.scale", 0.1f32.into(), "extra scales"),
        ("llama.attention.causal", false.into(), "causal"),
    ];
    for (key, value, named) in cases {
        let bytes = with_metadata("llama.gguf", |metadata| metadata.set(key, value));
        let error = ModelHeader::read(&mut open_bytes(&bytes).unwrap())
            .unwrap_err()
            .to_string();
        assert!(error.contains(named), "{key}: {error}");
    }
    // One number a block, all the same.
    let bytes = with_metadata("llama.gguf", |metadata| {
        metadata.set("llama.attention.head_count_kv", vec![1i32, 1, 1])
    });
    assert!(ModelHeader::read(&mut open_bytes(&bytes).unwrap()).is_ok());
}

/// A Llama file with rotary factors in it.
fn with_rope_factors(factors: &[f32]) -> Result<ModelHeader, GgufError> {
    let mut header = model(Family::Llama).header().clone();
    (header.head_size, header.heads) = (64, 3);
    let table = [
        (
            "rope_freqs.weight".to_owned(),
            vec![factors.len() as u64],
            BlockType::F32,
        ),
        (
            "token_embd.weight".to_owned(),
            vec![24, header.vocab as u64],
            BlockType::F16,
        ),
    ];
    let mut metadata = header.metadata();
    metadata.set("llama.rope.freq_base", 5e5f32);
    let mut writer = GgufWriter::begin(Vec::new(), &metadata, &table).unwrap();
    writer.write(&BlockType::F32.encode(factors).unwrap()).unwrap();
    writer.write(&vec![0; 48 * header.vocab]).unwrap();
    ModelHeader::read(&mut open_bytes(&writer.finish().unwrap()).unwrap())
}

#[test]
fn rotary_factors_of_llama_3_are_recognised() {
    let llama3 = Rope {
        base: 5e5,
        scaling: RopeScaling::Llama3 {
            factor: 32.0,
            low: 1.0,
            high: 4.0,
            original: 8192,
        },
    };
    let factors = llama3.factors(64);
    // Llama 3.2's: high frequencies kept, low ones divided by 32, three or so between.
    assert!(factors[..15].iter().all(|&factor| factor == 1.0) && factors[18..].iter().all(|&factor| factor == 32.0));
    let header = with_rope_factors(&factors).unwrap();
    assert_eq!(header.rope, Some(llama3));
    let scaling = &header.config("a.gguf").unwrap()["rope_scaling"];
    assert_eq!(
        *scaling,
        json!({"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192})
    );

    let mut other = factors.clone();
    other[3] = 2.0;
    let header = with_rope_factors(&other).unwrap();
    assert_eq!(header.rope.as_ref().unwrap().factors(64), other);
    assert!(
        header
            .config("a.gguf")
            .unwrap_err()
            .to_string()
            .contains("rope_freqs.weight")
    );
    assert!(
        with_rope_factors(&factors[1..])
            .unwrap_err()
            .to_string()
            .contains("rope_freqs.weight")
    );
}

#[test]
fn linear_rope_scaling_is_read() {
    let bytes = with_metadata("llama.gguf", |metadata| {
        metadata.set("llama.rope.scaling.type", "linear");
        metadata.set("llama.rope.scaling.factor", 4.0f32);
    });
    let header = ModelHeader::read(&mut open_bytes(&bytes).unwrap()).unwrap();
    assert_eq!(
        header.rope.as_ref().unwrap().scaling,
        RopeScaling::Linear { factor: 4.0 }
    );
    assert_eq!(
        header.config("a.gguf").unwrap()["rope_scaling"],
        json!({"rope_type": "linear", "factor": 4.0})
    );
    let metadata = header.metadata();
    assert_eq!(metadata.get("llama.rope.scaling.factor"), Some(&Value::F32(4.0)));
}

#[test]
fn a_head_stored_like_the_embedding_is_tied() {
    assert!(!model(Family::Qwen2).header().tied_head && model(Family::Llama).header().tied_head);
    let mut gguf = open("llama.gguf");
    let mut table: Vec<_> = gguf.tensors().to_vec();
    let embedding = gguf.tensor("token_embd.weight").unwrap().clone();
    table.push(embedding);
    let names: Vec<_> = table
        .iter()
        .enumerate()
        .map(|(i, info)| {
            let name = if i + 1 == table.len() {
                "output.weight".to_owned()
            } else {
                info.name.clone()
            };
            (name, info.dimensions.clone(), info.stored.block.unwrap())
        })
        .collect();
    let mut writer = GgufWriter::begin(Vec::new(), gguf.metadata(), &names).unwrap();
    for info in &table {
        gguf.for_each_chunk(info, |bytes| {
            writer.write(bytes).unwrap();
            Ok(())
        })
        .unwrap();
    }
    let mut bytes = writer.finish().unwrap();
    assert!(ModelHeader::read(&mut open_bytes(&bytes).unwrap()).unwrap().tied_head);
    let end = open_bytes(&bytes).unwrap().tensor("output.weight").unwrap().range.end as usize;
    bytes[end - 1] ^= 1;
    assert!(!ModelHeader::read(&mut open_bytes(&bytes).unwrap()).unwrap().tied_head);
}

#[test]
fn a_tensor_that_the_family_does_not_have_is_refused_by_name() {
    let bytes = fixture("llama.gguf");
    let at = bytes.windows(10).position(|window| window == b"blk.0.attn").unwrap();
    let mut changed = bytes.clone();
    changed[at..at + 10].copy_from_slice(b"blk.0.ssm_");
    let error = GgufModel::new(open_bytes(&changed).unwrap()).unwrap_err().to_string();
    assert!(error.contains("blk.0.ssm_"), "{error}");
}

#[test]
fn names_translate_both_ways() {
    for (family, gguf, hugging_face) in [
        (
            Family::Llama,
            "blk.12.attn_q.weight",
            "model.layers.12.self_attn.q_proj.weight",
        ),
        (
            Family::Qwen2,
            "blk.0.attn_k.bias",
            "model.layers.0.self_attn.k_proj.bias",
        ),
        (
            Family::Qwen3,
            "blk.3.attn_q_norm.weight",
            "model.layers.3.self_attn.q_norm.weight",
        ),
        (Family::Qwen3, "output.weight", "lm_head.weight"),
        (Family::Gpt2, "blk.7.attn_qkv.bias", "h.7.attn.c_attn.bias"),
        (Family::Gpt2, "position_embd.weight", "wpe.weight"),
    ] {
        assert_eq!(family.hugging_face_name(gguf).as_deref(), Some(hugging_face));
        assert_eq!(family.gguf_name(hugging_face).as_deref(), Some(gguf));
    }
    assert_eq!(
        Family::Gpt2.gguf_name("transformer.h.0.ln_1.weight").as_deref(),
        Some("blk.0.attn_norm.weight")
    );
    for wrong in [
        "blk.01.attn_q.weight",
        "blk.attn_q.weight",
        "blk.0.attn_qkv.weight",
        "blk.0.attn_q",
        "token_embd",
        "",
    ] {
        assert_eq!(Family::Llama.hugging_face_name(wrong), None, "{wrong}");
    }
}

#[test]
fn rotary_orders_are_inverse_permutations() {
    assert_eq!(half_split_rows(1, 6), [0, 2, 4, 1, 3, 5]);
    for (heads, head_size) in [(1, 2), (3, 8), (2, 64), (5, 10)] {
        let (there, back) = (interleaved_rows(heads, head_size), half_split_rows(heads, head_size));
        assert!((0..heads * head_size).all(|row| there[back[row]] == row && back[there[row]] == row));
        for format in Format::ALL {
            let layout = format.layout(heads * head_size, 40);
            let packed = Packed::encode(layout, &gaussian(9, layout.elements())).unwrap();
            assert_eq!(packed.select_rows(&there).select_rows(&back), packed);
        }
    }
}

// ---- tokenizers

fn tokenizer(family: Family) -> GgufTokenizer {
    GgufTokenizer::read(&open(&format!("{family}.gguf"))).unwrap()
}

#[test]
fn tokenizers_give_hugging_faces_ids() {
    let cases: Json = serde_json::from_slice(&fixture("tokenizers.json")).unwrap();
    for family in Family::ALL {
        let read = tokenizer(family);
        let inner = tokenizers::Tokenizer::from_bytes(&read.json).unwrap();
        let case = &cases[family.model_type()];
        let texts = case["texts"].as_array().unwrap();
        assert!(texts.len() > 5);
        for (i, text) in texts.iter().enumerate() {
            let text = text.as_str().unwrap();
            let ids = inner.encode(text, false).unwrap().get_ids().to_vec();
            assert_eq!(json!(ids), case["ids"][i], "{family}: {text}");
            assert_eq!(
                json!(inner.decode(&ids, true).unwrap()),
                case["decoded"][i],
                "{family}: {text}"
            );
        }
        assert_eq!((read.vocab, read.bos, read.eos), (368, Some(360), Some(361)));
        assert_eq!(read.stop, [361]);
        assert!(read.notices.is_empty(), "{:?}", read.notices);
        // Only Llama 3's rule begins texts with a token unless the file says otherwise.
        let begun = inner.encode("a", true).unwrap().get_ids()[0] == 360;
        assert_eq!(
            (read.add_bos, begun),
            (family == Family::Qwen3, family == Family::Qwen3)
        );
    }
}

#[test]
fn tokenizers_that_are_not_read_are_refused_by_name() {
    let few = |count: usize| (0..count).map(|i| format!("t{i}")).collect::<Vec<String>>();
    let cases: Vec<(&str, Value, &str)> = vec![
        ("tokenizer.ggml.model", "llama".into(), "the tokenizer model \"llama\""),
        ("tokenizer.ggml.model", 5u32.into(), "tokenizer.ggml.model"),
        ("tokenizer.ggml.pre", "deepseek-llm".into(), "\"deepseek-llm\""),
        ("tokenizer.ggml.tokens", vec![1i32].into(), "an array of texts"),
        ("tokenizer.ggml.tokens", few(3).into(), "3 kinds"),
        (
            "tokenizer.ggml.tokens",
            vec!["same".to_owned(); 368].into(),
            "are both \"same\"",
        ),
        ("tokenizer.ggml.tokens", few(368).into(), "merges of tokens"),
        ("tokenizer.ggml.merges", vec!["ab".to_owned()].into(), "two parts"),
        ("tokenizer.ggml.token_type", "x".into(), "kinds"),
        ("tokenizer.ggml.add_bos_token", 1u32.into(), "true or false"),
    ];
    for (key, value, named) in cases {
        let bytes = with_metadata("llama.gguf", |metadata| metadata.set(key, value));
        let error = GgufTokenizer::read(&open_bytes(&bytes).unwrap())
            .unwrap_err()
            .to_string();
        assert!(error.contains(named), "{key}: {error}");
    }
    let error = GgufTokenizer::read(&open("metadata.gguf")).unwrap_err();
    assert!(matches!(error, GgufError::MissingKey { key, .. } if key == "tokenizer.ggml.model"));
}

#[test]
fn what_a_tokenizer_leaves_unsaid_is_told() {
    let bytes = with_metadata("gpt2.gguf", |metadata| {
        metadata.set("tokenizer.ggml.pre", "default");
        metadata.set("tokenizer.ggml.add_bos_token", true);
        metadata.set("tokenizer.ggml.eot_token_id", 360u32);
    });
    let read = GgufTokenizer::read(&open_bytes(&bytes).unwrap()).unwrap();
    assert!(read.notices[0].contains("as GPT-2's"), "{:?}", read.notices);
    assert!(read.add_bos);
    assert_eq!(read.stop, [361, 360]);
}
