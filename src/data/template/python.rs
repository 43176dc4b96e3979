//! Python's ways of writing values: templates are written for them, and their text is what a model learns.

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, ErrorKind, Output, State, Value};

pub(super) fn write_as_python(out: &mut Output<'_>, _: &State<'_, '_>, value: &Value) -> Result<(), Error> {
    match value.as_str() {
        Some(text) => out.write_str(text),
        None => out.write_str(&python_text(value)),
    }
    .map_err(Error::from)
}

/// As Python's `str`.
pub(super) fn python_text(value: &Value) -> String {
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
pub(super) fn to_json(value: &Value, positional: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
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
