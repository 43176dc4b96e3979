//! The engine on wgpu: pipelines by specialised source, one uniform arena per prepared recording, one submission per run.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use super::Error;
use super::kernel::{Access, Constants, DeviceClass, Features, Profile, Variant, specialise};
use super::recording::{Buffer, Command, Dispatch, Recording, Storage};

/// Uniform offsets must be multiples of this on every WebGPU device.
const UNIFORM_ALIGNMENT: usize = 256;

/// The address of the variant, and the constants it was specialised with.
type PipelineKey = (usize, Constants);

struct Pipeline {
    pipeline: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
}

/// What the device told us outside of a call: the first uncaptured error, and why it was lost.
#[derive(Default)]
struct Trouble {
    error: Option<String>,
    lost: Option<String>,
}

pub(super) struct Gpu {
    device: wgpu::Device,
    queue: wgpu::Queue,
    limits: wgpu::Limits,
    pipelines: Mutex<HashMap<PipelineKey, Arc<Pipeline>>>,
    /// Staging buffers for downloads, reused by size.
    staging: Mutex<Vec<wgpu::Buffer>>,
    trouble: Arc<Mutex<Trouble>>,
}

enum Step {
    Dispatch {
        pipeline: Arc<Pipeline>,
        bind_group: wgpu::BindGroup,
        workgroups: [u32; 3],
    },
    Copy {
        source: wgpu::Buffer,
        source_offset: u64,
        destination: wgpu::Buffer,
        destination_offset: u64,
        bytes: u64,
    },
    Clear(wgpu::Buffer),
}

pub(super) struct Prepared {
    steps: Vec<Step>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn storage(buffer: &Buffer) -> &wgpu::Buffer {
    match &buffer.inner.storage {
        Storage::Gpu(buffer) => buffer,
        Storage::Cpu(_) | Storage::Paper => panic!("{buffer:?} belongs to another engine"),
    }
}

/// The WebGPU defaults, which every kernel keeps to, with the sizes of buffers and bindings as large as the adapter has them.
fn wanted_limits(adapter: &wgpu::Limits) -> Result<wgpu::Limits, Error> {
    let defaults = wgpu::Limits::default();
    let needed: [(&'static str, u64, u64); 4] = [
        (
            "storage buffers in a kernel",
            8,
            adapter.max_storage_buffers_per_shader_stage.into(),
        ),
        (
            "bytes of workgroup memory",
            16_384,
            adapter.max_compute_workgroup_storage_size.into(),
        ),
        (
            "invocations in a workgroup",
            256,
            adapter.max_compute_invocations_per_workgroup.into(),
        ),
        (
            "bytes in a storage binding",
            128 << 20,
            adapter.max_storage_buffer_binding_size,
        ),
    ];
    for (limit, needed, had) in needed {
        if had < needed {
            return Err(Error::LimitTooSmall {
                limit,
                needed,
                had,
                advice: "; use another adapter or `--device cpu`",
            });
        }
    }
    Ok(wgpu::Limits {
        max_buffer_size: adapter.max_buffer_size,
        max_storage_buffer_binding_size: adapter.max_storage_buffer_binding_size,
        ..defaults.or_worse_values_from(adapter)
    })
}

/// Optional abilities that variants may use. In a browser none: wgpu 30 maps neither of them there (gfx-rs/wgpu#10146).
fn wanted_features(adapter: &wgpu::Adapter) -> wgpu::Features {
    if cfg!(target_arch = "wasm32") {
        return wgpu::Features::empty();
    }
    adapter.features() & (wgpu::Features::SHADER_F16 | wgpu::Features::SUBGROUP)
}

impl Gpu {
    pub async fn open(adapter: wgpu::Adapter) -> Result<Self, Error> {
        let limits = wanted_limits(&adapter.limits())?;
        let (device, queue) = adapter
            .request_device(&wgpu::DeviceDescriptor {
                label: Some("sflllm"),
                required_features: wanted_features(&adapter),
                required_limits: limits.clone(),
                memory_hints: wgpu::MemoryHints::MemoryUsage,
                ..Default::default()
            })
            .await
            .map_err(|error| Error::Request(error.to_string()))?;
        let trouble = Arc::new(Mutex::new(Trouble::default()));
        let errors = trouble.clone();
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            lock(&errors).error.get_or_insert(error.to_string());
        }));
        let losses = trouble.clone();
        device.set_device_lost_callback(move |reason, message| {
            lock(&losses).lost.get_or_insert(format!("{reason:?}: {message}"));
        });
        Ok(Self {
            device,
            queue,
            limits,
            pipelines: Mutex::default(),
            staging: Mutex::default(),
            trouble,
        })
    }

    /// What variants may use; its class is that of a GPU.
    pub fn profile(&self) -> Profile {
        let features = self.device.features();
        Profile {
            features: Features {
                shader_f16: features.contains(wgpu::Features::SHADER_F16),
                subgroups: features.contains(wgpu::Features::SUBGROUP),
            },
            invocations: self.limits.max_compute_invocations_per_workgroup,
            workgroup_bytes: self.limits.max_compute_workgroup_storage_size,
            ..Profile::of(DeviceClass::Gpu)
        }
    }

    pub(crate) fn max_buffer_bytes(&self) -> u64 {
        self.limits
            .max_storage_buffer_binding_size
            .min(self.limits.max_buffer_size)
    }

    fn check(&self) -> Result<(), Error> {
        let trouble = lock(&self.trouble);
        if let Some(lost) = &trouble.lost {
            return Err(Error::DeviceLost(lost.clone()));
        }
        if let Some(error) = &trouble.error {
            return Err(Error::Device(error.clone()));
        }
        Ok(())
    }

    pub fn buffer(&self, name: &str, words: usize) -> Result<wgpu::Buffer, Error> {
        let size = words as u64 * 4;
        if size > self.max_buffer_bytes() {
            return Err(Error::LimitTooSmall {
                limit: "bytes in a storage binding",
                needed: size,
                had: self.max_buffer_bytes(),
                advice: "; use a smaller --batch or --seq, or `--device cpu`",
            });
        }
        let buffer = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(name),
            size,
            usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        self.check()?;
        Ok(buffer)
    }

    pub fn upload(&self, buffer: &Buffer, offset: usize, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.queue.write_buffer(storage(buffer), offset as u64 * 4, bytes);
        }
    }

    fn pipeline(&self, variant: &'static Variant, constants: &Constants) -> Arc<Pipeline> {
        let contract = variant.contract;
        let key = (std::ptr::from_ref(variant) as usize, constants.clone());
        if let Some(pipeline) = lock(&self.pipelines).get(&key) {
            return pipeline.clone();
        }
        let source = specialise(&variant.source(), constants);
        let module = self.device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label: Some(contract.name),
            source: wgpu::ShaderSource::Wgsl(source.into()),
        });
        let entry = |binding: usize, ty| wgpu::BindGroupLayoutEntry {
            binding: binding as u32,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty,
                has_dynamic_offset: false,
                min_binding_size: None,
            },
            count: None,
        };
        let uniform = (contract.params_size > 0).then(|| entry(0, wgpu::BufferBindingType::Uniform));
        let storage = contract.bindings.iter().enumerate().map(|(i, binding)| {
            entry(
                i + 1,
                wgpu::BufferBindingType::Storage {
                    read_only: binding.access == Access::Read,
                },
            )
        });
        let entries: Vec<_> = uniform.into_iter().chain(storage).collect();
        let layout = self.device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label: Some(contract.name),
            entries: &entries,
        });
        let pipeline_layout = self.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(contract.name),
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let pipeline = self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(contract.name),
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some(variant.entry),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &[],
                // Every kernel writes its workgroup memory before it reads it.
                zero_initialize_workgroup_memory: false,
            },
            cache: None,
        });
        let pipeline = Arc::new(Pipeline { pipeline, layout });
        lock(&self.pipelines).insert(key, pipeline.clone());
        pipeline
    }

    pub fn prepare(&self, recording: &Recording) -> Prepared {
        let mut arena: Vec<u8> = Vec::new();
        let offsets: Vec<usize> = recording
            .commands()
            .iter()
            .map(|command| {
                let start = arena.len();
                if let Command::Dispatch(dispatch) = command {
                    arena.extend_from_slice(&dispatch.params);
                    arena.resize(arena.len().next_multiple_of(UNIFORM_ALIGNMENT), 0);
                }
                start
            })
            .collect();
        let uniforms = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("params"),
            size: arena.len().max(UNIFORM_ALIGNMENT) as u64,
            usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        if !arena.is_empty() {
            self.queue.write_buffer(&uniforms, 0, &arena);
        }
        let steps = recording
            .commands()
            .iter()
            .zip(offsets)
            .map(|(command, offset)| match command {
                Command::Dispatch(dispatch) => self.prepare_dispatch(dispatch, &uniforms, offset),
                Command::Copy {
                    source,
                    source_offset,
                    destination,
                    destination_offset,
                    words,
                } => Step::Copy {
                    source: storage(source).clone(),
                    source_offset: *source_offset as u64 * 4,
                    destination: storage(destination).clone(),
                    destination_offset: *destination_offset as u64 * 4,
                    bytes: *words as u64 * 4,
                },
                Command::Clear(buffer) => Step::Clear(storage(buffer).clone()),
            })
            .collect();
        Prepared { steps }
    }

    fn prepare_dispatch(&self, dispatch: &Dispatch, uniforms: &wgpu::Buffer, offset: usize) -> Step {
        let launch = dispatch
            .launch
            .as_ref()
            .unwrap_or_else(|| panic!("{:?} was recorded for the CPU engine", dispatch.contract));
        let pipeline = self.pipeline(launch.variant, &launch.constants);
        let uniform = std::num::NonZeroU64::new(dispatch.params.len() as u64).map(|size| wgpu::BindGroupEntry {
            binding: 0,
            resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                buffer: uniforms,
                offset: offset as u64,
                size: Some(size),
            }),
        });
        let entries: Vec<_> = uniform
            .into_iter()
            .chain(
                dispatch
                    .buffers
                    .iter()
                    .enumerate()
                    .map(|(i, buffer)| wgpu::BindGroupEntry {
                        binding: i as u32 + 1,
                        resource: storage(buffer).as_entire_binding(),
                    }),
            )
            .collect();
        let bind_group = self.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some(dispatch.contract.name),
            layout: &pipeline.layout,
            entries: &entries,
        });
        Step::Dispatch {
            pipeline,
            bind_group,
            workgroups: launch.workgroups,
        }
    }

    pub fn run(&self, prepared: &Prepared) -> Result<(), Error> {
        let mut encoder = self
            .device
            .create_command_encoder(&wgpu::CommandEncoderDescriptor { label: None });
        let mut steps = prepared.steps.iter().peekable();
        while let Some(step) = steps.next() {
            match step {
                Step::Dispatch { .. } => {
                    let mut pass = encoder.begin_compute_pass(&Default::default());
                    let mut next = Some(step);
                    while let Some(Step::Dispatch {
                        pipeline,
                        bind_group,
                        workgroups: [x, y, z],
                    }) = next
                    {
                        pass.set_pipeline(&pipeline.pipeline);
                        pass.set_bind_group(0, bind_group, &[]);
                        pass.dispatch_workgroups(*x, *y, *z);
                        next = steps.next_if(|step| matches!(step, Step::Dispatch { .. }));
                    }
                }
                Step::Copy {
                    source,
                    source_offset,
                    destination,
                    destination_offset,
                    bytes,
                } => encoder.copy_buffer_to_buffer(source, *source_offset, destination, *destination_offset, *bytes),
                Step::Clear(buffer) => encoder.clear_buffer(buffer, 0, None),
            }
        }
        self.queue.submit([encoder.finish()]);
        self.check()
    }

    fn take_staging(&self, size: u64) -> wgpu::Buffer {
        let mut staging = lock(&self.staging);
        if let Some(i) = staging.iter().position(|buffer| buffer.size() == size) {
            return staging.swap_remove(i);
        }
        self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("staging"),
            size,
            usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        })
    }

    fn return_staging(&self, buffer: wgpu::Buffer) {
        /// Enough for what a step reads back at two shapes.
        const KEPT: usize = 8;
        let mut staging = lock(&self.staging);
        if staging.len() == KEPT {
            staging.remove(0);
        }
        staging.push(buffer);
    }

    /// Maps `buffer`, once everything submitted before has finished.
    async fn map(&self, buffer: &wgpu::Buffer) -> Result<(), Error> {
        let (sender, receiver) = futures_channel::oneshot::channel();
        buffer.map_async(wgpu::MapMode::Read, .., move |result| {
            // The receiver is gone only if the download was given up.
            let _ = sender.send(result);
        });
        #[cfg(not(target_arch = "wasm32"))]
        self.device
            .poll(wgpu::PollType::wait_indefinitely())
            .map_err(|error| Error::DeviceLost(error.to_string()))?;
        let mapped = receiver.await;
        self.check()?;
        match mapped {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(Error::Device(error.to_string())),
            Err(_) => Err(Error::DeviceLost("a download was cancelled".to_owned())),
        }
    }

    pub async fn download<T: bytemuck::Pod>(
        &self,
        buffer: &Buffer,
        offset: usize,
        words: usize,
    ) -> Result<Vec<T>, Error> {
        if words == 0 {
            return Ok(Vec::new());
        }
        let size = words as u64 * 4;
        let staging = self.take_staging(size);
        let mut encoder = self
            .device
            .create_command_encoder(&wgpu::CommandEncoderDescriptor { label: None });
        encoder.copy_buffer_to_buffer(storage(buffer), offset as u64 * 4, &staging, 0, size);
        self.queue.submit([encoder.finish()]);
        self.map(&staging).await?;
        let data = {
            let view = staging
                .get_mapped_range(..)
                .map_err(|error| Error::Device(error.to_string()))?;
            bytemuck::pod_collect_to_vec(&view)
        };
        staging.unmap();
        self.return_staging(staging);
        Ok(data)
    }

    pub async fn wait(&self) -> Result<(), Error> {
        let staging = self.take_staging(UNIFORM_ALIGNMENT as u64);
        let mut encoder = self
            .device
            .create_command_encoder(&wgpu::CommandEncoderDescriptor { label: None });
        encoder.clear_buffer(&staging, 0, None);
        self.queue.submit([encoder.finish()]);
        self.map(&staging).await?;
        staging.unmap();
        self.return_staging(staging);
        Ok(())
    }
}
