//! Secrets that are given to a command: as an option, in a file, or in the environment.
//!
//! Separate because an option's value is in every process list of the machine: whoever minds has the other two, for every
//! secret alike.

use std::ffi::OsString;
use std::io::Read;
use std::path::Path;

use anyhow::Context;

/// A file of more bytes is no secret.
const LARGEST_FILE: u64 = 4096;

/// Where one secret may come from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Secret {
    pub option: &'static str,
    pub file_option: &'static str,
    pub variable: &'static str,
}

/// Who has it may join.
pub(super) const TOKEN: Secret = Secret {
    option: "--token",
    file_option: "--token-file",
    variable: "SFLLLM_TOKEN",
};

/// Who has it tells the federated server what to do.
pub(super) const CONTROL_KEY: Secret = Secret {
    option: "--control-key",
    file_option: "--control-key-file",
    variable: "SFLLLM_CONTROL_KEY",
};

impl Secret {
    /// The option's value, else what the file holds, else `linked`, else the environment's.
    pub(super) fn read(
        self,
        option: Option<&str>,
        file: Option<&Path>,
        linked: Option<&str>,
    ) -> anyhow::Result<Option<String>> {
        self.choose(option, file, linked, std::env::var_os(self.variable))
    }

    fn choose(
        self,
        option: Option<&str>,
        file: Option<&Path>,
        linked: Option<&str>,
        variable: Option<OsString>,
    ) -> anyhow::Result<Option<String>> {
        let (secret, place) = match (option, file, linked, variable) {
            (Some(option), ..) => (option.to_owned(), self.option.to_owned()),
            (None, Some(file), ..) => {
                let place = format!("{} {}", self.file_option, file.display());
                (text(file).with_context(|| place.clone())?, place)
            }
            (None, None, Some(linked), _) => (linked.to_owned(), "the link".to_owned()),
            (None, None, None, Some(variable)) if !variable.is_empty() => {
                let text = variable.into_string().ok();
                (text.unwrap_or_default(), self.variable.to_owned())
            }
            _ => return Ok(None),
        };
        // It is part of a link, and is copied by hand.
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
        anyhow::ensure!(
            !secret.is_empty() && secret.len() <= 256 && secret.bytes().all(plain),
            "{place}: {} takes 1 to 256 letters, digits and -._~, or, where it is made, `generate`",
            self.option
        );
        Ok(Some(secret))
    }
}

/// The only line of a file.
fn text(file: &Path) -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    std::fs::File::open(file)?
        .take(LARGEST_FILE + 1)
        .read_to_end(&mut bytes)?;
    anyhow::ensure!(bytes.len() as u64 <= LARGEST_FILE, "it is too long for a secret");
    let text = String::from_utf8(bytes).context("it is no text")?;
    Ok(text.trim_ascii().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_option_wins_over_the_file_and_the_file_over_link_and_environment() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "from-file\n").unwrap();
        let path = Some(file.path());
        let choose = |option, path, linked, variable: Option<&str>| {
            TOKEN
                .choose(option, path, linked, variable.map(OsString::from))
                .unwrap()
        };
        let all = choose(Some("from-option"), path, Some("from-link"), Some("from-variable"));
        assert_eq!(all.as_deref(), Some("from-option"));
        let rest = choose(None, path, Some("from-link"), Some("from-variable"));
        assert_eq!(rest.as_deref(), Some("from-file"));
        let rest = choose(None, None, Some("from-link"), Some("from-variable"));
        assert_eq!(rest.as_deref(), Some("from-link"));
        let rest = choose(None, None, None, Some("from-variable"));
        assert_eq!(rest.as_deref(), Some("from-variable"));
        assert_eq!(choose(None, None, None, Some("")), None);
    }

    #[test]
    fn a_secret_that_cannot_be_one_is_named_by_where_it_is_from() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let of = |contents: &[u8]| {
            std::fs::write(file.path(), contents).unwrap();
            let error = TOKEN.choose(None, Some(file.path()), None, None).unwrap_err();
            format!("{error:#}")
        };
        for contents in [&b""[..], b"two words", b"\xff", &[b'a'; 300], &[b'a'; 5000]] {
            let said = of(contents);
            assert!(said.contains("--token-file") && said.contains("tmp"), "{said}");
        }
        let missing = Path::new("/nowhere/token");
        let error = TOKEN.choose(None, Some(missing), None, None).unwrap_err();
        assert!(format!("{error:#}").contains("/nowhere/token"), "{error:#}");
        let error = TOKEN.choose(None, None, None, Some("a b".into())).unwrap_err();
        assert!(error.to_string().contains("SFLLLM_TOKEN"), "{error}");
    }
}
