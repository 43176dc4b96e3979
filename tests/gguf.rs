//! Claims about weight formats and GGUF files: what is held without loss, what is read, and what is refused how.

use half::f16;
use proptest::prelude::*;
use sflllm::terms::format::{Format, FormatError, GROUP, Layout, Packed};

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
        for (row, (found, expected)) in decoded.chunks(layout.columns.max(1)).zip(values.chunks(layout.columns.max(1))).enumerate() {
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
        let mut encoder = sflllm::terms::format::Encoder::new(layout);
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
        let expected: Vec<f32> = order.iter().flat_map(|&row| &all[row * layout.columns..][..layout.columns]).copied().collect();
        prop_assert_eq!(selected.decode(), expected);
    }

    #[test]
    fn words_from_outside_are_taken_or_refused(layout in layouts(), words in prop::collection::vec(any::<u32>(), 0..200), fit: bool) {
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
