//! Where the hub is, who asks, and where files are kept, from the variables that Python's huggingface_hub reads: a
//! machine that is set up for it is set up for this program.

use std::ffi::OsString;
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::Url;
use reqwest::header::HeaderValue;

use super::Error;

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
/// How long a server may be silent.
const DEFAULT_PATIENCE: Duration = Duration::from_secs(30);
/// The wait before the second attempt; it doubles with every further one.
const DEFAULT_PAUSE: Duration = Duration::from_secs(1);

/// How models are fetched.
#[derive(Clone, Debug)]
pub struct Settings {
    pub endpoint: Endpoint,
    /// The directory that holds `models--ORG--NAME`.
    pub cache: PathBuf,
    pub token: Option<Token>,
    /// Nothing is asked of the network.
    pub offline: bool,
    /// How long a server may be silent before the connection counts as broken.
    pub patience: Duration,
    /// The wait before the second attempt; it doubles with every further one.
    pub pause: Duration,
}

/// The address of a hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint(Url);

/// What proves who asks. It is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(HeaderValue);

impl Settings {
    /// For this endpoint and cache directory: without a token, online.
    pub fn new(endpoint: Endpoint, cache: impl Into<PathBuf>) -> Self {
        Self {
            endpoint,
            cache: cache.into(),
            token: None,
            offline: false,
            patience: DEFAULT_PATIENCE,
            pause: DEFAULT_PAUSE,
        }
    }

    /// As this process's environment says.
    ///
    /// # Errors
    /// [`Error::Setting`] names the variable or file; [`Error::NoCacheDirectory`].
    pub fn from_environment() -> Result<Self, Error> {
        Self::from_variables(&|name| std::env::var_os(name))
    }

    fn from_variables(variables: &dyn Fn(&str) -> Option<OsString>) -> Result<Self, Error> {
        let set = |name: &str| variables(name).filter(|value| !value.is_empty());
        let text = |name: &'static str| {
            set(name)
                .map(|value| {
                    value
                        .into_string()
                        .map_err(|_| setting(name, "it is not text".to_owned()))
                })
                .transpose()
        };
        let user = set("HOME").or_else(|| set("USERPROFILE")).map(PathBuf::from);
        let path = |name: &str| set(name).map(|path| below_home(PathBuf::from(path), user.as_deref()));
        let home = path("HF_HOME").or_else(|| {
            let caches = path("XDG_CACHE_HOME").or_else(|| Some(user.as_ref()?.join(".cache")));
            Some(caches?.join("huggingface"))
        });
        let cache = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| Some(home.as_ref()?.join("hub")))
            .ok_or(Error::NoCacheDirectory)?;
        let endpoint = text("HF_ENDPOINT")?.unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
        let mut settings = Self::new(endpoint.parse()?, cache);
        settings.offline = is_true(set("HF_HUB_OFFLINE").or_else(|| set("TRANSFORMERS_OFFLINE")));
        if let Some(seconds) = text("HF_HUB_DOWNLOAD_TIMEOUT")? {
            let parsed = seconds
                .trim()
                .parse()
                .ok()
                .filter(|seconds| (1..=86_400).contains(seconds));
            settings.patience = parsed.map(Duration::from_secs).ok_or_else(|| {
                setting(
                    "HF_HUB_DOWNLOAD_TIMEOUT",
                    "it is no number of seconds from 1 on".to_owned(),
                )
            })?;
        }
        for name in ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"] {
            if settings.token.is_none() {
                settings.token = text(name)?.map_or(Ok(None), |token| Token::parse(&token, name))?;
            }
        }
        if settings.token.is_none() && !is_true(set("HF_HUB_DISABLE_IMPLICIT_TOKEN")) {
            let file = path("HF_TOKEN_PATH").or_else(|| Some(home?.join("token")));
            settings.token = file.map_or(Ok(None), |file| Token::read(&file))?;
        }
        Ok(settings)
    }
}

fn setting(name: impl Into<String>, reason: String) -> Error {
    Error::Setting {
        name: name.into(),
        reason,
    }
}

/// The words that Python's huggingface_hub takes for yes.
fn is_true(value: Option<OsString>) -> bool {
    value.is_some_and(|value| {
        let value = value.to_string_lossy().to_ascii_uppercase();
        ["1", "ON", "YES", "TRUE"].contains(&value.as_str())
    })
}

/// `~/` at the beginning is the user's directory: the variable may come from a file that no shell read.
fn below_home(path: PathBuf, user: Option<&Path>) -> PathBuf {
    match (path.strip_prefix("~"), user) {
        (Ok(rest), Some(user)) => user.join(rest),
        _ => path,
    }
}

impl Endpoint {
    /// The address, without a slash at its end.
    pub fn as_str(&self) -> &str {
        self.0.as_str().trim_end_matches('/')
    }

    /// The address of something below this one. Each segment is escaped as a whole.
    pub(super) fn below<'a>(&self, segments: impl IntoIterator<Item = &'a str>) -> Url {
        let mut url = self.0.clone();
        // An http address always has a path.
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(segments);
        }
        url
    }

    /// Whether `url` has the same scheme, host and port.
    pub(super) fn is_origin_of(&self, url: &Url) -> bool {
        self.0.origin() == url.origin()
    }

    pub(super) fn is_loopback(&self) -> bool {
        let host = self.0.host_str().unwrap_or_default();
        let address = host.trim_start_matches('[').trim_end_matches(']');
        host == "localhost" || address.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
    }

    /// Whether what is sent there can be read on the way.
    pub(super) fn is_plain_text(&self) -> bool {
        self.0.scheme() == "http" && !self.is_loopback()
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

impl std::str::FromStr for Endpoint {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let fail = |reason: &str| setting("HF_ENDPOINT", format!("it {reason}; write it like {DEFAULT_ENDPOINT}"));
        let url = Url::parse(text.trim()).map_err(|error| fail(&format!("is no address ({error})")))?;
        if !["http", "https"].contains(&url.scheme()) {
            return Err(fail("begins with neither https:// nor http://"));
        }
        if url.host_str().is_none_or(str::is_empty) {
            return Err(fail("names no host"));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(fail("holds a user name or password, which belong in HF_TOKEN"));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(fail("goes on after its path"));
        }
        Ok(Self(url))
    }
}

impl Token {
    /// Reads a token from `source`, which errors name. Space around it is left away; nothing is left of an empty one.
    ///
    /// # Errors
    /// [`Error::Setting`] when it holds what no token holds.
    pub fn parse(text: &str, source: &str) -> Result<Option<Self>, Error> {
        let text = text.trim();
        if text.is_empty() {
            return Ok(None);
        }
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(setting(
                source,
                "it is no token: those are letters, digits and signs on one line".to_owned(),
            ));
        }
        let mut value = HeaderValue::try_from(format!("Bearer {text}"))
            .map_err(|error| setting(source, format!("it is no token: {error}")))?;
        value.set_sensitive(true);
        Ok(Some(Self(value)))
    }

    fn read(path: &Path) -> Result<Option<Self>, Error> {
        use std::io::ErrorKind::{NotADirectory, NotFound};
        let source = path.display().to_string();
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(&text, &source),
            Err(error) if [NotFound, NotADirectory].contains(&error.kind()) => Ok(None),
            Err(error) => Err(setting(
                source,
                format!("the token cannot be read ({error}); HF_HUB_DISABLE_IMPLICIT_TOKEN=1 goes on without"),
            )),
        }
    }

    pub(super) fn header(&self) -> HeaderValue {
        self.0.clone()
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Token(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Result<Settings, Error> {
        Settings::from_variables(&|name| {
            let (_, value) = variables.iter().find(|(known, _)| *known == name)?;
            Some(OsString::from(value))
        })
    }

    #[test]
    fn the_cache_lies_where_python_puts_it() {
        let cases: [(&[(&str, &str)], &str); 7] = [
            (&[("HOME", "/u")], "/u/.cache/huggingface/hub"),
            (&[("HOME", "/u"), ("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub"),
            (
                &[("HOME", "/u"), ("HF_HOME", "~/hf"), ("XDG_CACHE_HOME", "/x")],
                "/u/hf/hub",
            ),
            (&[("HF_HOME", "/hf"), ("HUGGINGFACE_HUB_CACHE", "/old")], "/old"),
            (
                &[
                    ("HF_HOME", "/hf"),
                    ("HF_HUB_CACHE", "/c"),
                    ("HUGGINGFACE_HUB_CACHE", "/old"),
                ],
                "/c",
            ),
            (&[("HOME", "/u"), ("HF_HUB_CACHE", "")], "/u/.cache/huggingface/hub"),
            (&[("USERPROFILE", "/w")], "/w/.cache/huggingface/hub"),
        ];
        for (variables, cache) in cases {
            assert_eq!(settings(variables).unwrap().cache, Path::new(cache), "{variables:?}");
        }
        assert!(matches!(settings(&[]), Err(Error::NoCacheDirectory)));
    }

    #[test]
    fn the_token_comes_from_the_environment_before_the_file_and_is_never_shown() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("token"), "hf_file\n").unwrap();
        let elsewhere = home.path().join("elsewhere");
        std::fs::write(&elsewhere, " hf_elsewhere ").unwrap();
        let (home, elsewhere) = (home.path().to_str().unwrap(), elsewhere.to_str().unwrap());
        let token = |more: &[(&str, &str)]| {
            let mut variables = vec![("HF_HOME", home)];
            variables.extend(more);
            let token = settings(&variables).unwrap().token?;
            assert_eq!(format!("{token:?}"), "Token(..)");
            Some(token.header().to_str().unwrap().to_owned())
        };
        assert_eq!(token(&[]).as_deref(), Some("Bearer hf_file"));
        assert_eq!(token(&[("HF_TOKEN", "hf_env\r\n")]).as_deref(), Some("Bearer hf_env"));
        assert_eq!(token(&[("HF_TOKEN", "  ")]).as_deref(), Some("Bearer hf_file"));
        assert_eq!(
            token(&[("HF_TOKEN_PATH", elsewhere)]).as_deref(),
            Some("Bearer hf_elsewhere")
        );
        assert_eq!(token(&[("HF_TOKEN_PATH", "/nowhere/at/all")]), None);
        assert_eq!(token(&[("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]), None);
        let error = settings(&[("HF_HOME", home), ("HF_TOKEN", "hf_a b")])
            .unwrap_err()
            .to_string();
        assert!(error.contains("HF_TOKEN") && !error.contains("hf_a"), "{error}");
    }

    #[test]
    fn an_endpoint_is_a_web_address() {
        let url = |endpoint: &str| settings(&[("HOME", "/u"), ("HF_ENDPOINT", endpoint)]);
        let mirror = url("https://mirror.example/hf/").unwrap().endpoint;
        assert_eq!(mirror.as_str(), "https://mirror.example/hf");
        assert_eq!(
            mirror.below(["api", "a", "refs/pr/1", "x y"]).as_str(),
            "https://mirror.example/hf/api/a/refs%2Fpr%2F1/x%20y"
        );
        assert_eq!(
            settings(&[("HOME", "/u")]).unwrap().endpoint.as_str(),
            "https://huggingface.co"
        );
        for (endpoint, reason) in [
            ("huggingface.co", "is no address"),
            ("ftp://mirror.example", "neither https:// nor http://"),
            ("file:///etc", "neither https:// nor http://"),
            ("https://user:secret@mirror.example", "HF_TOKEN"),
            ("https://mirror.example/?x=1", "after its path"),
        ] {
            let error = url(endpoint).unwrap_err().to_string();
            assert!(error.contains("HF_ENDPOINT") && error.contains(reason), "{error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn offline_and_patience_are_read() {
        let with = |name: &str, value: &str| settings(&[("HOME", "/u"), (name, value)]);
        for (name, value, offline) in [
            ("HF_HUB_OFFLINE", "1", true),
            ("HF_HUB_OFFLINE", "yes", true),
            ("HF_HUB_OFFLINE", "0", false),
            ("TRANSFORMERS_OFFLINE", "True", true),
        ] {
            assert_eq!(with(name, value).unwrap().offline, offline, "{name}={value}");
        }
        assert_eq!(
            with("HF_HUB_DOWNLOAD_TIMEOUT", "90").unwrap().patience,
            Duration::from_secs(90)
        );
        for bad in ["0", "-1", "soon", "99999999999999999999"] {
            assert!(
                matches!(with("HF_HUB_DOWNLOAD_TIMEOUT", bad), Err(Error::Setting { .. })),
                "{bad}"
            );
        }
    }
}
