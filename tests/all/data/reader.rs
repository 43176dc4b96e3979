//! Data files into examples.

use proptest::prelude::*;
use sflllm::data::{DataError, Dataset, Document, Example, Format, Marks, Options, Tokenize};

use super::tokenizer::tiny_tokenizer;
use super::{Bytes, EOS, VOCAB, bytes, learned, options, read};
use sflllm::terms::tensor::IGNORED_TARGET;

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
        [vec![IGNORED_TARGET; context.len()], learned(&reference)].concat()
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
        [vec![IGNORED_TARGET; 2], learned(&bytes("cd")), vec![EOS as i32]].concat()
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
        ("{\"text\":1}\n", "d", 1, "must be a string"),
        ("{\"txt\":\"a\"}\n", "d", 1, "expected `input_ids`"),
        ("{\"prompt\":\"a\"}\n", "d", 1, "without `completion`"),
        ("{\"completion\":\"a\"}\n", "d", 1, "without `prompt`"),
        ("{\"input_ids\":[1,300]}\n", "d", 1, "300"),
        ("{\"input_ids\":[-1,2]}\n", "d", 1, "holds -1"),
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
    let marks = Marks {
        begin: Vec::new(),
        end: Some(EOS),
    };
    assert_eq!(
        document.clone().assemble(ids.clone(), Vec::new(), &marks).unwrap(),
        read(text, "e", &options(64)).unwrap()
    );

    let fewer = document.clone().assemble(ids[1..].to_vec(), Vec::new(), &marks);
    assert!(matches!(fewer, Err(DataError::TextCount { expected: 4, found: 3 })));
    assert!(matches!(
        document.clone().assemble(ids.clone(), Vec::new(), &Marks::default()),
        Err(DataError::NoEndToken)
    ));
    let mut outside = ids;
    outside[2] = vec![300];
    assert!(matches!(
        document.assemble(outside, Vec::new(), &marks),
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
            r#"\{"(input_ids|labels|prompt|completion|text|attention_mask|messages|conversations|instruction|output)": ?(\[(-?[0-9]{1,4},)?[0-9]{1,12}\]|"[a-z]{0,3}"|null|-?1e9)(,"labels":\[1\])?\}?"#,
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
