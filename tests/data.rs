//! Claims about data files, the native tokenizer, batches and sharding.

use std::collections::BTreeMap;

use proptest::prelude::*;
use sflllm::data::{
    Batches, Cursor, DataError, Dataset, Document, Example, Format, IGNORED, Options, Sharding, Tokenize, Tokenizer,
    pass,
};

const VOCAB: usize = 300;
/// Written down from one run: any platform must shuffle like it.
const ORDER_OF_SEED_1: [u32; 8] = [5, 6, 2, 4, 1, 7, 0, 3];

/// One id per byte, and 256 for end-of-text: enough to see how texts are put together.
struct Bytes;

const EOS: u32 = 256;

impl Tokenize for Bytes {
    fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        Ok(bytes(text))
    }

    fn eos(&self) -> Result<u32, DataError> {
        Ok(EOS)
    }
}

fn bytes(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

fn options(seq: usize) -> Options {
    Options {
        seq,
        vocab: VOCAB,
        skip_bad_lines: false,
    }
}

fn read(text: &str, name: &str, options: &Options) -> Result<Dataset, DataError> {
    Dataset::read(text.as_bytes(), name, Some(&Bytes), options)
}

fn learned(ids: &[u32]) -> Vec<i32> {
    ids.iter().map(|&id| id as i32).collect()
}

#[test]
fn e2e_lines_are_learned_on_the_reference_only() {
    let text = "name : Aromi | food : Chinese||Aromi is Chinese . \n\nname : B||B is . \r\n";
    let data = read(text, "train.txt", &options(128)).unwrap();
    assert_eq!(data.summary.format, Format::E2e);
    assert_eq!(data.examples.len(), 2);
    let context = [bytes("name : Aromi | food : Chinese"), vec![EOS]].concat();
    let reference = [bytes(" Aromi is Chinese ."), vec![EOS]].concat();
    assert_eq!(data.examples[0].ids, [context.clone(), reference.clone()].concat());
    assert_eq!(
        data.examples[0].labels,
        [vec![IGNORED; context.len()], learned(&reference)].concat()
    );
    assert_eq!(
        data.examples[1].ids,
        [bytes("name : B"), vec![EOS], bytes(" B is ."), vec![EOS]].concat()
    );
    assert_eq!(data.summary.targets, (reference.len() + " B is .".len() + 1) as u64);
}

#[test]
fn json_lines_of_ids_need_no_tokenizer() {
    let text = "{\"input_ids\":[5,6,7],\"labels\":[-100,6,-100]}\n{\"input_ids\":[1,2]}\n";
    let data = Dataset::read(text.as_bytes(), "ids", None, &options(128)).unwrap();
    assert_eq!(
        data.examples,
        [
            Example {
                ids: vec![5, 6, 7],
                labels: vec![-100, 6, -100]
            },
            Example {
                ids: vec![1, 2],
                labels: vec![1, 2]
            }
        ]
    );
    assert_eq!(data.summary.format, Format::Jsonl);
}

#[test]
fn prompts_are_not_learned_and_completions_end() {
    let text = "{\"prompt\":\"ab\",\"completion\":\"cd\"}\n{\"text\":\"xy\"}\n";
    let data = read(text, "data.jsonl", &options(128)).unwrap();
    assert_eq!(data.examples[0].ids, [bytes("abcd"), vec![EOS]].concat());
    assert_eq!(
        data.examples[0].labels,
        [vec![IGNORED; 2], learned(&bytes("cd")), vec![EOS as i32]].concat()
    );
    let whole = [bytes("xy"), vec![EOS]].concat();
    assert_eq!(
        data.examples[1],
        Example {
            labels: learned(&whole),
            ids: whole
        }
    );
}

#[test]
fn plain_text_becomes_windows_that_cover_it() {
    let text = "To be, or not to be:\nthat is the question.\nWhether 'tis nobler || in the mind";
    let data = read(text, "play.txt", &options(20)).unwrap();
    assert_eq!(data.summary.format, Format::Text);
    let together: Vec<u32> = data.examples.iter().flat_map(|example| example.ids.clone()).collect();
    assert_eq!(together, bytes(text));
    assert!(
        data.examples
            .iter()
            .all(|example| example.ids.len() <= 20 && example.labels == learned(&example.ids))
    );
}

#[test]
fn a_bad_line_is_named_with_file_line_and_reason() {
    let cases = [
        ("a||b\nno separator\nc||d\n", "e2e.txt", 2, "no `||`"),
        ("a||b\n||d\n", "e2e.txt", 2, "nothing before"),
        ("a||b\nc|| \n", "e2e.txt", 2, "nothing after"),
        ("{\"text\":\"a\"}\n{\"text\":\n", "d", 2, "bad JSON"),
        ("{\"text\":\"a\"}\n\n[1,2]\n{\"text\":\"b\"}\n", "d", 3, "JSON object"),
        ("hello\n", "d.jsonl", 1, "JSON object"),
        ("{\"text\":1}\n", "d", 1, "bad JSON"),
        ("{\"txt\":\"a\"}\n", "d", 1, "expected `input_ids`"),
        ("{\"prompt\":\"a\"}\n", "d", 1, "without `completion`"),
        ("{\"completion\":\"a\"}\n", "d", 1, "without `prompt`"),
        ("{\"input_ids\":[1,300]}\n", "d", 1, "300"),
        ("{\"input_ids\":[-1,2]}\n", "d", 1, "bad JSON"),
        ("{\"input_ids\":[1,2],\"labels\":[1]}\n", "d", 1, "1 entries"),
        ("{\"input_ids\":[1,2],\"labels\":[1,-1]}\n", "d", 1, "-1"),
        ("{\"input_ids\":[1,2],\"labels\":[1,300]}\n", "d", 1, "300"),
        ("{\"labels\":[1,2]}\n", "d", 1, "without `input_ids`"),
    ];
    for (text, name, line, reason) in cases {
        let error = read(text, name, &options(64)).unwrap_err();
        let DataError::BadLine { file, line: found, .. } = &error else {
            panic!("{text:?}: {error}")
        };
        assert_eq!((file.as_str(), *found), (name, line), "{text:?}");
        let message = error.to_string();
        assert!(
            message.contains(reason) && message.contains("--skip-bad-lines"),
            "{text:?}: {message}"
        );
    }
}

#[test]
fn skipped_bad_lines_are_counted_and_the_rest_is_read() {
    let skipping = Options {
        skip_bad_lines: true,
        ..options(64)
    };
    let data = read("a||b\nbad\nc||d\n||\n", "e.txt", &skipping).unwrap();
    assert_eq!((data.examples.len(), data.summary.bad_lines), (2, 2));
    assert!(data.summary.first_bad_line.as_ref().unwrap().starts_with("line 2: "));
    assert!(data.summary.to_string().contains("2 bad lines skipped"));
    let with_bytes = [&b"a||b\nc||\xff\nd||e\n"[..]].concat();
    assert!(matches!(
        Dataset::read(&with_bytes, "e", Some(&Bytes), &options(64)),
        Err(DataError::BadLine { line: 2, .. })
    ));
    assert_eq!(
        Dataset::read(&with_bytes, "e", Some(&Bytes), &skipping)
            .unwrap()
            .examples
            .len(),
        2
    );
    let error = read("{\"text\":1}\n", "only-bad", &skipping).unwrap_err().to_string();
    assert!(error.contains("only-bad") && error.contains("line 1"), "{error}");
}

#[test]
fn long_examples_are_cut_and_those_with_nothing_left_are_dropped() {
    let data = read("a||0123456789\n0123456789||b\n", "e.txt", &options(8)).unwrap();
    assert_eq!(
        (data.summary.truncated, data.summary.dropped, data.examples.len()),
        (2, 1, 1)
    );
    assert_eq!(data.examples[0].ids.len(), 8);
    let error = read("0123456789||b\n", "e.txt", &options(8)).unwrap_err().to_string();
    assert!(error.contains("1 examples were dropped"), "{error}");
    assert!(matches!(
        read("a||b\n", "e", &options(1)),
        Err(DataError::Option { option: "--seq", .. })
    ));
}

#[test]
fn empty_files_hold_no_example() {
    for text in ["", "\n \n", "\u{feff}"] {
        for name in ["d.txt", "d.jsonl"] {
            assert!(
                matches!(read(text, name, &options(8)), Err(DataError::NoExamples { .. })),
                "{text:?} {name}"
            );
        }
    }
}

#[test]
fn a_byte_order_mark_is_not_text() {
    let data = read("\u{feff}a||b\n", "e", &options(64)).unwrap();
    assert_eq!(data.examples[0].ids[0], u32::from(b'a'));
}

#[test]
fn ids_made_elsewhere_give_the_same_examples() {
    let text = "same||one\nsame||two\nother||one\n";
    let document = Document::parse(text.as_bytes(), "e", &options(64)).unwrap();
    assert_eq!(
        document.texts(),
        ["same", " one", " two", "other"],
        "each distinct text is encoded once"
    );
    let ids: Vec<Vec<u32>> = document.texts().iter().map(|text| bytes(text)).collect();
    assert!(document.needs_eos());
    assert_eq!(
        document.clone().assemble(ids.clone(), Some(EOS)).unwrap(),
        read(text, "e", &options(64)).unwrap()
    );

    let fewer = document.clone().assemble(ids[1..].to_vec(), Some(EOS));
    assert!(matches!(fewer, Err(DataError::TextCount { expected: 4, found: 3 })));
    assert!(matches!(
        document.clone().assemble(ids.clone(), None),
        Err(DataError::NoEndToken)
    ));
    let mut outside = ids;
    outside[2] = vec![300];
    assert!(matches!(
        document.assemble(outside, Some(EOS)),
        Err(DataError::Token { id: 300, vocab: 300 })
    ));
    assert!(matches!(
        Dataset::read(text.as_bytes(), "e", None, &options(64)),
        Err(DataError::NoTokenizer { .. })
    ));
}

#[test]
fn long_text_is_encoded_in_pieces_that_join_to_the_whole() {
    let text = "It was the best of times,\nit was the worst\n\nof times \n and more\n".repeat(4000);
    let document = Document::parse(text.as_bytes(), "t", &options(64)).unwrap();
    assert!(document.texts().len() > 2);
    assert_eq!(document.texts().concat(), text);
    let tokenizer = tiny_tokenizer();
    let whole = tokenizer.encode(&text).unwrap();
    assert_eq!(tokenizer.encode_all(document.texts()).unwrap().concat(), whole);
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(
        content in prop::collection::vec(any::<u8>(), 0..300), jsonl: bool, skip_bad_lines: bool
    ) {
        let name = if jsonl { "f.jsonl" } else { "f" };
        let _ = Dataset::read(&content, name, Some(&Bytes), &Options { skip_bad_lines, ..options(16) });
    }

    #[test]
    fn any_line_of_json_is_read_or_refused(
        lines in prop::collection::vec(
            r#"\{"(input_ids|labels|prompt|completion|text)": ?(\[(-?[0-9]{1,4},)?[0-9]{1,12}\]|"[a-z]{0,3}"|null|-?1e9)(,"labels":\[1\])?\}?"#,
            1..5,
        ),
    ) {
        if let Ok(data) = read(&lines.join("\n"), "f.jsonl", &options(16)) {
            for example in &data.examples {
                prop_assert_eq!(example.ids.len(), example.labels.len());
                prop_assert!(example.ids.len() <= 16 && example.target_count() > 0);
                prop_assert!(example.ids.iter().all(|&id| (id as usize) < VOCAB));
            }
        }
    }
}

// ---- tokenizer

/// The characters that stand for the 256 bytes in GPT-2's vocabulary: printable ones for themselves, the others
/// for U+0100 and up.
fn byte_characters() -> Vec<char> {
    let printable = |byte: &u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut others = 0x100..;
    (0..256)
        .map(|byte| if printable(&byte) { byte } else { others.next().unwrap() })
        .map(|code| char::from_u32(code).unwrap())
        .collect()
}

/// `vocab.json` and `merges.txt` of a small byte-level BPE with end-of-text last.
fn tiny_files() -> (String, String) {
    let mut vocab: BTreeMap<String, u32> = byte_characters()
        .into_iter()
        .enumerate()
        .map(|(byte, c)| (c.to_string(), byte as u32))
        .collect();
    let merges = [
        ("t", "h"),
        ("th", "e"),
        ("Ġ", "the"),
        ("Ġ", "w"),
        ("Ċ", "Ċ"),
        ("Ġw", "as"),
    ];
    let mut text = "#version: 0.2\n".to_owned();
    vocab.insert("as".to_owned(), vocab.len() as u32);
    text.push_str("a s\n");
    for (left, right) in merges {
        vocab.insert(format!("{left}{right}"), vocab.len() as u32);
        text.push_str(&format!("{left} {right}\n"));
    }
    vocab.insert("<|endoftext|>".to_owned(), vocab.len() as u32);
    (serde_json::to_string(&vocab).unwrap(), text)
}

fn tiny_tokenizer() -> Tokenizer {
    let (vocab, merges) = tiny_files();
    Tokenizer::from_vocab_and_merges(vocab.as_bytes(), merges.as_bytes(), None).unwrap()
}

#[test]
fn merges_apply_as_in_gpt2() {
    let tokenizer = tiny_tokenizer();
    // 256 as, 257 th, 258 the, 259 Ġthe, 260 Ġw, 261 ĊĊ, 262 Ġwas, 263 end-of-text.
    assert_eq!(tokenizer.encode("the the was").unwrap(), [258, 259, 262]);
    assert_eq!(tokenizer.encode("é").unwrap(), [0xc3, 0xa9]);
    assert_eq!(tokenizer.encode("x<|endoftext|>").unwrap(), [u32::from(b'x'), 263]);
    assert_eq!(tokenizer.encode("").unwrap(), [0; 0]);
    assert_eq!((tokenizer.eos().unwrap(), tokenizer.vocab_size()), (263, 264));
    assert_eq!(
        tokenizer.decode(&[258, 259, 262, 0xc3, 0xa9, 263]).unwrap(),
        "the the wasé"
    );
    assert!(matches!(
        tokenizer.decode(&[264]),
        Err(DataError::Token { id: 264, .. })
    ));
}

#[test]
fn both_layouts_serve_one_tokenizer_with_the_same_ids_and_digest() {
    let (vocab, merges) = tiny_files();
    let old = tempfile::tempdir().unwrap();
    std::fs::write(old.path().join("vocab.json"), vocab).unwrap();
    std::fs::write(old.path().join("merges.txt"), merges).unwrap();
    let from_old = Tokenizer::load(old.path(), None).unwrap().unwrap();

    let new = tempfile::tempdir().unwrap();
    std::fs::write(new.path().join("tokenizer.json"), from_old.json()).unwrap();
    let from_new = Tokenizer::load(new.path(), None).unwrap().unwrap();

    for text in [
        "the was  the\n\n\nthe",
        " the",
        "it's 1234 élan — 漢字",
        "a<|endoftext|>b",
    ] {
        assert_eq!(
            from_old.encode(text).unwrap(),
            from_new.encode(text).unwrap(),
            "{text:?}"
        );
    }
    assert_eq!(from_old.digest(), from_new.digest());
    assert_eq!(
        from_old.json(),
        tiny_tokenizer().json(),
        "the served file is the same every time"
    );
    assert_eq!(from_new.eos().unwrap(), 263);
}

#[test]
fn encoding_and_decoding_gives_the_text_back() {
    let tokenizer = tiny_tokenizer();
    for text in ["the cat\twas\r\n there", "  two  spaces ", "ünïcödé 🦀"] {
        assert_eq!(tokenizer.decode(&tokenizer.encode(text).unwrap()).unwrap(), text);
    }
}

#[test]
fn a_tokenizer_larger_than_the_model_is_named_with_both_sizes() {
    let tokenizer = tiny_tokenizer();
    assert!(tokenizer.check_vocabulary(264).is_ok() && tokenizer.check_vocabulary(300).is_ok());
    let error = tokenizer.check_vocabulary(263).unwrap_err().to_string();
    assert!(error.contains("263") && error.contains("vocabulary"), "{error}");
}

#[test]
fn the_end_token_comes_from_the_model_only_when_the_tokenizer_names_none() {
    let (vocab, merges) = tiny_files();
    let without = vocab.replace("<|endoftext|>", "unused");
    let load = |vocab: &str, eos| Tokenizer::from_vocab_and_merges(vocab.as_bytes(), merges.as_bytes(), eos).unwrap();
    assert_eq!(load(&vocab, Some(7)).eos().unwrap(), 263);
    assert_eq!(load(&without, Some(7)).eos().unwrap(), 7);
    assert!(matches!(load(&without, None).eos(), Err(DataError::NoEndToken)));
}

#[test]
fn a_directory_without_a_tokenizer_is_none_and_half_of_one_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    assert!(Tokenizer::load(dir.path(), None).unwrap().is_none());
    std::fs::write(dir.path().join("vocab.json"), tiny_files().0).unwrap();
    let error = Tokenizer::load(dir.path(), None).unwrap_err().to_string();
    assert!(error.contains("merges.txt is missing"), "{error}");
}

#[test]
fn malformed_tokenizers_are_errors() {
    let (vocab, merges) = tiny_files();
    let json: serde_json::Value = serde_json::from_slice(tiny_tokenizer().json()).unwrap();
    let mut longer_merge = json.clone();
    longer_merge["model"]["merges"] = serde_json::json!([["Ġthe", "Ġthe"]]);
    let mut prefixed = json.clone();
    prefixed["model"]["continuing_subword_prefix"] = serde_json::json!("a long prefix");
    let mut no_vocab = json;
    no_vocab["model"]["vocab"] = serde_json::json!({});
    for bad in [
        longer_merge.to_string(),
        prefixed.to_string(),
        no_vocab.to_string(),
        "{}".to_owned(),
        "".to_owned(),
    ] {
        let error = Tokenizer::from_json(bad.as_bytes(), None).unwrap_err();
        assert!(matches!(error, DataError::Tokenizer { .. }), "{error}");
    }
    for (vocab, merges) in [
        ("[]", merges.as_str()),
        ("{}", ""),
        (vocab.as_str(), "nospace"),
        (vocab.as_str(), "Ġthe Ġthe"),
        (vocab.as_str(), "zz y"),
        ("{\"a\":-1}", ""),
    ] {
        let error = Tokenizer::from_vocab_and_merges(vocab.as_bytes(), merges.as_bytes(), None).unwrap_err();
        assert!(matches!(error, DataError::Tokenizer { .. }), "{error}");
    }
}

proptest! {
    #[test]
    fn any_merges_are_read_or_refused(merges in "([tha Ġe]{0,4} ?[thea]{0,3}\n){0,5}") {
        let (vocab, _) = tiny_files();
        let _ = Tokenizer::from_vocab_and_merges(vocab.as_bytes(), merges.as_bytes(), None);
    }
}

// ---- batches

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
            labels: vec![IGNORED, IGNORED, 3, 4],
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
    assert_eq!(batch.targets[..4], [IGNORED, 3, 4, IGNORED]);
    assert_eq!(batch.tokens[16..18], [9, 0]);
    assert_eq!(batch.targets[16..18], [8, IGNORED]);
    assert!(batch.targets[32..].iter().all(|&target| target == IGNORED));
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
    ends_ignored.labels[10..].fill(IGNORED);
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

// ---- sharding

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
