//! Batches, their order, and shards.

use proptest::prelude::*;
use sflllm::data::{Batches, Cursor, DataError, Example, Sharding, pass};

use super::learned;
use sflllm::terms::tensor::IGNORED_TARGET;

/// Written down from one run: any platform must shuffle like it.
const ORDER_OF_SEED_1: [u32; 8] = [5, 6, 2, 4, 1, 7, 0, 3];

fn example(length: usize, first: u32) -> Example {
    let ids: Vec<u32> = (first..first + length as u32).collect();
    Example {
        labels: learned(&ids),
        ids,
    }
}

#[test]
fn targets_are_the_labels_of_the_next_position() {
    let examples = [
        Example {
            ids: vec![1, 2, 3, 4],
            labels: vec![IGNORED_TARGET, IGNORED_TARGET, 3, 4],
        },
        Example {
            ids: vec![9, 8],
            labels: vec![9, 8],
        },
    ];
    let batch = pass(&examples, 3, 64).unwrap().next().unwrap();
    assert_eq!(
        (batch.batch, batch.seq, batch.examples, batch.target_count),
        (3, 16, 2, 3)
    );
    assert_eq!(batch.tokens[..4], [1, 2, 3, 0]);
    assert_eq!(batch.targets[..4], [IGNORED_TARGET, 3, 4, IGNORED_TARGET]);
    assert_eq!(batch.tokens[16..18], [9, 0]);
    assert_eq!(batch.targets[16..18], [8, IGNORED_TARGET]);
    assert!(batch.targets[32..].iter().all(|&target| target == IGNORED_TARGET));
}

#[test]
fn rows_are_as_long_as_the_bucket_of_the_longest_example() {
    // n tokens need n - 1 positions.
    for (length, seq, expected) in [
        (2, 128, 16),
        (17, 128, 16),
        (18, 128, 32),
        (45, 45, 45),
        (46, 45, 45),
        (64, 64, 64),
    ] {
        let batch = pass(&[example(length, 0)], 1, seq).unwrap().next().unwrap();
        assert_eq!(batch.seq, expected, "{length} tokens, at most {seq}");
        assert_eq!(batch.target_count, (length - 1).min(seq));
    }
    let mut ends_ignored = example(100, 0);
    ends_ignored.labels[10..].fill(IGNORED_TARGET);
    assert_eq!(
        pass(&[ends_ignored], 1, 128).unwrap().next().unwrap().seq,
        16,
        "nothing after the last target counts"
    );
}

#[test]
fn every_epoch_visits_every_example_once() {
    let examples: Vec<Example> = (0..10).map(|first| example(2, first)).collect();
    let mut batches = Batches::new(examples, 4, 64, Some(7)).unwrap();
    let mut epochs = Vec::new();
    for _ in 0..3 {
        let mut seen = Vec::new();
        for rows in [4, 4, 2] {
            let batch = batches.next_batch();
            assert_eq!(batch.examples, rows);
            seen.extend((0..rows).map(|row| batch.tokens[row * batch.seq]));
        }
        let mut sorted = seen.clone();
        sorted.sort();
        assert_eq!(sorted, (0..10).collect::<Vec<u32>>());
        epochs.push(seen);
    }
    assert!(
        epochs[0] != epochs[1] && epochs[1] != epochs[2],
        "epochs differ in their order"
    );
    assert_eq!(batches.cursor(), Cursor { epoch: 3, position: 0 });
}

#[test]
fn the_shuffle_is_the_same_on_every_platform() {
    let examples: Vec<Example> = (0..8).map(|first| example(2, first)).collect();
    let order = |seed| {
        let batch = Batches::new(examples.clone(), 8, 16, seed).unwrap().next_batch();
        (0..8).map(|row| batch.tokens[row * batch.seq]).collect::<Vec<u32>>()
    };
    assert_eq!(order(None), [0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(order(Some(1)), ORDER_OF_SEED_1);
    assert_ne!(order(Some(2)), ORDER_OF_SEED_1);
}

#[test]
fn a_restored_cursor_goes_on_with_the_very_next_batch() {
    let examples: Vec<Example> = (0..7).map(|first| example(2 + first as usize, first)).collect();
    let mut original = Batches::new(examples.clone(), 3, 64, Some(3)).unwrap();
    for step in 0..8 {
        let saved = serde_json::to_string(&original.cursor()).unwrap();
        let mut resumed = Batches::new(examples.clone(), 3, 64, Some(3)).unwrap();
        resumed.restore(serde_json::from_str(&saved).unwrap()).unwrap();
        assert_eq!(original.next_batch(), resumed.next_batch(), "step {step}");
        assert_eq!(original.next_batch(), resumed.next_batch(), "step {step}");
    }
    let error = original.restore(Cursor { epoch: 0, position: 7 }).unwrap_err();
    assert!(matches!(
        error,
        DataError::Cursor {
            position: 7,
            examples: 7
        }
    ));
}

#[test]
fn one_pass_counts_every_target_once() {
    let examples: Vec<Example> = (2..13).map(|length| example(length, 0)).collect();
    let batches: Vec<_> = pass(&examples, 4, 64).unwrap().collect();
    assert_eq!(
        batches.iter().map(|batch| batch.examples).collect::<Vec<_>>(),
        [4, 4, 3]
    );
    let targets: usize = examples.iter().map(Example::target_count).sum();
    assert_eq!(batches.iter().map(|batch| batch.target_count).sum::<usize>(), targets);
}

#[test]
fn impossible_shapes_are_refused() {
    assert!(matches!(
        Batches::new(vec![example(2, 0)], 0, 16, None),
        Err(DataError::Option { option: "--batch", .. })
    ));
    assert!(matches!(
        pass(&[example(2, 0)], 1, 0).err(),
        Some(DataError::Option { option: "--seq", .. })
    ));
    assert!(matches!(
        Batches::new(Vec::new(), 1, 16, None),
        Err(DataError::NoExamples { .. })
    ));
}

proptest! {
    #[test]
    fn every_example_goes_to_exactly_one_client(total in 1usize..60, clients in 1usize..10, strided: bool) {
        let sharding = if strided { Sharding::Strided } else { Sharding::Contiguous };
        let divided = sharding.divide((0..total).collect::<Vec<_>>(), clients);
        if total < clients {
            prop_assert!(divided.is_err());
            return Ok(());
        }
        let parts = divided.unwrap();
        prop_assert_eq!(parts.len(), clients);
        let (shortest, longest) = (parts.iter().map(Vec::len).min(), parts.iter().map(Vec::len).max());
        prop_assert!(longest.unwrap() - shortest.unwrap() <= 1);
        let mut all = parts.concat();
        if !strided {
            prop_assert!(all.is_sorted());
        }
        all.sort();
        prop_assert_eq!(all, (0..total).collect::<Vec<_>>());
    }
}

#[test]
fn shards_are_the_ones_documented() {
    let divide = |sharding: Sharding| sharding.divide(vec![0, 1, 2, 3, 4], 2).unwrap();
    assert_eq!(divide(Sharding::Contiguous), [vec![0, 1, 2], vec![3, 4]]);
    assert_eq!(divide(Sharding::Strided), [vec![0, 2, 4], vec![1, 3]]);
    assert!(Sharding::Strided.divide(vec![0], 0).is_err());
}
