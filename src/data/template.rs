//! Jinja chat templates, run natively as `transformers` runs them.
//!
//! It is separate from `chat` because a browser runs templates in JavaScript. What differs from plain Jinja is what
//! `transformers` sets up: white space around blocks, `raise_exception`, `strftime_now`, `tojson` as Python writes
//! JSON, loop controls, and `{% generation %}`, which marks answers and writes nothing. Templates come with models, so a
//! run is bounded in steps and in what it may write.

use std::collections::BTreeMap;
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value, context};
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
        environment.set_formatter(write_as_python);
        environment.add_filter("tojson", to_json);
        environment.add_filter("string", |value: &Value| python_text(value));
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", |format: &str| strftime(format, seconds_since_1970()));
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

// ---- Python's ways of writing values

fn write_as_python(out: &mut Output<'_>, _: &State<'_, '_>, value: &Value) -> Result<(), Error> {
    match value.as_str() {
        Some(text) => out.write_str(text),
        None => out.write_str(&python_text(value)),
    }
    .map_err(Error::from)
}

/// As Python's `str`.
fn python_text(value: &Value) -> String {
    if value.is_undefined() {
        return String::new();
    }
    match value.as_str() {
        Some(text) => text.to_owned(),
        None => {
            let mut text = String::new();
            python_repr(value, &mut text);
            text
        }
    }
}

/// As Python's `repr`.
fn python_repr(value: &Value, text: &mut String) {
    match value.kind() {
        ValueKind::Undefined | ValueKind::None => text.push_str("None"),
        ValueKind::Bool => text.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => text.push_str(&python_number(value)),
        ValueKind::String => {
            let content = value.as_str().unwrap_or_default();
            let quote = if content.contains('\'') && !content.contains('"') {
                '"'
            } else {
                '\''
            };
            text.push(quote);
            for c in content.chars() {
                match c {
                    '\\' => text.push_str("\\\\"),
                    '\n' => text.push_str("\\n"),
                    '\r' => text.push_str("\\r"),
                    '\t' => text.push_str("\\t"),
                    c if c == quote => text.extend(['\\', c]),
                    c if (c as u32) < 0x20 || c as u32 == 0x7f => text.push_str(&format!("\\x{:02x}", c as u32)),
                    c => text.push(c),
                }
            }
            text.push(quote);
        }
        ValueKind::Seq | ValueKind::Iterable => {
            text.push('[');
            for (index, item) in value.try_iter().into_iter().flatten().enumerate() {
                if index > 0 {
                    text.push_str(", ");
                }
                python_repr(&item, text);
            }
            text.push(']');
        }
        ValueKind::Map => {
            text.push('{');
            for (index, key) in value.try_iter().into_iter().flatten().enumerate() {
                if index > 0 {
                    text.push_str(", ");
                }
                python_repr(&key, text);
                text.push_str(": ");
                python_repr(&value.get_item(&key).unwrap_or_default(), text);
            }
            text.push('}');
        }
        _ => text.push_str(&value.to_string()),
    }
}

fn python_number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(number) = f64::try_from(value.clone()) else {
        return value.to_string();
    };
    let size = number.abs();
    if number.is_finite() && (size == 0.0 || (1e-4..1e16).contains(&size)) {
        return format!("{number:?}");
    }
    if !number.is_finite() {
        return match (number.is_nan(), number > 0.0) {
            (true, _) => "nan",
            (false, true) => "inf",
            (false, false) => "-inf",
        }
        .to_owned();
    }
    // Rust writes 1e20 and 1.5e-7, Python 1e+20 and 1.5e-07.
    let text = format!("{number:e}");
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let (sign, digits) = match exponent.strip_prefix('-') {
        Some(digits) => ('-', digits),
        None => ('+', exponent),
    };
    format!("{mantissa}e{sign}{digits:0>2}")
}

/// `tojson` as `transformers` has it: Python's `json.dumps` that keeps letters as they are.
fn to_json(value: &Value, positional: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let argument = |index: usize, name: &str| -> Result<Option<Value>, Error> {
        let given: Option<Value> = kwargs.get(name)?;
        Ok(given
            .or_else(|| positional.get(index).cloned())
            .filter(|value| !value.is_none()))
    };
    let ascii = argument(0, "ensure_ascii")?.is_some_and(|value| value.is_true());
    let indent = argument(1, "indent")?.map(|indent| match indent.as_str() {
        Some(text) => text.to_owned(),
        None => " ".repeat(usize::try_from(indent).unwrap_or(0).min(64)),
    });
    let separators = argument(2, "separators")?;
    let sort_keys = argument(3, "sort_keys")?.is_some_and(|value| value.is_true());
    kwargs.assert_all_used()?;
    let separator = |index: usize, default: &str| -> String {
        separators
            .as_ref()
            .and_then(|pair| pair.get_item_by_index(index).ok())
            .and_then(|text| text.as_str().map(str::to_owned))
            .unwrap_or_else(|| default.to_owned())
    };
    let style = JsonStyle {
        ascii,
        item: separator(0, if indent.is_some() { "," } else { ", " }),
        key: separator(1, ": "),
        indent,
        sort_keys,
    };
    let mut text = String::new();
    style.write(value, 0, &mut text)?;
    Ok(text)
}

struct JsonStyle {
    ascii: bool,
    /// Between items.
    item: String,
    /// Between a key and its value.
    key: String,
    indent: Option<String>,
    sort_keys: bool,
}

impl JsonStyle {
    fn write(&self, value: &Value, depth: usize, text: &mut String) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => text.push_str("null"),
            ValueKind::Bool => text.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => text.push_str(&match python_number(value).as_str() {
                "nan" => "NaN".to_owned(),
                "inf" => "Infinity".to_owned(),
                "-inf" => "-Infinity".to_owned(),
                number => number.to_owned(),
            }),
            ValueKind::String => self.string(value.as_str().unwrap_or_default(), text),
            ValueKind::Seq | ValueKind::Iterable => {
                let mut items = value.try_iter()?.peekable();
                if items.peek().is_none() {
                    text.push_str("[]");
                    return Ok(());
                }
                text.push('[');
                for (index, item) in items.enumerate() {
                    self.begin_item(index, depth + 1, text);
                    self.write(&item, depth + 1, text)?;
                }
                self.end_items(depth, text);
                text.push(']');
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if keys.is_empty() {
                    text.push_str("{}");
                    return Ok(());
                }
                if self.sort_keys {
                    keys.sort();
                }
                text.push('{');
                for (index, key) in keys.iter().enumerate() {
                    self.begin_item(index, depth + 1, text);
                    match key.as_str() {
                        Some(name) => self.string(name, text),
                        None => {
                            let mut name = String::new();
                            self.write(key, depth, &mut name)?;
                            self.string(&name, text);
                        }
                    }
                    text.push_str(&self.key);
                    self.write(&value.get_item(key)?, depth + 1, text)?;
                }
                self.end_items(depth, text);
                text.push('}');
            }
            kind => {
                return Err(Error::new(
                    ErrorKind::BadSerialization,
                    format!("{kind} cannot be written as JSON"),
                ));
            }
        }
        Ok(())
    }

    fn begin_item(&self, index: usize, depth: usize, text: &mut String) {
        if index > 0 {
            text.push_str(&self.item);
        }
        self.new_line(depth, text);
    }

    fn end_items(&self, depth: usize, text: &mut String) {
        self.new_line(depth, text);
    }

    fn new_line(&self, depth: usize, text: &mut String) {
        if let Some(indent) = &self.indent {
            text.push('\n');
            for _ in 0..depth {
                text.push_str(indent);
            }
        }
    }

    fn string(&self, content: &str, text: &mut String) {
        text.push('"');
        for c in content.chars() {
            match c {
                '"' => text.push_str("\\\""),
                '\\' => text.push_str("\\\\"),
                '\n' => text.push_str("\\n"),
                '\r' => text.push_str("\\r"),
                '\t' => text.push_str("\\t"),
                '\u{8}' => text.push_str("\\b"),
                '\u{c}' => text.push_str("\\f"),
                c if (c as u32) < 0x20 || (self.ascii && !c.is_ascii()) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        text.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => text.push(c),
            }
        }
        text.push('"');
    }
}

// ---- dates

fn seconds_since_1970() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
/// From the day of 1 January 1970.
const WEEKDAYS: [&str; 7] = [
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
];

/// The parts of C's `strftime` that templates use, in UTC and English; others stay as they are written.
fn strftime(format: &str, seconds: u64) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let hour = second / 3600;
    let twelve = (hour + 11) % 12 + 1;
    let month_name = MONTHS[month as usize - 1];
    let weekday = WEEKDAYS[(days % 7) as usize];
    let mut text = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            text.push(c);
            continue;
        }
        let mut directive = rest.next();
        // glibc's way of leaving padding out.
        let unpadded = directive == Some('-');
        if unpadded {
            directive = rest.next();
        }
        let number = |value: u64, width: usize| {
            let width = if unpadded { 0 } else { width };
            format!("{value:0width$}")
        };
        match directive {
            Some('Y') => text.push_str(&year.to_string()),
            Some('y') => text.push_str(&number(year % 100, 2)),
            Some('m') => text.push_str(&number(month, 2)),
            Some('d') => text.push_str(&number(day, 2)),
            Some('e') => text.push_str(&format!("{day:>2}")),
            Some('H') => text.push_str(&number(hour, 2)),
            Some('I') => text.push_str(&number(twelve, 2)),
            Some('M') => text.push_str(&number(second / 60 % 60, 2)),
            Some('S') => text.push_str(&number(second % 60, 2)),
            Some('j') => {
                let new_year = days_before(year);
                text.push_str(&number(days - new_year + 1, 3));
            }
            Some('p') => text.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('B') => text.push_str(month_name),
            Some('b' | 'h') => text.push_str(&month_name[..3]),
            Some('A') => text.push_str(weekday),
            Some('a') => text.push_str(&weekday[..3]),
            Some('F') => text.push_str(&format!("{year}-{month:02}-{day:02}")),
            Some('T') => text.push_str(&format!("{hour:02}:{:02}:{:02}", second / 60 % 60, second % 60)),
            Some('%') => text.push('%'),
            Some(other) => text.extend(['%', other]),
            None => text.push('%'),
        }
    }
    text
}

/// Days from 1970 to the first of `year`.
fn days_before(year: u64) -> u64 {
    let leaps = |year: u64| year / 4 - year / 100 + year / 400;
    (year - 1970) * 365 + leaps(year - 1) - leaps(1969)
}

/// Year, month and day of a number of days since 1970.
fn civil(days: u64) -> (u64, u64, u64) {
    let mut year = 1970 + days / 366;
    while days_before(year + 1) <= days {
        year += 1;
    }
    let mut left = days - days_before(year);
    let leap = days_before(year + 1) - days_before(year) == 366;
    for month in 1..=12 {
        let length = match month {
            2 if leap => 29,
            2 => 28,
            4 | 6 | 9 | 11 => 30,
            _ => 31,
        };
        if left < length {
            return (year, month, left + 1);
        }
        left -= length;
    }
    (year + 1, 1, 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(source: &str, values: Value) -> String {
        let template = Template::new(source, BTreeMap::new(), Vec::new()).unwrap();
        template.environment.get_template(NAME).unwrap().render(values).unwrap()
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, date) in [
            (0, "Thu 01 Jan 1970 00:00:00 001"),
            (951_782_399, "Mon 28 Feb 2000 23:59:59 059"),
            (951_782_400, "Tue 29 Feb 2000 00:00:00 060"),
            (1_735_689_599, "Tue 31 Dec 2024 23:59:59 366"),
            (1_735_689_600, "Wed 01 Jan 2025 00:00:00 001"),
            (4_107_542_400, "Mon 01 Mar 2100 00:00:00 060"),
        ] {
            assert_eq!(strftime("%a %d %b %Y %T %j", seconds), date);
        }
        assert_eq!(strftime("%-d %B %I %p %q %", 1_735_689_600), "1 January 12 AM %q %");
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
