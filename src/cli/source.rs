//! Where `--model` comes from: a Hugging Face directory, or the demo model inside this program.

use std::path::{Path, PathBuf};

use anyhow::Context;
use sha2::{Digest, Sha256};

use super::console;
use crate::compute::Engine;
use crate::data::{Dataset, Tokenizer};
use crate::model::adapter::Adapter;
use crate::model::architecture::Architecture;
use crate::model::stack::StackWeights;
use crate::model::weights::{HeldUnits, Holding, UnitSource, Weights};

const DEMO_CONFIG: &str = include_str!("../../assets/demo/config.json");
const DEMO_WEIGHTS: &[u8] = include_bytes!("../../assets/demo/model.safetensors");
const DEMO_TOKENIZER: &[u8] = include_bytes!("../../assets/demo/tokenizer.json");
/// The demo's training data.
pub const DEMO_TRAIN: &[u8] = include_bytes!("../../assets/demo/train.txt");
/// The demo's validation data.
pub const DEMO_VALID: &[u8] = include_bytes!("../../assets/demo/valid.txt");
/// The demo's test data.
pub const DEMO_TEST: &[u8] = include_bytes!("../../assets/demo/test.txt");

/// A model as it lies on disk or in this program.
pub struct Source {
    /// What adapters say they belong to.
    pub name: String,
    pub config: Architecture,
    pub weights: Weights,
    pub holding: Holding,
    pub tokenizer: Option<Tokenizer>,
    /// SHA-256 over configuration, weights and how they are held.
    pub digest: [u8; 32],
}

fn hash_file(digest: &mut Sha256, path: &Path) -> anyhow::Result<()> {
    let mut file = std::fs::File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    std::io::copy(&mut file, &mut HashWriter(digest)).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(())
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
    /// Opens `model`: `demo`, or a directory.
    pub fn open(model: &str, holding: Holding) -> anyhow::Result<Self> {
        let mut digest = Sha256::new();
        digest.update(holding.to_string());
        if model == "demo" {
            let config = Architecture::from_json(DEMO_CONFIG)?;
            digest.update(DEMO_CONFIG);
            digest.update(DEMO_WEIGHTS);
            return Ok(Self {
                name: "demo".to_owned(),
                weights: Weights::from_bytes(DEMO_WEIGHTS, &config)?,
                tokenizer: Some(Tokenizer::from_json(DEMO_TOKENIZER, config.eos)?),
                config,
                holding,
                digest: digest.finalize().into(),
            });
        }
        let dir = PathBuf::from(model);
        anyhow::ensure!(
            dir.is_dir(),
            "--model {model} is not a directory; give a Hugging Face GPT-2 directory, or `demo`"
        );
        let config = Architecture::load(&dir)?;
        let weights = Weights::open(&dir, &config)?;
        let tokenizer = Tokenizer::load(&dir, config.eos)?;
        if let Some(tokenizer) = &tokenizer {
            tokenizer.check_vocabulary(config.vocab)?;
        }
        digest.update(config.to_json());
        let mut files: Vec<PathBuf> = std::fs::read_dir(&dir)
            .with_context(|| format!("cannot read {}", dir.display()))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
            .collect();
        files.sort();
        for file in &files {
            hash_file(&mut digest, file)?;
        }
        let name = dir.canonicalize().unwrap_or(dir);
        Ok(Self {
            name: name
                .file_name()
                .map_or_else(|| model.to_owned(), |name| name.to_string_lossy().into_owned()),
            weights,
            tokenizer,
            config,
            holding,
            digest: digest.finalize().into(),
        })
    }

    /// Reads a data file with this model's tokenizer; says on stderr what was read.
    pub fn data(&self, path: &Path, seq: usize, skip_bad_lines: bool, quiet: bool) -> anyhow::Result<Dataset> {
        let options = self.data_options(seq, skip_bad_lines);
        let data = Dataset::load(path, self.tokenize(), &options)?;
        if !quiet {
            console::say(format!("{}: {}", path.display(), data.summary));
        }
        Ok(data)
    }

    /// How data is read for this model.
    pub fn data_options(&self, seq: usize, skip_bad_lines: bool) -> crate::data::Options {
        crate::data::Options {
            // An example of seq + 1 tokens fills seq input positions.
            seq,
            vocab: self.config.vocab,
            skip_bad_lines,
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
        Ok(StackWeights::load(engine, &self.config, &mut self.units())?)
    }

    /// Reads a PEFT adapter of this model.
    pub fn adapter(&self, dir: &Path) -> anyhow::Result<Adapter> {
        let adapter = Adapter::load(dir, &self.config)?;
        let covered = adapter.layout.blocks();
        anyhow::ensure!(
            covered == (0..self.config.blocks),
            "the adapter in {} covers blocks {} to {} only, and the model has {}: train or merge one for the whole model",
            dir.display(),
            covered.start,
            covered.end.saturating_sub(1),
            self.config.blocks
        );
        Ok(adapter)
    }
}
