//! `doctor`: what this machine can do, and what to install when something is missing.

use clap::Args;
use serde_json::json;

use crate::compute::{DeviceClass, device};

use super::needs::{Described, Needs};
use super::options::{OutputOptions, targets, window};
use super::source::ModelName;
use super::{console, defaults};
use crate::machine;
use crate::model::adapter::LoraSpec;
use crate::model::workspace::Extent;

/// Show what this machine can do: adapters, features, limits, addresses, and what to install when something is missing; or what
/// a model needs.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  sflllm doctor
  sflllm doctor --model hf:HuggingFaceTB/SmolLM2-135M-Instruct
      memory of client and server and what a client fetches, for every cut and weight format; only headers are read")]
pub struct Options {
    /// Say what this model needs instead, without loading it
    #[arg(long, value_name = "DIR|FILE.gguf|hf:ORG/NAME[@REVISION]|demo")]
    pub model: Option<ModelName>,
    /// Examples in a batch
    #[arg(long, value_name = "N", default_value_t = 4, requires = "model", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub batch: u32,
    /// Longest window, in tokens; the smaller of 128 and the model's positions if not given
    #[arg(long, value_name = "N", requires = "model", value_parser = clap::value_parser!(u32).range(2..=1_048_576))]
    pub seq: Option<u32>,
    /// Rank of the adapter; the one that `serve` takes for the model if not given
    #[arg(long, value_name = "N", requires = "model", value_parser = clap::value_parser!(u32).range(1..))]
    pub rank: Option<u32>,
    /// Adapted matrices, as the model names them; all if not given
    #[arg(long, value_name = "NAMES", requires = "model")]
    pub targets: Option<String>,
    #[command(flatten)]
    pub output: OutputOptions,
}

/// # Errors
/// One sentence that says what to do.
pub fn run(options: Options) -> anyhow::Result<()> {
    match &options.model {
        Some(model) => needs(model, &options),
        None => machine(&options),
    }
}

/// What a model needs.
fn needs(model: &ModelName, options: &Options) -> anyhow::Result<()> {
    let described = Described::read(model, options.output.quiet)?;
    let extent = Extent {
        batch: options.batch as usize,
        seq: window(options.seq, described.model().positions)?,
    };
    let rank = match options.rank {
        Some(rank) => rank as usize,
        None => defaults::rank(described.model()),
    };
    let targets = targets(described.model(), options.targets.as_deref())?;
    let spec = LoraSpec::new(rank, defaults::alpha(rank), targets)?;
    let needs = Needs::new(described, extent, spec)?;
    let memory = machine::memory();
    let advice = needs.advice(memory);
    if options.output.json {
        let mut found = needs.json();
        found["machine_bytes"] = json!(memory);
        found["advice"] = json!([advice]);
        console::print(format!("{found:#}"))?;
        return Ok(());
    }
    let mut lines = needs.lines();
    lines.push(String::new());
    lines.push(format!("advice     {advice}"));
    console::print(lines.join("\n"))?;
    Ok(())
}

/// What this machine can do.
fn machine(options: &Options) -> anyhow::Result<()> {
    let adapters = pollster::block_on(device::list());
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let addresses: Vec<(String, String)> = if_addrs::get_if_addrs()
        .unwrap_or_default()
        .into_iter()
        .filter(|interface| !interface.is_loopback())
        .map(|interface| (interface.name.clone(), interface.ip().to_string()))
        .collect();
    let home = crate::transport::data_directory().ok();
    let certificate = home
        .as_ref()
        .map(|home| home.join("tls/certificate.pem"))
        .filter(|path| path.is_file());
    let real = adapters.iter().any(|adapter| adapter.class == DeviceClass::Gpu);
    let chosen = match adapters.first() {
        Some(first) if first.class == DeviceClass::Gpu => first.label(),
        _ => "CPU engine".to_owned(),
    };
    let mut advice = Vec::new();
    if adapters.is_empty() {
        advice.push(
            "no Vulkan, Metal or DX12 adapter: install the GPU's driver; for an emulated one on Debian/Ubuntu: \
             apt install mesa-vulkan-drivers",
        );
    } else if !real {
        advice.push("only emulated adapters: `--device auto` takes the CPU engine, which is faster on the same cores");
    }
    if addresses.is_empty() {
        advice.push("no network address: other devices cannot join; connect this machine to a network");
    }
    if !crate::server::has_browser_client() {
        advice.push(
            "this program holds no browser client: build it with `cargo xtask web`, then build this program again",
        );
    }
    if options.output.json {
        console::print(format!(
            "{:#}",
            json!({
                "version": env!("CARGO_PKG_VERSION"),
                "device": chosen,
                "cpu_threads": threads,
                "adapters": adapters.iter().map(|a| json!({
                    "name": a.name, "backend": a.backend, "driver": a.driver,
                    "class": format!("{:?}", a.class), "features": a.features,
                    "max_binding_bytes": a.max_binding_bytes, "workgroup_bytes": a.workgroup_bytes,
                    "workgroup_invocations": a.workgroup_invocations,
                })).collect::<Vec<_>>(),
                "addresses": addresses.iter().map(|(name, ip)| json!({"interface": name, "ip": ip})).collect::<Vec<_>>(),
                "home": home, "certificate": certificate,
                "browser_client": crate::server::has_browser_client(),
                "advice": advice,
            })
        ))?;
        return Ok(());
    }
    let mut text = Vec::new();
    let mut line = |line: String| text.push(line);
    line(format!("sflllm {}", env!("CARGO_PKG_VERSION")));
    line(format!(
        "device     {chosen} (what `--device auto` takes), {threads} CPU threads"
    ));
    if adapters.is_empty() {
        line("adapters   none".to_owned());
    }
    for adapter in &adapters {
        line(format!("adapter    {}", adapter.label()));
        line(format!("           driver {}", adapter.driver));
        line(format!(
            "           {}, bindings up to {} MiB, workgroups of {} invocations and {} KiB",
            match adapter.class {
                DeviceClass::Gpu => "GPU",
                DeviceClass::CpuAdapter | DeviceClass::CpuEngine => "emulated on the CPU",
            },
            adapter.max_binding_bytes >> 20,
            adapter.workgroup_invocations,
            adapter.workgroup_bytes >> 10
        ));
        line(format!("           features {}", adapter.features.join(", ")));
    }
    for (name, ip) in &addresses {
        line(format!("network    {ip} ({name})"));
    }
    match (&home, &certificate) {
        (_, Some(path)) => line(format!("certificate {}", path.display())),
        (Some(_), None) => line("certificate none yet: `sflllm serve` makes one".to_owned()),
        (None, None) => line("certificate no place for one: set SFLLLM_HOME or HOME".to_owned()),
    }
    line(format!(
        "web page   {}",
        if !crate::server::has_browser_client() {
            "not built in"
        } else {
            "built in"
        }
    ));
    for advice in advice {
        line(format!("advice     {advice}"));
    }
    console::print(text.join("\n"))?;
    Ok(())
}
