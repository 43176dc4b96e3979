//! The CPU engine: runs each contract's host function, in order. It makes the whole system testable on a bare machine, and lets
//! a machine or tab without a GPU join.

#[cfg(not(target_arch = "wasm32"))]
use std::sync::{Mutex, PoisonError};
use std::sync::{RwLockReadGuard, RwLockWriteGuard};

use super::kernel::{Access, Operand};
use super::recording::{Buffer, Command, Recording, Storage};

/// Which of a contract's two functions the engine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Runs {
    Host,
    #[cfg(not(target_arch = "wasm32"))]
    Specification,
}

fn words(buffer: &Buffer) -> &std::sync::RwLock<Vec<u32>> {
    match &buffer.inner.storage {
        Storage::Cpu(words) => words,
        Storage::Gpu(_) | Storage::Paper => panic!("{buffer:?} belongs to another engine"),
    }
}

pub(super) fn read(buffer: &Buffer) -> RwLockReadGuard<'_, Vec<u32>> {
    words(buffer).read().unwrap_or_else(|poisoned| poisoned.into_inner())
}

pub(super) fn write(buffer: &Buffer) -> RwLockWriteGuard<'_, Vec<u32>> {
    words(buffer).write().unwrap_or_else(|poisoned| poisoned.into_inner())
}

enum Guard<'a> {
    Read(RwLockReadGuard<'a, Vec<u32>>),
    Write(RwLockWriteGuard<'a, Vec<u32>>),
}

fn run_command(command: &Command, runs: Runs) {
    match command {
        Command::Dispatch(dispatch) => {
            // A buffer bound for reading twice is locked once: a second read lock could wait for a writer that waits for us.
            let buffers = &dispatch.buffers;
            let first = |i: usize| (0..=i).find(|&j| buffers[j].is(&buffers[i])).unwrap_or(i);
            let mut guards: Vec<Option<Guard<'_>>> = buffers
                .iter()
                .zip(dispatch.contract.bindings)
                .enumerate()
                .map(|(i, (buffer, binding))| {
                    (first(i) == i).then(|| match binding.access {
                        Access::Read => Guard::Read(read(buffer)),
                        Access::Write => Guard::Write(write(buffer)),
                    })
                })
                .collect();
            let mut operands: Vec<Operand<'_>> = Vec::with_capacity(guards.len());
            for (i, guard) in guards.iter_mut().enumerate() {
                operands.push(match guard {
                    Some(Guard::Read(words)) => Operand::Read(words),
                    Some(Guard::Write(words)) => Operand::Write(words),
                    None => match operands[first(i)] {
                        Operand::Read(words) => Operand::Read(words),
                        Operand::Write(_) => unreachable!("recordings refuse aliased writes"),
                    },
                });
            }
            let compute = match runs {
                Runs::Host => dispatch.contract.host,
                #[cfg(not(target_arch = "wasm32"))]
                Runs::Specification => dispatch.contract.spec,
            };
            compute(&dispatch.params, &mut operands);
        }
        Command::Copy {
            source,
            source_offset,
            destination,
            destination_offset,
            words,
        } => write(destination)[*destination_offset..destination_offset + words]
            .copy_from_slice(&read(source)[*source_offset..source_offset + words]),
        Command::Clear(buffer) => write(buffer).fill(0),
    }
}

pub(super) fn run(recording: &Recording, runs: Runs) {
    let run = || {
        recording
            .commands()
            .iter()
            .for_each(|command| run_command(command, runs));
    };
    #[cfg(not(target_arch = "wasm32"))]
    {
        // On a thread of the pool a command's tasks begin at once: the 210 products of a generated token took 5.8 ms there and
        // 7.3 ms from outside. But one recording at a time, in the pool or beside it: a thread of the pool that waits for tasks takes on
        // others' work, be it a whole recording, which would wait for locks whose holder waits for the tasks beneath it. Letting others run
        // beside the pool, with their tasks in it, came to that: this module's test stood still once.
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        if rayon::current_thread_index().is_none() {
            let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
            return match rayon::current_num_threads() {
                // On the pool's only thread waiting for a lock would hold up the tasks of the lock's holder.
                1 => run(),
                _ => rayon::scope(|_| run()),
            };
        }
    }
    run();
}

/// Calls `row(index, slice)` for every `width`-long row of `out`, on all cores natively and in order in a browser. Rows are
/// independent, so the result does not depend on the number of threads.
pub(crate) fn for_each_row<T: Send>(out: &mut [T], width: usize, row: impl Fn(usize, &mut [T]) + Sync) {
    if width == 0 {
        return;
    }
    if out.len() <= width {
        return out.chunks_mut(width).for_each(|slice| row(0, slice));
    }
    #[cfg(not(target_arch = "wasm32"))]
    {
        use rayon::prelude::*;
        out.par_chunks_mut(width)
            .enumerate()
            .for_each(|(i, slice)| row(i, slice));
    }
    #[cfg(target_arch = "wasm32")]
    out.chunks_mut(width).enumerate().for_each(|(i, slice)| row(i, slice));
}

#[cfg(all(test, not(target_arch = "wasm32")))]
mod tests {
    use super::*;
    use crate::compute::kernel::NoParams;
    use crate::compute::{Cost, Engine};
    use crate::contract;

    contract! {
        /// Adds one to every value, in many tasks.
        static COUNT = "test.count", NoParams,
        [values: Write u32],
        spec: count, host: count, variants: []
    }

    fn count(_: &NoParams, values: &mut [u32]) {
        for_each_row(values, 16, |_, values| values.iter_mut().for_each(|value| *value += 1));
    }

    #[test]
    fn recordings_on_a_shared_buffer_from_many_threads_neither_wait_forever_nor_mix() {
        let engine = Engine::cpu();
        let buffer = engine.buffer("values", 1000).expect("a small buffer");
        let (threads, runs, launches) = (4, 50, 3);
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    let mut recording = engine.recording();
                    for _ in 0..launches {
                        recording.dispatch(&COUNT, NoParams {}, &[&buffer], Cost::default());
                    }
                    let prepared = engine.prepare(recording);
                    for _ in 0..runs {
                        engine.run(&prepared).expect("a run");
                    }
                });
            }
        });
        let values = pollster::block_on(engine.download::<u32>(&buffer, 0, 1000)).expect("download");
        assert_eq!(values, vec![threads * runs * launches; 1000]);
    }
}
