//! The options of a command line as text: recorded with a run, so that the run can be gone on with by the same ones.
//!
//! It is separate because it knows nothing of what the options mean: whoever has new ones has them recorded and compared as well.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;

use anyhow::{Context, bail};
use clap::parser::ValueSource;
use clap::{ArgAction, ArgMatches, Args, Command, FromArgMatches};
use serde_json::{Map, Value};

/// What stood on the command line, or by default. To be flattened into a command's options *before* all others, which take from the
/// parser what is theirs.
#[derive(Clone, Debug, Default)]
pub struct Given(BTreeMap<String, Text>);

/// An option's values.
#[derive(Clone, Debug)]
struct Text {
    values: Vec<String>,
    by_default: bool,
}

impl FromArgMatches for Given {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let texts = matches.ids().filter_map(|id| {
            let values = matches.try_get_raw(id.as_str()).ok()??;
            let text = Text {
                values: values.map(|value| value.to_string_lossy().into_owned()).collect(),
                by_default: matches.value_source(id.as_str()) == Some(ValueSource::DefaultValue),
            };
            Some((id.as_str().to_owned(), text))
        });
        Ok(Self(texts.collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args for Given {
    fn augment_args(command: Command) -> Command {
        command
    }

    fn augment_args_for_update(command: Command) -> Command {
        command
    }
}

/// How a command's options are recorded.
#[derive(Clone, Copy, Debug)]
pub struct Recording {
    /// Long names of those that are not, because they say nothing of what is trained.
    pub left_out: &'static [&'static str],
    /// Long names of those that may be given otherwise later: each with the others that it then stands for.
    pub may_change: &'static [(&'static str, &'static [&'static str])],
    /// What an option's text means wherever it is read, as an absolute path.
    pub placed: fn(option: &str, text: &str) -> String,
}

impl Recording {
    /// The options of `command` that `given` has a value for, by default as well: another version's defaults may be others.
    pub fn record(&self, command: &Command, given: &Given) -> Map<String, Value> {
        let mut recorded = Map::new();
        for (option, text) in self.of(command, given) {
            let values = text
                .values
                .iter()
                .map(|value| Value::String((self.placed)(option, value)));
            let mut values: Vec<Value> = values.collect();
            let value = match values.len() {
                1 => values.remove(0),
                _ => Value::Array(values),
            };
            recorded.insert(option.to_owned(), value);
        }
        recorded
    }

    /// The command line that goes on with a run of which `recorded` was kept, after `given` was given with it.
    ///
    /// # Errors
    /// When an option is given that contradicts, or what was recorded is no record.
    pub fn again(
        &self,
        command: &Command,
        recorded: &Map<String, Value>,
        given: &Given,
    ) -> anyhow::Result<Vec<OsString>> {
        let mut options: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for (option, value) in recorded {
            let values = match value {
                Value::String(value) => Some(vec![value.clone()]),
                Value::Array(values) => values.iter().map(|value| value.as_str().map(str::to_owned)).collect(),
                _ => None,
            };
            let values = values.with_context(|| format!("the recorded value of --{option} is no text"))?;
            options.insert(option, values);
        }
        for (option, text) in self.of(command, given).filter(|(_, text)| !text.by_default) {
            let values: Vec<String> = text.values.iter().map(|value| (self.placed)(option, value)).collect();
            let before = options.get(option);
            if before == Some(&values) {
                continue;
            }
            match self.may_change.iter().find(|(name, _)| *name == option) {
                Some((_, others)) => {
                    options.retain(|name, _| !others.contains(name));
                    options.insert(option, values);
                }
                None => {
                    let shown = |values: &[String]| match is_flag(command, option) {
                        true => format!("--{option}"),
                        false => format!("--{option} {}", values.join(" ")),
                    };
                    let begun = match before {
                        Some(before) if !is_flag(command, option) => format!("with {}", shown(before)),
                        _ => format!("without --{option}"),
                    };
                    bail!(
                        "{} contradicts the run, which was begun {begun}: leave it out to go on",
                        shown(&values)
                    );
                }
            }
        }
        let mut line = Vec::new();
        for (option, values) in options {
            // Said aloud, a default may ask for other options beside it.
            if is_default(command, option, &values) {
                continue;
            }
            match (is_flag(command, option), &values[..]) {
                (true, [value]) if value == "true" => line.push(format!("--{option}").into()),
                (true, _) => {}
                (false, values) => line.extend(values.iter().map(|value| format!("--{option}={value}").into())),
            }
        }
        Ok(line)
    }

    /// The options to go on with: those that `run` has, and those given now.
    ///
    /// # Errors
    /// As [`Recording::again`], and where the run has none, or none that this version knows.
    pub fn resumed<T: Args + FromArgMatches>(
        &self,
        name: &'static str,
        run: &Map<String, Value>,
        given: &Given,
        path: &Path,
    ) -> anyhow::Result<T> {
        let shown = path.display();
        let recorded = run.get("options").and_then(Value::as_object);
        let recorded = recorded.with_context(|| {
            format!(
                "run.json in {shown} does not say with which options the run was begun: begin it again with another --out"
            )
        })?;
        let command = command::<T>(name);
        let line = self.again(&command, recorded, given)?;
        let words = [name.into(), "--resume".into(), path.as_os_str().to_owned()];
        let parsed = command
            .try_get_matches_from(words.into_iter().chain(line))
            .and_then(|matches| T::from_arg_matches(&matches));
        parsed.map_err(|error| {
            let text = error.to_string();
            let reason = text
                .lines()
                .next()
                .unwrap_or_default()
                .trim_start_matches("error: ")
                .to_owned();
            anyhow::anyhow!("the options in {shown}/run.json are none of this version: {reason}")
        })
    }

    /// Long names and texts.
    fn of<'a>(&self, command: &'a Command, given: &'a Given) -> impl Iterator<Item = (&'a str, &'a Text)> {
        let left_out = self.left_out;
        command
            .get_arguments()
            .filter_map(|argument| Some((argument.get_long()?, given.0.get(argument.get_id().as_str())?)))
            .filter(move |(option, _)| !left_out.contains(option))
    }
}

/// A command's options alone, as a command of their own.
pub fn command<T: Args>(name: &'static str) -> Command {
    T::augment_args(Command::new(name))
}

fn is_default(command: &Command, option: &str, values: &[String]) -> bool {
    let mut arguments = command.get_arguments();
    let argument = arguments.find(|argument| argument.get_long() == Some(option));
    argument.is_some_and(|argument| {
        let defaults = argument.get_default_values();
        defaults.len() == values.len()
            && defaults
                .iter()
                .zip(values)
                .all(|(default, value)| default == value.as_str())
    })
}

fn is_flag(command: &Command, option: &str) -> bool {
    let mut arguments = command.get_arguments();
    let argument = arguments.find(|argument| argument.get_long() == Some(option));
    argument.is_some_and(|argument| matches!(argument.get_action(), ArgAction::SetTrue))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[derive(Args, Debug)]
    struct Options {
        #[command(flatten)]
        given: Given,
        #[arg(long)]
        data: Vec<String>,
        #[arg(long, default_value_t = 4)]
        batch: u32,
        #[arg(long, conflicts_with = "epochs")]
        steps: Option<u64>,
        #[arg(long)]
        epochs: Option<u64>,
        #[arg(long)]
        no_shuffle: bool,
        #[arg(long)]
        quiet: bool,
    }

    const RECORDING: Recording = Recording {
        left_out: &["quiet"],
        may_change: &[("steps", &["epochs"]), ("epochs", &["steps"])],
        placed: |option, text| match option {
            "data" => format!("/here/{text}"),
            _ => text.to_owned(),
        },
    };

    fn command() -> Command {
        Options::augment_args(Command::new("train"))
    }

    fn parse(words: &str) -> Options {
        let words = ["train"].into_iter().chain(words.split_whitespace());
        Options::from_arg_matches(&command().try_get_matches_from(words).unwrap()).unwrap()
    }

    fn record(words: &str) -> Map<String, Value> {
        RECORDING.record(&command(), &parse(words).given)
    }

    fn again(begun: &str, then: &str) -> Result<Vec<String>, String> {
        let line = RECORDING.again(&command(), &record(begun), &parse(then).given);
        line.map(|line| line.into_iter().map(|word| word.into_string().unwrap()).collect())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn options_are_recorded_by_their_long_names_and_read_back_as_they_were() {
        let recorded = record("--data a --data b --epochs 2 --quiet");
        let expected = json!({ "data": ["/here/a", "/here/b"], "batch": "4", "epochs": "2", "no-shuffle": "false" });
        assert_eq!(Value::Object(recorded), expected);
        let line = again("--data a --data b --epochs 2 --no-shuffle --quiet", "").unwrap();
        assert_eq!(
            line,
            ["--data=/here/a", "--data=/here/b", "--epochs=2", "--no-shuffle"],
            "what is by default still need not be said"
        );
        let read = parse(&line.join(" "));
        assert_eq!(
            (read.batch, read.epochs, read.no_shuffle, read.quiet),
            (4, Some(2), true, false)
        );
        assert_eq!((read.data.len(), read.steps), (2, None));
    }

    #[test]
    fn options_given_again_must_say_the_same_but_for_those_that_may_change() {
        let begun = "--data a --epochs 2";
        let same = again(begun, "--data a --batch 4 --quiet").unwrap();
        assert_eq!(same, again(begun, "").unwrap());
        let line = again(begun, "--steps 9").unwrap();
        assert_eq!(line, ["--data=/here/a", "--steps=9"], "steps stand for the epochs");
        for (then, names) in [
            ("--data b", ["--data /here/b contradicts", "with --data /here/a"]),
            ("--batch 5", ["--batch 5 contradicts", "with --batch 4"]),
            ("--no-shuffle", ["--no-shuffle contradicts", "without --no-shuffle"]),
        ] {
            let error = again(begun, then).unwrap_err();
            assert!(names.iter().all(|name| error.contains(name)), "{error}");
        }
        assert_eq!(again("--data a --no-shuffle", "--no-shuffle").unwrap().len(), 2);
        assert_eq!(
            again("--data a --batch 7", "").unwrap(),
            ["--batch=7", "--data=/here/a"]
        );
    }

    #[test]
    fn what_is_no_record_is_an_error() {
        for value in [json!(3), json!([3]), json!(null)] {
            let recorded = Map::from_iter([("batch".to_owned(), value)]);
            let error = RECORDING.again(&command(), &recorded, &Given::default()).unwrap_err();
            assert!(error.to_string().contains("--batch"), "{error}");
        }
    }
}
