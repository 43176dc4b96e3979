//! Tokenizers as models bring them.

use std::collections::BTreeMap;

use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};
use sflllm::data::reader::conversation;
use sflllm::data::tokenizer::Settings;
use sflllm::data::{DataError, Dataset, Options, Tokenize, Tokenizer};

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
pub fn tiny_files() -> (String, String) {
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

pub fn tiny_tokenizer() -> Tokenizer {
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

// ---- the files beside a tokenizer

fn field(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/field")
        .join(name)
}

/// A directory with the tiny tokenizer in either layout and these files.
fn beside(layout: &str, files: &[(&str, String)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let (vocab, merges) = tiny_files();
    if layout == "old" {
        std::fs::write(dir.path().join("vocab.json"), vocab).unwrap();
        std::fs::write(dir.path().join("merges.txt"), merges).unwrap();
    } else {
        std::fs::write(dir.path().join("tokenizer.json"), tiny_tokenizer().json()).unwrap();
    }
    for (name, contents) in files {
        std::fs::write(dir.path().join(name), contents).unwrap();
    }
    dir
}

fn load(layout: &str, files: &[(&str, Value)], model_eos: Option<u32>) -> Result<Tokenizer, DataError> {
    let files: Vec<(&str, String)> = files.iter().map(|(name, json)| (*name, json.to_string())).collect();
    let dir = beside(layout, &files);
    Ok(Tokenizer::load(dir.path(), model_eos)?.unwrap())
}

#[test]
fn tokens_added_later_are_one_id_each() {
    // The ids are those of transformers.
    let expected: [&[u32]; 2] = [
        &[321, 52, 72, 69, 300, 308, 320, 65, 80, 80, 76, 73, 299, 14, 0],
        &[
            53, 78, 76, 299, 83, 221, 320, 318, 81, 85, 73, 277, 68, 296, 89, 221, 76, 65, 87, 14, 0,
        ],
    ];
    for model in ["model", "model-decoder"] {
        let tokenizer = Tokenizer::load(&field("tok-added-tokens-json").join(model), Some(0))
            .unwrap()
            .unwrap();
        assert_eq!(tokenizer.vocab_size(), 323);
        let path = field("tok-added-tokens-json/data.jsonl");
        let data = Dataset::load(&path, Some(&tokenizer), &Options::new(64, 323)).unwrap();
        let ids: Vec<&[u32]> = data.examples.iter().map(|example| &example.ids[..]).collect();
        assert_eq!(ids, expected, "{model}");
        assert_eq!(
            tokenizer.decode(&[321, 52, 322]).unwrap(),
            "T",
            "special tokens are no text"
        );
    }
}

#[test]
fn added_tokens_keep_their_ids_in_either_layout() {
    let decoder = json!({"added_tokens_decoder": {
        "264": {"content": "<sep>", "special": true},
        "265": {"content": "walrus", "special": false, "lstrip": true}}});
    let plain = json!({"<sep>": 264, "walrus": 265});
    for layout in ["old", "new"] {
        let tokenizer = load(layout, &[("tokenizer_config.json", decoder.clone())], None).unwrap();
        assert_eq!(
            tokenizer.encode("the<sep>the  walrus").unwrap(),
            [258, 264, 258, 265],
            "{layout}"
        );
        let tokenizer = load(layout, &[("added_tokens.json", plain.clone())], None).unwrap();
        assert_eq!(tokenizer.encode("the<sep>walrus").unwrap(), [258, 264, 265], "{layout}");
        assert_eq!(
            tokenizer.decode(&[264, 265]).unwrap(),
            "<sep>walrus",
            "nothing says that they are special"
        );
        let served = Tokenizer::from_json(tokenizer.json(), None).unwrap();
        assert_eq!(served.encode("the<sep>walrus").unwrap(), [258, 264, 265], "{layout}");
        let map = json!({"additional_special_tokens": ["<sep>"]});
        let files = [("added_tokens.json", plain.clone()), ("special_tokens_map.json", map)];
        assert_eq!(
            load(layout, &files, None).unwrap().decode(&[264, 265]).unwrap(),
            "walrus",
            "{layout}"
        );
    }
    // Gaps are kept where the layout allows it, and never closed silently.
    let gap = [("added_tokens.json", json!({"<sep>": 290}))];
    assert_eq!(load("old", &gap, None).unwrap().encode("<sep>").unwrap(), [290]);
    let error = load("new", &gap, None).unwrap_err().to_string();
    assert!(error.contains("added_tokens") && error.contains("290"), "{error}");
    for conflict in [json!({"the": 300}), json!({"new": 258})] {
        for layout in ["old", "new"] {
            let error = load(layout, &[("added_tokens.json", conflict.clone())], None)
                .unwrap_err()
                .to_string();
            assert!(error.contains("added_tokens"), "{conflict} {layout}: {error}");
        }
    }
}

#[test]
fn the_end_of_a_text_is_what_the_files_name() {
    let model = field("tok-eos-named-by-tokenizer-config/model");
    for model_eos in [Some(320), Some(0), None] {
        let tokenizer = Tokenizer::load(&model, model_eos).unwrap().unwrap();
        assert_eq!(
            tokenizer.eos().unwrap(),
            320,
            "</s>, though the vocabulary has <|endoftext|>"
        );
        assert!(tokenizer.stop_ids().contains(&320));
        let path = field("tok-eos-named-by-tokenizer-config/data.jsonl");
        let data = Dataset::load(&path, Some(&tokenizer), &Options::new(64, 321)).unwrap();
        // The ids are those of transformers.
        assert_eq!(
            data.examples[0].ids,
            [52, 72, 69, 300, 308, 261, 80, 80, 76, 73, 299, 14, 320]
        );
        // Clients get the tokenizer only.
        let served = Tokenizer::from_json(tokenizer.json(), model_eos).unwrap();
        assert_eq!(served.eos().unwrap(), 320);
        assert_eq!(served.digest(), tokenizer.digest());
    }
    let end = |files: &[(&str, Value)], model_eos| load("old", files, model_eos).unwrap().eos().unwrap();
    let map = (
        "special_tokens_map.json",
        json!({"eos_token": {"content": "the", "special": true}}),
    );
    let config = (
        "tokenizer_config.json",
        json!({"eos_token": {"content": "as", "__type": "AddedToken"}}),
    );
    assert_eq!(end(std::slice::from_ref(&map), None), 258);
    assert_eq!(end(&[map, config], Some(3)), 256);
    assert_eq!(
        end(&[("tokenizer_config.json", json!({"eos_token": null}))], Some(3)),
        263
    );
    let error = load("old", &[("tokenizer_config.json", json!({"eos_token": "</s>"}))], None).unwrap_err();
    assert!(error.to_string().contains("names \"</s>\" as `eos_token`"), "{error}");
}

#[test]
fn generation_stops_where_the_files_say() {
    let stops = |files: &[(&str, Value)], model_eos| load("new", files, model_eos).unwrap().stop_ids().to_vec();
    assert_eq!(stops(&[], None), [263]);
    assert_eq!(stops(&[("tokenizer_config.json", json!({}))], Some(5)), [5, 263]);
    assert_eq!(
        stops(&[("generation_config.json", json!({"eos_token_id": 7}))], Some(5)),
        [7, 263]
    );
    assert_eq!(
        stops(
            &[("generation_config.json", json!({"eos_token_id": [9, 7, 263]}))],
            None
        ),
        [7, 9, 263]
    );
    let error = load("new", &[("generation_config.json", json!({"eos_token_id": "x"}))], None).unwrap_err();
    assert!(error.to_string().contains("generation_config.json"), "{error}");
}

#[test]
fn a_text_begins_as_the_model_was_trained() {
    let begins = |files: &[(&str, Value)]| load("new", files, None).unwrap().begin().to_vec();
    assert!(begins(&[]).is_empty());
    let config = |add: bool| {
        [(
            "tokenizer_config.json",
            json!({"bos_token": "the", "add_bos_token": add}),
        )]
    };
    assert_eq!(begins(&config(true)), [258]);
    assert!(begins(&config(false)).is_empty());
    let error = load(
        "new",
        &[("tokenizer_config.json", json!({"add_bos_token": true}))],
        None,
    )
    .unwrap_err();
    assert!(error.to_string().contains("no `bos_token`"), "{error}");

    // Llama 3's way: a template in the tokenizer itself.
    let mut json: Value = serde_json::from_slice(tiny_tokenizer().json()).unwrap();
    json["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "the", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"the": {"id": "the", "ids": [258], "tokens": ["the"]}},
    });
    let tokenizer = Tokenizer::from_json(json.to_string().as_bytes(), None).unwrap();
    assert_eq!((tokenizer.begin(), tokenizer.bos()), (&[258][..], Some(258)));
    assert_eq!(tokenizer.prompt("was").unwrap(), [258, 119, 256]);
    let read = |text: &str| {
        Dataset::read(text.as_bytes(), "d", Some(&tokenizer), &Options::new(4, 264))
            .unwrap()
            .examples
    };
    assert_eq!(read("{\"text\": \"as\"}\n")[0].ids, [258, 256, 263]);
    let windows: Vec<Vec<u32>> = read("as as as").into_iter().map(|example| example.ids).collect();
    assert_eq!(
        windows.concat()[..3],
        [258, 256, 32],
        "once, where the text begins: {windows:?}"
    );
    let served = Tokenizer::from_json(tokenizer.json(), None).unwrap();
    assert_eq!(served.begin(), [258]);
    let settings = Settings {
        add_bos: Some(false),
        ..Settings::default()
    };
    let tokenizer = Tokenizer::with_settings(tokenizer.json(), settings, None).unwrap();
    assert!(tokenizer.begin().is_empty());
}

const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}{{ '<sep>' + m.content + eos_token }}{% endfor %}\
                        {% if add_generation_prompt %}{{ '<sep>' }}{% endif %}";

#[test]
fn a_chat_template_is_found_wherever_it_is_kept_and_served() {
    let config = |template: Value| {
        json!({"chat_template": template, "eos_token": "<e>", "bos_token": "as",
               "added_tokens_decoder": {"264": {"content": "<sep>", "special": true}, "265": {"content": "<e>", "special": true}}})
    };
    let named = json!([{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]);
    let in_config = vec![("tokenizer_config.json", config(TEMPLATE.into()).to_string())];
    let listed = vec![("tokenizer_config.json", config(named).to_string())];
    let apart = vec![
        ("tokenizer_config.json", config("no {{".into()).to_string()),
        ("chat_template.jinja", TEMPLATE.to_owned()),
    ];
    let other = vec![
        ("tokenizer_config.json", config(Value::Null).to_string()),
        ("chat_template.json", json!({"chat_template": TEMPLATE}).to_string()),
    ];
    for files in [in_config, listed, apart, other] {
        let dir = beside("new", &files);
        let tokenizer = Tokenizer::load(dir.path(), None).unwrap().unwrap();
        let served = Tokenizer::from_json(tokenizer.json(), None).unwrap();
        for tokenizer in [tokenizer, served] {
            assert_eq!(tokenizer.chat_template(), Some(TEMPLATE));
            let talk = conversation(r#"[{"role": "user", "content": "the"}]"#).unwrap();
            let (ids, stop) = tokenizer.chat_prompt(&talk).unwrap();
            assert_eq!((ids, stop), (vec![256, 264, 258, 265, 264], vec![265]));
            let line =
                br#"{"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": " the was"}]}"#;
            let data = Dataset::read(line, "d", Some(&tokenizer), &Options::new(16, 266)).unwrap();
            assert_eq!(data.examples[0].ids, [256, 264, 258, 265, 264, 259, 262, 265]);
            assert_eq!(data.examples[0].labels, [-100, -100, -100, -100, -100, 259, 262, 265]);
        }
    }
    let broken = load(
        "new",
        &[("tokenizer_config.json", json!({"chat_template": "{% if %}"}))],
        None,
    )
    .unwrap_err();
    assert!(matches!(broken, DataError::Template { .. }), "{broken}");
    let talk = conversation(r#"{"messages": [{"role": "user", "content": "the"}]}"#).unwrap();
    let error = tiny_tokenizer().chat_prompt(&talk).unwrap_err().to_string();
    assert!(error.contains("--chat-template"), "{error}");
}

#[test]
fn another_chat_template_can_be_given() {
    let tokenizer = tiny_tokenizer().with_chat_template("chatml").unwrap();
    let line = br#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\n\nthe"}]}"#;
    let data = Dataset::read(line, "d", Some(&tokenizer), &Options::new(200, 264)).unwrap();
    let text = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n\n\nthe<|im_end|>\n";
    let example = &data.examples[0];
    assert_eq!(example.ids, tokenizer.encode(text).unwrap());
    let learned: Vec<u32> = example
        .labels
        .iter()
        .filter_map(|&label| u32::try_from(label).ok())
        .collect();
    // Two line ends are one token, of which the second is the answer's.
    assert_eq!(tokenizer.decode(&learned).unwrap(), "\n\n\nthe<|im_end|>\n");
    assert_ne!(tokenizer.digest(), tiny_tokenizer().digest());
    assert!(tiny_tokenizer().with_chat_template("{{").is_err());
}

#[test]
fn what_a_gguf_file_says_of_its_tokenizer_counts() {
    let settings = Settings {
        eos: Some(258),
        bos: Some(256),
        add_bos: Some(true),
        stop: vec![257],
        chat_template: Some("{{ bos_token }}{{ messages[0].content }}".to_owned()),
        ..Settings::default()
    };
    let tokenizer = Tokenizer::with_settings(tiny_tokenizer().json(), settings, Some(3)).unwrap();
    assert_eq!((tokenizer.eos().unwrap(), tokenizer.begin()), (258, &[256][..]));
    assert_eq!(tokenizer.stop_ids(), [257, 258]);
    let served = Tokenizer::from_json(tokenizer.json(), Some(3)).unwrap();
    assert_eq!((served.eos().unwrap(), served.begin()), (258, &[256][..]));
    assert_eq!(served.stop_ids(), [257, 258]);
    assert!(served.json() == tokenizer.json(), "what is served again is the same");
}

#[test]
fn files_of_other_kinds_of_tokenizer_are_named() {
    let class = |class: &str| [("tokenizer_config.json", json!({"tokenizer_class": class}))];
    let error = load("old", &class("RobertaTokenizer"), None).unwrap_err().to_string();
    assert!(
        error.contains("RobertaTokenizer") && error.contains("save_pretrained"),
        "{error}"
    );
    assert!(
        load("new", &class("RobertaTokenizer"), None).is_ok(),
        "tokenizer.json says all there is to say"
    );
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.model"), [10, 14]).unwrap();
    let error = Tokenizer::load(dir.path(), None).unwrap_err().to_string();
    assert!(
        error.contains("tokenizer.model") && error.contains("SentencePiece"),
        "{error}"
    );

    let qwen = load("old", &class("Qwen2Tokenizer"), None).unwrap();
    assert_eq!(
        qwen.encode("e\u{301}").unwrap(),
        [0xc3, 0xa9],
        "composed before it is cut"
    );
    let spaced = [("tokenizer_config.json", json!({"add_prefix_space": true}))];
    assert_eq!(load("old", &spaced, None).unwrap().encode("the").unwrap(), [259]);
    for file in [
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "generation_config.json",
    ] {
        let dir = beside("new", &[(file, "{".to_owned())]);
        let error = Tokenizer::load(dir.path(), None).unwrap_err().to_string();
        assert!(error.contains(file), "{error}");
    }
    let dir = beside(
        "new",
        &[("tokenizer_config.json", "\u{feff}{\"eos_token\": \"the\"}".to_owned())],
    );
    assert_eq!(Tokenizer::load(dir.path(), None).unwrap().unwrap().eos().unwrap(), 258);
}

#[test]
fn ids_without_a_token_are_known() {
    let json = std::fs::read(field("gen-padded-vocabulary/model/tokenizer.json")).unwrap();
    let tokenizer = Tokenizer::from_json(&json, Some(0)).unwrap();
    assert!((0..320).all(|id| tokenizer.has(id)));
    assert!((320..400).all(|id| !tokenizer.has(id)));
}

#[test]
fn text_that_a_tokenizer_would_blow_up_is_never_made() {
    let json: Value = serde_json::from_slice(tiny_tokenizer().json()).unwrap();
    let replace = |pattern: Value, content: &str| json!({"type": "Replace", "pattern": pattern, "content": content});
    let tenfold = replace(json!({"String": "a"}), "aaaaaaaaaa");
    for normalizer in [
        replace(json!({"String": "a"}), &"b".repeat(1000)),
        replace(json!({"Regex": ""}), &"b".repeat(100)),
        json!({"type": "Sequence", "normalizers": [tenfold, tenfold, tenfold]}),
        json!({"type": "Prepend", "prepend": "x".repeat(1000)}),
        json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    ] {
        let mut json = json.clone();
        json["normalizer"] = normalizer.clone();
        let error = Tokenizer::from_json(json.to_string().as_bytes(), None)
            .unwrap_err()
            .to_string();
        assert!(error.contains("its normalizer"), "{normalizer}: {error}");
    }
    let mut decoder = json.clone();
    decoder["decoder"] = replace(json!({"String": "a"}), &"b".repeat(1000));
    assert!(Tokenizer::from_json(decoder.to_string().as_bytes(), None).is_err());
    let mut common = json;
    common["normalizer"] = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, replace(json!({"String": " "}), "▁"), {"type": "NFKC"}]});
    assert!(Tokenizer::from_json(common.to_string().as_bytes(), None).is_ok());
}

/// Within what files may ask for, and far beyond what any tokenizer needs.
#[test]
fn a_text_that_its_normalizer_blows_up_is_refused_before_it_is_large() {
    let mut json: Value = serde_json::from_slice(tiny_tokenizer().json()).unwrap();
    let fold = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to.repeat(8)});
    json["normalizer"] = json!({"type": "Sequence", "normalizers": [fold("a", "b"), fold("b", "c")]});
    let tokenizer = Tokenizer::from_json(json.to_string().as_bytes(), None).unwrap();
    let error = tokenizer.encode(&"a".repeat(40_000)).unwrap_err().to_string();
    assert!(
        error.contains("normalizer") && error.contains("1048576 bytes of 16384"),
        "{error}"
    );
    // What grows little, or is little, is read.
    assert!(
        tokenizer
            .encode(&"a lot of text that is as usual. ".repeat(4000))
            .is_ok()
    );
    assert_eq!(
        tokenizer.encode("a").unwrap(),
        tokenizer.encode(&"b".repeat(8)).unwrap()
    );
    json["normalizer"] = json!({"type": "NFKC"});
    let tokenizer = Tokenizer::from_json(json.to_string().as_bytes(), None).unwrap();
    assert!(
        tokenizer.encode(&"ﷺ".repeat(20_000)).is_ok(),
        "the longest that Unicode makes of one character"
    );
}

#[test]
fn text_comes_as_soon_as_it_is_whole() {
    let tokenizer = tiny_tokenizer();
    for text in ["the cat was here", "ünïcödé 🦀 and 漢字\n", "\u{fffd} and on", ""] {
        let mut stream = tokenizer.decode_stream();
        let mut pieces = Vec::new();
        for id in tokenizer.encode(text).unwrap() {
            let piece = stream.push(id).unwrap();
            assert!(
                text.starts_with(&format!("{}{piece}", pieces.concat())),
                "{text:?}: {pieces:?} then {piece:?}"
            );
            pieces.push(piece);
        }
        pieces.push(stream.finish().unwrap());
        assert_eq!(pieces.concat(), text);
    }
    let mut stream = tokenizer.decode_stream();
    let crab = "🦀".bytes().map(u32::from).collect::<Vec<u32>>();
    let pieces: Vec<String> = crab.iter().map(|&id| stream.push(id).unwrap()).collect();
    assert_eq!(pieces, ["", "", "", "🦀"]);
    assert_eq!(stream.push(263).unwrap(), "", "the end of a text is no text");
    assert_eq!(stream.push(crab[0]).unwrap(), "");
    assert_eq!(stream.finish().unwrap(), "\u{fffd}", "what is cut is shown as such");
    assert!(matches!(
        tokenizer.decode_stream().push(9999),
        Err(DataError::Token { id: 9999, .. })
    ));
}

proptest! {
    #[test]
    fn any_side_file_is_read_or_refused(
        file in 0usize..5, json in r#"\{("(eos_token|chat_template|added_tokens_decoder|the|eos_token_id)": ?("[a-z<>]{0,6}"|[0-9]{1,11}|null|\[[0-9]{0,3}\]|\{"[0-9a-z]{1,4}": ?(5|\{"content": "q"\})\}),?){0,2}\}"#
    ) {
        let file = ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
                    "chat_template.json"][file];
        for layout in ["old", "new"] {
            let dir = beside(layout, &[(file, json.clone())]);
            let _ = Tokenizer::load(dir.path(), None);
        }
    }
}
