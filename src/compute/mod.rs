//! The runtime: buffers, recordings and the two engines that run them. The only module that names wgpu.
//!
//! ```text
//! launcher (kernels/*) ──▶ Recording ──prepare──▶ Prepared ──run──▶ buffers ──download──▶ numbers
//! ```
//!
//! A training step is recorded once per shape, prepared once (pipelines, bind groups, one uniform arena) and replayed every
//! step with one submission; only the contents of its input buffers change. Everything above this module is the same for a
//! GPU, an emulated adapter, a browser and the CPU engine.

pub mod cpu;
pub mod device;
mod gpu;
pub mod kernel;
pub mod recording;

use std::sync::{Arc, RwLock};

pub use device::{AdapterSummary, Selection};
pub use recording::{Buffer, Command, Cost, DeviceClass, Recording, linear_workgroups};
use recording::{BufferInner, Storage};

/// What can go wrong between this crate and a device.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "no GPU adapter found ({0}); use `--device cpu`, or install a Vulkan driver (Debian/Ubuntu: apt install mesa-vulkan-drivers)"
    )]
    NoAdapter(String),
    #[error("no adapter is called `{wanted}`; this machine has: {found}")]
    UnknownAdapter { wanted: String, found: String },
    #[error("the device allows {had} for {limit} but {needed} is needed{advice}")]
    LimitTooSmall {
        limit: &'static str,
        needed: u64,
        had: u64,
        advice: &'static str,
    },
    #[error("the device could not be opened: {0}")]
    Request(String),
    #[error("the device was lost ({0}); close other programs that use it, or start again with `--device cpu`")]
    DeviceLost(String),
    #[error("the device reported: {0}; try a smaller --batch or --seq, or `--device cpu`, and report this if it stays")]
    Device(String),
}

enum Backend {
    Cpu,
    Gpu(Box<gpu::Gpu>),
}

/// Runs recordings, on a GPU through wgpu or on the CPU through the kernels' references. Cloning shares the device.
#[derive(Clone)]
pub struct Engine {
    backend: Arc<Backend>,
    class: DeviceClass,
    name: String,
}

/// A recording made ready to run any number of times.
pub struct Prepared {
    recording: Recording,
    gpu: Option<gpu::Prepared>,
}

impl Prepared {
    /// The arithmetic and traffic of one run.
    pub fn cost(&self) -> Cost {
        self.recording.cost()
    }
}

impl Engine {
    /// The CPU engine.
    pub fn cpu() -> Self {
        Self {
            backend: Arc::new(Backend::Cpu),
            class: DeviceClass::CpuEngine,
            name: "CPU engine".to_owned(),
        }
    }

    /// Opens the device that `selection` names.
    pub async fn open(selection: &Selection) -> Result<Self, Error> {
        let adapter = match device::choose(selection).await? {
            None => return Ok(Self::cpu()),
            Some(adapter) => adapter,
        };
        let summary = device::summary(&adapter);
        let gpu = gpu::Gpu::open(adapter).await?;
        Ok(Self {
            backend: Arc::new(Backend::Gpu(Box::new(gpu))),
            class: summary.class,
            name: summary.label(),
        })
    }

    /// A GPU engine on any adapter, emulated ones included, for tests. Where there is none it says so on stderr and returns
    /// `None`.
    ///
    /// # Panics
    /// If there is no adapter and `SFLLLM_REQUIRE_GPU=1` is set.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn gpu_for_tests() -> Option<Self> {
        match pollster::block_on(Self::open(&Selection::Gpu)) {
            Ok(engine) => Some(engine),
            Err(error) if std::env::var_os("SFLLLM_REQUIRE_GPU").is_some_and(|v| v == "1") => {
                panic!("SFLLLM_REQUIRE_GPU=1, but {error}")
            }
            Err(error) => {
                eprintln!("NOT TESTED ON A GPU: {error}");
                None
            }
        }
    }

    /// What to call this device in output.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn class(&self) -> DeviceClass {
        self.class
    }

    /// An empty recording for this device.
    pub fn recording(&self) -> Recording {
        Recording::new(self.class)
    }

    /// The largest buffer a kernel may bind, in 32-bit words.
    pub fn max_buffer_words(&self) -> usize {
        match &*self.backend {
            Backend::Cpu => usize::MAX / 8,
            Backend::Gpu(gpu) => gpu.max_buffer_bytes() as usize / 4,
        }
    }

    /// A buffer of `words` zeroed 32-bit words; at least one is allocated.
    pub fn buffer(&self, name: impl Into<String>, words: usize) -> Result<Buffer, Error> {
        let words = words.max(1);
        let name = name.into();
        let storage = match &*self.backend {
            Backend::Cpu => Storage::Cpu(RwLock::new(vec![0; words])),
            Backend::Gpu(gpu) => Storage::Gpu(gpu.buffer(&name, words)?),
        };
        Ok(Buffer {
            inner: Arc::new(BufferInner { name, words, storage }),
        })
    }

    /// A buffer holding `data`.
    pub fn buffer_from<T: bytemuck::NoUninit>(&self, name: impl Into<String>, data: &[T]) -> Result<Buffer, Error> {
        let words = std::mem::size_of_val(data) / 4;
        let buffer = self.buffer(name, words)?;
        self.upload(&buffer, 0, data);
        Ok(buffer)
    }

    /// Writes `data`, a whole number of words, into `buffer` from word `offset` on, before the next run.
    ///
    /// # Panics
    /// If the data is longer than the buffer or not a whole number of words.
    pub fn upload<T: bytemuck::NoUninit>(&self, buffer: &Buffer, offset: usize, data: &[T]) {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        assert_eq!(bytes.len() % 4, 0, "{buffer:?} takes whole words");
        assert!(
            offset + bytes.len() / 4 <= buffer.words(),
            "{buffer:?} is shorter than {offset} + {}",
            bytes.len() / 4
        );
        match &*self.backend {
            Backend::Cpu => {
                bytemuck::cast_slice_mut::<u32, u8>(&mut cpu::write(buffer)[offset..offset + bytes.len() / 4])
                    .copy_from_slice(bytes)
            }
            Backend::Gpu(gpu) => gpu.upload(buffer, offset, bytes),
        }
    }

    /// Reads `words` words of `buffer` from word `offset` on, after everything run so far.
    pub async fn download<T: bytemuck::Pod>(
        &self,
        buffer: &Buffer,
        offset: usize,
        words: usize,
    ) -> Result<Vec<T>, Error> {
        assert!(
            offset + words <= buffer.words(),
            "{buffer:?} is shorter than {offset} + {words}"
        );
        match &*self.backend {
            Backend::Cpu => Ok(bytemuck::pod_collect_to_vec(&cpu::read(buffer)[offset..offset + words])),
            Backend::Gpu(gpu) => gpu.download(buffer, offset, words).await,
        }
    }

    /// Makes `recording` ready to run: compiles what is not compiled yet and lays out its params.
    pub fn prepare(&self, recording: Recording) -> Prepared {
        let gpu = match &*self.backend {
            Backend::Cpu => None,
            Backend::Gpu(gpu) => Some(gpu.prepare(&recording)),
        };
        Prepared { recording, gpu }
    }

    /// Starts one run: all of it in one submission. Errors of the device surface here or at the next [`Engine::download`].
    pub fn run(&self, prepared: &Prepared) -> Result<(), Error> {
        match (&*self.backend, &prepared.gpu) {
            (Backend::Cpu, _) => {
                cpu::run(&prepared.recording);
                Ok(())
            }
            (Backend::Gpu(gpu), Some(prepared)) => gpu.run(prepared),
            (Backend::Gpu(_), None) => panic!("a recording prepared on the CPU engine"),
        }
    }

    /// Waits until everything run so far has finished.
    pub async fn wait(&self) -> Result<(), Error> {
        match &*self.backend {
            Backend::Cpu => Ok(()),
            Backend::Gpu(gpu) => gpu.wait().await,
        }
    }
}
