//! Jinja chat templates, run natively as `transformers` runs them.
//!
//! It is separate from `chat` because a browser runs templates in JavaScript. What differs from plain Jinja is what
//! `transformers` sets up: white space around blocks, `raise_exception`, `strftime_now`, `tojson` as Python writes
//! JSON (`python`), loop controls, and `{% generation %}`, which marks answers and writes nothing. Templates come with models,
//! so a run is bounded in steps and in what it may write.

mod date;
mod python;

use std::collections::BTreeMap;
use std::io;

use minijinja::{Environment, Error, ErrorKind, Value, context};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::chat::{Conversation, Render};
use super::{DataError, Flaw};

/// Steps of one run. A template takes about a hundred a message.
const MOST_STEPS: u64 = 10_000_000;
/// Bytes that one run may write.
const MOST_BYTES: usize = 64 << 20;
/// The template's name, also in the interpreter's own messages.
const NAME: &str = "chat";

/// A chat template, with the tokens it may name.
#[derive(Clone, Debug)]
pub struct Template {
    environment: Environment<'static>,
    /// `bos_token`, `eos_token` and others by name.
    variables: BTreeMap<String, String>,
    special_tokens: Vec<String>,
}

impl Template {
    /// Parses a template. `variables` are the tokens it may name, such as `bos_token`; `special_tokens` all those of
    /// the vocabulary that stand for no text.
    ///
    /// # Errors
    /// [`DataError::Template`].
    pub fn new(
        source: &str,
        variables: BTreeMap<String, String>,
        special_tokens: Vec<String>,
    ) -> Result<Self, DataError> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(MOST_STEPS));
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.set_formatter(python::write_as_python);
        environment.add_filter("tojson", python::to_json);
        environment.add_filter("string", |value: &Value| python::python_text(value));
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", date::now);
        environment
            .add_template_owned(NAME, without_generation_marks(source))
            .map_err(|error| DataError::Template {
                reason: error.to_string(),
            })?;
        Ok(Self {
            environment,
            variables,
            special_tokens,
        })
    }
}

impl Render for Template {
    fn render(&self, conversation: &Conversation, add_generation_prompt: bool) -> Result<String, Flaw> {
        let variables = Value::from_serialize(&self.variables);
        let run = || {
            let template = self.environment.get_template(NAME)?;
            let mut text = Bounded(Vec::new());
            template.render_captured_to(
                context! {
                    add_generation_prompt,
                    messages => Value::from_serialize(&conversation.messages),
                    tools => Value::from_serialize(&conversation.tools),
                    documents => (),
                    ..variables
                },
                &mut text,
            )?;
            Ok(text.0)
        };
        let bytes = run().map_err(|error| flaw(&error))?;
        String::from_utf8(bytes).map_err(|_| Flaw::new("the chat template writes no text"))
    }

    fn special_tokens(&self) -> &[String] {
        &self.special_tokens
    }
}

/// What a template's failure means for the conversation it was given.
fn flaw(error: &Error) -> Flaw {
    let detail = error.detail().unwrap_or_default();
    match error.kind() {
        ErrorKind::OutOfFuel => Flaw::new("the chat template does not come to an end"),
        ErrorKind::WriteFailure => Flaw::new(format!("the chat template writes more than {MOST_BYTES} bytes for it")),
        ErrorKind::InvalidOperation if detail.starts_with(REFUSED) => {
            Flaw::new(format!("the chat template refuses it: {}", &detail[REFUSED.len()..]))
        }
        _ => Flaw::new(format!("the chat template cannot write it: {error}")),
    }
}

/// Marks what `raise_exception` was given among the interpreter's own messages.
const REFUSED: &str = "refused: ";

fn raise_exception(message: &str) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, format!("{REFUSED}{message}")))
}

/// Takes what a template writes, up to a bound.
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MOST_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Makes `{% generation %}` and `{% endgeneration %}` an `if` that always holds, which treats white space alike.
fn without_generation_marks(source: &str) -> String {
    let mut plain = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        plain.push_str(before);
        let inside = &tag[2..];
        let word_at = inside.len() - inside.trim_start_matches(['-', '+']).trim_start().len();
        let word = &inside[word_at..];
        let length = word
            .find(|c: char| !c.is_alphanumeric() && c != '_')
            .unwrap_or(word.len());
        let replacement = match &word[..length] {
            "generation" => "if true",
            "endgeneration" => "endif",
            other => other,
        };
        plain.push_str(&tag[..2 + word_at]);
        plain.push_str(replacement);
        rest = &word[length..];
    }
    plain.push_str(rest);
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(source: &str, values: Value) -> String {
        let template = Template::new(source, BTreeMap::new(), Vec::new()).unwrap();
        template.environment.get_template(NAME).unwrap().render(values).unwrap()
    }

    #[test]
    fn values_are_written_as_python_writes_them() {
        let values = Value::from_serialize(serde_json::json!({
            "yes": true, "nothing": null, "list": ["it's", "say \"no\"", 1, 2.0], "map": {"a": false}, "small": 1.5e-7,
            "large": 1e20, "half": 0.5
        }));
        for (source, text) in [
            ("{{ yes }} {{ nothing }} {{ missing }}|", "True None |"),
            ("{{ list }}", "[\"it's\", 'say \"no\"', 1, 2.0]"),
            (
                "{{ map }} {{ small }} {{ large }} {{ half }}",
                "{'a': False} 1.5e-07 1e+20 0.5",
            ),
            ("{{ list|tojson }}", "[\"it's\", \"say \\\"no\\\"\", 1, 2.0]"),
            ("{{ map|tojson(indent=2) }}", "{\n  \"a\": false\n}"),
            (
                "{{ {'b': 1, 'a': [], 'c': {}}|tojson(indent=1) }}",
                "{\n \"b\": 1,\n \"a\": [],\n \"c\": {}\n}",
            ),
            (
                "{{ {'b': 1, 'a': '<é\\n>'}|tojson(sort_keys=true) }}",
                "{\"a\": \"<é\\n>\", \"b\": 1}",
            ),
            (
                "{{ {'b': 1, 'a': '🦀'}|tojson(ensure_ascii=true, separators=(',', ':')) }}",
                "{\"b\":1,\"a\":\"\\ud83e\\udd80\"}",
            ),
        ] {
            assert_eq!(write(source, values.clone()), text, "{source}");
        }
    }

    #[test]
    fn generation_marks_write_nothing_and_keep_white_space_rules() {
        let source = "a\n  {%- generation -%}\n b\n{% endgeneration %}\nc {% if true %}generation{% endif %}";
        assert_eq!(
            without_generation_marks(source),
            source
                .replace("{%- generation", "{%- if true")
                .replace("endgeneration", "endif")
        );
        assert_eq!(write(source, Value::UNDEFINED), "ab\nc generation");
    }

    #[test]
    fn templates_that_do_not_end_or_write_without_end_are_stopped() {
        let conversation = Conversation::default();
        for (source, word) in [
            (
                "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
                "come to an end",
            ),
            ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "cannot write"),
            ("{% for a in range(9999) %}{{ 'x' * 100000 }}{% endfor %}", "bytes"),
            ("{{ raise_exception('no roles here') }}", "refuses it: no roles here"),
            ("{{ messages[0]['role'] }}", "cannot write"),
        ] {
            let template = Template::new(source, BTreeMap::new(), Vec::new()).unwrap();
            let error = template.render(&conversation, false).unwrap_err().to_string();
            assert!(error.contains(word), "{source}: {error}");
        }
        assert!(Template::new("{% if %}", BTreeMap::new(), Vec::new()).is_err());
    }
}
