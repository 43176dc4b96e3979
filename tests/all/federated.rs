//! The weighted mean of adapters, against cases worked by hand and against its own laws.

use proptest::prelude::*;
use sflllm::federated::{AverageError, mean_of_prefixes, weighted_mean};

#[test]
fn each_adapter_weighs_as_many_examples_as_it_has_seen() {
    // D = 1 + 3 + 4 = 8: (1·8 + 3·16 + 4·(−4)) / 8 = 5 and (1·0 + 3·1 + 4·2) / 8 = 1.375.
    let mean = weighted_mean(&[(1, &[8.0, 0.0]), (3, &[16.0, 1.0]), (4, &[-4.0, 2.0])]);
    assert_eq!(mean, Ok(vec![5.0, 1.375]));
}

#[test]
fn one_adapter_is_its_own_mean() {
    let values = [0.1, -3.4e38, 1e-40, 0.0];
    assert_eq!(weighted_mean(&[(7, &values)]), Ok(values.to_vec()));
}

#[test]
fn an_adapter_without_examples_has_no_say_unless_it_is_all_there_is() {
    assert_eq!(weighted_mean(&[(0, &[100.0]), (2, &[1.0])]), Ok(vec![1.0]));
    assert_eq!(
        weighted_mean(&[(0, &[100.0]), (0, &[1.0])]),
        Err(AverageError::ZeroWeight)
    );
    assert_eq!(weighted_mean(&[]), Err(AverageError::Empty));
}

#[test]
fn the_adapter_that_cannot_be_averaged_is_named() {
    let error = weighted_mean(&[(1, &[1.0, 2.0]), (1, &[1.0])]);
    assert_eq!(
        error,
        Err(AverageError::WrongLength {
            index: 1,
            length: 1,
            expected: 2
        })
    );
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let error = weighted_mean(&[(1, &[1.0, 2.0]), (1, &[1.0, 2.0]), (1, &[1.0, value])]);
        assert_eq!(error, Err(AverageError::NotFinite { index: 2, position: 1 }));
    }
    let error = weighted_mean(&[(u64::MAX, &[1.0]), (1, &[1.0])]);
    assert_eq!(error, Err(AverageError::WeightOverflow));
}

#[test]
fn each_value_is_averaged_over_those_who_trained_it() {
    // Blocks of two values, cuts after 1, 2 and 3 of them, and the server's copy of the second and third.
    let (one, two, three): (&[f32], &[f32], &[f32]) =
        (&[8.0, 0.0], &[16.0, 1.0, 4.0, 8.0], &[-4.0, 2.0, 0.0, 1.0, 2.0, -1.0]);
    let copy = [12.0, 0.0, -6.0, 5.0];
    let mean = mean_of_prefixes(&[(1, one), (3, two), (4, three)], 6, &copy);
    // Block 2: (1·12 + 3·4 + 4·0) / 8 and (1·0 + 3·8 + 4·1) / 8; block 3: ((1 + 3)·(−6) + 4·2) / 8 and ((1 + 3)·5 − 4·1) / 8.
    assert_eq!(mean, Ok(vec![5.0, 1.375, 3.0, 3.5, -2.0, 2.0]));
    // The order of the adapters is nobody's concern.
    assert_eq!(mean_of_prefixes(&[(4, three), (1, one), (3, two)], 6, &copy), mean);
    // Without the deepest, the copy is what there is; without the shallower ones it has no say.
    let without = mean_of_prefixes(&[(1, one), (3, two)], 6, &copy).unwrap();
    assert_eq!(without[4..], [-6.0, 5.0]);
    assert_eq!(mean_of_prefixes(&[(4, three)], 6, &copy), Ok(three.to_vec()));
    // Equal lengths are the mean of old, whatever the copy says.
    let equal: [(u64, &[f32]); 2] = [(2, &[0.1, 0.7]), (5, &[-0.3, 1e-9])];
    assert_eq!(mean_of_prefixes(&equal, 2, &[]), weighted_mean(&equal));
    assert_eq!(mean_of_prefixes(&equal, 2, &[3.0]), weighted_mean(&equal));
}

#[test]
fn lengths_that_leave_a_value_to_nobody_are_named() {
    let mean = |lengths: &[usize], whole, copy: &[f32]| {
        let values: Vec<Vec<f32>> = lengths.iter().map(|length| vec![1.0; *length]).collect();
        let adapters: Vec<(u64, &[f32])> = values.iter().map(|values| (1, values.as_slice())).collect();
        mean_of_prefixes(&adapters, whole, copy).unwrap_err()
    };
    let (least, most) = (2, 3);
    for (index, lengths) in [(1, [3, 1]), (0, [4, 2])] {
        let length = lengths[index];
        let error = AverageError::OutOfRange {
            index,
            length,
            least,
            most,
        };
        assert_eq!(mean(&lengths, 3, &[1.0]), error);
    }
    assert_eq!(
        mean(&[1], 1, &[1.0, 2.0]),
        AverageError::LongCopy { length: 2, whole: 1 }
    );
    assert_eq!(mean(&[1], 2, &[f32::NAN]), AverageError::CopyNotFinite { position: 0 });
    assert_eq!(mean(&[], 2, &[1.0]), AverageError::Empty);
}

/// Up to six adapters of one length, with weights of which one at least is not zero.
fn adapters() -> impl Strategy<Value = Vec<(u64, Vec<f32>)>> {
    (1_usize..20).prop_flat_map(|length| {
        let one = (0_u64..1000, prop::collection::vec(-1e30_f32..1e30, length));
        prop::collection::vec(one, 1..6).prop_map(|mut adapters| {
            adapters[0].0 += 1;
            adapters
        })
    })
}

fn mean(adapters: &[(u64, Vec<f32>)]) -> Vec<f32> {
    let borrowed: Vec<(u64, &[f32])> = adapters
        .iter()
        .map(|(weight, values)| (*weight, values.as_slice()))
        .collect();
    weighted_mean(&borrowed).expect("valid adapters")
}

proptest! {
    #[test]
    fn the_mean_lies_between_the_adapters(adapters in adapters()) {
        for (position, value) in mean(&adapters).into_iter().enumerate() {
            let column = adapters.iter().filter(|(weight, _)| *weight > 0).map(|(_, values)| values[position]);
            let (low, high) = column.fold((f32::MAX, f32::MIN), |(low, high), value| (low.min(value), high.max(value)));
            prop_assert!(low <= value && value <= high, "{low} <= {value} <= {high}");
        }
    }

    #[test]
    fn the_mean_of_equal_adapters_is_that_adapter(
        values in prop::collection::vec(-1e30_f32..1e30, 1..20),
        weights in prop::collection::vec(1_u64..1000, 1..6),
    ) {
        let adapters: Vec<(u64, Vec<f32>)> = weights.into_iter().map(|weight| (weight, values.clone())).collect();
        prop_assert_eq!(mean(&adapters), values);
    }

    #[test]
    fn only_the_proportion_of_weights_matters(adapters in adapters(), scale in 1_u64..1000) {
        let scaled: Vec<(u64, Vec<f32>)> =
            adapters.iter().map(|(weight, values)| (weight * scale, values.clone())).collect();
        for (position, (left, right)) in mean(&adapters).into_iter().zip(mean(&scaled)).enumerate() {
            let size = adapters.iter().map(|(_, values)| values[position].abs()).fold(0.0, f32::max);
            prop_assert!((left - right).abs() <= 1e-6 * size, "{left} and {right}");
        }
    }
}
