//! Split federated fine-tuning of language models (GPT-2, Llama and SmolLM2, Qwen2, Qwen3) across the devices people already have
//! (SflLLM, arXiv 2504.14667).
//!
//! The model is cut at a block. Edge clients, browser tabs and native processes, run the embedding and the blocks below the cut
//! with LoRA adapters; the main server runs the rest, the head and the loss; the federated server aggregates the clients' adapters.
//! Every kernel is hand-written WGSL, run by wgpu natively and by WebGPU in a browser, and specified by plain loops that the variants
//! for devices and the functions of the CPU engine are held against.
//!
//! # Where to start
//!
//! The command line is the feature `program`, which is on by default. Without it (`default-features = false`) what remains is the
//! library; in `examples/` are four programs of it:
//!
//! * `kernels`: every kernel on this machine's GPU against its specification ([`kernels::examples`], [`compute::Engine`]);
//! * `train`: a model from files, an adapter, ten steps on one device ([`model::central::Central`]);
//! * `sessions`: main server, federated server and two clients in one process train a split model ([`protocol::LocalRun`],
//!   [`client::local`], [`split::ServerPart`]);
//! * `allocation`: a scenario's best plan and the bound below it ([`allocation::solve`]).
//!
//! ```
//! use sflllm::compute::Engine;
//! use sflllm::kernels::swiglu;
//!
//! # pollster::block_on(async {
//! let engine = Engine::cpu(); // or `Engine::open(&Selection::Gpu).await?`
//! let gate_up = engine.buffer_from("gate_up", &[0.0f32, 1.0, 3.0, 3.0])?; // (1, 2·ffn): gates, then ups
//! let out = engine.buffer("out", 2)?; // (1, ffn)
//! let mut recording = engine.recording();
//! swiglu::forward(&mut recording, swiglu::Params { rows: 1, ffn: 2 }, &gate_up, &out);
//! let prepared = engine.prepare(recording); // once
//! engine.run(&prepared)?; // as often as one likes
//! let found: Vec<f32> = engine.download(&out, 0, 2).await?;
//! assert_eq!(found[0], 0.0);
//! assert!((found[1] - 3.0 / (1.0 + (-1.0f32).exp())).abs() < 1e-6);
//! # Ok::<(), sflllm::compute::Error>(())
//! # }).unwrap();
//! ```
//!
//! # The modules, and who may use whom
//!
//! ```text
//! terms                                uses nothing of ours; all that follow may use it
//! compute, data, federated             nothing else
//! machine, transport, hub (native)     nothing of ours
//! disk (native)                        machine
//! protocol                             federated
//! kernels                              compute
//! model                                kernels, compute (native: disk)
//! split                                model, kernels, compute
//! allocation                           model
//! simulation                           protocol, federated, client, data
//! client                               split, model, protocol, data, compute (native: transport, disk, machine)
//! runs (native)                        model, transport, disk
//! server (native)                      split, model, protocol, data, compute, federated, allocation, transport, disk,
//!                                      machine, runs
//! cli (native)                         all of them
//! ```
//!
//! * [`terms`]: the words that all layers share: adapter shapes, wire form, weight format, optimiser settings, moments, speed, phases, ids.
//! * [`compute`]: buffers, recordings, and the GPU and CPU engines that replay them; the only module that names wgpu.
//! * [`kernels`]: contracts with their specifications, the variants that run them, launchers.
//! * [`model`]: architectures, files (safetensors, GGUF, PEFT) in and out, LoRA, the recording of a transformer's passes, the
//!   optimiser, generation; what a step costs, and how many rounds a rank was measured to need.
//! * [`split`]: the client's and the server's side of the cut, and what crosses it.
//! * [`federated`]: clients' adapters to one: means, trimmed means, medians, exact products.
//! * [`protocol`]: messages and state machines of client, main server and federated server, without sockets or clocks.
//! * [`allocation`]: who gets which subchannels, power, cut and rank, so that training takes the least time; certified.
//! * [`simulation`]: a seeded network in virtual time around the state machines, the clients' ([`client::edge`]) among them.
//! * [`data`]: files into examples, examples into batches.
//! * [`client`]: an edge client: session + client part + data. [`client::edge`] says what is done when; a native process and a browser
//!   carry it out; [`client::local`] does without it, in one thread with its servers.
//! * `runs`: the directory that a run has to itself, and the snapshots that it resumes from.
//! * `hub`: models by name from huggingface.co, in the cache that Python's huggingface_hub keeps.
//!
//! # One training step
//!
//! 1. [`client::edge`] hands received bytes to its [`protocol`] session, which asks for step n.
//! 2. [`data`] gives tokens and targets; [`split::ClientPart`] replays its prepared forward recording ([`model::stack`]) and reads
//!    the cut activations back in their wire form.
//! 3. The session sends them; the main server's session collects the contributions of the step's members.
//! 4. [`split::ServerPart`] runs blocks, head, loss and the way back for each of them, and takes its optimiser step.
//! 5. Each client gets the gradient of its own loss, replays its backward recording and takes its own optimiser step.
//! 6. At the end of a round the clients' adapters go to the federated session, which aggregates and broadcasts.
//!
//! Between rounds a planner (`server::planner`) may move the cut: blocks change sides with their adapter and the optimiser's
//! moments, and the clients load what they lack. Before the first round it may give every client a cut of its own, for the whole run:
//! the server then holds the blocks from the smallest cut on, and those that some clients hold too are averaged over both. It may also give every client's uplinks a rate (`protocol`).

#![cfg_attr(
    target_arch = "wasm32",
    expect(clippy::arc_with_non_send_sync, reason = "a browser's Worker has one thread")
)]

#[warn(missing_docs)]
pub mod allocation;
#[warn(missing_docs)]
pub mod client;
#[warn(missing_docs)]
pub mod compute;
#[warn(missing_docs)]
pub mod data;
#[warn(missing_docs)]
pub mod federated;
pub mod kernels;
pub mod model;
pub mod protocol;
#[warn(missing_docs)]
pub mod split;
#[warn(missing_docs)]
pub mod terms;

// Test support: what a simulated run tells is for tests of these machines.
#[doc(hidden)]
pub mod simulation;

// The program's own rooms: reachable for its binary and tests, and no promise to anybody else.
#[cfg(all(feature = "program", not(target_arch = "wasm32")))]
#[doc(hidden)]
pub mod cli;
#[cfg(not(target_arch = "wasm32"))]
#[doc(hidden)]
pub mod disk;
#[cfg(all(feature = "program", not(target_arch = "wasm32")))]
#[doc(hidden)]
pub mod hub;
#[cfg(not(target_arch = "wasm32"))]
#[doc(hidden)]
pub mod machine;
#[cfg(all(feature = "program", not(target_arch = "wasm32")))]
#[doc(hidden)]
pub mod runs;
#[cfg(all(feature = "program", not(target_arch = "wasm32")))]
#[doc(hidden)]
pub mod server;
#[cfg(all(feature = "program", not(target_arch = "wasm32")))]
#[doc(hidden)]
pub mod transport;
