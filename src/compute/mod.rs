//! The runtime: buffers, recordings and the two engines that run them. The only module that names wgpu.
//!
//! ```text
//! launcher (kernels/*) ──▶ Recording ──prepare──▶ Prepared ──run──▶ buffers ──download──▶ numbers
//! ```
//!
//! A training step is recorded once per shape, prepared once (pipelines, bind groups, one uniform arena) and replayed every
//! step with one submission; only the contents of its input buffers change. Everything above this module is the same for a
//! GPU, an emulated adapter, a browser and the CPU engine.

pub(crate) mod cpu;
pub mod device;
mod gpu;
pub(crate) mod host;
pub mod kernel;
pub mod real;
pub mod recording;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};

pub use device::{AdapterSummary, Selection};
pub use kernel::{DeviceClass, Profile};
pub use recording::{Buffer, Command, Cost, Recording, linear_workgroups};
use recording::{BufferInner, Storage};

/// What can go wrong between this crate and a device.
#[expect(missing_docs, reason = "the messages say it")]
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
    Cpu(cpu::Runs),
    Gpu(Box<gpu::Gpu>),
    Paper,
}

/// Runs recordings, on a GPU through wgpu or on the CPU through the kernels' host functions. Cloning shares the device.
#[derive(Clone)]
pub struct Engine {
    backend: Arc<Backend>,
    profile: Profile,
    name: String,
    memory: Arc<Memory>,
}

/// Bytes of the buffers that an engine has made and that are still held.
#[derive(Debug, Default)]
pub(crate) struct Memory(AtomicU64);

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
            backend: Arc::new(Backend::Cpu(cpu::Runs::Host)),
            profile: Profile::of(DeviceClass::CpuEngine),
            name: "CPU engine".to_owned(),
            memory: Arc::default(),
        }
    }

    /// A CPU engine that runs the specifications in place of the host functions: slow, and what all else is held against.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn specification() -> Self {
        Self {
            backend: Arc::new(Backend::Cpu(cpu::Runs::Specification)),
            name: "specification".to_owned(),
            ..Self::cpu()
        }
    }

    /// An engine that computes nothing: its buffers have sizes and no contents, downloads are zeros. What a model would cost
    /// is read off what is made and recorded on it, without the memory or the time.
    pub fn paper() -> Self {
        Self {
            backend: Arc::new(Backend::Paper),
            profile: Profile::of(DeviceClass::CpuEngine),
            name: "paper".to_owned(),
            memory: Arc::default(),
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
            profile: Profile {
                class: summary.class,
                ..gpu.profile()
            },
            backend: Arc::new(Backend::Gpu(Box::new(gpu))),
            name: summary.label(),
            memory: Arc::default(),
        })
    }

    /// A GPU engine on any adapter, emulated ones included, for tests. Where there is none it says so on stderr and returns
    /// `None`.
    ///
    /// # Panics
    /// If there is no adapter and `SFLLLM_REQUIRE_GPU=1` is set.
    #[cfg(not(target_arch = "wasm32"))]
    #[expect(clippy::print_stderr, reason = "the test harness takes it")]
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

    /// What launchers are told of this device.
    pub fn profile(&self) -> Profile {
        self.profile
    }

    /// What kind of device the engine runs on.
    pub fn class(&self) -> DeviceClass {
        self.profile.class
    }

    /// Bytes of all buffers made on this device and still held.
    pub fn buffer_bytes(&self) -> u64 {
        self.memory.0.load(Ordering::Relaxed)
    }

    /// An empty recording for this device.
    pub fn recording(&self) -> Recording {
        Recording::new(self.profile)
    }

    /// The largest buffer a kernel may bind, in 32-bit words.
    pub(crate) fn max_buffer_words(&self) -> usize {
        match &*self.backend {
            Backend::Cpu(_) | Backend::Paper => usize::MAX / 8,
            Backend::Gpu(gpu) => gpu.max_buffer_bytes() as usize / 4,
        }
    }

    /// A buffer of `words` zeroed 32-bit words; at least one is allocated.
    pub fn buffer(&self, name: impl Into<String>, words: usize) -> Result<Buffer, Error> {
        let words = words.max(1);
        let name = name.into();
        let storage = match &*self.backend {
            Backend::Cpu(_) => Storage::Cpu(RwLock::new(vec![0; words])),
            Backend::Gpu(gpu) => Storage::Gpu(gpu.buffer(&name, words)?),
            Backend::Paper => Storage::Paper,
        };
        self.memory.0.fetch_add(4 * words as u64, Ordering::Relaxed);
        Ok(Buffer {
            inner: Arc::new(BufferInner {
                name,
                words,
                storage,
                memory: self.memory.clone(),
            }),
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
            Backend::Cpu(_) => {
                bytemuck::cast_slice_mut::<u32, u8>(&mut cpu::write(buffer)[offset..offset + bytes.len() / 4])
                    .copy_from_slice(bytes)
            }
            Backend::Gpu(gpu) => gpu.upload(buffer, offset, bytes),
            Backend::Paper => {}
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
            Backend::Cpu(_) => Ok(bytemuck::pod_collect_to_vec(&cpu::read(buffer)[offset..offset + words])),
            Backend::Gpu(gpu) => gpu.download(buffer, offset, words).await,
            Backend::Paper => Ok(vec![T::zeroed(); words * 4 / std::mem::size_of::<T>()]),
        }
    }

    /// Makes `recording` ready to run: compiles what is not compiled yet and lays out its params.
    pub fn prepare(&self, recording: Recording) -> Prepared {
        let gpu = match &*self.backend {
            Backend::Cpu(_) | Backend::Paper => None,
            Backend::Gpu(gpu) => Some(gpu.prepare(&recording)),
        };
        Prepared { recording, gpu }
    }

    /// Starts one run: all of it in one submission. Errors of the device surface here or at the next [`Engine::download`].
    pub fn run(&self, prepared: &Prepared) -> Result<(), Error> {
        match (&*self.backend, &prepared.gpu) {
            (Backend::Cpu(runs), _) => {
                cpu::run(&prepared.recording, *runs);
                Ok(())
            }
            (Backend::Paper, _) => Ok(()),
            (Backend::Gpu(gpu), Some(prepared)) => gpu.run(prepared),
            (Backend::Gpu(_), None) => panic!("a recording prepared on the CPU engine"),
        }
    }

    /// Waits until everything run so far has finished.
    pub async fn wait(&self) -> Result<(), Error> {
        match &*self.backend {
            Backend::Cpu(_) | Backend::Paper => Ok(()),
            Backend::Gpu(gpu) => gpu.wait().await,
        }
    }
}
