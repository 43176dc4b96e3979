//! What a model needs before anyone starts it: bytes on both sides of the cut and on the network, per cut and weight format.
//!
//! Bytes on devices are read off recordings on paper (`model::cost`), what is sent off the shapes and formats in the model's files.
//! No weights are read.

use std::path::Path;

use anyhow::Context;
use serde_json::{Value, json};

use crate::data::Tokenizer;
use crate::hub;
use crate::model::adapter::{AdapterLayout, LoraSpec};
use crate::model::architecture::Architecture;
use crate::model::cost::{Convention, DeviceBytes, Workload};
use crate::model::gguf::container::Gguf;
use crate::model::gguf::model::GgufModel;
use crate::model::gguf::tokenizer::GgufTokenizer;
use crate::model::unit::Unit;
use crate::model::weights::{Holding, Weights};
use crate::model::workspace::Extent;
use crate::terms::format::Format;
use crate::terms::tensor::WireForm;

use super::fetch;
use super::human::bytes;
use super::source::{ModelName, ModelSource, Source};

/// What is known of a model without its weights.
pub struct Described {
    name: String,
    model: Architecture,
    /// The headers of its files; of a model on the hub there may be none here.
    weights: Option<Weights>,
    tokenizer_bytes: Option<u64>,
}

impl Described {
    /// Reads the headers of a model's files. Of one on the hub that is not in the cache, only `config.json` is fetched.
    ///
    /// # Errors
    /// One sentence that says what to do.
    pub fn read(name: &ModelName, quiet: bool) -> anyhow::Result<Self> {
        let source = match name {
            ModelName::Hub(hub) => match fetch::cached(hub).map(|snapshot| snapshot.files) {
                Some(hub::Files::Directory(directory)) => ModelSource::Directory(directory),
                Some(hub::Files::Gguf(file)) => ModelSource::Gguf(file),
                None => {
                    anyhow::ensure!(
                        hub.file().is_none(),
                        "{hub} is not on this machine, and of a GGUF file there is no less to fetch than the whole; fetch it with \
                         sflllm generate --model {hub} --prompt Hello, and ask again"
                    );
                    let directory = fetch::description(hub, quiet)?;
                    return Ok(Self {
                        name: name.to_string(),
                        model: Architecture::load(&directory)?,
                        weights: None,
                        tokenizer_bytes: None,
                    });
                }
            },
            _ => name.find(quiet)?,
        };
        let (weights, tokenizer_bytes) = match &source {
            ModelSource::Demo => {
                let Source { weights, tokenizer, .. } = Source::demo(Holding::Auto)?;
                (weights, tokenizer.map(|tokenizer| tokenizer.json().len()))
            }
            ModelSource::Directory(directory) => open(directory)?,
            ModelSource::Gguf(file) => {
                let gguf = Gguf::open_path(file)?;
                let tokenizer = GgufTokenizer::read(&gguf)?;
                (Weights::from_gguf(GgufModel::new(gguf)?)?, Some(tokenizer.json.len()))
            }
        };
        Ok(Self {
            name: name.to_string(),
            model: weights.model().clone(),
            weights: Some(weights),
            tokenizer_bytes: tokenizer_bytes.map(|bytes| bytes as u64),
        })
    }

    /// The model's shape.
    pub fn model(&self) -> &Architecture {
        &self.model
    }

    fn format(&self, unit: Unit, tensor: &str, holding: Holding) -> Format {
        match (&self.weights, holding.of(unit)) {
            (Some(weights), _) => weights.matrix_format(unit, tensor, holding),
            (None, Holding::Auto) => Format::F16,
            (None, Holding::As(format)) => format,
        }
    }

    /// How blocks are held by `--weights auto`.
    fn natural(&self) -> Format {
        self.format(Unit::Block(0), self.model.targets()[0].weight(), Holding::Auto)
    }

    /// Weight formats worth a table: `auto` first where it is none of the others, as of files that mix them.
    fn holdings(&self) -> Vec<Holding> {
        let all = Format::ALL.iter().map(|&format| Holding::As(format));
        let same = |holding: Holding| {
            Unit::all(&self.model).all(|unit| {
                let tensors = unit.tensors(&self.model);
                (tensors.iter().filter(|(_, shape)| shape.len() == 2))
                    .all(|(name, _)| self.format(unit, name, holding) == self.format(unit, name, Holding::Auto))
            })
        };
        match all.clone().find(|&holding| same(holding)) {
            // In the order of their sizes, the usual one first.
            Some(usual) => std::iter::once(usual)
                .chain(all.filter(|&holding| holding != usual))
                .collect(),
            None => std::iter::once(Holding::Auto).chain(all).collect(),
        }
    }
}

/// Weights and tokenizer of a directory.
fn open(directory: &Path) -> anyhow::Result<(Weights, Option<usize>)> {
    let architecture = Architecture::load(directory)?;
    let tokenizer = Tokenizer::load(directory, architecture.eos)?;
    Ok((
        Weights::open(directory, &architecture)?,
        tokenizer.map(|tokenizer| tokenizer.json().len()),
    ))
}

/// What one cut needs with weights held in one way.
#[derive(Clone, Copy, Debug)]
struct Need {
    cut: usize,
    client: DeviceBytes,
    /// The client's embedding, on its host.
    embedding: u64,
    server: DeviceBytes,
    /// What a client fetches before its first step.
    download: u64,
}

impl Need {
    fn client_total(&self) -> u64 {
        self.client.total() + self.embedding
    }
}

/// The needs of a model in training.
pub struct Needs {
    described: Described,
    extent: Extent,
    spec: LoraSpec,
    wire: WireForm,
    tables: Vec<(Holding, Vec<Need>)>,
}

/// A phone has so many bytes.
const PHONE: u64 = 1 << 30;
/// The part of a machine's memory that can be counted on: a browser ends tabs that take more of a phone's, and a computer has other
/// things to do.
const USABLE: f64 = 0.5;

impl Needs {
    /// Of training an adapter of this rank and these targets, on batches of `extent`.
    ///
    /// # Errors
    /// For a model that cannot be cut, and an adapter that it cannot have.
    pub fn new(described: Described, extent: Extent, spec: LoraSpec) -> anyhow::Result<Self> {
        let model = &described.model;
        anyhow::ensure!(model.blocks > 1, "{} has one block: it cannot be cut", described.name);
        AdapterLayout::new(model, &spec, 0..model.blocks)?;
        let rank = spec.rank;
        let wire = WireForm::default();
        let workload = Workload::new(model, &spec.targets, extent, Convention::Issued);
        let table = |holding: Holding| -> anyhow::Result<Vec<Need>> {
            let formats = |unit: Unit, tensor: &str| described.format(unit, tensor, holding);
            let embedding = workload.held_unit_bytes(Unit::Embedding, &formats);
            let mut sent = embedding + described.tokenizer_bytes.unwrap_or(0);
            (1..model.blocks)
                .map(|cut| {
                    sent += workload.held_unit_bytes(Unit::Block(cut - 1), &formats);
                    Ok(Need {
                        cut,
                        client: workload.client_bytes(cut, rank, &formats, wire)?,
                        embedding,
                        server: workload.server_bytes(cut, rank, &formats, wire)?,
                        download: sent,
                    })
                })
                .collect()
        };
        let tables = (described.holdings().into_iter())
            .map(|holding| Ok((holding, table(holding)?)))
            .collect::<anyhow::Result<_>>()
            .context("what the model needs cannot be told")?;
        Ok(Self {
            described,
            extent,
            spec,
            wire,
            tables,
        })
    }

    /// Which cuts and formats fit a machine with so much memory, and a phone.
    pub fn advice(&self, memory: Option<u64>) -> String {
        // What a run takes by itself, then what takes less; more precise than the file is of no use.
        let usual = self.tables[0].0;
        let smaller = |holding: Holding| matches!(holding, Holding::As(Format::Q8 | Format::Q4));
        let tables = || (self.tables.iter()).filter(|(holding, _)| *holding == usual || smaller(*holding));
        let usable = |memory: u64| (memory as f64 * USABLE) as u64;
        let option = |holding: Holding| match holding == usual {
            true => format!("as --weights auto holds it ({})", self.shown(holding)),
            false => format!("with --weights {holding}"),
        };
        let client = |memory: u64| {
            let fits = |need: &&Need| need.client_total() <= usable(memory);
            tables().find_map(|(holding, needs)| {
                let deepest = needs.iter().rfind(fits)?;
                Some(format!(
                    "join {} with cuts of up to {} ({} held, {} fetched)",
                    option(*holding),
                    deepest.cut,
                    bytes(deepest.client_total()),
                    bytes(deepest.download)
                ))
            })
        };
        let server = |memory: u64| {
            let fits = |need: &&Need| need.server.total() <= usable(memory);
            tables().find_map(|(holding, needs)| {
                let first = needs.iter().find(fits)?;
                let cuts = match first.cut {
                    1 => "every cut".to_owned(),
                    cut => format!("cuts from {cut} on"),
                };
                Some(format!(
                    "serve the model {} with {cuts} ({})",
                    option(*holding),
                    bytes(first.server.total())
                ))
            })
        };
        let side = |can: Option<String>, cannot: &str| match can {
            Some(can) => format!("can {can}"),
            None => format!("cannot {cannot}: try a smaller --batch or --seq"),
        };
        let mut parts = Vec::new();
        if let Some(memory) = memory {
            parts.push(format!(
                "this machine, of whose {} half is counted on, {} and {}",
                bytes(memory),
                side(server(memory), "serve it"),
                side(client(memory), "join"),
            ));
        }
        parts.push(format!("a phone with 1 GB {}", side(client(PHONE), "join")));
        parts.join("; ")
    }

    /// The name of a way to hold weights.
    fn shown(&self, holding: Holding) -> String {
        match holding {
            Holding::Auto => format!("mostly {}", self.described.natural()),
            Holding::As(format) => format.to_string(),
        }
    }

    /// Everything, every cut.
    pub fn json(&self) -> Value {
        let side = |held: &DeviceBytes| json!({ "weights": held.weights, "training": held.training });
        let row = |holding: Holding, need: &Need| {
            let mut client = side(&need.client);
            client["embedding"] = need.embedding.into();
            client["total"] = need.client_total().into();
            let mut server = side(&need.server);
            server["total"] = need.server.total().into();
            json!({
                "weights": holding.to_string(), "split": need.cut, "client_bytes": client, "server_bytes": server,
                "download_bytes": need.download,
            })
        };
        let rows = (self.tables.iter()).flat_map(|(holding, needs)| needs.iter().map(move |need| row(*holding, need)));
        let model = &self.described.model;
        json!({
            "model": self.described.name, "family": model.family.model_type(), "blocks": model.blocks, "width": model.width,
            "vocabulary": model.vocab, "auto": self.described.natural(), "batch": self.extent.batch, "seq": self.extent.seq,
            "rank": self.spec.rank, "targets": self.spec.targets.iter().map(|target| target.module()).collect::<Vec<_>>(), "wire": self.wire, "tokenizer_bytes": self.described.tokenizer_bytes,
            "needs": rows.collect::<Vec<_>>(),
        })
    }

    /// Tables for a person, with some of the cuts.
    pub fn lines(&self) -> Vec<String> {
        let model = &self.described.model;
        let targets = match &self.spec.targets {
            all if all == model.targets() => "all targets".to_owned(),
            some => some.iter().map(|target| target.module()).collect::<Vec<_>>().join(", "),
        };
        let mut lines = vec![
            format!(
                "model      {}: {}, {} blocks of width {}, vocabulary {}",
                self.described.name,
                model.family.model_type(),
                model.blocks,
                model.width,
                model.vocab
            ),
            format!(
                "training   {} × {} tokens, rank {} on {}, activations in {}; a program's own memory comes on top",
                self.extent.batch, self.extent.seq, self.spec.rank, targets, self.wire
            ),
        ];
        for (position, (holding, needs)) in self.tables.iter().enumerate() {
            let usual = if position == 0 { ", by --weights auto" } else { "" };
            lines.push(String::new());
            lines.push(format!("weights in {}{usual}", self.shown(*holding)));
            lines.push(
                " cut    fetched |  client = embedding +   weights +  training |  server =   weights +  training"
                    .to_owned(),
            );
            for need in needs.iter().filter(|need| is_shown(need.cut, model.blocks)) {
                let [fetched, client, embedding, client_weights, client_training] = [
                    need.download,
                    need.client_total(),
                    need.embedding,
                    need.client.weights,
                    need.client.training,
                ]
                .map(bytes);
                let [server, server_weights, server_training] =
                    [need.server.total(), need.server.weights, need.server.training].map(bytes);
                lines.push(format!(
                    "{:>4} {fetched:>10} |{client:>8} {embedding:>11} {client_weights:>11} {client_training:>11} \
                     |{server:>8} {server_weights:>11} {server_training:>11}",
                    need.cut
                ));
            }
        }
        lines
    }
}

/// Few cuts stand for all: every one of the first four, then always a half more, and the last.
fn is_shown(cut: usize, blocks: usize) -> bool {
    let is_step = cut.is_power_of_two() || (cut.is_multiple_of(3) && (cut / 3).is_power_of_two());
    is_step || cut + 1 == blocks
}
