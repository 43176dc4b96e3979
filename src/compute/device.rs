//! Which adapter to use, what it can do, and how to say so.

use super::Error;
use super::kernel::DeviceClass;

/// The `--device` option.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Selection {
    /// A real GPU where there is one, else the CPU engine: it beats an adapter emulated on the same cores.
    #[default]
    Auto,
    /// Any adapter, real ones first, emulated ones last; an error where there is none.
    Gpu,
    /// The CPU engine.
    Cpu,
    /// The adapter whose name contains this, whatever the case.
    Named(String),
}

impl std::str::FromStr for Selection {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "auto" => Self::Auto,
            "gpu" => Self::Gpu,
            "cpu" => Self::Cpu,
            name => Self::Named(name.to_owned()),
        })
    }
}

impl std::fmt::Display for Selection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Gpu => "gpu",
            Self::Cpu => "cpu",
            Self::Named(name) => name,
        })
    }
}

/// What an adapter is and what it offers, in words and numbers.
#[derive(Clone, Debug)]
pub struct AdapterSummary {
    /// As the driver calls it.
    pub name: String,
    /// The graphics API it is reached by.
    pub backend: String,
    /// The driver and its version.
    pub driver: String,
    /// What kind of processor it is.
    pub class: DeviceClass,
    /// Optional abilities that variants may use, by their names in WebGPU.
    pub features: Vec<&'static str>,
    /// Largest buffer a kernel may bind, in bytes.
    pub max_binding_bytes: u64,
    /// Workgroup memory, in bytes.
    pub workgroup_bytes: u32,
    /// Invocations in a workgroup.
    pub workgroup_invocations: u32,
}

impl AdapterSummary {
    /// Name, backend and class, for people.
    pub fn label(&self) -> String {
        let name = if self.name.is_empty() {
            "WebGPU adapter"
        } else {
            &self.name
        };
        format!("{name} ({})", self.backend)
    }
}

pub(super) fn summary(adapter: &wgpu::Adapter) -> AdapterSummary {
    let info = adapter.get_info();
    let limits = adapter.limits();
    let emulated = info.device_type == wgpu::DeviceType::Cpu
        || ["llvmpipe", "lavapipe", "swiftshader"]
            .iter()
            .any(|name| info.name.to_lowercase().contains(name));
    let features = [
        (wgpu::Features::SHADER_F16, "shader-f16"),
        (wgpu::Features::SUBGROUP, "subgroups"),
        (wgpu::Features::TIMESTAMP_QUERY, "timestamp-query"),
        (wgpu::Features::PIPELINE_CACHE, "pipeline-cache"),
        (wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX, "cooperative-matrix"),
    ];
    AdapterSummary {
        name: info.name,
        backend: info.backend.to_string(),
        driver: format!("{} {}", info.driver, info.driver_info).trim().to_owned(),
        class: if emulated {
            DeviceClass::CpuAdapter
        } else {
            DeviceClass::Gpu
        },
        features: features
            .iter()
            .filter(|(feature, _)| adapter.features().contains(*feature))
            .map(|(_, name)| *name)
            .collect(),
        max_binding_bytes: limits.max_storage_buffer_binding_size.min(limits.max_buffer_size),
        workgroup_bytes: limits.max_compute_workgroup_storage_size,
        workgroup_invocations: limits.max_compute_invocations_per_workgroup,
    }
}

fn instance() -> wgpu::Instance {
    wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle())
}

#[cfg(not(target_arch = "wasm32"))]
async fn adapters() -> Vec<wgpu::Adapter> {
    let order = |adapter: &wgpu::Adapter| {
        let kind = match adapter.get_info().device_type {
            wgpu::DeviceType::DiscreteGpu => 0,
            wgpu::DeviceType::IntegratedGpu => 1,
            wgpu::DeviceType::VirtualGpu | wgpu::DeviceType::Other => 2,
            wgpu::DeviceType::Cpu => 3,
        };
        let gl = adapter.get_info().backend == wgpu::Backend::Gl;
        (gl, kind)
    };
    let mut adapters = instance().enumerate_adapters(wgpu::Backends::all()).await;
    adapters.retain(|adapter| {
        adapter
            .get_downlevel_capabilities()
            .flags
            .contains(wgpu::DownlevelFlags::COMPUTE_SHADERS)
    });
    adapters.sort_by_key(order);
    adapters
}

#[cfg(target_arch = "wasm32")]
async fn adapters() -> Vec<wgpu::Adapter> {
    let options = wgpu::RequestAdapterOptions {
        power_preference: wgpu::PowerPreference::HighPerformance,
        ..Default::default()
    };
    instance().request_adapter(&options).await.into_iter().collect()
}

/// Every adapter that can run compute shaders, the preferred one first.
pub async fn list() -> Vec<AdapterSummary> {
    adapters().await.iter().map(summary).collect()
}

/// The adapter to use, or `None` for the CPU engine.
pub(super) async fn choose(selection: &Selection) -> Result<Option<wgpu::Adapter>, Error> {
    if *selection == Selection::Cpu {
        return Ok(None);
    }
    let mut adapters = adapters().await;
    let emulated = |adapter: &wgpu::Adapter| summary(adapter).class == DeviceClass::CpuAdapter;
    match selection {
        Selection::Cpu => Ok(None),
        Selection::Auto => Ok((!adapters.is_empty() && !emulated(&adapters[0])).then(|| adapters.swap_remove(0))),
        Selection::Gpu if adapters.is_empty() => Err(Error::NoAdapter("none can run compute shaders".to_owned())),
        Selection::Gpu => Ok(Some(adapters.swap_remove(0))),
        Selection::Named(wanted) => {
            let names: Vec<String> = adapters.iter().map(|a| summary(a).label()).collect();
            let position = names
                .iter()
                .position(|name| name.to_lowercase().contains(&wanted.to_lowercase()));
            match position {
                Some(position) => Ok(Some(adapters.swap_remove(position))),
                None => Err(Error::UnknownAdapter {
                    wanted: wanted.clone(),
                    found: if names.is_empty() {
                        "none".to_owned()
                    } else {
                        names.join(", ")
                    },
                }),
            }
        }
    }
}
