//! How the program was called: kept with a run, so that whoever takes it up again need not say everything again.
//!
//! Separate because it is about words on a command line, which only here are looked at twice.

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::parser::ValueSource;
use clap::{Args, FromArgMatches};
use serde_json::{Value, json};

/// The words after the command, and where they were said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Words {
    pub directory: PathBuf,
    pub arguments: Vec<String>,
}

impl Words {
    /// Those of this process, after `command`.
    ///
    /// # Errors
    /// Where the working directory is gone, or a word is not Unicode.
    pub fn of_this_process(command: &str) -> anyhow::Result<Self> {
        let words = std::env::args_os().skip(1);
        let words = words.map(|word| {
            word.into_string().map_err(|word| {
                anyhow::anyhow!(
                    "{} is not Unicode, and cannot be kept for a later --resume",
                    word.display()
                )
            })
        });
        let words = words.collect::<anyhow::Result<Vec<String>>>()?;
        Ok(Self {
            directory: std::env::current_dir().context("the working directory is gone")?,
            arguments: words.into_iter().skip_while(|word| word != command).skip(1).collect(),
        })
    }

    pub fn to_json(&self) -> Value {
        json!({ "directory": self.directory, "arguments": self.arguments })
    }

    pub fn from_json(value: &Value) -> Option<Self> {
        Some(Self {
            directory: value["directory"].as_str()?.into(),
            arguments: serde_json::from_value(value["arguments"].clone()).ok()?,
        })
    }

    /// What they said.
    ///
    /// # Errors
    /// Where this version of the program takes them no more.
    pub fn parse<T: Args + FromArgMatches>(&self, command: &'static str) -> anyhow::Result<T> {
        let matches = T::augment_args(clap::Command::new(command).no_binary_name(true))
            .try_get_matches_from(&self.arguments)
            .map_err(|error| anyhow::anyhow!("the options that the run began with: {}", error.render()))?;
        Ok(T::from_arg_matches(&matches)?)
    }

    /// That nothing was said but these.
    ///
    /// # Errors
    /// The first that was said beside them.
    pub fn only<T: Args>(&self, command: &'static str, allowed: &[&str]) -> anyhow::Result<()> {
        let matches = T::augment_args(clap::Command::new(command).no_binary_name(true))
            .try_get_matches_from(&self.arguments)
            .map_err(|error| anyhow::anyhow!("{}", error.render()))?;
        let allowed: BTreeSet<&str> = allowed.iter().copied().collect();
        for id in matches.ids() {
            let is_said = matches.value_source(id.as_str()) == Some(ValueSource::CommandLine);
            let is_group = matches.try_contains_id(id.as_str()).is_err();
            if is_said && !is_group && !allowed.contains(id.as_str()) {
                let names: Vec<String> = allowed.iter().map(|id| format!("--{}", id.replace('_', "-"))).collect();
                bail!(
                    "--{} cannot be changed when a run is taken up again; beside --resume there may be {}",
                    id.as_str().replace('_', "-"),
                    names.join(", ")
                );
            }
        }
        Ok(())
    }

    /// Goes where they were said, so that relative paths mean what they meant.
    ///
    /// # Errors
    /// Where that is gone.
    pub fn go_there(&self) -> anyhow::Result<()> {
        let here = std::env::current_dir().ok();
        if here.as_ref() == Some(&self.directory) {
            return Ok(());
        }
        std::env::set_current_dir(&self.directory).with_context(|| {
            format!(
                "the run was begun in {}, from where its files were named, and that cannot be entered",
                self.directory.display()
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::serve;

    fn words(arguments: &[&str]) -> Words {
        Words {
            directory: "/somewhere".into(),
            arguments: arguments.iter().map(|&word| word.to_owned()).collect(),
        }
    }

    #[test]
    fn words_are_read_as_they_were_kept() {
        let said = words(&["--rounds", "7", "--out", "a b"]);
        assert_eq!(Words::from_json(&said.to_json()), Some(said.clone()));
        assert_eq!(Words::from_json(&Value::Null), None);
        let options: serve::Options = said.parse("serve").unwrap();
        assert_eq!((options.rounds, options.out), (7, Some("a b".into())));
        assert!(words(&["--no-such-option"]).parse::<serve::Options>("serve").is_err());
    }

    #[test]
    fn what_cannot_be_changed_is_named() {
        let allowed = ["resume", "quiet"];
        let check = |arguments: &[&str]| words(arguments).only::<serve::Options>("serve", &allowed);
        assert!(check(&["--resume", "runs/a", "--quiet"]).is_ok());
        let error = check(&["--resume", "runs/a", "--local-steps", "3"])
            .unwrap_err()
            .to_string();
        assert!(error.contains("--local-steps") && error.contains("--quiet"), "{error}");
    }
}
