//! A recording: the ordered dispatches, copies and clears of a step, on named buffers, with no graphics API in sight.
//!
//! Shapes are static per recording, so it is prepared once and replayed with only the contents of its input buffers changed.

use std::sync::Arc;

use super::kernel::{Access, Constants, Kernel, Params};

/// What kind of processor runs the kernels; launchers choose among tilings by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeviceClass {
    /// A real GPU: workgroup memory and barriers are cheap.
    Gpu,
    /// A Vulkan or WebGPU adapter emulated on the CPU (lavapipe, SwiftShader): register tiles win, barriers are emulated.
    CpuAdapter,
    /// This crate's CPU engine, which runs the references and ignores tiling.
    CpuEngine,
}

/// A named block of 32-bit words on an engine. Cloning shares it; the memory is freed with the last clone.
#[derive(Clone)]
pub struct Buffer {
    pub(super) inner: Arc<BufferInner>,
}

pub(super) struct BufferInner {
    pub name: String,
    pub words: usize,
    pub storage: Storage,
}

pub(super) enum Storage {
    Cpu(std::sync::RwLock<Vec<u32>>),
    Gpu(wgpu::Buffer),
}

impl Buffer {
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Length in 32-bit words.
    pub fn words(&self) -> usize {
        self.inner.words
    }

    pub fn is(&self, other: &Buffer) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}[{}]", self.inner.name, self.inner.words)
    }
}

/// The arithmetic and memory traffic a dispatch must do, for rates and for the delay model.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Floating-point operations; a multiply-add is two.
    pub flops: f64,
    /// Bytes read once plus bytes written once.
    pub bytes: f64,
}

/// One kernel launch.
#[derive(Clone, Debug)]
pub struct Dispatch {
    pub kernel: &'static Kernel,
    pub constants: Constants,
    pub params: Vec<u8>,
    pub buffers: Vec<Buffer>,
    pub workgroups: [u32; 3],
    pub cost: Cost,
}

#[derive(Clone, Debug)]
pub enum Command {
    Dispatch(Dispatch),
    /// Copies `words` words; source and destination are different buffers.
    Copy {
        source: Buffer,
        source_offset: usize,
        destination: Buffer,
        destination_offset: usize,
        words: usize,
    },
    /// Sets every word to zero.
    Clear(Buffer),
}

/// The ordered commands of a step.
#[derive(Clone, Debug)]
pub struct Recording {
    class: DeviceClass,
    commands: Vec<Command>,
}

impl Recording {
    pub fn new(class: DeviceClass) -> Self {
        Self {
            class,
            commands: Vec::new(),
        }
    }

    pub fn class(&self) -> DeviceClass {
        self.class
    }

    pub fn commands(&self) -> &[Command] {
        &self.commands
    }

    /// Adds a launch of `kernel` on `buffers`, in the order of the kernel's bindings.
    ///
    /// # Panics
    /// On a wrong number of buffers, a params struct of another kernel, a buffer bound for writing and bound again, or more
    /// than 65,535 workgroups in a dimension: bugs in a launcher.
    pub fn dispatch<P: Params>(
        &mut self,
        kernel: &'static Kernel,
        constants: Constants,
        params: P,
        buffers: &[&Buffer],
        workgroups: [u32; 3],
        cost: Cost,
    ) {
        assert_eq!(
            buffers.len(),
            kernel.bindings.len(),
            "{kernel:?} takes {:?}",
            kernel.bindings
        );
        assert_eq!(
            std::mem::size_of::<P>(),
            kernel.params_size,
            "{kernel:?} takes other params"
        );
        assert!(
            workgroups.iter().all(|&n| n <= 65_535),
            "{kernel:?}: {workgroups:?} workgroups"
        );
        for (i, binding) in kernel.bindings.iter().enumerate() {
            let aliased = binding.access == Access::Write
                && buffers
                    .iter()
                    .enumerate()
                    .any(|(j, other)| i != j && other.is(buffers[i]));
            assert!(
                !aliased,
                "{kernel:?}: `{}` is written and bound twice ({:?})",
                binding.name, buffers[i]
            );
        }
        self.commands.push(Command::Dispatch(Dispatch {
            kernel,
            constants,
            params: bytemuck::bytes_of(&params).to_vec(),
            buffers: buffers.iter().map(|&buffer| buffer.clone()).collect(),
            workgroups,
            cost,
        }));
    }

    /// # Panics
    /// If a range leaves its buffer or both are the same buffer.
    pub fn copy(
        &mut self,
        (source, source_offset): (&Buffer, usize),
        (destination, destination_offset): (&Buffer, usize),
        words: usize,
    ) {
        assert!(!source.is(destination), "{source:?} copied onto itself");
        assert!(
            source_offset + words <= source.words(),
            "{source:?} is shorter than the copy"
        );
        assert!(
            destination_offset + words <= destination.words(),
            "{destination:?} is shorter than the copy"
        );
        self.commands.push(Command::Copy {
            source: source.clone(),
            source_offset,
            destination: destination.clone(),
            destination_offset,
            words,
        });
    }

    pub fn clear(&mut self, buffer: &Buffer) {
        self.commands.push(Command::Clear(buffer.clone()));
    }

    /// The arithmetic and traffic of all dispatches.
    pub fn cost(&self) -> Cost {
        self.commands
            .iter()
            .fold(Cost::default(), |sum, command| match command {
                Command::Dispatch(dispatch) => Cost {
                    flops: sum.flops + dispatch.cost.flops,
                    bytes: sum.bytes + dispatch.cost.bytes,
                },
                _ => sum,
            })
    }
}

/// Workgroups for `items` invocations of which each workgroup runs `size`, folded into two dimensions because one dimension
/// holds 65,535 at most. The shader's index is `id.x + id.y * (groups.x * SIZE)` with `groups` from `num_workgroups`.
pub fn linear_workgroups(items: usize, size: u32) -> [u32; 3] {
    let groups = items.div_ceil(size as usize).max(1);
    let rows = groups.div_ceil(65_535);
    [groups.div_ceil(rows) as u32, rows as u32, 1]
}

#[cfg(test)]
mod tests {
    use super::linear_workgroups;

    #[test]
    fn linear_workgroups_cover_every_item_within_the_limit() {
        for items in [1, 63, 64, 65, 65_535 * 64, 65_535 * 64 + 1, 300_000_000] {
            let [x, y, z] = linear_workgroups(items, 64);
            assert!(x <= 65_535 && y <= 65_535 && z == 1);
            assert!(x as usize * y as usize * 64 >= items);
        }
    }
}
