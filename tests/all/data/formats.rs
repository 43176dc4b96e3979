//! Files of every kind: recognised by what they hold, or refused by name.

use std::path::{Path, PathBuf};

use sflllm::data::{Columns, DataError, Dataset, Example, Format, Options};

use super::{Bytes, EOS, VOCAB, bytes, learned, options, read};
use sflllm::terms::tensor::IGNORED_TARGET;

fn field(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/field")
        .join(name)
}

fn load(path: &Path, options: &Options) -> Result<Dataset, DataError> {
    Dataset::load(path, Some(&Bytes), options)
}

fn with_columns(columns: &str) -> Options {
    Options {
        columns: columns.parse().unwrap(),
        ..options(256)
    }
}

fn skipping() -> Options {
    Options {
        skip_bad_lines: true,
        ..options(256)
    }
}

/// Ids and labels of a prompt and its completion.
fn completion(prompt: &str, completion: &str) -> Example {
    let (prompt, completion) = (bytes(prompt), [bytes(completion), vec![EOS]].concat());
    Example {
        labels: [vec![IGNORED_TARGET; prompt.len()], learned(&completion)].concat(),
        ids: [prompt, completion].concat(),
    }
}

fn whole(text: &str) -> Example {
    completion("", text)
}

// ---- JSON

#[test]
fn a_json_list_is_the_lines_it_would_be() {
    let texts = ["Hello there.", "Blue is a colour.", "It is four."].map(whole);
    for file in ["texts.json", "one-a-line.json"] {
        for options in [options(256), skipping()] {
            let data = load(&field("data-json-array").join(file), &options).unwrap();
            assert_eq!(data.summary.format, Format::Json, "{file}");
            assert_eq!(data.examples, texts, "{file}");
            assert_eq!(data.summary.bad_lines, 0);
        }
    }
    for (list, name) in [
        (
            "[{\"text\":\"Hello there.\"},\"Blue is a colour.\", {\"text\":\"It is four.\"}]",
            "a.txt",
        ),
        (
            "\u{feff}\r\n [\"Hello there.\",\r\n\"Blue is a colour.\",\r\n\"It is four.\"]\r\n",
            "a.jsonl",
        ),
        (
            "{\n \"text\":\n \"Hello there.\"\n}\n{\n\"text\": \"Blue is a colour.\"}\n{\"text\": \"It is four.\"}",
            "a",
        ),
    ] {
        assert_eq!(read(list, name, &options(256)).unwrap().examples, texts, "{list}");
    }
}

#[test]
fn conversations_need_a_chat_template() {
    for file in ["alpaca.json", "alpaca-compact.json"] {
        let error = load(&field("data-json-array").join(file), &options(256)).unwrap_err();
        assert!(
            matches!(
                error,
                DataError::NoTemplate {
                    format: Format::Json,
                    ..
                }
            ),
            "{error}"
        );
        let words = error.to_string();
        assert!(
            words.contains("JSON list") && words.contains("--chat-template"),
            "{words}"
        );
    }
}

#[test]
fn an_element_is_named_by_number_and_line() {
    let list = "[\n {\"text\": \"a\"},\n\n {\"txt\": \"b\"}, {\"text\": 7},\n {\"text\": \"c\"}\n]";
    let error = read(list, "l.json", &options(64)).unwrap_err();
    assert!(matches!(error, DataError::BadLine { line: 4, .. }), "{error}");
    assert!(error.to_string().contains("element 2: expected `input_ids`"), "{error}");
    let data = read(list, "l.json", &skipping()).unwrap();
    assert_eq!((data.examples.len(), data.summary.bad_lines), (2, 2));
    assert!(data.summary.first_bad_line.unwrap().starts_with("line 4: element 2: "));
}

#[test]
fn a_list_that_is_no_json_is_explained_and_never_read_in_parts() {
    for (list, line, words) in [
        (
            "[\n{\"text\": \"a\"}\n{\"text\": \"b\"}\n]",
            3,
            "commas between objects",
        ),
        ("[\n{\"text\": \"a\"},\n{\"text\": \"b", 3, "is the file complete"),
        ("[{\"text\": \"a\"},]", 1, "no JSON list"),
        ("[{\"text\": \"a\"}]\nand more", 2, "no JSON list"),
        ("{\n\"text\": \"a\",\n}\n", 3, "no JSON list"),
    ] {
        for options in [options(64), skipping()] {
            let error = read(list, "l.json", &options).unwrap_err();
            assert!(
                matches!(error, DataError::Broken { line: found, .. } if found == line),
                "{list}: {error}"
            );
            assert!(error.to_string().contains(words), "{list}: {error}");
        }
    }
    let error = read("{\"text\": \"a\"},\n{\"text\": \"b\"},\n", "l", &options(64))
        .unwrap_err()
        .to_string();
    assert!(error.contains("no commas between"), "{error}");
}

#[test]
fn text_may_begin_with_a_bracket() {
    for text in [
        "[Chorus]\nla la la\n",
        "[[Link]] is a page.\n",
        "[1] First note.\n[2] Second note.\n",
        "{curly}\n",
    ] {
        assert_eq!(
            read(text, "song.txt", &options(64)).unwrap().summary.format,
            Format::Text,
            "{text}"
        );
    }
}

#[test]
fn fields_that_nothing_is_taken_from_may_hold_anything() {
    let lines = [
        r#"{"text": "a", "prompt": 5, "labels": "x", "attention_mask": null, "meta": {"b": [1]}}"#,
        r#"{"prompt": "p", "completion": "c", "text": 7, "input_ids": null}"#,
        r#"{"text": "first", "text": "last"}"#,
        r#"{"input_ids": [1, 2], "text": 5, "token_type_ids": []}"#,
    ];
    let data = read(&lines.join("\n"), "d.jsonl", &options(64)).unwrap();
    let ids = Example {
        ids: vec![1, 2],
        labels: vec![1, 2],
    };
    assert_eq!(data.examples, [whole("a"), completion("p", "c"), whole("last"), ids]);
}

#[test]
fn what_is_missing_is_said_with_what_was_found() {
    for (line, words) in [
        (
            "{\"question\": \"a\", \"answer\": \"b\"}",
            "found `question`, `answer` (--columns",
        ),
        ("{\"instruction\": \"a\"}", "`instruction` without `output`"),
        ("{\"role\": \"user\", \"content\": \"b\"}", "put the messages into"),
        ("{\"messages\": []}", "`messages` is empty"),
        ("{\"messages\": \"x\"}", "`messages` must be JSON"),
        ("{\"messages\": {}}", "must be a list of messages"),
        (
            "{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}]}",
            "no message of the assistant",
        ),
        (
            "{\"messages\": [{\"role\": \"user\"}]}",
            "message 1: `content` (or `value`) is missing",
        ),
        (
            "{\"messages\": [{\"content\": \"x\"}]}",
            "message 1: `role` (or `from`)",
        ),
        (
            "{\"conversations\": [\"hello\"]}",
            "message 1: expected an object with `role` and `content`, found a string",
        ),
        (
            "{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"image_url\", \"image_url\": {}}]}]}",
            "type `image_url`: only text",
        ),
        (
            "{\"messages\": [{\"role\": \"assistant\", \"content\": \"x\", \"weight\": 0.5}]}",
            "`weight` must be 0",
        ),
    ] {
        let error = read(line, "d.jsonl", &options(64)).unwrap_err().to_string();
        assert!(error.contains(words), "{line}: {error}");
    }
}

// ---- masks

#[test]
fn padding_that_a_mask_hides_is_neither_seen_nor_learned() {
    let text = [52, 72, 69, 300, 308, 261, 80, 80, 76, 73, 299, 14];
    for file in ["data.jsonl", "right.jsonl", "right-unlabelled.jsonl"] {
        let data = Dataset::load(&field("data-attention-mask").join(file), None, &Options::new(64, 320)).unwrap();
        assert_eq!(data.examples[0].ids, text, "{file}");
        assert_eq!(data.examples[0].labels, learned(&text), "{file}");
        assert_eq!(data.summary.targets, 11, "{file}");
    }
}

#[test]
fn masks_and_positions_are_honoured_or_named() {
    let read = |fields: &str| {
        let line = format!("{{\"input_ids\": [5, 6, 7, 8], {fields}}}");
        Dataset::read(line.as_bytes(), "d.jsonl", None, &options(64))
    };
    let labels = |fields: &str| read(fields).unwrap().examples.remove(0).labels;
    assert_eq!(labels("\"attention_mask\": [true, true, true, true]"), [5, 6, 7, 8]);
    assert_eq!(labels("\"attention_mask\": [0, 1, 1.0, 0]"), [6, 7]);
    assert_eq!(
        labels("\"attention_mask\": [0, 1, 1, 1], \"position_ids\": [1, 0, 1, 2]"),
        [6, 7, 8]
    );
    assert_eq!(labels("\"position_ids\": [0, 1, 2, 3]"), [5, 6, 7, 8]);
    assert_eq!(labels("\"completion_mask\": [0, 0, 1, 1]"), [-100, -100, 7, 8]);
    assert_eq!(labels("\"assistant_masks\": [0, 1, 0, 1]"), [-100, 6, -100, 8]);
    assert_eq!(
        labels("\"labels\": [1, 2, 3, 4], \"completion_mask\": [0, 0, 1, 1]"),
        [1, 2, 3, 4]
    );
    for (fields, words) in [
        (
            "\"attention_mask\": [1, 0, 1, 1]",
            "`attention_mask` hides tokens in the middle",
        ),
        ("\"attention_mask\": [0, 0, 0, 0]", "`attention_mask` leaves nothing"),
        (
            "\"attention_mask\": [1, 1]",
            "`attention_mask` has 2 entries and `input_ids` 4",
        ),
        (
            "\"attention_mask\": [[1], [1], [1], [1]]",
            "`attention_mask` must be a list of 0 and 1",
        ),
        (
            "\"attention_mask\": [0, 2, 1, 1]",
            "`attention_mask` must be a list of 0 and 1",
        ),
        ("\"position_ids\": [0, 1, 0, 1]", "`position_ids` do not count"),
        ("\"position_ids\": [1, 2, 3, 4]", "`position_ids` do not count"),
        ("\"position_ids\": [0, 1]", "`position_ids` has 2 entries"),
        ("\"token_type_ids\": [0, 0, 1, 1]", "`token_type_ids` would be added"),
        ("\"token_type_ids\": [0, 0, 0, 0]", "`token_type_ids` would be added"),
        ("\"completion_mask\": [1]", "`completion_mask` has 1 entries"),
    ] {
        let error = read(fields).unwrap_err().to_string();
        assert!(error.contains(words), "{fields}: {error}");
    }
}

// ---- encodings and what is no text

#[test]
fn what_is_no_text_is_refused_by_name_whatever_may_be_skipped() {
    let directory = field("data-utf16-and-binary");
    let archive = |name: &str| std::fs::read(directory.join(name)).unwrap();
    let marked = "\u{feff}ж".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let utf16 = "Grüße aus Köln, 1. Mai.\n"
        .encode_utf16()
        .flat_map(u16::to_be_bytes)
        .collect();
    let picture = [&b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"[..], &[0; 40]].concat();
    let latin1 = b"Gr\xfc\xdfe\n".repeat(20);
    let files: [(Vec<u8>, &str); 15] = [
        (archive("le.txt"), "UTF-16"),
        (archive("le-bom.txt"), "UTF-16"),
        (archive("be-bom.txt"), "UTF-16"),
        (marked, "UTF-16"),
        (utf16, "UTF-16"),
        (archive("data.jsonl.gz"), "compressed (gzip)"),
        (archive("data.parquet"), "Parquet"),
        (b"PK\x03\x04\x14\0\0\0\x08\0".to_vec(), "ZIP"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n".to_vec(), "PDF"),
        (picture, "picture"),
        (b"GGUF\x03\0\0\0".to_vec(), "GGUF"),
        (b"\xff\xfe\0\0a\0\0\0".to_vec(), "UTF-32"),
        (b"text\n\0\x01\x02\x03 more".to_vec(), "binary"),
        ((0..=255).cycle().take(4000).collect(), "binary"),
        (latin1, "another encoding than UTF-8"),
    ];
    for (bytes, words) in files {
        for name in ["d", "d.jsonl", "d.csv"] {
            for options in [options(64), skipping()] {
                let error = Dataset::read(&bytes, name, Some(&Bytes), &options).unwrap_err();
                let said = error.to_string();
                assert!(matches!(error, DataError::NotText { .. }), "{words}: {said}");
                assert!(
                    said.contains(words) && !said.contains("skip-bad-lines"),
                    "{words}: {said}"
                );
            }
        }
    }
}

#[test]
fn line_ends_of_other_systems_are_line_ends() {
    let text = "one line\r\nand another\r\n";
    assert_eq!(
        read(text, "t", &options(64)).unwrap().examples[0].ids,
        bytes("one line\nand another\n")
    );
    let lines = "{\"text\": \"a\"}\r\n\r\n{\"text\": \"b\"}\r\n";
    assert_eq!(
        read(lines, "d.jsonl", &options(64)).unwrap().examples,
        [whole("a"), whole("b")]
    );
}

#[test]
fn words_that_begin_like_a_file_of_another_kind_are_words() {
    for text in [
        "GGUF is a format.\n",
        "GGUF für alle\n",
        "PAR1 and PAR2\n",
        "ORCs live here.\n",
        "RIFFs and solos\n",
        "MZ\n",
        "BZhang\n",
    ] {
        assert_eq!(
            read(text, "t", &options(64)).unwrap().summary.format,
            Format::Text,
            "{text}"
        );
    }
    let error = read("a\n\0b\n", "t", &Options { seq: 64, ..options(64) })
        .unwrap_err()
        .to_string();
    assert!(error.contains("binary"), "{error}");
    let long = format!("{}\n\0x\n", "word ".repeat(100));
    let error = read(&long, "t", &options(64)).unwrap_err();
    assert!(
        matches!(error, DataError::BadLine { line: 2, .. }),
        "one zero byte is its line's fault: {error}"
    );
}

// ---- tables

#[test]
fn tables_are_read_by_their_columns() {
    let expected = [
        completion("What, then?", "An \"answer\"\nof two lines"),
        completion("Ünï", "b"),
    ];
    let rows = "\"What, then?\",7,\"An \"\"answer\"\"\nof two lines\"\r\nÜnï,,b\r\n";
    for name in ["q.csv", "q.txt"] {
        let data = read(&format!("prompt,id,completion\r\n{rows}"), name, &options(64)).unwrap();
        assert_eq!(data.summary.format, Format::Table);
        assert_eq!(data.examples, expected, "{name}");
        let named = format!("\u{feff}question,id,answer\n{rows}");
        let data = read(&named, name, &with_columns("prompt=question,completion=answer")).unwrap();
        assert_eq!(data.examples, expected, "{name}");
    }
    for (delimiter, name) in [("\t", "q.tsv"), ("\t", "q"), (";", "q.csv"), (";", "q")] {
        let table = ["prompt,completion,z", "a,b,1", "c,d,2"]
            .join("\n")
            .replace(',', delimiter);
        let data = read(&table, name, &options(64)).unwrap();
        assert_eq!(
            data.examples,
            [completion("a", "b"), completion("c", "d")],
            "{delimiter:?} {name}"
        );
    }
    let data = read("id,body\n1,\"a, b\"\n2,c\n", "x.csv", &with_columns("body"));
    assert_eq!(data.unwrap().examples, [whole("a, b"), whole("c")]);
    let data = read("text\nfirst line\nsecond\n", "x.csv", &options(64)).unwrap();
    assert_eq!(data.examples, [whole("first line"), whole("second")]);
}

#[test]
fn columns_name_the_fields_of_json_too() {
    let lines = "{\"q\": \"a\", \"r\": \"b\", \"text\": \"no\"}\n";
    let data = read(lines, "d.jsonl", &with_columns("prompt=q,completion=r")).unwrap();
    assert_eq!(data.examples, [completion("a", "b")]);
    let data = read("[{\"q\": \"a\"}, {\"q\": \"b\"}]", "d.json", &with_columns("q")).unwrap();
    assert_eq!(data.examples, [whole("a"), whole("b")]);
    let error = read(lines, "d.jsonl", &with_columns("missing"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("line 1: `missing` is missing"), "{error}");
}

#[test]
fn a_table_never_becomes_running_text() {
    for name in ["t", "t.txt", "t.csv"] {
        let error = read("question,answer\na,b\nc,d\n", name, &options(64))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("a table with the columns `question`, `answer`"),
            "{name}: {error}"
        );
        assert!(
            error.contains("--columns") && !error.contains("skip-bad"),
            "{name}: {error}"
        );
    }
    let prose = [
        "Roses are red, violets are blue\nSugar is sweet, and so are you\nThe end, of it\n",
        "text\nis the first word\nof this\n",
        "one,two\nthree four five\nsix, seven, eight\n",
        "Hello, world\nHello, again\n",
    ];
    for text in prose {
        assert_eq!(
            read(text, "poem.txt", &options(64)).unwrap().summary.format,
            Format::Text,
            "{text}"
        );
    }
    let error = read("just text\nand more\n", "poem.txt", &with_columns("body"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("--columns") && error.contains("plain text"), "{error}");
    let error = read("a,b\n1,2\n", "t.csv", &with_columns("text=c"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("names `c`") && error.contains("`a`, `b`"), "{error}");
}

#[test]
fn a_bad_row_is_named_by_its_line() {
    let rows = "prompt,completion\na,b\n\"x\ny\",z,more\nc,\nd,e\n";
    let error = read(rows, "t.csv", &options(64)).unwrap_err().to_string();
    assert!(
        error.contains("t.csv, line 3: 3 fields, and the first line names 2"),
        "{error}"
    );
    let data = read(rows, "t.csv", &skipping()).unwrap();
    assert_eq!(data.examples, [completion("a", "b"), completion("d", "e")]);
    assert_eq!(data.summary.bad_lines, 2);
    let open = "text\nfine\n\"never closed\nand so on\n";
    let error = read(open, "t.csv", &options(64)).unwrap_err().to_string();
    assert!(error.contains("line 3: a quotation mark"), "{error}");
    let bytes = [&b"text\nfine\nb\xffd\n"[..]].concat();
    let error = Dataset::read(&bytes, "t.csv", Some(&Bytes), &options(64))
        .unwrap_err()
        .to_string();
    assert!(error.contains("line 3: `text` is not UTF-8"), "{error}");
}

#[test]
fn columns_that_cannot_be_meant_are_refused() {
    for (columns, words) in [
        ("prompt=a", "not enough"),
        ("question=a,answer=b", "`question=a` is none of"),
        ("text=a,text=b", "given twice"),
        ("prompt=,completion=b", "`prompt=` is none of"),
        ("", "none of"),
    ] {
        let error = columns.parse::<Columns>().unwrap_err().to_string();
        assert!(error.contains(words), "{columns}: {error}");
    }
    let columns: Columns = " instruction = a , output = b, system=c".parse().unwrap();
    assert_eq!(columns.to_string(), "instruction=a,output=b,system=c");
    assert_eq!(
        "prompt,completion".parse::<Columns>().unwrap().to_string(),
        "prompt=prompt,completion=completion"
    );
}

// ---- bounds

#[test]
fn text_beyond_the_longest_example_is_not_encoded() {
    let long = "word ".repeat(1_000_000);
    let line = format!("{{\"text\": \"{long}\"}}");
    let document = sflllm::data::Document::parse(line.as_bytes(), "d.jsonl", &options(16)).unwrap();
    assert!(document.texts()[0].len() <= 17 * 256);
    let data = read(&line, "d.jsonl", &options(16)).unwrap();
    assert_eq!((data.examples[0].ids.len(), data.summary.truncated), (16, 1));
    // Running text without a line end is cut between words.
    let document = sflllm::data::Document::parse(long.as_bytes(), "d.txt", &options(16)).unwrap();
    assert!(document.texts().iter().all(|piece| piece.len() <= 1 << 20));
    assert!(document.texts()[1..].iter().all(|piece| piece.starts_with(" word")));
    assert_eq!(document.texts().concat(), long);
    let no_words = "漢".repeat(1_000_000);
    let document = sflllm::data::Document::parse(no_words.as_bytes(), "d.txt", &options(16)).unwrap();
    assert_eq!(document.texts().concat(), no_words);
    assert!(VOCAB > EOS as usize);
}
