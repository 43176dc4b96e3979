//! Conversations: written as `transformers` writes them, learned on what the assistant says.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use sflllm::data::chat::{CHATML, Manner, Transcript};
use sflllm::data::reader::conversation;
use sflllm::data::{Conversation, DataError, Dataset, Encoded, Example, Format, Options, Render, Template, Tokenize};
use sflllm::terms::tensor::IGNORED_TARGET;

use super::{Bytes, bytes, learned, options};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/chat")
}

#[derive(Deserialize)]
struct Expected {
    bos_token: Option<String>,
    eos_token: Option<String>,
    end_of_turn: String,
    rendered: BTreeMap<String, Rendered>,
}

#[derive(Deserialize)]
struct Rendered {
    text: Option<String>,
    prompted: Option<String>,
    learned: Option<Vec<String>>,
    error: Option<String>,
}

fn template(source: &str, tokens: &[(&str, &str)]) -> Template {
    let named = tokens
        .iter()
        .map(|(name, token)| ((*name).to_owned(), (*token).to_owned()));
    let special = tokens.iter().map(|(_, token)| (*token).to_owned()).collect();
    Template::new(source, named.collect(), special).unwrap()
}

/// A conversation all of whose answers are learned.
fn parse(messages: &str) -> Conversation {
    let mut conversation = conversation(messages).unwrap();
    for message in &mut conversation.messages {
        message.learned = message.role == "assistant";
    }
    conversation
}

fn lay_out(template: &Template, messages: &str) -> Result<Transcript, String> {
    let manner = Manner::of(template).map_err(|flaw| flaw.to_string())?;
    manner
        .lay_out(template, parse(messages), 1 << 20)
        .map_err(|flaw| flaw.to_string())
}

fn answers(template: &Template, messages: &str) -> Vec<String> {
    let Transcript { text, learned } = lay_out(template, messages).unwrap();
    learned.into_iter().map(|range| text[range].to_owned()).collect()
}

#[test]
fn conversations_are_written_and_learned_as_with_transformers() {
    let read = |name: &str| fs::read_to_string(fixtures().join(name)).unwrap();
    let text = read("conversations.json");
    let conversations: BTreeMap<String, &RawValue> = serde_json::from_str(&text).unwrap();
    let expected: BTreeMap<String, Expected> = serde_json::from_str(&read("expected.json")).unwrap();
    let mut compared = 0;
    for (name, expected) in expected {
        let mut tokens = vec![("end", expected.end_of_turn.as_str())];
        tokens.extend(expected.bos_token.as_deref().map(|token| ("bos_token", token)));
        tokens.extend(expected.eos_token.as_deref().map(|token| ("eos_token", token)));
        let template = template(&read(&format!("{name}.jinja")), &tokens);
        for (case, rendered) in expected.rendered {
            let at = format!("{name}, {case}");
            let messages = conversations[&case].get();
            if let Some(refusal) = rendered.error {
                let error = template.render(&parse(messages), false).unwrap_err().to_string();
                assert!(error.contains(&refusal), "{at}: {error}");
                continue;
            }
            assert_eq!(template.render(&parse(messages), false).ok(), rendered.text, "{at}");
            assert_eq!(template.render(&parse(messages), true).ok(), rendered.prompted, "{at}");
            assert_eq!(answers(&template, messages), rendered.learned.unwrap(), "{at}");
            compared += 1;
        }
    }
    assert!(compared > 30, "{compared}");
}

#[test]
fn what_stands_around_answers_is_found_for_other_manners_too() {
    let talk = json!([
        {"role": "user", "content": "A?"}, {"role": "assistant", "content": " B. \n"},
        {"role": "user", "content": "C?"}, {"role": "assistant", "content": "B."},
    ])
    .to_string();
    let tokens = [("bos_token", "<s>"), ("eos_token", "</s>"), ("end", "<end>")];
    for (source, expected) in [
        // Llama 2: no beginning of an answer, and stripped.
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}\
             {% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
            ["B. </s>", "B. </s>"],
        ),
        // Another name for the assistant.
        (
            "{% for m in messages %}{{ ('model' if m.role == 'assistant' else m.role) + ':' + m.content|trim + '<end>\n' }}\
             {% endfor %}{% if add_generation_prompt %}model:{% endif %}",
            ["B.<end>", "B.<end>"],
        ),
        // The beginning of an answer is written whether or not it is asked for.
        (
            "{% for m in messages %}{{ '<s>' + m.role + '\n' + m.content + '<end>\n' }}{% endfor %}{{ '<s>assistant\n' }}",
            [" B. \n<end>", "B.<end>"],
        ),
        // No special token ends a turn.
        (
            "{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}\
             {% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
            [" B. \n\n\n", "B.\n\n"],
        ),
        // Marks of answers, loop controls, and what the last answer has that others have not.
        (
            "{% for m in messages %}{% if m.role == 'none' %}{% continue %}{% endif %}\n  \
             {{- '<s>' + m.role + '\n' }}{%- if m.role == 'assistant' -%}{% generation %}\
             {% if loop.last %}<think></think>{% endif %}{{ m.content + '<end>' }}{% endgeneration %}{% else %}\
             {{ m.content }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}",
            [" B. \n<end>", "<think></think>B.<end>"],
        ),
    ] {
        assert_eq!(answers(&template(source, &tokens), &talk), expected, "{source}");
    }
}

#[test]
fn calls_of_tools_are_learned_where_the_template_writes_them() {
    // As text: the order of fields is written as it stands.
    let talk = r#"{
        "messages": [
            {"role": "user", "content": "Warm?"},
            {"role": "assistant", "content": null, "tool_calls": [
                {"type": "function", "function": {"name": "weather", "arguments": {"town": "Oslo", "days": 1}}}
            ]},
            {"role": "tool", "content": "20"},
            {"role": "assistant", "content": "Yes."}
        ],
        "tools": [{"type": "function", "function": {"name": "weather"}}]
    }"#;
    let source = "{{ tools|tojson }}{% for m in messages %}{{ '<s>' + m.role + '\n' }}{% if m.tool_calls %}\
                  {% for call in m.tool_calls %}{{ call.function|tojson }}{% endfor %}\
                  {% else %}{{ m.content }}{% endif %}<end>\n{% endfor %}\
                  {% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}";
    let tokens = [("end", "<end>")];
    let call = "{\"name\": \"weather\", \"arguments\": {\"town\": \"Oslo\", \"days\": 1}}<end>";
    assert_eq!(answers(&template(source, &tokens), talk), [call, "Yes.<end>"]);
    let error = lay_out(&template(CHATML, &[]), talk).unwrap_err();
    assert!(
        error.contains("cannot write it") || error.contains("calls of tools"),
        "{error}"
    );
}

#[test]
fn an_answer_that_is_not_shown_is_named() {
    let talk = json!([{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]).to_string();
    let deaf = template("{% for m in messages %}{{ m.role }}{% endfor %}", &[]);
    assert!(
        lay_out(&deaf, &talk)
            .unwrap_err()
            .contains("does not show what the assistant says")
    );
    let loud = template("{% for m in messages %}{{ m.content|upper }}{% endfor %}", &[]);
    assert!(
        lay_out(&loud, &talk)
            .unwrap_err()
            .contains("does not show what the assistant says")
    );
}

#[test]
fn long_conversations_are_laid_out_as_far_as_they_matter() {
    let turn = |index: usize| {
        let role = if index.is_multiple_of(2) { "user" } else { "assistant" };
        json!({"role": role, "content": format!("message {index}")})
    };
    let talk = json!((0..20_000).map(turn).collect::<Vec<Value>>()).to_string();
    let template = template(CHATML, &[]);
    let manner = Manner::of(&template).unwrap();
    let Transcript { text, learned } = manner.lay_out(&template, parse(&talk), 4000).unwrap();
    assert!(text.len() > 4000 && text.len() < 40_000, "{}", text.len());
    assert!(
        learned
            .iter()
            .all(|range| range.start <= 4000 && range.end <= text.len())
    );
    assert_eq!(&text[learned[1].clone()], "message 3<|im_end|>\n");
}

// ---- from files

/// [`Bytes`] with a chat template, and a special token of its own.
struct Chatting(Template);

impl Tokenize for Chatting {
    fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        Bytes.encode(text)
    }

    fn eos(&self) -> Result<u32, DataError> {
        Bytes.eos()
    }

    fn encode_with_ends(&self, texts: &[String]) -> Result<Vec<Encoded>, DataError> {
        Bytes.encode_with_ends(texts)
    }

    fn template(&self) -> Option<&dyn Render> {
        Some(&self.0)
    }
}

const PLAIN: &str = "{% for m in messages %}{{ m.role[0] + ':' + m.content + '<e>\n' }}{% endfor %}\
                     {% if add_generation_prompt %}a:{% endif %}";

fn read(text: &str, name: &str, options: &Options) -> Result<Dataset, DataError> {
    let template = template(PLAIN, &[("eos_token", "<e>")]);
    Dataset::read(text.as_bytes(), name, Some(&Chatting(template)), options)
}

/// The example whose text has its learned parts between `[` and `]`.
fn marked(text: &str) -> Example {
    let mut example = Example {
        ids: Vec::new(),
        labels: Vec::new(),
    };
    for (index, part) in text.split(['[', ']']).enumerate() {
        let ids = bytes(part);
        example.labels.extend(if index % 2 == 1 {
            learned(&ids)
        } else {
            vec![IGNORED_TARGET; ids.len()]
        });
        example.ids.extend(ids);
    }
    example
}

#[test]
fn conversations_are_read_in_every_spelling() {
    let expected = marked("s:Be kind.<e>\nu:Hi\nthere<e>\na:[Hello.<e>]\n");
    let lines = [
        json!({"messages": [
            {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi\nthere"},
            {"role": "assistant", "content": "Hello."}]}),
        json!({"conversations": [
            {"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi\nthere"},
            {"from": "gpt", "value": "Hello."}]}),
        json!({"system": "Be kind.", "conversations": [
            {"role": "user", "content": "Hi\nthere"}, {"role": "model", "content": "Hello."}]}),
        json!({"messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be kind."}]},
            {"role": "user", "content": [{"type": "text", "text": "Hi\n"}, {"type": "input_text", "text": "there"}]},
            {"role": "assistant", "content": ["Hello."]}]}),
        json!({"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi\nthere"}],
               "completion": [{"role": "assistant", "content": "Hello."}]}),
        json!({"messages": "[{\"role\": \"system\", \"content\": \"Be kind.\"}, {\"role\": \"user\", \"content\": \
               \"Hi\\nthere\"}, {\"role\": \"assistant\", \"content\": \"Hello.\"}]"}),
    ];
    for line in &lines {
        let data = read(&line.to_string(), "d", &options(256)).unwrap();
        assert_eq!(data.examples, std::slice::from_ref(&expected), "{line}");
    }
    let list = json!(lines).to_string();
    let data = read(&list, "d.json", &options(256)).unwrap();
    assert_eq!(data.examples, vec![expected; lines.len()]);
    assert_eq!(data.summary.format, Format::Json);
}

#[test]
fn instructions_are_conversations_of_one_turn() {
    let lines = "{\"instruction\": \"Add.\", \"input\": \"2 and 2\", \"output\": \"Four.\"}\n\
                 {\"instruction\": \"Say hello.\", \"input\": \"\", \"output\": \"Hello.\", \"history\": []}\n";
    let expected = [
        marked("u:Add.\n\n2 and 2<e>\na:[Four.<e>]\n"),
        marked("u:Say hello.<e>\na:[Hello.<e>]\n"),
    ];
    assert_eq!(read(lines, "d.jsonl", &options(256)).unwrap().examples, expected);
    let table = "instruction,input,output\nAdd.,2 and 2,Four.\nSay hello.,,Hello.\n";
    assert_eq!(read(table, "d.csv", &options(256)).unwrap().examples, expected);
    let mut other = options(256);
    other.columns = "instruction=q,input=context,output=r".parse().unwrap();
    let table = "q,context,r\nAdd.,2 and 2,Four.\nSay hello.,,Hello.\n";
    assert_eq!(read(table, "d.csv", &other).unwrap().examples, expected);
}

#[test]
fn weights_say_which_answers_are_learned() {
    let line = json!({"messages": [
        {"role": "user", "content": "A"}, {"role": "assistant", "content": "no", "weight": 0},
        {"role": "user", "content": "B"}, {"role": "assistant", "content": "yes", "weight": 1}]});
    let data = read(&line.to_string(), "d.jsonl", &options(256)).unwrap();
    assert_eq!(data.examples, [marked("u:A<e>\na:no<e>\nu:B<e>\na:[yes<e>]\n")]);
}

#[test]
fn a_conversation_that_the_template_refuses_is_a_bad_line() {
    let source = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system, please') }}{% endif %}\
                  {{ m.role[0] + ':' + m.content + '<e>\n' }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}";
    let tokenizer = Chatting(template(source, &[("eos_token", "<e>")]));
    let talk = |system: bool| {
        let mut messages = vec![
            json!({"role": "user", "content": "A"}),
            json!({"role": "assistant", "content": "B"}),
        ];
        if system {
            messages.insert(0, json!({"role": "system", "content": "S"}));
        }
        json!({ "messages": messages }).to_string()
    };
    let lines = [talk(false), "{}".to_owned(), talk(true), talk(false)].join("\n");
    let strict = options(256);
    let skipping = Options {
        skip_bad_lines: true,
        ..options(256)
    };
    let all = |options| Dataset::read(lines.as_bytes(), "d.jsonl", Some(&tokenizer), options);
    assert!(matches!(all(&strict), Err(DataError::BadLine { line: 2, .. })));
    let data = all(&skipping).unwrap();
    assert_eq!((data.examples.len(), data.summary.bad_lines), (2, 2));
    assert!(data.summary.first_bad_line.unwrap().starts_with("line 2: "));
    let only = talk(true);
    let error = Dataset::read(only.as_bytes(), "d.jsonl", Some(&tokenizer), &strict)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("line 1: the chat template refuses it: no system, please"),
        "{error}"
    );
    let error = Dataset::read(only.as_bytes(), "d.jsonl", Some(&tokenizer), &skipping)
        .unwrap_err()
        .to_string();
    assert!(error.contains("no system, please"), "{error}");
}

#[test]
fn a_conversation_is_cut_like_any_example() {
    let line = |question: &str| {
        json!({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "0123456789"}]})
            .to_string()
    };
    let data = read(
        &[line("A"), line(&"long ".repeat(2000))].join("\n"),
        "d.jsonl",
        &options(16),
    )
    .unwrap();
    assert_eq!(data.examples[0].ids.len(), 16);
    assert_eq!(data.examples[0].labels, marked("u:A<e>\na:[0123456]").labels);
    assert_eq!((data.summary.truncated, data.summary.dropped), (2, 1));
}
