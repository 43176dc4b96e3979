//! Where `--model` comes from: a Hugging Face directory, a GGUF file, a name on the hub, or the demo model inside this program.

use std::ffi::OsStr;
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, bail};
use sha2::{Digest, Sha256};

use super::console;
use crate::compute::Engine;
use crate::data::tokenizer::Settings;
use crate::data::{Dataset, Tokenizer};
use crate::hub;
use crate::model::adapter::Adapter;
use crate::model::architecture::Architecture;
use crate::model::gguf::container::Gguf;
use crate::model::gguf::model::GgufModel;
use crate::model::gguf::tokenizer::GgufTokenizer;
use crate::model::stack::StackWeights;
use crate::model::weights::{HeldUnits, Holding, UnitSource, Weights};

use super::options::ReadingOptions;

/// The demo's `config.json`.
pub const DEMO_CONFIG: &str = include_str!("../../assets/demo/config.json");
const DEMO_WEIGHTS: &[u8] = include_bytes!("../../assets/demo/model.safetensors");
/// The demo's `tokenizer.json`.
pub const DEMO_TOKENIZER: &[u8] = include_bytes!("../../assets/demo/tokenizer.json");
/// The demo's training data.
pub const DEMO_TRAIN: &[u8] = include_bytes!("../../assets/demo/train.txt");
/// The demo's validation data.
pub const DEMO_VALID: &[u8] = include_bytes!("../../assets/demo/valid.txt");
/// The demo's test data.
pub const DEMO_TEST: &[u8] = include_bytes!("../../assets/demo/test.txt");

/// The name of the demo model.
const DEMO: &str = "demo";

/// What `--model` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelName {
    Demo,
    Hub(hub::Name),
    Path(PathBuf),
}

/// A model on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelSource {
    Demo,
    /// With `config.json` and safetensors files.
    Directory(PathBuf),
    Gguf(PathBuf),
}

impl FromStr for ModelName {
    type Err = hub::Error;

    fn from_str(text: &str) -> Result<Self, hub::Error> {
        match text {
            DEMO => Ok(Self::Demo),
            _ if text.starts_with(hub::name::PREFIX) => text.parse().map(Self::Hub),
            _ => Ok(Self::Path(PathBuf::from(text))),
        }
    }
}

impl fmt::Display for ModelName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Demo => formatter.write_str(DEMO),
            Self::Hub(name) => name.fmt(formatter),
            Self::Path(path) => path.display().fmt(formatter),
        }
    }
}

impl ModelName {
    /// The last part, for directories that are named after the model.
    pub fn short(&self) -> String {
        let path = match self {
            Self::Demo => return DEMO.to_owned(),
            Self::Hub(name) => Path::new(name.repository()),
            Self::Path(path) => path,
        };
        last_part(path).unwrap_or_else(|| "model".to_owned())
    }

    /// Finds the model; what is missing of one on the hub is fetched, with progress on stderr unless `quiet`.
    pub fn find(&self, quiet: bool) -> anyhow::Result<ModelSource> {
        match self {
            Self::Demo => Ok(ModelSource::Demo),
            Self::Hub(name) => Ok(match super::fetch::fetch(name, quiet)?.files {
                hub::Files::Directory(directory) => ModelSource::Directory(directory),
                hub::Files::Gguf(file) => ModelSource::Gguf(file),
            }),
            Self::Path(path) => ModelSource::at(path),
        }
    }

    /// A text that names the same model in whatever directory it is read.
    pub fn recorded(&self) -> String {
        match self {
            Self::Demo | Self::Hub(_) => self.to_string(),
            Self::Path(path) => {
                let whole = std::path::absolute(path).unwrap_or_else(|_| path.clone());
                whole.display().to_string()
            }
        }
    }

    /// What adapters say they belong to, where that is not a path.
    fn public_name(&self) -> Option<&str> {
        match self {
            Self::Demo => Some(DEMO),
            Self::Hub(name) => Some(name.repository()),
            Self::Path(_) => None,
        }
    }
}

impl ModelSource {
    fn at(path: &Path) -> anyhow::Result<Self> {
        let shown = path.display();
        match std::fs::metadata(path) {
            Ok(found) if found.is_dir() => Self::in_directory(path),
            Ok(_) if is_gguf(path)? => Ok(Self::Gguf(path.to_owned())),
            Ok(_) => bail!(
                "--model {shown} is a file that is not GGUF; give the directory that holds config.json and the safetensors files"
            ),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => match hub_name(path) {
                Some(name) => bail!("--model {shown} does not exist here; did you mean {name}, from the hub?"),
                None => bail!(
                    "--model {shown} does not exist; give a Hugging Face directory, a .gguf file, hf:ORG/NAME, or `{DEMO}`"
                ),
            },
            Err(error) => Err(error).with_context(|| format!("cannot read --model {shown}")),
        }
    }

    /// A directory of safetensors, or the one GGUF file in a directory without any.
    fn in_directory(directory: &Path) -> anyhow::Result<Self> {
        let entries = std::fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?;
        let mut files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        files.sort();
        let having = |extension: &'static str| files.iter().filter(move |file| has_extension(file, extension));
        if having("safetensors").next().is_some() {
            return Ok(Self::Directory(directory.to_owned()));
        }
        let gguf: Vec<&PathBuf> = having("gguf").filter(|file| file.is_file()).collect();
        match gguf[..] {
            // What is missing in it is said by whoever reads it.
            [] => Ok(Self::Directory(directory.to_owned())),
            [file] => Ok(Self::Gguf(file.clone())),
            _ => {
                let names: Vec<String> = gguf.iter().map(|file| file.display().to_string()).collect();
                bail!(
                    "--model {} holds several models; give one of {}",
                    directory.display(),
                    names.join(", ")
                )
            }
        }
    }
}

fn last_part(path: &Path) -> Option<String> {
    path.file_name().map(|name| name.to_string_lossy().into_owned())
}

fn has_extension(path: &Path, expected: &str) -> bool {
    path.extension()
        .and_then(OsStr::to_str)
        .is_some_and(|extension| extension.eq_ignore_ascii_case(expected))
}

/// By its name or by its first bytes.
fn is_gguf(path: &Path) -> anyhow::Result<bool> {
    if has_extension(path, "gguf") {
        return Ok(true);
    }
    let fail = || format!("cannot read --model {}", path.display());
    let mut magic = Vec::new();
    let file = std::fs::File::open(path).with_context(fail)?;
    file.take(4).read_to_end(&mut magic).with_context(fail)?;
    Ok(magic == *b"GGUF")
}

/// The name on the hub that a path which does not exist looks like: `ORG/NAME`, a name without `ORG/`, or a page's address.
fn hub_name(path: &Path) -> Option<hub::Name> {
    let text = path.to_str()?.trim_end_matches('/');
    let text = text
        .strip_prefix("https://")
        .or_else(|| text.strip_prefix("hf://"))
        .unwrap_or(text);
    let page = text
        .strip_prefix("huggingface.co/")
        .or_else(|| text.strip_prefix("hf.co/"));
    let name: hub::Name = format!("{}{}", hub::name::PREFIX, page.unwrap_or(text)).parse().ok()?;
    let is_likely = name.file().is_none() && !has_extension(path, "gguf");
    is_likely.then_some(name)
}

/// A model as it lies on disk or in this program.
pub struct Source {
    /// What adapters say they belong to.
    pub name: String,
    /// Where it lies.
    pub origin: ModelSource,
    pub architecture: Architecture,
    pub weights: Weights,
    pub holding: Holding,
    pub tokenizer: Option<Tokenizer>,
    /// SHA-256 over configuration, weights and how they are held: the same values held otherwise are another model to those who
    /// take part in a run.
    pub digest: [u8; 32],
}

fn hash_file(digest: &mut Sha256, path: &Path) -> anyhow::Result<()> {
    let mut file = std::fs::File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    std::io::copy(&mut file, &mut HashWriter(digest)).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(())
}

/// The tokenizer of a GGUF file with what the file says of it.
fn tokenizer_of(found: GgufTokenizer, model_eos: Option<u32>) -> anyhow::Result<Tokenizer> {
    let added: serde_json::Value = serde_json::from_str(&found.json).context("the tokenizer of a GGUF file")?;
    let text = |id: Option<u32>| {
        let tokens = added["added_tokens"].as_array()?;
        let token = tokens.iter().find(|token| token["id"].as_u64() == id.map(u64::from))?;
        token["content"].as_str().map(str::to_owned)
    };
    let named = [("bos_token", found.bos), ("eos_token", found.eos)];
    let settings = Settings {
        eos: found.eos,
        bos: found.bos,
        add_bos: Some(found.add_bos),
        stop: found.stop,
        named_tokens: named
            .into_iter()
            .filter_map(|(name, id)| Some((name.to_owned(), text(id)?)))
            .collect(),
        chat_template: found.chat_template,
    };
    Ok(Tokenizer::with_settings(found.json.as_bytes(), settings, model_eos)?)
}

fn begin_digest(holding: Holding) -> Sha256 {
    Sha256::new().chain_update(holding.to_string())
}

struct HashWriter<'a>(&'a mut Sha256);

impl std::io::Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Source {
    /// Finds `model` and opens it. Unless `quiet`, a model that is fetched for it says so on stderr.
    pub fn open(model: &ModelName, holding: Holding, quiet: bool) -> anyhow::Result<Self> {
        match model.find(quiet)? {
            ModelSource::Demo => Self::demo(holding),
            ModelSource::Directory(directory) => Self::directory(&directory, model.public_name(), holding),
            ModelSource::Gguf(file) => Self::gguf(&file, holding, quiet),
        }
    }

    /// The demo model.
    pub fn demo(holding: Holding) -> anyhow::Result<Self> {
        let architecture = Architecture::from_json(DEMO_CONFIG)?;
        let mut digest = begin_digest(holding);
        digest.update(DEMO_CONFIG);
        digest.update(DEMO_WEIGHTS);
        Ok(Self {
            name: DEMO.to_owned(),
            origin: ModelSource::Demo,
            weights: Weights::from_bytes(DEMO_WEIGHTS, &architecture)?,
            tokenizer: Some(Tokenizer::from_json(DEMO_TOKENIZER, architecture.eos)?),
            architecture,
            holding,
            digest: digest.finalize().into(),
        })
    }

    /// A GGUF file, with the tokenizer inside. It is named after the file.
    fn gguf(file: &Path, holding: Holding, quiet: bool) -> anyhow::Result<Self> {
        let gguf = Gguf::open_path(file)?;
        let tokenizer = GgufTokenizer::read(&gguf)?;
        let weights = Weights::from_gguf(GgufModel::new(gguf)?)?;
        let architecture = weights.model().clone();
        if !quiet {
            for notice in &tokenizer.notices {
                console::say(notice);
            }
        }
        let mut digest = begin_digest(holding);
        hash_file(&mut digest, file)?;
        let tokenizer = tokenizer_of(tokenizer, architecture.eos)?;
        tokenizer.check_vocabulary(architecture.vocab)?;
        let name = file.file_stem().unwrap_or(file.as_os_str());
        Ok(Self {
            name: name.to_string_lossy().into_owned(),
            origin: ModelSource::Gguf(file.to_owned()),
            weights,
            tokenizer: Some(tokenizer),
            architecture,
            holding,
            digest: digest.finalize().into(),
        })
    }

    /// A Hugging Face directory; without a `name` it is named after itself.
    fn directory(dir: &Path, name: Option<&str>, holding: Holding) -> anyhow::Result<Self> {
        let architecture = Architecture::load(dir)?;
        let weights = Weights::open(dir, &architecture)?;
        let tokenizer = Tokenizer::load(dir, architecture.eos)?;
        if let Some(tokenizer) = &tokenizer {
            tokenizer.check_vocabulary(architecture.vocab)?;
        }
        let mut digest = begin_digest(holding);
        digest.update(architecture.to_json());
        let mut files: Vec<PathBuf> = std::fs::read_dir(dir)
            .with_context(|| format!("cannot read {}", dir.display()))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
            .collect();
        files.sort();
        for file in &files {
            hash_file(&mut digest, file)?;
        }
        let own_name = || {
            let whole = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
            last_part(&whole).unwrap_or_else(|| dir.display().to_string())
        };
        Ok(Self {
            name: name.map_or_else(own_name, str::to_owned),
            origin: ModelSource::Directory(dir.to_owned()),
            weights,
            tokenizer,
            architecture,
            holding,
            digest: digest.finalize().into(),
        })
    }

    /// The model with the chat template that the user asks for instead of its own.
    pub fn with_reading(mut self, reading: &ReadingOptions) -> anyhow::Result<Self> {
        if let Some(template) = reading.chat_template()? {
            let tokenizer = self.tokenizer()?.clone();
            self.tokenizer = Some(tokenizer.with_chat_template(&template)?);
        }
        Ok(self)
    }

    /// Reads a data file with this model's tokenizer; says on stderr what was read.
    pub fn data(&self, path: &Path, seq: usize, reading: &ReadingOptions, quiet: bool) -> anyhow::Result<Dataset> {
        let options = self.data_options(seq, reading);
        let data = Dataset::load(path, self.tokenize(), &options)?;
        if !quiet {
            console::say(format!("{}: {}", path.display(), data.summary));
        }
        Ok(data)
    }

    /// How data is read for this model.
    pub fn data_options(&self, seq: usize, reading: &ReadingOptions) -> crate::data::Options {
        crate::data::Options {
            skip_bad_lines: reading.skip_bad_lines,
            columns: reading.columns.clone().unwrap_or_default(),
            ..crate::data::Options::new(seq, self.architecture.vocab)
        }
    }

    /// The tokenizer, where there is one.
    pub fn tokenize(&self) -> Option<&dyn crate::data::Tokenize> {
        self.tokenizer
            .as_ref()
            .map(|tokenizer| tokenizer as &dyn crate::data::Tokenize)
    }

    /// The tokenizer of a command that cannot do without.
    pub fn tokenizer(&self) -> anyhow::Result<&Tokenizer> {
        self.tokenizer.as_ref().with_context(|| {
            format!(
                "the model {} has no tokenizer: put tokenizer.json, or vocab.json and merges.txt, beside its weights",
                self.name
            )
        })
    }

    /// The parts of the model as they are to be held.
    pub fn units(&self) -> impl UnitSource + '_ {
        HeldUnits {
            weights: &self.weights,
            holding: self.holding,
        }
    }

    /// Uploads all weights.
    pub fn load(&self, engine: &Engine) -> anyhow::Result<StackWeights> {
        Ok(StackWeights::load(engine, &self.architecture, &mut self.units())?)
    }

    /// Reads a PEFT adapter of this model. Blocks that it leaves alone are left alone.
    pub fn adapter(&self, dir: &Path) -> anyhow::Result<Adapter> {
        Ok(Adapter::load(dir, &self.architecture)?.over_all_blocks(&self.architecture)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> ModelName {
        text.parse().unwrap()
    }

    fn refused(path: &Path) -> String {
        ModelSource::at(path).unwrap_err().to_string()
    }

    #[test]
    fn a_name_is_the_demo_a_path_or_of_the_hub() {
        assert_eq!(name("demo"), ModelName::Demo);
        assert_eq!(name("./demo"), ModelName::Path("./demo".into()));
        assert!(matches!(name("hf:gpt2"), ModelName::Hub(_)));
        assert!("hf:../x".parse::<ModelName>().is_err());
        for text in ["demo", "hf:a/b@v1:m.gguf", "models/x"] {
            assert_eq!(name(text).to_string(), text);
        }
        for (text, short) in [
            ("demo", "demo"),
            ("hf:a/b@v1", "b"),
            ("x/gpt2/", "gpt2"),
            ("x/m.gguf", "m.gguf"),
            (".", "model"),
        ] {
            assert_eq!(name(text).short(), short);
        }
    }

    #[test]
    fn gguf_is_told_by_name_by_content_and_by_being_alone() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str| directory.path().join(name);
        let gguf = file("m.GGUF");
        std::fs::write(&gguf, "").unwrap();
        assert_eq!(ModelSource::at(&gguf).unwrap(), ModelSource::Gguf(gguf.clone()));
        assert_eq!(
            ModelSource::at(directory.path()).unwrap(),
            ModelSource::Gguf(gguf.clone())
        );

        std::fs::write(file("blob"), "GGUF\x03\0\0\0").unwrap();
        assert_eq!(ModelSource::at(&file("blob")).unwrap(), ModelSource::Gguf(file("blob")));
        std::fs::write(file("config.json"), "{}").unwrap();
        assert!(refused(&file("config.json")).contains("give the directory"));
        std::fs::write(file("empty"), "").unwrap();
        assert!(refused(&file("empty")).contains("not GGUF"));

        let second = file("n.gguf");
        std::fs::write(&second, "").unwrap();
        let several = refused(directory.path());
        assert!(
            several.contains(&format!("give one of {}, {}", gguf.display(), second.display())),
            "{several}"
        );
        std::fs::write(file("model.safetensors"), "").unwrap();
        assert_eq!(
            ModelSource::at(directory.path()).unwrap(),
            ModelSource::Directory(directory.path().to_owned())
        );
    }

    #[test]
    fn a_path_that_is_a_name_on_the_hub_gets_its_prefix() {
        for text in [
            "HuggingFaceTB/SmolLM2-135M",
            "https://huggingface.co/HuggingFaceTB/SmolLM2-135M",
            "hf.co/HuggingFaceTB/SmolLM2-135M/",
            "hf://HuggingFaceTB/SmolLM2-135M",
        ] {
            let error = refused(Path::new(text));
            assert!(error.contains("did you mean hf:HuggingFaceTB/SmolLM2-135M,"), "{error}");
        }
        assert!(refused(Path::new("gpt2-that-is-not-here")).contains("hf:gpt2-that-is-not-here"));
        for text in ["models/x.gguf", "/nowhere/at/all", "../model", "a/b/c"] {
            let error = refused(Path::new(text));
            assert!(
                error.contains("does not exist; give a Hugging Face directory"),
                "{error}"
            );
        }
    }
}
