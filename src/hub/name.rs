//! What a model on the hub is called, and what a file in its repository may be called. Both become paths and addresses,
//! and file names come from a server: so each is a type that only holds what is safe as either.

use std::fmt;
use std::str::FromStr;

use super::Error;

/// How a name of a model on the hub begins.
pub const PREFIX: &str = "hf:";
/// The branch that is meant where none is named.
const DEFAULT_REVISION: &str = "main";
/// The hub's own limit for each half of a repository's name.
const MAX_PART: usize = 96;
/// What file systems take as one part of a path.
const MAX_SEGMENT: usize = 255;
const MAX_PATH: usize = 1024;

/// A model on the hub: `hf:ORG/NAME[@REVISION][:FILE.gguf]`. Some old models have no `ORG/`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    repository: String,
    revision: Option<String>,
    file: Option<FileName>,
}

/// A file in a repository: relative, with `/` between its parts, and never above where it starts.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FileName(String);

impl Name {
    /// `ORG/NAME`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The branch, tag or commit.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or(DEFAULT_REVISION)
    }

    /// The one file that is asked for.
    pub fn file(&self) -> Option<&FileName> {
        self.file.as_ref()
    }
}

impl fmt::Display for Name {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{PREFIX}{}", self.repository)?;
        if let Some(revision) = &self.revision {
            write!(formatter, "@{revision}")?;
        }
        match &self.file {
            Some(file) => write!(formatter, ":{file}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Name {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let fail = |reason: &str| Error::Name {
            name: text.chars().take(200).flat_map(char::escape_debug).collect(),
            reason: reason.to_owned(),
        };
        let rest = text
            .strip_prefix(PREFIX)
            .ok_or_else(|| fail("it does not begin with hf:"))?;
        // Neither a repository nor a git revision can hold a colon.
        let (rest, file) = match rest.split_once(':') {
            Some((rest, file)) => (rest, Some(file)),
            None => (rest, None),
        };
        let (repository, revision) = match rest.split_once('@') {
            Some((repository, revision)) => (repository, Some(revision)),
            None => (rest, None),
        };
        let file = match file.map(FileName::parse) {
            None => None,
            Some(Some(file)) if file.is_gguf() => Some(file),
            Some(_) => {
                return Err(fail(
                    "after the colon stands the name of a .gguf file in that repository",
                ));
            }
        };
        let parts: Vec<&str> = repository.split('/').collect();
        match parts.len() {
            1 | 2 => {}
            _ if repository.ends_with(".gguf") => {
                return Err(fail("a file stands after a colon: hf:ORG/NAME:FILE.gguf"));
            }
            _ => return Err(fail("it has more parts than an owner and a name")),
        }
        if !parts.iter().all(|part| is_repository_part(part))
            || repository.contains("--")
            || repository.contains("..")
            || repository.ends_with(".git")
        {
            return Err(fail(
                "owner and name are letters, digits, `-`, `_` and `.`, with a letter or digit at both ends, and \
                 without `--` or `..`",
            ));
        }
        if revision.is_some_and(|revision| !is_revision(revision)) {
            return Err(fail("after the @ stands a branch, a tag or a commit"));
        }
        Ok(Self {
            repository: repository.to_owned(),
            revision: revision.map(str::to_owned),
            file,
        })
    }
}

fn is_repository_part(part: &str) -> bool {
    let word = |byte: Option<&u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric() || *byte == b'_');
    let bytes = part.as_bytes();
    part.len() <= MAX_PART
        && word(bytes.first())
        && word(bytes.last())
        && bytes
            .iter()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(byte))
}

fn is_revision(revision: &str) -> bool {
    FileName::parse(revision).is_some()
        && !revision.contains("..")
        && !revision.starts_with(['.', '-'])
        && revision
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_./+".contains(&byte))
}

impl FileName {
    /// Nothing for a name that would leave its directory, or that some system reads as more than a name.
    pub fn parse(name: &str) -> Option<Self> {
        let segment =
            |segment: &str| !segment.is_empty() && segment != "." && segment != ".." && segment.len() <= MAX_SEGMENT;
        let safe = name.len() <= MAX_PATH
            && name.split('/').all(segment)
            && !name.contains(|c: char| c.is_control() || matches!(c, '\\' | ':' | '\u{202a}'..='\u{202e}'));
        safe.then(|| Self(name.to_owned()))
    }

    /// A name that this program knows.
    pub(super) fn known(name: &'static str) -> Self {
        debug_assert!(Self::parse(name).is_some(), "{name} is no file name");
        Self(name.to_owned())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The directories above the file, and the file.
    pub fn segments(&self) -> impl Iterator<Item = &str> {
        self.0.split('/')
    }

    /// Whether it lies directly in the repository.
    pub fn is_at_top(&self) -> bool {
        !self.0.contains('/')
    }

    pub fn is_gguf(&self) -> bool {
        let bytes = self.0.as_bytes();
        bytes.len() > 5 && bytes[bytes.len() - 5..].eq_ignore_ascii_case(b".gguf")
    }

    /// Whether it is one of several that make one GGUF model: `NAME-00001-of-00003.gguf`.
    pub fn is_gguf_part(&self) -> bool {
        let digits = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
        let Some(stem) = self.0.len().checked_sub(5).and_then(|end| self.0.get(..end)) else {
            return false;
        };
        self.is_gguf()
            && stem
                .rsplit_once("-of-")
                .is_some_and(|(before, last)| digits(last) && before.rsplit('-').next().is_some_and(digits))
    }
}

impl fmt::Display for FileName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    #[test]
    fn names_are_taken_apart_and_written_again() {
        let full = name("hf:Qwen/Qwen2.5-0.5B-Instruct-GGUF@refs/pr/3:q4/model-Q4_0.gguf");
        assert_eq!(full.repository(), "Qwen/Qwen2.5-0.5B-Instruct-GGUF");
        assert_eq!(full.revision(), "refs/pr/3");
        assert_eq!(full.file().unwrap().as_str(), "q4/model-Q4_0.gguf");
        for text in [
            "hf:gpt2",
            "hf:a/b",
            "hf:01-ai/Yi_6B@v1.0",
            "hf:a/b:c.GGUF",
            &full.to_string(),
        ] {
            assert_eq!(name(text).to_string(), text);
        }
        assert_eq!(name("hf:gpt2").revision(), "main");
    }

    #[test]
    fn names_that_are_none_are_refused_with_what_is_wrong() {
        for (text, reason) in [
            ("gpt2", "begin with hf:"),
            ("hf:", "letters, digits"),
            ("hf:/gpt2", "letters, digits"),
            ("hf:../../etc", "more parts"),
            ("hf:../etc", "letters, digits"),
            ("hf:a/..", "letters, digits"),
            ("hf:a/b c", "letters, digits"),
            ("hf:a/b%2f", "letters, digits"),
            ("hf:a--b/c", "letters, digits"),
            ("hf:a/b.git", "letters, digits"),
            ("hf:a/b/c.gguf", "after a colon"),
            ("hf:a/b@", "branch, a tag"),
            ("hf:a/b@../x", "branch, a tag"),
            ("hf:a/b@x//y", "branch, a tag"),
            ("hf:a/b@x?y", "branch, a tag"),
            ("hf:a/b:", ".gguf file"),
            ("hf:a/b:x.bin", ".gguf file"),
            ("hf:a/b:../x.gguf", ".gguf file"),
            ("hf:a/b:/x.gguf", ".gguf file"),
            ("hf:a/b:c\\..\\x.gguf", ".gguf file"),
        ] {
            let error = text.parse::<Name>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn file_names_stay_in_their_directory() {
        for good in ["config.json", "a/b/c.txt", ".gitattributes", "größe.json", "a..b"] {
            assert!(FileName::parse(good).is_some(), "{good}");
        }
        let long = "x".repeat(256);
        for bad in [
            "",
            "/etc/passwd",
            "a/../b",
            "..",
            "./a",
            "a//b",
            "a/",
            "a\\b",
            "C:x",
            "a\0b",
            "a\nb",
            &long,
        ] {
            assert!(FileName::parse(bad).is_none(), "{bad:?}");
        }
    }

    #[test]
    fn parts_of_a_split_model_are_told_from_whole_ones() {
        let part = |name: &str| FileName::parse(name).unwrap().is_gguf_part();
        assert!(part("model-Q8_0-00001-of-00003.gguf"));
        assert!(part("q/m-00002-of-00003.GGUF"));
        for whole in [
            "model.gguf",
            "one-of-many.gguf",
            "m-1-of-3.gguf",
            "m-00001-of-00003.safetensors",
            "ä.gguf",
        ] {
            assert!(!part(whole), "{whole}");
        }
    }
}
