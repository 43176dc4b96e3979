//! A recording: the ordered dispatches, copies and clears of a step, on named buffers, with no graphics API in sight.
//!
//! Shapes are static per recording, so it is prepared once and replayed with only the contents of its input buffers changed.

use std::sync::Arc;

use super::kernel::{Access, Constants, Contract, DeviceClass, Params, Profile, Variant};

/// A named block of 32-bit words on an engine. Cloning shares it; the memory is freed with the last clone.
#[derive(Clone)]
pub struct Buffer {
    pub(super) inner: Arc<BufferInner>,
}

pub(super) struct BufferInner {
    pub name: String,
    pub words: usize,
    pub storage: Storage,
    /// Where the engine counts what it holds.
    pub memory: Arc<super::Memory>,
}

impl Drop for BufferInner {
    fn drop(&mut self) {
        self.memory
            .0
            .fetch_sub(4 * self.words as u64, std::sync::atomic::Ordering::Relaxed);
    }
}

pub(super) enum Storage {
    Cpu(std::sync::RwLock<Vec<u32>>),
    Gpu(wgpu::Buffer),
    /// Of the engine that computes nothing.
    Paper,
}

impl Buffer {
    /// As it was given when the buffer was made: for error texts.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Length in 32-bit words.
    pub fn words(&self) -> usize {
        self.inner.words
    }

    /// Whether both are the same memory.
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
    /// What is computed.
    pub contract: &'static Contract,
    /// How a device runs it; `None` in a recording for the CPU engine.
    pub launch: Option<Launch>,
    /// The bytes of the params struct.
    pub params: Vec<u8>,
    /// In the order of the contract's bindings.
    pub buffers: Vec<Buffer>,
    /// What the launcher says it takes.
    pub cost: Cost,
}

/// A variant made ready for some params.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The way that was chosen for the device.
    pub variant: &'static Variant,
    /// WGSL constants set for the params.
    pub constants: Constants,
    /// In x, y, z.
    pub workgroups: [u32; 3],
}

/// One entry of a recording, in the order of execution.
#[derive(Clone, Debug)]
pub enum Command {
    /// Launches a kernel.
    Dispatch(Dispatch),
    /// Copies `words` words; source and destination are different buffers.
    Copy {
        /// Where from.
        source: Buffer,
        /// The first word there.
        source_offset: usize,
        /// Where to.
        destination: Buffer,
        /// The first word there.
        destination_offset: usize,
        /// How many.
        words: usize,
    },
    /// Sets every word to zero.
    Clear(Buffer),
}

/// The ordered commands of a step.
#[derive(Clone, Debug)]
pub struct Recording {
    profile: Profile,
    commands: Vec<Command>,
}

impl Recording {
    /// An empty recording for a device.
    pub fn new(profile: Profile) -> Self {
        Self {
            profile,
            commands: Vec::new(),
        }
    }

    /// The device that this is recorded for.
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// What was recorded, in order.
    pub fn commands(&self) -> &[Command] {
        &self.commands
    }

    /// Adds a launch of `contract` on `buffers`, in the order of the contract's bindings, by the variant that the device's
    /// profile chooses.
    ///
    /// # Panics
    /// On a wrong number of buffers, a params struct of another contract, a buffer bound for writing and bound again, or more
    /// than 65,535 workgroups in a dimension: bugs in a launcher.
    pub fn dispatch<P: Params>(&mut self, contract: &'static Contract, params: P, buffers: &[&Buffer], cost: Cost) {
        assert_eq!(
            buffers.len(),
            contract.bindings.len(),
            "{contract:?} takes {:?}",
            contract.bindings
        );
        assert_eq!(
            std::mem::size_of::<P>(),
            contract.params_size,
            "{contract:?} takes other params"
        );
        for (i, binding) in contract.bindings.iter().enumerate() {
            let aliased = binding.access == Access::Write
                && buffers
                    .iter()
                    .enumerate()
                    .any(|(j, other)| i != j && other.is(buffers[i]));
            assert!(
                !aliased,
                "{contract:?}: `{}` is written and bound twice ({:?})",
                binding.name, buffers[i]
            );
        }
        let params = bytemuck::bytes_of(&params).to_vec();
        let launch = (self.profile.class != DeviceClass::CpuEngine).then(|| {
            let variant = contract.choose(&self.profile, &params);
            let workgroups = (variant.grid)(&params);
            assert!(
                workgroups.iter().all(|&n| n <= 65_535),
                "{variant:?}: {workgroups:?} workgroups"
            );
            Launch {
                variant,
                constants: (variant.constants)(&params),
                workgroups,
            }
        });
        self.commands.push(Command::Dispatch(Dispatch {
            contract,
            launch,
            params,
            buffers: buffers.iter().map(|&buffer| buffer.clone()).collect(),
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

    /// Records that a buffer becomes zero.
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
